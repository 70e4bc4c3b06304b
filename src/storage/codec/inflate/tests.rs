//! Contexts at every border of real gzip files, of one member and of many.

use std::io::Write;

use flate2::Compression;
use flate2::GzBuilder;
use proptest::prelude::*;

use super::*;
use crate::testing::deflate::Border;
use crate::testing::deflate::walk;
use crate::testing::make::noise;
use crate::testing::make::text;

fn gzip(plain: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

/// Text and noise in turn, so that there are blocks of all kinds.
fn mixed(seed: &str, len: usize) -> Vec<u8> {
    let mut plain = Vec::new();
    for part in 0.. {
        if plain.len() >= len {
            break;
        }
        let name = format!("{seed}{part}");
        plain.extend(if part % 3 == 2 { noise(&name, 9_000) } else { text(&name, 30_000 + part * 777) });
    }
    plain.truncate(len);
    plain
}

/// The context from `from` to `end`, in bits of `gzip`.
fn context(gzip: &[u8], plain: &[u8], from: Border, end_bit: usize, plain_end: usize) -> (ZranContext, Vec<u8>) {
    let start = from.bit.div_ceil(8);
    let bits = (start * 8 - from.bit) as u8;
    let byte = if bits == 0 { 0 } else { gzip[start - 1] };
    let stored = start..end_bit.div_ceil(8);
    let dictionary = plain[from.plain.saturating_sub(32768)..from.plain].to_vec();
    let bytes = gzip[stored.clone()].to_vec();
    let stored = stored.start as u64..stored.end as u64;
    let plain_bytes = (plain_end - from.plain) as u32;
    (ZranContext { stored, plain_bytes, prime: (byte, bits), dictionary }, bytes)
}

#[track_caller]
fn check(gzip: &[u8], expected: &[u8]) -> std::collections::BTreeSet<u8> {
    let (borders, plain) = walk(gzip);
    assert!(plain == expected, "the walker reads what was written");
    let mut places = std::collections::BTreeSet::new();
    for (number, from) in borders.iter().enumerate() {
        // To the next border, and to the end of the file.
        let next = borders.get(number + 1).map(|to| (to.bit, to.plain));
        for (end_bit, plain_end) in next.into_iter().chain([(gzip.len() * 8, plain.len())]) {
            let (context, stored) = context(gzip, &plain, *from, end_bit, plain_end);
            let whole = &plain[from.plain..plain_end];
            let mut inflation = Inflation::new(&context).unwrap();
            inflation.advance(&stored, whole.len()).unwrap_or_else(|error| panic!("{from:?} to {plain_end}: {error}"));
            assert!(inflation.plain() == whole, "{from:?} to {plain_end}");
            // Step by step, and never further than asked.
            let mut inflation = Inflation::new(&context).unwrap();
            for until in (0..whole.len()).step_by(7919).chain([whole.len()]) {
                inflation.advance(&stored, until).unwrap();
                assert!(inflation.plain() == &whole[..until]);
            }
            assert_eq!(
                inflation.advance(&stored, whole.len() + 1),
                Err(CodecError::Length { expected: whole.len() + 1, actual: whole.len() })
            );
        }
        places.insert((from.bit % 8) as u8);
    }
    places
}

#[test]
fn every_border_of_a_member_is_a_place_to_begin_at() {
    let mut places = std::collections::BTreeSet::new();
    for level in [1, 6, 9] {
        let plain = mixed(&level.to_string(), 1_500_000);
        places.extend(check(&gzip(&plain, level), &plain));
    }
    assert_eq!(places.into_iter().collect::<Vec<_>>(), (0..8).collect::<Vec<_>>(), "in every bit of a byte");
}

#[test]
fn members_follow_each_other_in_a_context() {
    let mut file = Vec::new();
    let mut plain = Vec::new();
    for (number, len) in [70_000, 0, 1, 300, 150_000].into_iter().enumerate() {
        let content = mixed(&number.to_string(), len);
        let builder = match number % 3 {
            0 => GzBuilder::new().filename("a name").comment("and more").mtime(7),
            1 => GzBuilder::new().extra(vec![5; 300]),
            _ => GzBuilder::new(),
        };
        let mut encoder = builder.write(Vec::new(), Compression::new(6));
        encoder.write_all(&content).unwrap();
        file.extend(encoder.finish().unwrap());
        plain.extend(content);
    }
    check(&file, &plain);
}

#[test]
fn stream_with_flush_points_is_decoded_too() {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Compression::new(6));
    let plain = mixed("flush", 200_000);
    for part in plain.chunks(30_000) {
        encoder.write_all(part).unwrap();
        encoder.flush().unwrap();
    }
    check(&encoder.finish().unwrap(), &plain);
}

