//! Small metadata that claim as much as the format can express: 254 blobs of the largest size, and an empty root.

use super::Specimen;

const BLOBS: usize = 254;
const DEVICES: usize = 1408;
const BLOB_TABLE: usize = 36 << 10;
const META: usize = 100 << 10;
const ROOT_NID: usize = 128;

/// Chunks that each of the blobs claims.
const CHUNKS: u32 = (1 << 24) - 1;
/// Bytes that each claims when uncompressed.
const PLAIN_BYTES: u64 = (1 << 44) - 4096;
/// Where each claims to have its chunk table.
const CI_OFFSET: u64 = 1 << 39;

/// The metadata, and an empty blob: those that are claimed do not exist.
pub fn v6() -> Specimen {
    let mut bytes = vec![0; META + 8192];
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    for (at, word) in [
        (1024, 0xe0f5_e1e2),
        (1032, 0x4000_0000),
        (1036, 12 | (ROOT_NID as u32) << 16),
        (1040, 1),
        (1064, (META / 4096) as u32),
        (1104, 0xc),
        (1108, (BLOBS as u32) << 16),
        (1112, 11),
        (1152, 0x94), // zstd, BLAKE3, owners
        (1160, BLOB_TABLE as u32),
        (1168, (BLOBS * 256) as u32),
        (1172, 4096),
    ] {
        put(at, &u32::to_le_bytes(word));
    }
    for number in 0..BLOBS {
        let id = format!("{number:064x}");
        let (device, blob) = (DEVICES + number * 128, BLOB_TABLE + number * 256);
        put(device, id.as_bytes());
        put(device + 64, &((PLAIN_BYTES / 4096) as u32).to_le_bytes());
        put(blob, id.as_bytes());
        for (at, word) in [(64, number as u32), (68, 4096), (72, CHUNKS), (76, 3), (84, 0x4000_0001), (108, 3)] {
            put(blob + at, &word.to_le_bytes());
        }
        let ci_bytes = u64::from(CHUNKS) * 16;
        for (at, word) in [(88, 1 << 40), (96, PLAIN_BYTES), (112, CI_OFFSET), (120, 4096), (128, ci_bytes)] {
            put(blob + at, &word.to_le_bytes());
        }
    }
    let root = META + ROOT_NID * 32;
    // Extended, inline; a directory of 27 bytes with two links.
    put(root, &[5, 0, 0, 0, 0xed, 0x41, 0, 0, 27]);
    put(root + 44, &[2]);
    let mut entries = [0u8; 27];
    for (slot, name_at) in [(0, 24u8), (1, 25)] {
        entries[slot * 12] = ROOT_NID as u8;
        entries[slot * 12 + 8] = name_at;
        entries[slot * 12 + 10] = 2;
    }
    entries[24..].copy_from_slice(b"...");
    put(root + 64, &entries);
    Specimen { bootstrap: bytes, blob_id: "none".to_owned(), blob: Vec::new() }
}

/// Ids of the blobs that the metadata claim, and how long their files are at least.
pub fn blobs() -> impl Iterator<Item = (String, u64)> {
    (0..BLOBS).map(|number| (format!("{number:064x}"), CI_OFFSET + (1 << 20)))
}
