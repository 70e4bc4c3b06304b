//! Chunks that are stored as one piece: batches, encrypted or not, and contexts of gzip files.

use std::os::fd::AsFd;

use super::*;
use crate::rafs::facts::Cipher;
use crate::rafs::facts::feature;
use crate::rafs::image::Image;
use crate::rafs::image::OpenOptions;
use crate::storage::backend::localfs::LocalFs;
use crate::storage::backend::localfs::Place;
use crate::storage::codec::xts::Xts;
use crate::storage::store::LazyChunks;
use crate::sys::view::View;
use crate::testing::make;
use crate::testing::readback::Readback;
use crate::testing::reference_layer;
use crate::testing::reference_layer::Layer;

/// Chunks of a batch.
pub(super) const MEMBERS: u32 = 6;
const KEY: [u8; 32] = *b"two keys of sixteen bytes each..";
const IV: [u8; 16] = [0x5a; 16];

/// Lengths of the chunks of one batch.
fn lengths(batch: u32) -> [u32; MEMBERS as usize] {
    match batch % 4 {
        // So small that a batch is shorter than a block of the cipher.
        3 => [1, 2, 1, 3, 1, 2],
        // Nothing to compress.
        2 => [16, 1, 1, 1, 1, 1],
        odd => [1000 + odd, 1, 2999, 17, 500, 1500],
    }
}

impl Rig {
    /// A blob of batches of [`MEMBERS`] chunks each.
    pub(super) fn batched(batches: u32, cipher: Option<Cipher>) -> Self {
        let mut rig = Self::new(0);
        let (mut stored, mut plain, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        for batch in 0..batches {
            let mut content = Vec::new();
            let mut members = Vec::new();
            for (member, len) in lengths(batch).into_iter().enumerate() {
                let bytes = super::content(batch * MEMBERS + member as u32, len);
                members.push((content.len(), bytes.clone()));
                content.extend(bytes);
            }
            let packed = lz4::block::compress(&content, None, false).unwrap();
            let piece = if packed.len() < content.len() { packed } else { content.clone() };
            let piece = if cipher.is_some() { sealed(piece) } else { piece };
            for (offset, bytes) in members {
                let coding = Coding::Batch { plain_bytes: content.len() as u32, offset: offset as u32 };
                chunks.push(super::chunk((stored.len(), piece.len()), plain.len() + offset, &bytes, coding));
            }
            stored.extend(piece);
            plain.extend(content);
        }
        let bytes = stored.len() as u64;
        rig.memory.put(ID, stored);
        rig.facts = BlobFacts {
            features: feature::BATCH,
            chunk_count: batches * MEMBERS,
            chunk_bytes: 8192,
            uncompressed_bytes: plain.len() as u64,
            compressed_bytes: bytes,
            data_bytes: bytes,
            cipher,
            ..rig.facts
        };
        (rig.chunks, rig.plain) = (chunks, plain);
        rig
    }

    fn members(&self, batch: u32) -> Vec<Piece> {
        self.pieces(batch * MEMBERS..(batch + 1) * MEMBERS)
    }

    fn decoded(&self) -> u64 {
        self.metrics.storage.units_decoded.get()
    }
}

/// A piece as encrypted blobs have it.
fn sealed(mut piece: Vec<u8>) -> Vec<u8> {
    if piece.len() < 16 {
        piece.resize(16, 16 - piece.len() as u8);
        piece.extend([0x78, 0x90]);
    }
    Xts::new(&KEY).encrypt(&IV, &mut piece).unwrap();
    piece
}

fn cipher() -> Option<Cipher> {
    Some(Cipher { key: KEY, iv: IV })
}

#[test]
fn readers_of_a_batch_share_one_request_and_one_decode() {
    for work_dir in [true, false] {
        let rig = Rig::batched(3, None);
        let store = rig.open_with(|options| {
            if !work_dir {
                options.work_dir = None;
            }
        });
        rig.hang();
        let pieces = rig.members(1);
        let readers: Vec<_> =
            pieces.iter().rev().cycle().take(24).map(|piece| (read(&store, &[*piece]), *piece)).collect();
        until("a request", || rig.backend.kept() == 1);
        let across = read(&store, &pieces);
        std::thread::sleep(Duration::from_millis(30));
        assert!(is_waiting(&across));
        rig.backend.set(Fault::None);
        rig.backend.release(crate::testing::fault::Order::FirstFirst);
        for (reader, piece) in readers {
            assert_eq!(wait(&reader).unwrap(), rig.expected(&[piece]));
        }
        assert_eq!(wait(&across).unwrap(), rig.expected(&pieces));
        assert_eq!((rig.backend.requests(), rig.decoded()), (1, 1), "with a cache: {work_dir}");
    }
}

#[test]
fn stores_on_one_directory_fetch_a_batch_once() {
    let rig = Rig::batched(2, None);
    let (one, two) = (rig.open(), rig.open());
    rig.hang();
    let first = read(&one, &[rig.piece(3)]);
    until("a request", || rig.backend.kept() == 1);
    let others: Vec<_> = rig.members(0).into_iter().map(|piece| (read(&two, &[piece]), piece)).collect();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.backend.kept(), 1);
    rig.backend.set(Fault::None);
    rig.backend.release(crate::testing::fault::Order::FirstFirst);
    assert_eq!(wait(&first).unwrap(), rig.expected(&[rig.piece(3)]));
    for (reader, piece) in others {
        assert_eq!(wait(&reader).unwrap(), rig.expected(&[piece]));
    }
    assert_eq!((rig.backend.requests(), rig.decoded()), (1, 1));
}

