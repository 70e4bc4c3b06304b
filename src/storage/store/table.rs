//! What is known of the chunks of a blob, and how it is come by.
//!
//! v5: everything is in the bootstrap. v6: the blob carries a table of its own (format, section 6), kept beside the
//! cached data as `<id>.blob.meta`; digests are in the bootstrap. Nothing is loaded before the first cold read. A load
//! that fails fails the reads that wait for it and is tried anew by the next one.

use std::os::fd::AsFd;

use arc_swap::ArcSwapOption;

use super::Inner;
use super::blob::Blob;
use super::blob::Interest;
use super::error::ReadError;
use super::fetch;
use super::fetch::Place;
use super::fetch::Work;
use super::parked::Parked;
use super::resolve;
use crate::limits::MAX_CHUNK_BYTES;
use crate::rafs::RafsError;
use crate::rafs::chunks::ChunkIndex;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;
use crate::rafs::facts::MetaHolder;
use crate::rafs::facts::MetaLocation;
use crate::rafs::facts::Seal;
use crate::rafs::facts::ZranContext;
use crate::rafs::facts::encrypted_bytes;
use crate::rafs::meta;
use crate::rafs::meta::BlobMeta;
use crate::storage::cache::CacheError;
use crate::storage::cache::Directory;
use crate::storage::cache::TEMPORARY;
use crate::storage::codec;
use crate::storage::steps::Step;
use crate::storage::steps::pass;
use crate::storage::sync::Arc;
use crate::storage::sync::AtomicU64;
use crate::storage::sync::Mutex;
use crate::storage::sync::OnceLock;
use crate::storage::sync::Ordering;
use crate::storage::sync::lock;
use crate::sys::view::View;

/// What the bootstrap says of chunks.
pub trait ChunkSource: Send + Sync {
    /// Makes the answers below quick. May take as long as a pass over the bootstrap; called on the pool, again and
    /// again.
    ///
    /// # Errors
    /// A lost or malformed bootstrap.
    fn prepare(&self) -> Result<(), RafsError>;

    /// Everything about a chunk, where the bootstrap holds it (v5).
    ///
    /// # Errors
    /// A lost or malformed bootstrap.
    fn chunk(&self, blob: u32, chunk: u32) -> Result<Option<ChunkFacts>, RafsError>;

    /// What the bootstrap says of a chunk that is described by its blob's own table.
    ///
    /// # Errors
    /// A lost or malformed bootstrap.
    fn seal(&self, blob: u32, chunk: u32) -> Result<Option<Seal>, RafsError>;
}

/// The chunk index of an image, made when it is first needed.
pub struct LazyChunks<F> {
    make: F,
    made: OnceLock<Arc<ChunkIndex>>,
}

impl<F: Fn() -> Result<Arc<ChunkIndex>, RafsError> + Send + Sync> LazyChunks<F> {
    /// An index that `make` makes.
    pub fn new(make: F) -> Self {
        Self { make, made: OnceLock::new() }
    }

    fn index(&self) -> Result<&ChunkIndex, RafsError> {
        if self.made.get().is_none() {
            let _ = self.made.set((self.make)()?);
        }
        self.made.get().map(|index| &**index).ok_or(RafsError::Unsupported("an image without chunk index"))
    }
}

impl<F: Fn() -> Result<Arc<ChunkIndex>, RafsError> + Send + Sync> ChunkSource for LazyChunks<F> {
    fn prepare(&self) -> Result<(), RafsError> {
        self.index().map(drop)
    }

    fn chunk(&self, blob: u32, chunk: u32) -> Result<Option<ChunkFacts>, RafsError> {
        self.index()?.chunk(blob, chunk)
    }

    fn seal(&self, blob: u32, chunk: u32) -> Result<Option<Seal>, RafsError> {
        self.index()?.seal(blob, chunk)
    }
}

/// The loaded chunk table of a blob.
pub(super) struct Table {
    source: Arc<dyn ChunkSource>,
    /// The blob's own table; `None`: the bootstrap has it all.
    meta: Option<BlobMeta>,
    /// Whether `meta` comes from a file that was in the cache directory before.
    is_found: bool,
}

