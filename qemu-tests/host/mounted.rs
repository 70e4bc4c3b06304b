//! Loop devices and mounts, undone when dropped.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use nydus_vm::testing::make;

/// Runs a command; its standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {stderr}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Whether a command of that name is installed.
pub fn needs_command(name: &str) -> Result<(), String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).any(|directory| directory.join(name).is_file()) {
        true => Ok(()),
        false => Err(format!("{name} is not installed")),
    }
}

/// Whether images can be mounted here.
pub fn needs_erofs() -> Result<(), String> {
    if !make::is_root() {
        return Err("mounting needs root".to_owned());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Err("there are no loop devices".to_owned());
    }
    let is_known = || std::fs::read_to_string("/proc/filesystems").is_ok_and(|known| known.contains("\terofs\n"));
    if !is_known() {
        let _ = Command::new("modprobe").arg("erofs").output();
    }
    if !is_known() {
        return Err("the kernel has no EROFS".to_owned());
    }
    needs_command("losetup")
}

/// Whether disks can be made, mounted and spoilt here.
pub fn needs_ext4() -> Result<(), String> {
    if !make::is_root() {
        return Err("mounting needs root".to_owned());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Err("there are no loop devices".to_owned());
    }
    ["losetup", "mkfs.ext4", "unshare"].into_iter().try_for_each(needs_command)
}

/// Whether small file systems in memory can be mounted here.
pub fn needs_mount() -> Result<(), String> {
    if make::is_root() { needs_command("mount") } else { Err("mounting needs root".to_owned()) }
}

/// A loop device over a file.
#[derive(Debug)]
struct LoopDevice {
    path: String,
}

impl LoopDevice {
    fn over(file: &Path) -> Result<Self> {
        let path = run(Command::new("losetup").args(["--read-only", "--find", "--show"]).arg(file))?;
        Ok(Self { path })
    }

    fn writable(file: &Path) -> Result<Self> {
        let path = run(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        Ok(Self { path })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("losetup").args(["--detach", &self.path])) {
            eprintln!("{error:#}");
        }
    }
}

/// What the kernel has mounted.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
    /// Given up after the unmount.
    _devices: Vec<LoopDevice>,
}

impl Mounted {
    /// Mounts the metadata in `bootstrap`, with the uncompressed blobs `devices`, at `at`.
    pub fn erofs(bootstrap: &Path, devices: &[&Path], at: &Path) -> Result<Self> {
        let disk = LoopDevice::over(bootstrap)?;
        let devices = devices.iter().map(|device| LoopDevice::over(device)).collect::<Result<Vec<_>>>()?;
        let mut options = "ro".to_owned();
        for device in &devices {
            options.push_str(",device=");
            options.push_str(&device.path);
        }
        std::fs::create_dir_all(at)?;
        run(Command::new("mount").args(["-t", "erofs", "-o", &options, &disk.path]).arg(at))?;
        Ok(Self { at: at.to_path_buf(), _devices: std::iter::once(disk).chain(devices).collect() })
    }
}

/// Makes the file `disk` an empty ext4 of `mebibytes`.
pub fn make_ext4(disk: &Path, mebibytes: u64) -> Result<()> {
    std::fs::File::create(disk)?.set_len(mebibytes << 20)?;
    // Small blocks of metadata at the beginning, all of it written now: what is spoilt later is meant to be data.
    run(Command::new("mkfs.ext4")
        .args(["-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
        .arg(disk))?;
    Ok(())
}

impl Mounted {
    /// Mounts the ext4 in the file `disk` at `at`; its journal is replayed as after a power cut.
    pub fn ext4(disk: &Path, at: &Path) -> Result<Self> {
        let device = LoopDevice::writable(disk)?;
        std::fs::create_dir_all(at)?;
        run(Command::new("mount").args(["-t", "ext4", &device.path]).arg(at))?;
        Ok(Self { at: at.to_path_buf(), _devices: vec![device] })
    }

    /// Mounts a file system in memory of `size` at `at`.
    pub fn memory(size: &str, at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at))?;
        Ok(Self { at: at.to_path_buf(), _devices: Vec::new() })
    }

    /// Gives a file system in memory another size.
    pub fn resize(&self, size: &str) -> Result<()> {
        run(Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.at)).map(drop)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily only where it has to be: a disk that fails, a daemon that still ends.
        if run(Command::new("umount").arg(&self.at)).is_err()
            && let Err(error) = run(Command::new("umount").arg("--lazy").arg(&self.at))
        {
            eprintln!("{error:#}");
        }
    }
}
