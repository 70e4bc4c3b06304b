//! Directories of v6: blocks of entries, ordered by name over the whole directory (format, section 4.7).

use std::cmp::Ordering;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U64;

use super::BLOCK_BYTES;
use super::V6;
use super::inode::Place;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::compare_name;
use crate::rafs::entries::DirEntry;
use crate::rafs::inode::Kind;
use crate::rafs::is_legal_name;
use crate::rafs::malformed;
use crate::sys::view::View;

const ENTRY_BYTES: usize = 12;

/// Where an entry has its name offset.
const NAME_OFFSET_FIELD: u64 = std::mem::offset_of!(RawEntry, name_offset) as u64;

/// Bits of a listing position that count entries in a block: a block holds at most 341.
const SLOT_BITS: u32 = 16;

/// A directory entry as stored.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    nid: U64,
    name_offset: U16,
    kind: u8,
    reserved: u8,
}

impl RawEntry {
    fn kind(&self, at: u64) -> Result<Kind, RafsError> {
        Ok(match self.kind {
            1 => Kind::Regular,
            2 => Kind::Directory,
            3 => Kind::CharDevice,
            4 => Kind::BlockDevice,
            5 => Kind::Fifo,
            6 => Kind::Socket,
            7 => Kind::Symlink,
            other => return Err(malformed("dirent type", at, format!("{other}"))),
        })
    }

    fn nid(&self, at: u64) -> Result<u32, RafsError> {
        let nid = self.nid.get();
        u32::try_from(nid).map_err(|_| malformed("dirent nid", at, format!("{nid} lies outside of the metadata")))
    }
}

/// Entries in a block of `len` bytes at `at` whose first name starts at `first_name` (section 14, rule 18).
fn count_entries(first_name: u16, len: usize, at: u64) -> Result<usize, RafsError> {
    let offset = usize::from(first_name);
    if offset < ENTRY_BYTES || offset >= len || !offset.is_multiple_of(ENTRY_BYTES) {
        return Err(malformed("dirent name offset", at, format!("{offset} in a block of {len} bytes")));
    }
    Ok(offset / ENTRY_BYTES)
}

/// The part of the last name of a block that is name: it ends at the first NUL.
fn until_nul(name: &[u8]) -> &[u8] {
    name.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A copy of one directory block.
struct Block {
    at: u64,
    len: usize,
    count: usize,
    bytes: [u8; BLOCK_BYTES as usize],
}

impl Block {
    fn empty() -> Self {
        Self { at: 0, len: 0, count: 0, bytes: [0; BLOCK_BYTES as usize] }
    }

    /// Copies the `len` bytes at `at`.
    #[inline]
    fn load(&mut self, image: &V6, at: u64, len: u64) -> Result<(), RafsError> {
        self.len = usize::try_from(len).unwrap_or(usize::MAX).min(self.bytes.len());
        self.at = at;
        self.count = 0;
        image.view.copy_at(at, self.bytes.get_mut(..self.len).unwrap_or_default())?;
        let first = self.entry_at(0)?;
        self.count = count_entries(first.name_offset.get(), self.len, at)?;
        Ok(())
    }

    #[inline]
    fn entry_at(&self, slot: usize) -> Result<RawEntry, RafsError> {
        let start = slot.saturating_mul(ENTRY_BYTES);
        let bytes = self.bytes.get(start..self.len).unwrap_or_default();
        let (entry, _) = RawEntry::read_from_prefix(bytes)
            .map_err(|_| malformed("dirent", self.at, format!("entry {slot} lies outside of its block")))?;
        Ok(entry)
    }

    /// The entry `slot`, below the count, and its name.
    #[inline]
    fn entry(&self, slot: usize) -> Result<(RawEntry, &[u8]), RafsError> {
        let entry = self.entry_at(slot)?;
        let start = usize::from(entry.name_offset.get());
        let next = slot.saturating_add(1);
        let is_last = next >= self.count;
        let end = if is_last { self.len } else { self.entry_at(next)?.name_offset.get().into() };
        // Names start behind the entries; with ascending offsets none can reach into them.
        let names = self.count.saturating_mul(ENTRY_BYTES);
        let name = if start >= names && end <= self.len { self.bytes.get(start..end) } else { None };
        let name = match name {
            Some(name) if is_last => until_nul(name),
            Some(name) => name,
            None => &[],
        };
        if !is_legal_name(name) {
            let reason = format!("entry {slot}, name offset {start}: no legal name");
            return Err(malformed("dirent name", self.at, reason));
        }
        Ok((entry, name))
    }
}

/// A directory block that is searched in place: a lookup touches some of its lines, not all of it.
struct Probe<'a> {
    view: &'a View,
    at: u64,
    len: u64,
    count: u64,
}

impl<'a> Probe<'a> {
    /// The block of `len` bytes at `at`.
    #[inline]
    fn new(view: &'a View, at: u64, len: u64) -> Result<Self, RafsError> {
        let first_name = view.u16_at(at.saturating_add(NAME_OFFSET_FIELD))?;
        let count = count_entries(first_name, usize::try_from(len).unwrap_or(usize::MAX), at)?;
        Ok(Self { view, at, len, count: count as u64 })
    }

