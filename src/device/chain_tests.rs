//! Chains and sinks against memory of the test, without a ring.

use std::fs::File;

use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::chain::BrokenTable;
use super::chain::Chain;
use super::chain::Fault;
use super::chain::Span;
use super::chain::SpanReader;
use super::slot::GuestSink;
use super::split::Descriptor;
use crate::sys::guest::GuestMap;
use crate::sys::sink::Sink;
use crate::sys::sink::SinkError;
use crate::sys::view::View;

const TABLE: u64 = 0x1000;

/// Two regions that touch at 0x10000, and one apart.
fn map() -> GuestMap {
    let region = |start: u64, len: u64| {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        (GuestAddress(start), len as usize, Some(FileOffset::new(file, 0)))
    };
    let regions = [region(0x1000, 0xf000), region(0x10000, 0x10000), region(0x40000, 0x1000)];
    let memory = GuestMemoryMmap::from_ranges_with_files(regions).unwrap();
    GuestMap::new(&memory, &GuestMap::default()).unwrap()
}

fn put(map: &GuestMap, table: u64, descriptors: &[(u64, u32, u16, u16)]) {
    for (index, (address, len, flags, next)) in (0u64..).zip(descriptors) {
        let word = u128::from(*address) | u128::from(*len) << 64 | u128::from(*flags) << 96 | u128::from(*next) << 112;
        map.whole(table + 16 * index, 16).unwrap().write(0, &word.to_le_bytes()).unwrap();
    }
}

fn walk(map: &GuestMap, size: u16, head: u16) -> Result<Chain, BrokenTable> {
    let mut chain = Chain::default();
    let table = map.whole(TABLE, usize::from(size) * 16).unwrap();
    chain.walk(map, &table, size, head).map(|()| chain)
}

const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;

#[test]
fn touching_descriptors_become_one_span_and_others_do_not() {
    let map = map();
    let descriptors = [
        (0x2000, 40, NEXT, 1),
        (0x2028, 8, NEXT, 2),
        (0x3000, 16, NEXT | WRITE, 3),
        (0x4000, 4096, NEXT | WRITE, 4),
        (0x5000, 4096, NEXT | WRITE, 5),
        (0x9000, 4096, WRITE, 0),
    ];
    put(&map, TABLE, &descriptors);
    let chain = walk(&map, 8, 0).unwrap();
    assert_eq!(chain.readable.as_slice(), [Span { address: 0x2000, len: 48 }]);
    let wanted = [(0x3000, 16), (0x4000, 8192), (0x9000, 4096)].map(|(address, len)| Span { address, len });
    assert_eq!(chain.writable.as_slice(), wanted);
    assert_eq!((chain.readable_bytes, chain.writable_bytes, chain.fault), (48, 12304, None));
}

#[test]
fn indirect_table_across_two_regions_is_read() {
    let map = map();
    put(&map, TABLE, &[(0xfff0, 32, INDIRECT, 0)]);
    put(&map, 0xfff0, &[(0x2000, 40, NEXT, 1), (0x3000, 16, WRITE, 0)]);
    let chain = walk(&map, 8, 0).unwrap();
    assert_eq!((chain.readable_bytes, chain.writable_bytes, chain.fault), (40, 16, None));
}

#[test]
fn chain_of_the_whole_table_is_legal_and_one_more_is_a_loop() {
    let map = map();
    let chain: Vec<_> = (0..8u16).map(|i| (0x2000, 1, if i == 7 { 0 } else { NEXT }, i + 1)).collect();
    put(&map, TABLE, &chain);
    assert_eq!(walk(&map, 8, 0).unwrap().readable_bytes, 8);
    put(&map, TABLE + 16 * 7, &[(0x2000, 1, NEXT, 0)]);
    assert_eq!(walk(&map, 8, 3).unwrap_err(), BrokenTable::Loop(3));
    assert_eq!(walk(&map, 8, 8).unwrap_err(), BrokenTable::OutOfRange(8));
    put(&map, TABLE, &[(0x2000, 1, NEXT, 8)]);
    assert_eq!(walk(&map, 8, 0).unwrap_err(), BrokenTable::OutOfRange(8));
}

#[test]
fn fault_is_the_first_thing_wrong() {
    let map = map();
    put(&map, TABLE, &[(0x2000, 16, NEXT | WRITE, 1), (0x2000, 40, NEXT, 2), (u64::MAX, 40, 0, 0)]);
    assert_eq!(walk(&map, 8, 0).unwrap().fault, Some(Fault::Misordered));
}

#[test]
fn sink_fills_spans_in_order_across_regions() {
    let map = map();
    let spans = [(0x3000, 5), (0xfffe, 6), (0x40000, 4)].map(|(address, len)| Span { address, len });
    let mut sink = GuestSink::new(&map, &spans, 15);
    sink.put_bytes(b"abc").unwrap();
    sink.put_view(&View::from_bytes(b"..defghi..".to_vec()), 2, 6).unwrap();
    sink.put_zeros(2).unwrap();
    assert_eq!(sink.room(), 4);
    assert_eq!(sink.put_bytes(b"12345"), Err(SinkError::Full { room: 4, wanted: 5 }));
    sink.put_bytes(b"1234").unwrap();
    assert_eq!((sink.room(), sink.put_so_far()), (0, 15));
    let mut out = [0; 15];
    SpanReader::new(&map, &spans).read(&mut out).unwrap();
    assert_eq!(&out, b"abcdefghi\0\x001234");
}

#[test]
fn sink_says_when_memory_or_source_are_not_there() {
    let map = map();
    let spans = [(0x3000, 4), (0x30000, 4)].map(|(address, len)| Span { address, len });
    assert_eq!(GuestSink::new(&map, &spans, 8).put_bytes(b"12345"), Err(SinkError::Unmapped));
    let view = View::from_bytes(vec![1; 3]);
    let put = GuestSink::new(&map, &spans, 8).put_view(&view, 0, 4);
    assert!(matches!(put, Err(SinkError::Source(_))), "{put:?}");
}

proptest! {
    #[test]
    fn random_tables_end_within_their_limits(
        descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), 0..40u16), 32),
        low in prop::collection::vec((0x1000..0x20000u64, 0..5000u32, 0..8u16, 0..34u16), 32),
        use_low in any::<bool>(),
        head in 0..40u16,
    ) {
        let map = map();
        put(&map, TABLE, if use_low { &low } else { &descriptors });
        if let Ok(chain) = walk(&map, 32, head) {
            let sum = |spans: &[Span]| spans.iter().map(|span| u64::from(span.len)).sum::<u64>();
            prop_assert_eq!(sum(&chain.readable), chain.readable_bytes);
            prop_assert_eq!(sum(&chain.writable), chain.writable_bytes);
            prop_assert!(chain.readable_bytes + chain.writable_bytes <= crate::limits::MAX_CHAIN_BYTES);
        }
    }
}