#[test]
fn one_chunk_makes_its_batch_ready() {
    let rig = Rig::batched(4, None);
    let store = rig.open();
    for batch in 0..4 {
        rig.read_right(&store, &[rig.piece(batch * MEMBERS + 3)]);
        let all = u64::from((batch + 1) * MEMBERS);
        until("the others of the batch", || rig.metrics.storage.chunks_fetched.get() == all);
    }
    rig.hang();
    rig.read_right(&store, &rig.pieces(0..4 * MEMBERS));
    assert_eq!((rig.backend.requests(), rig.decoded()), (4, 4));
}

#[test]
fn batches_that_are_neighbours_are_fetched_together_and_decoded_once_each() {
    for amplify_bytes in [0, 1 << 20] {
        let rig = Rig::batched(8, None);
        let store = rig.open_with(|options| options.amplify_bytes = amplify_bytes);
        let pieces = if amplify_bytes == 0 { rig.pieces(0..8 * MEMBERS) } else { rig.pieces(2..3) };
        rig.read_right(&store, &pieces);
        let all = u64::from(8 * MEMBERS);
        until("all chunks", || rig.metrics.storage.chunks_fetched.get() == all);
        assert_eq!((rig.backend.requests(), rig.decoded()), (1, 8), "{amplify_bytes}");
    }
}

#[test]
fn encrypted_batches_and_chunks_of_every_length_are_read() {
    let rig = Rig::batched(8, cipher());
    let store = rig.open();
    for chunk in 0..8 * MEMBERS {
        rig.read_right(&store, &[rig.piece(chunk)]);
    }
    // Single chunks, plain and compressed.
    let mut rig = Rig::new(0);
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for len in (1..40).chain([200, 4095, 4096, 5000]) {
        let bytes = if len == 18 { [&[7; 15][..], &[3, 0x78, 0x90]].concat() } else { content(len, len) };
        let packed = lz4::block::compress(&bytes, None, false).unwrap();
        let is_compressed = packed.len() < bytes.len();
        let piece = sealed(if is_compressed { packed } else { bytes.clone() });
        let coding = if is_compressed { Coding::Compressed } else { Coding::Plain };
        rig.chunks.push(super::chunk((stored.len(), piece.len()), plain.len(), &bytes, coding));
        stored.extend(piece);
        plain.extend(bytes);
    }
    let (count, bytes) = (rig.chunks.len() as u32, stored.len() as u64);
    let features = feature::ENCRYPTED;
    let (uncompressed_bytes, cipher) = (plain.len() as u64, cipher());
    rig.facts = BlobFacts { features, chunk_count: count, uncompressed_bytes, cipher, ..rig.facts };
    (rig.facts.compressed_bytes, rig.facts.data_bytes) = (bytes, bytes);
    rig.plain = plain;
    rig.memory.put(ID, stored);
    let store = rig.open();
    rig.read_right(&store, &rig.pieces(0..count));
    // Another key: nothing comes out.
    rig.facts.cipher = Some(Cipher { key: [9; 32], iv: IV });
    let store = rig.open_with(|options| options.work_dir = None);
    for chunk in 0..count {
        let result = wait(&read(&store, &[rig.piece(chunk)]));
        assert!(matches!(result, Err(ReadError::Damaged { .. })), "{result:?}");
    }
}

