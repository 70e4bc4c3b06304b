//! Chunks kept as they are stored, or encrypted: upstream's bytes, written by the format document, are taken over, and
//! ours are those.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use super::*;
use crate::rafs::facts::feature;
use crate::storage::cache::CacheError;
use crate::storage::codec::xts::Xts;
use crate::storage::store::StoreError;

const KEY: [u8; 32] = *b"sixteen bytes...and another half";

fn form(form: &CacheForm) -> impl FnOnce(&mut StoreOptions) {
    let form = form.clone();
    move |options| options.form = form
}

/// A blob whose chunks are aligned, each shorter than its two pages.
fn aligned(count: u32) -> Rig {
    let mut rig = Rig::new(count);
    rig.facts.features = feature::ALIGNED;
    let mut plain = Vec::new();
    for chunk in &mut rig.chunks {
        let at = chunk.uncompressed_offset as usize;
        chunk.uncompressed_offset = plain.len() as u64;
        plain.extend_from_slice(&rig.plain[at..at + 5000]);
        plain.resize(plain.len().next_multiple_of(4096), 0);
    }
    rig.plain = plain;
    rig.facts.uncompressed_bytes = rig.plain.len() as u64;
    rig
}

/// All stored bytes of the blob.
fn stored(rig: &Rig) -> Vec<u8> {
    let (tell, told) = mpsc::channel();
    let whole = crate::storage::backend::Request {
        blob: Arc::from(ID),
        range: 0..rig.facts.data_bytes,
        class: crate::storage::backend::Class::Demand,
        deadline: None,
    };
    rig.memory.read(whole, crate::storage::backend::Answer::new(move |result| tell.send(result).unwrap()));
    told.recv().unwrap().unwrap()
}

/// A chunk in the data file, by format section 11.
fn kept(rig: &Rig, form: &CacheForm, chunk: &ChunkFacts) -> (u64, Vec<u8>) {
    let plain = &rig.plain[chunk.uncompressed_offset as usize..][..chunk.uncompressed_bytes as usize];
    let key = match form {
        CacheForm::Plain => return (chunk.uncompressed_offset, plain.to_vec()),
        CacheForm::Compressed => {
            let range = chunk.compressed_offset as usize..;
            return (chunk.compressed_offset, stored(rig)[range][..chunk.compressed_bytes as usize].to_vec());
        }
        CacheForm::Encrypted(key) => *key,
        CacheForm::Convergent => chunk.digest.unwrap(),
    };
    let mut pages = plain.to_vec();
    pages.resize(8192, 0);
    pages.chunks_mut(4096).for_each(|page| Xts::new(&key).encrypt(&[0; 16], page).unwrap());
    (chunk.uncompressed_offset, pages)
}

fn data_name(form: &CacheForm) -> &'static str {
    if matches!(form, CacheForm::Compressed) { ".blob.raw" } else { ".blob.data" }
}

fn data_bytes(rig: &Rig, form: &CacheForm) -> u64 {
    if matches!(form, CacheForm::Compressed) { rig.facts.data_bytes } else { rig.facts.uncompressed_bytes }
}

