//! Power cuts: a cache on ext4 over a loop device, whose backing file is copied in the middle of a fill.
//!
//! The copy is what a disk holds when the power goes: everything that the kernel had not written back is not in it. It is
//! mounted elsewhere, its journal replayed, and a daemon of another boot serves from it.

use std::fs;
use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;

use crate::mounted::Mounted;
use crate::mounted::make_ext4;
use crate::mounted::needs_ext4;
use crate::mounted::run;
use crate::served::Stage;
use crate::served::WALK;
use crate::served::boot;
use crate::served::counter;
use crate::served::end;
use crate::trial;

/// Replies after which the power goes; a whole walk has some 1100.
const CUTS: [usize; 4] = [150, 400, 700, 1000];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("power_cut_in_a_fill_shows_right_bytes_after_the_next_boot", needs_boots(), cut_at_many_moments),
        trial("power_cut_that_keeps_bits_and_loses_data_is_noticed", needs_boots(), bits_without_data),
        trial("what_was_flushed_is_believed_after_a_power_cut", needs_boots(), flushed_is_kept),
    ]
}

/// Disks, and mounts that one process sees alone: its boot id is one of them.
fn needs_boots() -> Result<(), String> {
    needs_ext4()?;
    let mut unshare = Command::new("unshare");
    run(unshare.args(["--mount", "true"])).map(drop).map_err(|error| format!("unshare --mount: {error:#}"))
}

/// What is on the disk at one moment: a copy that nothing was written to meanwhile.
fn copy_of_the_disk(disk: &Path, copy: &Path) -> Result<()> {
    for _ in 0..20 {
        fs::copy(disk, copy)?;
        if fs::read(disk)? == fs::read(copy)? {
            return Ok(());
        }
    }
    anyhow::bail!("the disk does not keep still")
}

/// The file of the only blob with this suffix.
fn file_in(cache: &Path, suffix: &str) -> Result<std::path::PathBuf> {
    let mut entries = fs::read_dir(cache)?.filter_map(|entry| Some(entry.ok()?.path()));
    entries.find(|path| path.to_string_lossy().ends_with(suffix)).with_context(|| format!("no {suffix}"))
}

fn flush(cache: &Path, suffix: &str) -> Result<()> {
    Ok(File::open(file_in(cache, suffix)?)?.sync_all()?)
}

/// Walks a part of the image and leaves the daemon as it is, for the power to go.
fn walk_a_part(daemon: &DaemonProcess, replies: usize) -> Result<()> {
    walk(&mut boot(daemon)?, &WalkOptions { end_after: Some(replies), ..WALK })?;
    Ok(())
}

fn cut_at_many_moments() -> Result<()> {
    let stage = Stage::new(40, 4096)?;
    let (disk, copy) = (stage.path("disk"), stage.path("copy"));
    for (n, replies) in CUTS.into_iter().enumerate() {
        // What the kernel happens to have written back: nothing, one file or another, everything so far.
        for written in [&[][..], &[".blob.data"], &[".chunk_map", ".nydus_state"], &[".blob.meta", ".blob.data"]] {
            let what = format!("cut after {replies} replies, {written:?} written back half way");
            make_ext4(&disk, 24)?;
            let mounted = Mounted::ext4(&disk, &stage.path("mounted"))?;
            let cache = stage.path("mounted").join("cache");
            let mut daemon = stage.serve(&cache, Some(n as u32 * 2))?;
            walk_a_part(&daemon, replies / 2)?;
            written.iter().try_for_each(|suffix| flush(&cache, suffix))?;
            walk_a_part(&daemon, replies)?;
            copy_of_the_disk(&disk, &copy)?;
            daemon.kill();
            drop((daemon, mounted));

            let mounted = Mounted::ext4(&copy, &stage.path("next"))?;
            let cache = stage.path("next").join("cache");
            for round in ["the next boot", "the same once more"] {
                let daemon = stage.serve(&cache, Some(n as u32 * 2 + 1))?;
                stage.expect_whole(&daemon, &format!("{what}, {round}"))?;
                end(daemon, &what)?;
            }
            drop(mounted);
        }
    }
    Ok(())
}

fn bits_without_data() -> Result<()> {
    let stage = Stage::new(40, 4096)?;
    let (disk, copy) = (stage.path("disk"), stage.path("copy"));
    make_ext4(&disk, 24)?;
    let mounted = Mounted::ext4(&disk, &stage.path("mounted"))?;
    let cache = stage.path("mounted").join("cache");
    let mut daemon = stage.serve(&cache, Some(1))?;
    walk_a_part(&daemon, 1000)?;
    for suffix in [".chunk_map", ".nydus_state", ".blob.meta"] {
        flush(&cache, suffix)?;
    }
    copy_of_the_disk(&disk, &copy)?;
    daemon.kill();
    drop((daemon, mounted));

    let _mounted = Mounted::ext4(&copy, &stage.path("next"))?;
    let cache = stage.path("next").join("cache");
    let map = fs::read(file_in(&cache, ".chunk_map")?)?;
    let said: u32 = map.iter().skip(4096).map(|byte| byte.count_ones()).sum();
    let data = fs::read(file_in(&cache, ".blob.data")?)?;
    let lost = data.chunks(16 << 10).filter(|chunk| chunk.iter().all(|byte| *byte == 0)).count();
    ensure!(said > 50 && lost > 50, "the cut lost nothing: {said} chunks are said to be there, {lost} are zeros");
    let daemon = stage.serve(&cache, Some(2))?;
    stage.expect_whole(&daemon, "bits without data")?;
    ensure!(counter(&daemon, "hints_refuted")? > 50, "it was noticed by another way");
    end(daemon, "bits without data")
}

fn flushed_is_kept() -> Result<()> {
    let stage = Stage::new(40, 4096)?;
    let (disk, copy) = (stage.path("disk"), stage.path("copy"));
    make_ext4(&disk, 24)?;
    let mounted = Mounted::ext4(&disk, &stage.path("mounted"))?;
    let cache = stage.path("mounted").join("cache");
    let daemon = stage.serve(&cache, Some(1))?;
    stage.expect_whole(&daemon, "the fill")?;
    // Flushes the data, and notes in the side file what was flushed.
    end(daemon, "the fill")?;
    for suffix in [".chunk_map", ".nydus_state", ".blob.meta"] {
        flush(&cache, suffix)?;
    }
    copy_of_the_disk(&disk, &copy)?;
    drop(mounted);
    let _mounted = Mounted::ext4(&copy, &stage.path("next"))?;
    let daemon = stage.serve(&stage.path("next").join("cache"), Some(2))?;
    stage.expect_whole(&daemon, "after the cut")?;
    for name in ["chunks_fetched", "hints_confirmed", "hints_refuted"] {
        ensure!(counter(&daemon, name)? == 0, "{name}: what was flushed is not believed");
    }
    end(daemon, "after the cut")
}