#[test]
fn damaged_batch_fails_its_own_readers_only() {
    let rig = Rig::batched(4, None);
    let mut stored = rig.memory.get(ID);
    let at = rig.chunks[MEMBERS as usize].compressed_offset as usize;
    stored[at + 40] ^= 0x10;
    rig.memory.put(ID, stored);
    let store = rig.open();
    let readers: Vec<_> = (0..4 * MEMBERS).map(|chunk| read(&store, &[rig.piece(chunk)])).collect();
    let mut damaged = 0;
    for (chunk, reader) in (0..).zip(&readers) {
        match wait(reader) {
            Ok(bytes) => assert_eq!(bytes, rig.expected(&[rig.piece(chunk)])),
            Err(error) => {
                assert!(matches!(error, ReadError::Damaged { offset, .. } if offset == at as u64), "{error:?}");
                assert_eq!(chunk / MEMBERS, 1);
                damaged += 1;
            }
        }
    }
    // One byte may be all that differs, and then the chunks before it are right.
    assert!((1..=MEMBERS).contains(&damaged));
    assert!(rig.backend.requests() <= 4 + MEMBERS as usize, "asked again once, not for ever");
}

#[test]
fn damaged_chunk_hurts_no_neighbour_in_its_batch() {
    let mut rig = Rig::batched(2, None);
    rig.chunks[8].digest = Some([1; 32]);
    for work_dir in [true, false] {
        let store = rig.open_with(|options| {
            if !work_dir {
                options.work_dir = None;
            }
        });
        let readers: Vec<_> = (0..2 * MEMBERS).map(|chunk| read(&store, &[rig.piece(chunk)])).collect();
        for (chunk, reader) in (0..).zip(&readers) {
            match wait(reader) {
                Ok(bytes) => assert_eq!(bytes, rig.expected(&[rig.piece(chunk)])),
                Err(error) => assert!(matches!(error, ReadError::Damaged { chunk: 8, .. }), "{error:?}"),
            }
        }
        assert!(wait(&read(&store, &[rig.piece(8)])).is_err());
    }
}

#[test]
fn batches_that_cannot_be_are_refused_and_false_ones_yield_nothing_wrong() {
    type Change = fn(&mut ChunkFacts);
    let rows: [(&str, Change); 6] = [
        ("a bomb", |chunk| chunk.coding = Coding::Batch { plain_bytes: u32::MAX, offset: 0 }),
        ("a small bomb", |chunk| chunk.coding = Coding::Batch { plain_bytes: 16 << 20, offset: 0 }),
        ("an offset that overflows", |chunk| chunk.coding = Coding::Batch { plain_bytes: 6000, offset: u32::MAX }),
        ("a chunk behind the batch", |chunk| chunk.coding = Coding::Batch { plain_bytes: 100, offset: 90 }),
        ("another place", |chunk| chunk.coding = Coding::Batch { plain_bytes: 6017, offset: 5 }),
        ("a context without a table", |chunk| chunk.coding = Coding::Zran { context: 3, offset: 0 }),
    ];
    for (what, change) in rows {
        let mut rig = Rig::batched(2, None);
        change(&mut rig.chunks[2]);
        let store = rig.open();
        let readers: Vec<_> = (0..2 * MEMBERS).map(|chunk| read(&store, &[rig.piece(chunk)])).collect();
        for (chunk, reader) in (0..).zip(&readers) {
            let result = wait(reader);
            match result {
                Ok(bytes) => assert_eq!(bytes, rig.expected(&[rig.piece(chunk)]), "{what}"),
                Err(error) => assert_eq!(chunk, 2, "{what}: {error:?}"),
            }
        }
        assert!(wait(&read(&store, &[rig.piece(2)])).is_err(), "{what}");
    }
}

