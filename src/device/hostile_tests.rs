//! A guest that means harm: every chain is answered, or its queue alone stops.

use proptest::prelude::*;
use vhost::VhostBackend;

use super::rig::*;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Behind the guest's memory.
const NOWHERE: u64 = MEMORY + (1 << 30);

const fn raw(address: u64, len: u32, flags: u16, next: u16) -> Raw {
    Raw { address, len, flags, next }
}

/// Places of a request and a reply.
const REQUEST: u64 = BUFFERS;
const REPLY: u64 = BUFFERS + 4096;
const TABLE: u64 = BUFFERS + 65536;

/// Offers the chain at descriptor 0 and returns its used length and the start of the reply area.
fn answer(ring: &mut Driver) -> (u32, (u32, i32, u64)) {
    ring.write(REPLY, &[0xee; 64]);
    ring.offer(0);
    ring.kick();
    let used = ring.wait(1);
    assert_eq!(used[0].0, 0);
    (used[0].1, parse(&ring.read(REPLY, 16)))
}

const IO: i32 = -libc::EIO;
const UNIQUE: u64 = 42;
const GOOD: [Raw; 2] = [raw(REQUEST, 40, NEXT, 1), raw(REPLY, 4096, WRITE, 0)];

/// A chain and what becomes of it.
struct Case {
    name: &'static str,
    /// From descriptor 0 of the ring.
    direct: Vec<Raw>,
    /// From the start of [`TABLE`].
    table: Vec<Raw>,
    /// Used length, which the reply's header repeats.
    len: u32,
    /// Error and id in the reply; `None`: the reply area is not touched.
    reply: Option<(i32, u64)>,
}

/// A chain without an indirect table, answered EIO with `unique`, or not at all.
fn direct(name: &'static str, direct: &[Raw], unique: Option<u64>) -> Case {
    let reply = unique.map(|unique| (IO, unique));
    Case { name, direct: direct.to_vec(), table: Vec::new(), len: if unique.is_some() { 16 } else { 0 }, reply }
}

/// A chain that is an indirect table of `len` bytes, answered EIO, or not at all.
fn indirect(name: &'static str, len: u32, table: &[Raw], unique: Option<u64>) -> Case {
    Case { table: table.to_vec(), ..direct(name, &[raw(TABLE, len, INDIRECT, 0)], unique) }
}

fn malformed_direct_chains() -> Vec<Case> {
    let request = raw(REQUEST, 40, NEXT, 1);
    let reply = |flags, next| raw(REPLY, 64, WRITE | flags, next);
    vec![
        direct("reply area nowhere", &[request, raw(NOWHERE, 4096, WRITE, 0)], None),
        direct("request nowhere", &[raw(NOWHERE, 40, NEXT, 1), reply(0, 0)], Some(0)),
        direct("arguments nowhere", &[request, raw(NOWHERE, 9, NEXT, 2), reply(0, 0)], Some(UNIQUE)),
        direct("no reply area", &[raw(REQUEST, 40, 0, 0)], None),
        direct("reply area of 8 bytes", &[request, raw(REPLY, 8, WRITE, 0)], None),
        direct("no request", &[reply(0, 0)], Some(0)),
        direct("empty request", &[raw(REQUEST, 0, NEXT, 1), reply(0, 0)], Some(0)),
        direct("reply before request", &[reply(NEXT, 1), raw(REQUEST, 40, 0, 0)], Some(UNIQUE)),
        direct("too many bytes", &[request, reply(NEXT, 2), raw(REPLY, u32::MAX, WRITE, 0)], Some(UNIQUE)),
        direct("beyond all addresses", &[request, reply(NEXT, 2), raw(u64::MAX - 8, 64, WRITE, 0)], Some(UNIQUE)),
    ]
}

