//! Caches of the real nydusd: filled by us they are equal byte for byte, made by it they are taken over.

use std::os::fd::AsFd;
use std::path::PathBuf;

use super::*;
use crate::rafs::image::Image;
use crate::rafs::image::OpenOptions;
use crate::storage::backend::localfs::LocalFs;
use crate::storage::backend::localfs::Place;
use crate::storage::store::LazyChunks;
use crate::sys::view::View;
use crate::testing::manifest;

/// Folder of the reference image `name`; `None`: there are none here.
fn reference(name: &str) -> Option<PathBuf> {
    let folder = manifest::reference_images()?.join(name);
    assert!(folder.is_dir(), "{} is missing", folder.display());
    Some(folder)
}

struct Reference {
    image: Arc<Image>,
    store: Store,
    backend: Arc<FaultBackend>,
    metrics: Arc<Metrics>,
}

fn open(folder: &Path, work_dir: &Path) -> Reference {
    open_with(folder, work_dir, |source| source)
}

fn open_with(
    folder: &Path,
    work_dir: &Path,
    change: impl FnOnce(Arc<dyn ChunkSource>) -> Arc<dyn ChunkSource>,
) -> Reference {
    let bootstrap = std::fs::File::open(folder.join("bootstrap")).unwrap();
    let view = View::map_file(bootstrap.as_fd(), bootstrap.metadata().unwrap().len()).unwrap();
    let image = Arc::new(Image::open(view, &OpenOptions { placeholder_id: None }).unwrap());
    let pool = Pool::new(2).unwrap();
    let local = LocalFs::new(Place::Directories(vec![folder.join("blobs")]), Arc::clone(&pool));
    let backend = FaultBackend::new(Arc::new(local), Arc::clone(&pool));
    let metrics = Arc::new(Metrics::new(0));
    let options = StoreOptions {
        work_dir: Some(work_dir.into()),
        form: CacheForm::Plain,
        index: Index::Map,
        boot_id: BOOT,
        amplify_bytes: 1 << 20,
        validate: false,
        demand_deadline: Some(LONG),
        pool,
        bootstrap: None,
    };
    let source = Arc::clone(&image);
    let chunks = change(Arc::new(LazyChunks::new(move || source.chunk_index())));
    let below = Arc::clone(&backend) as Arc<dyn Backend>;
    let store = Store::open(options, image.blobs().to_vec(), chunks, below, Arc::clone(&metrics)).unwrap();
    Reference { image, store, backend, metrics }
}

/// Reads every regular file below `dir`.
fn read_all(reference: &Reference, dir: u32) {
    let image = &reference.image;
    let facts = image.inode(dir).unwrap();
    let mut entries = image.entries(&facts, 0).unwrap();
    while let Some(entry) = entries.next() {
        let entry = entry.unwrap();
        if entry.name == b"." || entry.name == b".." {
            continue;
        }
        let inode = image.inode(entry.ino).unwrap();
        match rustix::fs::FileType::from_raw_mode(inode.mode) {
            rustix::fs::FileType::Directory => read_all(reference, entry.ino),
            rustix::fs::FileType::RegularFile => {
                let mut pieces = smallvec::SmallVec::new();
                image.plan(&inode, 0..inode.size, &mut pieces).unwrap();
                let bytes = wait(&read(&reference.store, &pieces)).unwrap();
                let planned: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
                assert_eq!(bytes.len() as u64, planned);
            }
            _ => {}
        }
    }
}

