//! Any bytes as the memory of a guest: descriptor table, rings, requests. The device uses each head once, or stops the
//! ring; it writes into reply areas and the used ring and nowhere else.

use std::ops::Range;
use std::sync::OnceLock;
use std::time::Duration;
use std::time::Instant;

use nydus_vm::device::direct::Direct;
use nydus_vm::device::direct::EventIdx;
use nydus_vm::device::direct::Outcome;
use nydus_vm::device::direct::RingPlace;
use nydus_vm::vfs::Vfs;

use crate::input::Input;
use crate::requests::Record;
use crate::seeds::Seed;
use crate::served::world;

/// Guest memory: two regions that touch, and one apart from them.
const REGIONS: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x4000), (0x10_0000, 0x2000)];
const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where the rest of an input goes.
const BUFFERS: u64 = 0x3000;
/// Where the seeds have their reply area: across the border of two regions.
const REPLIES: u64 = 0x7000;
const REPLIES_BYTES: usize = 0x5000;
/// Indirect tables that are looked at to tell what the device may write.
const TABLES_BYTES: usize = 0x2000;

const LOG_LARGEST_RING: u8 = 7;
const DESCRIPTOR_BYTES: usize = 16;

const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// No request of a warm image takes this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves the ring that `data` describes: logarithm of the size, flags, available index, then that many heads, as many
/// descriptors as the ring has, and the bytes of buffers.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let size = 1u16 << (input.u8() % (LOG_LARGEST_RING + 1));
    let events = if input.u8() & 1 == 0 { EventIdx::Absent } else { EventIdx::Negotiated };
    let avail_index = input.u16();
    let heads = input.bytes(2 * usize::from(avail_index.min(size)));
    let table = input.bytes(DESCRIPTOR_BYTES * usize::from(size));
    let buffers = input.bytes((REPLIES - BUFFERS) as usize);

    let device = device();
    wipe(device);
    device.write(DESCRIPTORS, table);
    device.write(AVAIL + 2, &avail_index.to_le_bytes());
    device.write(AVAIL + 4, heads);
    device.write(BUFFERS, buffers);
    let before = memory(device);
    let place = RingPlace { size, descriptors: DESCRIPTORS, avail: AVAIL, used: USED, events };
    let ring = device.serve(&place);
    let begun = Instant::now();
    let outcome = loop {
        match ring.outcome() {
            Outcome::Idle { in_flight } if in_flight > 0 => {
                assert!(begun.elapsed() < PATIENCE, "a request was never answered");
                std::thread::sleep(Duration::from_micros(50));
            }
            outcome => break outcome,
        }
    };
    let after = memory(device);
    if let Some(writable) = writable(&before, usize::from(size)) {
        check_writes(&before, &after, &writable);
        let used = u16::from_le_bytes([after[USED as usize + 2], after[USED as usize + 3]]);
        assert!(used <= avail_index, "used {used} of {avail_index}");
        assert!(outcome == Outcome::Broken || used == avail_index, "used {used} of {avail_index}");
        check_lengths(&after, size, used);
    }
}

fn device() -> &'static Direct<Vfs> {
    static DEVICE: OnceLock<Direct<Vfs>> = OnceLock::new();
    DEVICE.get_or_init(|| Direct::new(world().server(), &REGIONS, world().metrics.clone()))
}

fn wipe(device: &Direct<Vfs>) {
    static ZEROS: [u8; 0x8000] = [0; 0x8000];
    for (start, bytes) in REGIONS {
        device.write(start, &ZEROS[..bytes]);
    }
}

/// All regions, one behind the other.
fn memory(device: &Direct<Vfs>) -> Vec<u8> {
    let mut all = vec![0; REGIONS.iter().map(|(_, bytes)| bytes).sum()];
    let mut at = 0;
    for (start, bytes) in REGIONS {
        device.read(start, &mut all[at..at + bytes]);
        at += bytes;
    }
    all
}

/// Guest addresses as places in [`memory`]; what is outside the regions is left out.
fn places(address: u64, len: u32) -> impl Iterator<Item = Range<usize>> {
    let end = address.saturating_add(len.into());
    let mut base = 0;
    REGIONS.into_iter().filter_map(move |(start, bytes)| {
        let place = base;
        base += bytes;
        let (from, to) = (address.max(start), end.min(start + bytes as u64));
        (from < to).then(|| place + (from - start) as usize..place + (to - start) as usize)
    })
}

