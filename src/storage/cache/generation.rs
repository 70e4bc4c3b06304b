//! One opening of the cache files of a blob, or of the file that is used in their place.

use std::fs::File;
use std::io;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;
use rustix::io::ReadWriteFlags;

use super::CacheError;
use super::author::Author;
use super::chunk_map::ChunkMap;
use super::claims;
use super::claims::Right;
use super::claims::Statement;
use super::extents::Extent;
use super::extents::Extents;
use super::file::Directory;
use super::file::Identity;
use super::file::Opened;
use super::file::give_room;
use super::file::identity_of_open;
use super::keeping::Content;
use super::keeping::Keeping;
use super::setup::Index;
use super::setup::Setup;
use super::side;
use super::side::Fit;
use super::side::SideFile;
use super::side::Standing;
use super::side::Subject;
use super::side::Use;
use crate::limits::CACHE_OPEN_PATIENCE;
use crate::limits::TOUCH_BUFFER_BYTES;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::storage::steps::Step;
use crate::storage::steps::pass;
use crate::storage::sync::AtomicBool;
use crate::storage::sync::Ordering;
use crate::sys::view::View;

/// The open cache files of one blob.
#[derive(Debug)]
pub struct Generation {
    /// The data file, mapped as a whole. Reads are served from it if [`Generation::is_mapped`].
    pub view: View,
    /// What this process knows of ready chunks.
    pub extents: Extents,
    data: File,
    data_identity: Identity,
    files: Files,
}

#[derive(Debug)]
enum Files {
    /// Those of a cache, shared with other processes.
    Cache(Box<Cache>),
    /// A whole blob that lies in the cache directory, used where it is. Nothing is written, and nothing of it believed
    /// but its first bytes, as many as it has.
    InPlace(u64),
}

#[derive(Debug)]
struct Cache {
    keeping: Keeping,
    map: Option<ChunkMap>,
    side: SideFile,
    side_identity: Identity,
    author: Author,
    dirty: AtomicBool,
    /// Whether data was lost on its way to the disk.
    is_condemned: AtomicBool,
}

/// What the shared files say of a chunk, as an image describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Not in the data file.
    Missing,
    /// Said to be there, by somebody who may be wrong.
    Hint,
    /// There.
    Trusted,
    /// Another image's chunk of this number lies there, or another idea of this one. Ours has no place in the file.
    Disputed,
    /// No place in this file: behind the end of one that is used in place, or not aligned as its form demands.
    Beyond,
}

/// What became of a chunk that was to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It is in the data file.
    InFile,
    /// Its place is another image's; nothing was written.
    Disputed,
    /// The bytes to be written are not at hand.
    Lacking,
}

/// Names of the files of one blob.
struct Names {
    data: String,
    map: String,
    side: String,
}

impl Names {
    fn new(id: &str, keeping: &Keeping) -> Self {
        let map = format!("{id}.blob.data.chunk_map");
        Self { data: keeping.data_name(id), map, side: keeping.side_name(id) }
    }
}