impl Table {
    /// Everything about `chunk`, checked against the blob table and the bootstrap.
    pub(super) fn chunk(&self, blob: &BlobFacts, chunk: u32) -> Result<ChunkFacts, ReadError> {
        let fault = |source| ReadError::Table { blob: blob.index, source };
        let bad = |reason| ReadError::BadChunk { blob: blob.index, chunk, reason };
        let facts = match &self.meta {
            Some(meta) => meta.chunk(chunk).map(Some),
            None => self.source.chunk(blob.index, chunk),
        };
        let mut facts = facts.map_err(fault)?.ok_or(ReadError::NotInChunk { blob: blob.index, chunk })?;
        if let Some(reason) = fault_of(blob, &facts) {
            return Err(bad(reason));
        }
        if self.meta.is_some() {
            let seal = self.source.seal(blob.index, chunk).map_err(fault)?;
            if seal.is_some_and(|seal| !seal.agrees_with(&facts)) {
                return Err(bad("the table of its blob and the bootstrap disagree about its place"));
            }
            facts.digest = seal.map(|seal| seal.digest);
        }
        Ok(facts)
    }

    /// A context of a gzip file.
    pub(super) fn zran(&self, blob: &BlobFacts, context: u32) -> Result<ZranContext, ReadError> {
        let fault = |source| ReadError::Table { blob: blob.index, source };
        let meta = self.meta.as_ref().ok_or(RafsError::Unsupported("a gzip file without contexts")).map_err(fault)?;
        meta.zran(context).map_err(fault)
    }
}

/// Rule 9 of the format, section 14, as far as one chunk goes.
fn fault_of(blob: &BlobFacts, chunk: &ChunkFacts) -> Option<&'static str> {
    let ends_within = |offset: u64, len: u32, size: u64| offset.checked_add(u64::from(len)).is_some_and(|e| e <= size);
    if chunk.uncompressed_bytes == 0 || chunk.uncompressed_bytes > blob.chunk_bytes.min(MAX_CHUNK_BYTES) {
        return Some("its size is not between 1 and the chunk size");
    }
    if chunk.compressed_bytes == 0 || chunk.compressed_bytes > MAX_CHUNK_BYTES {
        return Some("its stored size is not between 1 byte and 16 MiB");
    }
    let plain_bytes = chunk.uncompressed_bytes;
    let stored_bytes = if blob.cipher.is_some() { encrypted_bytes(plain_bytes) } else { plain_bytes };
    if chunk.coding == Coding::Plain && chunk.compressed_bytes != stored_bytes {
        return Some("it is stored plain, but in another size");
    }
    if let Coding::Batch { offset, plain_bytes } = chunk.coding
        && (plain_bytes > MAX_CHUNK_BYTES || !ends_within(offset.into(), chunk.uncompressed_bytes, plain_bytes.into()))
    {
        return Some("it does not lie in its batch, or that is larger than 16 MiB");
    }
    if !ends_within(chunk.compressed_offset, chunk.compressed_bytes, blob.data_bytes) {
        return Some("its stored bytes lie outside the data of the blob");
    }
    if !ends_within(chunk.uncompressed_offset, chunk.uncompressed_bytes, blob.uncompressed_bytes) {
        return Some("it lies outside the uncompressed blob");
    }
    None
}

/// The place of a blob's table: not there, being loaded with reads waiting, there.
#[derive(Default)]
pub(super) struct TableCell {
    loaded: ArcSwapOption<Table>,
    load: Mutex<Load>,
}

#[derive(Default)]
struct Load {
    waiters: Vec<Arc<Parked>>,
    is_running: bool,
    search: Search,
}

/// Where a table is looked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Search {
    /// In the cache directory, then at the backend.
    #[default]
    CacheFirst,
    /// Only at the backend: the file in the cache directory proved wrong.
    BackendOnly,
}

impl TableCell {
    /// The table, if it is there.
    pub(super) fn loaded(&self) -> Option<Arc<Table>> {
        self.loaded.load_full()
    }

    /// `table` answered with `error`. If its map was lost, or it was found in the cache directory and may be damaged, it
    /// is given up (`true`), and loaded again for the next attempt.
    pub(super) fn suspect(&self, table: &Arc<Table>, error: &ReadError) -> bool {
        let is_lost = matches!(error, ReadError::Table { source: RafsError::View(_), .. });
        let is_suspect = table.meta.is_some() && (table.is_found || is_lost);
        if is_suspect {
            self.give_up(table);
        }
        is_suspect
    }

