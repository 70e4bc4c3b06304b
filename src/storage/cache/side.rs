//! Our side file of a blob, `<id>.nydus_state`: which chunks may be believed, and the locks by which processes agree.
//!
//! ```text
//! 0     8   magic "NYDSTATE"
//! 8     4   version 1
//! 12    4   chunks
//! 16   16   boot id of the last setup
//! 32    8   inode number of the data file
//! 40    8   its time of birth, ns
//! 48    8   its size in bytes
//! 56 4040   0
//! 4096      bitmap `trusted`, ceil(chunks / 8) bytes, least significant bit first, padded to 8
//!           bitmap `synced`, the same
//! ```
//!
//! `trusted`: one of our processes wrote or verified the chunk in this boot. `synced`: its data reached the disk. The
//! first opener under another boot id sets trusted := synced: what was written but not flushed before a power cut may
//! be anything. A header that does not fit (also: the data file is another one than noted) makes everything a hint.
//!
//! Locks are OFD locks on byte numbers far beyond the file's end: chunk *i* on byte *i* + 2^32, the setup
//! lock (exclusive while files are opened and made), the use lock (shared while a process has the blob open). They are
//! tried, never waited for in the kernel.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use super::chunk_map::read_exact_at;
use super::chunk_map::write_all_at;
use super::file::Identity;
use super::file::set_len_with_room;
use crate::storage::steps::Step;
use crate::storage::steps::pass;
use crate::sys::bitmap::SharedBytes;
use crate::sys::lock::Lock;
use crate::sys::lock::try_lock;

const MAGIC: &[u8; 8] = b"NYDSTATE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
/// Bytes of the header that carry something.
const FIELDS_BYTES: usize = 56;

/// Lock bytes of chunks begin here: apart from any byte that could be locked for its content.
const CHUNK_LOCKS: u64 = 1 << 32;
const SETUP_LOCK: Range<u64> = 1 << 40..(1 << 40) + 1;
const USE_LOCK: Range<u64> = (1 << 40) + 1..(1 << 40) + 2;

/// What the side file says it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// Chunks of the blob.
    pub chunks: u32,
    /// The data file that the bitmaps speak of.
    pub data: Identity,
    /// Size of the data file.
    pub data_bytes: u64,
}

/// How far an existing side file could be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It was made in this boot.
    SameBoot,
    /// It was made in another boot: trusted became synced.
    OtherBoot,
    /// It was new or did not fit: everything is a hint.
    Remade,
}

/// An open side file.
#[derive(Debug)]
pub struct SideFile {
    file: File,
    bits: SharedBytes,
    chunks: u32,
}

/// Takes the setup lock of `file`; `Ok(false)`: somebody has it.
pub fn try_setup(file: &File) -> io::Result<bool> {
    try_lock(file.as_fd(), SETUP_LOCK, Lock::Exclusive)
}

/// Gives the setup lock up.
pub fn end_setup(file: &File) -> io::Result<()> {
    try_lock(file.as_fd(), SETUP_LOCK, Lock::Unlock).map(drop)
}

/// Whether another process (or another store of this one) has the blob open. The setup lock is held.
pub fn is_used_by_others(file: &File) -> io::Result<bool> {
    let alone = try_lock(file.as_fd(), USE_LOCK, Lock::Exclusive)?;
    if alone {
        try_lock(file.as_fd(), USE_LOCK, Lock::Unlock)?;
    }
    Ok(!alone)
}

/// Whether the header of `file` speaks of `subject`.
pub fn fits(file: &File, subject: &Subject) -> io::Result<bool> {
    if file.metadata()?.len() != file_bytes(subject.chunks) {
        return Ok(false);
    }
    let mut header = [0; FIELDS_BYTES];
    read_exact_at(file, &mut header, 0)?;
    let boot_id = header.get(16..32).and_then(|id| id.try_into().ok()).unwrap_or_default();
    Ok(header == fields(subject, boot_id))
}

