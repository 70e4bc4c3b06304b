//! What a guest boots from: kernels of Debian, made ready by `guest-images/`, and the initramfs with our walker.
//!
//! Nothing here uses the network: kernels are fetched by `scripts/setup`, and a test without one is skipped.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Failed;
use libtest_mimic::Trial;

use crate::cpio;

/// The kernels that guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian bookworm's: virtio and fuse are modules, one request queue is used.
    V6_1,
    /// 7.1 or newer: checks used lengths, uses several queues, virtiofs is built in.
    V7,
    /// User-Mode Linux of Debian bookworm, a program.
    UserMode,
}

impl Kernel {
    /// Those that QEMU runs, the fast one first.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V7];

    /// The name in test names and in `guest-images/kernel`.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V7 => "7",
            Self::UserMode => "uml",
        }
    }

    /// The directory with `vmlinux`, if it was fetched.
    fn directory(self) -> Result<PathBuf> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/kernel");
        let out = Command::new(script).args(["--cached", self.name()]).output().context("guest-images/kernel")?;
        ensure!(out.status.success(), "guest kernel {} is not here", self.name());
        Ok(PathBuf::from(String::from_utf8(out.stdout)?.trim()))
    }

    /// The uncompressed kernel.
    pub fn vmlinux(self) -> Result<PathBuf> {
        Ok(self.directory()?.join("vmlinux"))
    }

    /// The program that [`Kernel::UserMode`] is.
    pub fn linux_uml(self) -> Result<PathBuf> {
        Ok(self.directory()?.join("linux.uml"))
    }

    /// The initramfs, with `script` (see `guest-images/init`) where one is given. Written to `directory`.
    pub fn initramfs(self, directory: &Path, script: Option<&str>) -> Result<PathBuf> {
        let base = directory.join("base.cpio");
        let maker = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/initramfs");
        let status =
            Command::new(maker).arg(self.directory()?).arg(&base).status().context("guest-images/initramfs")?;
        ensure!(status.success(), "guest-images/initramfs failed");
        let mut bytes = std::fs::read(&base)?;
        bytes.extend_from_slice(walker()?);
        if let Some(script) = script {
            let mut extra = cpio::Writer::new();
            extra.file("script", script.as_bytes(), 0o644);
            bytes.extend(extra.finish());
        }
        let initrd = directory.join("initrd");
        std::fs::write(&initrd, bytes)?;
        Ok(initrd)
    }
}

/// An archive with this very executable as `/bin/qemu-tests`, its dynamic linker and libraries: guests call it to
/// list trees. Made once, stripped of debug information.
fn walker() -> Result<&'static [u8]> {
    static WALKER: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(bytes) = WALKER.get() {
        return Ok(bytes);
    }
    let exe = std::env::current_exe()?;
    let scratch = tempfile::tempdir()?;
    let stripped = scratch.path().join("qemu-tests");
    let status =
        Command::new("strip").arg("-o").arg(&stripped).arg(&exe).status().context("strip (package binutils)")?;
    ensure!(status.success(), "strip of {} failed", exe.display());

    let mut archive = cpio::Writer::new();
    archive.file("bin/qemu-tests", &std::fs::read(&stripped)?, 0o755);
    let listed = Command::new("ldd").arg(&exe).output().context("ldd")?;
    for library in String::from_utf8(listed.stdout)?.split_whitespace().filter(|word| word.starts_with('/')) {
        archive.file(&library[1..], &std::fs::read(library)?, 0o755);
    }
    Ok(WALKER.get_or_init(|| archive.finish()))
}

/// Why no guest can run on this machine, if so.
fn missing(kernel: Kernel) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &str| std::env::split_paths(&path).any(|directory| directory.join(tool).is_file());
    let qemu = kernel != Kernel::UserMode;
    for tool in ["qemu-system-x86_64", "busybox", "cpio", "strip"] {
        if !found(tool) && (qemu || !tool.starts_with("qemu")) {
            return Some(format!("{tool} is missing"));
        }
    }
    kernel.directory().err().map(|error| error.to_string())
}

/// A test that needs a guest with `kernel`; shown as ignored where that cannot run.
pub fn trial(name: &str, kernel: Kernel, test: impl FnOnce(Kernel) -> Result<()> + Send + 'static) -> Trial {
    let name = format!("{name}_linux_{}", kernel.name().replace('.', "_"));
    let reason = missing(kernel);
    if let Some(reason) = &reason {
        eprintln!("SKIPPED {name}: {reason}; scripts/setup provides it");
    }
    let run = move || test(kernel).map_err(|error| Failed::from(format!("{error:?}")));
    Trial::test(name, run).with_ignored_flag(reason.is_some())
}
