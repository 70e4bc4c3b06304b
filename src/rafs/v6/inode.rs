//! Inodes of v6 (format, section 4.6).

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::I64;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::V6;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::count_chunks;
use crate::rafs::inode::InodeFacts;
use crate::rafs::inode::Kind;
use crate::rafs::malformed;
use crate::rafs::place::Layout;
use crate::rafs::place::Place;
use crate::rafs::place::V6Place;

const EXTENDED: u16 = 1;
const EXTENDED_BYTES: u64 = 64;
const COMPACT_BYTES: u64 = 32;

/// Bytes before the first xattr of an inode.
pub(super) const XATTR_HEADER_BYTES: u64 = 12;

/// Bytes of a chunk index.
pub(super) const CHUNK_INDEX_BYTES: u64 = 8;

/// The extended form as stored.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtended {
    format: U16,
    xattr_count: U16,
    mode: U16,
    reserved: U16,
    size: U64,
    union: U32,
    ino: U32,
    uid: U32,
    gid: U32,
    mtime: I64,
    mtime_ns: U32,
    nlink: U32,
    reserved_end: [u8; 16],
}

/// The compact form as stored.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawCompact {
    format: U16,
    xattr_count: U16,
    mode: U16,
    nlink: U16,
    size: U32,
    reserved: U32,
    union: U32,
    ino: U32,
    uid: U16,
    gid: U16,
    reserved_end: U32,
}

impl From<RawCompact> for RawExtended {
    fn from(compact: RawCompact) -> Self {
        Self {
            format: compact.format,
            xattr_count: compact.xattr_count,
            mode: compact.mode,
            reserved: U16::ZERO,
            size: u64::from(compact.size.get()).into(),
            union: compact.union,
            ino: compact.ino,
            uid: u32::from(compact.uid.get()).into(),
            gid: u32::from(compact.gid.get()).into(),
            mtime: I64::ZERO,
            mtime_ns: U32::ZERO,
            nlink: u32::from(compact.nlink.get()).into(),
            reserved_end: [0; 16],
        }
    }
}

impl V6 {
    /// The attributes of the inode `nid`.
    #[inline]
    pub(in crate::rafs) fn inode(&self, nid: u32) -> Result<InodeFacts, RafsError> {
        let at = self.inode_offset(nid)?;
        // Mostly there are 64 bytes, and one copy is enough; a compact inode may be the last thing in the file.
        let (raw, inode_bytes) = if at.saturating_add(EXTENDED_BYTES) <= self.view.len() {
            let bytes: [u8; EXTENDED_BYTES as usize] = self.view.array_at(at)?;
            match RawCompact::read_from_prefix(&bytes) {
                Ok((compact, _)) if compact.format.get() & EXTENDED == 0 => (compact.into(), COMPACT_BYTES),
                _ => (zerocopy::transmute!(bytes), EXTENDED_BYTES),
            }
        } else {
            let compact: RawCompact = self.view.record_at(at)?;
            if compact.format.get() & EXTENDED != 0 {
                return Err(malformed("inode format", at, "the inode reaches beyond the end of the metadata"));
            }
            (compact.into(), COMPACT_BYTES)
        };
        self.facts(&raw, at, inode_bytes, nid)
    }

    /// Checks an inode and turns it into facts (section 14, rules 7, 8, 17 and 19).
    #[inline]
    fn facts(&self, raw: &RawExtended, at: u64, inode_bytes: u64, nid: u32) -> Result<InodeFacts, RafsError> {
        let mode = u32::from(raw.mode.get());
        let Some(kind) = Kind::of_mode(mode) else {
            return Err(malformed("inode mode", at, format!("{mode:#o} names no file type")));
        };
        let format = raw.format.get();
        let layout = match (format >> 1, kind) {
            (0, Kind::Regular) => return Err(malformed("inode format", at, "a regular file without chunks")),
            (0, _) => Layout::Flat,
            (2, Kind::Directory | Kind::Symlink) => Layout::FlatInline,
            (4, Kind::Regular) => Layout::Chunks,
            _ => return Err(malformed("inode format", at, format!("{format:#x} for {kind:?}"))),
        };
        let xattrs = at.saturating_add(inode_bytes);
        let xattr_bytes = match raw.xattr_count.get() {
            0 => 0,
            count => u64::from(count.saturating_sub(1)).saturating_mul(4).saturating_add(XATTR_HEADER_BYTES),
        };
        let xattrs_end = xattrs.saturating_add(xattr_bytes);
        // Inodes start at multiples of 32, so aligning the offset aligns within the inode.
        let body = if layout == Layout::Chunks { xattrs_end.saturating_add(7) & !7 } else { xattrs_end };
        let place = V6Place { at, xattrs, xattrs_end, body, layout, block: raw.union.get() };
        let size = raw.size.get();
        self.check_body(&place, size, kind)?;
        let (nlink, mtime_ns) = (raw.nlink.get(), raw.mtime_ns.get());
        if nlink == 0 || mtime_ns >= 1_000_000_000 {
            return Err(malformed("inode nlink or mtime", at, format!("{nlink} links, {mtime_ns} ns")));
        }
        let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        Ok(InodeFacts {
            ino: nid,
            kind,
            mode,
            uid: raw.uid.get(),
            gid: raw.gid.get(),
            nlink,
            rdev: if is_device { raw.union.get() } else { 0 },
            size,
            blocks: size.div_ceil(512),
            mtime: raw.mtime.get(),
            mtime_ns,
            place: Place::V6(place),
        })
    }