impl Generation {
    /// As [`Generation::open_as`], in the usual way.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn open(directory: &Directory, blob: &BlobFacts, boot_id: [u8; 16]) -> Result<Self, CacheError> {
        Self::open_as(directory, blob, &Setup::usual(boot_id))
    }

    /// Opens, and makes where missing, the files of `blob` in `directory`. Blocks on the disk, and on other processes
    /// that do the same at this moment (`limits::CACHE_OPEN_PATIENCE`).
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn open_as(directory: &Directory, blob: &BlobFacts, setup: &Setup) -> Result<Self, CacheError> {
        if !setup.keeping.fits(blob) {
            return Err(CacheError::NotAligned { id: blob.id.clone() });
        }
        let names = Names::new(&blob.id, &setup.keeping);
        let until = Instant::now() + CACHE_OPEN_PATIENCE;
        while Instant::now() < until {
            if let Some(generation) = Self::try_open(directory, blob, setup, &names)? {
                return Ok(generation);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(CacheError::Busy { path: directory.path_of(&names.side) })
    }

    /// Opens the file `<id>` in `directory`, an uncompressed blob as a whole, to be used in place; `None` if there is
    /// none, or nothing in it. Blocks on the disk.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn open_in_place(directory: &Directory, blob: &BlobFacts) -> Result<Option<Self>, CacheError> {
        let failed = |error: io::Error| directory.failed(&blob.id, error);
        let Some(data) = directory.open_readable(&blob.id)? else { return Ok(None) };
        let bytes = data.metadata().map_err(failed)?.len().min(blob.uncompressed_bytes);
        if bytes == 0 {
            return Ok(None);
        }
        let data_identity = identity_of_open(&data).map_err(failed)?;
        let view = View::map_file(data.as_fd(), bytes).map_err(failed)?;
        let extents = Extents::new(blob.chunk_count, 0);
        Ok(Some(Self { view, extents, data, data_identity, files: Files::InPlace(bytes) }))
    }

    /// Whether reads are served from [`Generation::view`]. Chunks that are kept in another form are loaded.
    pub fn is_mapped(&self) -> bool {
        self.cache().is_none_or(|cache| cache.keeping.is_mapped())
    }

    /// How chunks are kept; `None`: the file is used in place.
    pub fn keeping(&self) -> Option<&Keeping> {
        self.cache().map(|cache| &cache.keeping)
    }

    /// Whether a chunk that is found here is verified on its first use whatever the settings.
    pub fn is_doubtful(&self) -> bool {
        self.cache().is_some_and(|cache| cache.map.is_none())
    }

    fn cache(&self) -> Option<&Cache> {
        match &self.files {
            Files::Cache(cache) => Some(cache),
            Files::InPlace(_) => None,
        }
    }

    /// Whether the data file is said to hold every chunk of `blob`.
    pub fn is_full(&self, blob: &BlobFacts) -> bool {
        match &self.files {
            Files::Cache(cache) => {
                cache.map.as_ref().is_some_and(|map| (0..blob.chunk_count).all(|chunk| map.is_set(chunk)))
            }
            Files::InPlace(bytes) => *bytes >= blob.uncompressed_bytes,
        }
    }

    /// Opens the files anew, after these were found lost. The data file is unlinked first if it is bad, so that other
    /// processes, who still have it mapped, find out as well instead of reading zeros from a file made whole again.
    /// `None`: a file that is used in place is not there any more.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn reopen(&self, directory: &Directory, blob: &BlobFacts, setup: &Setup) -> Result<Option<Self>, CacheError> {
        let Some(cache) = self.cache() else { return Self::open_in_place(directory, blob) };
        let name = setup.keeping.data_name(&blob.id);
        let is_bad = self.view.is_lost() || cache.is_condemned.load(Ordering::Relaxed);
        if is_bad && directory.identity_of(&name)? == Some(self.data_identity) {
            directory.remove(&name)?;
        }
        Self::open_as(directory, blob, setup).map(Some)
    }

    /// `None`: somebody is in the way; try again.
    fn try_open(
        directory: &Directory,
        blob: &BlobFacts,
        setup: &Setup,
        names: &Names,
    ) -> Result<Option<Self>, CacheError> {
        let side_failed = |error: io::Error| directory.failed(&names.side, error);
        let Opened { file: side, .. } = directory.open_or_create(&names.side)?;
        if !side::try_setup(&side).map_err(side_failed)? {
            return Ok(None);
        }
        pass(Step::SideMade);
        // Somebody may have replaced the file between our opening and our lock.
        let side_identity = identity_of_open(&side).map_err(side_failed)?;
        if directory.identity_of(&names.side)? != Some(side_identity) {
            return Ok(None);
        }
        let users = side::used_by(&side).map_err(side_failed)?;
        let Some((data, is_whole)) = open_data(directory, &names.data, setup.keeping.data_bytes(blob))? else {
            return Ok(None);
        };
        let data_failed = |error: io::Error| directory.failed(&names.data, error);
        let data_identity = identity_of_open(&data).map_err(data_failed)?;
        let subject = subject(blob, data_identity, &setup.keeping);
        let fit = match is_whole {
            true => side::fit(&side, &subject, users).map_err(side_failed)?,
            // What the records speak of is not in this file.
            false => Fit::Foreign,
        };
        match (fit, users) {
            (Fit::Contradicts, Use::Shared) => {
                return Err(CacheError::Contradicted { path: directory.path_of(&names.data) });
            }
            (Fit::Foreign, Use::Shared) => {
                // Others go on with the files they have; we begin with a side file of our own.
                directory.remove(&names.side)?;
                return Ok(None);
            }
            _ => {}
        }
        if !is_whole {
            side.set_len(0).map_err(side_failed)?;
        }
        let map = match setup.index {
            Index::Map => Some(ChunkMap::open(directory, &names.map, blob.chunk_count)?),
            Index::None => None,
        };
        let (side, standing) = SideFile::adopt(side, &subject, setup.boot_id, fit).map_err(side_failed)?;
        side::end_setup(side.file()).map_err(side_failed)?;
        if standing != Standing::SameBoot {
            tracing::debug!(blob = %blob.id, ?standing, "cached chunks are hints until they are verified");
        }
        let view = View::map_file(data.as_fd(), subject.data_bytes).map_err(data_failed)?;
        let extents = Extents::new(blob.chunk_count, subject.shift);
        let author = Author::new(blob, side.secret(), subject.keeping, subject.shift);
        let (dirty, is_condemned) = (AtomicBool::new(false), AtomicBool::new(false));
        let keeping = setup.keeping.clone();
        let cache = Cache { keeping, map, side, side_identity, author, dirty, is_condemned };
        let files = Files::Cache(Box::new(cache));
        Ok(Some(Self { view, extents, data, data_identity, files }))
    }

    /// Whether one of the files was truncated or cannot be read.
    pub fn is_lost(&self) -> bool {
        self.view.is_lost() || self.cache().is_some_and(Cache::is_lost)
    }

    /// What the shared files say of `chunk`, which our image describes by `facts`.
    pub fn presence(&self, chunk: u32, facts: &ChunkFacts) -> Presence {
        match &self.files {
            Files::Cache(cache) => cache.presence(&self.data, chunk, facts),
            Files::InPlace(bytes) => {
                let end = facts.uncompressed_offset.saturating_add(u64::from(facts.uncompressed_bytes));
                if end <= *bytes { Presence::Trusted } else { Presence::Beyond }
            }
        }
    }

    /// Makes the place of `chunk` ours, as far as it is nobody else's. Nothing may be written there, nor believed that is
    /// found there, without. By which `right` is whether the caller has the chunk's lock.
    pub fn claim(&self, chunk: u32, facts: &ChunkFacts, right: Right) -> bool {
        self.cache().is_some_and(|cache| cache.claim(chunk, facts, right).is_some())
    }

    /// Whether an image that describes `chunk` otherwise has claimed it last, and written nothing. If somebody holds the
    /// chunk's lock, it is for that.
    pub fn is_contested(&self, chunk: u32, facts: &ChunkFacts) -> bool {
        self.cache().is_some_and(|cache| {
            let standing = cache.statement(facts).map(|ours| cache.side.claims().standing(chunk, ours));
            standing == Some(claims::Standing::Contested)
        })
    }

    /// Writes a verified chunk and publishes it: to other processes, then to this one; if its place can be claimed.
    /// Blocks on the disk.
    ///
    /// # Errors
    /// What the disk answers; the chunk then stays missing.
    pub fn store(&self, chunk: u32, facts: &ChunkFacts, content: Content<'_>, right: Right) -> io::Result<Kept> {
        pass(Step::ChunkVerified);
        let Some(cache) = self.cache() else { return Ok(Kept::Disputed) };
        let Some(bytes) = cache.keeping.pick(facts, content) else { return Ok(Kept::Lacking) };
        let Some(statement) = cache.claim(chunk, facts, right) else { return Ok(Kept::Disputed) };
        pass(Step::ChunkClaimed);
        super::chunk_map::write_all_at(&self.data, &bytes, cache.keeping.place(facts).0)?;
        pass(Step::ChunkWritten);
        if let Some(map) = &cache.map {
            map.set(chunk);
        }
        pass(Step::ChunkMapped);
        cache.note_written(chunk, statement);
        self.note_ready(chunk, facts);
        pass(Step::ChunkNoted);
        Ok(Kept::InFile)
    }

    /// A hint that we claimed proved right: `chunk` is believed from now on, by other processes too.
    pub fn confirm(&self, chunk: u32, facts: &ChunkFacts) {
        let Some(cache) = self.cache() else { return };
        if let Some(statement) = cache.statement(facts) {
            cache.note_written(chunk, statement);
            self.note_ready(chunk, facts);
        }
    }

    fn note_ready(&self, chunk: u32, facts: &ChunkFacts) {
        if self.is_mapped() {
            self.note_touched(chunk, facts.uncompressed_offset, facts.uncompressed_bytes);
        }
    }

    /// Notes for this process that `chunk` is ready and in the page cache. The data file is mapped.
    pub fn note_touched(&self, chunk: u32, offset: u64, len: u32) {
        self.extents.set(chunk, Extent { offset, len, touched: true });
    }

    /// `chunk` was found wrong. Blocks on the disk.
    pub fn refute(&self, chunk: u32, facts: &ChunkFacts) {
        self.extents.forget(chunk);
        let Some(cache) = self.cache() else { return };
        if cache.statement(facts).is_some_and(|statement| cache.side.claims().note_wrong(chunk, statement)) {
            cache.side.flush();
        }
        pass(Step::ChunkRefuted);
    }

    /// The bytes that are kept of a chunk, in the form in which they are kept. Blocks on the disk.
    ///
    /// # Errors
    /// What the disk answers; `UnexpectedEof` when the file is shorter.
    pub fn load(&self, facts: &ChunkFacts) -> io::Result<Vec<u8>> {
        let (offset, len) = self.keeping().unwrap_or(&Keeping::Plain).place(facts);
        // Its size was checked against the largest chunk.
        let mut bytes = vec![0; len as usize];
        super::chunk_map::read_exact_at(&self.data, &mut bytes, offset)?;
        Ok(bytes)
    }

    /// The plain bytes of a chunk whose kept bytes are `loaded`, unless it is kept as stored. Not verified.
    pub fn open_chunk(&self, facts: &ChunkFacts, loaded: &[u8]) -> Option<Vec<u8>> {
        self.keeping()?.open(facts, loaded)
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

    /// Locks of chunks against other processes.
    pub fn locks(&self) -> Locks<'_> {
        Locks(self.cache().map(|cache| &cache.side))
    }

    /// Flushes the data to the disk, if there is anything new, and notes which chunks survive a power cut. Blocks.
    ///
    /// # Errors
    /// What the disk answers; nothing is noted then, and the files are condemned.
    pub fn sync(&self) -> io::Result<()> {
        let Some(cache) = self.cache().filter(|cache| cache.dirty.swap(false, Ordering::Relaxed)) else {
            return Ok(());
        };
        let snapshot = cache.side.claims().snapshot();
        pass(Step::FlushBegun);
        if let Err(errno) = rustix::fs::fdatasync(&self.data) {
            self.condemn();
            return Err(errno.into());
        }
        pass(Step::Flushed);
        cache.side.claims().note_synced(&snapshot);
        pass(Step::FlushNoted);
        Ok(())
    }

    /// Data was lost on its way to the disk, and nobody can tell which: the kernel reports that once, keeps the pages
    /// for a while as if they were clean, and reports success the next time. So these files are not current any more.
    pub fn condemn(&self) {
        if let Some(cache) = self.cache() {
            cache.is_condemned.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the paths still name the files that are open here, whole and good.
    pub fn is_current(&self, directory: &Directory, blob: &BlobFacts) -> bool {
        let is_named = |name: &str, ours: Identity| directory.identity_of(name).ok().flatten() == Some(ours);
        let len = self.data.metadata().map_or(0, |metadata| metadata.len());
        match &self.files {
            Files::InPlace(bytes) => {
                is_named(&blob.id, self.data_identity) && len.min(blob.uncompressed_bytes) == *bytes && !self.is_lost()
            }
            Files::Cache(cache) => {
                let names = Names::new(&blob.id, &cache.keeping);
                is_named(&names.data, self.data_identity)
                    && cache.map.as_ref().is_none_or(|map| is_named(&names.map, map.identity()))
                    && is_named(&names.side, cache.side_identity)
                    && len >= cache.keeping.data_bytes(blob)
                    && !self.is_lost()
                    && !cache.is_condemned.load(Ordering::Relaxed)
            }
        }
    }
}

/// Locks of chunks, where they belong to several processes; see [`SideFile`].
#[derive(Debug)]
pub struct Locks<'a>(Option<&'a SideFile>);

