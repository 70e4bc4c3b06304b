//! Blob metadata (chunk information array, "CI") of v6 blobs: format, section 6.
//!
//! A blob keeps the array compressed, with a header of 4096 bytes behind it, at the place that the blob table states
//! ([`stored_range`]). Its cache file `<id>.blob.meta` is the decoded array, padded to 4096, and the same header
//! ([`cache_bytes`]); [`BlobMeta`] uses that in place.

use std::ops::Range;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::RafsError;
use super::align_up;
use super::blob;
use super::chunks::check_ranges;
use super::facts::BlobFacts;
use super::facts::ChunkFacts;
use super::facts::Coding;
use super::facts::MetaLocation;
use super::facts::feature;
use super::malformed;
use crate::sys::view::View;

/// Bytes of the header behind the array.
pub const META_HEADER_BYTES: u64 = 4096;

const HEADER_MAGIC: u32 = 0xb10b_b10b;

/// Features that decide how the array is read; the header must agree with the blob table on them.
const ARRAY_FEATURES: u32 = feature::CHUNK_INFO_V2 | feature::ZRAN | feature::BATCH | feature::ENCRYPTED;

const V2_COMPRESSED: u64 = 0x1;
const V2_ZRAN: u64 = 0x2;
const V2_BATCH: u64 = 0x4;
const V2_ENCRYPTED: u64 = 0x8;
const V2_HAS_CRC32C: u64 = 0x10;

/// The header as stored (section 6.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: U32,
    features: U32,
    compressor: U32,
    entries: U32,
    offset: U64,
    compressed_bytes: U64,
    uncompressed_bytes: U64,
    contexts_offset: U64,
    contexts_bytes: U64,
    contexts: U32,
    reserved: [u8; 4032],
    magic_again: U32,
}

/// Bytes of one entry.
fn entry_bytes(features: u32) -> u64 {
    if features & feature::CHUNK_INFO_V2 == 0 { 16 } else { 24 }
}

/// Bytes that the decoded array of `chunks` entries has, for blobs without contexts.
pub(super) fn array_bytes(features: u32, chunks: u32) -> u64 {
    entry_bytes(features).saturating_mul(chunks.into())
}

fn location(blob: &BlobFacts) -> Result<&MetaLocation, RafsError> {
    blob.meta.as_ref().ok_or_else(|| malformed("blob meta", 0, format!("blob {} has none", blob.index)))
}

/// The range of the blob file that holds the compressed array and, as its last [`META_HEADER_BYTES`], the header.
///
/// # Errors
/// A blob without metadata (v5), or a place that cannot be.
pub fn stored_range(blob: &BlobFacts) -> Result<Range<u64>, RafsError> {
    let meta = location(blob)?;
    let end = meta.offset.checked_add(meta.compressed_bytes).and_then(|end| end.checked_add(META_HEADER_BYTES));
    let end = end.ok_or_else(|| malformed("CI offset", 0, format!("{:#x} is out of range", meta.offset)))?;
    Ok(meta.offset..end)
}

/// Size of the cache file `<id>.blob.meta`: the decoded array padded to 4096, and the header.
///
/// # Errors
/// A blob without metadata (v5), or a size that cannot be.
pub fn cache_bytes(blob: &BlobFacts) -> Result<u64, RafsError> {
    let array = location(blob)?.uncompressed_bytes;
    align_up(array, 4096)
        .and_then(|padded| padded.checked_add(META_HEADER_BYTES))
        .ok_or_else(|| malformed("CI uncompressed size", 0, format!("{array} is out of range")))
}

