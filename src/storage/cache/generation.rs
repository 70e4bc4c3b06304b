//! One opening of the cache files of a blob.

use std::fs::File;
use std::io;
use std::io::IoSliceMut;
use std::os::fd::AsFd;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;
use rustix::io::ReadWriteFlags;

use super::CacheError;
use super::chunk_map::ChunkMap;
use super::extents::Extent;
use super::extents::Extents;
use super::file::Directory;
use super::file::Identity;
use super::file::Opened;
use super::file::give_room;
use super::file::identity_of_open;
use super::side;
use super::side::SideFile;
use super::side::Standing;
use super::side::Subject;
use crate::limits::CACHE_OPEN_PATIENCE;
use crate::limits::TOUCH_BUFFER_BYTES;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::feature;
use crate::storage::steps::Step;
use crate::storage::steps::pass;
use crate::storage::sync::AtomicBool;
use crate::storage::sync::Ordering;
use crate::sys::view::View;

/// Chunks of aligned blobs begin at multiples of `1 << 12` (format, section 1.4).
const ALIGNED_SHIFT: u32 = 12;

/// The open cache files of one blob.
#[derive(Debug)]
pub struct Generation {
    /// The data file, mapped as a whole.
    pub view: View,
    /// What this process knows of ready chunks.
    pub extents: Extents,
    map: ChunkMap,
    side: SideFile,
    data: File,
    /// Of the data file and of the side file.
    identities: (Identity, Identity),
    dirty: AtomicBool,
    /// Whether data was lost on its way to the disk.
    is_condemned: AtomicBool,
}

/// What the shared files say of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Not in the data file.
    Missing,
    /// Said to be there, by somebody who may be wrong.
    Hint,
    /// There.
    Trusted,
}

/// Names of the files of one blob.
struct Names {
    data: String,
    map: String,
    side: String,
}

impl Names {
    fn new(id: &str) -> Self {
        Self { data: data_name(id), map: format!("{id}.blob.data.chunk_map"), side: format!("{id}.nydus_state") }
    }
}

/// Name of the data file of blob `id`.
pub fn data_name(id: &str) -> String {
    format!("{id}.blob.data")
}

impl Generation {
    /// Opens, and makes where missing, the files of `blob` in `directory`. Blocks on the disk, and on other processes
    /// that do the same at this moment (`limits::CACHE_OPEN_PATIENCE`).
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn open(directory: &Directory, blob: &BlobFacts, boot_id: [u8; 16]) -> Result<Self, CacheError> {
        let names = Names::new(&blob.id);
        let until = Instant::now() + CACHE_OPEN_PATIENCE;
        while Instant::now() < until {
            if let Some(generation) = Self::try_open(directory, blob, boot_id, &names)? {
                return Ok(generation);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(CacheError::Busy { path: directory.path_of(&names.side) })
    }

    /// Whether the data file is said to hold every chunk of `blob`.
    pub fn is_full(&self, blob: &BlobFacts) -> bool {
        (0..blob.chunk_count).all(|chunk| self.presence(chunk) != Presence::Missing)
    }

    /// As [`Generation::open`], after `lost` was found lost: its data file is unlinked first, so that other processes,
    /// who still have it mapped, find out as well instead of reading zeros from a file made whole again.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn reopen(directory: &Directory, blob: &BlobFacts, boot_id: [u8; 16], lost: &Self) -> Result<Self, CacheError> {
        let name = data_name(&blob.id);
        let is_bad = lost.view.is_lost() || lost.is_condemned.load(Ordering::Relaxed);
        if is_bad && directory.identity_of(&name)? == Some(lost.identities.0) {
            directory.remove(&name)?;
        }
        Self::open(directory, blob, boot_id)
    }

    /// `None`: somebody is in the way; try again.
    fn try_open(
        directory: &Directory,
        blob: &BlobFacts,
        boot_id: [u8; 16],
        names: &Names,
    ) -> Result<Option<Self>, CacheError> {
        let side_failed = |error: io::Error| directory.failed(&names.side, error);
        let Opened { file: side, .. } = directory.open_or_create(&names.side)?;
        if !side::try_setup(&side).map_err(side_failed)? {
            return Ok(None);
        }
        pass(Step::SideMade);
        // Somebody may have replaced the file between our opening and our lock.
        let ours = identity_of_open(&side).map_err(side_failed)?;
        if directory.identity_of(&names.side)? != Some(ours) {
            return Ok(None);
        }
        let is_shared = side::is_used_by_others(&side).map_err(side_failed)?;
        let Some((data, is_whole)) = open_data(directory, blob, &names.data)? else { return Ok(None) };
        let identity = identity_of_open(&data).map_err(|error| directory.failed(&names.data, error))?;
        let subject = Subject { chunks: blob.chunk_count, data: identity, data_bytes: blob.uncompressed_bytes };
        let fits = is_whole && side::fits(&side, &subject).map_err(side_failed)?;
        if !fits && is_shared {
            // Others go on with the files they have; we begin with a side file of our own.
            directory.remove(&names.side)?;
            return Ok(None);
        }
        if !is_whole {
            // What the bits speak of is not in this file.
            side.set_len(0).map_err(side_failed)?;
        }
        let map = ChunkMap::open(directory, &names.map, blob.chunk_count)?;
        let (side, standing) = SideFile::adopt(side, &subject, boot_id).map_err(side_failed)?;
        side::end_setup(side.file()).map_err(side_failed)?;
        if standing != Standing::SameBoot {
            tracing::debug!(blob = %blob.id, ?standing, "cached chunks are hints until they are verified");
        }
        let view = View::map_file(data.as_fd(), blob.uncompressed_bytes);
        let view = view.map_err(|error| directory.failed(&names.data, error))?;
        let extents = Extents::new(blob.chunk_count, shift_of(blob));
        let (dirty, is_condemned) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Some(Self { view, extents, map, side, data, identities: (identity, ours), dirty, is_condemned }))
    }

