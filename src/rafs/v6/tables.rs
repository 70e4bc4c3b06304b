//! Device table and blob table of v6 (format, sections 4.4 and 4.5).

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::DEVICE_TABLE;
use super::RawExtended;
use super::blocks::Blocks;
use crate::limits;
use crate::rafs::NEWER_TOOLS;
use crate::rafs::NO_TOOLS;
use crate::rafs::RafsError;
use crate::rafs::blob;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::Cipher;
use crate::rafs::facts::MetaHolder;
use crate::rafs::facts::MetaLocation;
use crate::rafs::facts::feature;
use crate::rafs::grid;
use crate::rafs::malformed;
use crate::rafs::meta;
use crate::rafs::unknown;
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

/// A blob table entry as stored, without its reserved end. It may hold a key: so no `Debug`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
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
    toc_digest: [u8; 32],
    /// The digest of the file that holds the array, or the key of an encrypted blob.
    holder_or_key: [u8; 32],
    /// That file's size, or the first half of the tweak.
    holder_bytes_or_iv: [u8; 8],
    iv_end: [u8; 8],
    cipher: U32,
}

/// What is needed to read the tables.
pub(super) struct Tables<'a> {
    pub(super) extended: &'a RawExtended,
    pub(super) blocks: Blocks,
    /// What stands in for the placeholder id.
    pub(super) placeholder_id: Option<&'a str>,
}

impl Tables<'_> {
    /// Reads the blobs, and compares the two tables.
    pub(super) fn read(&self, view: &View, devices: u16) -> Result<Vec<BlobFacts>, RafsError> {
        let table = self.extended.blob_table.get();
        let count = u64::from(self.extended.blob_table_bytes.get()) / BLOB_BYTES;
        if count != u64::from(devices) || devices > limits::MAX_V6_DEVICES {
            return Err(malformed("blob table size", table, format!("{count} blobs and {devices} devices")));
        }
        let mut blobs = Vec::with_capacity(devices.into());
        for index in 0..u32::from(devices) {
            // Both tables were inside the file when they were checked, so this does not overflow.
            let at = table.saturating_add(u64::from(index).saturating_mul(BLOB_BYTES));
            let device_at = DEVICE_TABLE.saturating_add(u64::from(index).saturating_mul(DEVICE_BYTES));
            let raw: RawBlob = view.record_at(at)?;
            let device: RawDevice = view.record_at(device_at)?;
            if raw.id != device.id {
                return Err(malformed("device id", device_at, "differs from the id in the blob table"));
            }
            let blob = self.read_blob(&raw, index, at)?;
            if self.blocks.start(device.blocks.get()) != blob.uncompressed_bytes {
                let reason = format!("{} for {} bytes", device.blocks, blob.uncompressed_bytes);
                return Err(malformed("device blocks", device_at, reason));
            }
            blobs.push(blob);
        }
        blob::check_unique(&blobs, table)?;
        Ok(blobs)
    }

    fn read_blob(&self, raw: &RawBlob, index: u32, at: u64) -> Result<BlobFacts, RafsError> {
        let id = self.id(raw, index, at)?;
        let features = blob::features(raw.features.get(), &id, at)?;
        if raw.chunk_bytes != self.extended.chunk_bytes {
            let reason = format!("{}, superblock says {}", raw.chunk_bytes, self.extended.chunk_bytes);
            return Err(malformed("blob chunk size", at, reason));
        }
        let is_tar = features & feature::TARFS != 0;
        if is_tar != (self.blocks == Blocks::SECTORS) || is_tar == (features & feature::ALIGNED != 0) {
            let reason = format!("{features:#x} in an image with blocks of {}", self.blocks.bytes());
            return Err(malformed("blob features", at, reason));
        }
        let rows: [(&'static str, u64, u64); 3] = [
            ("blob chunk count", chunk_count(raw, features), limits::MAX_CHUNKS_PER_BLOB.into()),
            ("blob compressed size", raw.compressed_bytes.get(), limits::MAX_BLOB_FILE_BYTES),
            ("blob uncompressed size", raw.uncompressed_bytes.get(), limits::MAX_BLOB_BYTES),
        ];
        for (field, value, longest) in rows {
            if value > longest {
                return Err(malformed(field, at, format!("{value}, at most {longest}")));
            }
        }
        // It was compared just now.
        let chunk_count = u32::try_from(chunk_count(raw, features)).unwrap_or(u32::MAX);
        Ok(BlobFacts {
            index,
            cipher: cipher(raw, features, &id, at)?,
            features,
            chunk_count,
            chunk_bytes: raw.chunk_bytes.get(),
            uncompressed_bytes: raw.uncompressed_bytes.get(),
            compressed_bytes: raw.compressed_bytes.get(),
            data_bytes: data_bytes(raw, features, at)?,
            compressor: known(blob::compressor, raw.compressor, "blob compression", &id)?,
            digester: known(blob::digester, raw.digester, "blob digest algorithm", &id)?,
            meta: if is_tar { None } else { Some(location(raw, features, chunk_count, &id, at)?) },
            prefetch_bytes: 0,
            id,
        })
    }

    fn id(&self, raw: &RawBlob, index: u32, at: u64) -> Result<String, RafsError> {
        let id_bytes = raw.id.iter().position(|&byte| byte == 0).unwrap_or(raw.id.len());
        let (id, padding) = raw.id.split_at_checked(id_bytes).unwrap_or((&raw.id, &[]));
        let id = blob::id(id, self.placeholder_id, index, at)?;
        if raw.index.get() != index || padding.iter().any(|&byte| byte != 0) {
            return Err(malformed("blob index", at, format!("{} at position {index}, id {id}", raw.index)));
        }
        Ok(id)
    }
}

