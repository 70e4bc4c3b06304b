//! Damaged blobs: chunk tables that disagree with the metadata, and chunks that grow (format, sections 5 and 6).

use std::io::Read;

use super::CHUNK_BYTES;
use super::Case;
use super::Specimen;
use super::v6::EXTENDED;
use super::v6::blob_table_at;

const HEADER_BYTES: usize = 4096;
/// What a bomb decodes to.
const BOMB_BYTES: u64 = 512 << 20;

const ENTRY: &[&str] = &[
    "CI uncompressed offset",
    "chunk uncompressed offset",
    "chunk uncompressed size",
    "chunk compressed offset",
    "chunk compressed size",
];

/// Every case.
pub fn cases() -> Vec<Case> {
    let good = Specimen::v6();
    let mut cases = Vec::new();
    let mut add = |name: &str, specimen: Specimen, fields: &'static [&'static str], path: &'static str| {
        cases.push(Case { name: format!("blob: {name}"), specimen, fields, path, spared: &[] });
    };
    headers(&good, &mut add);
    entries(&good, &mut add);
    bombs(&good, &mut add);
    cases
}

type Add<'a> = dyn FnMut(&str, Specimen, &'static [&'static str], &'static str) + 'a;

fn headers(good: &Specimen, add: &mut Add<'_>) {
    let header = good.blob.len() - HEADER_BYTES;
    for (name, at, field) in [
        ("magic", 0, "blob meta header magic"),
        ("features", 4, "blob meta header features"),
        ("compressor", 8, "blob meta header compression"),
        ("entries", 12, "blob meta header entries"),
        ("offset", 16, "blob meta header CI offset"),
        ("compressed size", 24, "blob meta header CI compressed size"),
        ("uncompressed size", 32, "blob meta header CI uncompressed size"),
        ("contexts", 56, "blob meta header contexts"),
        ("second magic", 4092, "blob meta header magic"),
    ] {
        let mut bad = good.clone();
        bad.blob[header + at] ^= 4;
        let fields: &'static [&'static str] = Box::leak(Box::new([field]));
        add(&format!("header: {name}"), bad, fields, "");
    }
    let mut bad = good.clone();
    bad.blob.truncate(header + 100);
    add("cut in the header", bad, &["CI"], "");
    let mut bad = good.clone();
    bad.blob.truncate(header / 2);
    add("cut in the data", bad, &["blob file size"], "");
    let mut bad = good.clone();
    bad.blob.clear();
    add("empty", bad, &["blob file size"], "");
}

/// The good image with the chunk table that `change` makes of its own, stored plain, and `more` data before it.
fn with_table(good: &Specimen, more: &[u8], change: impl FnOnce(&mut Vec<[u64; 2]>, u64)) -> Specimen {
    let table_at = blob_table_at(good);
    let (offset, stored) = (good.u64_at(table_at + 112) as usize, good.u64_at(table_at + 120) as usize);
    let plain_bytes = good.u64_at(table_at + 128) as usize;
    let packed = &good.blob[offset..offset + stored];
    let plain = match good.u32_at(table_at + 108) {
        0 => packed.to_vec(),
        _ => zstd::bulk::decompress(packed, plain_bytes).unwrap_or_else(|error| panic!("the table: {error}")),
    };
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    let mut entries: Vec<[u64; 2]> = plain.chunks(16).map(|entry| [word(&entry[..8]), word(&entry[8..])]).collect();
    change(&mut entries, offset as u64);
    let array: Vec<u8> = entries.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
    rebuilt(good, more, &array, array.len(), 0)
}

