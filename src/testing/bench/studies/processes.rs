//! Many daemons, one cache directory, one image that none of them has read: is everything fetched once?

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::vmm::PATIENCE;
use rustix::process::Signal;

use super::fill::nydusd;
use crate::arguments::Arguments;
use crate::workload::entry;

const CHUNK_BYTES: u32 = 256 << 10;
const READ_BYTES: u32 = 128 << 10;
/// READs in flight of each guest.
const DEPTH: usize = 2;

/// Measures and prints.
pub fn run(arguments: &Arguments) -> Result<()> {
    let bytes: usize = if arguments.quick { 16 << 20 } else { 128 << 20 };
    let many = if arguments.quick { 8 } else { 50 };
    let home = tempfile::tempdir()?;
    let tree = home.path().join("tree");
    std::fs::create_dir_all(&tree)?;
    std::fs::write(tree.join("big"), super::half_text("processes", bytes))?;
    let folder = home.path().join("image");
    let made = make::image(&tree, &folder, Compressor::Zstd, Digester::Blake3, CHUNK_BYTES);
    let image = TestImage::made("processes", made, &folder);
    let chunks = bytes as f64 / f64::from(CHUNK_BYTES);
    println!("\nprocesses: a file of {} MiB read once by each of N daemons on one empty cache directory", bytes >> 20);
    println!("{:<8} {:>9} {:>16} {:>18} {:>18}", "daemons", "wall s", "CPU s, all", "fetched/chunk", "fetched/stored");
    for count in [1, many] {
        let cache = home.path().join(format!("cache-{count}"));
        let daemons = (0..count)
            .map(|n| nydusd(&image, &cache, home.path(), &format!("{count}-{n}")))
            .collect::<Result<Vec<_>>>()?;
        let wall = read_all(&daemons, bytes)?;
        let cpu: u64 = daemons.iter().map(DaemonProcess::cpu_us).sum();
        let counted = daemons.iter().map(counters).collect::<Result<Vec<_>>>()?;
        let sum = |name: &str| counted.iter().filter_map(|c| c[name].as_u64()).sum::<u64>() as f64;
        let stored: u64 =
            std::fs::read_dir(&image.blobs)?.flatten().filter_map(|e| Some(e.metadata().ok()?.len())).sum();
        println!(
            "{count:<8} {:>9.2} {:>16.2} {:>18.3} {:>18.3}",
            wall.as_secs_f64(),
            cpu as f64 / 1e6,
            sum("chunks_fetched") / chunks,
            sum("backend_bytes") / stored as f64,
        );
    }
    Ok(())
}

/// One guest per daemon reads everything, all at once; how long that takes.
fn read_all(daemons: &[DaemonProcess], bytes: usize) -> Result<Duration> {
    let options = GuestOptions {
        request_queues: 1,
        ring_size: 64,
        depth: DEPTH,
        reply_bytes: READ_BYTES,
        segment_bytes: READ_BYTES,
        ..GuestOptions::LINUX
    };
    let mut guests = Vec::new();
    for daemon in daemons {
        let mut guest = Guest::boot(daemon.socket(), &options)?;
        let node = entry(&mut guest, 1, "big")?;
        guests.push((guest, node, 0usize, 0usize));
    }
    let (start, mut last) = (Instant::now(), Instant::now());
    while guests.iter().any(|(.., answered)| *answered < bytes) {
        for (guest, node, asked, answered) in &mut guests {
            let lane = guest.lane(1);
            while let Some(done) = lane.complete()? {
                ensure!(done.errno == 0 && done.body_bytes == READ_BYTES, "a read answered errno {}", done.errno);
                lane.release(done);
                *answered += READ_BYTES as usize;
                last = Instant::now();
            }
            while *asked < bytes && *asked - *answered < DEPTH * READ_BYTES as usize {
                lane.submit(&Request::read(*node, 0, *asked as u64, READ_BYTES))?;
                *asked += READ_BYTES as usize;
            }
            lane.publish()?;
        }
        ensure!(last.elapsed() < PATIENCE, "no daemon answers");
        // The daemons need the processor more than this loop does.
        std::thread::yield_now();
    }
    Ok(start.elapsed())
}

/// What a daemon counted of its storage.
fn counters(daemon: &DaemonProcess) -> Result<serde_json::Value> {
    daemon.signal(Signal::USR1)?;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let log = daemon.log();
        if let Some((_, line)) = log.rsplit_once("counters: ")
            && let Some((line, _)) = line.split_once('\n')
        {
            let counters: serde_json::Value = serde_json::from_str(line).context("counters in the log")?;
            return Ok(counters["storage"].clone());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    anyhow::bail!("no counters in the log")
}
