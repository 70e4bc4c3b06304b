//! Upstream's chunk map (format, section 11): which chunks are in the data file.
//!
//! Shared with every process that has the blob open. Bits are set, by atomic operations, after the data was written;
//! they are never cleared. A bit alone is only a hint: see [`super::side`].

use std::fs::File;
use std::os::fd::AsFd;

use super::CacheError;
use super::file::Directory;
use super::file::Identity;
use super::file::Opened;
use super::file::identity_of_open;
use super::file::set_len_with_room;
use crate::storage::steps::Step;
use crate::storage::steps::pass;
use crate::sys::bitmap::SharedBytes;

const HEADER_BYTES: u64 = 4096;
const MAGIC: u32 = 0x424D_4150;
const VERSION: u32 = 1;
const MAGIC_2: u32 = 0x434D_4150;
const ALL_READY: u32 = 0x4D4D_4150;
/// Where [`ALL_READY`] stands.
const ALL_READY_OFFSET: u64 = 12;

/// An open chunk map.
#[derive(Debug)]
pub struct ChunkMap {
    bytes: SharedBytes,
    chunks: u32,
    identity: Identity,
}

impl ChunkMap {
    /// Opens, or makes, the map `name` for `chunks` chunks (at least one). A file that is empty or whose header is all
    /// zeros is initialised. One that is too short or has another header is damaged, and replaced: its bits are hints,
    /// nothing else. It is not mended in place: somebody may have it mapped. Sets "all ready" when all bits are set, as
    /// upstream does.
    ///
    /// The caller holds the blob's setup lock.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn open(directory: &Directory, name: &str, chunks: u32) -> Result<Self, CacheError> {
        let failed = |error: std::io::Error| directory.failed(name, error);
        let expected = HEADER_BYTES + u64::from(chunks).div_ceil(8);
        let mut opened = directory.open_or_create(name)?;
        pass(Step::MapMade);
        if opened.len > expected {
            return Err(CacheError::MapSize { path: directory.path_of(name), actual: opened.len, expected });
        }
        if is_damaged(&opened, expected).map_err(failed)? {
            tracing::warn!(path = %directory.path_of(name).display(), "chunk map is damaged; chunks are fetched again");
            directory.remove(name)?;
            opened = directory.open_or_create(name)?;
        }
        let file = opened.file;
        set_len_with_room(&file, expected).map_err(failed)?;
        pass(Step::MapSized);
        let mut header = [0; 16];
        read_exact_at(&file, &mut header, 0).map_err(failed)?;
        if header == [0; 16] {
            let new = [MAGIC, VERSION, MAGIC_2, 0].map(u32::to_le_bytes).concat();
            write_all_at(&file, &new, 0).map_err(failed)?;
        }
        pass(Step::MapReady);
        let bytes = SharedBytes::map(file.as_fd(), expected).map_err(failed)?;
        let map = Self { bytes, chunks, identity: identity_of_open(&file).map_err(failed)? };
        if header[12..] != ALL_READY.to_le_bytes() && (0..chunks).all(|chunk| map.is_set(chunk)) {
            write_all_at(&file, &ALL_READY.to_le_bytes(), ALL_READY_OFFSET).map_err(failed)?;
        }
        Ok(map)
    }

    /// Which file it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether the file was truncated or cannot be read; it then has no bits any more.
    pub fn is_lost(&self) -> bool {
        self.bytes.get(HEADER_BYTES as usize).is_err()
    }

    /// Whether the bit of `chunk` is set. A lost map has no bits.
    pub fn is_set(&self, chunk: u32) -> bool {
        self.place(chunk).is_some_and(|(offset, mask)| self.bytes.get(offset).is_ok_and(|byte| byte & mask != 0))
    }

    /// Sets the bit of `chunk`; its data must have been written. A lost map forgets it: the chunk is fetched again by
    /// whoever opens the map next.
    pub fn set(&self, chunk: u32) {
        if let Some((offset, mask)) = self.place(chunk) {
            let _ = self.bytes.set(offset, mask);
        }
    }

    fn place(&self, chunk: u32) -> Option<(usize, u8)> {
        (chunk < self.chunks).then(|| (HEADER_BYTES as usize + (chunk / 8) as usize, 0x80 >> (chunk % 8)))
    }
}

