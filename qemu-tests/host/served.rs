//! The built `nydusd` on an image that is made here, walked by the fake guest.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use nydus_vm::testing::manifest::Entry;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::readback::Readback;
use nydus_vm::testing::tree::Tree;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;
use nydus_vm::testing::vmm::PATIENCE;
use rustix::process::Signal;

pub const WALK: WalkOptions = WalkOptions { in_flight: 16, read_bytes: 16 << 10, ..WalkOptions::USUAL };
const GUEST: GuestOptions = GuestOptions { depth: 16, ring_size: 128, reply_bytes: 64 << 10, ..GuestOptions::LINUX };

/// How long a daemon may take to end, whatever its disks do.
const END: Duration = Duration::from_secs(10);

/// An image, and where daemons on it live.
pub struct Stage {
    pub home: tempfile::TempDir,
    pub image: TestImage,
    pub manifest: Vec<Entry>,
}

impl Stage {
    /// `files` small files, and large ones of `kibibytes` together.
    pub fn new(files: usize, kibibytes: usize) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let (tree, out) = (home.path().join("tree"), home.path().join("image"));
        fs::create_dir(&tree)?;
        make::big_directory(&tree.join("many"), files)?;
        for n in 0..4 {
            fs::write(tree.join(format!("large-{n}")), make::noise(&n.to_string(), (kibibytes << 10) / 4 + n))?;
        }
        let made = make::image(&tree, &out, Compressor::Zstd, Digester::Blake3, 16 << 10);
        let manifest = Readback::open(&made.bootstrap, &made.blobs)?.entries()?;
        Ok(Self { image: TestImage::made("made", made, &out), home, manifest })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// A daemon with its cache in `cache`. `boot`: in which boot of the machine it lives, if not in this one.
    pub fn serve(&self, cache: &Path, boot: Option<u32>) -> Result<DaemonProcess> {
        let config = self.path("config.json");
        fs::write(&config, self.image.config(cache).to_string())?;
        let socket = self.path("vhost.sock");
        let program = env!("CARGO_BIN_EXE_nydusd");
        let mut command = match boot {
            None => Command::new(program),
            Some(boot) => {
                // The kernel's file, seen by this process alone.
                let id = self.path("boot-id");
                fs::write(&id, format!("00000000-0000-4000-8000-{boot:012}\n"))?;
                let mut command = Command::new("unshare");
                let script = r#"mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@""#;
                command.args(["--mount", "--", "sh", "-c", script]).arg(id).arg(program);
                command
            }
        };
        command.arg("--config").arg(config).arg("--sock").arg(&socket).arg("--bootstrap").arg(&self.image.bootstrap);
        command.args(["--log-level", "info", "--rlimit-nofile", "0"]);
        Ok(DaemonProcess::start(command, &socket, &self.path("log"))?)
    }

    /// Everything is right.
    pub fn expect_whole(&self, daemon: &DaemonProcess, what: &str) -> Result<()> {
        let differences = look(daemon)?.differences(&self.manifest);
        ensure!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
        Ok(())
    }

    /// What is not right is EIO; the number of errors.
    pub fn expect_right_or_eio(&self, daemon: &DaemonProcess, what: &str) -> Result<usize> {
        let tree = look(daemon)?;
        let lies = tree.lies(&self.manifest);
        ensure!(lies.is_empty(), "{what}:\n{}", lies.join("\n"));
        Ok(tree.failures.len())
    }
}

pub fn boot(daemon: &DaemonProcess) -> Result<Guest> {
    Ok(Guest::boot(daemon.socket(), &GUEST)?)
}

/// The value of a storage counter in the log's last line of counters.
pub fn counter(daemon: &DaemonProcess, name: &str) -> Result<u64> {
    let seen = daemon.log().matches("counters: ").count();
    daemon.signal(Signal::USR1)?;
    let begin = Instant::now();
    loop {
        let log = daemon.log();
        if log.matches("counters: ").count() > seen && log.ends_with('\n') {
            let line = log.rsplit("counters: ").next().and_then(|rest| rest.lines().next()).context("a line")?;
            return serde_json::from_str::<serde_json::Value>(line)?["storage"][name].as_u64().context("a counter");
        }
        ensure!(begin.elapsed() < PATIENCE, "no counters");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn look(daemon: &DaemonProcess) -> Result<Tree> {
    Ok(walk(&mut boot(daemon)?, &WALK)?)
}

/// Ends a daemon as an operator does.
pub fn end(mut daemon: DaemonProcess, what: &str) -> Result<()> {
    ensure!(daemon.is_running()?, "{what}: the daemon died");
    daemon.signal(Signal::TERM)?;
    let status = daemon.wait(END)?;
    ensure!(status.success(), "{what}: the daemon ended with {status}");
    Ok(())
}
