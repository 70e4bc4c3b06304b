//! The store against backends that misbehave, files that vanish and processes that die.

#![cfg_attr(feature = "model", expect(dead_code, reason = "the model checker runs one of the modules only"))]

#[cfg(not(feature = "model"))]
mod cache;
#[cfg(not(feature = "model"))]
mod disputes;
#[cfg(not(feature = "model"))]
mod faults;
#[cfg(not(feature = "model"))]
mod flights;
#[cfg(not(feature = "model"))]
mod forms;
#[cfg(feature = "model")]
mod model;
#[cfg(not(feature = "model"))]
mod modes;
#[cfg(not(feature = "model"))]
mod races;
#[cfg(not(feature = "model"))]
mod reference;
mod units;

use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use crate::metrics::Metrics;
use crate::rafs::RafsError;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;
use crate::rafs::facts::Piece;
use crate::rafs::facts::Seal;
use crate::storage::backend::Backend;
use crate::storage::cache::keeping::Content;
use crate::storage::codec;
use crate::storage::pool::Pool;
use crate::storage::store::CacheForm;
use crate::storage::store::ChunkSource;
use crate::storage::store::Index;
use crate::storage::store::ReadError;
use crate::storage::store::Store;
use crate::storage::store::StoreOptions;
use crate::storage::sync::Arc;
use crate::storage::sync::Mutex;
use crate::storage::sync::lock;
use crate::storage::sync::mpsc;
use crate::sys::sink::MemorySink;
use crate::testing::fault::Fault;
use crate::testing::fault::FaultBackend;
use crate::testing::fault::MemoryBackend;

/// No test waits longer for anything.
const LONG: Duration = Duration::from_secs(10);
const BOOT: [u8; 16] = [1; 16];
const ID: &str = "blob-of-the-test";

/// Chunk facts in a list, as a v5 bootstrap has them.
struct Chunks(Vec<ChunkFacts>);

impl ChunkSource for Chunks {
    fn prepare(&self) -> Result<(), RafsError> {
        Ok(())
    }

    fn chunk(&self, blob: u32, chunk: u32) -> Result<Option<ChunkFacts>, RafsError> {
        Ok(self.0.get(chunk as usize).copied().filter(|_| blob == 0))
    }

    fn seal(&self, _: u32, _: u32) -> Result<Option<Seal>, RafsError> {
        Ok(None)
    }
}

/// A chunk of `bytes` at `plain_at`, whose stored bytes are at an offset, so many.
fn chunk(stored: (usize, usize), plain_at: usize, bytes: &[u8], coding: Coding) -> ChunkFacts {
    ChunkFacts {
        compressed_offset: stored.0 as u64,
        compressed_bytes: stored.1 as u32,
        uncompressed_offset: plain_at as u64,
        uncompressed_bytes: bytes.len() as u32,
        coding,
        digest: Some(codec::digest(Digester::Blake3, bytes)),
        crc32c: None,
    }
}

/// One blob, its chunks, and the backend that has it.
struct Rig {
    dir: tempfile::TempDir,
    facts: BlobFacts,
    chunks: Vec<ChunkFacts>,
    plain: Vec<u8>,
    memory: Arc<MemoryBackend>,
    backend: Arc<FaultBackend>,
    metrics: Arc<Metrics>,
    options: StoreOptions,
}

impl Rig {
    /// A blob of `count` chunks of 5000 bytes, packed without alignment.
    fn new(count: u32) -> Self {
        Self::with_chunks(count, 5000)
    }

