//! Our side file of a blob, `<id>.nydus_state`: which chunks may be believed, and the locks by which processes agree.
//!
//! ```text
//! 0     8   magic "NYDSTATE"
//! 8     4   version 2
//! 12    4   chunks, rounded up to a multiple of 8 as the chunk map does
//! 16   16   boot id of the last setup
//! 32    8   inode number of the data file
//! 40    8   its time of birth, ns
//! 48    8   its size in bytes
//! 56    4   alignment of chunks in it, as a power of two
//! 60    4   0
//! 64   16   how the data is kept ([`Subject::keeping`])
//! 80   16   secret of this file: a key of the tags
//! 96   16   checksum of the bytes from 8 on but for the boot id: no record means anything under a wrong secret
//! 112 3984  0
//! 4096      records of chunks ([`super::claims`])
//! ```
//!
//! A chunk is believed if one of our processes, whose image states the same of it, wrote or verified it in this boot, or
//! in an earlier one before a flush. The first opener under another boot id forgets what was not flushed: after a power
//! cut it may be anything. A header that does not fit (also: the data file is another one than noted) makes everything
//! a hint. Words and bytes are in the machine's order: the file does not leave it.
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
use super::claims::Claims;
use super::claims::Sharing;
use super::file::Identity;
use super::file::set_len_with_room;
use crate::storage::steps::Step;
use crate::storage::steps::pass;
use crate::sys::bitmap::SharedBytes;
use crate::sys::lock::Lock;
use crate::sys::lock::try_lock;

const MAGIC: &[u8; 8] = b"NYDSTATE";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4096;
/// Bytes of the header that carry something.
const FIELDS_BYTES: usize = 112;
const BOOT_ID: Range<usize> = 16..32;
const KEEPING: Range<usize> = 64..80;
const SECRET: Range<usize> = 80..96;
const CHECKSUM: Range<usize> = 96..112;

/// Lock bytes of chunks begin here: apart from any byte that could be locked for its content.
const CHUNK_LOCKS: u64 = 1 << 32;
const SETUP_LOCK: Range<u64> = 1 << 40..(1 << 40) + 1;
const USE_LOCK: Range<u64> = (1 << 40) + 1..(1 << 40) + 2;

/// What the side file says it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// Chunks of the blob.
    pub chunks: u32,
    /// The data file that the records speak of.
    pub data: Identity,
    /// Size of the data file.
    pub data_bytes: u64,
    /// Chunks begin at multiples of `1 << shift`.
    pub shift: u32,
    /// How data is kept: what is kept otherwise is another statement about the same chunk.
    pub keeping: [u8; 16],
    /// Whether chunks may lie at the same place.
    pub sharing: Sharing,
}

/// Who has a side file open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Nobody else.
    Alone,
    /// Another process, or another store of this one.
    Shared,
}

/// How an existing side file stands to a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// It can be used.
    Fits,
    /// It is damaged, or of another data file.
    Foreign,
    /// It speaks of the same data file, and lays its chunks out otherwise.
    Contradicts,
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
    claims: Claims,
    secret: [u8; 16],
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
pub fn used_by(file: &File) -> io::Result<Use> {
    let alone = try_lock(file.as_fd(), USE_LOCK, Lock::Exclusive)?;
    if alone {
        try_lock(file.as_fd(), USE_LOCK, Lock::Unlock)?;
    }
    Ok(if alone { Use::Alone } else { Use::Shared })
}

/// How `file`, which is used by `users` besides us, stands to `subject`.
pub fn fit(file: &File, subject: &Subject, users: Use) -> io::Result<Fit> {
    let len = file.metadata()?.len();
    let mut header = [0; FIELDS_BYTES];
    if len < HEADER_BYTES as u64 {
        return Ok(Fit::Foreign);
    }
    read_exact_at(file, &mut header, 0)?;
    // Not compared: when it was set up, its secret, and, while others use it, how they keep their data.
    let mut expected = fields(subject, [0; 16], [0; 16]);
    expected[BOOT_ID].copy_from_slice(&header[BOOT_ID]);
    expected[SECRET].copy_from_slice(&header[SECRET]);
    expected[CHECKSUM].copy_from_slice(&header[CHECKSUM]);
    if users == Use::Shared {
        expected[KEEPING].copy_from_slice(&header[KEEPING]);
    }
    let is_ours = header[..12] == expected[..12] && header[CHECKSUM] == checksum(&header);
    let is_of_the_data = is_ours && header[32..48] == expected[32..48];
    Ok(match is_of_the_data {
        true if header == expected && len == file_bytes(subject.chunks) => Fit::Fits,
        true => Fit::Contradicts,
        false => Fit::Foreign,
    })
}