    /// Chunks did not match their digests. If the table was found in the cache directory, it may be what is wrong, and
    /// is given up (`true`).
    pub(super) fn suspect_found(&self) -> bool {
        let found = self.loaded().filter(|table| table.is_found);
        found.is_some_and(|table| {
            self.give_up(&table);
            true
        })
    }

    fn give_up(&self, table: &Arc<Table>) {
        let mut load = lock(&self.load);
        load.search = Search::BackendOnly;
        if self.loaded.load().as_ref().is_some_and(|current| Arc::ptr_eq(current, table)) {
            self.loaded.store(None);
        }
    }
}

/// The table of `blob`; `None`: `parked` waits and is resolved again when it is there. Blocks on the disk.
pub(super) fn get(inner: &Arc<Inner>, blob: &Arc<Blob>, parked: &Arc<Parked>) -> Option<Arc<Table>> {
    if let Some(table) = blob.table.loaded() {
        return Some(table);
    }
    let search = {
        let mut load = lock(&blob.table.load);
        if let Some(table) = blob.table.loaded() {
            return Some(table);
        }
        load.waiters.push(Arc::clone(parked));
        if std::mem::replace(&mut load.is_running, true) {
            return None;
        }
        load.search
    };
    let duty = Duty { store: Arc::downgrade(inner), blob: Arc::clone(blob), is_open: true };
    begin(inner, duty, search);
    None
}

fn begin(inner: &Arc<Inner>, duty: Duty, search: Search) {
    let blob = Arc::clone(&duty.blob);
    let index = blob.facts.index;
    if let Err(source) = inner.chunks.prepare() {
        return duty.end(Err(ReadError::Table { blob: index, source }));
    }
    let Some(location) = blob.facts.meta.clone() else {
        return duty.end(Ok((None, false)));
    };
    let range = match meta::cache_bytes(&blob.facts).and_then(|_| meta::stored_range(&blob.facts)) {
        Ok(range) => range,
        Err(source) => return duty.end(Err(ReadError::Table { blob: index, source })),
    };
    if search == Search::CacheFirst
        && let Some(directory) = &inner.directory
        && let Some(meta) = find(directory, &blob.facts)
    {
        return duty.end(Ok((Some(meta), true)));
    }
    let Some(place) = place_of(inner, &blob, &location) else {
        let source = RafsError::Unsupported("a chunk table in the file of the bootstrap, where that is not at hand");
        return duty.end(Err(ReadError::Table { blob: index, source }));
    };
    fetch::submit(inner, Work::table(duty, location, place, range));
}

/// Where the table is fetched from.
fn place_of(inner: &Inner, blob: &Blob, location: &MetaLocation) -> Option<Place> {
    let (backend, file) = match &location.holder {
        MetaHolder::Blob => (&inner.backend, Arc::clone(&blob.id)),
        MetaHolder::Other(id) => (&inner.backend, Arc::from(id.as_str())),
        MetaHolder::Bootstrap => (inner.options.bootstrap.as_ref()?, Arc::from("the file of the bootstrap")),
    };
    Some(Place { backend: Arc::clone(backend), file })
}

/// The duty to end a load. Dropping it fails the reads that wait.
pub(super) struct Duty {
    store: crate::storage::sync::Weak<Inner>,
    /// The blob whose table is loaded.
    pub(super) blob: Arc<Blob>,
    is_open: bool,
}

impl Duty {
    /// How long somebody waits for the table.
    pub(super) fn interest(&self) -> Interest {
        Interest::of(&lock(&self.blob.table.load).waiters)
    }

    /// Fails the reads that wait.
    pub(super) fn fail(self, error: ReadError) {
        self.end(Err(error));
    }

    /// The stored table came, header included.
    pub(super) fn arrived(self, inner: &Inner, location: &MetaLocation, stored: &[u8]) {
        let made = make(inner, &self.blob, location, stored);
        self.end(made.map(|meta| (Some(meta), false)));
    }

    fn end(mut self, result: Result<(Option<BlobMeta>, bool), ReadError>) {
        self.finish(result);
    }

