//! Guest memory: the regions that a VMM shares with us, each under the SIGBUS guard.
//!
//! A [`GuestMap`] is one immutable table of regions; a changed table is a new map that shares the regions both have.
//! Addresses and lengths are the guest's word: every access is checked. Bytes may change while they are copied, so a
//! decision is made on a copy only, never on a second look.

#![expect(unsafe_code, reason = "guest memory is raw memory")]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::Bytes;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryMmap;
use vm_memory::GuestMemoryRegion;
use vm_memory::MmapRegion;
use vm_memory::VolatileSlice;

use super::copy;
use super::copy::Means;
use super::guard::Mark;
use super::guard::TableFull;
use super::guard::Watch;
use super::view::View;
use super::view::ViewError;

/// The guest's memory is not there: an address outside every region, or a page that could not be had.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
#[error("guest memory is not accessible there")]
pub struct Unreachable;

/// One region. The fields drop in this order: the guard ends before the unmap.
#[derive(Debug)]
struct Region {
    watch: Watch,
    mapping: Arc<MmapRegion<()>>,
}

/// Where one region lies: what every access needs, side by side.
#[derive(Debug)]
struct Extent {
    start: u64,
    len: u64,
    /// The byte of ours that is the guest's at `start`.
    host: *mut u8,
    mark: Mark,
}

/// One table of the guest's memory regions, in order of their addresses.
#[derive(Debug, Default)]
pub struct GuestMap {
    extents: Vec<Extent>,
    /// Keeps mapped what `extents` point to, place for place.
    regions: Vec<Arc<Region>>,
}

// SAFETY: `host` points into a region of the same map, which lives as long; what it points to is touched through
// `VolatileSlice` only, from any thread.
unsafe impl Send for GuestMap {}
// SAFETY: as above.
unsafe impl Sync for GuestMap {}

impl GuestMap {
    /// The map of `memory`. Regions that `previous` has too are shared with it, so that a page lost in one is lost in
    /// both.
    ///
    /// # Errors
    /// [`TableFull`]: no place for another watched map.
    pub fn new(memory: &GuestMemoryMmap<()>, previous: &Self) -> Result<Self, TableFull> {
        let mut map = Self { extents: Vec::new(), regions: Vec::with_capacity(memory.num_regions()) };
        for region in memory.iter() {
            let mapping = region.get_mmap();
            let known = previous.regions.iter().find(|known| Arc::ptr_eq(&known.mapping, &mapping));
            let known = match known {
                Some(known) => Arc::clone(known),
                None => {
                    let watch = Watch::new(mapping.as_ptr() as usize, mapping.size(), page_bytes(&mapping))?;
                    Arc::new(Region { watch, mapping })
                }
            };
            map.extents.push(Extent {
                start: region.start_addr().0,
                len: known.mapping.size() as u64,
                host: known.mapping.as_ptr(),
                mark: known.watch.mark(),
            });
            map.regions.push(known);
        }
        Ok(map)
    }

    /// The bytes from `address` on: all `len` of them, or as many as lie in the same region. `None` when `address` is
    /// outside every region.
    #[inline]
    pub fn window(&self, address: u64, len: usize) -> Option<Window<'_>> {
        let behind = self.extents.partition_point(|extent| extent.start <= address);
        let extent = self.extents.get(behind.checked_sub(1)?)?;
        let offset = address.wrapping_sub(extent.start);
        let left = extent.len.checked_sub(offset).filter(|left| *left > 0)?;
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
        // SAFETY: `offset` lies inside the mapping and `len` bytes follow it there; `self` keeps it mapped for the
        // window's life, and no reference to it exists anywhere.
        let slice = unsafe { VolatileSlice::new(extent.host.add(offset as usize), len) };
        Some(Window { slice, mark: extent.mark })
    }

    /// The `len` bytes from `address` on, if they lie in one region.
    #[inline]
    pub fn whole(&self, address: u64, len: usize) -> Option<Window<'_>> {
        self.window(address, len).filter(|window| window.len() == len)
    }

    /// Asks for the bytes at `address`, which are about to be read or written; an address without memory does no harm.
    #[inline]
    pub fn prefetch(&self, address: u64, len: usize) {
        if let Some(window) = self.window(address, len) {
            copy::prefetch(window.slice.ptr_guard().as_ptr(), window.len());
        }
    }

    /// Copies the bytes at `address` into `out`, across regions that touch.
    ///
    /// # Errors
    /// [`Unreachable`]; `out` then holds undefined bytes.
    #[inline]
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), Unreachable> {
        match self.whole(address, out.len()) {
            Some(window) => window.read(0, out),
            None => self.read_parts(address, out),
        }
    }

    /// [`Self::read`] across regions.
    #[cold]
    fn read_parts(&self, address: u64, out: &mut [u8]) -> Result<(), Unreachable> {
        let mut done = 0;
        while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let here = address.checked_add(done as u64).ok_or(Unreachable)?;
            let window = self.window(here, rest.len()).ok_or(Unreachable)?;
            let len = window.len();
            window.read(0, rest.get_mut(..len).ok_or(Unreachable)?)?;
            done += len;
        }
        Ok(())
    }
}

/// Bytes of guest memory inside one region.
#[derive(Debug, Clone)]
pub struct Window<'a> {
    slice: VolatileSlice<'a>,
    mark: Mark,
}

