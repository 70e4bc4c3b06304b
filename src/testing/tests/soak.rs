//! The daemon for minutes instead of milliseconds: guests come, do what guests and VMMs do, and go; every byte stays right,
//! and descriptors, threads and memory stay flat. Run by `scripts/test --long`.

use std::time::Duration;
use std::time::Instant;

use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::orders::Order;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::vmm::PATIENCE;

use crate::support::CHUNK_BYTES;
use crate::support::Demo;
use crate::support::eventually;
use crate::support::find;
use crate::support::read_file;

/// How long, unless `NYDUS_SOAK_SECONDS` says otherwise.
const SOAK: Duration = Duration::from_secs(600);
/// Guests until caches, pools and allocator have their size.
const WARM_UP: u64 = 50;
/// Private memory may grow by this much after [`WARM_UP`]: buffers that are given back a second later.
const SLACK_BYTES: u64 = 8 << 20;
/// Reads in flight when something happens.
const FLYING: u64 = 24;

const ORDERS: [Order; 5] = [Order::Qemu, Order::QemuSlots, Order::CloudHypervisor, Order::OpenVmm, Order::Alioth];

/// Numbers that look random and are the same in every run (xorshift64).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// One guest from its boot to its end, which may be at any moment.
fn one_guest(daemon: &DaemonProcess, demo: &Demo, dice: &mut Dice) {
    let order = ORDERS[dice.below(5) as usize];
    let options = GuestOptions { order, depth: 32, ..GuestOptions::LINUX };
    let mut guest = Guest::boot(daemon.socket(), &options).unwrap();
    let cold = find(&mut guest, "/cold");
    let warm = find(&mut guest, "/warm");
    let content = Demo::cold();
    for _ in 0..dice.below(8) {
        let reads: Vec<usize> =
            (0..FLYING).map(|_| dice.below((content.len() - CHUNK_BYTES) as u64) as usize).collect();
        let lane = guest.lane(1);
        let flying: Vec<_> =
            reads.iter().map(|at| lane.submit(&Request::read(cold.node, 0, *at as u64, 8192)).unwrap()).collect();
        lane.publish().unwrap();
        match dice.below(4) {
            // The VMM dies with everything in flight.
            0 => return,
            1 => {
                let bases = guest.stop().unwrap();
                guest.continue_rings(&bases).unwrap();
            }
            2 => {
                let rings = guest.rings();
                guest.vmm().pause(&rings).unwrap();
                guest.vmm().resume(&rings).unwrap();
            }
            _ => {}
        }
        for (at, unique) in reads.into_iter().zip(flying) {
            let done = guest.lane(1).wait_for(unique, PATIENCE).unwrap();
            let body = guest.lane(1).reply(done).body().unwrap();
            assert_eq!(body, content[at..at + 8192], "read at {at}, {order:?}");
        }
        if dice.below(3) == 0 {
            guest.reboot().unwrap();
            guest.mount().unwrap();
        }
    }
    assert_eq!(read_file(&mut guest, &warm, 64 << 10), Demo::warm(), "{} {order:?}", demo.image.name);
}

#[test]
#[ignore = "takes minutes; scripts/test --long"]
fn daemon_stays_right_and_small_for_minutes() {
    let seconds = std::env::var("NYDUS_SOAK_SECONDS").ok().and_then(|text| text.parse().ok());
    let until = Instant::now() + seconds.map_or(SOAK, Duration::from_secs);
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let (mut turns, mut settled) = (0u64, None);
    while Instant::now() < until || settled.is_none() {
        one_guest(&daemon, &demo, &mut dice);
        turns += 1;
        if turns == WARM_UP {
            // What belongs to the last guest goes in its own time.
            std::thread::sleep(Duration::from_secs(2));
            settled = Some((daemon.descriptors(), daemon.threads(), daemon.private_bytes()));
        }
        if let Some((descriptors, threads, bytes)) = settled {
            eventually("as many descriptors and threads as before", || {
                (daemon.descriptors(), daemon.threads()) == (descriptors, threads)
            });
            let now = daemon.private_bytes();
            assert!(now < bytes + SLACK_BYTES, "{turns} guests: {now} private bytes, {bytes} after {WARM_UP}");
        }
    }
    eprintln!("{turns} guests, {} private bytes", daemon.private_bytes());
}