    fn with_chunks(count: u32, chunk_bytes: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (mut stored, mut plain, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..count {
            let bytes = content(index, chunk_bytes);
            let packed = lz4::block::compress(&bytes, None, false).unwrap();
            let is_compressed = index % 5 != 4;
            let packed = if is_compressed { packed } else { bytes.clone() };
            let coding = if is_compressed { Coding::Compressed } else { Coding::Plain };
            chunks.push(chunk((stored.len(), packed.len()), plain.len(), &bytes, coding));
            stored.extend(packed);
            plain.extend(bytes);
        }
        let facts = BlobFacts {
            index: 0,
            id: ID.into(),
            features: 0,
            chunk_count: count,
            chunk_bytes: chunk_bytes.next_power_of_two(),
            uncompressed_bytes: plain.len() as u64,
            compressed_bytes: stored.len() as u64,
            data_bytes: stored.len() as u64,
            compressor: Compressor::Lz4Block,
            digester: Digester::Blake3,
            meta: None,
            cipher: None,
            prefetch_bytes: 0,
        };
        let pool = Pool::new(2).unwrap();
        let memory = Arc::new(MemoryBackend::default());
        memory.put(ID, stored);
        let backend = FaultBackend::new(Arc::clone(&memory) as Arc<dyn Backend>, Arc::clone(&pool));
        let options = StoreOptions {
            work_dir: Some(dir.path().join("cache")),
            form: CacheForm::Plain,
            index: Index::Map,
            boot_id: BOOT,
            amplify_bytes: 0,
            validate: false,
            demand_deadline: Some(LONG),
            pool,
            bootstrap: None,
        };
        let metrics = Arc::new(Metrics::new(0));
        Self { dir, facts, chunks, plain, memory, backend, metrics, options }
    }

    fn open(&self) -> Store {
        self.open_with(|_| ())
    }

    fn open_with(&self, change: impl FnOnce(&mut StoreOptions)) -> Store {
        let mut options = self.options.clone();
        change(&mut options);
        let chunks = Arc::new(Chunks(self.chunks.clone()));
        let backend = Arc::clone(&self.backend) as Arc<dyn Backend>;
        Store::open(options, vec![self.facts.clone()], chunks, backend, Arc::clone(&self.metrics)).unwrap()
    }

    /// The whole chunk as a piece.
    fn piece(&self, chunk: u32) -> Piece {
        let facts = &self.chunks[chunk as usize];
        Piece { blob: 0, chunk, offset: facts.uncompressed_offset, len: facts.uncompressed_bytes }
    }

    fn pieces(&self, chunks: std::ops::Range<u32>) -> Vec<Piece> {
        chunks.map(|chunk| self.piece(chunk)).collect()
    }

    fn expected(&self, pieces: &[Piece]) -> Vec<u8> {
        let bytes = |piece: &Piece| &self.plain[piece.offset as usize..][..piece.len as usize];
        pieces.iter().flat_map(bytes).copied().collect()
    }

    /// Reads, waits, and compares.
    fn read_right(&self, store: &Store, pieces: &[Piece]) {
        let got = wait(&read(store, pieces)).unwrap();
        assert!(got == self.expected(pieces), "wrong bytes for {pieces:?}");
    }

    fn file(&self, suffix: &str) -> std::path::PathBuf {
        self.cache_dir().join(format!("{ID}{suffix}"))
    }

    fn cache_dir(&self) -> &Path {
        self.options.work_dir.as_deref().unwrap()
    }

    fn hang(&self) {
        self.backend.set(Fault::Hang);
    }
}

/// Compressible bytes that differ from chunk to chunk and never look like a hole.
fn content(index: u32, len: u32) -> Vec<u8> {
    if len > 1 << 20 {
        // Quick to make, also in a debug build.
        return vec![index as u8 | 1; len as usize];
    }
    (0..len).map(|at| (at.wrapping_mul(at / 7 + index + 1) >> 3) as u8 | 1).collect()
}

/// A chunk for a cache that keeps decoded ones.
fn plain_only(plain: &[u8]) -> Content<'_> {
    Content { stored: None, plain }
}

type Answered = mpsc::Receiver<Result<Vec<u8>, ReadError>>;

/// Begins a read; its bytes are copied out in `done`.
fn read(store: &Store, pieces: &[Piece]) -> Answered {
    let (tell, told) = mpsc::channel();
    let tell = Mutex::new(tell);
    store.read(pieces, move |result| {
        let bytes = result.and_then(|ready| {
            let mut sink = MemorySink::new(ready.len());
            ready.copy_into(&mut sink).map_err(|_| ReadError::Lost(0))?;
            Ok(sink.into_bytes())
        });
        let _ = lock(&tell).send(bytes);
    });
    told
}

fn wait(answered: &Answered) -> Result<Vec<u8>, ReadError> {
    let result = answered.recv_timeout(LONG).expect("an answer in time");
    assert!(answered.recv_timeout(Duration::ZERO).is_err(), "answered once");
    result
}

fn is_waiting(answered: &Answered) -> bool {
    matches!(answered.try_recv(), Err(mpsc::TryRecvError::Empty))
}

/// Waits until `condition` holds.
fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < end, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}
