//! The store: from a read plan to verified bytes, over all blobs of one image.
//!
//! A read of ready chunks is answered on the caller's thread, without a lock, a system call or an allocation. Any other
//! read is *parked*: it becomes data that hangs on the chunks it waits for, and is answered by a thread of the pool.
//! No thread waits for a chunk, whatever the backend does.
//!
//! ```text
//! read -> ready_now -----------------------------------------------------------> done (caller's thread)
//!      -> probe (page cache?) -> ready_now ------------------------------------> done
//!      -> decoded a moment ago? -----------------------------------------------> done
//!      -> park -> [pool] resolve -> table -> gate -> admit -> drive -> fetch -> finish -> done (pool)
//! ```
//!
//! Lock order: `Blob::flights`, the table's load lock or the gate's, then `Parked::state`. The register, the budget, the
//! decoded chunks, the shelf and the pool's queues are leaves. None is held over I/O, a backend call or a `done`.

mod blob;
mod budget;
mod decoded;
mod doubt;
mod error;
mod fetch;
mod foreign;
mod gate;
mod keep;
mod landing;
mod loading;
mod lot;
mod parked;
mod plan;
mod ready;
mod register;
mod resolve;
mod shelf;
mod table;
#[cfg(test)]
#[cfg(feature = "testing")]
mod tests;
mod upkeep;

use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use smallvec::SmallVec;

use self::blob::Blob;
use self::budget::Budget;
use self::decoded::Decoded;
use self::doubt::Doubt;
use self::gate::Gate;
use self::parked::Done;
use self::parked::Parked;
use self::register::Register;
use self::shelf::Shelf;
use super::backend::Backend;
use super::cache::Directory;
use super::cache::Generation;
use super::cache::Keeping;
use super::cache::PageKeys;
use super::cache::Setup;
use super::cache::generation::Presence;
use super::pool::Pool;
use super::sync::Arc;
use super::sync::AtomicBool;
use super::sync::Ordering;
use super::sync::Weak;
use super::sync::now;
use crate::limits::IN_FLIGHT_BYTES;
use crate::limits::MAX_UNALIGNED_BLOB_BYTES;
use crate::limits::PROBE_BYTES;
use crate::metrics::Metrics;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::Piece;
use crate::rafs::facts::feature;
use crate::storage::cache::CacheError;

pub use self::error::ReadError;
pub use self::error::StoreError;
pub use self::ready::ReadyRead;
pub use self::table::ChunkSource;
pub use self::table::LazyChunks;
pub use super::cache::Index;

/// How a store works.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Directory of cache files, made if missing. `None`: nothing is kept but some chunks in memory (`dummycache`).
    pub work_dir: Option<PathBuf>,
    /// How chunks are kept there.
    pub form: CacheForm,
    /// Whether chunk maps of v5 images are used. Those of v6 images always are, as upstream does.
    pub index: Index,
    /// Which boot of the machine this is ([`crate::sys::machine::boot_id`]).
    pub boot_id: [u8; 16],
    /// Stored bytes up to which a fetch takes the following chunks along; 0: exactly what is asked.
    pub amplify_bytes: u64,
    /// Whether chunks found in the cache are verified on their first use in this process.
    pub validate: bool,
    /// How long a read waits for a backend before it fails. `None`: failures are not waited out, and a backend that
    /// never answers is waited for without end.
    pub demand_deadline: Option<Duration>,
    /// Where work is done.
    pub pool: Arc<Pool>,
    /// The file that the bootstrap was taken from, whatever name is asked for: it may hold chunk tables
    /// ([`crate::rafs::facts::MetaHolder::Bootstrap`]).
    pub bootstrap: Option<Arc<dyn Backend>>,
}

/// How chunks are kept in the cache directory.
#[derive(Clone)]
pub enum CacheForm {
    /// Decoded: readers are served from a map of the file.
    Plain,
    /// As they come from the backend (`compressed`).
    Compressed,
    /// Decoded and encrypted, all with this key, whose halves differ.
    Encrypted([u8; 32]),
    /// Decoded and encrypted, each with its digest.
    Convergent,
}

impl std::fmt::Debug for CacheForm {
    /// Shows no key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "Plain",
            Self::Compressed => "Compressed",
            Self::Encrypted(_) => "Encrypted(..)",
            Self::Convergent => "Convergent",
        })
    }
}

/// Blobs of one image: see the module.
pub struct Store {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("blobs", &self.inner.blobs.len()).finish_non_exhaustive()
    }
}