impl SideFile {
    /// Adopts `file`, whose setup lock is held, for `subject` in the boot `boot_id`, and marks the blob as in use.
    /// A file that does not fit ([`fits`]) is made anew, in place: the caller saw that nobody else uses it.
    ///
    /// # Errors
    /// What the system answers.
    pub fn adopt(file: File, subject: &Subject, boot_id: [u8; 16]) -> io::Result<(Self, Standing)> {
        let keep = fits(&file, subject)?;
        if !keep {
            // Shrinking to nothing first zeroes whatever was there.
            file.set_len(0)?;
            set_len_with_room(&file, file_bytes(subject.chunks))?;
            pass(Step::SideSized);
        }
        let bits = SharedBytes::map(file.as_fd(), file_bytes(subject.chunks))?;
        let side = Self { file, bits, chunks: subject.chunks };
        let mut old_boot = [0; 16];
        read_exact_at(&side.file, &mut old_boot, 16)?;
        let standing = match (keep, old_boot == boot_id) {
            (false, _) => Standing::Remade,
            (true, true) => Standing::SameBoot,
            (true, false) => {
                side.trust_only_synced();
                pass(Step::SideReduced);
                Standing::OtherBoot
            }
        };
        if standing != Standing::SameBoot {
            // Last: a process that dies before this leaves the old boot id, and the next opener does all of it again.
            write_all_at(&side.file, &fields(subject, boot_id), 0)?;
            pass(Step::SideReady);
        }
        try_lock(side.file.as_fd(), USE_LOCK, Lock::Shared)?;
        Ok((side, standing))
    }

    /// The file itself, for the setup lock.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the file was truncated or cannot be read; nothing is trusted then.
    pub fn is_lost(&self) -> bool {
        self.bits.get(0).is_err()
    }

    /// Whether `chunk` may be believed. A lost file trusts nothing.
    pub fn is_trusted(&self, chunk: u32) -> bool {
        let (offset, mask) = self.trusted(chunk);
        chunk < self.chunks && self.bits.get(offset).is_ok_and(|byte| byte & mask != 0)
    }

    /// `chunk` was written or verified.
    pub fn trust(&self, chunk: u32) {
        let (offset, mask) = self.trusted(chunk);
        if chunk < self.chunks {
            let _ = self.bits.set(offset, mask);
        }
    }

    /// `chunk` was found wrong. The change is on disk when this returns, so that a power cut while the chunk is written
    /// again does not find it trusted. Blocks on the disk.
    pub fn distrust(&self, chunk: u32) {
        if chunk >= self.chunks {
            return;
        }
        let (offset, mask) = self.trusted(chunk);
        let _ = self.bits.clear(offset, mask);
        let synced = self.bits.clear(offset + bitmap_bytes(self.chunks), mask);
        if synced.is_ok_and(|byte| byte & mask != 0) {
            let _ = rustix::fs::fdatasync(&self.file);
        }
    }

    /// The bitmap `trusted` as it is now: what [`SideFile::note_synced`] may be told after a flush that begins later.
    pub fn snapshot(&self) -> Vec<u8> {
        let bitmap = HEADER_BYTES..HEADER_BYTES + bitmap_bytes(self.chunks);
        bitmap.map(|offset| self.bits.get(offset).unwrap_or(0)).collect()
    }

    /// The data of the chunks in `snapshot` reached the disk.
    pub fn note_synced(&self, snapshot: &[u8]) {
        let start = HEADER_BYTES + bitmap_bytes(self.chunks);
        for (index, byte) in snapshot.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            let _ = self.bits.set(start + index, *byte);
        }
    }

    /// Takes the locks of `chunks`, all or none. `Ok(false)`: another process holds one of them.
    ///
    /// # Errors
    /// What the system answers when it cannot lock at all.
    pub fn try_lock_chunks(&self, chunks: Range<u32>) -> io::Result<bool> {
        try_lock(self.file.as_fd(), lock_range(chunks), Lock::Exclusive)
    }

    /// Gives the locks of `chunks` up.
    pub fn unlock_chunks(&self, chunks: Range<u32>) {
        // Cannot fail for a lock we hold but for lack of memory to split a range; then it goes with the descriptor.
        let _ = try_lock(self.file.as_fd(), lock_range(chunks), Lock::Unlock);
    }

    fn trust_only_synced(&self) {
        let bytes = bitmap_bytes(self.chunks);
        for trusted in HEADER_BYTES..HEADER_BYTES + bytes {
            let synced = self.bits.get(trusted + bytes).unwrap_or(0);
            let _ = self.bits.clear(trusted, !synced);
            let _ = self.bits.set(trusted, synced);
        }
    }

    fn trusted(&self, chunk: u32) -> (usize, u8) {
        (HEADER_BYTES + (chunk / 8) as usize, 1 << (chunk % 8))
    }
}

fn lock_range(chunks: Range<u32>) -> Range<u64> {
    CHUNK_LOCKS + u64::from(chunks.start)..CHUNK_LOCKS + u64::from(chunks.end)
}

fn bitmap_bytes(chunks: u32) -> usize {
    (chunks as usize).div_ceil(8).next_multiple_of(8)
}

