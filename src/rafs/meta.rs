//! Blob metadata (chunk information array, "CI") of v6 blobs: format, section 6.
//!
//! A blob keeps the array compressed, with a header of 4096 bytes behind it, at the place that the blob table states
//! ([`stored_range`]). Its cache file `<id>.blob.meta` is the decoded array, padded to 4096, and the same header
//! ([`cache_bytes`]); [`BlobMeta`] uses that in place. Behind the entries of the array may stand contexts: what chunks
//! need to be decoded that share a compressed piece with others.

mod contexts;
mod entry;
#[cfg(test)]
mod tests;

use std::ops::Range;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use self::contexts::Contexts;
use self::entry::EntryV2;
use super::RafsError;
use super::align_up;
use super::blob;
use super::chunks::check_ranges;
use super::facts::BlobFacts;
use super::facts::ChunkFacts;
use super::facts::Coding;
use super::facts::MetaLocation;
use super::facts::ZranContext;
use super::facts::feature;
use super::malformed;
use crate::limits;
use crate::sys::view::View;

/// Bytes of the header behind the array.
pub const META_HEADER_BYTES: u64 = 4096;

const HEADER_MAGIC: u32 = 0xb10b_b10b;

/// Features that decide how the array is read; the header must agree with the blob table on them.
const ARRAY_FEATURES: u32 = feature::CHUNK_INFO_V2 | CONTEXT_FEATURES | feature::ENCRYPTED;

/// Features whose blobs have contexts behind the entries; at most one of them.
const CONTEXT_FEATURES: u32 = feature::ZRAN | feature::BATCH;

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
pub(super) fn entry_bytes(features: u32) -> u64 {
    if features & feature::CHUNK_INFO_V2 == 0 { 16 } else { 24 }
}

/// Bytes of the entries alone of `chunks` chunks.
fn entries_bytes(features: u32, chunks: u32) -> u64 {
    entry_bytes(features).saturating_mul(chunks.into())
}

/// Checks the stated size of the decoded array: entries for all chunks, and nothing else in blobs without contexts.
/// Nothing is fetched or decoded before (section 14, rule 21).
pub(super) fn check_array_bytes(bytes: u64, features: u32, chunks: u32, at: u64) -> Result<(), RafsError> {
    let entries = entries_bytes(features, chunks);
    let is_possible = if features & CONTEXT_FEATURES == 0 {
        bytes == entries
    } else {
        (entries..=limits::MAX_META_BYTES).contains(&bytes)
    };
    if is_possible {
        return Ok(());
    }
    let reason = format!("{bytes}, its {chunks} entries have {entries}, at most {} are read", limits::MAX_META_BYTES);
    Err(malformed("CI uncompressed size", at, reason))
}

fn location(blob: &BlobFacts) -> Result<&MetaLocation, RafsError> {
    blob.meta.as_ref().ok_or_else(|| malformed("blob meta", 0, format!("blob {} has none", blob.index)))
}

/// The range of the file [`MetaLocation::holder`] that holds the compressed array and, as its last
/// [`META_HEADER_BYTES`], the header.
///
/// # Errors
/// A blob without metadata (v5, tarfs), or a place that cannot be.
pub fn stored_range(blob: &BlobFacts) -> Result<Range<u64>, RafsError> {
    let meta = location(blob)?;
    if meta.compressed_bytes > limits::MAX_META_BYTES {
        let reason = format!("{} bytes, at most {} are read", meta.compressed_bytes, limits::MAX_META_BYTES);
        return Err(malformed("CI compressed size", 0, reason));
    }
    let end = meta.offset.checked_add(meta.compressed_bytes).and_then(|end| end.checked_add(META_HEADER_BYTES));
    let end = end.ok_or_else(|| malformed("CI offset", 0, format!("{:#x} is out of range", meta.offset)))?;
    Ok(meta.offset..end)
}