#[test]
fn header_of_every_kind_is_skipped_and_half_ones_are_not() {
    let header = |flags: u8, rest: &[u8]| [&[9; 8][..], &[0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 3], rest].concat();
    let rows: [(Vec<u8>, usize); 5] = [
        (header(0, b""), 18),
        (header(2, b"cc"), 20),
        (header(4, b"\x03\0xyz"), 23),
        (header(8 | 16, b"name\0comment\0"), 31),
        (header(2 | 4 | 8 | 16, b"\0\0n\0c\0cc"), 26),
    ];
    for (bytes, len) in rows {
        assert_eq!(next_member(&bytes), Some(len));
        let longer = [&bytes[..], b"stream"].concat();
        assert_eq!(next_member(&longer), Some(len));
        for cut in 0..len {
            assert_eq!(next_member(&bytes[..cut]), None, "{len} cut to {cut}");
        }
    }
    let mut wrong = header(0, b"");
    wrong[8] = 0;
    assert_eq!(next_member(&wrong), None);
}

#[test]
fn damage_and_false_contexts_are_errors_and_yield_no_more_than_stated() {
    let plain = mixed("damage", 400_000);
    let file = gzip(&plain, 6);
    let (borders, _) = walk(&file);
    let from = borders[1];
    let (right, stored) = context(&file, &plain, from, file.len() * 8, plain.len());
    let attempt = |context: &ZranContext, stored: &[u8]| {
        let mut inflation = Inflation::new(context)?;
        let outcome = inflation.advance(stored, context.plain_bytes as usize);
        assert!(inflation.plain().len() <= context.plain_bytes as usize);
        outcome.map(|()| inflation.plain().to_vec())
    };
    assert!(attempt(&right, &stored).unwrap() == plain[from.plain..]);
    assert!(attempt(&right, &stored[..stored.len() / 2]).is_err(), "cut");
    assert!(attempt(&right, b"").is_err(), "nothing");
    let bomb = ZranContext { plain_bytes: right.plain_bytes + 1, ..right.clone() };
    assert!(attempt(&bomb, &stored).is_err(), "more stated than there is");
    let less = ZranContext { plain_bytes: 1000, ..right.clone() };
    assert_eq!(attempt(&less, &stored).unwrap(), plain[from.plain..from.plain + 1000], "less stated than there is");
    for bits in [8, 9, 255] {
        let wrong = ZranContext { prime: (0, bits), ..right.clone() };
        assert!(attempt(&wrong, &stored).is_err());
    }
    let no_dictionary = ZranContext { dictionary: Vec::new(), ..right };
    assert!(attempt(&no_dictionary, &stored).ok().is_none_or(|bytes| bytes != plain[from.plain..]));
}

proptest! {
    #[test]
    fn arbitrary_contexts_never_panic(
        stored in proptest::collection::vec(any::<u8>(), 0..400),
        byte in any::<u8>(), bits in 0u8..9, plain_bytes in 0u32..100_000,
        dictionary in proptest::collection::vec(any::<u8>(), 0..100), step in 1usize..50_000,
    ) {
        let context = ZranContext { stored: 0..stored.len() as u64, plain_bytes, prime: (byte, bits), dictionary };
        if let Ok(mut inflation) = Inflation::new(&context) {
            let mut until = 0;
            while until < plain_bytes as usize && inflation.advance(&stored, until).is_ok() {
                until += step;
            }
            prop_assert!(inflation.plain().len() <= plain_bytes as usize);
        }
    }
}