    /// Checks that the inode's data, or its chunk indexes, lie inside the metadata.
    #[inline]
    fn check_body(&self, place: &V6Place, size: u64, kind: Kind) -> Result<(), RafsError> {
        if place.layout == Layout::Chunks {
            return self.check_chunk_indexes(place, size);
        }
        if kind == Kind::Symlink && !(1..=limits::MAX_SYMLINK_BYTES).contains(&size) {
            return Err(malformed("symlink size", place.at, format!("{size} bytes")));
        }
        if place.layout == Layout::Flat && !matches!(kind, Kind::Directory | Kind::Symlink) {
            return Ok(());
        }
        let mut at_block = size;
        if place.layout == Layout::FlatInline {
            let tail = match self.blocks.rest(size) {
                0 => size.min(self.blocks.bytes()),
                tail => tail,
            };
            at_block = size.saturating_sub(tail);
            let end = place.body.saturating_add(tail);
            if end > self.view.len() || self.blocks.holding(place.at) != self.blocks.holding(end.saturating_sub(1)) {
                return Err(malformed("inline data", place.at, format!("{tail} bytes leave the inode's block")));
            }
        }
        let start = self.blocks.start(place.block);
        if at_block != 0 && start.checked_add(at_block).is_none_or(|end| end > self.view.len()) {
            let reason = format!("{at_block} bytes at {start:#x} reach beyond the end of the metadata");
            return Err(malformed("inode data", place.at, reason));
        }
        Ok(())
    }

    #[inline]
    fn check_chunk_indexes(&self, place: &V6Place, size: u64) -> Result<(), RafsError> {
        // Bits 0 to 4 are a block size that the kernel uses and a RAFS reader ignores (section 4.8).
        if place.block & 0x20 == 0 || place.block & !0x3f != 0 {
            return Err(malformed("chunk format", place.at, format!("{:#x}", place.block)));
        }
        let bytes = count_chunks(size, self.chunk_bytes).saturating_mul(CHUNK_INDEX_BYTES);
        if place.body.checked_add(bytes).is_none_or(|end| end > self.view.len()) {
            let reason = format!("the chunk indexes of {size} bytes reach beyond the end of the metadata");
            return Err(malformed("inode size", place.at, reason));
        }
        Ok(())
    }

    /// Where block `number` of a directory's or symlink's data is, and how much of it there is.
    #[inline]
    pub(super) fn data_block(&self, place: &V6Place, size: u64, number: u64) -> (u64, u64) {
        // The inode's data lie inside the file (`check_body`), so nothing overflows.
        let offset = number.saturating_mul(self.blocks.bytes());
        let bytes = size.saturating_sub(offset).min(self.blocks.bytes());
        let is_last = offset.saturating_add(bytes) >= size;
        let at = if place.layout == Layout::FlatInline && is_last {
            place.body
        } else {
            self.blocks.start(place.block).saturating_add(offset)
        };
        (at, bytes)
    }

    /// The target of a symlink whose facts were checked: at most 4095 bytes, one block or some sectors.
    pub(in crate::rafs) fn symlink(&self, place: &V6Place, size: u64) -> Result<Vec<u8>, RafsError> {
        let mut target = Vec::new();
        for number in 0..self.blocks.count(size) {
            let (at, bytes) = self.data_block(place, size, number);
            target.extend(self.view.vec_at(at, bytes)?);
        }
        if target.contains(&0) {
            return Err(malformed("symlink target", place.at, "contains NUL"));
        }
        Ok(target)
    }
}