/// An image over a layer, its store, and the content of all chunks.
struct Layered {
    home: tempfile::TempDir,
    chunks: Vec<(ChunkFacts, Vec<u8>)>,
    backend: Arc<FaultBackend>,
    metrics: Arc<Metrics>,
    image: Arc<Image>,
    pool: Arc<Pool>,
}

impl Layered {
    fn new(layer: Layer) -> Self {
        let home = tempfile::tempdir().unwrap();
        let source = home.path().join("source");
        std::fs::create_dir(&source).unwrap();
        for file in 0..60usize {
            let seed = file.to_string();
            let len = 1 + file * 337 % 9000;
            let bytes = if file % 4 == 1 { make::noise(&seed, len) } else { make::text(&seed, len * 3) };
            std::fs::write(source.join(&seed), bytes).unwrap();
        }
        let made = home.path().join("made");
        let made = make::image(&source, &made, Compressor::Zstd, Digester::Sha256, 4096);
        let folder = home.path().join("layered");
        reference_layer::convert(&made.bootstrap, &made.blobs, &folder, layer, reference_layer::SMALL_CONTEXTS);
        let readback = Readback::open(&made.bootstrap, &made.blobs).unwrap();
        let count = readback.image().blobs()[0].chunk_count;
        let chunks = (0..count).map(|chunk| readback.chunk(0, chunk).unwrap()).collect();
        let bootstrap = std::fs::File::open(folder.join("bootstrap")).unwrap();
        let view = View::map_file(bootstrap.as_fd(), bootstrap.metadata().unwrap().len()).unwrap();
        let image = Arc::new(Image::open(view, &OpenOptions { placeholder_id: None }).unwrap());
        let pool = Pool::new(2).unwrap();
        let files = LocalFs::new(Place::Directories(vec![folder.join("blobs")]), Arc::clone(&pool));
        let backend = FaultBackend::new(Arc::new(files), Arc::clone(&pool));
        Self { home, chunks, backend, metrics: Arc::new(Metrics::new(0)), image, pool }
    }

    fn open(&self, work_dir: Option<&str>) -> Store {
        let options = StoreOptions {
            work_dir: work_dir.map(|name| self.home.path().join(name)),
            form: CacheForm::Plain,
            index: Index::Map,
            boot_id: BOOT,
            amplify_bytes: 0,
            validate: false,
            demand_deadline: Some(LONG),
            pool: Arc::clone(&self.pool),
            bootstrap: None,
        };
        let source = Arc::clone(&self.image);
        let chunks = Arc::new(LazyChunks::new(move || source.chunk_index()));
        let backend = Arc::clone(&self.backend) as Arc<dyn Backend>;
        Store::open(options, self.image.blobs().to_vec(), chunks, backend, Arc::clone(&self.metrics)).unwrap()
    }

    fn piece(&self, chunk: usize) -> Piece {
        let facts = &self.chunks[chunk].0;
        Piece { blob: 0, chunk: chunk as u32, offset: facts.uncompressed_offset, len: facts.uncompressed_bytes }
    }

    #[track_caller]
    fn read_right(&self, store: &Store, chunk: usize) {
        let bytes = wait(&read(store, &[self.piece(chunk)])).unwrap();
        assert!(bytes == self.chunks[chunk].1, "wrong bytes in chunk {chunk}");
    }
}

