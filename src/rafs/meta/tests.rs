//! Chunk information arrays made in the test, whole and damaged.

use zerocopy::FromZeros;

use super::*;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;

fn words<const N: usize>(text: &str) -> [u64; N] {
    let bytes = hex::decode(text.replace(' ', "")).unwrap();
    std::array::from_fn(|word| u64::from_le_bytes(bytes[word * 8..][..8].try_into().unwrap()))
}

fn blob_of(array: &[u8], features: u32, chunks: u32) -> BlobFacts {
    BlobFacts {
        index: 0,
        id: "blob".to_owned(),
        features,
        chunk_count: chunks,
        chunk_bytes: 16 << 20,
        uncompressed_bytes: 1 << 30,
        compressed_bytes: 1 << 30,
        data_bytes: 1 << 29,
        compressor: Compressor::Zstd,
        digester: Digester::Blake3,
        meta: Some(MetaLocation {
            holder: crate::rafs::facts::MetaHolder::Blob,
            offset: 1 << 29,
            compressed_bytes: 20,
            uncompressed_bytes: array.len() as u64,
            compressor: Compressor::Zstd,
        }),
        cipher: None,
        prefetch_bytes: 0,
    }
}

fn file_of(array: &[u8], blob: &BlobFacts) -> Vec<u8> {
    let meta = blob.meta.as_ref().unwrap();
    let mut header = Header::new_zeroed();
    header.magic = HEADER_MAGIC.into();
    header.features = blob.features.into();
    header.compressor = 3.into();
    header.entries = blob.chunk_count.into();
    header.offset = meta.offset.into();
    header.compressed_bytes = meta.compressed_bytes.into();
    header.uncompressed_bytes = meta.uncompressed_bytes.into();
    if blob.features & CONTEXT_FEATURES != 0 {
        let entries = entries_bytes(blob.features, blob.chunk_count);
        header.contexts_offset = entries.into();
        header.contexts_bytes = (array.len() as u64).saturating_sub(entries).into();
        header.contexts = CONTEXTS.into();
    }
    header.magic_again = HEADER_MAGIC.into();
    let mut file = array.to_vec();
    file.resize(array.len().next_multiple_of(4096), 0);
    file.extend_from_slice(header.as_bytes());
    file
}

#[test]
fn entries_of_the_format_description_decode() {
    let rows = [
        ("00000000000000000000000000000000", (0, 1, 0, 1, false)),
        ("0080020000100000 5225000000100000", (163_840, 2, 9554, 2, false)),
        ("00e98a0100f0ffff b336210000f9ffff", (25_878_528, 10_485_760, 2_176_691, 10_485_760, false)),
        ("00d9cb0200f0ffff ceebf10000804708", (46_911_488, 10_485_760, 15_854_542, 33_913, true)),
    ];
    for (text, expected) in rows {
        let [plain, stored] = words(text);
        let c = entry::decode_v1(plain, stored);
        let found = (
            c.uncompressed_offset,
            c.uncompressed_bytes,
            c.compressed_offset,
            c.compressed_bytes,
            c.coding != Coding::Plain,
        );
        assert_eq!(found, expected, "{text}");
    }
    let [plain, stored, data] = words("0200000027230010 c700000000282300 0c173c4d00000000");
    let expected = ChunkFacts {
        compressed_offset: 199,
        compressed_bytes: 9000,
        uncompressed_offset: 8192,
        uncompressed_bytes: 9000,
        coding: Coding::Plain,
        digest: None,
        crc32c: Some(0x4d3c_170c),
    };
    let entry = EntryV2::decode(plain, stored, data);
    assert_eq!(entry.facts, expected);
    assert!(!entry.is_batched() && !entry.is_zran());
    let [plain, stored, data] = words("0600000087130005 ef23000000000000 0300000001000000");
    let entry = EntryV2::decode(plain, stored, data);
    assert!(entry.is_batched() && !entry.is_zran());
    assert_eq!((entry.context, entry.offset, entry.facts.crc32c), (1, 3, None));
    assert_eq!((entry.facts.uncompressed_offset, entry.facts.uncompressed_bytes), (24_576, 5000));
    assert_eq!((entry.facts.compressed_offset, entry.facts.compressed_bytes), (9199, 0));
}

#[test]
fn open_gives_the_entries_of_a_right_file() {
    let array = hex::decode("000000000000000000000000000000000010000000100000 5225000000100000".replace(' ', ""));
    let array = array.unwrap();
    let blob = blob_of(&array, 0, 2);
    let meta = BlobMeta::open(View::from_bytes(file_of(&array, &blob)), &blob).unwrap();
    assert_eq!(meta.count(), 2);
    assert_eq!(meta.chunk(1).unwrap().uncompressed_offset, 4096);
    assert!(matches!(meta.chunk(2), Err(RafsError::Malformed { field: "chunk index", .. })));
}

