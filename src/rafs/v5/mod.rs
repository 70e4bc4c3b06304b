//! RAFS v5 (format, section 3): superblock and tables, and how inodes are found.

mod audit;
pub(super) mod chunks;
pub(super) mod digest;
pub(super) mod dir;
pub(super) mod inode;
mod measure;
mod tables;
pub(super) mod xattr;

use std::sync::Arc;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::RafsError;
use super::blob;
use super::blob::Flags;
use super::check_disjoint;
use super::chunks::Numbering;
use super::facts::BlobFacts;
use super::facts::feature;
use super::malformed;
use super::part;
use super::version::V5_MAGIC;
use super::version::V5_VERSION;
use crate::sys::view::View;

const SUPERBLOCK_BYTES: u64 = 8192;
/// Index of the root directory.
pub(super) const ROOT: u32 = 1;
/// Parts and records start at multiples of this; the inode table counts in it.
const UNIT: u64 = 8;
/// The inode table's entries have 29 bits.
const MAX_RECORD_NUMBER: u32 = 1 << 29;

/// The superblock as stored (section 3.2), without its reserved end.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: U32,
    version: U32,
    superblock_bytes: U32,
    chunk_bytes: U32,
    flags: U64,
    inodes: U64,
    inode_table: U64,
    prefetch_table: U64,
    blob_table: U64,
    inode_table_entries: U32,
    prefetch_entries: U32,
    blob_table_bytes: U32,
    extended_entries: U32,
    extended_table: U64,
}

/// An opened v5 image.
#[derive(Debug)]
pub(super) struct V5 {
    pub(super) view: View,
    pub(super) blobs: Arc<[BlobFacts]>,
    pub(super) flags: Flags,
    pub(super) chunk_bytes: u32,
    numbering: Numbering,
    /// Whether some blob is external.
    has_external: bool,
    /// Inodes as the superblock counts them: hard links once.
    pub(super) inodes: u64,
    /// Paths, and the highest inode index.
    pub(super) entries: u32,
    inode_table: u64,
    prefetch_table: u64,
    prefetch_entries: u32,
}

impl V5 {
    /// Checks superblock and tables (sections 3.2 to 3.5; 14, rules 1 to 4, 12, 15).
    pub(super) fn open(view: View, placeholder_id: Option<&str>) -> Result<Self, RafsError> {
        let raw: RawSuperblock = view.record_at(0)?;
        if raw.magic.get() != V5_MAGIC || raw.version.get() != V5_VERSION {
            return Err(malformed("superblock magic", 0, format!("{:#x}, {:#x}", raw.magic, raw.version)));
        }
        if u64::from(raw.superblock_bytes.get()) != SUPERBLOCK_BYTES {
            return Err(malformed("superblock size", 8, format!("{} instead of 8192", raw.superblock_bytes)));
        }
        if !view.len().is_multiple_of(UNIT) {
            return Err(malformed("bootstrap size", 0, format!("{} is no multiple of 8", view.len())));
        }
        let chunk_bytes = blob::chunk_bytes(raw.chunk_bytes.get(), 12)?;
        let flags = Flags::parse(raw.flags.get(), 16)?;
        if flags.is_tarfs {
            return Err(malformed("superblock flags", 16, "tarfs mode in RAFS v5"));
        }
        let (inodes, entries) = (raw.inodes.get(), raw.inode_table_entries.get());
        if inodes == 0 || inodes > u64::from(entries) {
            return Err(malformed("inode count", 24, format!("{inodes} of {entries} inode table entries")));
        }
        check_tables(&raw, view.len())?;
        let tables = tables::Tables {
            blob_table: raw.blob_table.get(),
            blob_table_bytes: raw.blob_table_bytes.get().into(),
            extended_table: raw.extended_table.get(),
            extended_entries: raw.extended_entries.get(),
            chunk_bytes,
            flags,
            placeholder_id,
        };
        let blobs = tables::read(&view, &tables)?;
        let mut image = Self {
            view,
            numbering: Numbering::Stored,
            has_external: blobs.iter().any(|blob| blob.features & feature::EXTERNAL != 0),
            blobs: blobs.into(),
            flags,
            chunk_bytes,
            inodes,
            entries,
            inode_table: raw.inode_table.get(),
            prefetch_table: raw.prefetch_table.get(),
            prefetch_entries: raw.prefetch_entries.get(),
        };
        if tables.extended_entries == 0 && !image.blobs.is_empty() {
            let (blobs, numbering) = image.measure_blobs()?;
            (image.blobs, image.numbering) = (blobs.into(), numbering);
        }
        let root = image.inode(ROOT)?;
        if root.kind != super::inode::Kind::Directory {
            return Err(malformed("root mode", 0, "the root is not a directory"));
        }
        Ok(image)
    }

    /// The prefetch table (section 3.4).
    pub(super) fn prefetch(&self) -> Result<Vec<u32>, RafsError> {
        let mut inodes = Vec::new();
        for number in 0..self.prefetch_entries {
            let at = self.prefetch_table.saturating_add(u64::from(number).saturating_mul(4));
            match self.view.u32_at(at)? {
                0 => break,
                ino if ino > self.entries => {
                    return Err(malformed("prefetch table", at, format!("inode {ino} of {}", self.entries)));
                }
                ino => inodes.push(ino),
            }
        }
        Ok(inodes)
    }

    /// Where the record with the index `index` starts (section 3.3).
    #[inline]
    pub(super) fn record_offset(&self, index: u32) -> Result<u64, RafsError> {
        let Some(slot) = index.checked_sub(1).filter(|_| index <= self.entries) else {
            return Err(malformed("inode index", self.inode_table, format!("{index} of {}", self.entries)));
        };
        // The table was inside the file when it was opened, so this does not overflow.
        let at = self.inode_table.saturating_add(u64::from(slot).saturating_mul(4));
        let number = self.view.u32_at(at)?;
        if u64::from(number) < SUPERBLOCK_BYTES / UNIT || number >= MAX_RECORD_NUMBER {
            return Err(malformed("inode table entry", at, format!("record offset {number} × 8 is out of range")));
        }
        Ok(u64::from(number).saturating_mul(UNIT))
    }
}

/// Checks that the tables are aligned, inside the file, and disjoint (section 14, rules 1 and 12).
fn check_tables(raw: &RawSuperblock, file_bytes: u64) -> Result<(), RafsError> {
    let mut parts = Vec::new();
    for (name, start, bytes) in tables_of(raw) {
        if bytes == 0 {
            continue;
        }
        if !start.is_multiple_of(UNIT) {
            return Err(malformed(name, start, "starts at no multiple of 8"));
        }
        parts.push((name, part(name, start, bytes, file_bytes)?));
    }
    check_disjoint(&mut parts)
}

/// The superblock and the tables: name, offset, bytes.
fn tables_of(raw: &RawSuperblock) -> [(&'static str, u64, u64); 5] {
    let bytes_of = |entries: U32, each: u64| u64::from(entries.get()).saturating_mul(each);
    let extended_bytes = bytes_of(raw.extended_entries, tables::EXTENDED_ENTRY_BYTES);
    [
        ("superblock", 0, SUPERBLOCK_BYTES),
        ("inode table", raw.inode_table.get(), bytes_of(raw.inode_table_entries, 4)),
        ("prefetch table", raw.prefetch_table.get(), bytes_of(raw.prefetch_entries, 4)),
        ("blob table", raw.blob_table.get(), raw.blob_table_bytes.get().into()),
        ("extended blob table", raw.extended_table.get(), extended_bytes),
    ]
}