#[test]
fn layers_are_read_in_any_order_with_and_without_a_cache() {
    for layer in [Layer::Tar, Layer::Gzip, Layer::Members] {
        let layered = Layered::new(layer);
        let count = layered.chunks.len();
        assert!(count > 100);
        for work_dir in [Some("cache"), None] {
            let store = layered.open(work_dir);
            for step in 0..count {
                layered.read_right(&store, step * 67 % count);
            }
            drop(store);
            let store = layered.open(work_dir);
            let pieces: Vec<_> = (0..count).map(|chunk| layered.piece(chunk)).collect();
            let bytes = wait(&read(&store, &pieces)).unwrap();
            assert!(bytes == layered.chunks.iter().flat_map(|(_, bytes)| bytes).copied().collect::<Vec<_>>());
        }
    }
}

#[test]
fn context_is_fetched_and_decoded_once_by_reads_one_after_the_other() {
    for (layer, work_dir) in [(Layer::Gzip, Some("cache")), (Layer::Gzip, None), (Layer::Members, None)] {
        let layered = Layered::new(layer);
        let store = layered.open(work_dir);
        (0..layered.chunks.len()).for_each(|chunk| layered.read_right(&store, chunk));
        let units: std::collections::HashSet<_> = layered.backend.log().into_iter().collect();
        // The chunk table is the other one.
        assert_eq!(units.len(), layered.backend.requests(), "{layer:?} {work_dir:?}: none twice");
        assert_eq!(layered.metrics.storage.units_decoded.get(), units.len() as u64 - 1);
        assert!(units.len() > 4 && units.len() < layered.chunks.len() / 2, "{} contexts", units.len());
    }
}

#[test]
fn chunk_at_the_front_of_a_context_does_not_need_what_follows() {
    let layered = Layered::new(Layer::Gzip);
    let all = 0..layered.chunks.len();
    let store = layered.open(None);
    all.clone().for_each(|chunk| layered.read_right(&store, chunk));
    let longest = layered.backend.log().into_iter().skip(1).max_by_key(|(_, range)| range.end - range.start);
    let (id, longest) = longest.unwrap();
    let path = layered.home.path().join("layered/blobs").join(&*id);
    let good = std::fs::read(&path).unwrap();
    // The end of its bytes may not be needed at all: the last block in it can go on behind its last chunk.
    let outcomes = [2, 3, 4, 6].map(|part| {
        let mut file = good.clone();
        let damage = longest.start + (longest.end - longest.start) / part;
        file[damage as usize..longest.end as usize].fill(0);
        std::fs::write(&path, file).unwrap();
        let store = layered.open(Some(&format!("cache-{part}")));
        let (mut right, mut wrong) = (0, 0);
        for chunk in all.clone() {
            let before = layered.backend.requests();
            let result = wait(&read(&store, &[layered.piece(chunk)]));
            let is_fetched = layered.backend.log()[before..].iter().any(|(_, range)| *range == longest);
            match result {
                Ok(bytes) => {
                    assert!(bytes == layered.chunks[chunk].1);
                    right += usize::from(is_fetched);
                }
                Err(error) => {
                    assert!(matches!(error, ReadError::Damaged { .. }), "{error:?}");
                    wrong += usize::from(is_fetched);
                }
            }
        }
        (right, wrong)
    });
    assert!(outcomes.iter().any(|(right, wrong)| *right > 0 && *wrong > 0), "right and wrong: {outcomes:?}");
}

#[test]
fn decoded_units_without_a_cache_are_given_back_after_a_while() {
    let layered = Layered::new(Layer::Gzip);
    let store = layered.open(None);
    layered.read_right(&store, 0);
    layered.read_right(&store, 1);
    assert_eq!(layered.metrics.storage.units_decoded.get(), 1, "the second one went on");
    std::thread::sleep(crate::limits::SHELF_REST * 2 + Duration::from_millis(500));
    layered.read_right(&store, 2);
    assert_eq!(layered.metrics.storage.units_decoded.get(), 2, "nothing was left");
}
