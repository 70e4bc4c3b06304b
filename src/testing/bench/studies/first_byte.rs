//! What a cold read of 4 KiB costs beyond the time that its backend takes.

use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::testing::fault::Fault;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::GuestOptions;

use super::Times;
use super::held::COLD_CHUNKS;
use super::held::Held;
use super::held::Make;
use crate::arguments::Arguments;

/// What the backend takes.
const DELAY: Duration = Duration::from_millis(20);
/// What the daemon may add.
const AIM_MS: f64 = 2.0;

/// Measures and prints.
pub fn run(arguments: &Arguments) -> Result<()> {
    println!(
        "\nfirst byte: cold READ of 4 KiB, backend delayed by {} ms; ms beyond that (aim {AIM_MS})",
        DELAY.as_millis()
    );
    println!(
        "{:<10} {:>9} {:>6} {:>9} {:>9} {:>9} {:>8}",
        "codec", "chunk KiB", "times", "p50 ms", "p99 ms", "max ms", "of aim"
    );
    for (compressor, name) in [(Compressor::None, "none"), (Compressor::Lz4Block, "lz4"), (Compressor::Zstd, "zstd")] {
        for chunk_bytes in [64 << 10, 1 << 20] {
            let times = times(arguments, Make { compressor, chunk_bytes })?;
            let beyond = |of| times.quantile_us(of) / 1e3 - DELAY.as_secs_f64() * 1e3;
            println!(
                "{name:<10} {:>9} {:>6} {:>9.3} {:>9.3} {:>9.3} {:>7.0}%",
                chunk_bytes >> 10,
                times.count(),
                beyond(0.5),
                beyond(0.99),
                beyond(1.0),
                100.0 * beyond(0.5) / AIM_MS
            );
        }
    }
    Ok(())
}

fn times(arguments: &Arguments, make: Make) -> Result<Times> {
    let mut held = Held::new(arguments, make, &GuestOptions { request_queues: 1, ..GuestOptions::LINUX })?;
    // The table of chunks comes with the first read.
    ensure!(held.guest.call(&Request::read(held.cold, 0, 0, 4096))?.errno == 0, "cannot read");
    held.room.faults.set(Fault::Delay(DELAY));
    let mut times = Times::default();
    let count = if arguments.quick { 10 } else { 100 };
    for n in 1..=count {
        // Far apart, so that no chunk comes along with another.
        let chunk = n * 5 % COLD_CHUNKS;
        let request = Request::read(held.cold, 0, chunk * held.chunk_bytes + 4096 * (n % 16), 4096);
        let start = Instant::now();
        ensure!(held.guest.call(&request)?.errno == 0, "cannot read");
        times.add(start.elapsed());
    }
    Ok(times)
}