impl Window<'_> {
    /// Size in bytes; never 0 unless asked for 0.
    #[inline]
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.slice.is_empty()
    }

    /// Whether a page of the region was lost; what is written to it then does not reach the guest.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.mark.is_poisoned()
    }

    /// Copies `out.len()` bytes at `offset` out of the guest.
    ///
    /// # Errors
    /// [`Unreachable`]; `out` then holds undefined bytes.
    #[inline]
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), Unreachable> {
        let from = self.part(offset, out.len())?;
        // SAFETY: `part` proved that the bytes lie inside the window, which is mapped for its life; `out` is ours alone
        // and no part of the guest's memory. The bytes may change while they are copied: they are plain bytes and are
        // looked at only in `out`.
        unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), out.as_mut_ptr(), out.len()) };
        self.unless_lost()
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    /// [`Unreachable`]: nothing that was written may be relied on.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Unreachable> {
        let to = self.part(offset, bytes.len())?;
        // SAFETY: as in `read`, the other way round; no reference to guest memory exists that this could break.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        self.unless_lost()
    }

    /// Copies `len` bytes of `view` from `from` to the beginning, by `means`, without a copy in between.
    ///
    /// # Errors
    /// The outer one is [`Unreachable`], the inner one the source's.
    #[inline]
    pub fn write_view(
        &self,
        view: &View,
        from: u64,
        len: usize,
        means: Means,
    ) -> Result<Result<(), ViewError>, Unreachable> {
        let part = self.slice.subslice(0, len).map_err(|_| Unreachable)?;
        let copied = view.copy_to_guest(from, &part, means);
        self.unless_lost()?;
        Ok(copied)
    }

    /// The little-endian number at `offset`, which must be aligned.
    ///
    /// # Errors
    /// [`Unreachable`], also when it is not aligned.
    #[inline]
    pub fn load_u16(&self, offset: usize, order: Ordering) -> Result<u16, Unreachable> {
        self.slice.load::<u16>(offset, order).map(u16::from_le).map_err(|_| Unreachable)
    }

    /// Stores a little-endian number at `offset`, which must be aligned.
    ///
    /// # Errors
    /// [`Unreachable`], also when it is not aligned.
    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) -> Result<(), Unreachable> {
        self.slice.store::<u16>(value.to_le(), offset, order).map_err(|_| Unreachable)
    }

    /// Address of the byte at `offset`, which `len` bytes follow inside the window.
    #[inline]
    fn part(&self, offset: usize, len: usize) -> Result<*mut u8, Unreachable> {
        match self.slice.len().checked_sub(offset) {
            // Without a bitmap and outside of Xen the guard keeps nothing.
            Some(room) if len <= room => Ok(self.slice.ptr_guard_mut().as_ptr().wrapping_add(offset)),
            _ => Err(Unreachable),
        }
    }

    #[inline]
    fn unless_lost(&self) -> Result<(), Unreachable> {
        if self.mark.is_poisoned() { Err(Unreachable) } else { Ok(()) }
    }
}

/// Bytes of a page behind `mapping`: a lost huge page must be covered as a whole.
fn page_bytes(mapping: &MmapRegion<()>) -> usize {
    /// `HUGETLBFS_MAGIC` of `linux/magic.h`.
    const HUGETLBFS: u32 = 0x9584_58f6;
    const SMALL: usize = 4096;
    let Some(file) = mapping.file_offset() else { return SMALL };
    match rustix::fs::fstatfs(file.file().as_fd()) {
        // The type is a signed or unsigned word, depending on the architecture; the magic has 32 bits.
        Ok(facts) if facts.f_type as u32 == HUGETLBFS => usize::try_from(facts.f_bsize).unwrap_or(SMALL).max(SMALL),
        _ => SMALL,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::MemfdFlags;
    use vm_memory::FileOffset;
    use vm_memory::GuestAddress;

    use super::*;

    fn memfd(len: u64) -> File {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn memory(regions: &[(u64, usize)]) -> GuestMemoryMmap<()> {
        let with_files = regions
            .iter()
            .map(|(start, len)| (GuestAddress(*start), *len, Some(FileOffset::new(memfd(*len as u64), 0))));
        GuestMemoryMmap::from_ranges_with_files(with_files.collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn window_ends_at_its_region_and_read_crosses_touching_ones() {
        let memory = memory(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
        let map = GuestMap::new(&memory, &GuestMap::default()).unwrap();
        assert_eq!(map.window(0x1ff0, 0x100).map(|w| w.len()), Some(0x10));
        assert!(map.whole(0x1ff0, 0x100).is_none());
        assert!(map.whole(0x1ff0, 0x10).is_some());
        for outside in [0, 0xfff, 0x3000, 0x7fff, 0x9000, u64::MAX] {
            assert!(map.window(outside, 1).is_none(), "{outside:#x}");
        }
        map.window(0x1ff0, 16).unwrap().write(0, &[1; 16]).unwrap();
        map.window(0x2000, 16).unwrap().write(0, &[2; 16]).unwrap();
        let mut out = [0; 32];
        assert_eq!(map.read(0x1ff0, &mut out), Ok(()));
        assert_eq!(out[..16], [1; 16]);
        assert_eq!(out[16..], [2; 16]);
        assert_eq!(map.read(0x2ff0, &mut out), Err(Unreachable));
        assert_eq!(map.read(u64::MAX - 3, &mut out), Err(Unreachable));
    }

    #[test]
    fn truncated_region_is_lost_and_stays_lost_in_the_next_map() {
        let file = memfd(0x4000);
        let ranges = [(GuestAddress(0), 0x4000, Some(FileOffset::new(file.try_clone().unwrap(), 0)))];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        let map = GuestMap::new(&memory, &GuestMap::default()).unwrap();
        file.set_len(0x1000).unwrap();
        assert_eq!(map.window(0x2000, 8).unwrap().write(0, &[1; 8]), Err(Unreachable));
        let next = GuestMap::new(&memory, &map).unwrap();
        assert!(next.window(0, 8).unwrap().is_lost());
    }
}
