//! The other ways to keep chunks: nowhere, without a chunk map, and a tar that lies in the cache directory.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use super::*;
use crate::limits::DECODED_BYTES;
use crate::rafs::facts::feature;
use crate::storage::cache::CacheError;
use crate::storage::store::StoreError;
use crate::testing::fault::Order;

fn uncached(options: &mut StoreOptions) {
    options.work_dir = None;
}

#[test]
fn without_a_cache_hot_chunks_are_served_from_memory() {
    let rig = Rig::new(20);
    let store = rig.open_with(uncached);
    rig.read_right(&store, &rig.pieces(3..6));
    let requests = rig.backend.requests();
    assert_eq!(requests, 1, "neighbours are one request");
    rig.hang();
    let before = rig.metrics.storage.warm_reads.get();
    for chunk in 3..6 {
        rig.read_right(&store, &[rig.piece(chunk)]);
    }
    rig.read_right(&store, &rig.pieces(3..6));
    assert_eq!(rig.metrics.storage.warm_reads.get(), before + 4, "on the caller's thread");
    assert_eq!(rig.backend.requests(), requests);
    assert!(!rig.cache_dir().exists());
}

#[test]
fn without_a_cache_readers_of_a_chunk_in_flight_share_it() {
    let rig = Rig::new(20);
    let store = rig.open_with(uncached);
    rig.hang();
    let answers: Vec<_> = (0..10).map(|_| read(&store, &rig.pieces(3..5))).collect();
    until("request", || rig.backend.kept() == 1);
    std::thread::sleep(Duration::from_millis(50));
    rig.backend.release(Order::FirstFirst);
    for answer in &answers {
        assert!(wait(answer).unwrap() == rig.expected(&rig.pieces(3..5)));
    }
    assert_eq!(rig.backend.requests(), 1);
}

#[test]
fn chunks_in_memory_are_bounded_and_the_oldest_goes_first() {
    let chunk_bytes = 4 << 20;
    let fits = (DECODED_BYTES / chunk_bytes) as u32;
    let rig = Rig::with_chunks(fits + 1, chunk_bytes as u32);
    let store = rig.open_with(uncached);
    for chunk in 0..fits {
        rig.read_right(&store, &[rig.piece(chunk)]);
    }
    // Used again: the second one is now the oldest.
    rig.read_right(&store, &[rig.piece(0)]);
    rig.read_right(&store, &[rig.piece(fits)]);
    let requests = rig.backend.requests();
    assert_eq!(requests, fits as usize + 1);
    rig.read_right(&store, &[rig.piece(0)]);
    assert_eq!(rig.backend.requests(), requests);
    rig.read_right(&store, &[rig.piece(1)]);
    assert_eq!(rig.backend.requests(), requests + 1);
}

fn unindexed(options: &mut StoreOptions) {
    options.index = Index::None;
}

#[test]
fn without_a_chunk_map_what_is_found_is_verified_and_what_is_not_there_is_fetched() {
    let rig = Rig::with_chunks(10, 4096);
    {
        let store = rig.open_with(unindexed);
        rig.read_right(&store, &rig.pieces(0..5));
        let requests = rig.backend.requests();
        rig.read_right(&store, &rig.pieces(0..5));
        assert_eq!(rig.backend.requests(), requests, "known in this process");
    }
    assert!(!rig.file(".blob.data.chunk_map").exists());
    let data = OpenOptions::new().write(true).open(rig.file(".blob.data")).unwrap();
    data.write_all_at(b"flipped", rig.chunks[2].uncompressed_offset).unwrap();
    let requests = rig.backend.requests();
    let store = rig.open_with(unindexed);
    rig.read_right(&store, &rig.pieces(0..5));
    assert_eq!(rig.backend.requests(), requests + 1, "only the damaged one");
    rig.read_right(&store, &rig.pieces(0..10));
    drop(store);
    // Of another origin, as upstream's would be: nothing but the data file.
    std::fs::remove_file(rig.file(".nydus_state")).unwrap();
    rig.hang();
    rig.read_right(&rig.open_with(unindexed), &rig.pieces(0..10));
    assert!(rig.metrics.storage.hints_confirmed.get() >= 10);
}

#[test]
fn chunk_map_of_v6_is_used_whatever_is_asked_for() {
    let mut rig = Rig::new(3);
    rig.facts.meta = Some(crate::rafs::facts::MetaLocation {
        holder: crate::rafs::facts::MetaHolder::Blob,
        offset: 0,
        compressed_bytes: 0,
        uncompressed_bytes: 0,
        compressor: Compressor::None,
    });
    drop(rig.open_with(unindexed));
    assert!(rig.file(".blob.data.chunk_map").exists());
}

