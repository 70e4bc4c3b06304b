//! The life of a connection in the orders of real VMMs.

use std::fs;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use nydus_vm::sys::lock::Lock;
use nydus_vm::sys::lock::try_lock;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::guest::RINGS;
use nydus_vm::testing::guest::SLOTS;
use nydus_vm::testing::orders::Order;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::vmm::Ack;
use nydus_vm::testing::vmm::Control;
use nydus_vm::testing::vmm::PATIENCE;
use nydus_vm::testing::vmm::feature;
use nydus_vm::testing::vmm::message;
use rustix::process::Signal;

use crate::support::CHUNK_BYTES;
use crate::support::COLD_BYTES;
use crate::support::Demo;
use crate::support::SMALL;
use crate::support::counters;
use crate::support::eventually;
use crate::support::find;
use crate::support::nydusd;
use crate::support::read_file;

/// Some VMMs take the tag from the device.
const TAG: [&str; 2] = ["--tag", "nydus"];

#[test]
fn device_offers_what_vmms_need() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&["--queues", "3"]);
    let mut guest = Guest::connect(daemon.socket(), &SMALL).unwrap();
    let features = feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX | feature::PROTOCOL_FEATURES;
    assert_eq!(guest.vmm().offered() & features, features);
    assert_eq!(guest.vmm().queue_num(), 4);
    let offered = guest.vmm().control().ask_u64(message::GET_PROTOCOL_FEATURES).unwrap();
    let wanted = feature::P_MQ
        | feature::P_REPLY_ACK
        | feature::P_CONFIGURE_MEM_SLOTS
        | feature::P_BACKEND_REQ
        | feature::P_RESET_DEVICE;
    assert_eq!(offered & wanted, wanted);
    assert_eq!(offered & (feature::P_CONFIG | feature::P_STATUS | feature::P_INFLIGHT_SHMFD), 0);
}

#[test]
fn config_space_is_offered_with_a_tag_only() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&["--tag", "nydus", "--queues", "5"]);
    let mut control = Control::connect(daemon.socket()).unwrap();
    control.ask_u64(message::GET_FEATURES).unwrap();
    let offered = control.ask_u64(message::GET_PROTOCOL_FEATURES).unwrap();
    assert_ne!(offered & feature::P_CONFIG, 0);
    control.set_protocol_features(feature::P_CONFIG | feature::P_MQ, Ack::No).unwrap();
    let config = control.config(0, 40, 0).unwrap();
    assert_eq!(config[..6], *b"nydus\0");
    assert_eq!(config[36..40], 5u32.to_le_bytes());
}

#[test]
fn guest_boots_and_reboots_in_each_order() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&TAG);
    for order in Order::ALL {
        let options = GuestOptions { order, request_queues: 2, ..GuestOptions::LINUX };
        let mut guest = Guest::boot(daemon.socket(), &options).unwrap_or_else(|e| panic!("{order:?}: {e}"));
        let warm = find(&mut guest, "/warm");
        assert_eq!(read_file(&mut guest, &warm, 100_000), Demo::warm(), "{order:?}");
        guest.reboot().unwrap_or_else(|e| panic!("{order:?}: {e}"));
        assert_ne!(guest.mount().unwrap().max_write, 0, "{order:?}: a new session without DESTROY");
        let warm = find(&mut guest, "/warm");
        assert_eq!(read_file(&mut guest, &warm, 1 << 20), Demo::warm(), "{order:?} after a reboot");
    }
}

#[test]
fn second_queue_is_served_as_the_first() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions { request_queues: 8, ..SMALL }).unwrap();
    for queue in 1..=8 {
        let reply = guest.lane(queue).call(&Request::getattr(1)).unwrap();
        assert_eq!(reply.errno, 0, "queue {queue}");
    }
}

#[test]
fn ring_one_alone_is_served() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&TAG);
    for order in Order::ALL {
        let mut guest = Guest::connect(daemon.socket(), &GuestOptions { order, ..SMALL }).unwrap();
        guest.start_rings(&[1]).unwrap_or_else(|error| panic!("{order:?}: {error}"));
        guest.mount().unwrap();
        assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0, "{order:?}");
    }
}