impl SideFile {
    /// Adopts `file`, whose setup lock is held, for `subject` in the boot `boot_id`, and marks the blob as in use.
    /// A file that does not fit ([`fit`]) is made anew, in place: the caller saw that nobody else uses it.
    ///
    /// # Errors
    /// What the system answers.
    pub fn adopt(file: File, subject: &Subject, boot_id: [u8; 16], fit: Fit) -> io::Result<(Self, Standing)> {
        let keep = fit == Fit::Fits;
        let mut header = [0; FIELDS_BYTES];
        if keep {
            read_exact_at(&file, &mut header, 0)?;
        } else {
            // Shrinking to nothing first zeroes whatever was there.
            file.set_len(0)?;
            set_len_with_room(&file, file_bytes(subject.chunks))?;
            pass(Step::SideSized);
            header = fields(subject, boot_id, secret());
        }
        let field = |range: Range<usize>| header.get(range).and_then(|id| id.try_into().ok()).unwrap_or_default();
        let (old_boot, secret): ([u8; 16], [u8; 16]) = (field(BOOT_ID), field(SECRET));
        let bytes = SharedBytes::map(file.as_fd(), file_bytes(subject.chunks))?;
        let claims = Claims::new(bytes, HEADER_BYTES, rounded(subject.chunks), subject.shift, subject.sharing);
        let side = Self { file, claims, secret };
        let standing = match (keep, old_boot == boot_id) {
            (false, _) => Standing::Remade,
            (true, true) => Standing::SameBoot,
            (true, false) => {
                side.claims.keep_only_synced();
                pass(Step::SideReduced);
                header[BOOT_ID].copy_from_slice(&boot_id);
                Standing::OtherBoot
            }
        };
        if standing != Standing::SameBoot {
            // Last: a process that dies before this leaves the old boot id, and the next opener does all of it again.
            write_all_at(&side.file, &header, 0)?;
            pass(Step::SideReady);
        }
        try_lock(side.file.as_fd(), USE_LOCK, Lock::Shared)?;
        Ok((side, standing))
    }

    /// The file itself, for the setup lock.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The records of chunks.
    pub fn claims(&self) -> &Claims {
        &self.claims
    }

    /// The secret of this file.
    pub fn secret(&self) -> [u8; 16] {
        self.secret
    }

    /// A chunk was found wrong and must not be found believed after a power cut, while it is written again. Blocks on
    /// the disk.
    pub fn flush(&self) {
        let _ = rustix::fs::fdatasync(&self.file);
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
}

fn lock_range(chunks: Range<u32>) -> Range<u64> {
    CHUNK_LOCKS + u64::from(chunks.start)..CHUNK_LOCKS + u64::from(chunks.end)
}

/// The chunk map tells blobs apart by their number of chunks only so far.
fn rounded(chunks: u32) -> u32 {
    chunks.next_multiple_of(8)
}

fn file_bytes(chunks: u32) -> u64 {
    (HEADER_BYTES + Claims::bytes(rounded(chunks))) as u64
}

/// Bytes that no image can foresee.
fn secret() -> [u8; 16] {
    // Random numbers without a generator: the standard library seeds each hasher state from one.
    let state = std::collections::hash_map::RandomState::new();
    let word = |at: u64| std::hash::BuildHasher::hash_one(&state, at).to_le_bytes();
    [word(0), word(1)].concat().try_into().unwrap_or_default()
}

fn fields(subject: &Subject, boot_id: [u8; 16], secret: [u8; 16]) -> [u8; FIELDS_BYTES] {
    let mut out = [0; FIELDS_BYTES];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&rounded(subject.chunks).to_le_bytes());
    out[BOOT_ID].copy_from_slice(&boot_id);
    out[32..40].copy_from_slice(&subject.data.inode.to_le_bytes());
    out[40..48].copy_from_slice(&subject.data.born_ns.to_le_bytes());
    out[48..56].copy_from_slice(&subject.data_bytes.to_le_bytes());
    out[56..60].copy_from_slice(&subject.shift.to_le_bytes());
    out[KEEPING].copy_from_slice(&subject.keeping);
    out[SECRET].copy_from_slice(&secret);
    let checksum = checksum(&out);
    out[CHECKSUM].copy_from_slice(&checksum);
    out
}

