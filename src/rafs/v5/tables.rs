//! Blob table and extended blob table of v5 (format, section 3.5).

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::blob;
use crate::rafs::blob::Flags;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::feature;
use crate::rafs::malformed;
use crate::sys::view::View;

/// Bytes of an entry of the extended table.
pub(super) const EXTENDED_ENTRY_BYTES: u64 = 64;

/// The two numbers before each id.
const PREFETCH_BYTES: usize = 8;

/// Bytes of a tar header behind the chunk data.
const TAR_HEADER_BYTES: u64 = 512;

/// An entry of the extended table as stored.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtended {
    chunk_count: U32,
    features: U32,
    uncompressed_bytes: U64,
    compressed_bytes: U64,
    reserved: [u8; 40],
}

/// Where the tables are, and what else their entries take from the superblock.
pub(super) struct Tables<'a> {
    pub(super) blob_table: u64,
    pub(super) blob_table_bytes: u64,
    pub(super) extended_table: u64,
    pub(super) extended_entries: u32,
    pub(super) chunk_bytes: u32,
    pub(super) flags: Flags,
    /// What stands in for the placeholder id.
    pub(super) placeholder_id: Option<&'a str>,
}

/// Reads the blobs. Without an extended table their sizes and counts are the largest possible.
pub(super) fn read(view: &View, tables: &Tables<'_>) -> Result<Vec<BlobFacts>, RafsError> {
    let longest = limits::MAX_V5_BLOBS.saturating_mul(limits::MAX_BLOB_ID_BYTES.saturating_add(PREFETCH_BYTES + 1));
    if tables.blob_table_bytes > (longest as u64) {
        return Err(malformed("blob table size", 64, format!("{} bytes", tables.blob_table_bytes)));
    }
    let table = view.vec_at(tables.blob_table, tables.blob_table_bytes)?;
    let mut blobs = Vec::new();
    let mut rest = table.as_slice();
    while rest.len() > PREFETCH_BYTES {
        let at = tables.blob_table.saturating_add((table.len() as u64).saturating_sub(rest.len() as u64));
        let index = u32::try_from(blobs.len()).unwrap_or(u32::MAX);
        if blobs.len() >= limits::MAX_V5_BLOBS {
            return Err(malformed("blob table", at, format!("more than {} blobs", limits::MAX_V5_BLOBS)));
        }
        let ([prefetch_offset, prefetch_bytes], text) =
            <[U32; 2]>::read_from_prefix(rest).map_err(|_| malformed("blob table", at, "ends within an entry"))?;
        if prefetch_offset.get() != 0 {
            return Err(malformed("blob prefetch offset", at, format!("{prefetch_offset} instead of 0")));
        }
        let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        let (id, behind) = text.split_at_checked(end).unwrap_or((text, &[]));
        rest = behind.get(1..).unwrap_or_default();
        let id = blob::id(id, tables.placeholder_id, index, at)?;
        blobs.push(read_extended(view, tables, index, id, prefetch_bytes.get())?);
    }
    if tables.extended_entries != 0 && blobs.len() > tables.extended_entries as usize {
        let reason = format!("{} entries for {} blobs", tables.extended_entries, blobs.len());
        return Err(malformed("extended blob table entries", 68, reason));
    }
    blob::check_unique(&blobs, tables.blob_table)?;
    Ok(blobs)
}

/// The facts of blob `index`, with its entry of the extended table.
fn read_extended(
    view: &View,
    tables: &Tables<'_>,
    index: u32,
    id: String,
    prefetch_bytes: u32,
) -> Result<BlobFacts, RafsError> {
    let mut facts = BlobFacts {
        index,
        id,
        features: 0,
        chunk_count: limits::MAX_CHUNKS_PER_BLOB,
        chunk_bytes: tables.chunk_bytes,
        uncompressed_bytes: limits::MAX_BLOB_BYTES,
        compressed_bytes: limits::MAX_BLOB_FILE_BYTES,
        data_bytes: limits::MAX_BLOB_FILE_BYTES,
        compressor: tables.flags.compressor,
        digester: tables.flags.digester,
        cipher: None,
        meta: None,
        prefetch_bytes,
    };
    if index >= tables.extended_entries {
        return Ok(facts);
    }
    let at = tables.extended_table.saturating_add(u64::from(index).saturating_mul(EXTENDED_ENTRY_BYTES));
    let raw: RawExtended = view.record_at(at)?;
    facts.features = blob::v5_features(raw.features.get(), &facts.id)?;
    facts.chunk_count = raw.chunk_count.get();
    facts.uncompressed_bytes = raw.uncompressed_bytes.get();
    facts.compressed_bytes = raw.compressed_bytes.get();
    if facts.chunk_count > limits::MAX_CHUNKS_PER_BLOB {
        return Err(malformed("blob chunk count", at, format!("{}", facts.chunk_count)));
    }
    if facts.uncompressed_bytes > limits::MAX_BLOB_BYTES {
        return Err(malformed("blob uncompressed size", at, format!("{}", facts.uncompressed_bytes)));
    }
    if facts.compressed_bytes > limits::MAX_BLOB_FILE_BYTES {
        return Err(malformed("blob compressed size", at, format!("{}", facts.compressed_bytes)));
    }
    let has = |bits: u32| facts.features & bits == bits;
    if has(feature::EXTERNAL) {
        // Cut into chunks by what keeps it, whatever the chunk size of the image.
        facts.chunk_bytes = limits::MAX_CHUNK_BYTES;
    }
    // Section 4.5: with the tail header that the builder writes behind the data, if it wrote one.
    let tail = if has(feature::CAP_TAR_TOC | feature::HAS_TAR_HEADER) && !has(feature::EXTERNAL) {
        TAR_HEADER_BYTES
    } else {
        0
    };
    facts.data_bytes = facts.compressed_bytes.checked_sub(tail).ok_or_else(|| {
        malformed("blob compressed size", at, format!("{} bytes hold no tail", facts.compressed_bytes))
    })?;
    Ok(facts)
}