/// Checks a header that was fetched, or that stands in a cache file, against the blob table (section 14, rule 21).
///
/// # Errors
/// The field that disagrees; its offset is that in the header.
pub fn check_header(header: &[u8], blob: &BlobFacts) -> Result<(), RafsError> {
    let meta = location(blob)?;
    let header = Header::read_from_bytes(header)
        .map_err(|_| malformed("blob meta header", 0, format!("{} bytes instead of 4096", header.len())))?;
    if header.magic.get() != HEADER_MAGIC || header.magic_again.get() != HEADER_MAGIC {
        return Err(malformed("blob meta header magic", 0, format!("{:#x}, {:#x}", header.magic, header.magic_again)));
    }
    let compressor = blob::compressor(header.compressor.get(), "blob meta header compression", 8)?;
    if compressor != meta.compressor {
        let reason = format!("{compressor:?}, blob table says {:?}", meta.compressor);
        return Err(malformed("blob meta header compression", 8, reason));
    }
    let rows: [(&'static str, u64, u64, u64); 6] = [
        (
            "blob meta header features",
            4,
            (header.features.get() & ARRAY_FEATURES).into(),
            (blob.features & ARRAY_FEATURES).into(),
        ),
        ("blob meta header entries", 12, header.entries.get().into(), blob.chunk_count.into()),
        ("blob meta header CI offset", 16, header.offset.get(), meta.offset),
        ("blob meta header CI compressed size", 24, header.compressed_bytes.get(), meta.compressed_bytes),
        ("blob meta header CI uncompressed size", 32, header.uncompressed_bytes.get(), meta.uncompressed_bytes),
        ("blob meta header contexts", 56, header.contexts.get().into(), 0),
    ];
    for (field, offset, found, expected) in rows {
        if found != expected {
            return Err(malformed(field, offset, format!("{found}, the blob table says {expected}")));
        }
    }
    Ok(())
}

/// The decoded chunk information array of one blob, used in place.
#[derive(Debug, Clone)]
pub struct BlobMeta {
    view: View,
    blob: BlobFacts,
}

impl BlobMeta {
    /// Opens the content of a `<id>.blob.meta` cache file: the plain array padded to 4096 bytes, then the header
    /// (format, section 11). Checks the header against the blob table and the array against section 14, rule 21, in one
    /// pass over it.
    ///
    /// # Errors
    /// What disagrees, with its field and offset. [`RafsError::Unsupported`] for entries of other kinds of blobs.
    pub fn open(view: View, blob: &BlobFacts) -> Result<Self, RafsError> {
        let expected = cache_bytes(blob)?;
        if view.len() != expected {
            return Err(malformed("blob meta size", 0, format!("{} bytes instead of {expected}", view.len())));
        }
        let array = array_bytes(blob.features, blob.chunk_count);
        if location(blob)?.uncompressed_bytes != array {
            return Err(malformed("CI uncompressed size", 0, format!("{array} bytes are needed")));
        }
        let header: [u8; META_HEADER_BYTES as usize] = view.array_at(expected.saturating_sub(META_HEADER_BYTES))?;
        check_header(&header, blob)?;
        let meta = Self { view, blob: blob.clone() };
        let mut end = 0u64;
        for chunk in 0..blob.chunk_count {
            let facts = meta.chunk(chunk)?;
            if facts.uncompressed_offset < end {
                let reason = format!("chunk {chunk} overlaps the chunk before or is out of order");
                return Err(malformed("CI uncompressed offset", meta.offset_of(chunk), reason));
            }
            end = facts.uncompressed_offset.saturating_add(facts.uncompressed_bytes.into());
        }
        Ok(meta)
    }

    /// Entries.
    pub fn count(&self) -> u32 {
        self.blob.chunk_count
    }

    /// Facts of entry `chunk`, without its digest (which is in the bootstrap).
    ///
    /// # Errors
    /// An index out of range, a lost map, an entry that breaks the rules.
    pub fn chunk(&self, chunk: u32) -> Result<ChunkFacts, RafsError> {
        if chunk >= self.blob.chunk_count {
            return Err(malformed("chunk index", 0, format!("{chunk} of {} chunks", self.blob.chunk_count)));
        }
        let at = self.offset_of(chunk);
        let facts = if self.blob.features & feature::CHUNK_INFO_V2 == 0 {
            let [plain, stored]: [U64; 2] = self.view.record_at(at)?;
            decode_v1(plain.get(), stored.get())
        } else {
            let [plain, stored, data]: [U64; 3] = self.view.record_at(at)?;
            decode_v2(plain.get(), stored.get(), data.get(), at)?
        };
        check_ranges(&facts, at, &self.blob)?;
        Ok(facts)
    }

    fn offset_of(&self, chunk: u32) -> u64 {
        entry_bytes(self.blob.features).saturating_mul(chunk.into())
    }
}

/// `bits` of `value` from bit `shift`; at most 32 of them.
#[inline]
fn field<const SHIFT: u32, const BITS: u32>(value: u64) -> u32 {
    const { assert!(BITS <= 32 && SHIFT < 64) };
    let mask = const { ((1u64 << BITS).wrapping_sub(1)) as u32 };
    (value >> SHIFT) as u32 & mask
}

/// An entry of 16 bytes (section 6.3). Sizes are at most 2^24, so nothing overflows.
fn decode_v1(plain: u64, stored: u64) -> ChunkFacts {
    let uncompressed_bytes = (field::<44, 20>(plain) | field::<8, 4>(plain) << 20).saturating_add(1);
    let compressed_bytes = (field::<44, 20>(stored) | field::<40, 4>(stored) << 20).saturating_add(1);
    ChunkFacts {
        compressed_offset: stored & 0xff_ffff_ffff,
        compressed_bytes,
        uncompressed_offset: plain & 0xfff_ffff_f000,
        uncompressed_bytes,
        coding: if compressed_bytes == uncompressed_bytes { Coding::Plain } else { Coding::Compressed },
        digest: None,
        crc32c: None,
    }
}

/// An entry of 24 bytes at `at` (section 6.4).
fn decode_v2(plain: u64, stored: u64, data: u64, at: u64) -> Result<ChunkFacts, RafsError> {
    let flags = plain >> 56;
    if flags & (V2_ZRAN | V2_BATCH | V2_ENCRYPTED) != 0 {
        return Err(RafsError::Unsupported("a chunk in a ZRan, batched or encrypted blob"));
    }
    if flags & !(V2_COMPRESSED | V2_HAS_CRC32C) != 0 {
        return Err(malformed("CI flags", at, format!("unknown bits {flags:#x}")));
    }
    Ok(ChunkFacts {
        compressed_offset: stored & 0xff_ffff_ffff,
        compressed_bytes: field::<40, 24>(stored),
        uncompressed_offset: u64::from(field::<0, 32>(plain)) << 12,
        uncompressed_bytes: field::<32, 24>(plain).saturating_add(1),
        coding: if flags & V2_COMPRESSED == 0 { Coding::Plain } else { Coding::Compressed },
        digest: None,
        crc32c: (flags & V2_HAS_CRC32C != 0).then_some(field::<0, 32>(data)),
    })
}

#[cfg(test)]
mod tests {
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
            chunk_count_known: true,
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
            let c = decode_v1(plain, stored);
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
        assert_eq!(decode_v2(plain, stored, data, 0).unwrap(), expected);
        let [plain, stored, data] = words("0600000087130005 ef23000000000000 0300000001000000");
        assert!(matches!(decode_v2(plain, stored, data, 0), Err(RafsError::Unsupported(_))));
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
            assert!(matches!(outcome, Err(RafsError::Malformed { .. })), "{offset}: {outcome:?}");
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

    proptest::proptest! {
        #[test]
        fn open_of_any_array_gives_chunks_inside_the_blob_or_an_error(
            array in proptest::collection::vec(proptest::prelude::any::<u8>(), 48),
            is_v2 in proptest::prelude::any::<bool>(),
        ) {
            let (features, chunks) = if is_v2 { (feature::CHUNK_INFO_V2, 2) } else { (0, 3) };
            let blob = blob_of(&array, features, chunks);
            if let Ok(meta) = BlobMeta::open(View::from_bytes(file_of(&array, &blob)), &blob) {
                for chunk in 0..chunks {
                    let facts = meta.chunk(chunk).unwrap();
                    assert!(facts.compressed_offset + u64::from(facts.compressed_bytes) <= blob.data_bytes);
                }
            }
        }
    }
}
