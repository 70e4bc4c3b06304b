//! What it costs to fill a cache: processor time per MiB of file data, and how much of it decoding and verifying take.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::storage::codec;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use nydus_vm::testing::process;
use nydus_vm::testing::process::DaemonProcess;

use crate::arguments::Arguments;
use crate::workload::entry;

const CHUNK_BYTES: u32 = 1 << 20;
/// Bytes of one READ, and READs in flight: a guest that reads ahead.
const READ_BYTES: u32 = 1 << 20;
const DEPTH: usize = 4;
/// The share that verification may add.
const AIM_VERIFY: f64 = 20.0;

/// How an image is made.
#[derive(Debug, Clone, Copy)]
struct Row {
    name: &'static str,
    compressor: Compressor,
    /// `None`: an image whose chunk table was cut off, so that there is nothing to verify.
    digester: Option<Digester>,
}

const ROWS: [Row; 7] = [
    Row { name: "none, no digests", compressor: Compressor::None, digester: None },
    Row { name: "none, blake3", compressor: Compressor::None, digester: Some(Digester::Blake3) },
    Row { name: "lz4, no digests", compressor: Compressor::Lz4Block, digester: None },
    Row { name: "lz4, blake3", compressor: Compressor::Lz4Block, digester: Some(Digester::Blake3) },
    Row { name: "zstd, no digests", compressor: Compressor::Zstd, digester: None },
    Row { name: "zstd, blake3", compressor: Compressor::Zstd, digester: Some(Digester::Blake3) },
    Row { name: "zstd, sha256", compressor: Compressor::Zstd, digester: Some(Digester::Sha256) },
];

/// Measures and prints.
pub fn run(arguments: &Arguments) -> Result<()> {
    let bytes = if arguments.quick { 32 << 20 } else { 256 << 20 };
    let home = tempfile::tempdir()?;
    let tree = home.path().join("tree");
    fs::create_dir_all(&tree)?;
    let content = super::half_text("fill", bytes);
    fs::write(tree.join("big"), &content)?;
    println!(
        "\nfill: {} MiB read once into an empty cache, {} KiB chunks, localfs in the page cache",
        bytes >> 20,
        CHUNK_BYTES >> 10
    );
    println!(
        "{:<18} {:>9} {:>12} {:>12} {:>12} {:>9} {:>14}",
        "image", "MB/s", "CPU ms/MiB", "decode ms", "digest ms", "codec %", "verification %"
    );
    let mut plain = None;
    for row in ROWS {
        let image = image(row, &tree, &home.path().join(row.name.replace(", ", "-").replace(' ', "-")))?;
        let mut rounds =
            (0..arguments.rounds).map(|_| fill(arguments, &image, home.path(), bytes)).collect::<Result<Vec<_>>>()?;
        rounds.sort_by_key(|round| round.cpu);
        let middle = &rounds[rounds.len() / 2];
        let mib = (bytes >> 20) as f64;
        let cpu = middle.cpu.as_secs_f64() * 1e3 / mib;
        let decode = per_mib(&content, |chunk| decode_time(row.compressor, chunk))?;
        let digest = match row.digester {
            Some(digester) => per_mib(&content, |chunk| Ok(timed(|| codec::digest(digester, chunk)).0))?,
            None => 0.0,
        };
        let added = plain.filter(|_| row.digester.is_some()).map(|base: f64| 100.0 * (cpu / base - 1.0));
        if row.digester.is_none() {
            plain = Some(cpu);
        }
        println!(
            "{:<18} {:>9.0} {cpu:>12.3} {decode:>12.3} {digest:>12.3} {:>9.0} {:>14}",
            row.name,
            bytes as f64 / 1e6 / middle.elapsed.as_secs_f64(),
            100.0 * decode / cpu,
            added.map_or("-".to_owned(), |added| format!("{added:+.0}")),
        );
    }
    println!(
        "decode, digest: the same chunks by one thread. verification: CPU over the row without digests (aim at most +{AIM_VERIFY})."
    );
    Ok(())
}