#[test]
fn open_refuses_what_disagrees_with_the_blob_table() {
    let array = [0; 16];
    let blob = blob_of(&array, 0, 1);
    let good = file_of(&array, &blob);
    assert!(BlobMeta::open(View::from_bytes(good.clone()), &blob).is_ok());
    for offset in [0, 4, 8, 12, 16, 24, 32, 56, 4092] {
        let mut bad = good.clone();
        bad[4096 + offset] ^= 4;
        let outcome = BlobMeta::open(View::from_bytes(bad), &blob);
        assert!(
            matches!(outcome, Err(RafsError::Malformed { .. } | RafsError::Unknown { .. })),
            "{offset}: {outcome:?}"
        );
    }
    let outcome = BlobMeta::open(View::from_bytes(good[..4096].to_vec()), &blob);
    assert!(matches!(outcome, Err(RafsError::Malformed { field: "blob meta size", .. })));
}

#[test]
fn open_refuses_chunks_that_overlap_or_leave_the_blob() {
    let overlapping = [0; 32];
    let blob = blob_of(&overlapping, 0, 2);
    let outcome = BlobMeta::open(View::from_bytes(file_of(&overlapping, &blob)), &blob);
    assert!(matches!(outcome, Err(RafsError::Malformed { field: "CI uncompressed offset", .. })), "{outcome:?}");

    let mut outside = [0; 16];
    outside[8..13].copy_from_slice(&(1u64 << 29).to_le_bytes()[..5]);
    let blob = blob_of(&outside, 0, 1);
    let outcome = BlobMeta::open(View::from_bytes(file_of(&outside, &blob)), &blob);
    assert!(matches!(outcome, Err(RafsError::Malformed { field: "chunk compressed offset", .. })), "{outcome:?}");
}

/// Contexts of the arrays with some.
const CONTEXTS: u32 = 2;

const BATCH: u32 = feature::CHUNK_INFO_V2 | feature::BATCH;
const ZRAN: u32 = feature::CHUNK_INFO_V2 | feature::SEPARATE | feature::ZRAN;