/// The files of a cache that holds `chunks`, as upstream leaves them: data and chunk map.
fn upstreams(rig: &Rig, form: &CacheForm, chunks: impl Iterator<Item = u32>) -> [(&'static str, Vec<u8>); 2] {
    let mut data = vec![0; data_bytes(rig, form) as usize];
    let mut map = [0x424D_4150u32, 1, 0x434D_4150, 0].map(u32::to_le_bytes).concat();
    map.resize(4096 + rig.chunks.len().div_ceil(8), 0);
    for chunk in chunks {
        let (offset, bytes) = kept(rig, form, &rig.chunks[chunk as usize]);
        data[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        map[4096 + chunk as usize / 8] |= 0x80 >> (chunk % 8);
    }
    [(data_name(form), data), (".blob.data.chunk_map", map)]
}

fn forms() -> [CacheForm; 3] {
    [CacheForm::Compressed, CacheForm::Encrypted(KEY), CacheForm::Convergent]
}

#[test]
fn files_of_a_filled_cache_are_upstreams() {
    for kind in forms() {
        let rig = aligned(30);
        let store = rig.open_with(form(&kind));
        rig.read_right(&store, &rig.pieces(0..30));
        drop(store);
        for (name, bytes) in upstreams(&rig, &kind, 0..30) {
            assert!(std::fs::read(rig.file(name)).unwrap() == bytes, "{kind:?}: {name} differs");
        }
        let other = if matches!(kind, CacheForm::Compressed) { ".blob.data" } else { ".blob.raw" };
        assert!(!rig.file(other).exists());
    }
}

#[test]
fn upstreams_full_and_partial_caches_are_taken_over() {
    for kind in forms() {
        for (name, has) in [("all", [true; 4]), ("some", [true, false, true, false])] {
            for validate in [false, true] {
                let rig = aligned(30);
                std::fs::create_dir(rig.cache_dir()).unwrap();
                let chunks = || (0..30).filter(|chunk| has[*chunk as usize % 4]);
                for (suffix, bytes) in upstreams(&rig, &kind, chunks()) {
                    std::fs::write(rig.file(suffix), bytes).unwrap();
                }
                let store = rig.open_with(|options| {
                    options.validate = validate;
                    form(&kind)(options);
                });
                rig.hang();
                for chunk in chunks() {
                    rig.read_right(&store, &[rig.piece(chunk)]);
                }
                assert_eq!(rig.backend.requests(), 0, "{kind:?} {name}");
                assert_eq!(rig.metrics.storage.hints_confirmed.get(), chunks().count() as u64);
                rig.backend.set(Fault::None);
                rig.read_right(&store, &rig.pieces(0..30));
                drop(store);
                for (suffix, bytes) in upstreams(&rig, &kind, 0..30) {
                    let (mut ours, mut theirs) = (std::fs::read(rig.file(suffix)).unwrap(), bytes);
                    if suffix.ends_with("map") {
                        // Set when a full map is opened.
                        ours[12..16].fill(0);
                        theirs[12..16].fill(0);
                    }
                    assert!(ours == theirs, "{kind:?} {name}: {suffix} differs");
                }
            }
        }
    }
}

#[test]
fn restarted_cache_serves_everything_without_backend_and_hot_chunks_from_memory() {
    for kind in forms() {
        let rig = aligned(30);
        rig.read_right(&rig.open_with(form(&kind)), &rig.pieces(0..30));
        rig.hang();
        let requests = rig.backend.requests();
        let store = rig.open_with(form(&kind));
        rig.read_right(&store, &rig.pieces(0..30));
        assert_eq!(rig.metrics.storage.hints_confirmed.get(), 0, "{kind:?}: trusted in the same boot");
        let before = rig.metrics.storage.warm_reads.get();
        let parts: Vec<_> = (0..30).map(|chunk| Piece { len: 100, ..rig.piece(chunk) }).collect();
        parts.iter().for_each(|piece| rig.read_right(&store, &[*piece]));
        assert_eq!(rig.metrics.storage.warm_reads.get(), before + 30, "{kind:?}: on the caller's thread");
        assert_eq!(rig.backend.requests(), requests);
    }
}

#[test]
fn flipped_bits_are_found_and_fetched_again() {
    for kind in forms() {
        for boot in [BOOT, [2; 16]] {
            let rig = aligned(10);
            rig.read_right(&rig.open_with(form(&kind)), &rig.pieces(0..10));
            let (offset, bytes) = kept(&rig, &kind, &rig.chunks[4]);
            let data = OpenOptions::new().write(true).open(rig.file(data_name(&kind))).unwrap();
            data.write_all_at(&[!bytes[100]], offset + 100).unwrap();
            let requests = rig.backend.requests();
            let store = rig.open_with(|options| {
                options.boot_id = boot;
                form(&kind)(options);
            });
            rig.read_right(&store, &rig.pieces(0..10));
            assert_eq!(rig.backend.requests(), requests + 1, "{kind:?}");
            drop(store);
            assert!(std::fs::read(rig.file(data_name(&kind))).unwrap() == upstreams(&rig, &kind, 0..10)[0].1);
            rig.hang();
            rig.read_right(&rig.open_with(form(&kind)), &rig.pieces(0..10));
        }
    }
}

#[test]
fn files_that_are_cut_or_removed_in_use_cost_only_fetches() {
    for kind in forms() {
        let rig = aligned(10);
        let store = rig.open_with(form(&kind));
        rig.read_right(&store, &rig.pieces(0..10));
        let other = rig.open_with(form(&kind));
        OpenOptions::new().write(true).open(rig.file(data_name(&kind))).unwrap().set_len(5000).unwrap();
        rig.read_right(&other, &rig.pieces(0..10));
        std::fs::remove_file(rig.file(data_name(&kind))).unwrap();
        rig.read_right(&rig.open_with(form(&kind)), &rig.pieces(0..10));
        rig.read_right(&store, &rig.pieces(0..10));
    }
}

#[test]
fn two_stores_fetch_each_chunk_once() {
    for kind in forms() {
        let rig = aligned(100);
        let (one, two) = (rig.open_with(form(&kind)), rig.open_with(form(&kind)));
        rig.backend.set(Fault::Delay(Duration::from_millis(2)));
        std::thread::scope(|scope| {
            for store in [&one, &two] {
                scope.spawn(|| (0..100).for_each(|chunk| rig.read_right(store, &[rig.piece(chunk)])));
            }
        });
        assert_eq!(rig.metrics.storage.chunks_fetched.get(), 100, "{kind:?}");
    }
}

#[test]
fn directory_of_another_form_or_key_is_not_believed() {
    let all = [CacheForm::Plain, CacheForm::Compressed, CacheForm::Encrypted(KEY), CacheForm::Convergent];
    for first in &all {
        for second in all.iter().chain(&[CacheForm::Encrypted(*b"another secret..and another half")]) {
            let rig = aligned(10);
            // One after the other, then both at once.
            rig.read_right(&rig.open_with(form(first)), &rig.pieces(0..10));
            let store = rig.open_with(form(second));
            rig.read_right(&store, &rig.pieces(0..10));
            let back = rig.open_with(form(first));
            for _ in 0..2 {
                rig.read_right(&back, &rig.pieces(0..10));
                rig.read_right(&store, &rig.pieces(0..10));
            }
            assert_eq!(rig.metrics.storage.digest_mismatches.get(), 0, "{first:?} {second:?}");
        }
    }
}

#[test]
fn full_disk_serves_from_memory() {
    for kind in forms() {
        let rig = aligned(30);
        let store = rig.open_with(form(&kind));
        let other = rig.open_with(form(&kind));
        // What a disk that is full does to a write: nothing of it arrives.
        std::fs::remove_dir_all(rig.cache_dir()).unwrap();
        for store in [&store, &other] {
            rig.read_right(store, &rig.pieces(0..30));
        }
    }
}

#[test]
fn encrypted_cache_of_a_blob_that_is_not_aligned_is_refused() {
    let rig = Rig::new(3);
    let mut options = rig.options.clone();
    options.form = CacheForm::Encrypted(KEY);
    let chunks = Arc::new(Chunks(rig.chunks.clone()));
    let backend = Arc::clone(&rig.backend) as Arc<dyn Backend>;
    let opened = Store::open(options, vec![rig.facts.clone()], chunks, backend, Arc::clone(&rig.metrics));
    let Err(StoreError::Cache(error @ CacheError::NotAligned { .. })) = opened else { panic!("{opened:?}") };
    assert!(error.to_string().contains(ID));
}

#[test]
fn chunk_that_is_not_aligned_in_an_encrypted_cache_is_served_from_memory() {
    // The blob's size does not give it away.
    let rig = Rig::with_chunks(4, 5120);
    let store = rig.open_with(form(&CacheForm::Encrypted(KEY)));
    for _ in 0..2 {
        rig.read_right(&store, &rig.pieces(0..4));
    }
    assert_eq!(rig.metrics.storage.disputed_chunks.get(), 0);
    drop(store);
    let data = std::fs::read(rig.file(".blob.data")).unwrap();
    assert!(data[8192..].iter().all(|byte| *byte == 0), "only the first one has a place");
}

#[test]
fn reads_of_many_chunks_wait_for_room_and_all_get_through() {
    let rig = Rig::with_chunks(12, 16 << 20);
    let store = rig.open_with(|options| options.work_dir = None);
    let parts = |first: u32| {
        // The end of one chunk and the beginning of the next: 32 MiB are held for 8 KiB.
        let (one, two) = (rig.piece(first), rig.piece(first + 1));
        [Piece { offset: one.offset + u64::from(one.len) - 4096, len: 4096, ..one }, Piece { len: 4096, ..two }]
    };
    rig.hang();
    let answers: Vec<_> = (0..11).map(|first| (first, read(&store, &parts(first)))).collect();
    until("requests", || rig.backend.kept() > 0);
    std::thread::sleep(Duration::from_millis(100));
    let asked: u64 = rig.backend.log().iter().map(|(_, range)| range.end - range.start).sum();
    let all: u64 = rig.chunks.iter().map(|chunk| u64::from(chunk.compressed_bytes)).sum();
    assert!(asked < all, "nobody asks for more than there is room for");
    rig.backend.set(Fault::None);
    rig.backend.release(crate::testing::fault::Order::FirstFirst);
    for (first, answer) in answers {
        assert!(wait(&answer).unwrap() == rig.expected(&parts(first)));
    }
}
