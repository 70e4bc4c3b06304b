//! Rings, descriptors and control messages that are wrong: a ring stops at most itself, a connection ends at most itself.

use nydus_vm::testing::driver::Chains;
use nydus_vm::testing::driver::Descriptor;
use nydus_vm::testing::driver::INDIRECT;
use nydus_vm::testing::driver::NEXT;
use nydus_vm::testing::driver::WRITE;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::vmm::Ack;
use nydus_vm::testing::vmm::Control;
use nydus_vm::testing::vmm::PATIENCE;
use nydus_vm::testing::vmm::RingAddresses;
use nydus_vm::testing::vmm::feature;
use nydus_vm::testing::vmm::message;

use crate::rogue::Case;
use crate::rogue::NOWHERE;
use crate::rogue::Rogue;
use crate::rogue::any;
use crate::rogue::run;
use crate::rogue::stopped;
use crate::support::Demo;
use crate::support::SMALL;

fn getattr_chain(rogue: &Rogue) -> [Descriptor; 2] {
    let request = rogue.write(&Request::getattr(1));
    [
        Descriptor { address: request.address, len: request.len, flags: NEXT, next: 1 },
        Descriptor { address: rogue.reply, len: 120, flags: WRITE, next: 0 },
    ]
}

/// Wrong in the ring or the descriptors.
const RINGS: &[Case] = &[
    (
        "head beyond the ring",
        |r| {
            r.guest.lane(1).queue().offer(60000, 0);
            r.guest.lane(1).publish().unwrap();
            r.outcome(r.reply)
        },
        stopped,
    ),
    (
        "available index 5000 ahead",
        |r| {
            r.guest.lane(1).queue().force_available_index(5000).unwrap();
            r.outcome(r.reply)
        },
        stopped,
    ),
    (
        "chain that loops",
        |r| {
            let [request, mut reply] = getattr_chain(r);
            (reply.flags, reply.next) = (WRITE | NEXT, 0);
            r.send_raw(&[request, reply])
        },
        any,
    ),
    (
        "descriptor that follows itself",
        |r| {
            let [mut request, reply] = getattr_chain(r);
            request.next = 0;
            r.send_raw(&[request, reply])
        },
        any,
    ),
    (
        "chain that leaves the ring",
        |r| {
            let [mut request, reply] = getattr_chain(r);
            request.next = 60000;
            r.send_raw(&[request, reply])
        },
        any,
    ),
    (
        "writable before readable",
        |r| {
            let [request, reply] = getattr_chain(r);
            let first = Descriptor { flags: WRITE | NEXT, next: 1, ..reply };
            r.send_raw(&[first, Descriptor { flags: 0, ..request }])
        },
        any,
    ),
    (
        "table in a table",
        |r| {
            let nested = Descriptor { address: r.table + 4096, len: 32, flags: INDIRECT, next: 0 };
            r.send_table(&[nested], 16, 0)
        },
        any,
    ),
    (
        "table of no bytes",
        |r| {
            let chain = getattr_chain(r);
            r.send_table(&chain, 0, 0)
        },
        any,
    ),
    (
        "table of 20 bytes",
        |r| {
            let chain = getattr_chain(r);
            r.send_table(&chain, 20, 0)
        },
        any,
    ),
    (
        "table of 4 GiB",
        |r| {
            let chain = getattr_chain(r);
            r.send_table(&chain, !15, 0)
        },
        any,
    ),
    (
        "table that goes on in the ring",
        |r| {
            let chain = getattr_chain(r);
            r.send_table(&chain, 32, NEXT)
        },
        any,
    ),
    (
        "table that the device should write",
        |r| {
            let chain = getattr_chain(r);
            r.send_table(&chain, 32, WRITE)
        },
        any,
    ),
    (
        "table that loops",
        |r| {
            let [request, mut reply] = getattr_chain(r);
            (reply.flags, reply.next) = (WRITE | NEXT, 1);
            r.send_table(&[request, reply], 32, 0)
        },
        any,
    ),
    (
        "table at an unmapped address",
        |r| r.send_raw(&[Descriptor { address: NOWHERE, len: 32, flags: INDIRECT, next: 0 }]),
        any,
    ),
    (
        "table of 4000 entries",
        |r| {
            let request = r.write(&Request::getattr(1));
            let mut entries = vec![Descriptor { address: request.address, len: request.len, flags: NEXT, next: 1 }];
            let reply =
                |n: u16| Descriptor { address: r.reply + u64::from(n) - 1, len: 1, flags: WRITE | NEXT, next: n + 1 };
            entries.extend((1..4000).map(reply));
            entries.push(Descriptor { address: r.reply + 4000, len: 1, flags: WRITE, next: 0 });
            r.send_table(&entries, 4001 * 16, 0)
        },
        any,
    ),
];

#[test]
fn bad_rings_stop_at_most_themselves() {
    run(RINGS, Chains::Indirect);
}

#[test]
fn rings_at_addresses_without_memory_do_not_hurt_the_daemon() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let guest = Guest::connect(daemon.socket(), &SMALL).unwrap();
    drop(guest);
    let mut control = Control::connect(daemon.socket()).unwrap();
    control.ask_u64(message::GET_FEATURES).unwrap();
    control.set_protocol_features(feature::P_REPLY_ACK, Ack::No).unwrap();
    let at = RingAddresses { descriptors: 1 << 50, available: 1 << 51, used: 1 << 52 };
    let refused = control.ring_addresses(1, &at, Ack::Wanted);
    assert!(refused.is_err());
    drop(control);
    let mut guest = Guest::boot(daemon.socket(), &SMALL).unwrap();
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
}

#[test]
fn garbage_on_the_control_socket_ends_that_connection_only() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let messages: [&[u8]; 5] = [
        &[0xff; 64],
        &[0; 12],
        // GET_FEATURES that claims 4 GiB of payload.
        &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        // SET_MEM_TABLE of 2^32 - 1 regions, without descriptors.
        &[5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        // SET_VRING_NUM of ring 2^32 - 1.
        &[8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 1, 0, 0],
    ];
    for bytes in messages {
        let control = Control::connect(daemon.socket()).unwrap();
        control.send_raw(bytes, &[]).unwrap();
        drop(control);
    }
    let mut guest = Guest::boot(daemon.socket(), &SMALL).unwrap();
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
}

/// Drop of a guest's caches: forgets in bursts on hiprio, which must not disturb the request queue.
#[test]
fn storm_of_forgets_is_used_up_to_the_last() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions { depth: 64, ring_size: 256, ..SMALL }).unwrap();
    for turn in 0..200u64 {
        let lane = guest.lane(0);
        let mut flying = 0;
        while lane.room() > 0 {
            lane.submit(&Request::forget(turn * 64 + flying, u64::MAX)).unwrap();
            flying += 1;
        }
        lane.publish().unwrap();
        for _ in 0..flying {
            let done = lane.wait(PATIENCE).unwrap();
            lane.release(done);
        }
        assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
    }
}