fn indirect_chains() -> Vec<Case> {
    let request = raw(REQUEST, 40, NEXT, 1);
    let reply_and = |next| raw(REPLY, 64, WRITE | NEXT, next);
    let good = |name| Case { len: 24, reply: Some((0, UNIQUE)), ..indirect(name, 32, &GOOD, None) };
    vec![
        good("indirect"),
        Case {
            direct: vec![request, raw(TABLE, 16, INDIRECT, 0)],
            table: vec![raw(REPLY, 4096, WRITE, 0)],
            ..good("direct, then indirect")
        },
        Case {
            direct: vec![raw(TABLE, 32, INDIRECT | NEXT, 1)],
            ..indirect("indirect and next", 32, &GOOD, Some(UNIQUE))
        },
        Case { direct: vec![raw(NOWHERE, 32, INDIRECT, 0)], ..indirect("indirect nowhere", 32, &GOOD, None) },
        indirect("indirect of odd size", 33, &GOOD, None),
        indirect("indirect of no size", 0, &[], None),
        indirect("nested indirect", 48, &[request, reply_and(2), raw(TABLE, 16, INDIRECT, 0)], Some(UNIQUE)),
        indirect("indirect that leads out of its table", 32, &[request, reply_and(9)], Some(UNIQUE)),
        indirect("indirect loop", 32, &[request, reply_and(1)], Some(UNIQUE)),
    ]
}

#[test]
fn malformed_chain_is_answered_and_the_next_one_served() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut ring = vmm.boot(&[1]).remove(0);
    ring.write(REQUEST, &request(ECHO, UNIQUE, &[]));
    for case in malformed_direct_chains().into_iter().chain(indirect_chains()) {
        let name = case.name;
        case.direct.iter().enumerate().for_each(|(index, d)| ring.put(index as u16, *d));
        case.table.iter().enumerate().for_each(|(index, d)| ring.write_descriptor(TABLE, index as u16, *d));
        let (used, (reply_len, error, unique)) = answer(&mut ring);
        assert_eq!(used, case.len, "{name}");
        match case.reply {
            Some(wanted) => assert_eq!((reply_len, (error, unique)), (case.len, wanted), "{name}"),
            None => assert_eq!(reply_len, 0xeeee_eeee, "{name}: the reply area is untouched"),
        }
        GOOD.iter().enumerate().for_each(|(index, d)| ring.put(index as u16, *d));
        assert_eq!(answer(&mut ring), (24, (24, 0, UNIQUE)), "after {name}");
    }
    assert!(device.metrics.queues[1].malformed.get() > 8);
    assert_eq!(device.metrics.queues[1].broken.get(), 0);
}

#[test]
fn chain_of_many_descriptors_is_answered() {
    let device = Device::start();
    let mut vmm = device.connect();
    vmm.negotiate(FEATURES);
    vmm.share_memory();
    let mut ring = vmm.start_ring(1, 4096);
    ring.write(REQUEST, &request(ECHO, 42, &[]));
    for (count, wanted) in [(1023, (24, 0)), (1024, (16, -libc::EIO)), (4095, (16, -libc::EIO))] {
        ring.put(0, raw(REQUEST, 40, NEXT, 1));
        for index in 1..=count {
            let flags = if index == count { WRITE } else { WRITE | NEXT };
            ring.put(index, raw(REPLY + 32 * u64::from(index - 1), 16, flags, index + 1));
        }
        let (used, (_, error, _)) = answer(&mut ring);
        assert_eq!((used, error), wanted, "{count}");
    }
}

#[test]
fn broken_ring_stops_alone_says_so_and_works_again_after_a_restart() {
    type Break = fn(&mut Driver);
    let cases: [(&str, Break); 7] = [
        ("head beyond the table", |ring| ring.offer(60000)),
        ("head of the table's size", |ring| ring.offer(64)),
        ("available index far ahead", |ring| ring.show(ring.avail.wrapping_add(5000))),
        ("available index one too far", |ring| ring.show(ring.avail.wrapping_add(65))),
        ("looping chain", |ring| {
            ring.put(0, raw(REQUEST, 40, NEXT, 1));
            ring.put(1, raw(REPLY, 64, WRITE | NEXT, 0));
            ring.offer(0);
        }),
        ("chain that leads out of the table", |ring| {
            ring.put(0, raw(REQUEST, 40, NEXT, 64));
            ring.offer(0);
        }),
        ("a head offered again and again", |ring| {
            ring.write(REQUEST, &request(PARK, 1, &[]));
            ring.put(0, raw(REQUEST, 40, NEXT, 1));
            ring.put(1, raw(REPLY, 64, WRITE, 0));
            for _ in 0..64 {
                ring.offer(0);
            }
        }),
    ];
    let device = Device::start();
    let mut vmm = device.connect();
    let mut rings = vmm.boot(&[1, 2]);
    let (mut other, mut ring) = (rings.pop().unwrap(), rings.pop().unwrap());
    for (count, (name, break_it)) in (1..).zip(cases) {
        assert_eq!(ring.call(ECHO, 1, 64).0, 24, "before {name}");
        let parked = ring.submit(PARK, 1, 4096);
        ring.kick();
        device.double.wait_for_parked(1);
        break_it(&mut ring);
        ring.kick();
        until(name, || ring.err.read().is_ok());
        assert_eq!(device.metrics.queues[1].broken.get(), count, "{name}");
        let before = ring.used_index();
        device.double.complete_all();
        ring.kick();
        assert_eq!(other.call(ECHO, 2, 64).0, 24, "beside {name}");
        assert_eq!(ring.used_index(), before, "{name}: nothing more is written");
        assert_eq!(ring.read(ring.buffer(parked) + 4096, 4), [0xee; 4], "{name}");
        vmm.frontend.get_vring_base(1).unwrap();
        ring = vmm.start_ring(1, 64);
    }
}

