//! What the builder makes, as the tools and the kernel of EROFS see it.
//!
//! EROFS reads uncompressed blobs: the device is made from the blob, each chunk at its uncompressed offset.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use anyhow::bail;
use libtest_mimic::Trial;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::testing::make;
use nydus_vm::testing::readback::Readback;
use nydus_vm::testing::snapshot;

use crate::mounted::Mounted;
use crate::mounted::needs_command;
use crate::mounted::needs_erofs;
use crate::mounted::run;
use crate::trial;

/// Entries of the large directory.
const MANY: usize = 100_000;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, compressor, chunk_bytes) in [
        ("none", Compressor::None, 1 << 20),
        ("none_4k", Compressor::None, 4096),
        ("lz4_block", Compressor::Lz4Block, 16384),
        ("zstd", Compressor::Zstd, 1 << 20),
    ] {
        let shows = move |at: &Path| shows_its_source(at, compressor, chunk_bytes, make::odd_tree);
        trials.push(trial(&format!("kernel_shows_odd_tree_built_with_{name}"), needs_erofs(), in_scratch(shows)));
        let accepted = move |at: &Path| is_accepted(at, compressor, chunk_bytes, make::odd_tree);
        let missing = needs_command("fsck.erofs");
        trials.push(trial(&format!("fsck_accepts_odd_tree_built_with_{name}"), missing, in_scratch(accepted)));
    }
    let many = |root: &Path| make::big_directory(&root.join("many"), MANY);
    let empty = |_: &Path| Ok(());
    let shows = move |at: &Path| shows_its_source(at, Compressor::None, 1 << 20, many);
    trials.push(trial("kernel_shows_directory_of_100_k_entries", needs_erofs(), in_scratch(shows)));
    let accepted = move |at: &Path| is_accepted(at, Compressor::None, 1 << 20, many);
    trials.push(trial("fsck_accepts_directory_of_100_k_entries", needs_command("fsck.erofs"), in_scratch(accepted)));
    let shows = move |at: &Path| shows_its_source(at, Compressor::None, 1 << 20, empty);
    trials.push(trial("kernel_shows_empty_image", needs_erofs(), in_scratch(shows)));
    let accepted = move |at: &Path| is_accepted(at, Compressor::None, 1 << 20, empty);
    trials.push(trial("fsck_accepts_empty_image", needs_command("fsck.erofs"), in_scratch(accepted)));
    trials
}

fn in_scratch(test: impl FnOnce(&Path) -> Result<()>) -> impl FnOnce() -> Result<()> {
    || {
        let scratch = tempfile::tempdir()?;
        test(scratch.path())
    }
}

/// A source that `fill` makes, and its image as EROFS wants it: metadata, and the device if there is data.
fn build(
    at: &Path,
    compressor: Compressor,
    chunk_bytes: u32,
    fill: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<(PathBuf, PathBuf, Option<PathBuf>)> {
    let source = at.join("source");
    std::fs::create_dir(&source)?;
    fill(&source)?;
    let image = make::image(&source, &at.join("image"), compressor, Digester::Blake3, chunk_bytes);
    let readback = Readback::open(&image.bootstrap, &image.blobs)?;
    let device = at.join("device");
    if image.blob_id.is_none() {
        return Ok((source, image.bootstrap, None));
    }
    readback.write_device(0, &device)?;
    Ok((source, image.bootstrap, Some(device)))
}

fn shows_its_source(
    at: &Path,
    compressor: Compressor,
    chunk_bytes: u32,
    fill: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<()> {
    let (source, bootstrap, device) = build(at, compressor, chunk_bytes, fill)?;
    let mounted_at = at.join("mounted");
    let _mounted = Mounted::erofs(&bootstrap, device.as_deref().as_slice(), &mounted_at)?;
    let (expected, found) = (snapshot::of_tree(&source)?, snapshot::of_tree(&mounted_at)?);
    match snapshot::difference(&expected, &found) {
        Some(difference) => bail!("{difference}"),
        None => Ok(()),
    }
}

fn is_accepted(
    at: &Path,
    compressor: Compressor,
    chunk_bytes: u32,
    fill: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<()> {
    let (_, bootstrap, device) = build(at, compressor, chunk_bytes, fill)?;
    let mut fsck = Command::new("fsck.erofs");
    // Reads every byte too, which a check without extraction leaves out for uncompressed data.
    fsck.arg("--extract");
    if let Some(device) = device {
        fsck.arg(format!("--device={}", device.display()));
    }
    run(fsck.arg(bootstrap))?;
    Ok(())
}
