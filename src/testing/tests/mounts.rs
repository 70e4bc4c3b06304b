//! Guests that mount, walk and go, by the thousand, in front of one daemon: its memory and descriptors stay as they are.

use std::fs::File;
use std::time::Duration;

use nydus_vm::limits::POOL_REST;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::orders::Order;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;

use crate::cached;
use crate::support::SMALL;
use crate::support::eventually;
use crate::support::nydusd;

const ORDERS: [Order; 5] = [Order::Qemu, Order::QemuSlots, Order::CloudHypervisor, Order::OpenVmm, Order::Alioth];
/// Guests until caches, pools and allocator have their size.
const WARM_UP: usize = 60;
/// Bytes that may come and go: stacks and buffers of the last guest.
const SLACK_BYTES: u64 = 512 << 10;

/// Looks at a daemon, all alike, until it is taken to be at rest.
const STEADY_LOOKS: u32 = 4;

/// What a daemon has.
#[derive(Debug, Clone, Copy)]
struct Size {
    descriptors: usize,
    threads: usize,
    private_bytes: u64,
}

/// The size of `daemon` once the last guest is gone from it.
fn size(daemon: &DaemonProcess) -> Size {
    let now = || (daemon.descriptors(), daemon.threads());
    // What belongs to a guest goes in its own time: its threads are the last.
    let (mut last, mut times) = (now(), 0);
    eventually("a daemon without a guest", || {
        std::thread::sleep(Duration::from_millis(50));
        let same = std::mem::replace(&mut last, now()) == last;
        times = if same { times + 1 } else { 0 };
        times == STEADY_LOOKS
    });
    Size { descriptors: last.0, threads: last.1, private_bytes: daemon.private_bytes() }
}

fn stays_flat(mounts: usize) {
    let home = tempfile::tempdir().unwrap();
    let (image, manifest) = cached::small_image(home.path(), 6, 5000);
    let daemon = nydusd(&image, home.path(), &[]);
    let one = |n: usize| {
        let order = ORDERS[n % ORDERS.len()];
        let options = GuestOptions { order, reply_bytes: 64 << 10, ..SMALL };
        let mut guest = Guest::boot(daemon.socket(), &options).unwrap();
        let tree = walk(&mut guest, &WalkOptions { in_flight: 8, read_bytes: 8 << 10, ..WalkOptions::USUAL }).unwrap();
        let differences = tree.differences(&manifest);
        assert!(differences.is_empty(), "mount {n}, {order:?}:\n{}", differences.join("\n"));
        // Every third resets its device first; of the others, the VMM is simply gone.
        if n.is_multiple_of(3) {
            guest.reboot().unwrap();
        }
    };
    (0..WARM_UP).for_each(one);
    // Pages of the cache that wait for the disk count as the daemon's own, and its threads give back their buffers when
    // they had nothing to do for a while.
    for file in std::fs::read_dir(home.path().join("cache")).unwrap() {
        File::open(file.unwrap().path()).unwrap().sync_all().unwrap();
    }
    std::thread::sleep(POOL_REST + Duration::from_millis(500));
    let settled = size(&daemon);
    let looks = 8;
    for look in 1..=looks {
        (0..mounts / looks).for_each(|n| one(look * 7 + n));
        eventually("as many descriptors and threads as before", || {
            (daemon.descriptors(), daemon.threads()) == (settled.descriptors, settled.threads)
        });
        let now = size(&daemon);
        let limit = settled.private_bytes + SLACK_BYTES;
        assert!(now.private_bytes <= limit, "{} mounts: {now:?}, {settled:?}", look * mounts / looks);
    }
    eprintln!("{mounts} mounts: {settled:?}, {:?}", size(&daemon));
}

#[test]
fn hundreds_of_mounts_leave_a_daemon_as_small_as_it_was() {
    stays_flat(400);
}

#[test]
#[ignore = "takes minutes; scripts/test --long"]
fn ten_thousand_mounts_leave_a_daemon_as_small_as_it_was() {
    stays_flat(10_000);
}