    fn finish(&mut self, result: Result<(Option<BlobMeta>, bool), ReadError>) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let store = self.store.upgrade();
        let (waiters, error) = {
            let mut load = lock(&self.blob.table.load);
            load.is_running = false;
            let error = match (result, &store) {
                (Ok((meta, is_found)), Some(store)) => {
                    let source = Arc::clone(&store.chunks);
                    self.blob.table.loaded.store(Some(Arc::new(Table { source, meta, is_found })));
                    None
                }
                (Ok(_), None) => Some(ReadError::Shutdown),
                (Err(error), _) => Some(error),
            };
            (std::mem::take(&mut load.waiters), error)
        };
        match (error, store) {
            (None, Some(store)) => waiters.into_iter().for_each(|parked| resolve::queue(&store, parked)),
            (error, _) => {
                let error = error.unwrap_or(ReadError::Shutdown);
                if !matches!(error, ReadError::Shutdown) && self.blob.read_warning.passes() {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(blob = %self.blob.id, error, "chunk table cannot be loaded");
                }
                waiters.into_iter().for_each(|parked| parked.fail(error.clone()));
            }
        }
    }
}

impl Drop for Duty {
    fn drop(&mut self) {
        self.finish(Err(ReadError::Shutdown));
    }
}

fn file_name(blob: &BlobFacts) -> String {
    format!("{}.blob.meta", blob.id)
}

/// The table in the cache directory, if there is a good one.
pub(super) fn find(directory: &Directory, blob: &BlobFacts) -> Option<BlobMeta> {
    let name = file_name(blob);
    let open = || -> Result<Option<BlobMeta>, Box<dyn std::error::Error>> {
        let Some(file) = directory.open_existing(&name)? else { return Ok(None) };
        let (actual, expected) = (file.metadata()?.len(), meta::cache_bytes(blob)?);
        if actual != expected {
            return Err(format!("{actual} bytes instead of {expected}").into());
        }
        Ok(Some(BlobMeta::open(View::map_file(file.as_fd(), expected)?, blob)?))
    };
    open().unwrap_or_else(|error| {
        let path = directory.path_of(&name);
        tracing::warn!(path = %path.display(), error = &*error, "chunk table in the cache is damaged; fetched again");
        None
    })
}

/// Decodes a fetched table, keeps it in the cache directory where that works, and opens it.
fn make(inner: &Inner, blob: &Blob, location: &MetaLocation, stored: &[u8]) -> Result<BlobMeta, ReadError> {
    let (sealing, blob) = (blob.sealing.as_ref(), &blob.facts);
    let fault = |source| ReadError::Table { blob: blob.index, source };
    let garbled = |source| ReadError::TableData { blob: blob.index, offset: location.offset, source };
    let cache_bytes = meta::cache_bytes(blob).map_err(fault)?;
    let content = codec::table::decode(location, sealing, stored, cache_bytes).map_err(garbled)?;
    let kept = inner.directory.as_ref().and_then(|directory| {
        keep(directory, blob, &content)
            .inspect_err(|error| {
                inner.metrics.storage.cache_write_errors.add(1);
                let error = error as &dyn std::error::Error;
                tracing::warn!(blob = %blob.id, error, "chunk table is not kept in the cache");
            })
            .ok()
    });
    BlobMeta::open(kept.unwrap_or_else(|| View::from_bytes(content)), blob).map_err(fault)
}

/// Writes the table beside the data: under a name of our own first, so that nobody sees half of it.
fn keep(directory: &Directory, blob: &BlobFacts, content: &[u8]) -> Result<View, CacheError> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let name = file_name(blob);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let temporary = format!("{name}.{}-{serial}{TEMPORARY}", std::process::id());
    directory.remove_abandoned(&format!("{name}."));
    let file = directory.create_temporary(&temporary)?;
    pass(Step::TableMade);
    let write = || {
        std::os::unix::fs::FileExt::write_all_at(&file, content, 0)?;
        pass(Step::TableWritten);
        View::map_file(file.as_fd(), content.len() as u64)
    };
    let kept = write()
        .map_err(|error| directory.failed(&name, error))
        .and_then(|view| directory.publish(&temporary, &name).map(|()| view));
    if kept.is_err() {
        let _ = directory.remove(&temporary);
    }
    pass(Step::TableNamed);
    kept
}