/// Where the chunk information array is, with what upstream requires of it (end of section 4.5). Its place is below 2^40,
/// so the range that is fetched is bounded before anything is fetched.
fn location(raw: &RawBlob, features: u32, chunks: u32, id: &str, at: u64) -> Result<MetaLocation, RafsError> {
    let meta = MetaLocation {
        holder: holder(raw, features, at)?,
        offset: raw.meta_offset.get(),
        compressed_bytes: raw.meta_compressed_bytes.get(),
        uncompressed_bytes: raw.meta_uncompressed_bytes.get(),
        compressor: known(blob::compressor, raw.meta_compressor, "CI compression", id)?,
    };
    meta::check_array_bytes(meta.uncompressed_bytes, features, chunks, at)?;
    if meta.compressed_bytes > meta.uncompressed_bytes {
        let reason = format!("{} for {} bytes", meta.compressed_bytes, meta.uncompressed_bytes);
        return Err(malformed("CI compressed size", at, reason));
    }
    if meta.offset > limits::MAX_BLOB_FILE_BYTES {
        return Err(malformed("CI offset", at, format!("{:#x} is out of range", meta.offset)));
    }
    Ok(meta)
}

/// Chunks of the blob, those that the bootstrap does not refer to too. Tars have those of a grid. Blobs of a generated
/// chunk dictionary may state only those that the dictionary uses (section 1.4): their array tells.
fn chunk_count(raw: &RawBlob, features: u32) -> u64 {
    if features & feature::TARFS != 0 {
        return grid::count(raw.uncompressed_bytes.get(), raw.chunk_bytes.get());
    }
    let has_contexts = features & (feature::ZRAN | feature::BATCH) != 0;
    if features & feature::IS_CHUNKDICT_GENERATED == 0 || has_contexts {
        return raw.chunk_count.get().into();
    }
    raw.meta_uncompressed_bytes.get().checked_div(meta::entry_bytes(features)).unwrap_or(u64::MAX)
}

/// Which file holds the chunk information array.
fn holder(raw: &RawBlob, features: u32, at: u64) -> Result<MetaHolder, RafsError> {
    if features & feature::SEPARATE == 0 {
        return Ok(MetaHolder::Blob);
    }
    if raw.holder_or_key != [0; 32] {
        return Ok(MetaHolder::Other(hex::encode(raw.holder_or_key)));
    }
    if features & feature::INLINED_FS_META != 0 {
        return Ok(MetaHolder::Bootstrap);
    }
    Err(malformed("RAFS blob digest", at, "is missing: nothing tells which file holds the chunk table"))
}

/// The algorithm with the number `raw`, which `of_number` knows.
fn known<T>(of_number: fn(u32) -> Option<T>, raw: U32, field: &str, id: &str) -> Result<T, RafsError> {
    of_number(raw.get()).ok_or_else(|| unknown(format!("{field} {raw}"), format!("blob {id}"), NEWER_TOOLS))
}

/// Key and tweak of an encrypted blob. Errors tell nothing of them.
fn cipher(raw: &RawBlob, features: u32, id: &str, at: u64) -> Result<Option<Cipher>, RafsError> {
    let is_encrypted = features & feature::ENCRYPTED != 0;
    match (raw.cipher.get(), is_encrypted) {
        (0, false) => return Ok(None),
        (1, true) => {}
        (0 | 1, _) => {
            let reason = format!("{} in blob {id} with features {features:#x}", raw.cipher);
            return Err(malformed("blob cipher", at, reason));
        }
        (number, _) => {
            let (name, readers) = match number {
                2 => (" (AES-256-XTS)", NO_TOOLS),
                3 => (" (AES-256-GCM)", NO_TOOLS),
                _ => ("", NEWER_TOOLS),
            };
            return Err(unknown(format!("blob cipher {number}{name}"), format!("blob {id}"), readers));
        }
    }
    let (first, second) = raw.holder_or_key.split_at(16);
    if first == second {
        return Err(malformed("blob cipher key", at, format!("both halves of blob {id}'s are equal")));
    }
    let iv = zerocopy::transmute!([raw.holder_bytes_or_iv, raw.iv_end]);
    Ok(Some(Cipher { key: raw.holder_or_key, iv }))
}

/// End of the chunk data in the blob file (section 4.5).
fn data_bytes(raw: &RawBlob, features: u32, at: u64) -> Result<u64, RafsError> {
    if features & feature::TARFS != 0 {
        return Ok(raw.uncompressed_bytes.get());
    }
    if features & feature::CAP_TAR_TOC == 0 || features & (feature::SEPARATE | feature::EXTERNAL) != 0 {
        return Ok(raw.compressed_bytes.get());
    }
    let tail = if features & feature::HAS_TAR_HEADER != 0 { TAR_HEADER_BYTES } else { 0 };
    let offset = raw.meta_offset.get();
    offset
        .checked_sub(tail)
        .ok_or_else(|| malformed("CI offset", at, format!("{offset} leaves no room for a tar header")))
}