/// What the parts of a store share.
pub(in crate::storage) struct Inner {
    options: StoreOptions,
    pool: Arc<Pool>,
    directory: Option<Directory>,
    blobs: Vec<Arc<Blob>>,
    chunks: Arc<dyn ChunkSource>,
    backend: Arc<dyn Backend>,
    metrics: Arc<Metrics>,
    register: Register,
    budget: Arc<Budget>,
    decoded: Decoded,
    gate: Gate,
    shelf: Shelf,
    doubt: Doubt,
    closing: AtomicBool,
    weak: Weak<Self>,
}

impl Store {
    /// Opens the cache files of all `blobs`, whose indexes are their positions. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError::Cache`] names the file.
    pub fn open(
        options: StoreOptions,
        blobs: Vec<BlobFacts>,
        chunks: Arc<dyn ChunkSource>,
        backend: Arc<dyn Backend>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StoreError> {
        let directory = match &options.work_dir {
            Some(path) => Some(Directory::open(path)?),
            None => None,
        };
        let open = |facts: BlobFacts| -> Result<Arc<Blob>, CacheError> {
            let setup = setup_for(&options, &facts);
            let files = open_files(directory.as_ref(), &facts, &setup)?;
            Ok(Arc::new(Blob::new(facts, files, setup)))
        };
        let blobs = blobs.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let inner = Arc::new_cyclic(|weak| Inner {
            pool: Arc::clone(&options.pool),
            options,
            directory,
            blobs,
            chunks,
            backend,
            metrics,
            register: Register::default(),
            budget: Budget::new(IN_FLIGHT_BYTES as u64, Weak::clone(weak)),
            decoded: Decoded::default(),
            gate: Gate::default(),
            shelf: Shelf::default(),
            doubt: Doubt::default(),
            closing: AtomicBool::new(false),
            weak: Weak::clone(weak),
        });
        upkeep::begin(&inner);
        Ok(Self { inner })
    }

    /// Reads `pieces` in order. If all of it is ready, `done` is called at once, on this thread, and nothing is
    /// allocated (for plans that need up to 2 runs of bytes); otherwise later, on a thread of the pool, when the last
    /// chunk arrived or the read failed. Called exactly once. Never blocks.
    #[inline]
    pub fn read<F>(&self, pieces: &[Piece], done: F)
    where
        F: FnOnce(Result<ReadyRead, ReadError>) + Send + 'static,
    {
        if let Some(ready) = self.inner.ready_now(pieces) {
            self.inner.metrics.storage.warm_reads.add(1);
            done(Ok(ready));
            return self.inner.after_warm_read();
        }
        self.read_slowly(pieces, done);
    }

    #[cold]
    fn read_slowly<F>(&self, pieces: &[Piece], done: F)
    where
        F: FnOnce(Result<ReadyRead, ReadError>) + Send + 'static,
    {
        if self.inner.probe(pieces)
            && let Some(ready) = self.inner.ready_now(pieces)
        {
            self.inner.metrics.storage.warm_reads.add(1);
            return done(Ok(ready));
        }
        if let Some(ready) = self.inner.ready_decoded(pieces) {
            self.inner.metrics.storage.warm_reads.add(1);
            return done(Ok(ready));
        }
        self.inner.metrics.storage.parked_reads.add(1);
        self.inner.park(pieces, Box::new(done));
    }

    /// Whether the cache is said to hold all of a blob, its chunk table included: such a blob is read without a backend,
    /// unless something proves damaged. `false` for an index that names no blob. Looks into the cache directory.
    pub fn is_full(&self, blob: u32) -> bool {
        let Some(blob) = self.inner.blobs.get(blob as usize) else { return false };
        let has_table = match (&blob.facts.meta, &self.inner.directory) {
            (Some(_), Some(directory)) => table::find(directory, &blob.facts).is_some(),
            (Some(_), None) => false,
            (None, _) => true,
        };
        has_table && blob.files().is_some_and(|files| files.is_full(&blob.facts))
    }

    /// Answers all parked reads with [`ReadError::Shutdown`], gives up all fetches, and flushes the caches for at most
    /// `limits::SYNC_PATIENCE`. Reads of ready chunks go on.
    pub fn shutdown(&self) {
        self.inner.shutdown();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.inner.shutdown();
    }
}

/// How the cache files of `blob` are used.
fn setup_for(options: &StoreOptions, blob: &BlobFacts) -> Setup {
    let is_v6 = blob.meta.is_some();
    let index = if is_v6 { Index::Map } else { options.index };
    let keeping = match &options.form {
        CacheForm::Plain => Keeping::Plain,
        CacheForm::Compressed => Keeping::Stored,
        CacheForm::Encrypted(key) => Keeping::Encrypted(PageKeys::one(key)),
        // Upstream knows the digests of v6 only if it is to validate.
        CacheForm::Convergent if is_v6 && !options.validate => Keeping::Encrypted(PageKeys::without_digests()),
        CacheForm::Convergent => Keeping::Encrypted(PageKeys::digests()),
    };
    Setup { boot_id: options.boot_id, keeping, index }
}

/// The cache files of a blob; `None` where nothing can be kept.
fn open_files(
    directory: Option<&Directory>,
    blob: &BlobFacts,
    setup: &Setup,
) -> Result<Option<Generation>, CacheError> {
    let Some(directory) = directory else { return Ok(None) };
    if blob.features & feature::TARFS != 0 {
        // The tar itself lies there, or nothing does.
        return Generation::open_in_place(directory, blob);
    }
    let is_sized = blob.chunk_count > 0 && setup.keeping.data_bytes(blob) > 0;
    if !is_sized {
        return Ok(None);
    }
    if blob.features & feature::ALIGNED == 0 && blob.uncompressed_bytes > MAX_UNALIGNED_BLOB_BYTES {
        return Err(CacheError::TooLarge { id: blob.id.clone(), bytes: blob.uncompressed_bytes });
    }
    match Generation::open_as(directory, blob, setup) {
        Ok(files) => Ok(Some(files)),
        // A disk that is full or fails, or an image that lies, costs speed, not the image.
        Err(error) if error.is_survivable() => {
            tracing::warn!(blob = %blob.id, error = &error as &dyn std::error::Error, "not cached; reads are served from memory");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether the bytes of `piece` are ready in `files`, and believed to be in memory.
#[inline]
fn holds(files: &Generation, piece: &Piece) -> bool {
    files.extents.get(piece.chunk).is_some_and(|extent| extent.touched && extent.holds(piece.offset, piece.len))
}

impl Inner {
    /// The read, if every chunk is ready and believed to be in memory.
    #[inline]
    fn ready_now(&self, pieces: &[Piece]) -> Option<ReadyRead> {
        let mut ready = ReadyRead::new();
        for piece in pieces {
            if let Some(files) = ready.files_before(piece) {
                if !holds(files, piece) {
                    return None;
                }
                ready.extend(piece);
                continue;
            }
            // A guard for each part costs less than sharing one count with all other threads.
            let files = self.blobs.get(piece.blob as usize)?.files()?;
            files.view.prefetch(piece.offset, piece.len as usize);
            if files.view.is_lost() || !holds(&files, piece) {
                return None;
            }
            ready.push_cached(piece, files);
        }
        Some(ready)
    }

    /// `done` has copied on this thread, if it copied at all: did that wait for the disk?
    #[inline]
    fn after_warm_read(&self) {
        if self.doubt.arises() {
            self.blobs.iter().filter_map(|blob| blob.files()).for_each(|files| files.extents.untouch_all());
        }
    }

    /// Looks whether chunks that are ready are in the page cache, and notes it. `false`: some are not, or are not
    /// ready, or cannot be judged here. Never waits for the disk.
    fn probe(&self, pieces: &[Piece]) -> bool {
        pieces.iter().all(|piece| self.probe_one(piece).unwrap_or(false))
    }

    fn probe_one(&self, piece: &Piece) -> Option<bool> {
        let blob = self.blobs.get(piece.blob as usize)?;
        let files = blob.files()?;
        if files.view.is_lost() || !files.is_mapped() {
            return None;
        }
        let (offset, len) = match files.extents.get(piece.chunk) {
            Some(extent) if extent.touched => return Some(true),
            Some(extent) => (extent.offset, extent.len),
            None if self.options.validate || files.is_doubtful() => return None,
            None => {
                let facts = blob.table.loaded()?.chunk(&blob.facts, piece.chunk).ok()?;
                if files.presence(piece.chunk, &facts) != Presence::Trusted {
                    return None;
                }
                (facts.uncompressed_offset, facts.uncompressed_bytes)
            }
        };
        let is_here = len <= PROBE_BYTES && files.is_in_memory(offset, len);
        if is_here {
            files.note_touched(piece.chunk, offset, len);
        }
        Some(is_here)
    }

    fn park(&self, pieces: &[Piece], done: Done) {
        let id = self.register.next_id();
        let pieces = SmallVec::from_slice(pieces);
        let parked = Arc::new(Parked::new(id, pieces, self.deadline(), Weak::clone(&self.weak), done));
        self.register.park(&parked);
        // After the registration: the end of the store sees the read, or the read sees the end.
        if self.is_closing() {
            return parked.fail(ReadError::Shutdown);
        }
        upkeep::watch_deadlines(self);
        resolve::queue(self, parked);
    }

    /// When a read that begins now is answered with an error.
    fn deadline(&self) -> Option<Instant> {
        self.options.demand_deadline.map(|patience| now() + patience)
    }

    fn is_closing(&self) -> bool {
        // SeqCst: against the registration of parked reads and held work, see `park`.
        self.closing.load(Ordering::SeqCst)
    }
}
