//! Directories of v6: blocks of entries, ordered by name over the whole directory (format, section 4.7).

use std::cmp::Ordering;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U64;

use super::V6;
use crate::limits;
use crate::rafs::Needle;
use crate::rafs::RafsError;
use crate::rafs::entries::DirEntry;
use crate::rafs::inode::InodeFacts;
use crate::rafs::inode::Kind;
use crate::rafs::is_legal_name;
use crate::rafs::malformed;
use crate::rafs::place::V6Place;
use crate::sys::view::View;

const ENTRY_BYTES: usize = 12;

/// Where an entry has its name offset.
const NAME_OFFSET_FIELD: u64 = std::mem::offset_of!(RawEntry, name_offset) as u64;

/// Bits of a listing position that count entries in a block: a block holds at most 341.
const SLOT_BITS: u32 = 16;

/// Room for the longest name and one byte more, which tells a longer one.
const NAME_BUFFER_BYTES: usize = limits::MAX_NAME_BYTES + 1;

/// What is copied at once of names up to this length.
const SHORT_NAME_BYTES: usize = 32;

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

/// A directory block that is read in place: a lookup touches some of its lines, not all of it. What an entry says is
/// checked each time, so a block that changes meanwhile does no harm.
#[derive(Clone, Copy)]
struct Block<'a> {
    view: &'a View,
    at: u64,
    len: u64,
    /// Entries in it.
    count: u64,
}

/// One entry, and where its name is.
struct Found {
    entry: RawEntry,
    name_at: u64,
    /// Bytes of the name, at least 1; of the last name of a block, with the padding behind it.
    name_bytes: u64,
    is_last: bool,
}

impl<'a> Block<'a> {
    /// The block of `len` bytes at `at`.
    #[inline]
    fn new(view: &'a View, at: u64, len: u64) -> Result<Self, RafsError> {
        let first_name = view.u16_at(at.saturating_add(NAME_OFFSET_FIELD))?;
        let count = count_entries(first_name, usize::try_from(len).unwrap_or(usize::MAX), at)?;
        Ok(Self { view, at, len, count: count as u64 })
    }

    /// The entry `slot`, below the count.
    #[inline(always)]
    fn entry(&self, slot: u64) -> Result<Found, RafsError> {
        // `at` lies in a file of 2 GiB and slots are below 342: nothing here comes near to overflowing.
        let entry_at = self.at.wrapping_add(slot.wrapping_mul(ENTRY_BYTES as u64));
        let is_last = slot.wrapping_add(1) >= self.count;
        let (entry, end): (RawEntry, u64) = if is_last {
            (self.view.record_at(entry_at)?, self.len)
        } else {
            let [entry, next]: [RawEntry; 2] = self.view.record_at(entry_at)?;
            (entry, next.name_offset.get().into())
        };
        let start = u64::from(entry.name_offset.get());
        // Names start behind the entries; with ascending offsets none can reach into them.
        let names = self.count.wrapping_mul(ENTRY_BYTES as u64);
        let longest = if is_last { self.len } else { limits::MAX_NAME_BYTES as u64 };
        let name_bytes = end.wrapping_sub(start);
        if start < names || end > self.len || start >= end || name_bytes > longest {
            return Err(bad_name(self.at, slot, start..end));
        }
        Ok(Found { entry, name_at: self.at.wrapping_add(start), name_bytes, is_last })
    }

    /// How the name of the entry `slot`, below the count, compares with the one that is looked for.
    #[inline]
    fn compare(&self, slot: u64, needle: &Needle<'_>) -> Result<Ordering, RafsError> {
        let found = self.entry(slot)?;
        if found.is_last {
            let mut buffer = [0; NAME_BUFFER_BYTES];
            return Ok(self.copy_name(&found, &mut buffer)?.cmp(needle.name));
        }
        needle.order_of(self.view, found.name_at, found.name_bytes)
    }

    /// Copies the name of an entry, whatever it consists of.
    #[inline]
    fn copy_name<'b>(&self, found: &Found, buffer: &'b mut [u8; NAME_BUFFER_BYTES]) -> Result<&'b [u8], RafsError> {
        let bytes = usize::try_from(found.name_bytes).unwrap_or(usize::MAX).min(NAME_BUFFER_BYTES);
        // Most names are short, and a copy of a fixed length costs less than one that has to look at it.
        let short = buffer.first_chunk_mut::<SHORT_NAME_BYTES>().filter(|_| bytes <= SHORT_NAME_BYTES);
        match (short, self.view.array_at(found.name_at)) {
            (Some(place), Ok(copied)) => *place = copied,
            _ => self.view.copy_at(found.name_at, buffer.get_mut(..bytes).unwrap_or_default())?,
        }
        let name = buffer.get(..bytes).unwrap_or_default();
        Ok(if found.is_last { until_nul(name) } else { name })
    }
}

/// The position of the first entry of the block behind that of the position `from`.
pub(in crate::rafs) fn next_block(from: u64) -> u64 {
    (from >> SLOT_BITS).saturating_add(1) << SLOT_BITS
}

#[cold]
fn bad_name(at: u64, slot: u64, name: std::ops::Range<u64>) -> RafsError {
    malformed("dirent name offset", at, format!("entry {slot}: a name from {} to {}", name.start, name.end))
}