impl Locks<'_> {
    /// Takes the locks of `chunks`, all or none. `Ok(false)`: another process holds one of them. Does not wait.
    ///
    /// # Errors
    /// What the system answers when it cannot lock at all.
    pub fn try_lock_chunks(&self, chunks: Range<u32>) -> io::Result<bool> {
        self.0.map_or(Ok(true), |side| side.try_lock_chunks(chunks))
    }

    /// Gives the locks of `chunks` up.
    pub fn unlock_chunks(&self, chunks: Range<u32>) {
        if let Some(side) = self.0 {
            side.unlock_chunks(chunks);
        }
    }
}

impl Cache {
    fn is_lost(&self) -> bool {
        self.map.as_ref().is_some_and(ChunkMap::is_lost) || self.side.claims().is_lost()
    }

    fn presence(&self, data: &File, chunk: u32, facts: &ChunkFacts) -> Presence {
        let Some(statement) = self.statement(facts) else { return Presence::Beyond };
        let is_there = || match &self.map {
            Some(map) => map.is_set(chunk),
            None => has_data(data, self.keeping.place(facts)),
        };
        match self.side.claims().standing(chunk, statement) {
            claims::Standing::Disputed => Presence::Disputed,
            _ if !is_there() => Presence::Missing,
            claims::Standing::Open | claims::Standing::Contested => Presence::Hint,
            claims::Standing::Believed => Presence::Trusted,
        }
    }

