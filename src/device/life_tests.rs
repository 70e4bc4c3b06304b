//! The life of a ring as a VMM drives it: order of set-up, stop, pause, reset, sessions, memory.

use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use super::rig::*;
use crate::fuse::slot::ReplySlot;

/// What the double puts when parked requests are completed.
const COMPLETE: (u32, i32) = (24, 0);

/// Long enough for anything that must not happen to happen.
fn settle() {
    std::thread::sleep(Duration::from_millis(30));
}

fn park(device: &Device, ring: &mut Driver, count: usize) -> Vec<u16> {
    let heads = (0..count).map(|n| ring.submit(PARK, 100 + n as u64, 4096)).collect();
    ring.kick();
    device.double.wait_for_parked(count);
    heads
}

/// All of `heads` complete with the data of [`Double::complete_all`], each once.
fn expect_complete(ring: &mut Driver, heads: &[u16]) {
    let mut used = ring.wait(heads.len());
    used.sort_unstable();
    let mut wanted: Vec<_> = heads.iter().map(|head| (u32::from(*head), COMPLETE.0)).collect();
    wanted.sort_unstable();
    assert_eq!(used, wanted);
    for head in heads {
        let (len, error, _) = ring.reply(*head);
        assert_eq!((len, error), COMPLETE);
    }
}

#[test]
fn request_is_answered_with_its_exact_length() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut rings = vmm.boot(&[0, 1, 2]);
    for (unique, ring) in (7..).zip(&mut rings) {
        assert_eq!(ring.call(ECHO, unique, 4096), (24, (24, 0, unique)));
        assert_eq!(ring.call(DATA, unique, 4096), (4096, (4096, 0, unique)));
        assert_eq!(ring.call(DROP, unique, 4096), (16, (16, -libc::EIO, unique)));
        assert_eq!(ring.call(PANIC, unique, 4096), (16, (16, -libc::EIO, unique)));
        assert_eq!(ring.call(FORGET, unique, 4096).0, 0);
        assert_eq!(ring.call(ECHO, unique, 4096), (24, (24, 0, unique)));
    }
}

/// The messages that make a ring, by letter: Num, Addr, Base, Kick, Call, Enable.
fn tell(vmm: &mut Vmm, ring: &Driver, letter: char) {
    let index = ring.index;
    match letter {
        'N' => vmm.frontend.set_vring_num(index, ring.size).unwrap(),
        'A' => vmm.frontend.set_vring_addr(index, &ring.addresses()).unwrap(),
        'B' => vmm.frontend.set_vring_base(index, 0).unwrap(),
        'K' => vmm.frontend.set_vring_kick(index, &ring.kick).unwrap(),
        'C' => vmm.frontend.set_vring_call(index, &ring.call).unwrap(),
        'E' => vmm.frontend.set_vring_enable(index, true).unwrap(),
        _ => unreachable!(),
    }
}

#[test]
fn ring_starts_when_the_last_piece_arrives_whatever_the_order() {
    for order in ["NBAKEC", "KNABEC", "KCNABE", "ENABKC", "EKCNAB", "EKBAN", "EKNBA", "CKEABN", "ABENK"] {
        for bits in [FEATURES, FEATURES & !PROTOCOL] {
            let device = Device::start();
            let mut vmm = device.connect();
            vmm.negotiate(bits);
            vmm.share_memory();
            let mut ring = vmm.driver(1, 64);
            let head = ring.submit(ECHO, 5, 4096);
            // As QEMU does, the kick is there from the beginning.
            ring.kick();
            for (done, letter) in order.chars().enumerate() {
                assert_eq!(ring.used_index(), 0, "{order} {bits:#x} after {done}");
                if letter != 'E' || bits & PROTOCOL != 0 {
                    tell(&mut vmm, &ring, letter);
                }
                if done + 1 < order.len() && order != "ABENK" {
                    std::thread::sleep(Duration::from_millis(1));
                    let rest = &order[done + 1..];
                    let missing = rest.contains(['N', 'A', 'B', 'K']) || (rest.contains('E') && bits & PROTOCOL != 0);
                    if !missing {
                        break;
                    }
                }
            }
            assert_eq!(ring.wait(1), [(u32::from(head), 24)], "{order} {bits:#x}");
        }
    }
}

