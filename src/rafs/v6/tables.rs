//! Device table and blob table of v6 (format, sections 4.4 and 4.5).

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::BLOCK_BYTES;
use super::DEVICE_TABLE;
use super::RawExtended;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::blob;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::MetaHolder;
use crate::rafs::facts::MetaLocation;
use crate::rafs::facts::feature;
use crate::rafs::image::OpenOptions;
use crate::rafs::malformed;
use crate::rafs::meta;
use crate::sys::view::View;

/// Bytes of a device table entry.
pub(super) const DEVICE_BYTES: u64 = 128;
/// Bytes of a blob table entry.
pub(super) const BLOB_BYTES: u64 = 256;

/// Bytes of a tar header behind the chunk data.
const TAR_HEADER_BYTES: u64 = 512;

/// A device table entry as stored, without its reserved end.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDevice {
    id: [u8; 64],
    blocks: U32,
}

/// A blob table entry as stored, without the fields of encrypted and separate blobs.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBlob {
    id: [u8; 64],
    index: U32,
    chunk_bytes: U32,
    chunk_count: U32,
    compressor: U32,
    digester: U32,
    features: U32,
    compressed_bytes: U64,
    uncompressed_bytes: U64,
    toc_bytes: U32,
    meta_compressor: U32,
    meta_offset: U64,
    meta_compressed_bytes: U64,
    meta_uncompressed_bytes: U64,
}

/// Reads the blobs, and compares the two tables.
pub(super) fn read(
    view: &View,
    extended: &RawExtended,
    devices: u16,
    options: &OpenOptions,
) -> Result<Vec<BlobFacts>, RafsError> {
    let count = u64::from(extended.blob_table_bytes.get()) / BLOB_BYTES;
    if count != u64::from(devices) || devices > limits::MAX_V6_DEVICES {
        let at = extended.blob_table.get();
        return Err(malformed("blob table size", at, format!("{count} blobs and {devices} devices")));
    }
    let mut blobs = Vec::with_capacity(devices.into());
    for index in 0..u32::from(devices) {
        // Both tables were inside the file when they were checked, so this does not overflow.
        let at = extended.blob_table.get().saturating_add(u64::from(index).saturating_mul(BLOB_BYTES));
        let device_at = DEVICE_TABLE.saturating_add(u64::from(index).saturating_mul(DEVICE_BYTES));
        let raw: RawBlob = view.record_at(at)?;
        let device: RawDevice = view.record_at(device_at)?;
        if raw.id != device.id {
            return Err(malformed("device id", device_at, "differs from the id in the blob table"));
        }
        let blob = read_blob(&raw, index, at, extended, options)?;
        if u64::from(device.blocks.get()).saturating_mul(BLOCK_BYTES) != blob.uncompressed_bytes {
            let reason = format!("{} for {} bytes", device.blocks, blob.uncompressed_bytes);
            return Err(malformed("device blocks", device_at, reason));
        }
        blobs.push(blob);
    }
    blob::check_unique(&blobs, extended.blob_table.get())?;
    Ok(blobs)
}

fn read_blob(
    raw: &RawBlob,
    index: u32,
    at: u64,
    extended: &RawExtended,
    options: &OpenOptions,
) -> Result<BlobFacts, RafsError> {
    let features = blob::features(raw.features.get(), at)?;
    let id_bytes = raw.id.iter().position(|&byte| byte == 0).unwrap_or(raw.id.len());
    let id = blob::id(raw.id.get(..id_bytes).unwrap_or_default(), options.placeholder_id.as_deref(), index, at)?;
    let is_padded = raw.id.iter().skip(id_bytes).all(|&byte| byte == 0);
    if !is_padded || raw.index.get() != index {
        return Err(malformed("blob index", at, format!("{} at position {index}, id {id}", raw.index)));
    }
    if raw.chunk_bytes != extended.chunk_bytes {
        let reason = format!("{}, superblock says {}", raw.chunk_bytes, extended.chunk_bytes);
        return Err(malformed("blob chunk size", at, reason));
    }
    let rows: [(&'static str, u64, u64); 3] = [
        ("blob chunk count", raw.chunk_count.get().into(), limits::MAX_CHUNKS_PER_BLOB.into()),
        ("blob compressed size", raw.compressed_bytes.get(), limits::MAX_BLOB_FILE_BYTES),
        ("blob uncompressed size", raw.uncompressed_bytes.get(), limits::MAX_BLOB_BYTES),
    ];
    for (field, value, longest) in rows {
        if value > longest {
            return Err(malformed(field, at, format!("{value}, at most {longest}")));
        }
    }
    if features & feature::ALIGNED == 0 || !raw.uncompressed_bytes.get().is_multiple_of(BLOCK_BYTES) {
        return Err(malformed("blob features", at, "the uncompressed blob is not aligned to 4096"));
    }
    let meta = MetaLocation {
        holder: MetaHolder::Blob,
        offset: raw.meta_offset.get(),
        compressed_bytes: raw.meta_compressed_bytes.get(),
        uncompressed_bytes: raw.meta_uncompressed_bytes.get(),
        compressor: blob::compressor(raw.meta_compressor.get(), "CI compression", at)?,
    };
    check_meta(&meta, features, raw.chunk_count.get(), at)?;
    Ok(BlobFacts {
        index,
        id,
        features,
        chunk_count: raw.chunk_count.get(),
        chunk_count_known: true,
        chunk_bytes: raw.chunk_bytes.get(),
        uncompressed_bytes: raw.uncompressed_bytes.get(),
        compressed_bytes: raw.compressed_bytes.get(),
        data_bytes: data_bytes(raw, features, at)?,
        compressor: blob::compressor(raw.compressor.get(), "blob compression", at)?,
        digester: blob::digester(raw.digester.get(), "blob digest algorithm", at)?,
        cipher: None,
        meta: Some(meta),
        prefetch_bytes: 0,
    })
}

/// What upstream requires of the chunk information array (end of section 4.5). Its place is below 2^40, so the range
/// that is fetched is bounded before anything is fetched.
fn check_meta(meta: &MetaLocation, features: u32, chunks: u32, at: u64) -> Result<(), RafsError> {
    let expected = meta::array_bytes(features, chunks);
    if meta.uncompressed_bytes != expected {
        return Err(malformed(
            "CI uncompressed size",
            at,
            format!("{} instead of {expected}", meta.uncompressed_bytes),
        ));
    }
    if meta.compressed_bytes > meta.uncompressed_bytes {
        let reason = format!("{} for {} bytes", meta.compressed_bytes, meta.uncompressed_bytes);
        return Err(malformed("CI compressed size", at, reason));
    }
    if meta.offset > limits::MAX_BLOB_FILE_BYTES {
        return Err(malformed("CI offset", at, format!("{:#x} is out of range", meta.offset)));
    }
    Ok(())
}

/// End of the chunk data in the blob file (section 4.5).
fn data_bytes(raw: &RawBlob, features: u32, at: u64) -> Result<u64, RafsError> {
    if features & feature::CAP_TAR_TOC == 0 {
        return Ok(raw.compressed_bytes.get());
    }
    let tail = if features & feature::HAS_TAR_HEADER != 0 { TAR_HEADER_BYTES } else { 0 };
    let offset = raw.meta_offset.get();
    offset
        .checked_sub(tail)
        .ok_or_else(|| malformed("CI offset", at, format!("{offset} leaves no room for a tar header")))
}