/// An entry of 24 bytes: flags, place and size of the chunk, compressed offset, context and offset in it.
fn entry(flags: u64, plain: (u64, u64), stored_at: u64, (context, offset): (u64, u64)) -> Vec<u8> {
    let words = [plain.0 >> 12 | (plain.1 - 1) << 32 | flags << 56, stored_at, context << 32 | offset];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Two batches, of two chunks and of one; the first one is that of the format description.
fn batches() -> Vec<u8> {
    let mut array = entry(5, (0, 3000), 9000, (0, 0));
    array.extend(entry(5, (4096, 1), 9000, (0, 3000)));
    array.extend(entry(5, (8192, 7), 9199, (1, 0)));
    array.extend(hex::decode(format!("c7000000b90b0000{}", "00".repeat(32))).unwrap());
    array.extend(hex::decode(format!("0700000007000000{}", "00".repeat(32))).unwrap());
    array
}

/// A context of a gzip file: stored and plain range, dictionary, byte and bits.
fn context(stored: (u64, u32), plain: (u64, u32), dictionary: (u64, u32), prime: [u8; 2]) -> Vec<u8> {
    let mut bytes: Vec<u8> = [stored.0, plain.0, dictionary.0].iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend([stored.1, plain.1, dictionary.1].iter().flat_map(|word| word.to_le_bytes()));
    bytes.extend(prime);
    bytes.extend([0; 2]);
    bytes
}

/// Two stretches of a gzip file, the second one with a dictionary of five bytes.
fn stretches() -> Vec<u8> {
    let mut array = entry(3, (0, 3000), 10, (0, 512));
    array.extend(entry(3, (4096, 100), 700, (0, 4096)));
    array.extend(entry(3, (8192, 7), 1500, (1, 9)));
    array.extend(context((10, 1000), (0, 5000), (0, 0), [0, 0]));
    array.extend(context((1010, 500), (5000, 16), (2, 5), [0xa5, 3]));
    array.extend(b"..these");
    array
}

fn open_array(array: &[u8], features: u32) -> Result<BlobMeta, RafsError> {
    let blob = blob_of(array, features, 3);
    BlobMeta::open(View::from_bytes(file_of(array, &blob)), &blob)
}

#[test]
fn chunks_of_a_batch_share_its_stored_bytes() {
    let meta = open_array(&batches(), BATCH).unwrap();
    let rows = [
        (0, 9000, 199, Coding::Batch { plain_bytes: 3001, offset: 0 }),
        (1, 9000, 199, Coding::Batch { plain_bytes: 3001, offset: 3000 }),
        (2, 9199, 7, Coding::Batch { plain_bytes: 7, offset: 0 }),
    ];
    for (chunk, offset, bytes, coding) in rows {
        let facts = meta.chunk(chunk).unwrap();
        assert_eq!((facts.compressed_offset, facts.compressed_bytes, facts.coding), (offset, bytes, coding));
    }
    assert!(matches!(meta.zran(0), Err(RafsError::Malformed { field: "ZRan context", .. })));
}

#[test]
fn chunks_of_a_zran_blob_have_the_range_of_their_context() {
    let meta = open_array(&stretches(), ZRAN).unwrap();
    let rows = [(0, 10, 1000, 0, 512), (1, 10, 1000, 0, 4096), (2, 1010, 500, 1, 9)];
    for (chunk, stored_at, bytes, context, offset) in rows {
        let facts = meta.chunk(chunk).unwrap();
        assert_eq!((facts.compressed_offset, facts.compressed_bytes), (stored_at, bytes));
        assert_eq!(facts.coding, Coding::Zran { context, offset });
    }
    let second = ZranContext { stored: 1010..1510, plain_bytes: 16, prime: (0xa5, 3), dictionary: b"these".to_vec() };
    assert_eq!(meta.zran(1).unwrap(), second);
    assert_eq!(meta.zran(0).unwrap().dictionary, b"");
    assert!(matches!(meta.zran(2), Err(RafsError::Malformed { field: "CI context index", .. })));
}

#[test]
fn contexts_that_break_a_rule_are_refused() {
    const SIZES: usize = 3 * 24;
    const LAST: usize = 3 * 24 + 40;
    let rows: &[(u32, &str, usize, &[u8])] = &[
        (BATCH, "batch context sizes", SIZES, &[0]),
        (BATCH, "batch context sizes", SIZES + 3, &[2]),
        (BATCH, "batch context sizes", SIZES + 7, &[2]),
        // The chunk of 1 byte at 3000 of 3001.
        (BATCH, "CI offset in context", 24 + 16, &[0xb9]),
        (BATCH, "CI offset in context", 24 + 16, &[0xff; 4]),
        (BATCH, "CI context index", 2 * 24 + 20, &[2]),
        (BATCH, "CI context index", 2 * 24 + 20, &[0xff; 4]),
        (BATCH, "CI compressed offset", 24 + 8, &[0]),
        (BATCH, "chunk compressed offset", 2 * 24 + 12, &[1]),
        (BATCH, "CI flags", 7, &[2]),
        (BATCH, "CI flags", 7, &[0xd]),
        (ZRAN, "CI flags", 7, &[5]),
        (ZRAN, "CI flags", 7, &[0x11]),
        (ZRAN, "CI flags", 7, &[0x23]),
        (ZRAN, "CI context index", 20, &[2]),
        (ZRAN, "CI offset in context", 2 * 24 + 16, &[10]),
        (ZRAN, "ZRan context offset", LAST + 7, &[0xff]),
        (ZRAN, "ZRan context offset", LAST, &(1u64 << 29).to_le_bytes()),
        (ZRAN, "ZRan dictionary offset", LAST + 16, &[3]),
        (ZRAN, "ZRan dictionary offset", LAST + 16, &[0xff; 8]),
        (ZRAN, "ZRan context sizes", LAST + 27, &[2]),
        (ZRAN, "ZRan context sizes", LAST + 31, &[2]),
        (ZRAN, "ZRan dictionary size", LAST + 33, &[0x81]),
        (ZRAN, "ZRan context bits", LAST + 37, &[8]),
    ];
    for (features, field, at, bytes) in rows {
        let mut array = if *features == BATCH { batches() } else { stretches() };
        array[*at..*at + bytes.len()].copy_from_slice(bytes);
        match open_array(&array, *features).err() {
            Some(RafsError::Malformed { field: found, .. }) => assert_eq!(found, *field, "{at}"),
            other => panic!("{field} at {at}: {other:?}"),
        }
    }
}

#[test]
fn context_that_no_chunk_uses_is_checked_too() {
    let mut array = stretches();
    array[2 * 24 + 20] = 0;
    assert!(open_array(&array, ZRAN).is_ok());
    array[3 * 24 + 40 + 37] = 8;
    assert!(matches!(open_array(&array, ZRAN), Err(RafsError::Malformed { field: "ZRan context bits", .. })));
}

#[test]
fn header_with_contexts_that_cannot_be_is_refused() {
    let array = stretches();
    let blob = blob_of(&array, ZRAN, 3);
    let good = file_of(&array, &blob);
    let rows = [
        (40, 71, "blob meta header contexts offset"),
        (48, 88, "blob meta header contexts size"),
        (48, 79, "blob meta header contexts"),
        (56, 4, "blob meta header contexts"),
        (56, 3, "blob meta header contexts"),
    ];
    for (at, byte, field) in rows {
        let mut bad = good.clone();
        bad[4096 + at] = byte;
        let outcome = BlobMeta::open(View::from_bytes(bad), &blob).err();
        assert!(matches!(&outcome, Some(RafsError::Malformed { field: found, .. }) if *found == field), "{outcome:?}");
    }
    assert!(open_array(&array[..71], ZRAN).is_err());
    let mut huge = blob_of(&array, ZRAN, 3);
    huge.meta.as_mut().unwrap().uncompressed_bytes = limits::MAX_META_BYTES + 1;
    let outcome = BlobMeta::open(View::from_bytes(vec![]), &huge).err();
    assert!(matches!(outcome, Some(RafsError::Malformed { .. })), "{outcome:?}");
}

#[test]
fn plain_chunk_of_an_encrypted_blob_has_the_length_of_its_ciphertext() {
    for (plain, stored, is_right) in
        [(15u64, 18u64, true), (15, 15, false), (1, 18, true), (16, 16, true), (17, 18, false)]
    {
        let mut array = entry(0x18, (0, plain), stored << 40, (0, 7));
        array.extend(entry(0x19, (4096, 100), 18 << 40, (0, 7)));
        array.extend(entry(0x19, (8192, 100), 500 << 40, (0, 7)));
        let mut blob = blob_of(&array, feature::CHUNK_INFO_V2 | feature::ENCRYPTED, 3);
        blob.cipher = Some(crate::rafs::facts::Cipher { key: [7; 32], iv: [8; 16] });
        let outcome = BlobMeta::open(View::from_bytes(file_of(&array, &blob)), &blob);
        assert_eq!(outcome.is_ok(), is_right, "{plain} in {stored}: {outcome:?}");
        if let Ok(meta) = outcome {
            assert!(!format!("{meta:?}").contains("key"), "{meta:?}");
            assert_eq!(meta.chunk(0).unwrap().crc32c, Some(7));
        }
    }
}

/// Whatever is stored, every chunk lies in the blob and in its context, and every context in the gzip file.
fn check_whatever(array: &[u8], features: u32, chunks: u32) {
    let blob = blob_of(array, features, chunks);
    let Ok(meta) = BlobMeta::open(View::from_bytes(file_of(array, &blob)), &blob) else { return };
    for chunk in 0..chunks {
        let facts = meta.chunk(chunk).unwrap();
        assert!(facts.compressed_offset + u64::from(facts.compressed_bytes) <= blob.data_bytes);
        let (offset, plain_bytes) = match facts.coding {
            Coding::Plain | Coding::Compressed => continue,
            Coding::Batch { plain_bytes, offset } => (offset, plain_bytes),
            Coding::Zran { context, offset } => {
                let context = meta.zran(context).unwrap();
                assert_eq!(context.stored.start, facts.compressed_offset);
                assert!(context.dictionary.len() <= 32 << 10 && context.prime.1 <= 7);
                (offset, context.plain_bytes)
            }
        };
        assert!(u64::from(offset) + u64::from(facts.uncompressed_bytes) <= u64::from(plain_bytes));
        assert!(plain_bytes <= limits::MAX_CHUNK_BYTES);
    }
}

proptest::proptest! {
    #[test]
    fn open_of_any_array_gives_chunks_inside_the_blob_or_an_error(
        array in proptest::collection::vec(proptest::prelude::any::<u8>(), 48),
        is_v2 in proptest::prelude::any::<bool>(),
    ) {
        let (features, chunks) = if is_v2 { (feature::CHUNK_INFO_V2, 2) } else { (0, 3) };
        check_whatever(&array, features, chunks);
    }

    #[test]
    fn damaged_contexts_give_chunks_inside_the_blob_or_an_error(
        damage in proptest::collection::vec((0usize..159, proptest::prelude::any::<u8>()), 1..4),
        is_zran in proptest::prelude::any::<bool>(),
    ) {
        let (mut array, features) = if is_zran { (stretches(), ZRAN) } else { (batches(), BATCH) };
        for (at, byte) in damage {
            let at = at % array.len();
            array[at] = byte;
        }
        check_whatever(&array, features, 3);
    }
}