#[test]
fn lone_ring_one_works_with_ring_zero_untouched() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut rings = vmm.boot(&[1]);
    assert_eq!(rings[0].call(ECHO, 1, 4096).0, 24);
}

#[test]
fn call_descriptor_is_signalled_when_it_arrives() {
    let device = Device::start();
    let mut vmm = device.connect();
    vmm.negotiate(FEATURES);
    vmm.share_memory();
    let mut ring = vmm.driver(1, 64);
    ring.submit(ECHO, 1, 4096);
    ring.kick();
    vmm.set_up(&ring, 0);
    vmm.frontend.set_vring_enable(1, true).unwrap();
    ring.wait(1);
    vmm.frontend.set_vring_call(1, &ring.call).unwrap();
    assert_eq!(ring.call.read().unwrap(), 1);
}

#[test]
fn stopped_ring_that_goes_on_where_it_was_gets_its_parked_replies() {
    for completed_while_stopped in [true, false] {
        let device = Device::start();
        let mut vmm = device.connect();
        let mut ring = vmm.boot(&[1]).remove(0);
        ring.call(ECHO, 1, 4096);
        let heads = park(&device, &mut ring, 8);
        vmm.frontend.set_vring_enable(1, false).unwrap();
        let base = vmm.frontend.get_vring_base(1).unwrap();
        assert_eq!(base, 9);
        let _ = ring.call.read();
        if completed_while_stopped {
            device.double.complete_all();
        }
        settle();
        assert!(ring.poll().is_empty(), "nothing is written to a stopped guest");
        assert_eq!(ring.read(ring.buffer(heads[0]) + 4096, 4), [0xee; 4]);
        vmm.set_up(&ring, base as u16);
        settle();
        assert!(ring.poll().is_empty(), "nothing is written before ENABLE");
        vmm.frontend.set_vring_enable(1, true).unwrap();
        if !completed_while_stopped {
            device.double.complete_all();
        }
        expect_complete(&mut ring, &heads);
        // CALL comes last, and yet the guest is interrupted.
        let _ = ring.call.read();
        vmm.frontend.set_vring_call(1, &ring.call).unwrap();
        assert!(ring.call.read().is_ok());
        assert_eq!(ring.call(ECHO, 2, 4096).0, 24);
    }
}

#[test]
fn started_ring_that_differs_drops_what_was_parked_in_silence() {
    type Change = fn(&mut Driver);
    let cases: [(&str, u16, Change); 3] = [
        ("another base", 0, |ring| ring.avail = 0),
        ("another used index", 9, |ring| ring.write(ring.used_ring() + 2, &[0, 0])),
        ("another size", 9, |ring| ring.size = 32),
    ];
    for (name, base, change) in cases {
        let device = Device::start();
        let mut vmm = device.connect();
        let mut ring = vmm.boot(&[1]).remove(0);
        ring.call(ECHO, 1, 4096);
        let heads = park(&device, &mut ring, 8);
        assert_eq!(vmm.frontend.get_vring_base(1).unwrap(), 9);
        let (_avail, seen) = (ring.avail, ring.seen);
        change(&mut ring);
        ring.show(ring.avail);
        vmm.set_up(&ring, base);
        vmm.enable(&ring, true);
        device.double.complete_all();
        settle();
        ring.seen = ring.used_index();
        assert!(ring.seen == seen || ring.seen == 0, "{name}");
        assert_eq!(ring.read(ring.buffer(heads[0]) + 4096, 4), [0xee; 4], "{name}");
        assert_eq!(ring.call(ECHO, 2, 4096).0, 24, "{name}");
    }
}