    /// The entry `slot`, below the count, and how its name compares with `name`.
    #[inline]
    fn compare(&self, slot: u64, name: &[u8]) -> Result<(RawEntry, Ordering), RafsError> {
        let entry_at = self.at.saturating_add(slot.saturating_mul(ENTRY_BYTES as u64));
        let is_last = slot.saturating_add(1) >= self.count;
        let (entry, end): (RawEntry, u64) = if is_last {
            (self.view.record_at(entry_at)?, self.len)
        } else {
            let [entry, next]: [RawEntry; 2] = self.view.record_at(entry_at)?;
            (entry, next.name_offset.get().into())
        };
        let start = u64::from(entry.name_offset.get());
        let names = self.count.saturating_mul(ENTRY_BYTES as u64);
        let bytes = end.saturating_sub(start);
        let is_inside = start >= names && end <= self.len && bytes > 0;
        let name_at = self.at.saturating_add(start);
        if is_inside && is_last {
            let mut buffer = [0u8; limits::MAX_NAME_BYTES + 1];
            let longest = usize::try_from(bytes).unwrap_or(usize::MAX).min(buffer.len());
            let copied = buffer.get_mut(..longest).unwrap_or_default();
            self.view.copy_at(name_at, copied)?;
            return Ok((entry, until_nul(copied).cmp(name)));
        }
        if !is_inside || bytes > limits::MAX_NAME_BYTES as u64 {
            return Err(malformed(
                "dirent name offset",
                self.at,
                format!("entry {slot}: a name from {start} to {end}"),
            ));
        }
        Ok((entry, compare_name(self.view, name_at, bytes, name)?))
    }
}

impl V6 {
    /// The inode of `name` in a directory of `size` bytes at `place`. Binary search over the blocks by first name, then
    /// in the one block that can hold it.
    #[inline]
    pub(in crate::rafs) fn lookup(&self, place: &Place, size: u64, name: &[u8]) -> Result<Option<u32>, RafsError> {
        // Invariant: blocks below `low` start with a name <= `name`, those from `high` on with a greater one. The first
        // block needs no look: what is not in it if the name sorts before all others is not found there either.
        let (mut low, mut high) = (1u64, size.div_ceil(BLOCK_BYTES));
        while low < high {
            let middle = low.midpoint(high);
            let (at, len) = self.data_block(place, size, middle);
            let (_, order) = Probe::new(&self.view, at, len)?.compare(0, name)?;
            if order == Ordering::Greater { high = middle } else { low = middle.saturating_add(1) }
        }
        let (at, len) = self.data_block(place, size, low.saturating_sub(1));
        let block = Probe::new(&self.view, at, len)?;
        let (mut low, mut high) = (0u64, block.count);
        while low < high {
            let middle = low.midpoint(high);
            let (entry, order) = block.compare(middle, name)?;
            match order {
                Ordering::Equal => return self.target(&entry, at).map(Some),
                Ordering::Less => low = middle.saturating_add(1),
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The nid of an entry whose inode agrees with its type (section 14, rule 18).
    #[inline]
    fn target(&self, entry: &RawEntry, at: u64) -> Result<u32, RafsError> {
        let nid = entry.nid(at)?;
        let (stated, found) = (entry.kind(at)?, self.kind(nid)?);
        if stated != found {
            return Err(malformed("dirent type", at, format!("{stated:?}, inode {nid} is {found:?}")));
        }
        Ok(nid)
    }
}

/// A position in a listing: block number and slot, packed.
pub(in crate::rafs) struct Cursor<'a> {
    image: &'a V6,
    dir: u32,
    place: Place,
    size: u64,
    /// Number of the block in `block`; `None` before the first.
    loaded: Option<u64>,
    number: u64,
    slot: usize,
    block: Block,
}

impl<'a> Cursor<'a> {
    #[inline]
    pub(in crate::rafs) fn new(image: &'a V6, dir: u32, place: Place, size: u64, from: u64) -> Self {
        let slot = usize::try_from(from & 0xffff).unwrap_or(usize::MAX);
        Self { image, dir, place, size, loaded: None, number: from >> SLOT_BITS, slot, block: Block::empty() }
    }

    #[inline]
    pub(in crate::rafs) fn next(&mut self) -> Option<Result<DirEntry<'_>, RafsError>> {
        match self.advance() {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => return Some(Err(self.end(error))),
        }
        let slot = self.slot;
        self.slot = slot.saturating_add(1);
        // Block numbers of a file below 2 GiB have 19 bits, slots 9: nothing is lost, and the sum is never 0.
        let next = self.number << SLOT_BITS | (self.slot as u64);
        match self.read(slot) {
            Ok((ino, kind)) => {
                let name = self.block.entry(slot).map(|(_, name)| name).unwrap_or_default();
                Some(Ok(DirEntry { name, ino, kind: kind.dirent_type(), next }))
            }
            Err(error) => Some(Err(self.end(error))),
        }
    }

    /// Loads the block that holds the next entry; false at the end of the directory.
    fn advance(&mut self) -> Result<bool, RafsError> {
        loop {
            if self.number.checked_mul(BLOCK_BYTES).is_none_or(|offset| offset >= self.size) {
                return Ok(false);
            }
            if self.loaded != Some(self.number) {
                let (at, len) = self.image.data_block(&self.place, self.size, self.number);
                self.block.load(self.image, at, len)?;
                self.loaded = Some(self.number);
            }
            if self.slot < self.block.count {
                return Ok(true);
            }
            (self.number, self.slot) = (self.number.saturating_add(1), 0);
        }
    }

    fn read(&self, slot: usize) -> Result<(u32, Kind), RafsError> {
        let at = self.block.at;
        let (entry, name) = self.block.entry(slot)?;
        let (nid, kind) = (entry.nid(at)?, entry.kind(at)?);
        let is_wrong = match name {
            b"." => nid != self.dir || kind != Kind::Directory,
            b".." => kind != Kind::Directory,
            _ => nid == 0,
        };
        if is_wrong {
            return Err(malformed("dirent nid", at, format!("{nid} ({kind:?}) in directory {}", self.dir)));
        }
        Ok((nid, kind))
    }

    /// Ends the listing.
    fn end(&mut self, error: RafsError) -> RafsError {
        self.number = u64::MAX;
        error
    }
}
