//! Inode records of v5 (format, section 3.6).

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::I64;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::ROOT;
use super::V5;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::inode::InodeFacts;
use crate::rafs::inode::Kind;
use crate::rafs::malformed;
use crate::rafs::place::Place;
use crate::rafs::place::V5Place;

/// Bytes of a record before the name.
pub(in crate::rafs) const RECORD_BYTES: u64 = 128;

/// Where a record has the length of its name.
pub(super) const NAME_BYTES_FIELD: u64 = std::mem::offset_of!(Record, name_bytes) as u64;

const HAS_XATTR: u64 = 4;

/// An inode record as stored, up to its name.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Record {
    pub(super) digest: [u8; 32],
    pub(super) parent: U64,
    pub(super) ino: U64,
    uid: U32,
    gid: U32,
    project: U32,
    mode: U32,
    size: U64,
    blocks: U64,
    flags: U64,
    nlink: U32,
    pub(super) child_index: U32,
    pub(super) child_count: U32,
    pub(super) name_bytes: U16,
    symlink_bytes: U16,
    rdev: U32,
    mtime_ns: U32,
    mtime: I64,
    reserved: [u8; 8],
}

impl Record {
    /// The file type (section 14, rule 7).
    #[inline]
    pub(super) fn kind(&self, at: u64) -> Result<Kind, RafsError> {
        let mode = self.mode.get();
        match Kind::of_mode(mode) {
            Some(kind) if mode <= 0xffff => Ok(kind),
            _ => Err(malformed("inode mode", at, format!("{mode:#o} names no file type"))),
        }
    }
}

/// Checks the length of the name of the record at `at` (section 14, rule 5).
#[inline]
pub(super) fn name_bytes(bytes: u16, at: u64) -> Result<u64, RafsError> {
    if bytes == 0 || usize::from(bytes) > limits::MAX_NAME_BYTES {
        return Err(malformed("inode name size", at, format!("{bytes} bytes")));
    }
    Ok(bytes.into())
}

impl V5 {
    /// The attributes of the inode `ino`: those of the record with this index, which must be the first of the number.
    #[inline]
    pub(in crate::rafs) fn inode(&self, ino: u32) -> Result<InodeFacts, RafsError> {
        let (at, record) = self.record(ino)?;
        if record.ino.get() != u64::from(ino) {
            return Err(malformed("inode number", at, format!("{} in the record of index {ino}", record.ino)));
        }
        self.facts(&record, at, ino)
    }

    #[inline]
    pub(super) fn record(&self, index: u32) -> Result<(u64, Record), RafsError> {
        let at = self.record_offset(index)?;
        Ok((at, self.view.record_at(at)?))
    }

    /// Checks a record and turns it into facts (section 14, rules 5, 7, 8, 13).
    #[inline]
    pub(super) fn facts(&self, record: &Record, at: u64, ino: u32) -> Result<InodeFacts, RafsError> {
        let kind = record.kind(at)?;
        let mut place = self.place(record, at, ino)?;
        let size = record.size.get();
        match kind {
            Kind::Directory => self.check_children(&place, ino)?,
            Kind::Regular => place.chunk_bytes = self.file_chunk_bytes(&place, size)?,
            Kind::Symlink => {
                let bytes = u64::from(record.symlink_bytes.get());
                if size != bytes || bytes == 0 || bytes > limits::MAX_SYMLINK_BYTES {
                    return Err(malformed("symlink size", at, format!("{bytes} bytes, inode size {size}")));
                }
            }
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo | Kind::Socket => {}
        }
        let (nlink, mtime_ns) = (record.nlink.get(), record.mtime_ns.get());
        if nlink == 0 || mtime_ns >= 1_000_000_000 {
            return Err(malformed("inode nlink or mtime", at, format!("{nlink} links, {mtime_ns} ns")));
        }
        let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        Ok(InodeFacts {
            ino,
            kind,
            mode: record.mode.get(),
            uid: record.uid.get(),
            gid: record.gid.get(),
            nlink,
            rdev: if is_device { record.rdev.get() } else { 0 },
            size,
            blocks: record.blocks.get(),
            mtime: record.mtime.get(),
            mtime_ns,
            place: Place::V5(place),
        })
    }

    #[inline]
    fn place(&self, record: &Record, at: u64, ino: u32) -> Result<V5Place, RafsError> {
        // Both lengths have 16 bits and `at` 32: no overflow.
        let name = (name_bytes(record.name_bytes.get(), at)?.saturating_add(7)) & !7;
        let symlink = (u64::from(record.symlink_bytes.get()).saturating_add(7)) & !7;
        let target = at.saturating_add(RECORD_BYTES).saturating_add(name);
        let parent = match record.parent.get() {
            0 if ino == ROOT => ROOT,
            parent if parent != 0 && ino != ROOT => u32::try_from(parent).unwrap_or(u32::MAX),
            parent => return Err(malformed("inode parent", at, format!("{parent} of inode {ino}"))),
        };
        if parent > self.entries {
            return Err(malformed("inode parent", at, format!("{parent} of {}", self.entries)));
        }
        Ok(V5Place {
            record: at,
            target,
            tail: target.saturating_add(symlink),
            parent,
            child_index: record.child_index.get(),
            child_count: record.child_count.get(),
            chunk_bytes: self.chunk_bytes,
            has_xattrs: record.flags.get() & HAS_XATTR != 0,
        })
    }

    /// Section 14, rule 13: children come behind their directory, so that no path leads back.
    #[inline]
    fn check_children(&self, place: &V5Place, ino: u32) -> Result<(), RafsError> {
        if place.child_count == 0 {
            return Ok(());
        }
        let last = place.child_index.checked_add(place.child_count.saturating_sub(1));
        if place.child_index > ino && last.is_some_and(|last| last <= self.entries) {
            return Ok(());
        }
        let reason = format!("{} children from index {} in directory {ino}", place.child_count, place.child_index);
        Err(malformed("inode child index", place.record, reason))
    }

    /// The target of a symlink whose facts were checked.
    pub(in crate::rafs) fn symlink(&self, place: &V5Place, size: u64) -> Result<Vec<u8>, RafsError> {
        let target = self.view.vec_at(place.target, size)?;
        if target.contains(&0) {
            return Err(malformed("symlink target", place.target, "contains NUL"));
        }
        Ok(target)
    }
}
