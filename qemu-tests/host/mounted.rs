//! Loop devices and mounts of the kernel's EROFS, undone when dropped.

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
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("losetup").args(["--detach", &self.path])) {
            eprintln!("{error:#}");
        }
    }
}

/// An image mounted by the kernel.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
    /// Detached after the unmount.
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

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg(&self.at)) {
            eprintln!("{error:#}");
        }
    }
}