    fn statement(&self, facts: &ChunkFacts) -> Option<Statement> {
        self.author.state(facts, self.keeping.place(facts))
    }

    fn claim(&self, chunk: u32, facts: &ChunkFacts, right: Right) -> Option<Statement> {
        self.statement(facts).filter(|statement| self.side.claims().claim(chunk, *statement, right))
    }

    fn note_written(&self, chunk: u32, statement: Statement) {
        self.side.claims().note_written(chunk, statement);
        pass(Step::ChunkTrusted);
        // Relaxed: a missed round of flushing is made up for by the next.
        self.dirty.store(true, Ordering::Relaxed);
    }
}

fn subject(blob: &BlobFacts, data: Identity, keeping: &Keeping) -> Subject {
    Subject {
        chunks: blob.chunk_count,
        data,
        data_bytes: keeping.data_bytes(blob),
        shift: keeping.shift(blob),
        keeping: keeping.identity(),
        sharing: keeping.sharing(),
    }
}

/// Whether anything was ever written at a place of a sparse file. Where the file system cannot tell: yes.
fn has_data(file: &File, (offset, len): (u64, u32)) -> bool {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(data) => data < offset.saturating_add(u64::from(len)),
        Err(Errno::NXIO) => false,
        Err(_) => true,
    }
}

/// Opens the data file in its full length. The flag tells whether what it held before can still be there.
/// `None`: a shorter file was unlinked; begin again. It is never made whole in place: somebody may have it mapped, even if
/// the side file says otherwise (that may have been removed), and would read zeros for what was cut off.
fn open_data(directory: &Directory, name: &str, expected: u64) -> Result<Option<(File, bool)>, CacheError> {
    let Opened { file, len, is_new } = directory.open_or_create(name)?;
    pass(Step::DataMade);
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
