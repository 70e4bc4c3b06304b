//! What warm reads notice of cold ones whose backend does not answer.

use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::GuestOptions;

use super::Times;
use super::held::Held;
use super::held::Make;
use super::held::WARM_BYTES;
use crate::arguments::Arguments;
use crate::workload::Random;

const PARKED: u64 = 256;
const AIM: f64 = 1.5;

/// Measures and prints.
pub fn run(arguments: &Arguments) -> Result<()> {
    println!("\nhang: warm READ of 4 KiB at depth 1 while {PARKED} cold reads wait for a backend that never answers");
    println!("{:<12} {:>9} {:>9} {:>9}", "cold reads", "p50 us", "p99 us", "p99.9 us");
    let options = GuestOptions { request_queues: 1, depth: PARKED as usize + 8, ..GuestOptions::LINUX };
    let make = Make { compressor: Compressor::Zstd, chunk_bytes: 64 << 10 };
    let (mut quiet, mut hanging) = (Times::default(), Times::default());
    // In turns, so that a machine that changes its speed changes it for both.
    for _ in 0..arguments.rounds {
        let mut held = Held::new(arguments, make, &options)?;
        read(&mut held, arguments, &mut quiet)?;
        held.park(PARKED)?;
        read(&mut held, arguments, &mut hanging)?;
    }
    for (name, times) in [("none", &quiet), ("hang", &hanging)] {
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|of| times.quantile_us(of));
        println!("{name:<12} {p50:>9.1} {p99:>9.1} {p999:>9.1}");
    }
    let ratio = hanging.quantile_us(0.99) / quiet.quantile_us(0.99);
    println!("p99 ratio {ratio:.2}, aim at most {AIM}");
    Ok(())
}

fn read(held: &mut Held, arguments: &Arguments, times: &mut Times) -> Result<()> {
    let mut random = Random::new(7);
    let until = Instant::now() + Duration::from_secs_f64(arguments.seconds);
    while Instant::now() < until {
        let request = Request::read(held.warm, 0, random.below(WARM_BYTES / 4096) * 4096, 4096);
        let start = Instant::now();
        let reply = held.guest.call(&request)?;
        times.add(start.elapsed());
        ensure!(reply.errno == 0, "a warm read failed");
    }
    Ok(())
}