/// Size of the cache file `<id>.blob.meta`: the decoded array padded to 4096, and the header.
///
/// # Errors
/// A blob without metadata (v5, tarfs), or a size that cannot be.
pub fn cache_bytes(blob: &BlobFacts) -> Result<u64, RafsError> {
    let array = location(blob)?.uncompressed_bytes;
    if array > limits::MAX_META_BYTES {
        return Err(malformed(
            "CI uncompressed size",
            0,
            format!("{array} bytes, at most {} are read", limits::MAX_META_BYTES),
        ));
    }
    align_up(array, 4096)
        .and_then(|padded| padded.checked_add(META_HEADER_BYTES))
        .ok_or_else(|| malformed("CI uncompressed size", 0, format!("{array} is out of range")))
}

/// Checks a header that was fetched and decrypted, or that stands in a cache file, against the blob table (section 14,
/// rule 21).
///
/// # Errors
/// The field that disagrees; its offset is that in the header.
pub fn check_header(header: &[u8], blob: &BlobFacts) -> Result<(), RafsError> {
    read_header(header, blob).map(drop)
}

/// Reads and checks a header; where the contexts are, if the blob has any.
fn read_header(header: &[u8], blob: &BlobFacts) -> Result<Contexts, RafsError> {
    let meta = location(blob)?;
    let header = Header::read_from_bytes(header)
        .map_err(|_| malformed("blob meta header", 0, format!("{} bytes instead of 4096", header.len())))?;
    if header.magic.get() != HEADER_MAGIC || header.magic_again.get() != HEADER_MAGIC {
        return Err(malformed("blob meta header magic", 0, format!("{:#x}, {:#x}", header.magic, header.magic_again)));
    }
    if blob::compressor(header.compressor.get()) != Some(meta.compressor) {
        let reason = format!("{}, blob table says {:?}", header.compressor, meta.compressor);
        return Err(malformed("blob meta header compression", 8, reason));
    }
    let rows: [(&'static str, u64, u64, u64); 5] = [
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
    ];
    for (field, offset, found, expected) in rows {
        if found != expected {
            return Err(malformed(field, offset, format!("{found}, the blob table says {expected}")));
        }
    }
    if blob.features & CONTEXT_FEATURES == 0 {
        if header.contexts.get() != 0 {
            let reason = format!("{}, the blob table knows of none", header.contexts);
            return Err(malformed("blob meta header contexts", 56, reason));
        }
        return Ok(Contexts::none());
    }
    let entries = entries_bytes(blob.features, blob.chunk_count);
    if header.contexts_offset.get() != entries {
        let reason = format!("{}, the entries end at {entries}", header.contexts_offset);
        return Err(malformed("blob meta header contexts offset", 40, reason));
    }
    let end = entries.checked_add(header.contexts_bytes.get());
    let Some(end) = end.filter(|&end| end <= meta.uncompressed_bytes) else {
        let reason = format!("{} behind {entries} bytes of entries", header.contexts_bytes);
        return Err(malformed("blob meta header contexts size", 48, reason));
    };
    // Each context was begun for a chunk.
    if header.contexts.get() > blob.chunk_count {
        let reason = format!("{} for {} chunks", header.contexts, blob.chunk_count);
        return Err(malformed("blob meta header contexts", 56, reason));
    }
    Contexts::new(entries..end, header.contexts.get())
}

/// The decoded chunk information array of one blob, used in place.
#[derive(Debug, Clone)]
pub struct BlobMeta {
    view: View,
    blob: BlobFacts,
    contexts: Contexts,
}

impl BlobMeta {
    /// Opens the content of a `<id>.blob.meta` cache file: the plain array padded to 4096 bytes, then the header
    /// (format, section 11). Checks the header against the blob table and the array against section 14, rule 21, in one
    /// pass over it.
    ///
    /// # Errors
    /// What disagrees, with its field and offset.
    pub fn open(view: View, blob: &BlobFacts) -> Result<Self, RafsError> {
        let expected = cache_bytes(blob)?;
        if view.len() != expected {
            return Err(malformed("blob meta size", 0, format!("{} bytes instead of {expected}", view.len())));
        }
        check_array_bytes(location(blob)?.uncompressed_bytes, blob.features, blob.chunk_count, 0)?;
        let header: [u8; META_HEADER_BYTES as usize] = view.array_at(expected.saturating_sub(META_HEADER_BYTES))?;
        let contexts = read_header(&header, blob)?;
        let meta = Self { view, blob: blob.clone(), contexts };
        meta.check_entries()?;
        if blob.features & feature::ZRAN != 0 {
            meta.contexts.check_zran(&meta.view, blob.data_bytes)?;
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
            entry::decode_v1(plain.get(), stored.get())
        } else {
            let entry = self.entry_v2(at)?;
            entry.check_flags(&self.blob, at)?;
            self.with_context(&entry, at)?
        };
        check_ranges(&facts, at, &self.blob)?;
        Ok(facts)
    }

    /// How decoding of the gzip file can begin for the chunks of context number `context` ([`Coding::Zran`]): a copy of
    /// at most some 32 KiB.
    ///
    /// # Errors
    /// A blob without such contexts, a number out of range, a lost map, a context that breaks the rules.
    pub fn zran(&self, context: u32) -> Result<ZranContext, RafsError> {
        if self.blob.features & feature::ZRAN == 0 {
            return Err(malformed("ZRan context", 0, format!("blob {} has none", self.blob.index)));
        }
        self.contexts.zran(&self.view, context, self.blob.data_bytes)
    }

    /// The facts of an entry; those of a chunk that shares its stored bytes with others are completed from its context.
    fn with_context(&self, entry: &EntryV2, at: u64) -> Result<ChunkFacts, RafsError> {
        let (context, offset) = (entry.context, entry.offset);
        let (stored, plain_bytes, coding) = if entry.is_zran() {
            let stretch = self.contexts.stretch(&self.view, context, self.blob.data_bytes)?;
            (stretch.stored, stretch.plain_bytes, Coding::Zran { context, offset })
        } else if entry.is_batched() {
            let batch = self.contexts.batch(&self.view, context)?;
            let stored = (entry.facts.compressed_offset, batch.stored_bytes);
            (stored, batch.plain_bytes, Coding::Batch { plain_bytes: batch.plain_bytes, offset })
        } else {
            return Ok(entry.facts);
        };
        if offset.checked_add(entry.facts.uncompressed_bytes).is_none_or(|end| end > plain_bytes) {
            let reason = format!("{} bytes at {offset} of {plain_bytes}", entry.facts.uncompressed_bytes);
            return Err(malformed("CI offset in context", at, reason));
        }
        Ok(ChunkFacts { compressed_offset: stored.0, compressed_bytes: stored.1, coding, ..entry.facts })
    }

    /// One pass over the entries: each is right by itself, they ascend without overlap, and those of one batch agree on
    /// where it is.
    fn check_entries(&self) -> Result<(), RafsError> {
        const UNKNOWN: u64 = u64::MAX;
        // One place for each batch; their number was compared with the array that holds them.
        let batches = if self.blob.features & feature::BATCH == 0 { 0 } else { self.contexts.count() };
        let mut places = vec![UNKNOWN; usize::try_from(batches).unwrap_or(usize::MAX)];
        let mut end = 0u64;
        for chunk in 0..self.blob.chunk_count {
            let at = self.offset_of(chunk);
            let facts = self.chunk(chunk)?;
            if facts.uncompressed_offset < end {
                let reason = format!("chunk {chunk} overlaps the chunk before or is out of order");
                return Err(malformed("CI uncompressed offset", at, reason));
            }
            end = facts.uncompressed_offset.saturating_add(facts.uncompressed_bytes.into());
            if matches!(facts.coding, Coding::Batch { .. }) {
                let context = self.entry_v2(at)?.context;
                let place = usize::try_from(context).ok().and_then(|context| places.get_mut(context));
                let expected = place.map(|place| {
                    if *place == UNKNOWN {
                        *place = facts.compressed_offset;
                    }
                    *place
                });
                if expected != Some(facts.compressed_offset) {
                    let reason = format!("chunk {chunk} does not find batch {context} where others do");
                    return Err(malformed("CI compressed offset", at, reason));
                }
            }
        }
        Ok(())
    }

    fn entry_v2(&self, at: u64) -> Result<EntryV2, RafsError> {
        let [plain, stored, data]: [U64; 3] = self.view.record_at(at)?;
        Ok(EntryV2::decode(plain.get(), stored.get(), data.get()))
    }

    fn offset_of(&self, chunk: u32) -> u64 {
        entry_bytes(self.blob.features).saturating_mul(chunk.into())
    }
}