#[test]
fn new_session_drops_what_was_parked_on_all_rings() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut rings = vmm.boot(&[1, 2]);
    park(&device, &mut rings[0], 8);
    let _ = rings[1].submit(PARK, 1, 4096);
    rings[1].kick();
    device.double.wait_for_parked(9);
    assert_eq!(rings[0].call(INIT, 77, 4096), (24, (24, 0, 77)));
    device.double.complete_all();
    settle();
    assert!(rings[0].poll().is_empty() && rings[1].poll().is_empty());
    assert_eq!(*device.double.sessions.lock().unwrap(), 1);
    assert_eq!(rings[1].call(ECHO, 2, 4096).0, 24);
}

#[test]
fn new_session_between_stop_and_start_drops_what_was_detached() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut rings = vmm.boot(&[1, 2]);
    park(&device, &mut rings[0], 4);
    let base = vmm.frontend.get_vring_base(1).unwrap();
    assert_eq!(rings[1].call(INIT, 77, 4096).0, 24);
    vmm.set_up(&rings[0], base as u16);
    vmm.enable(&rings[0], true);
    device.double.complete_all();
    settle();
    assert!(rings[0].poll().is_empty());
    assert_eq!(rings[0].call(ECHO, 2, 4096).0, 24);
}

#[test]
fn init_among_others_is_served_after_those_before_it() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    let opcodes = [ECHO, INIT, ECHO, PARK, INIT, INIT, ECHO];
    let heads: Vec<_> = opcodes.iter().map(|opcode| ring.submit(*opcode, 1, 4096)).collect();
    ring.kick();
    let used = ring.wait(6);
    let wanted: Vec<_> = heads.iter().enumerate().filter(|(n, _)| *n != 3).map(|(_, h)| (u32::from(*h), 24)).collect();
    assert_eq!(used, wanted);
    device.double.complete_all();
    settle();
    assert!(ring.poll().is_empty());
}

#[test]
fn disabled_ring_holds_completions_until_it_is_enabled() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    let heads = park(&device, &mut ring, 30);
    vmm.frontend.set_vring_enable(1, false).unwrap();
    let queued = ring.submit(ECHO, 9, 4096);
    ring.kick();
    device.double.complete_all();
    settle();
    assert!(ring.poll().is_empty());
    let _ = ring.call.read();
    vmm.frontend.set_vring_enable(1, true).unwrap();
    let mut used = ring.wait(31);
    assert!(used.contains(&(u32::from(queued), 24)));
    used.retain(|entry| entry.0 != u32::from(queued));
    used.sort_unstable();
    assert_eq!(used, heads.iter().map(|head| (u32::from(*head), 24)).collect::<Vec<_>>());
    until("the guest is interrupted", || ring.call.read().is_ok());
}

/// User-Mode Linux and alioth never send GET_VRING_BASE.
#[test]
fn disabled_ring_that_is_set_up_elsewhere_starts_anew() {
    for letters in ["CNBAKE", "KCNBAE", "NABKCE", "ANBKE"] {
        let device = Device::start();
        let mut vmm = device.connect();
        let mut ring = vmm.boot(&[1]).remove(0);
        for _ in 0..5 {
            assert_eq!(ring.call(ECHO, 1, 4096).0, 24);
        }
        park(&device, &mut ring, 8);
        vmm.frontend.set_vring_enable(1, false).unwrap();
        let mut fresh = vmm.driver(1, 128);
        letters.chars().for_each(|letter| tell(&mut vmm, &fresh, letter));
        device.double.complete_all();
        settle();
        assert!(fresh.poll().is_empty(), "{letters}: what was parked came back");
        assert_eq!(fresh.call(ECHO, 2, 4096).0, 24, "{letters}");
        park(&device, &mut fresh, 3);
        device.double.complete_all();
        assert_eq!(fresh.wait(3).len(), 3, "{letters}");
    }
}