/// Waits until the daemon has as many descriptors and threads as `wanted`.
fn settles(daemon: &DaemonProcess, wanted: (usize, usize)) -> (usize, usize) {
    let start = Instant::now();
    loop {
        let now = (daemon.descriptors(), daemon.threads());
        if now == wanted || start.elapsed() > PATIENCE {
            return now;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn thousand_reconnects_leak_no_descriptor_and_no_thread() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&TAG);
    let options = GuestOptions { depth: 2, reply_bytes: 4096, ..SMALL };
    let connect = |turn: usize| {
        let order = Order::ALL[turn % Order::ALL.len()];
        let mut guest = Guest::boot(daemon.socket(), &GuestOptions { order, ..options }).unwrap();
        assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
        if turn.is_multiple_of(2) {
            // Half of them leave with a request in flight.
            guest.lane(1).submit(&Request::read(2, 0, 0, 4096)).unwrap();
            guest.lane(1).publish().unwrap();
        }
    };
    (0..Order::ALL.len()).for_each(connect);
    // What the first connections leave behind for good: pools, log files.
    std::thread::sleep(Duration::from_millis(300));
    let before = (daemon.descriptors(), daemon.threads());
    (0..1000).for_each(connect);
    assert_eq!(settles(&daemon, before), before, "(descriptors, threads)");
}

#[test]
fn node_ids_outlive_a_reconnect_and_a_restart_of_the_session() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &SMALL).unwrap();
    let warm = find(&mut guest, "/warm");
    drop(guest);
    // cloud-hypervisor after a crash of its own: the old session goes on without INIT.
    let mut guest = Guest::start(daemon.socket(), &GuestOptions { order: Order::CloudHypervisor, ..SMALL }).unwrap();
    assert_eq!(read_file(&mut guest, &warm, 16 << 10), Demo::warm());
}

#[test]
fn second_vmm_waits_until_the_first_has_gone() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut first = Guest::boot(daemon.socket(), &SMALL).unwrap();
    let waiting = UnixStream::connect(daemon.socket()).unwrap();
    let second = Control::from_stream(waiting).unwrap();
    second.send(message::GET_FEATURES, 1, &[], &[]).unwrap();
    assert_eq!(first.call(&Request::getattr(1)).unwrap().errno, 0, "the first is not disturbed");
    drop(first);
    second.receive(message::GET_FEATURES).unwrap();
}

/// Puts READs of a whole megabyte into flight; cold the first time.
fn fill_with_reads(guest: &mut Guest, node: u64, turn: usize) -> Vec<(u64, usize)> {
    let lane = guest.lane(1);
    let mut flying = Vec::new();
    while lane.room() > 0 {
        let offset = (flying.len() + turn * 7) * CHUNK_BYTES % (COLD_BYTES - (1 << 20));
        flying.push((lane.submit(&Request::read(node, 0, offset as u64, 1 << 20)).unwrap(), offset));
    }
    lane.publish().unwrap();
    flying
}

#[test]
fn nothing_is_written_after_get_vring_base_and_cont_completes_everything() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&TAG);
    let cold = Demo::cold();
    for order in [Order::Qemu, Order::Qemu8, Order::Qemu11, Order::CloudHypervisor, Order::OpenVmm] {
        let mut guest =
            Guest::boot(daemon.socket(), &GuestOptions { order, depth: 24, ..GuestOptions::LINUX }).unwrap();
        let entry = find(&mut guest, "/cold");
        for turn in 0..5 {
            let flying = fill_with_reads(&mut guest, entry.node, turn);
            let bases = guest.stop().unwrap();
            let stopped = (guest.memory().digest(RINGS), guest.memory().digest(SLOTS));
            std::thread::sleep(Duration::from_millis(30));
            let later = (guest.memory().digest(RINGS), guest.memory().digest(SLOTS));
            assert_eq!(stopped, later, "{order:?}, turn {turn}: memory changed after GET_VRING_BASE");
            guest.continue_rings(&bases).unwrap();
            for (unique, offset) in flying {
                let done = guest.lane(1).wait_for(unique, PATIENCE).unwrap();
                let body = guest.lane(1).reply(done).body().unwrap();
                assert_eq!(body, cold[offset..offset + (1 << 20)], "{order:?}, turn {turn}, offset {offset}");
            }
        }
    }
}

#[test]
fn paused_rings_complete_nothing_until_they_go_on() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let options = GuestOptions { order: Order::CloudHypervisor, depth: 24, ..GuestOptions::LINUX };
    let mut guest = Guest::boot(daemon.socket(), &options).unwrap();
    let entry = find(&mut guest, "/cold");
    let rings = guest.rings();
    for turn in 0..10 {
        let flying = fill_with_reads(&mut guest, entry.node, turn);
        guest.vmm().pause(&rings).unwrap();
        let paused = (guest.memory().digest(RINGS), guest.memory().digest(SLOTS));
        std::thread::sleep(Duration::from_millis(30));
        let later = (guest.memory().digest(RINGS), guest.memory().digest(SLOTS));
        assert_eq!(paused, later, "turn {turn}: memory changed while paused");
        guest.vmm().resume(&rings).unwrap();
        for (unique, _) in flying {
            let done = guest.lane(1).wait_for(unique, PATIENCE).unwrap();
            assert_eq!(guest.lane(1).reply(done).errno, 0);
        }
    }
}

