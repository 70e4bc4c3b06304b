//! Disks that are full, and disks that fail: a small file system in memory, and ext4 over a loop device whose backing file
//! is cut, so that reads behind the cut are I/O errors.

use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;

use crate::mounted::Mounted;
use crate::mounted::make_ext4;
use crate::mounted::needs_ext4;
use crate::mounted::needs_mount;
use crate::served::Stage;
use crate::served::WALK;
use crate::served::boot;
use crate::served::counter;
use crate::served::end;
use crate::trial;

/// What a daemon says, once, when its cache cannot take a chunk.
const FULL: &str = "cache cannot be written; reads are served from memory";

pub fn trials() -> Vec<Trial> {
    vec![
        trial("full_cache_disk_is_served_from_memory_and_used_again_when_there_is_room", needs_mount(), full_disk),
        trial("cache_disk_that_fails_shows_right_bytes_or_eio", needs_ext4(), failing_cache),
        trial("bootstrap_on_a_disk_that_fails_shows_right_bytes_or_eio", needs_ext4(), failing_bootstrap),
    ]
}

/// Bytes of a file that have room on its disk.
fn room_of(cache: &Path) -> Result<u64> {
    let mut blocks = 0;
    for entry in fs::read_dir(cache)? {
        blocks += std::os::unix::fs::MetadataExt::blocks(&entry?.metadata()?);
    }
    Ok(blocks * 512)
}

fn full_disk() -> Result<()> {
    let stage = Stage::new(40, 4096)?;
    for size in ["1m", "2m"] {
        let disk = Mounted::memory(size, &stage.path("small"))?;
        let cache = stage.path("small").join("cache");
        let before = fs::read_to_string(stage.path("log")).unwrap_or_default().matches(FULL).count();
        let daemon = stage.serve(&cache, None)?;
        for round in ["filling up", "full"] {
            stage.expect_whole(&daemon, &format!("{size}, {round}"))?;
        }
        let warnings = daemon.log().matches(FULL).count() - before;
        ensure!(warnings == 1, "{size}: {warnings} warnings in a moment");
        disk.resize("32m")?;
        stage.expect_whole(&daemon, &format!("{size}, then room"))?;
        ensure!(room_of(&cache)? > 4 << 20, "{size}: only {} bytes are cached when there is room", room_of(&cache)?);
        // And now the cache has it all.
        let blobs = stage.image.blobs.clone();
        fs::rename(&blobs, stage.path("away"))?;
        stage.expect_whole(&daemon, &format!("{size}, from the cache alone"))?;
        fs::rename(stage.path("away"), &blobs)?;
        end(daemon, size)?;
        drop(disk);
    }
    Ok(())
}

/// Cuts the backing file of a disk. What a process has mapped and touched stays in memory, the rest of `file` does not.
fn spoil(disk: &Path, keep: u64, file: &Path) -> Result<()> {
    if let Ok(file) = File::open(file) {
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(File::options().write(true).open(disk)?.set_len(keep)?)
}

/// The data file in a cache directory.
fn data_in(cache: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(cache)?.filter_map(|entry| Some(entry.ok()?.path()));
    entries.find(|path| path.to_string_lossy().ends_with(".blob.data")).context("no data file")
}

fn failing_cache() -> Result<()> {
    let stage = Stage::new(40, 4096)?;
    let disk = stage.path("disk");
    // Cut before the daemon opens its files, and while it serves from them; a little of the data is left, or nothing.
    for (keep_mebibytes, is_open) in [(8, false), (8, true), (1, false), (1, true)] {
        let what = format!("{keep_mebibytes} MiB left, open: {is_open}");
        make_ext4(&disk, 24)?;
        let at = stage.path("mounted");
        let mounted = Mounted::ext4(&disk, &at)?;
        let daemon = stage.serve(&at.join("cache"), None)?;
        stage.expect_whole(&daemon, &format!("{what}: the fill"))?;
        end(daemon, &what)?;
        // Nothing of it in memory any more.
        drop(mounted);
        let mounted = Mounted::ext4(&disk, &at)?;
        if is_open {
            let daemon = stage.serve(&at.join("cache"), None)?;
            walk(&mut boot(&daemon)?, &WalkOptions { end_after: Some(300), ..WALK })?;
            spoil(&disk, keep_mebibytes << 20, &data_in(&at.join("cache"))?)?;
            for round in 0..3 {
                stage.expect_right_or_eio(&daemon, &format!("{what}, {round}"))?;
            }
            ensure!(counter(&daemon, "backend_requests")? > 0, "{what}: the disk did not fail");
            end(daemon, &what)?;
        } else {
            spoil(&disk, keep_mebibytes << 20, &data_in(&at.join("cache"))?)?;
            let daemon = stage.serve(&at.join("cache"), None)?;
            for round in 0..3 {
                stage.expect_right_or_eio(&daemon, &format!("{what}, {round}"))?;
            }
            ensure!(counter(&daemon, "backend_requests")? > 0, "{what}: the disk did not fail");
            end(daemon, &what)?;
        }
        drop(mounted);
    }
    Ok(())
}

fn failing_bootstrap() -> Result<()> {
    let mut stage = Stage::new(8000, 512)?;
    let disk = stage.path("disk");
    let original = stage.image.bootstrap.clone();
    make_ext4(&disk, 24)?;
    let at = stage.path("mounted");
    let mounted = Mounted::ext4(&disk, &at)?;
    fs::copy(&original, at.join("bootstrap"))?;
    drop(mounted);
    // Not in memory, but for what the daemon has read.
    let mounted = Mounted::ext4(&disk, &at)?;
    stage.image.bootstrap = at.join("bootstrap");
    let daemon = stage.serve(&stage.path("cache"), None)?;
    spoil(&disk, 1 << 20, &stage.image.bootstrap)?;
    let mut errors = 0;
    for round in 0..3 {
        errors += stage.expect_right_or_eio(&daemon, &format!("bootstrap, {round}"))?;
    }
    ensure!(errors > 0, "the disk did not fail");
    end(daemon, "bootstrap")?;
    drop(mounted);
    Ok(())
}
