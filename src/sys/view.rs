//! Read-only windows of bytes that may vanish under us: maps of files, or memory of our own.
//!
//! A [`View`] copies out, checked on every use; it never hands out a reference into a map, because the file can change
//! or shrink at any time. A lost page shows as [`ViewError::Lost`] (see [`super::guard`]), for that map from then on.
//!
//! The page in which a truncated file now ends is not lost: it reads as zeros behind the end, without any signal. So the
//! last byte of a map is looked at after each copy. The kernel takes pages behind the new end away before it clears the
//! rest of that page (not so XFS, which clears first). What cannot be seen is a cut within the file's last page.

#![expect(unsafe_code, reason = "memory maps are raw memory")]

use std::cmp::Ordering;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use super::copy;
use super::copy::Means;
use super::guard::Mark;
use super::guard::Watch;
use crate::limits::PREFETCHED_BYTES;

/// Why bytes of a [`View`] could not be had.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum ViewError {
    /// The range ends behind the end of the view.
    #[error("{len} bytes at offset {offset:#x} are beyond the end ({size} bytes)")]
    OutOfBounds {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the view.
        size: u64,
    },
    /// The file behind the map was truncated or its disk failed.
    #[error("the file behind the map was truncated or cannot be read")]
    Lost,
}

/// Raw memory and what keeps it alive. The fields drop in this order: the guard ends before the unmap.
struct Region {
    watch: Option<Watch>,
    start: *const u8,
    len: usize,
    backing: Backing,
}

enum Backing {
    /// Keeps the bytes that `start` points to alive.
    Owned(#[expect(dead_code, reason = "held for its memory")] Box<[u8]>),
    Mapped,
    Empty,
}

// SAFETY: the memory is only read through `copy_out`, which tolerates concurrent changes; unmapping happens once, in
// Drop, when no other reference exists.
unsafe impl Send for Region {}
// SAFETY: as above; `Watch` is a table index with atomics behind it.
unsafe impl Sync for Region {}

impl Drop for Region {
    fn drop(&mut self) {
        self.watch = None;
        if matches!(self.backing, Backing::Mapped) {
            // SAFETY: the range was mapped by `View::map_file` with this length, and nobody refers to it any more.
            let _ = unsafe { rustix::mm::munmap(self.start.cast_mut().cast(), self.len) };
        }
    }
}

/// A read-only window over bytes; cheap to clone, safe to share.
#[derive(Clone)]
pub struct View {
    /// First byte of the view, last byte of the region, and its mark: every read needs them, and no way through the
    /// region.
    first: *const u8,
    len: usize,
    last: *const u8,
    mark: Mark,
    region: Arc<Region>,
}

// SAFETY: `first` and `last` point into `region`, which may be sent and shared and lives as long, or to a constant.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl std::fmt::Debug for View {
    /// Shows the size, not the bytes.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("len", &self.len).finish_non_exhaustive()
    }
}