/// The good image with `more` behind its data and `array` as the stored chunk table.
fn rebuilt(good: &Specimen, more: &[u8], array: &[u8], plain_bytes: usize, compressor: u32) -> Specimen {
    let table_at = blob_table_at(good);
    let offset = good.u64_at(table_at + 112) as usize;
    let mut header = good.blob[good.blob.len() - HEADER_BYTES..].to_vec();
    let mut bad = good.clone();
    bad.blob.truncate(offset);
    bad.blob.extend(more);
    let offset = bad.blob.len() as u64;
    for (field, value) in [(112, offset), (120, array.len() as u64), (128, plain_bytes as u64)] {
        bad = bad.patched(table_at + field, &value.to_le_bytes());
        let at = field - 112 + 16;
        header[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    bad = bad.patched(table_at + 108, &compressor.to_le_bytes());
    header[8..12].copy_from_slice(&compressor.to_le_bytes());
    bad.blob.extend(array);
    bad.blob.extend(header);
    let size = bad.blob.len() as u64;
    bad.patched(table_at + 88, &size.to_le_bytes())
}

/// An entry of 16 bytes (format, section 6.3).
fn entry(plain_at: u64, plain_bytes: u64, stored_at: u64, stored_bytes: u64) -> [u64; 2] {
    let (plain, stored) = (plain_bytes - 1, stored_bytes - 1);
    [
        plain_at | (plain & 0xfffff) << 44 | (plain >> 20) << 8,
        stored_at | (stored & 0xfffff) << 44 | (stored >> 20) << 40,
    ]
}

fn entries(good: &Specimen, add: &mut Add<'_>) {
    let chunk = u64::from(CHUNK_BYTES);
    let rows: [(&str, [u64; 2]); 6] = [
        ("outside the blob", entry(1 << 40, chunk, 0, chunk)),
        ("stored outside", entry(0, chunk, (1 << 40) - 1, chunk)),
        ("larger than a chunk", entry(0, chunk + 1, 0, chunk + 1)),
        ("of 16 MiB", entry(0, 16 << 20, 0, 16 << 20)),
        ("over the next one", entry(4096, chunk, 0, chunk)),
        ("of all ones", [u64::MAX, u64::MAX]),
    ];
    for (name, row) in rows {
        let bad = with_table(good, &[], |entries, _| entries[0] = row);
        add(&format!("chunk {name}"), bad, ENTRY, "");
    }
    // The first chunk, one byte shorter than the files say.
    let shorter = with_table(good, &[], |entries, _| entries[0] = entry(0, 1, 0, 1));
    add("chunk of another size", shorter, &["chunk address", "CI uncompressed offset"], "/");
    let swapped = with_table(good, &[], |entries, _| entries.swap(0, 1));
    add("chunks out of order", swapped, ENTRY, "");
}

/// A frame that says it holds [`BOMB_BYTES`], and does: zeros.
fn bomb() -> std::io::Result<Vec<u8>> {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3)?;
    encoder.set_pledged_src_size(Some(BOMB_BYTES))?;
    std::io::copy(&mut std::io::repeat(0).take(BOMB_BYTES), &mut encoder)?;
    encoder.finish()
}

fn bombs(good: &Specimen, add: &mut Add<'_>) {
    let bomb = bomb().unwrap_or_else(|error| panic!("a bomb: {error}"));
    let chunk = u64::from(CHUNK_BYTES);
    // Chunk 0 belongs to the first file.
    let bad = with_table(good, &bomb, |entries, end| entries[0] = entry(0, chunk, end, bomb.len() as u64));
    add("chunk that is a bomb", bad, &["chunk data"], "/");
    let table_at = blob_table_at(good);
    let plain_bytes = good.u64_at(table_at + 128) as usize;
    let mut small = bomb.clone();
    small.truncate(plain_bytes.min(bomb.len()) - 1);
    let bad = rebuilt(good, &[], &small, plain_bytes, 3);
    add("table that is half a bomb", bad, &["CI"], "");
    let mut flipped = good.clone();
    flipped.blob[1] ^= 1;
    add("chunk with a flipped bit", flipped, &["chunk digest", "chunk data"], "/");
    let chunks = good.u64_at(EXTENDED + 24) as usize;
    let bad = good.patched(chunks, &[0; 32]);
    add("digest of a chunk", bad, &["chunk digest"], "/");
}