fn checksum(header: &[u8; FIELDS_BYTES]) -> [u8; 16] {
    let mut hash = blake3::Hasher::new();
    hash.update(&header[8..BOOT_ID.start]).update(&header[BOOT_ID.end..CHECKSUM.start]);
    hash.finalize().as_bytes().first_chunk().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::claims::Right;
    use super::super::claims::Statement;
    use super::*;

    const BOOT_1: [u8; 16] = [1; 16];
    const BOOT_2: [u8; 16] = [2; 16];

    fn subject(inode: u64) -> Subject {
        Subject {
            chunks: 21,
            data: Identity { inode, born_ns: 5 },
            data_bytes: 21 * 4096,
            shift: 0,
            keeping: [0; 16],
            sharing: Sharing::None,
        }
    }

    fn adopt(file: &tempfile::NamedTempFile, subject: &Subject, boot_id: [u8; 16]) -> (SideFile, Standing) {
        let file = file.reopen().unwrap();
        let fit = fit(&file, subject, Use::Alone).unwrap();
        SideFile::adopt(file, subject, boot_id, fit).unwrap()
    }

    fn statement(chunk: u32) -> Statement {
        Statement::new(u64::from(chunk) << 35 | 1024, u64::from(chunk) << 8 | 1 << 60)
    }

    fn trust(side: &SideFile, chunk: u32) {
        assert!(side.claims().claim(chunk, statement(chunk), Right::Locked));
        side.claims().note_written(chunk, statement(chunk));
    }

    fn trusted(side: &SideFile) -> Vec<u32> {
        let standing = |chunk: u32| side.claims().standing(chunk, statement(chunk));
        (0..30).filter(|chunk| standing(*chunk) == super::super::claims::Standing::Believed).collect()
    }

    #[test]
    fn next_boot_trusts_only_what_was_synced() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (side, standing) = adopt(&file, &subject(7), BOOT_1);
        assert_eq!(standing, Standing::Remade);
        trust(&side, 0);
        trust(&side, 20);
        let snapshot = side.claims().snapshot();
        trust(&side, 9);
        side.claims().note_synced(&snapshot);
        assert_eq!(trusted(&side), [0, 9, 20]);
        let (same, standing) = adopt(&file, &subject(7), BOOT_1);
        assert_eq!((trusted(&same), standing), (vec![0, 9, 20], Standing::SameBoot));
        drop((side, same));
        let (next, standing) = adopt(&file, &subject(7), BOOT_2);
        assert_eq!((trusted(&next), standing), (vec![0, 20], Standing::OtherBoot));
        assert!(next.claims().note_wrong(0, statement(0)));
        drop(next);
        let (back, standing) = adopt(&file, &subject(7), BOOT_1);
        assert_eq!((trusted(&back), standing), (vec![20], Standing::OtherBoot), "what is wrong is not synced either");
    }

    #[test]
    fn damaged_or_foreign_side_file_is_remade_with_nothing_trusted() {
        type Damage = fn(&File);
        let damage: [(&str, Damage); 5] = [
            ("secret", |file| write_all_at(file, b"X", 83).unwrap()),
            ("magic", |file| write_all_at(file, b"X", 0).unwrap()),
            ("version", |file| write_all_at(file, &[1], 8).unwrap()),
            ("short", |file| file.set_len(4100).unwrap()),
            ("long", |file| file.set_len(1 << 20).unwrap()),
        ];
        for (name, damage) in damage {
            let file = tempfile::NamedTempFile::new().unwrap();
            trust(&adopt(&file, &subject(7), BOOT_1).0, 3);
            damage(file.as_file());
            let (side, standing) = adopt(&file, &subject(7), BOOT_1);
            assert_eq!((trusted(&side), standing), (vec![], Standing::Remade), "{name}");
        }
        let other = Subject { shift: 12, ..subject(7) };
        for (name, other) in
            [("data", subject(8)), ("shift", other), ("keeping", Subject { keeping: [1; 16], ..other })]
        {
            let file = tempfile::NamedTempFile::new().unwrap();
            trust(&adopt(&file, &subject(7), BOOT_1).0, 3);
            let (side, standing) = adopt(&file, &other, BOOT_1);
            assert_eq!((trusted(&side), standing), (vec![], Standing::Remade), "another {name}");
        }
    }

    #[test]
    fn image_that_contradicts_is_told_from_a_foreign_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (_side, _) = adopt(&file, &subject(7), BOOT_1);
        let fits = |subject: &Subject| fit(&file.reopen().unwrap(), subject, Use::Shared).unwrap();
        for (chunks, expected) in [(21, Fit::Fits), (17, Fit::Fits), (24, Fit::Fits), (25, Fit::Contradicts)] {
            assert_eq!(fits(&Subject { chunks, ..subject(7) }), expected, "{chunks} chunks");
        }
        assert_eq!(fits(&Subject { shift: 12, ..subject(7) }), Fit::Contradicts);
        assert_eq!(fits(&Subject { keeping: [1; 16], ..subject(7) }), Fit::Fits, "its statements differ by their tags");
        assert_eq!(fits(&subject(8)), Fit::Foreign);
    }

    #[test]
    fn chunk_locks_and_use_marks_conflict_between_openings() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || adopt(&file, &subject(7), BOOT_1).0;
        let (one, two) = (open(), open());
        assert!(one.try_lock_chunks(3..6).unwrap());
        assert!(!two.try_lock_chunks(5..8).unwrap());
        assert!(two.try_lock_chunks(6..8).unwrap());
        one.unlock_chunks(5..6);
        assert!(two.try_lock_chunks(5..6).unwrap());
        assert_eq!(used_by(one.file()).unwrap(), Use::Shared);
        drop(two);
        assert!(one.try_lock_chunks(0..21).unwrap(), "a closed description holds nothing");
    }

    #[test]
    fn truncated_side_file_trusts_nothing_and_does_not_crash() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let side = adopt(&file, &subject(7), BOOT_1).0;
        trust(&side, 3);
        file.as_file().set_len(0).unwrap();
        assert!(!side.claims().claim(4, statement(4), Right::Locked));
        assert!(trusted(&side).is_empty());
        side.claims().note_wrong(3, statement(3));
        side.claims().note_synced(&side.claims().snapshot());
        side.flush();
    }
}