fn image(row: Row, tree: &Path, folder: &Path) -> Result<TestImage> {
    let digester = row.digester.unwrap_or(Digester::Blake3);
    let made = make::image(tree, folder, row.compressor, digester, CHUNK_BYTES);
    if row.digester.is_none() {
        // Size of the chunk table, in the extended superblock.
        let file = fs::OpenOptions::new().write(true).open(&made.bootstrap)?;
        file.write_all_at(&[0; 8], 1152 + 32)?;
    }
    Ok(TestImage::made(row.name, made, folder))
}

/// What filling a cache took.
pub struct Fill {
    /// Time on a processor.
    pub cpu: Duration,
    /// Time that passed.
    pub elapsed: Duration,
}

/// `nydusd` on `image` with `cache`, its socket and log in `home` by the name `name`.
pub fn nydusd(image: &TestImage, cache: &Path, home: &Path, name: &str) -> Result<DaemonProcess> {
    fs::create_dir_all(cache)?;
    let (config, socket) = (home.join(format!("{name}.json")), home.join(format!("{name}.sock")));
    fs::write(&config, image.config(cache).to_string())?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydusd"));
    command.arg("--config").arg(config).arg("--sock").arg(&socket).arg("--bootstrap").arg(&image.bootstrap);
    command.args(["--log-level", "info", "--rlimit-nofile", "0"]);
    Ok(DaemonProcess::start(command, &socket, &home.join(format!("{name}.log")))?)
}

/// Reads `/big`, of `bytes` bytes, of `image` once, with the cache in `home` emptied before.
pub fn fill(arguments: &Arguments, image: &TestImage, home: &Path, bytes: usize) -> Result<Fill> {
    let cache = home.join("cache");
    let _ = fs::remove_dir_all(&cache);
    let daemon = nydusd(image, &cache, home, "fill")?;
    daemon.pin(&arguments.daemon_cpu)?;
    process::pin(None, &[arguments.driver_cpu])?;
    let options = GuestOptions {
        request_queues: 1,
        depth: DEPTH,
        reply_bytes: READ_BYTES,
        segment_bytes: READ_BYTES,
        ..GuestOptions::LINUX
    };
    let mut guest = Guest::boot(daemon.socket(), &options)?;
    let node = entry(&mut guest, 1, "big")?;
    let (before, start) = (daemon.cpu_us(), Instant::now());
    let (mut asked, mut answered) = (0, 0);
    let lane = guest.lane(1);
    while answered < bytes {
        while asked < bytes && asked - answered < DEPTH * READ_BYTES as usize {
            lane.submit(&Request::read(node, 0, asked as u64, READ_BYTES))?;
            asked += READ_BYTES as usize;
        }
        lane.publish()?;
        let done = lane.next(nydus_vm::testing::vmm::PATIENCE)?;
        ensure!(done.errno == 0 && done.body_bytes == READ_BYTES, "a cold read answered errno {}", done.errno);
        lane.release(done);
        answered += READ_BYTES as usize;
    }
    let elapsed = start.elapsed();
    Ok(Fill { cpu: Duration::from_micros(daemon.cpu_us() - before), elapsed })
}

/// Milliseconds per MiB of what `time` measures, over some of the chunks.
fn per_mib(content: &[u8], time: impl Fn(&[u8]) -> Result<Duration>) -> Result<f64> {
    let chunks = content.chunks(CHUNK_BYTES as usize).take(64);
    let count = chunks.len() as f64;
    let total: Duration = chunks.map(time).collect::<Result<Vec<_>>>()?.into_iter().sum();
    Ok(total.as_secs_f64() * 1e3 / count)
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = std::hint::black_box(work());
    (start.elapsed(), result)
}

fn decode_time(compressor: Compressor, chunk: &[u8]) -> Result<Duration> {
    let stored = match compressor {
        Compressor::Lz4Block => lz4::block::compress(chunk, None, false)?,
        Compressor::Zstd => zstd::bulk::compress(chunk, 3)?,
        _ => return Ok(Duration::ZERO),
    };
    let mut plain = vec![0; chunk.len()];
    let (time, result) = timed(|| codec::decode(compressor, &stored, &mut plain));
    result.context("decode what was just encoded")?;
    Ok(time)
}