/// A blob that is an uncompressed tar, in pieces of 4096 bytes, the last one shorter.
fn tar() -> Rig {
    let mut rig = Rig::with_chunks(4, 4096);
    rig.plain.truncate(3 * 4096 + 512);
    rig.facts.features = feature::TARFS;
    rig.facts.chunk_bytes = 4096;
    let len = rig.plain.len() as u64;
    (rig.facts.uncompressed_bytes, rig.facts.compressed_bytes, rig.facts.data_bytes) = (len, len, len);
    for (index, chunk) in rig.chunks.iter_mut().enumerate() {
        let offset = index as u64 * 4096;
        let bytes = (len - offset).min(4096) as u32;
        *chunk = ChunkFacts {
            compressed_offset: offset,
            compressed_bytes: bytes,
            uncompressed_offset: offset,
            uncompressed_bytes: bytes,
            coding: Coding::Plain,
            digest: None,
            crc32c: None,
        };
    }
    rig.memory.put(ID, rig.plain.clone());
    std::fs::create_dir(rig.cache_dir()).unwrap();
    rig
}

fn files(rig: &Rig) -> Vec<String> {
    let entries = std::fs::read_dir(rig.cache_dir()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn tar_in_the_cache_directory_is_used_in_place() {
    let rig = tar();
    std::fs::write(rig.file(""), &rig.plain).unwrap();
    let mut mode = rig.file("").metadata().unwrap().permissions();
    mode.set_readonly(true);
    std::fs::set_permissions(rig.file(""), mode).unwrap();
    for validate in [false, true] {
        let store = rig.open_with(|options| options.validate = validate);
        assert!(store.is_full(0));
        rig.read_right(&store, &rig.pieces(0..4));
        let before = rig.metrics.storage.warm_reads.get();
        rig.read_right(&store, &rig.pieces(0..4));
        assert_eq!(rig.metrics.storage.warm_reads.get(), before + 1);
    }
    assert_eq!(rig.backend.requests(), 0);
    assert_eq!(files(&rig), [ID], "nothing is written beside it");
    assert!(std::fs::read(rig.file("")).unwrap() == rig.plain);
}

#[test]
fn what_lies_behind_the_end_of_a_short_tar_comes_from_the_backend() {
    for keep in [1, 4096, 9000, 3 * 4096] {
        let rig = tar();
        std::fs::write(rig.file(""), &rig.plain[..keep]).unwrap();
        let store = rig.open();
        assert!(!store.is_full(0));
        rig.read_right(&store, &rig.pieces(0..4));
        assert_eq!(rig.backend.requests(), 1, "{keep}");
        rig.backend.set(Fault::Fail(crate::storage::backend::BackendError::Lasting("none".into())));
        let store = rig.open();
        for chunk in 0..4 {
            let is_there = rig.chunks[chunk as usize].uncompressed_offset + 4096 <= keep as u64;
            assert_eq!(wait(&read(&store, &[rig.piece(chunk)])).is_ok(), is_there, "{keep} {chunk}");
        }
        assert_eq!(files(&rig), [ID]);
        assert_eq!(rig.metrics.storage.disputed_chunks.get(), 0);
    }
}

#[test]
fn tar_that_is_not_there_is_fetched_into_memory() {
    let rig = tar();
    let store = rig.open();
    for _ in 0..2 {
        rig.read_right(&store, &rig.pieces(0..4));
    }
    assert_eq!(rig.backend.requests(), 1);
    assert!(files(&rig).is_empty());
}

#[test]
fn tar_behind_a_symlink_is_refused() {
    let rig = tar();
    std::os::unix::fs::symlink("/etc/passwd", rig.file("")).unwrap();
    let chunks = Arc::new(Chunks(rig.chunks.clone()));
    let backend = Arc::clone(&rig.backend) as Arc<dyn Backend>;
    let opened = Store::open(rig.options.clone(), vec![rig.facts.clone()], chunks, backend, Arc::clone(&rig.metrics));
    assert!(matches!(opened, Err(StoreError::Cache(CacheError::NotRegular { .. }))));
}

#[test]
fn tar_that_is_cut_or_removed_in_use_gives_errors_or_right_bytes() {
    for keep in [0, 512, 8192] {
        let rig = tar();
        std::fs::write(rig.file(""), &rig.plain).unwrap();
        let store = rig.open();
        rig.read_right(&store, &rig.pieces(0..4));
        OpenOptions::new().write(true).open(rig.file("")).unwrap().set_len(keep).unwrap();
        for _ in 0..3 {
            for chunk in 0..3 {
                match wait(&read(&store, &[rig.piece(chunk)])) {
                    Ok(bytes) => assert!(bytes == rig.expected(&[rig.piece(chunk)]), "cut to {keep}, chunk {chunk}"),
                    Err(error) => assert!(matches!(error, ReadError::Lost(_)), "{error:?}"),
                }
            }
        }
        std::fs::remove_file(rig.file("")).unwrap();
        store.inner.blobs[0].renew(&store.inner);
        rig.read_right(&store, &rig.pieces(0..3));
        std::fs::write(rig.file(""), &rig.plain).unwrap();
        store.inner.blobs[0].renew(&store.inner);
        let requests = rig.backend.requests();
        rig.read_right(&store, &rig.pieces(0..3));
        assert_eq!(rig.backend.requests(), requests);
    }
}