impl View {
    /// Maps the first `len` bytes of `file`, shared and read-only. A `len` beyond the page in which the file ends is
    /// allowed; every read is then [`ViewError::Lost`].
    ///
    /// # Errors
    /// What `mmap` answers; `ENOMEM` also when `limits::GUARDED_MAPS` maps exist.
    pub fn map_file(file: BorrowedFd<'_>, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        if len == 0 {
            return Ok(Self::from_region(Region {
                watch: None,
                start: std::ptr::null(),
                len: 0,
                backing: Backing::Empty,
            }));
        }
        // SAFETY: a new mapping at an address the kernel chooses; it aliases nothing of ours.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, 0)? }
            .cast::<u8>();
        let mut region = Region { watch: None, start, len, backing: Backing::Mapped };
        let watch = Watch::new(start as usize, len, 4096).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        region.watch = Some(watch);
        Ok(Self::from_region(region))
    }

    /// Copies the first `len` bytes of `file` into a sealed memory file and maps that: later changes of the file do
    /// not show. Reads the whole file once.
    ///
    /// # Errors
    /// What reading the file and making the memory file answer; `UnexpectedEof` when the file is shorter.
    pub fn sealed_copy(file: BorrowedFd<'_>, len: u64) -> io::Result<Self> {
        let memory: OwnedFd = rustix::fs::memfd_create("bootstrap", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memory, len)?;
        let mut buffer = vec![0u8; 1 << 20];
        let mut offset = 0u64;
        while offset < len {
            let want = buffer.len().min(usize::try_from(len - offset).unwrap_or(usize::MAX));
            let got = rustix::io::pread(file, &mut buffer[..want], offset)?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut written = 0;
            while written < got {
                written += rustix::io::pwrite(&memory, &buffer[written..got], offset + written as u64)?;
            }
            offset += got as u64;
        }
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
        Self::map_file(memory.as_fd(), len)
    }

    /// A view of memory of our own.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        let bytes = bytes.into_boxed_slice();
        Self::from_region(Region {
            watch: None,
            start: bytes.as_ptr(),
            len: bytes.len(),
            backing: Backing::Owned(bytes),
        })
    }

    fn from_region(region: Region) -> Self {
        let mark = region.watch.as_ref().map_or(Mark::never(), Watch::mark);
        static NOTHING: u8 = 0;
        let last = region.len.checked_sub(1).map_or(&raw const NOTHING, |last| region.start.wrapping_add(last));
        Self { first: region.start, len: region.len, last, mark, region: Arc::new(region) }
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether a page of the underlying map was lost; every read fails from then on.
    pub fn is_lost(&self) -> bool {
        self.mark.is_poisoned()
    }

    /// The part `range` of this view, sharing its memory.
    ///
    /// # Errors
    /// [`ViewError::OutOfBounds`].
    pub fn slice(&self, range: Range<u64>) -> Result<Self, ViewError> {
        let len = range.end.checked_sub(range.start).ok_or(self.out_of_bounds(range.start, 0))?;
        let start = self.checked(range.start, len)?;
        let first = self.pointer(start);
        Ok(Self { first, len: len as usize, last: self.last, mark: self.mark, region: Arc::clone(&self.region) })
    }

    /// Copies the bytes at `offset` into `out`.
    ///
    /// # Errors
    /// [`ViewError`]; `out` then holds undefined bytes.
    #[inline]
    pub fn copy_at(&self, offset: u64, out: &mut [u8]) -> Result<(), ViewError> {
        let start = self.checked(offset, out.len() as u64)?;
        // SAFETY: `checked` proved start + out.len() <= self.len, and the view lies inside its region, which the Arc
        // keeps mapped; a fault is turned into poison by the guard. The bytes may change while they are copied: they
        // are plain bytes and are looked at only in `out`.
        unsafe { std::ptr::copy_nonoverlapping(self.pointer(start), out.as_mut_ptr(), out.len()) };
        self.unless_lost()
    }

    /// Asks for the first bytes of those at `offset`, at most `limits::PREFETCHED_BYTES`, so that a copy that follows
    /// need not wait for them. Reads nothing and never fails.
    #[inline]
    pub fn prefetch(&self, offset: u64, len: usize) {
        if let Ok(start) = self.checked(offset, len as u64) {
            copy::prefetch(self.pointer(start), len.min(PREFETCHED_BYTES));
        }
    }

    /// Copies `dst.len()` bytes at `offset` straight into guest memory and marks them dirty.
    ///
    /// # Errors
    /// [`ViewError`]; `dst` then holds undefined bytes.
    #[inline]
    pub fn copy_to_guest<B: BitmapSlice>(
        &self,
        offset: u64,
        dst: &VolatileSlice<'_, B>,
        means: Means,
    ) -> Result<(), ViewError> {
        let start = self.checked(offset, dst.len() as u64)?;
        let target = dst.ptr_guard_mut();
        // SAFETY: the source as in `copy_at`; the target is valid for dst.len() bytes by `VolatileSlice`'s contract and
        // no Rust reference to it exists. Guest memory and our maps never overlap.
        unsafe { copy::copy(self.pointer(start), target.as_ptr(), dst.len(), means) };
        dst.bitmap().mark_dirty(0, dst.len());
        self.unless_lost()
    }

    /// The `N` bytes at `offset`.
    ///
    /// # Errors
    /// [`ViewError`].
    #[inline]
    pub fn array_at<const N: usize>(&self, offset: u64) -> Result<[u8; N], ViewError> {
        let mut out = [0; N];
        self.copy_at(offset, &mut out)?;
        Ok(out)
    }

    /// The little-endian number at `offset`.
    ///
    /// # Errors
    /// [`ViewError`].
    #[inline]
    pub fn u16_at(&self, offset: u64) -> Result<u16, ViewError> {
        self.array_at(offset).map(u16::from_le_bytes)
    }

    /// The little-endian number at `offset`.
    ///
    /// # Errors
    /// [`ViewError`].
    #[inline]
    pub fn u32_at(&self, offset: u64) -> Result<u32, ViewError> {
        self.array_at(offset).map(u32::from_le_bytes)
    }

    /// The little-endian number at `offset`.
    ///
    /// # Errors
    /// [`ViewError`].
    #[inline]
    pub fn u64_at(&self, offset: u64) -> Result<u64, ViewError> {
        self.array_at(offset).map(u64::from_le_bytes)
    }

    /// A copy of the record at `offset`.
    ///
    /// # Errors
    /// [`ViewError`].
    #[inline]
    pub fn record_at<T: FromBytes + IntoBytes>(&self, offset: u64) -> Result<T, ViewError> {
        let mut record = T::new_zeroed();
        self.copy_at(offset, record.as_mut_bytes())?;
        Ok(record)
    }

    /// A copy of `len` bytes at `offset`. The length is checked against the view before anything is allocated.
    ///
    /// # Errors
    /// [`ViewError`].
    pub fn vec_at(&self, offset: u64, len: u64) -> Result<Vec<u8>, ViewError> {
        self.checked(offset, len)?;
        let mut out = vec![0; len as usize];
        self.copy_at(offset, &mut out)?;
        Ok(out)
    }

    /// Orders the `len` bytes at `offset` against `other`, bytewise. Names are short: they are copied to the stack first.
    ///
    /// # Errors
    /// [`ViewError`].
    #[inline]
    pub fn compare_at(&self, offset: u64, len: u64, other: &[u8]) -> Result<Ordering, ViewError> {
        let mut buffer = [0u8; 256];
        let mut done = 0u64;
        while done < len {
            let step = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
            let ours = &mut buffer[..step];
            self.copy_at(offset + done, ours)?;
            let theirs = &other[(done as usize).min(other.len())..];
            let common = step.min(theirs.len());
            match ours[..common].cmp(&theirs[..common]) {
                Ordering::Equal if common < step => return Ok(Ordering::Greater),
                Ordering::Equal => done += step as u64,
                unequal => return Ok(unequal),
            }
        }
        Ok(len.cmp(&(other.len() as u64)))
    }

    #[inline]
    fn checked(&self, offset: u64, len: u64) -> Result<usize, ViewError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len as u64 => Ok(offset as usize),
            _ => Err(self.out_of_bounds(offset, len)),
        }
    }

    #[cold]
    fn out_of_bounds(&self, offset: u64, len: u64) -> ViewError {
        ViewError::OutOfBounds { offset, len, size: self.len as u64 }
    }

    /// To be called after each copy.
    #[inline]
    fn unless_lost(&self) -> Result<(), ViewError> {
        // The copy comes before the look, as in `Mark::is_poisoned`.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        // SAFETY: `last` is the last byte of the region, or a byte of our own where that has none; a fault is turned into
        // poison by the guard. The load is volatile: its value is of no interest, that it happens is.
        unsafe { self.last.read_volatile() };
        if self.mark.is_poisoned() { Err(ViewError::Lost) } else { Ok(()) }
    }

    /// Address of byte `start` of this view; within or one behind the region.
    #[inline]
    fn pointer(&self, start: usize) -> *const u8 {
        self.first.wrapping_add(start)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn reads_inside_the_bounds_match_and_beyond_are_refused() {
        let view = View::from_bytes((0..=255).collect());
        assert_eq!(view.u32_at(4), Ok(0x0706_0504));
        assert_eq!(view.array_at::<2>(254), Ok([254, 255]));
        assert!(matches!(view.u16_at(255), Err(ViewError::OutOfBounds { .. })));
        assert!(matches!(view.vec_at(u64::MAX, 2), Err(ViewError::OutOfBounds { .. })));
        let part = view.slice(16..32).unwrap();
        assert_eq!(part.u16_at(0), Ok(0x1110));
        assert!(part.u64_at(9).is_err());
    }

    #[test]
    fn compare_orders_like_slices() {
        let view = View::from_bytes(b"abcdef".to_vec());
        for other in [&b""[..], b"a", b"abc", b"abcdef", b"abcdefg", b"abd", b"b", b"aaaaaaaaa"] {
            assert_eq!(view.compare_at(0, 6, other), Ok(b"abcdef"[..].cmp(other)), "{other:?}");
        }
        let long = View::from_bytes(vec![7; 1000]);
        assert_eq!(long.compare_at(0, 1000, &[7; 1000]), Ok(Ordering::Equal));
        assert_eq!(long.compare_at(0, 1000, &[7; 999]), Ok(Ordering::Greater));
    }

    #[test]
    fn truncated_file_gives_lost_and_the_process_lives() {
        let file = file_of(&[9; 16384]);
        let view = View::map_file(file.as_fd(), 16384).unwrap();
        assert_eq!(view.u16_at(8192), Ok(0x0909));
        file.set_len(4096).unwrap();
        assert_eq!(view.u16_at(8192), Err(ViewError::Lost));
        assert!(view.is_lost());
        assert_eq!(view.u16_at(0), Err(ViewError::Lost), "a poisoned map stays poisoned");
        let again = View::map_file(file.as_fd(), 4096).unwrap();
        assert_eq!(again.u16_at(0), Ok(0x0909));
    }

    #[test]
    fn page_in_which_a_truncated_file_ends_is_not_zeros_but_lost() {
        for keep in [1, 4000, 4096, 5000, 8191] {
            let file = file_of(&[9; 16384]);
            let view = View::map_file(file.as_fd(), 16384).unwrap();
            let part = view.slice(0..8192).unwrap();
            assert_eq!(part.u16_at(8190), Ok(0x0909));
            file.set_len(keep).unwrap();
            for offset in [0, keep - 1, 8190] {
                assert_eq!(part.u16_at(offset), Err(ViewError::Lost), "cut to {keep}, offset {offset}");
            }
        }
    }

    /// The thread that meets the fault is not the only one that meets the page laid over it.
    #[test]
    fn page_lost_under_two_threads_is_data_for_neither() {
        for round in 0..2000 {
            let file = file_of(&[9; 4096]);
            let view = View::map_file(file.as_fd(), 4096).unwrap();
            assert_eq!(view.u16_at(0), Ok(0x0909));
            file.set_len(0).unwrap();
            let start = std::sync::Barrier::new(2);
            let look = || {
                start.wait();
                (0..50).map(|_| view.u16_at(0)).find(|seen| *seen != Err(ViewError::Lost))
            };
            let seen = std::thread::scope(|scope| {
                let other = scope.spawn(look);
                (look(), other.join().unwrap())
            });
            assert_eq!(seen, (None, None), "round {round}");
        }
    }

    #[test]
    fn sealed_copy_survives_truncation() {
        let file = file_of(&[5; 10000]);
        let view = View::sealed_copy(file.as_fd(), 10000).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(view.vec_at(0, 10000), Ok(vec![5; 10000]));
    }
}