#[test]
fn disabled_ring_that_is_set_up_as_it_was_goes_on() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    let heads = park(&device, &mut ring, 8);
    vmm.frontend.set_vring_enable(1, false).unwrap();
    vmm.frontend.set_vring_num(1, ring.size).unwrap();
    tell(&mut vmm, &ring, 'A');
    vmm.frontend.set_vring_base(1, 8).unwrap();
    vmm.frontend.set_vring_enable(1, true).unwrap();
    device.double.complete_all();
    let mut used = ring.wait(8);
    used.sort_unstable();
    assert_eq!(used, heads.iter().map(|head| (u32::from(*head), 24)).collect::<Vec<_>>());
}

#[test]
fn reset_drops_what_was_parked_and_the_memory_table_stays() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    park(&device, &mut ring, 8);
    vmm.frontend.reset_device().unwrap();
    device.double.complete_all();
    settle();
    assert!(ring.poll().is_empty());
    for features in [FEATURES, FEATURES & !PROTOCOL] {
        vmm.frontend.set_features(features).unwrap();
        let mut fresh = vmm.driver(1, 128);
        vmm.set_up(&fresh, 0);
        if features & PROTOCOL != 0 {
            vmm.enable(&fresh, true);
        }
        assert_eq!(fresh.call(ECHO, 2, 4096).0, 24, "{features:#x}");
        vmm.frontend.reset_device().unwrap();
    }
}

#[test]
fn parked_reply_goes_through_the_table_of_its_completion() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    let heads = park(&device, &mut ring, 2);
    // The buffers' half of memory goes away; the rings stay.
    let whole = vmm.region();
    let half = |start: u64| {
        let mut part = whole;
        part.guest_phys_addr += start;
        part.userspace_addr += start;
        part.mmap_offset += start;
        part.memory_size = MEMORY / 2;
        part
    };
    vmm.frontend.set_mem_table(&[half(0)]).unwrap();
    let parked = std::mem::take(&mut *device.double.parked.lock().unwrap());
    let mut parked = parked.into_iter();
    drop(parked.next());
    assert_eq!(ring.wait(1), [(u32::from(heads[0]), 0)], "no header fits where nothing is mapped");
    vmm.frontend.add_mem_region(&half(MEMORY / 2)).unwrap();
    drop(parked.next());
    assert_eq!(ring.wait(1), [(u32::from(heads[1]), 16)]);
    assert_eq!(ring.reply(heads[1]), (16, -libc::EIO, 101));
    // The rings' half goes away and comes back.
    let head = park(&device, &mut ring, 1)[0];
    vmm.frontend.remove_mem_region(&half(0)).unwrap();
    ring.submit(ECHO, 3, 4096);
    ring.kick();
    settle();
    assert!(ring.poll().is_empty());
    device.double.complete_all();
    vmm.frontend.add_mem_region(&half(0)).unwrap();
    let mut used = ring.wait(2);
    used.sort_unstable();
    assert_eq!(used, [(u32::from(head), 24), (u32::from(head) + 2, 24)], "the ring is looked at again");
    vmm.frontend.set_mem_table(&[whole]).unwrap();
    assert_eq!(ring.call(ECHO, 4, 4096).0, 24);
}

#[test]
fn kick_that_is_replaced_while_the_ring_runs_is_listened_to() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    ring.call(ECHO, 1, 4096);
    let old = std::mem::replace(&mut ring.kick, vmm.driver(2, 64).kick);
    vmm.frontend.set_vring_kick(1, &ring.kick).unwrap();
    assert_eq!(ring.call(ECHO, 2, 4096).0, 24);
    old.write(1).unwrap();
    settle();
    let kicks = device.metrics.queues[1].kicks.get();
    settle();
    assert_eq!(device.metrics.queues[1].kicks.get(), kicks, "the old event is not watched");
    assert_eq!(ring.call(ECHO, 3, 4096).0, 24);
}

/// A message that fences ring 1.
type Fence = fn(&mut Vmm, &mut Driver);