#[test]
fn memory_table_sent_again_while_rings_run_is_taken_over() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions { depth: 24, ..GuestOptions::LINUX }).unwrap();
    let entry = find(&mut guest, "/cold");
    for turn in 0..5 {
        let flying = fill_with_reads(&mut guest, entry.node, turn);
        guest.vmm().set_table(&[RINGS, SLOTS], Ack::Wanted).unwrap();
        for (unique, _) in flying {
            let done = guest.lane(1).wait_for(unique, PATIENCE).unwrap();
            assert_eq!(guest.lane(1).reply(done).errno, 0);
        }
    }
}

#[test]
fn daemon_ends_at_sigterm_in_every_state_within_a_second() {
    let second = Duration::from_secs(1);
    let demo = Demo::new();
    let ends = |daemon: &mut DaemonProcess, state: &str| {
        let start = Instant::now();
        daemon.signal(Signal::TERM).unwrap();
        let status = daemon.wait(PATIENCE).unwrap();
        assert!(status.success(), "{state}: {status}");
        assert!(start.elapsed() < second, "{state}: {:?}", start.elapsed());
        assert!(!daemon.socket().exists(), "{state}: the socket is left");
    };
    let mut daemon = demo.nydusd(&[]);
    ends(&mut daemon, "before a VMM");
    let mut daemon = demo.nydusd(&[]);
    let guest = Guest::connect(daemon.socket(), &SMALL).unwrap();
    ends(&mut daemon, "connected, no ring started");
    drop(guest);
    let mut daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions { depth: 24, ..GuestOptions::LINUX }).unwrap();
    let entry = find(&mut guest, "/cold");
    fill_with_reads(&mut guest, entry.node, 0);
    ends(&mut daemon, "serving");
}

/// Another process holds all chunks of the blob, and so 256 reads are parked for as long as it likes.
#[test]
fn daemon_with_reads_parked_ends_at_sigterm_and_completes_them_otherwise() {
    let demo = Demo::new();
    for is_ended in [true, false] {
        let home = tempfile::tempdir().unwrap();
        let mut daemon = nydusd(&demo.image, home.path(), &[]);
        let options = GuestOptions { depth: 300, reply_bytes: 64 << 10, ..GuestOptions::LINUX };
        let mut guest = Guest::boot(daemon.socket(), &options).unwrap();
        let warm = find(&mut guest, "/warm");
        assert_eq!(read_file(&mut guest, &warm, 64 << 10), Demo::warm());
        let entry = find(&mut guest, "/cold");
        let holder = hold_all_chunks(&home.path().join("cache"));
        let before = counters(&daemon)["parked_reads"].as_u64().unwrap();
        let lane = guest.lane(1);
        let read = |n: u64| Request::read(entry.node, 0, n * CHUNK_BYTES as u64, 4096);
        let flying: Vec<_> = (0..256).map(|n| lane.submit(&read(n)).unwrap()).collect();
        lane.publish().unwrap();
        eventually("256 parked reads", || counters(&daemon)["parked_reads"].as_u64().unwrap() >= before + 256);
        assert_eq!(read_file(&mut guest, &warm, 64 << 10), Demo::warm(), "warm reads go on");
        assert_eq!(guest.lane(1).ready().unwrap(), 0);
        if is_ended {
            let start = Instant::now();
            daemon.signal(Signal::TERM).unwrap();
            assert!(daemon.wait(PATIENCE).unwrap().success());
            assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
            continue;
        }
        drop(holder);
        let cold = Demo::cold();
        for (n, unique) in flying.into_iter().enumerate() {
            let done = guest.lane(1).wait_for(unique, PATIENCE).unwrap();
            assert_eq!(guest.lane(1).reply(done).body().unwrap(), cold[n * CHUNK_BYTES..][..4096]);
        }
    }
}

/// Takes the locks by which processes agree who fetches a chunk (`storage::cache::side`), until it is dropped.
fn hold_all_chunks(cache: &Path) -> File {
    let paths = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path());
    let side = paths.into_iter().find(|path| path.to_string_lossy().ends_with(".nydus_state")).unwrap();
    let file = File::options().read(true).write(true).open(side).unwrap();
    let first = 1 << 32;
    eventually("no fetch under way", || try_lock(file.as_fd(), first..first + (1 << 24), Lock::Exclusive).unwrap());
    file
}

#[test]
fn daemon_ends_with_its_vmm_if_told_so() {
    let demo = Demo::new();
    let mut daemon = demo.nydusd(&["--exit-on-disconnect"]);
    drop(Guest::boot(daemon.socket(), &SMALL).unwrap());
    assert!(daemon.wait(PATIENCE).unwrap().success());
}