#[test]
fn ring_of_a_bad_size_stops_alone() {
    let device = Device::start();
    let mut vmm = device.connect();
    let mut other = vmm.boot(&[2]).remove(0);
    let ring = vmm.driver(1, 64);
    vmm.set_up(&ring, 0);
    vmm.frontend.get_vring_base(1).unwrap();
    vmm.set_up(&ring, 0);
    vmm.frontend.get_vring_base(1).unwrap();
    let mut bad = ring;
    bad.size = 100;
    vmm.set_up(&bad, 0);
    vmm.enable(&bad, true);
    bad.kick();
    until("the ring is given up", || bad.err.read().is_ok());
    assert_eq!(other.call(ECHO, 1, 64).0, 24);
    vmm.frontend.get_vring_base(1).unwrap();
    let mut ring = vmm.start_ring(1, 64);
    assert_eq!(ring.call(ECHO, 1, 64).0, 24);
}

/// A descriptor that is often nearly right.
fn any_descriptor() -> impl Strategy<Value = Raw> {
    let address = prop_oneof![
        4 => (0..64u64).prop_map(|n| BUFFERS + n * 512),
        1 => Just(NOWHERE),
        1 => Just(MEMORY - 16),
        1 => Just(TABLE),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => Just(40u32), 4 => 0..200u32, 2 => (0..40u32).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![6 => 0..4u16, 2 => 4..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..16u16, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| raw(address, len, flags, next))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_tables_are_answered_or_stop_their_queue(
        tables in prop::collection::vec(
            (
                prop::collection::vec(any_descriptor(), 16),
                prop::collection::vec(any_descriptor(), 16),
                prop::collection::vec(prop_oneof![9 => 0..16u16, 1 => any::<u16>()], 1..12),
                prop::collection::vec(any::<u8>(), 0..200),
            ),
            1..6,
        )
    ) {
        let device = Device::start();
        let mut vmm = device.connect();
        let mut rings = vmm.boot(&[1, 2]);
        let (mut other, mut ring) = (rings.pop().unwrap(), rings.pop().unwrap());
        for (direct, table, heads, bytes) in tables {
            direct.iter().enumerate().for_each(|(index, d)| ring.put(index as u16, *d));
            table.iter().enumerate().for_each(|(index, d)| ring.write_descriptor(TABLE, index as u16, *d));
            let opcode = [ECHO, DATA, DROP, FORGET, INIT][bytes.len() % 5];
            ring.write(BUFFERS, &request(opcode, 1, &bytes));
            let wanted = ring.used_index().wrapping_add(heads.len() as u16);
            heads.iter().for_each(|head| ring.offer(*head));
            ring.kick();
            let mut broken = false;
            until("all are answered, or the queue stopped", || {
                broken = broken || ring.err.read().is_ok();
                broken || ring.used_index() == wanted
            });
            prop_assert_eq!(other.call(ECHO, 2, 64).0, 24);
            if broken {
                vmm.frontend.get_vring_base(1).unwrap();
                ring = vmm.start_ring(1, 64);
            }
        }
    }
}
