//! Trees that tests make for images of their own.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;

/// A root file system in small: busybox, the guests' agent as `/init`, a few files, and a directory of many.
pub fn system(root: &Path) -> Result<()> {
    for directory in ["bin", "dev", "etc", "mnt", "proc", "run", "sys", "tmp", "usr", "usr/share", "usr/share/many"] {
        std::fs::create_dir(root.join(directory))?;
    }
    std::fs::copy(busybox()?, root.join("bin/busybox")).context("busybox")?;
    symlink("busybox", root.join("bin/sh"))?;
    let init = root.join("init");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/init"), &init)?;
    std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755))?;
    std::fs::write(root.join("etc/greeting"), "hello from the image\n")?;
    std::fs::write(root.join("bin/greet"), "#!/bin/sh\ncat /etc/greeting\n")?;
    std::fs::set_permissions(root.join("bin/greet"), std::fs::Permissions::from_mode(0o755))?;
    for number in 0..300_u32 {
        let content = format!("file {number}\n").repeat(number as usize);
        std::fs::write(root.join(format!("usr/share/many/{number:04}")), content)?;
    }
    Ok(())
}

fn busybox() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|directory| directory.join("busybox"));
    places.find(|place| place.is_file()).context("busybox is missing")
}
