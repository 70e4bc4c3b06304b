//! How soon a ring is quiet: from a message of the VMM to its answer, with requests under way and with reads parked on
//! a backend that answers no more.

use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;
use nydus_vm::limits::FENCE_WARN;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::guest::RINGS;
use nydus_vm::testing::guest::SLOTS;
use nydus_vm::testing::orders::Order;
use nydus_vm::testing::vmm::Ack;
use nydus_vm::testing::vmm::PATIENCE;

use super::Times;
use super::held::Held;
use super::held::Make;
use super::held::WARM_BYTES;
use crate::arguments::Arguments;

const READS: u64 = 256;
/// Reads of 1 MiB under way.
const BUSY: u64 = 32;

/// What the guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// 256 cold reads wait.
    Parked,
    /// 32 warm reads of 1 MiB are being copied.
    Busy,
}

/// What ends, or interrupts, the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// ENABLE 0 and GET_VRING_BASE on each ring: QEMU's stop.
    Stop,
    /// ENABLE 0 on each ring: cloud-hypervisor's pause.
    Pause,
    /// SET_MEM_TABLE with the same regions.
    MemoryTable,
    /// RESET_DEVICE.
    Reset,
    /// FUSE INIT.
    Init,
    /// The daemon is told to end.
    End,
}

const EVENTS: [(Event, Order, &str); 6] = [
    (Event::Stop, Order::Qemu, "ENABLE 0, GET_VRING_BASE"),
    (Event::Pause, Order::CloudHypervisor, "ENABLE 0"),
    (Event::MemoryTable, Order::Qemu, "SET_MEM_TABLE"),
    (Event::Reset, Order::OpenVmm, "RESET_DEVICE"),
    (Event::Init, Order::Qemu, "FUSE_INIT"),
    (Event::End, Order::Qemu, "end of the daemon"),
];

/// Measures and prints.
pub fn run(arguments: &Arguments) -> Result<()> {
    let limit_us = FENCE_WARN.as_secs_f64() * 1e6;
    println!("\ndrain: ms from a message to its answer (limit {} ms)", FENCE_WARN.as_millis());
    println!("{:<26} {:<22} {:>6} {:>9} {:>9} {:>8}", "message", "state", "times", "p50 ms", "max ms", "of limit");
    for (event, order, name) in EVENTS {
        for (state, what) in [(State::Parked, "256 reads parked"), (State::Busy, "32 x 1 MiB under way")] {
            // An INIT behind reads in the same ring would wait for them, and an end has no answer.
            if state == State::Busy && event == Event::Init {
                continue;
            }
            let options = GuestOptions {
                request_queues: 2,
                depth: READS as usize + 8,
                reply_bytes: 1 << 20,
                segment_bytes: 1 << 20,
                ring_size: 1024,
                order,
                ..GuestOptions::LINUX
            };
            let times = times(arguments, event, state, &options)?;
            let (middle, longest) = (times.quantile_us(0.5), times.longest_us());
            println!(
                "{name:<26} {what:<22} {:>6} {:>9.3} {:>9.3} {:>7.1}%",
                times.count(),
                middle / 1e3,
                longest / 1e3,
                100.0 * longest / limit_us
            );
        }
    }
    Ok(())
}

fn times(arguments: &Arguments, event: Event, state: State, options: &GuestOptions) -> Result<Times> {
    let mut times = Times::default();
    let count = if arguments.quick { 5 } else { 30 };
    let make = Make { compressor: Compressor::Zstd, chunk_bytes: 64 << 10 };
    // A daemon that has ended makes room for the next.
    let (daemons, per_daemon) = if event == Event::End { (count.min(5), 1) } else { (1, count) };
    for _ in 0..daemons {
        let mut held = Held::new(arguments, make, options)?;
        for _ in 0..per_daemon {
            match state {
                State::Parked => held.park(READS)?,
                State::Busy => begin_copies(&mut held)?,
            }
            let start = Instant::now();
            perform(event, &mut held)?;
            times.add(start.elapsed());
            recover(event, &mut held)?;
        }
    }
    Ok(times)
}

/// Asks for 32 MiB at once, and does not wait for any of it.
fn begin_copies(held: &mut Held) -> Result<()> {
    let warm = held.warm;
    let lane = held.guest.lane(1);
    for n in 0..BUSY {
        lane.submit(&Request::read(warm, 0, (n << 20) % WARM_BYTES, 1 << 20))?;
    }
    lane.publish()?;
    // The first is on its way.
    let start = Instant::now();
    while lane.ready()? == 0 {
        ensure!(start.elapsed() < PATIENCE, "no read is answered");
    }
    Ok(())
}

fn perform(event: Event, held: &mut Held) -> Result<()> {
    let rings = held.guest.rings();
    match event {
        Event::Stop => {
            held.guest.stop()?;
        }
        Event::Pause => held.guest.vmm().pause(&rings)?,
        Event::MemoryTable => held.guest.vmm().set_table(&[RINGS, SLOTS], Ack::Wanted)?,
        Event::Reset => held.guest.vmm().reset_device()?,
        Event::Init => {
            held.guest.mount()?;
        }
        Event::End => held.room.end(PATIENCE)?,
    }
    Ok(())
}

/// Back to a guest with nothing in flight.
fn recover(event: Event, held: &mut Held) -> Result<()> {
    match event {
        Event::Stop | Event::Reset => {
            held.guest.forget_rings();
            held.guest.start_rings(&[])?;
            held.guest.mount()?;
            Ok(())
        }
        Event::Pause => {
            let rings = held.guest.rings();
            held.guest.vmm().resume(&rings)?;
            held.begin_anew()
        }
        Event::MemoryTable | Event::Init => held.begin_anew(),
        Event::End => Ok(()),
    }
}
