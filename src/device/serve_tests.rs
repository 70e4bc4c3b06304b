//! From connection to connection: stop in every state, reconnects without leaks, the configuration space, notifications.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::AfterDisconnect;
use super::Options;
use super::rig::*;
use crate::limits::SHUTDOWN;

#[test]
fn stop_ends_the_device_in_every_state() {
    let mut device = Device::start();
    std::thread::sleep(Duration::from_millis(10));
    assert!(device.end() < SHUTDOWN, "nobody connected");

    let mut device = Device::start();
    let vmm = device.connect();
    vmm.frontend.get_features().unwrap();
    assert!(device.end() < SHUTDOWN, "connected");

    let mut device = Device::start();
    let mut vmm = device.connect();
    vmm.negotiate(FEATURES);
    vmm.share_memory();
    let mut ring = vmm.start_ring(1, 1024);
    for unique in 0..256 {
        ring.submit(PARK, unique, 4096);
    }
    ring.kick();
    device.double.wait_for_parked(256);
    assert!(device.end() < SHUTDOWN, "256 requests are parked");
    device.double.complete_all();
    assert!(ring.poll().is_empty());

    let mut device = Device::start();
    device.stop.trigger();
    device.join();
}

#[test]
fn stop_ends_the_device_under_load() {
    let mut device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    let guest = std::thread::spawn(move || {
        let mut unique = 0;
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_millis(300) {
            ring.submit(ECHO, unique, 4096);
            unique += 1;
            ring.kick();
            std::thread::sleep(Duration::from_micros(20));
            ring.poll();
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(device.end() < SHUTDOWN);
    guest.join().unwrap();
}

/// Tests that count descriptors and threads of the process must be alone; others do not count.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn entries(path: &str) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

/// Runs itself in a process of its own: other tests open descriptors and threads meanwhile.
#[test]
fn thousand_reconnects_leak_no_descriptor_and_no_thread() {
    const CHILD: &str = "NYDUS_TEST_RECONNECTS";
    let _alone = alone();
    if std::env::var_os(CHILD).is_none() {
        let name = "device::serve_tests::thousand_reconnects_leak_no_descriptor_and_no_thread";
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let device = Device::start();
    let mut before = None;
    for round in 0..1000 {
        let mut vmm = device.connect();
        let mut ring = vmm.boot(&[1]).remove(0);
        assert_eq!(ring.call(ECHO, round, 4096).0, 24);
        ring.submit(PARK, round, 4096);
        ring.kick();
        device.double.wait_for_parked(1);
        drop(vmm);
        drop(ring);
        if round % 2 == 0 {
            device.double.complete_all();
        } else {
            device.double.parked.lock().unwrap().clear();
        }
        if round == 20 || round == 999 {
            std::thread::sleep(Duration::from_millis(200));
            let now = (entries("/proc/self/fd"), entries("/proc/self/task"));
            let first = *before.get_or_insert(now);
            assert_eq!(now, first, "descriptors and threads in round {round}");
        }
    }
}

#[test]
fn parked_requests_of_a_lost_connection_hold_no_descriptor() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    ring.submit(PARK, 1, 4096);
    ring.kick();
    device.double.wait_for_parked(1);
    drop(vmm);
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    device.double.complete_all();
    assert_eq!(ring.call(ECHO, 2, 4096).0, 24);
    assert_eq!(ring.used_index(), 1);
}

#[test]
fn second_client_waits_until_the_first_is_gone() {
    let device = Device::start();
    let first = device.connect();
    first.frontend.get_features().unwrap();
    let mut second = device.connect();
    let waiting = std::thread::spawn(move || {
        let mut rings = second.boot(&[1]);
        assert_eq!(rings[0].call(ECHO, 1, 4096).0, 24);
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!waiting.is_finished());
    first.frontend.get_features().unwrap();
    drop(first);
    waiting.join().unwrap();
}

#[test]
fn device_ends_with_its_connection_when_asked_to() {
    let options = Options { after_disconnect: AfterDisconnect::End, ..Device::OPTIONS };
    let mut device = Device::with(options);
    let mut vmm = device.connect();
    vmm.boot(&[1]);
    drop(vmm);
    device.join();
}

#[test]
fn configuration_is_offered_with_a_tag_only() {
    for tag in [None, Some("nydus".to_owned())] {
        let options = Options { request_queues: 3, tag: tag.clone(), ..Device::OPTIONS };
        let device = Device::with(options);
        let mut vmm = device.connect();
        vmm.negotiate(FEATURES);
        let offered = vmm.frontend.get_protocol_features().unwrap();
        assert_eq!(offered.contains(VhostUserProtocolFeatures::CONFIG), tag.is_some());
        assert!(!offered.contains(VhostUserProtocolFeatures::STATUS));
        assert_eq!(vmm.frontend.get_queue_num().unwrap(), 4);
        if tag.is_none() {
            continue;
        }
        let (_, config) = vmm.frontend.get_config(0, 44, VhostUserConfigFlags::empty(), &[0; 44]).unwrap();
        assert_eq!(&config[..36], &[&b"nydus"[..], &[0; 31]].concat());
        assert_eq!(config[36..40], 3u32.to_le_bytes());
        assert_eq!(config[40..], [0; 4]);
        let (_, part) = vmm.frontend.get_config(36, 4, VhostUserConfigFlags::empty(), &[0; 4]).unwrap();
        assert_eq!(part, 3u32.to_le_bytes());
    }
}

#[test]
fn largest_ring_works() {
    let device = Device::start();
    let mut vmm = device.connect();
    vmm.negotiate(FEATURES);
    vmm.share_memory();
    let mut ring = vmm.start_ring(1, 32768);
    for unique in 0..3000 {
        assert_eq!(ring.call(ECHO, unique, 64).0, 24);
    }
}

/// Interrupts that `batches` of eight requests cost, offered before one kick each.
fn interrupts(ring: &mut Driver, batches: u64) -> u64 {
    let mut calls = 0;
    for batch in 0..batches {
        for n in 0..8 {
            ring.prepare(ECHO, batch * 8 + n, 4096);
        }
        // All at once: a worker that still looks would take the first ones as a batch of their own.
        ring.show(ring.avail);
        ring.kick();
        ring.wait(8);
        std::thread::sleep(Duration::from_millis(2));
        calls += ring.call.read().unwrap_or(0);
    }
    calls
}

#[test]
fn batch_costs_one_interrupt_and_none_where_the_driver_wants_none() {
    for features in [FEATURES, FEATURES & !EVENT_IDX] {
        let device = Device::start();
        let mut vmm = device.connect();
        vmm.negotiate(features);
        vmm.share_memory();
        let mut ring = vmm.start_ring(1, 64);
        ring.call.read().unwrap();
        if features & EVENT_IDX == 0 {
            assert_eq!(interrupts(&mut ring, 4), 4);
            ring.want_interrupts(false);
            assert_eq!(interrupts(&mut ring, 4), 0);
            ring.want_interrupts(true);
            assert_eq!(interrupts(&mut ring, 1), 1);
            continue;
        }
        // The first decision has nothing to compare with, and calls.
        assert_eq!(interrupts(&mut ring, 1), 1);
        ring.set_used_event(ring.seen.wrapping_add(11));
        assert_eq!(interrupts(&mut ring, 1), 0, "the event lies in the next batch");
        assert_eq!(interrupts(&mut ring, 1), 1);
        assert_eq!(interrupts(&mut ring, 3), 0);
        ring.set_used_event(ring.seen);
        assert_eq!(interrupts(&mut ring, 1), 1);
        assert_eq!(ring.kick_event(), ring.avail, "the next request is to be kicked for");
    }
}

#[test]
fn replies_are_seen_while_the_batch_goes_on() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    ring.prepare(ECHO, 1, 4096);
    ring.prepare(HOLD, 2, 4096);
    let held = device.double.hold.lock().unwrap();
    ring.show(ring.avail);
    ring.kick();
    assert_eq!(ring.wait(1).len(), 1, "the second one is still being served");
    drop(held);
    assert_eq!(ring.wait(1).len(), 1);
}

#[test]
fn late_replies_of_a_batch_that_goes_on_use_up_no_place() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    for unique in 0..u64::from(ring.size) * 2 {
        assert_eq!(ring.call(LATE, unique, 4096).1, (16, -5, unique));
    }
}

#[test]
fn worker_stays_awake_between_requests_that_follow_at_once_and_then_sleeps() {
    let device = Device::with(Options { awake: Duration::from_millis(20), ..Device::OPTIONS });
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    let began = |device: &Device| device.metrics.queues[1].requests.get();
    ring.call(ECHO, 0, 4096);
    until("the worker sleeps", || ring.kick_event() == ring.avail);
    ring.call(ECHO, 1, 4096);
    // Not asked for: kicks are wanted only for what comes when it sleeps.
    let mut unkicked = 0;
    for unique in 2..50 {
        let wants_kick = ring.kick_event() == ring.avail;
        ring.prepare(ECHO, unique, 4096);
        ring.show(ring.avail);
        if wants_kick || ring.kick_event() == ring.avail.wrapping_sub(1) {
            ring.kick();
        } else {
            unkicked += 1;
        }
        ring.wait(1);
    }
    assert!(unkicked > 0, "some were found without a kick");
    assert_eq!(began(&device), 50);
    until("the worker sleeps", || ring.kick_event() == ring.avail);
}

#[test]
fn kicks_are_refused_while_a_batch_is_worked_on_and_wanted_afterwards() {
    let device = Device::start();
    let mut vmm = device.connect();
    vmm.negotiate(FEATURES & !EVENT_IDX);
    vmm.share_memory();
    let mut ring = vmm.start_ring(1, 64);
    ring.call(ECHO, 1, 4096);
    until("kicks are wanted", || ring.kick_event() == 0);
}

#[test]
fn vmm_that_shares_no_memory_is_told_so_and_the_next_one_served() {
    let device = Device::start();
    for (round, told_something_else) in [false, true].into_iter().enumerate() {
        let mut vmm = device.connect();
        vmm.negotiate(FEATURES);
        if told_something_else {
            // A table, and rings that lie outside of it.
            let mut region = vmm.region();
            region.userspace_addr = 0;
            vmm.frontend.set_mem_table(&[region]).unwrap();
        }
        let ring = vmm.driver(1, 64);
        vmm.frontend.set_vring_num(1, 64).unwrap();
        vmm.frontend.set_vring_base(1, 0).unwrap();
        vmm.frontend.set_vring_addr(1, &ring.addresses()).unwrap_err();
        until("it is said in one line", || device.logged("guest memory is not shared") == round + 1);
    }
    let mut vmm = device.connect();
    assert_eq!(vmm.boot(&[1]).remove(0).call(ECHO, 1, 4096).0, 24);
    assert_eq!(device.logged("INFO nydus_vm::device: Waiting for vhost-user socket connection..."), 3);
    assert_eq!(device.logged("INFO nydus_vm::device: Client connected, servicing requests"), 3);
}