/// A superset of what the device may write, besides the used ring. `None` when a reply may change what the device reads
/// later (descriptors, indirect tables, rings), or there is too much to look at: then nothing can be said.
fn writable(memory: &[u8], size: usize) -> Option<Vec<Range<usize>>> {
    let mut spans = Vec::new();
    let mut tables = vec![0..BUFFERS as usize];
    let mut add = |bytes: &[u8], tables: &mut Vec<Range<usize>>| {
        let address = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let len = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
        let flags = u16::from_le_bytes(bytes[12..14].try_into().expect("two bytes"));
        if flags & INDIRECT != 0 {
            tables.extend(places(address, len));
        } else if flags & WRITE != 0 {
            spans.extend(places(address, len));
        }
    };
    for bytes in memory[..size * DESCRIPTOR_BYTES].chunks_exact(DESCRIPTOR_BYTES) {
        add(bytes, &mut tables);
    }
    let indirect = tables.split_off(1);
    if indirect.iter().map(Range::len).sum::<usize>() > TABLES_BYTES {
        return None;
    }
    for table in indirect {
        tables.push(table.clone());
        // Tables need not be aligned, and may go from one region to the next.
        for bytes in memory[table].windows(DESCRIPTOR_BYTES) {
            add(bytes, &mut Vec::new());
        }
    }
    let overlap = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
    (!spans.iter().any(|span| tables.iter().any(|table| overlap(span, table)))).then_some(spans)
}

fn check_writes(before: &[u8], after: &[u8], writable: &[Range<usize>]) {
    let mut expected = before.to_vec();
    for range in writable.iter().chain([&(USED as usize..BUFFERS as usize)]) {
        expected[range.clone()].copy_from_slice(&after[range.clone()]);
    }
    if expected != after {
        let wrong = (0..after.len()).find(|at| expected[*at] != after[*at]);
        panic!("the device wrote where it was not told to, at {wrong:x?}");
    }
}

/// Used lengths are 0, or those of a reply with a header.
fn check_lengths(memory: &[u8], size: u16, used: u16) {
    for position in 0..used.min(size) {
        let at = USED as usize + 4 + 8 * usize::from(position);
        let len = u32::from_le_bytes(memory[at + 4..at + 8].try_into().expect("four bytes"));
        assert!(len == 0 || (16..=64 << 20).contains(&len), "used length {len}");
    }
}

/// The traffic of a guest, each request in a chain of two or three descriptors, or in an indirect table.
pub fn seeds() -> Vec<Seed> {
    let traffic = &world().traffic;
    let batch = |requests: &[Record], kind: Kind| ring_of(&traffic[0], requests, kind);
    let single = traffic.iter().enumerate().flat_map(|(i, record)| {
        let one = std::slice::from_ref(record);
        [("direct", Kind::Direct), ("indirect", Kind::Indirect)]
            .map(|(name, kind)| (format!("{name}-{i:03}"), batch(one, kind)))
    });
    let series =
        traffic.chunks(6).enumerate().map(|(i, requests)| (format!("series-{i:03}"), batch(requests, Kind::Direct)));
    single.chain(series).collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Direct,
    Indirect,
}

/// An input of a ring with INIT and these requests.
fn ring_of(init: &Record, requests: &[Record], kind: Kind) -> Vec<u8> {
    const LOG_SIZE: u8 = 5;
    let (mut table, mut buffers, mut heads) = (Vec::new(), Vec::new(), Vec::new());
    for record in std::iter::once(init).chain(requests) {
        let at = BUFFERS + buffers.len() as u64;
        buffers.extend_from_slice(&record.bytes);
        let (header, body) = (record.bytes.len().min(40) as u32, record.bytes.len().saturating_sub(40) as u32);
        let capacity = record.capacity().min(REPLIES_BYTES) as u32;
        let mut chain = vec![(at, header, 0)];
        if body > 0 {
            chain.push((at + u64::from(header), body, 0));
        }
        if capacity > 0 {
            chain.push((REPLIES, capacity, WRITE));
        }
        let first = if kind == Kind::Direct { (table.len() / DESCRIPTOR_BYTES) as u16 } else { 0 };
        let last = chain.len() - 1;
        let bytes: Vec<u8> = (chain.iter().enumerate())
            .flat_map(|(i, &(address, len, flags))| {
                let (next, more) = if i < last { (first + i as u16 + 1, 1) } else { (0, 0) };
                descriptor(address, len, flags | more, next)
            })
            .collect();
        heads.push((table.len() / DESCRIPTOR_BYTES) as u16);
        match kind {
            Kind::Direct => table.extend(bytes),
            Kind::Indirect => {
                table.extend(descriptor(BUFFERS + buffers.len() as u64, bytes.len() as u32, INDIRECT, 0));
                buffers.extend(bytes);
            }
        }
    }
    table.resize(DESCRIPTOR_BYTES << LOG_SIZE, 0);
    let count = heads.len() as u16;
    let heads: Vec<u8> = heads.into_iter().flat_map(u16::to_le_bytes).collect();
    [&[LOG_SIZE, 0][..], &count.to_le_bytes(), &heads, &table, &buffers].concat()
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}