fn file_bytes(chunks: u32) -> u64 {
    (HEADER_BYTES + 2 * bitmap_bytes(chunks)) as u64
}

fn fields(subject: &Subject, boot_id: [u8; 16]) -> [u8; FIELDS_BYTES] {
    let mut out = [0; FIELDS_BYTES];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&subject.chunks.to_le_bytes());
    out[16..32].copy_from_slice(&boot_id);
    out[32..40].copy_from_slice(&subject.data.inode.to_le_bytes());
    out[40..48].copy_from_slice(&subject.data.born_ns.to_le_bytes());
    out[48..56].copy_from_slice(&subject.data_bytes.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT_1: [u8; 16] = [1; 16];
    const BOOT_2: [u8; 16] = [2; 16];

    fn subject(inode: u64) -> Subject {
        Subject { chunks: 21, data: Identity { inode, born_ns: 5 }, data_bytes: 21 * 4096 }
    }

    #[test]
    fn next_boot_trusts_only_what_was_synced() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let adopt = |boot| SideFile::adopt(file.reopen().unwrap(), &subject(7), boot).unwrap();
        let (side, standing) = adopt(BOOT_1);
        assert_eq!(standing, Standing::Remade);
        side.trust(0);
        side.trust(20);
        let snapshot = side.snapshot();
        side.trust(9);
        side.note_synced(&snapshot);
        let trusted = |side: &SideFile| (0..30).filter(|chunk| side.is_trusted(*chunk)).collect::<Vec<_>>();
        assert_eq!(trusted(&side), [0, 9, 20]);
        let (same, standing) = adopt(BOOT_1);
        assert_eq!((trusted(&same), standing), (vec![0, 9, 20], Standing::SameBoot));
        drop((side, same));
        let (next, standing) = adopt(BOOT_2);
        assert_eq!((trusted(&next), standing), (vec![0, 20], Standing::OtherBoot));
        next.distrust(0);
        drop(next);
        let (back, standing) = adopt(BOOT_1);
        assert_eq!((trusted(&back), standing), (vec![20], Standing::OtherBoot), "distrust takes synced back too");
    }

    #[test]
    fn damaged_or_foreign_side_file_is_remade_with_nothing_trusted() {
        type Damage = fn(&File);
        let damage: [(&str, Damage); 4] = [
            ("magic", |file| write_all_at(file, b"X", 0).unwrap()),
            ("version", |file| write_all_at(file, &[9], 8).unwrap()),
            ("short", |file| file.set_len(4100).unwrap()),
            ("long", |file| file.set_len(1 << 20).unwrap()),
        ];
        for (name, damage) in damage {
            let file = tempfile::NamedTempFile::new().unwrap();
            SideFile::adopt(file.reopen().unwrap(), &subject(7), BOOT_1).unwrap().0.trust(3);
            damage(file.as_file());
            let (side, standing) = SideFile::adopt(file.reopen().unwrap(), &subject(7), BOOT_1).unwrap();
            assert_eq!((side.is_trusted(3), standing), (false, Standing::Remade), "{name}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        SideFile::adopt(file.reopen().unwrap(), &subject(7), BOOT_1).unwrap().0.trust(3);
        let (side, standing) = SideFile::adopt(file.reopen().unwrap(), &subject(8), BOOT_1).unwrap();
        assert_eq!((side.is_trusted(3), standing), (false, Standing::Remade), "another data file");
    }

    #[test]
    fn chunk_locks_and_use_marks_conflict_between_openings() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || SideFile::adopt(file.reopen().unwrap(), &subject(7), BOOT_1).unwrap().0;
        let (one, two) = (open(), open());
        assert!(one.try_lock_chunks(3..6).unwrap());
        assert!(!two.try_lock_chunks(5..8).unwrap());
        assert!(two.try_lock_chunks(6..8).unwrap());
        one.unlock_chunks(5..6);
        assert!(two.try_lock_chunks(5..6).unwrap());
        assert!(is_used_by_others(one.file()).unwrap());
        drop(two);
        assert!(one.try_lock_chunks(0..21).unwrap(), "a closed description holds nothing");
    }

    #[test]
    fn truncated_side_file_trusts_nothing_and_does_not_crash() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let side = SideFile::adopt(file.reopen().unwrap(), &subject(7), BOOT_1).unwrap().0;
        side.trust(3);
        file.as_file().set_len(0).unwrap();
        side.trust(4);
        assert!(!side.is_trusted(3));
        side.distrust(3);
        side.note_synced(&side.snapshot());
    }
}
