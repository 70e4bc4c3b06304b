//! Trees that tests make for images of their own.

use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

/// A root file system in small, the demo image's: busybox, the guests' agent as `/init`, a greeting, and a directory
/// of 300 files where the one named `%04d` has so many lines.
pub fn system(root: &Path) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-images/demo-tree");
    let made = Command::new(script).arg(root).output().context("guest-images/demo-tree")?;
    ensure!(made.status.success(), "guest-images/demo-tree: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}
