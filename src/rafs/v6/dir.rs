//! Directories of v6: blocks of entries, ordered by name over the whole directory (format, section 4.7).

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
use crate::rafs::entries::DirEntry;
use crate::rafs::inode::Kind;
use crate::rafs::is_legal_name;
use crate::rafs::malformed;

const ENTRY_BYTES: usize = 12;

/// Where the second entry of a block has its name offset.
const SECOND_NAME_OFFSET: u64 = ENTRY_BYTES as u64 + 8;

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

impl V6 {
    /// The inode of `name` in a directory of `size` bytes at `place`. Binary search over the blocks by first name, then
    /// in the one block that can hold it.
    #[inline]
    pub(in crate::rafs) fn lookup(&self, place: &Place, size: u64, name: &[u8]) -> Result<Option<u32>, RafsError> {
        // Invariant: blocks below `low` start with a name <= `name`, those from `high` on with a greater one.
        let (mut low, mut high) = (0u64, size.div_ceil(BLOCK_BYTES));
        // With one block there is nothing to choose.
        while low < high && high > 1 {
            let middle = low.midpoint(high);
            let (at, len) = self.data_block(place, size, middle);
            if self.first_name_is_greater(at, len, name)? { high = middle } else { low = middle.saturating_add(1) }
        }
        let Some(number) = (if high == 1 { Some(0) } else { low.checked_sub(1) }) else { return Ok(None) };
        let (at, len) = self.data_block(place, size, number);
        let mut block = Block::empty();
        block.load(self, at, len)?;
        let (mut low, mut high) = (0usize, block.count);
        while low < high {
            let middle = low.midpoint(high);
            let (entry, found) = block.entry(middle)?;
            match found.cmp(name) {
                std::cmp::Ordering::Equal => return self.target(&entry, at).map(Some),
                std::cmp::Ordering::Less => low = middle.saturating_add(1),
                std::cmp::Ordering::Greater => high = middle,
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

    /// Whether the first name of the block at `at` is greater than `name`. Copies only what it needs.
    #[inline]
    fn first_name_is_greater(&self, at: u64, len: u64, name: &[u8]) -> Result<bool, RafsError> {
        let first: RawEntry = self.view.record_at(at)?;
        let start = u64::from(first.name_offset.get());
        let len_bytes = usize::try_from(len).unwrap_or(usize::MAX);
        let is_only = count_entries(first.name_offset.get(), len_bytes, at)? == 1;
        let end = if is_only {
            len.min(start.saturating_add(limits::MAX_NAME_BYTES as u64))
        } else {
            self.view.u16_at(at.saturating_add(SECOND_NAME_OFFSET))?.into()
        };
        let mut buffer = [0u8; limits::MAX_NAME_BYTES];
        let found = usize::try_from(end.saturating_sub(start)).ok().and_then(|bytes| buffer.get_mut(..bytes));
        let Some(found) = found.filter(|found| !found.is_empty() && end <= len) else {
            return Err(malformed("dirent name offset", at, format!("a name from {start} to {end}")));
        };
        self.view.copy_at(at.saturating_add(start), found)?;
        let found: &[u8] = if is_only { until_nul(found) } else { found };
        Ok(found > name)
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