impl V6 {
    /// The inode that `name` names in a directory of `size` bytes at `place`. Binary search over the blocks by first
    /// name, then in the one block that can hold it.
    #[inline]
    pub(in crate::rafs) fn find(
        &self,
        place: &V6Place,
        size: u64,
        name: &[u8],
    ) -> Result<Option<InodeFacts>, RafsError> {
        let needle = Needle::new(name);
        // Invariant: blocks below `low` start with a name <= `name`, those from `high` on with a greater one. The first
        // block needs no look: what is not in it if the name sorts before all others is not found there either.
        let (mut low, mut high) = (1u64, self.blocks.count(size));
        while low < high {
            let middle = low.midpoint(high);
            let (at, len) = self.data_block(place, size, middle);
            let order = Block::new(&self.view, at, len)?.compare(0, &needle)?;
            if order == Ordering::Greater { high = middle } else { low = middle.saturating_add(1) }
        }
        let (at, len) = self.data_block(place, size, low.saturating_sub(1));
        let block = Block::new(&self.view, at, len)?;
        let (mut low, mut high) = (0u64, block.count);
        while low < high {
            let middle = low.midpoint(high);
            match block.compare(middle, &needle)? {
                Ordering::Equal => return self.target(&block.entry(middle)?.entry, at).map(Some),
                Ordering::Less => low = middle.saturating_add(1),
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The inode of an entry, which agrees with its type (section 14, rule 18).
    #[inline]
    fn target(&self, entry: &RawEntry, at: u64) -> Result<InodeFacts, RafsError> {
        let nid = entry.nid(at)?;
        let (stated, inode) = (entry.kind(at)?, self.inode(nid)?);
        if stated != inode.kind {
            return Err(malformed("dirent type", at, format!("{stated:?}, inode {nid} is {:?}", inode.kind)));
        }
        Ok(inode)
    }
}

/// A position in a listing: block number and slot, packed.
pub(in crate::rafs) struct Cursor<'a> {
    image: &'a V6,
    dir: u32,
    place: V6Place,
    size: u64,
    /// The block with `number`; `None` before the first.
    block: Option<Block<'a>>,
    number: u64,
    slot: u64,
    name: [u8; NAME_BUFFER_BYTES],
}

impl<'a> Cursor<'a> {
    #[inline]
    pub(in crate::rafs) fn new(image: &'a V6, dir: u32, place: V6Place, size: u64, from: u64) -> Self {
        let (number, slot) = (from >> SLOT_BITS, from & 0xffff);
        Self { image, dir, place, size, block: None, number, slot, name: [0; NAME_BUFFER_BYTES] }
    }

    #[inline]
    pub(in crate::rafs) fn next(&mut self) -> Option<Result<DirEntry<'_>, RafsError>> {
        let block = match self.advance() {
            Ok(block) => block?,
            Err(error) => return Some(Err(self.end(error))),
        };
        let slot = self.slot;
        self.slot = slot.saturating_add(1);
        // Block numbers of a file below 2 GiB have at most 22 bits, slots 9: nothing is lost, and the sum is never 0.
        let next = self.number << SLOT_BITS | self.slot;
        match read(&block, slot, self.dir, &mut self.name) {
            Ok((name, ino, kind)) => Some(Ok(DirEntry { name, ino, kind: kind.dirent_type(), next })),
            Err(error) => {
                self.number = u64::MAX;
                Some(Err(error))
            }
        }
    }

    /// The block that holds the next entry; `None` at the end of the directory.
    #[inline]
    fn advance(&mut self) -> Result<Option<Block<'a>>, RafsError> {
        loop {
            if self.number.checked_mul(self.image.blocks.bytes()).is_none_or(|offset| offset >= self.size) {
                return Ok(None);
            }
            let block = match self.block {
                Some(block) => block,
                None => {
                    let (at, len) = self.image.data_block(&self.place, self.size, self.number);
                    Block::new(&self.image.view, at, len)?
                }
            };
            if self.slot < block.count {
                self.block = Some(block);
                return Ok(Some(block));
            }
            self.block = None;
            (self.number, self.slot) = (self.number.saturating_add(1), 0);
        }
    }

    /// Ends the listing.
    fn end(&mut self, error: RafsError) -> RafsError {
        self.number = u64::MAX;
        error
    }
}

/// Name, nid and type of the entry `slot` of a block of the directory `dir`; the name is copied to `buffer`.
#[inline]
fn read<'b>(
    block: &Block<'_>,
    slot: u64,
    dir: u32,
    buffer: &'b mut [u8; NAME_BUFFER_BYTES],
) -> Result<(&'b [u8], u32, Kind), RafsError> {
    let at = block.at;
    let found = block.entry(slot)?;
    let name = block.copy_name(&found, buffer)?;
    if !is_legal_name(name) {
        return Err(malformed("dirent name", at, format!("entry {slot}: no legal name")));
    }
    let (nid, kind) = (found.entry.nid(at)?, found.entry.kind(at)?);
    let is_wrong = match name {
        b"." => nid != dir || kind != Kind::Directory,
        b".." => kind != Kind::Directory,
        _ => nid == 0,
    };
    if is_wrong {
        return Err(malformed("dirent nid", at, format!("{nid} ({kind:?}) in directory {dir}")));
    }
    Ok((name, nid, kind))
}
