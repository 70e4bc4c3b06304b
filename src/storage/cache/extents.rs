//! What this process knows of ready chunks: one word per chunk, looked at without a lock on every read.
//!
//! A word says that the chunk is ready and verified as far as the settings ask, where it lies in the data file, and
//! whether it is believed to be in the page cache. The place is part of the word because a read plan names chunk and
//! offset separately: a piece outside its chunk's range would show bytes that nobody verified.
//!
//! Words are grouped in pages that are made when first written, so a blob costs nothing until it is used.

use crate::storage::sync::AtomicU64;
use crate::storage::sync::OnceLock;
use crate::storage::sync::Ordering;

/// Chunks per page: 4 KiB of words.
const PAGE_CHUNKS: usize = 512;

/// Bits 0..25: bytes of the chunk, 1 to 2^24. 0 = nothing is known.
pub(super) const LEN_BITS: u32 = 25;
/// Bits 25..63: offset in units of the blob's alignment.
const OFFSET_BITS: u32 = 38;
/// Bit 63: believed to be in the page cache.
const TOUCHED: u64 = 1 << 63;

/// Length and offset in one word; `None` if they cannot be expressed in units of `1 << shift`, or there is no length.
pub(super) fn pack(offset: u64, len: u32, shift: u32) -> Option<u64> {
    let units = offset >> shift;
    let is_expressible = units < 1 << OFFSET_BITS && units << shift == offset && len > 0 && len < 1 << LEN_BITS;
    is_expressible.then_some(units << LEN_BITS | u64::from(len))
}

type Page = Box<[AtomicU64]>;

/// The words of one blob.
#[derive(Debug)]
pub struct Extents {
    pages: Box<[OnceLock<Page>]>,
    /// Offsets are multiples of `1 << shift`.
    shift: u32,
}

/// Where a ready chunk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the data file.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// Whether it is believed to be in the page cache.
    pub touched: bool,
}

impl Extent {
    /// Whether the bytes `offset .. offset + len` are part of the chunk.
    #[inline]
    pub fn holds(&self, offset: u64, len: u32) -> bool {
        offset
            .checked_sub(self.offset)
            .is_some_and(|skip| skip.checked_add(u64::from(len)).is_some_and(|end| end <= u64::from(self.len)))
    }
}

impl Extents {
    /// Words for `chunks` chunks, whose offsets are all multiples of `1 << shift`.
    pub fn new(chunks: u32, shift: u32) -> Self {
        let pages = (chunks as usize).div_ceil(PAGE_CHUNKS);
        Self { pages: (0..pages).map(|_| OnceLock::new()).collect(), shift }
    }

    /// What is known of `chunk`.
    #[inline]
    pub fn get(&self, chunk: u32) -> Option<Extent> {
        let page = self.pages.get(chunk as usize / PAGE_CHUNKS)?.get()?;
        // Acquire: pairs with the Release in `set`; the chunk's data is then visible.
        let word = page[chunk as usize % PAGE_CHUNKS].load(Ordering::Acquire);
        if word == 0 {
            return None;
        }
        let units = (word & !TOUCHED) >> LEN_BITS;
        let len = (word & ((1 << LEN_BITS) - 1)) as u32;
        Some(Extent { offset: units << self.shift, len, touched: word & TOUCHED != 0 })
    }

    /// `chunk` is ready at this extent. An extent that cannot be expressed is not noted: the chunk then takes the slow
    /// way on every read.
    pub fn set(&self, chunk: u32, extent: Extent) {
        let page = self.pages.get(chunk as usize / PAGE_CHUNKS);
        let (Some(page), Some(place)) = (page, pack(extent.offset, extent.len, self.shift)) else { return };
        let page = page.get_or_init(|| (0..PAGE_CHUNKS).map(|_| AtomicU64::new(0)).collect());
        let touched = if extent.touched { TOUCHED } else { 0 };
        // Release: the data was written, or verified, before.
        page[chunk as usize % PAGE_CHUNKS].store(touched | place, Ordering::Release);
    }

    /// Nothing is known of `chunk` any more.
    pub fn forget(&self, chunk: u32) {
        if let Some(page) = self.pages.get(chunk as usize / PAGE_CHUNKS).and_then(OnceLock::get) {
            page[chunk as usize % PAGE_CHUNKS].store(0, Ordering::Release);
        }
    }

    /// No chunk is believed to be in the page cache any more; ready ones stay ready.
    pub fn untouch_all(&self) {
        for word in self.pages.iter().filter_map(OnceLock::get).flat_map(|page| page.iter()) {
            // Relaxed: the bit is a hint and orders nothing.
            word.fetch_and(!TOUCHED, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_offset_length_and_hint() {
        let extents = Extents::new(2000, 12);
        for (chunk, offset, len) in [(0, 0, 1), (511, 4096, 4096), (512, (1 << 44) - 4096, 1 << 24), (1999, 8192, 77)] {
            for touched in [false, true] {
                let extent = Extent { offset, len, touched };
                assert_eq!(extents.get(chunk).is_none(), !touched);
                extents.set(chunk, extent);
                assert_eq!(extents.get(chunk), Some(extent));
            }
        }
        extents.untouch_all();
        assert_eq!(extents.get(1999), Some(Extent { offset: 8192, len: 77, touched: false }));
        extents.forget(1999);
        assert_eq!(extents.get(1999), None);
        assert_eq!(extents.get(1), None);
    }

    #[test]
    fn what_cannot_be_expressed_is_not_noted() {
        let extents = Extents::new(10, 12);
        for (chunk, offset, len) in [(0, 4097, 5), (1, 1 << 60, 5), (2, 0, 0), (10_000, 0, 5), (u32::MAX, 0, 5)] {
            extents.set(chunk, Extent { offset, len, touched: true });
            assert_eq!(extents.get(chunk), None, "{chunk}");
        }
    }

    #[test]
    fn pieces_outside_the_chunk_are_not_held() {
        let extent = Extent { offset: 100, len: 50, touched: true };
        for (offset, len, held) in
            [(100, 50, true), (149, 1, true), (100, 51, false), (99, 1, false), (150, 1, false), (u64::MAX, 1, false)]
        {
            assert_eq!(extent.holds(offset, len), held, "{offset} {len}");
        }
    }
}