    /// Whether one of the files was truncated or cannot be read.
    pub fn is_lost(&self) -> bool {
        self.view.is_lost() || self.map.is_lost() || self.side.is_lost()
    }

    /// What the shared files say of `chunk`.
    pub fn presence(&self, chunk: u32) -> Presence {
        match (self.map.is_set(chunk), self.side.is_trusted(chunk)) {
            (false, _) => Presence::Missing,
            (true, false) => Presence::Hint,
            (true, true) => Presence::Trusted,
        }
    }

    /// Writes a verified chunk and publishes it: to other processes, then to this one. Blocks on the disk.
    ///
    /// # Errors
    /// What the disk answers; the chunk then stays missing.
    pub fn store(&self, chunk: u32, offset: u64, plain: &[u8]) -> io::Result<()> {
        pass(Step::ChunkVerified);
        super::chunk_map::write_all_at(&self.data, plain, offset)?;
        pass(Step::ChunkWritten);
        self.map.set(chunk);
        pass(Step::ChunkMapped);
        self.side.trust(chunk);
        pass(Step::ChunkTrusted);
        // Relaxed: a missed round of flushing is made up for by the next.
        self.dirty.store(true, Ordering::Relaxed);
        self.note_touched(chunk, offset, plain.len());
        pass(Step::ChunkNoted);
        Ok(())
    }

    /// A hint proved right: `chunk` is believed from now on, by other processes too.
    pub fn confirm(&self, chunk: u32, offset: u64, len: usize) {
        self.side.trust(chunk);
        pass(Step::ChunkTrusted);
        self.dirty.store(true, Ordering::Relaxed);
        self.note_touched(chunk, offset, len);
    }

    /// Notes for this process that `chunk` is ready and in the page cache.
    pub fn note_touched(&self, chunk: u32, offset: u64, len: usize) {
        if let Ok(len) = u32::try_from(len) {
            self.extents.set(chunk, Extent { offset, len, touched: true });
        }
    }

    /// `chunk` was found wrong. Blocks on the disk.
    pub fn refute(&self, chunk: u32) {
        self.extents.forget(chunk);
        self.side.distrust(chunk);
        pass(Step::ChunkRefuted);
    }