fn files(dir: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn filled_cache_equals_upstreams() {
    for name in ["v6-zstd-4k", "v5-lz4-blake3"] {
        let Some(folder) = reference(name) else { return };
        let dir = tempfile::tempdir().unwrap();
        let opened = open(&folder, dir.path());
        read_all(&opened, opened.image.root());
        drop(opened);
        let ours = files(dir.path());
        for (file, theirs) in files(&folder.join("cache")) {
            assert!(ours.get(&file) == Some(&theirs), "{name}: {file} differs");
        }
        let others: Vec<_> = ours.keys().filter(|file| !folder.join("cache").join(file).exists()).collect();
        assert!(others.iter().all(|file| file.ends_with(".nydus_state")), "{name}: {others:?}");
    }
}

#[test]
fn upstreams_cache_is_taken_over_without_the_backend() {
    for (name, cache) in [("v6-zstd-4k", "cache"), ("v5-lz4-blake3", "cache")] {
        let Some(folder) = reference(name) else { return };
        let dir = tempfile::tempdir().unwrap();
        for (file, bytes) in files(&folder.join(cache)) {
            std::fs::write(dir.path().join(file), bytes).unwrap();
        }
        let opened = open(&folder, dir.path());
        opened.backend.set(Fault::Hang);
        read_all(&opened, opened.image.root());
        assert_eq!(opened.backend.requests(), 0, "{name}");
        assert!(opened.metrics.storage.hints_confirmed.get() > 100, "{name}");
        assert_eq!(opened.metrics.storage.hints_refuted.get(), 0, "{name}");
    }
}

#[test]
fn partial_cache_is_taken_over_and_completed() {
    let Some(folder) = reference("v6-lz4-blake3") else { return };
    let dir = tempfile::tempdir().unwrap();
    for (file, bytes) in files(&folder.join("cache-partial")) {
        std::fs::write(dir.path().join(file), bytes).unwrap();
    }
    let opened = open(&folder, dir.path());
    opened.backend.set(Fault::Hang);
    let image = &opened.image;
    let root = image.inode(image.root()).unwrap();
    let many = image.inode(image.lookup(&root, b"many").unwrap().unwrap()).unwrap();
    let file = image.inode(image.lookup(&many, b"file-00005").unwrap().unwrap()).unwrap();
    let mut pieces = smallvec::SmallVec::new();
    image.plan(&file, 0..file.size, &mut pieces).unwrap();
    assert!(wait(&read(&opened.store, &pieces)).is_ok());
    assert_eq!(opened.backend.requests(), 0, "what is ready needs no backend");
    opened.backend.set(Fault::None);
    read_all(&opened, image.root());
    assert!(opened.backend.requests() > 0);
    assert_eq!(opened.metrics.storage.hints_refuted.get(), 0);
}

#[test]
fn chunk_table_that_cannot_be_fetched_fails_only_the_reads_that_wait() {
    let Some(folder) = reference("v6-zstd-4k") else { return };
    let dir = tempfile::tempdir().unwrap();
    let opened = open(&folder, dir.path());
    let lasting = crate::storage::backend::BackendError::Lasting("no".into());
    opened.backend.once(Fault::Fail(lasting));
    let piece = Piece { blob: 0, chunk: 0, offset: 0, len: 1 };
    assert!(matches!(wait(&read(&opened.store, &[piece])), Err(ReadError::Backend { .. })));
    opened.backend.once(Fault::Wrong);
    assert!(wait(&read(&opened.store, &[piece])).is_err());
    assert!(wait(&read(&opened.store, &[piece])).is_ok());
}

/// A bootstrap that has chunk 3 elsewhere than the blob's table.
struct Elsewhere(Arc<dyn ChunkSource>);

impl ChunkSource for Elsewhere {
    fn prepare(&self) -> Result<(), RafsError> {
        self.0.prepare()
    }

    fn chunk(&self, blob: u32, chunk: u32) -> Result<Option<ChunkFacts>, RafsError> {
        self.0.chunk(blob, chunk)
    }

    fn seal(&self, blob: u32, chunk: u32) -> Result<Option<Seal>, RafsError> {
        let seal = self.0.seal(blob, chunk)?;
        let offset = if chunk == 3 { 4096 } else { 0 };
        Ok(seal.map(|seal| Seal { uncompressed_offset: seal.uncompressed_offset + offset, ..seal }))
    }
}

#[test]
fn chunk_that_its_blob_places_elsewhere_than_the_bootstrap_is_refused() {
    let Some(folder) = reference("v6-zstd-4k") else { return };
    let dir = tempfile::tempdir().unwrap();
    let opened = open_with(&folder, dir.path(), |source| Arc::new(Elsewhere(source)));
    for (chunk, is_right) in [(2, true), (3, false), (4, true), (3, false)] {
        let piece = Piece { blob: 0, chunk, offset: u64::from(chunk) * 4096, len: 1 };
        let result = wait(&read(&opened.store, &[piece]));
        assert_eq!(result.is_ok(), is_right, "{chunk}: {result:?}");
        assert!(is_right || matches!(result, Err(ReadError::BadChunk { chunk: 3, .. })));
    }
    let data = std::fs::read(dir.path().join(format!("{ZSTD_4K}.blob.data"))).unwrap();
    assert!(data[3 * 4096..4 * 4096].iter().all(|byte| *byte == 0), "nothing is written to a doubtful place");
}

#[test]
fn damaged_chunk_table_in_the_cache_is_fetched_again() {
    let Some(folder) = reference("v6-zstd-4k") else { return };
    let good = std::fs::read(folder.join("cache").join(format!("{ZSTD_4K}.blob.meta"))).unwrap();
    let mut shifted = good.clone();
    // A stored offset that is plausible, but wrong.
    shifted[16 * 3 + 8] ^= 1;
    let mut headless = good.clone();
    headless[4096..].fill(0);
    for (name, bytes) in [("short", good[..100].to_vec()), ("headless", headless), ("shifted", shifted)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("{ZSTD_4K}.blob.meta"));
        std::fs::write(&path, bytes).unwrap();
        let opened = open(&folder, dir.path());
        let piece = Piece { blob: 0, chunk: 3, offset: 3 * 4096, len: 1 };
        // The wrong offset shows by the digest; after that the table is not believed any more, also by this read.
        assert!(wait(&read(&opened.store, &[piece])).is_ok(), "{name}");
        assert!(std::fs::read(&path).unwrap() == good, "{name}");
    }
}

const ZSTD_4K: &str = "66f81a1907a3d1b1e7e5f0873ce05c39777c5f2b4241ae77da5cbb2a6b8f52ba";
