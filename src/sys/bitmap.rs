//! Bytes of a file that several processes change at once through shared maps: readiness bitmaps, and records of words.
//!
//! Every access is one atomic operation on one byte, or on one aligned word of 8 bytes in the machine's order; nobody
//! uses both kinds on the same bytes. The file may shrink or its disk may fail: the SIGBUS guard turns
//! that into [`Lost`], for this map from then on.

#![expect(unsafe_code, reason = "memory maps are raw memory")]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;

use super::guard::Watch;

/// The file behind the map was truncated or its disk failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the file behind the bitmap was truncated or cannot be read")]
pub struct Lost;

/// A shared, writable map of the first bytes of a file. The fields drop in this order: the guard ends before the unmap.
#[derive(Debug)]
pub struct SharedBytes {
    watch: Option<Watch>,
    map: Map,
}

#[derive(Debug)]
struct Map {
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory is only touched through atomic operations on single bytes and aligned words; unmapping happens once, in Drop.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `SharedBytes::map` with this length, and nobody refers to it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
    }
}

impl SharedBytes {
    /// Maps the first `len` bytes of `file`, which must be open for reading and writing.
    ///
    /// # Errors
    /// What `mmap` answers (`EINVAL` for no bytes); `ENOMEM` also when `limits::GUARDED_MAPS` maps exist.
    pub fn map(file: BorrowedFd<'_>, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address the kernel chooses; it aliases nothing of ours.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, file, 0)? };
        let mut bytes = Self { watch: None, map: Map { start: start.cast(), len } };
        let watch = Watch::new(start as usize, len, 4096).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        bytes.watch = Some(watch);
        Ok(bytes)
    }

    /// Bytes of the map.
    pub fn len(&self) -> usize {
        self.map.len
    }

    /// Whether there is no byte; never, since such a map cannot be made.
    pub fn is_empty(&self) -> bool {
        self.map.len == 0
    }

    /// The byte at `offset`; Acquire, so what its writer did before setting bits is visible.
    ///
    /// # Errors
    /// [`Lost`].
    ///
    /// # Panics
    /// When `offset` lies outside the map.
    #[inline]
    pub fn get(&self, offset: usize) -> Result<u8, Lost> {
        let byte = self.byte(offset).load(Ordering::Acquire);
        self.unless_lost(byte)
    }

    /// Sets the bits `mask` of the byte at `offset` and returns what it was. Release, so that what this thread did
    /// before is visible to whoever sees the bits.
    ///
    /// # Errors
    /// [`Lost`].
    ///
    /// # Panics
    /// When `offset` lies outside the map.
    pub fn set(&self, offset: usize, mask: u8) -> Result<u8, Lost> {
        let old = self.byte(offset).fetch_or(mask, Ordering::AcqRel);
        self.unless_lost(old)
    }

    /// Clears the bits `mask` of the byte at `offset` and returns what it was.
    ///
    /// # Errors
    /// [`Lost`].
    ///
    /// # Panics
    /// When `offset` lies outside the map.
    pub fn clear(&self, offset: usize, mask: u8) -> Result<u8, Lost> {
        let old = self.byte(offset).fetch_and(!mask, Ordering::AcqRel);
        self.unless_lost(old)
    }

    /// The word at `offset`; Acquire, as [`SharedBytes::get`].
    ///
    /// # Errors
    /// [`Lost`].
    ///
    /// # Panics
    /// When the word lies outside the map or `offset` is no multiple of 8.
    #[inline]
    pub fn word(&self, offset: usize) -> Result<u64, Lost> {
        let word = self.word_at(offset).load(Ordering::Acquire);
        self.unless_lost(word)
    }

    /// Makes the word at `offset` `new` if it is `old`; otherwise `Ok(false)`. Acquire and Release.
    ///
    /// # Errors
    /// [`Lost`].
    ///
    /// # Panics
    /// As [`SharedBytes::word`].
    pub fn replace_word(&self, offset: usize, old: u64, new: u64) -> Result<bool, Lost> {
        let done = self.word_at(offset).compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok();
        self.unless_lost(done)
    }

    fn word_at(&self, offset: usize) -> &AtomicU64 {
        let is_inside = offset.checked_add(8).is_some_and(|end| end <= self.map.len);
        assert!(is_inside && offset.is_multiple_of(8), "word {offset} of a map of {} bytes", self.map.len);
        // SAFETY: the word lies inside the map (checked above), which lives as long as `self`; maps begin at page
        // borders, so it is aligned; other processes change it by whole words only.
        unsafe { AtomicU64::from_ptr(self.map.start.add(offset).cast()) }
    }

    #[inline]
    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.map.len, "byte {offset} of a map of {} bytes", self.map.len);
        // SAFETY: the byte lies inside the map (checked above), which lives as long as `self`; AtomicU8 has alignment 1;
        // other processes and the kernel change it by whole bytes only.
        unsafe { AtomicU8::from_ptr(self.map.start.add(offset)) }
    }

    #[inline]
    fn unless_lost<T>(&self, value: T) -> Result<T, Lost> {
        match &self.watch {
            Some(watch) if watch.is_poisoned() => Err(Lost),
            _ => Ok(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn two_maps_of_one_file_share_their_bits() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        let one = SharedBytes::map(file.as_fd(), 5000).unwrap();
        let two = SharedBytes::map(file.as_fd(), 5000).unwrap();
        assert_eq!(one.set(4999, 0x81), Ok(0));
        assert_eq!(two.set(4999, 0x02), Ok(0x81));
        assert_eq!(one.clear(4999, 0x80), Ok(0x83));
        assert_eq!(two.get(4999), Ok(0x03));
    }

    #[test]
    fn words_are_replaced_only_if_they_are_as_expected() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let one = SharedBytes::map(file.as_fd(), 4096).unwrap();
        let two = SharedBytes::map(file.as_fd(), 4096).unwrap();
        assert_eq!(one.replace_word(4088, 0, 7), Ok(true));
        assert_eq!(two.replace_word(4088, 0, 8), Ok(false));
        assert_eq!(two.word(4088), Ok(7));
        file.set_len(0).unwrap();
        assert_eq!(two.word(4088), Err(Lost));
    }

    #[test]
    fn truncated_file_gives_lost_and_the_process_lives() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let bytes = SharedBytes::map(file.as_fd(), 8192).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(bytes.set(5000, 1), Err(Lost));
        assert_eq!(bytes.get(0), Err(Lost));
    }

    #[test]
    fn no_bytes_cannot_be_mapped() {
        let file = tempfile::tempfile().unwrap();
        assert!(SharedBytes::map(file.as_fd(), 0).is_err());
    }
}