    /// The bytes of the data file at `offset`. Blocks on the disk.
    ///
    /// # Errors
    /// What the disk answers; `UnexpectedEof` when the file is shorter.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        super::chunk_map::read_exact_at(&self.data, out, offset)
    }

    /// Whether the bytes are in the page cache; never waits for the disk. `false` also where the file system cannot
    /// tell.
    pub fn is_in_memory(&self, offset: u64, len: u32) -> bool {
        self.each_block(offset, len, |at, block| {
            match rustix::io::preadv2(&self.data, &mut [IoSliceMut::new(block)], at, ReadWriteFlags::NOWAIT) {
                Ok(got) if got > 0 => Ok(got),
                Ok(_) => Err(Errno::AGAIN.into()),
                Err(errno) => Err(errno.into()),
            }
        })
        .is_ok()
    }

    /// Brings the bytes into the page cache. Blocks on the disk.
    ///
    /// # Errors
    /// What the disk answers; `UnexpectedEof` when the file is shorter.
    pub fn touch(&self, offset: u64, len: u32) -> io::Result<()> {
        self.each_block(offset, len, |at, block| match rustix::io::pread(&self.data, block, at)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            got => Ok(got),
        })
    }

    fn each_block(
        &self,
        offset: u64,
        len: u32,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<usize>,
    ) -> io::Result<()> {
        thread_local! {
            static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        BUFFER.with_borrow_mut(|buffer| {
            buffer.resize(TOUCH_BUFFER_BYTES, 0);
            let end = offset.saturating_add(u64::from(len));
            let mut at = offset;
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
                match read(at, &mut buffer[..want]) {
                    Ok(got) => at += got as u64,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })
    }

    /// Locks of chunks against other processes; see [`SideFile`].
    pub fn locks(&self) -> &SideFile {
        &self.side
    }

    /// Flushes the data to the disk, if there is anything new, and notes which chunks survive a power cut. Blocks.
    ///
    /// # Errors
    /// What the disk answers; nothing is noted then, and the files are condemned.
    pub fn sync(&self) -> io::Result<()> {
        if !self.dirty.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let snapshot = self.side.snapshot();
        pass(Step::FlushBegun);
        if let Err(errno) = rustix::fs::fdatasync(&self.data) {
            self.condemn();
            return Err(errno.into());
        }
        pass(Step::Flushed);
        self.side.note_synced(&snapshot);
        pass(Step::FlushNoted);
        Ok(())
    }

    /// Data was lost on its way to the disk, and nobody can tell which: the kernel reports that once, keeps the pages
    /// for a while as if they were clean, and reports success the next time. So these files are not current any more.
    pub fn condemn(&self) {
        self.is_condemned.store(true, Ordering::Relaxed);
    }

    /// Whether the paths still name the files that are open here, whole and good.
    pub fn is_current(&self, directory: &Directory, blob: &BlobFacts) -> bool {
        let names = Names::new(&blob.id);
        let is_named = |name: &str, ours: Identity| directory.identity_of(name).ok().flatten() == Some(ours);
        let len = self.data.metadata().map_or(0, |metadata| metadata.len());
        is_named(&names.data, self.identities.0)
            && is_named(&names.map, self.map.identity())
            && is_named(&names.side, self.identities.1)
            && len >= blob.uncompressed_bytes
            && !self.is_lost()
            && !self.is_condemned.load(Ordering::Relaxed)
    }
}

fn shift_of(blob: &BlobFacts) -> u32 {
    if blob.features & feature::ALIGNED != 0 { ALIGNED_SHIFT } else { 0 }
}

/// Opens the data file in its full length. The flag tells whether what it held before can still be there.
/// `None`: a shorter file was unlinked; begin again. It is never made whole in place: somebody may have it mapped, even if
/// the side file says otherwise (that may have been removed), and would read zeros for what was cut off.
fn open_data(directory: &Directory, blob: &BlobFacts, name: &str) -> Result<Option<(File, bool)>, CacheError> {
    let Opened { file, len, is_new } = directory.open_or_create(name)?;
    pass(Step::DataMade);
    let expected = blob.uncompressed_bytes;
    if len > expected {
        return Err(CacheError::TooLong { path: directory.path_of(name), actual: len, expected });
    }
    if len < expected {
        if !is_new {
            directory.remove(name)?;
            pass(Step::DataRemoved);
            return Ok(None);
        }
        file.set_len(expected).map_err(|error| directory.failed(name, error))?;
        pass(Step::DataSized);
    }
    // The last byte is looked at with every read. On tmpfs that needs room, though nothing was written there.
    give_room(&file, expected.saturating_sub(1), 1).map_err(|error| directory.failed(name, error))?;
    Ok(Some((file, !is_new)))
}