/// Whether the file, which is not longer than `expected`, is no map of this length.
fn is_damaged(opened: &Opened, expected: u64) -> std::io::Result<bool> {
    if opened.len < expected {
        return Ok(opened.len != 0);
    }
    let mut header = [0; 12];
    read_exact_at(&opened.file, &mut header, 0)?;
    Ok(header != [0; 12] && header != *[MAGIC, VERSION, MAGIC_2].map(u32::to_le_bytes).as_flattened())
}

/// Fills `out` from `offset`; the end of the file is an error.
pub(super) fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

/// Writes all of `bytes` at `offset`.
pub(super) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> (tempfile::TempDir, Directory) {
        let dir = tempfile::tempdir().unwrap();
        let open = Directory::open(dir.path()).unwrap();
        (dir, open)
    }

    #[test]
    fn new_map_has_upstreams_bytes() {
        let (dir, directory) = directory();
        let map = ChunkMap::open(&directory, "m", 11).unwrap();
        assert!(!map.is_set(0));
        map.set(0);
        map.set(10);
        assert!(map.is_set(0) && map.is_set(10) && !map.is_set(1) && !map.is_set(11) && !map.is_set(u32::MAX));
        let bytes = std::fs::read(dir.path().join("m")).unwrap();
        assert_eq!(bytes.len(), 4098);
        assert_eq!(&bytes[..16], b"PAMB\x01\0\0\0PAMC\0\0\0\0");
        assert_eq!(&bytes[4096..], [0x80, 0x20]);
        let mode = std::os::unix::fs::PermissionsExt::mode(&dir.path().join("m").metadata().unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn all_ready_is_set_when_a_full_map_is_opened() {
        let (dir, directory) = directory();
        let all_ready = || std::fs::read(dir.path().join("m")).unwrap()[12..16].to_vec();
        let map = ChunkMap::open(&directory, "m", 9).unwrap();
        (0..9).for_each(|chunk| map.set(chunk));
        assert_eq!(all_ready(), [0; 4]);
        ChunkMap::open(&directory, "m", 9).unwrap();
        assert_eq!(all_ready(), 0x4D4D_4150u32.to_le_bytes());
    }

    #[test]
    fn foreign_files_are_refused_damaged_ones_replaced_and_zeros_initialised() {
        let (dir, directory) = directory();
        std::fs::write(dir.path().join("long"), [0; 4099]).unwrap();
        assert!(matches!(
            ChunkMap::open(&directory, "long", 9),
            Err(CacheError::MapSize { actual: 4099, expected: 4098, .. })
        ));
        let mut old = vec![0xff; 4098];
        old[..12].copy_from_slice(b"PAMB\x01\0\0\0PAMX");
        for damaged in [&old[..], &[1; 100], &[0; 100]] {
            std::fs::write(dir.path().join("damaged"), damaged).unwrap();
            let inode = |path: &str| std::os::unix::fs::MetadataExt::ino(&dir.path().join(path).metadata().unwrap());
            std::fs::hard_link(dir.path().join("damaged"), dir.path().join("old")).unwrap();
            let map = ChunkMap::open(&directory, "damaged", 9).unwrap();
            assert!(!(0..9).any(|chunk| map.is_set(chunk)));
            assert_ne!(inode("damaged"), inode("old"), "whoever has the old one goes on with it");
            std::fs::remove_file(dir.path().join("old")).unwrap();
        }
        std::fs::write(dir.path().join("zeros"), [0; 4098]).unwrap();
        assert!(!ChunkMap::open(&directory, "zeros", 9).unwrap().is_set(3));
        std::os::unix::fs::symlink("zeros", dir.path().join("link")).unwrap();
        assert!(matches!(ChunkMap::open(&directory, "link", 9), Err(CacheError::NotRegular { .. })));
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        assert!(matches!(ChunkMap::open(&directory, "dir", 9), Err(CacheError::NotRegular { .. })));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(matches!(ChunkMap::open(&directory, "fifo", 9), Err(CacheError::NotRegular { .. })));
    }
}
