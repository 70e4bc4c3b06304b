//! Cold reads of an image over an unchanged gzip layer, beside plain decompression of the same layer.

use std::fs;
use std::io;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use flate2::read::GzDecoder;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use nydus_vm::testing::process;
use nydus_vm::testing::reference_layer;
use nydus_vm::testing::reference_layer::Layer;

use super::Times;
use super::fill::fill;
use super::fill::nydusd;
use crate::arguments::Arguments;
use crate::workload::Random;
use crate::workload::entry;

const CHUNK_BYTES: u32 = 256 << 10;

/// Measures and prints.
pub fn run(arguments: &Arguments) -> Result<()> {
    let bytes: usize = if arguments.quick { 16 << 20 } else { 64 << 20 };
    let home = tempfile::tempdir()?;
    let (tree, native, folder) = (home.path().join("tree"), home.path().join("native"), home.path().join("zran"));
    fs::create_dir_all(&tree)?;
    fs::write(tree.join("big"), super::half_text("zran", bytes))?;
    let made = make::image(&tree, &native, Compressor::None, Digester::Sha256, CHUNK_BYTES);
    reference_layer::convert(&made.bootstrap, &made.blobs, &folder, Layer::Gzip, reference_layer::USUAL_CONTEXTS);
    let image = TestImage {
        name: "zran".to_owned(),
        bootstrap: folder.join("bootstrap"),
        blobs: folder.join("blobs"),
        folder: folder.clone(),
    };
    let mib = (bytes >> 20) as f64;
    let plain = gunzip(&image)?.as_secs_f64() * 1e3 / mib;
    println!("\nzran: {} MiB in one gzip file, {} KiB chunks, empty cache", bytes >> 20, CHUNK_BYTES >> 10);
    println!("gunzip of the layer by one thread: {plain:.2} ms/MiB");

    let mut rounds =
        (0..arguments.rounds).map(|_| fill(arguments, &image, home.path(), bytes)).collect::<Result<Vec<_>>>()?;
    rounds.sort_by_key(|round| round.cpu);
    let middle = &rounds[rounds.len() / 2];
    let cpu = middle.cpu.as_secs_f64() * 1e3 / mib;
    let rate = bytes as f64 / 1e6 / middle.elapsed.as_secs_f64();
    println!("sequential: {rate:.0} MB/s, CPU {cpu:.2} ms/MiB with SHA-256, {:.2} times gunzip alone", cpu / plain);

    let (times, cpu) = random(arguments, &image, &home.path().join("random"), bytes)?;
    println!(
        "random 4 KiB, depth 1, each in a context that was not decoded before: p50 {:.1} ms, p99 {:.1} ms; CPU {:.1} ms per read, \
         as much as gunzip of {:.1} MiB (contexts decode to at most {} MiB where blocks allow)",
        times.quantile_us(0.5) / 1e3,
        times.quantile_us(0.99) / 1e3,
        cpu,
        cpu / plain,
        reference_layer::USUAL_CONTEXTS >> 20
    );
    Ok(())
}

/// Time of decompressing the whole layer.
fn gunzip(image: &TestImage) -> Result<Duration> {
    let largest = fs::read_dir(&image.blobs)?.flatten().max_by_key(|entry| entry.metadata().map_or(0, |m| m.len()));
    let layer = fs::read(largest.context("an image without blobs")?.path())?;
    let start = Instant::now();
    io::copy(&mut GzDecoder::new(layer.as_slice()), &mut io::sink())?;
    Ok(start.elapsed())
}

/// Latencies of reads far apart, and milliseconds on a processor for each.
fn random(arguments: &Arguments, image: &TestImage, home: &std::path::Path, bytes: usize) -> Result<(Times, f64)> {
    fs::create_dir_all(home)?;
    let daemon = nydusd(image, &home.join("cache"), home, "random")?;
    daemon.pin(&arguments.daemon_cpu)?;
    process::pin(None, &[arguments.driver_cpu])?;
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions { request_queues: 1, ..GuestOptions::LINUX })?;
    let node = entry(&mut guest, 1, "big")?;
    // The chunk table comes with the first read.
    ensure!(guest.call(&Request::read(node, 0, 0, 4096))?.errno == 0, "cannot read");
    let stretch = 2 * reference_layer::USUAL_CONTEXTS as u64;
    let mut random = Random::new(11);
    let mut times = Times::default();
    let before = daemon.cpu_us();
    for place in 1..bytes as u64 / stretch {
        let offset = place * stretch + random.below(stretch / 2 / 4096) * 4096;
        let start = Instant::now();
        ensure!(guest.call(&Request::read(node, 0, offset, 4096))?.errno == 0, "cannot read");
        times.add(start.elapsed());
    }
    // What was read along, behind the reads, belongs to them.
    std::thread::sleep(Duration::from_millis(200));
    let cpu = (daemon.cpu_us() - before) as f64 / 1e3 / times.count().max(1) as f64;
    Ok((times, cpu))
}