const FENCES: [(&str, Fence); 5] = [
    ("ENABLE 0", |vmm, _| vmm.frontend.set_vring_enable(1, false).unwrap()),
    ("GET_VRING_BASE", |vmm, _| assert_eq!(vmm.frontend.get_vring_base(1).unwrap(), 2)),
    ("RESET_DEVICE", |vmm, _| vmm.frontend.reset_device().unwrap()),
    ("memory table", |vmm, _| vmm.share_memory()),
    ("INIT on another ring", |_, other| assert_eq!(other.call(INIT, 9, 4096).0, 24)),
];

#[test]
fn fence_waits_for_a_copy_under_way_and_for_no_parked_request() {
    for (name, fence) in FENCES {
        let device = Device::start();
        let mut vmm = device.connect();
        let mut rings = vmm.boot(&[1, 2]);
        let (mut other, mut ring) = (rings.pop().unwrap(), rings.pop().unwrap());
        let heads = park(&device, &mut ring, 2);
        let (_, slot) = device.double.parked.lock().unwrap().remove(0);
        let (copying, began) = std::sync::mpsc::channel();
        let (go_on, may_go_on) = std::sync::mpsc::channel();
        let completer = std::thread::spawn(move || {
            slot.send_data(100, move |sink| {
                copying.send(()).unwrap();
                may_go_on.recv().unwrap();
                sink.put_bytes(b"complete").map(|()| 8).map_err(|_| rustix::io::Errno::IO)
            });
        });
        began.recv().unwrap();
        let fencing = std::thread::spawn(move || {
            fence(&mut vmm, &mut other);
            (vmm, other)
        });
        settle();
        assert!(!fencing.is_finished(), "{name} is answered while a reply is being copied");
        go_on.send(()).unwrap();
        completer.join().unwrap();
        // The other request stays parked all the time.
        let _vmm = fencing.join().unwrap();
        assert_eq!(ring.wait(1), [(u32::from(heads[0]), 24)], "{name}");
    }
}

#[test]
fn nothing_is_written_after_a_fence_while_completions_race_with_it() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    for round in 0..60 {
        let heads = park(&device, &mut ring, 24);
        let completer = std::thread::spawn({
            let double = std::sync::Arc::clone(&device.double);
            move || double.complete_all()
        });
        if round % 3 == 0 {
            std::thread::yield_now();
        }
        vmm.frontend.set_vring_enable(1, false).unwrap();
        let base = vmm.frontend.get_vring_base(1).unwrap();
        let image: Vec<_> = heads.iter().map(|head| ring.read(ring.buffer(*head) + 4096, 24)).collect();
        let index = ring.used_index();
        completer.join().unwrap();
        assert_eq!(ring.used_index(), index);
        for (head, before) in heads.iter().zip(image) {
            assert_eq!(ring.read(ring.buffer(*head) + 4096, 24), before);
        }
        vmm.set_up(&ring, base as u16);
        vmm.enable(&ring, true);
        expect_complete(&mut ring, &heads);
    }
}

#[test]
fn memory_table_is_swapped_under_load_and_every_reply_is_right() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    let region = vmm.region();
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        let guest_done = std::sync::Arc::clone(&done);
        scope.spawn(move || {
            for round in 0..2000 {
                let heads: Vec<_> = (0..8).map(|n| ring.submit(DATA, round * 8 + n, 8192)).collect();
                ring.kick();
                let used = ring.wait(heads.len());
                assert!(used.iter().all(|entry| entry.1 == 8192), "{used:?}");
            }
            guest_done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            vmm.frontend.set_mem_table(&[region]).unwrap();
        }
    });
}

#[test]
fn guest_memory_that_vanishes_costs_the_connection_not_the_daemon() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut rings = vmm.boot(&[1]);
    assert_eq!(rings[0].call(ECHO, 1, 4096).0, 24);
    rings[0].submit(ECHO, 2, 4096);
    vmm.truncate_memory();
    rings[0].kick();
    until("the ring is given up", || rings[0].err.read().is_ok());
    drop((vmm, rings));
    let mut vmm = device.connect();
    assert_eq!(vmm.boot(&[1]).remove(0).call(ECHO, 1, 4096).0, 24);
}
