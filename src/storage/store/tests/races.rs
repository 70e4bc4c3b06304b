//! Processes that share a directory and get into each other's way, at the moments that matter.

use std::fs::File;
use std::fs::OpenOptions;

use super::*;
use crate::storage::cache::Directory;
use crate::storage::cache::Generation;
use crate::storage::cache::claims::Right;
use crate::testing::fault::Order;

/// Another process on the directory of `rig`.
fn other(rig: &Rig) -> Generation {
    Generation::open(&Directory::open(rig.cache_dir()).unwrap(), &rig.facts, BOOT).unwrap()
}

/// At the next lock of `store`, another process has just fetched the chunk and given its lock up.
fn fetched_by_another_before_the_lock(rig: &Rig, store: &Store) {
    let other = other(rig);
    let plain = rig.plain.clone();
    let facts = rig.chunks.clone();
    store.inner.blobs[0].before_lock.set(move |chunk| {
        let facts = &facts[chunk as usize];
        let bytes = &plain[facts.uncompressed_offset as usize..][..facts.uncompressed_bytes as usize];
        other.store(chunk, facts, plain_only(bytes), Right::Unlocked).unwrap();
    });
}

#[test]
fn chunk_fetched_between_look_and_lock_is_not_fetched_again() {
    let rig = Rig::new(10);
    let store = rig.open();
    fetched_by_another_before_the_lock(&rig, &store);
    rig.hang();
    rig.read_right(&store, &[rig.piece(3)]);
    assert_eq!(rig.backend.requests(), 0);
}

#[test]
fn neighbour_fetched_between_look_and_lock_is_not_fetched_again() {
    let rig = Rig::new(10);
    let store = rig.open_with(|options| options.amplify_bytes = 1 << 20);
    let blob = Arc::clone(&store.inner.blobs[0]);
    let (rig, store) = (&rig, &store);
    let (others, plain, facts) = (other(rig), rig.expected(&[rig.piece(4)]), rig.chunks[4]);
    // The first lock is that of chunk 3, which is wanted; the next one that of its neighbour.
    blob.before_lock.set({
        let blob = Arc::clone(&blob);
        move |_| blob.before_lock.set(move |_| drop(others.store(4, &facts, plain_only(&plain), Right::Unlocked)))
    });
    rig.read_right(store, &[rig.piece(3)]);
    assert_eq!(rig.backend.log(), [(Arc::from(ID), rig.chunks[3].compressed_offset..rig.chunks[4].compressed_offset)]);
    rig.read_right(store, &[rig.piece(4)]);
    assert_eq!(rig.backend.requests(), 1);
}

#[test]
fn hints_are_verified_by_one_of_two_processes() {
    let rig = Rig::new(40);
    rig.read_right(&rig.open(), &rig.pieces(0..40));
    File::create(rig.file(".nydus_state")).unwrap();
    let (one, two) = (rig.open(), rig.open());
    rig.hang();
    std::thread::scope(|scope| {
        for store in [&one, &two] {
            scope.spawn(|| (0..40).for_each(|chunk| rig.read_right(store, &[rig.piece(chunk)])));
        }
    });
    assert_eq!(rig.metrics.storage.hints_confirmed.get(), 40);
    assert_eq!(rig.metrics.storage.hints_refuted.get(), 0);
}

#[test]
fn process_that_holds_a_chunk_and_does_not_get_on_is_not_waited_for_without_end() {
    let rig = Rig::new(10);
    let store = rig.open_with(|options| options.demand_deadline = Some(Duration::from_secs(2)));
    let other = other(&rig);
    assert!(other.locks().try_lock_chunks(3..4).unwrap());
    let begin = Instant::now();
    rig.read_right(&store, &[rig.piece(3)]);
    assert!(begin.elapsed() >= Duration::from_secs(1), "its turn was respected");
    // Its lock is still its own.
    assert!(!self::other(&rig).locks().try_lock_chunks(3..4).unwrap());
}

#[test]
fn chunk_of_a_process_that_died_is_fetched_within_a_tenth_of_a_second() {
    let delay = |_| {
        let rig = Rig::new(10);
        let (store, dying) = (rig.open(), other(&rig));
        assert!(dying.locks().try_lock_chunks(3..4).unwrap());
        let answer = read(&store, &[rig.piece(3)]);
        // The pauses between two looks are at their longest.
        std::thread::sleep(Duration::from_millis(150));
        assert!(is_waiting(&answer));
        let begin = Instant::now();
        drop(dying);
        assert!(wait(&answer).is_ok());
        begin.elapsed()
    };
    // The best of some: other tests keep the machine busy.
    let best = (0..5).map(delay).min().unwrap();
    assert!(best < Duration::from_millis(100), "{best:?}");
}

#[test]
fn claim_given_up_for_lack_of_interest_is_free_for_all_at_once() {
    let rig = Rig::new(10);
    let (store, other) = (rig.open(), other(&rig));
    let blob = &store.inner.blobs[0];
    let mut claim = blob.claim_missing(3, &rig.chunks[3], &blob.usable_files(&store.inner).unwrap()).unwrap();
    assert!(claim.try_lock());
    assert!(!other.locks().try_lock_chunks(3..4).unwrap());
    assert!(claim.unless_idle().is_none());
    assert!(other.locks().try_lock_chunks(3..4).unwrap());
    assert!(blob.claim_missing(3, &rig.chunks[3], &blob.usable_files(&store.inner).unwrap()).is_some());
}

#[test]
fn data_file_cut_and_side_file_removed_shows_no_zeros_after_another_opens() {
    for keep in [0, 4096, 9000, 49_999] {
        let rig = Rig::new(10);
        let store = rig.open();
        rig.read_right(&store, &rig.pieces(0..10));
        OpenOptions::new().write(true).open(rig.file(".blob.data")).unwrap().set_len(keep).unwrap();
        std::fs::remove_file(rig.file(".nydus_state")).unwrap();
        let other = rig.open();
        for store in [&store, &other] {
            for chunk in 0..9 {
                match wait(&read(store, &[rig.piece(chunk)])) {
                    Ok(bytes) => assert!(bytes == rig.expected(&[rig.piece(chunk)]), "cut to {keep}, chunk {chunk}"),
                    Err(error) => assert!(matches!(error, ReadError::Lost(_)), "{error:?}"),
                }
            }
            rig.read_right(store, &rig.pieces(0..9));
        }
    }
}

#[test]
fn read_that_waits_while_the_files_are_made_anew_begins_anew() {
    let rig = Rig::new(10);
    let store = rig.open();
    rig.hang();
    let answer = read(&store, &rig.pieces(2..5));
    until("request", || rig.backend.kept() == 1);
    std::fs::remove_dir_all(rig.cache_dir()).unwrap();
    std::fs::create_dir(rig.cache_dir()).unwrap();
    // The directory that is open was removed as well: nothing can be made in it.
    store.inner.blobs[0].renew(&store.inner);
    assert_eq!(rig.metrics.storage.cache_reopened.get(), 0);
    rig.backend.set(Fault::None);
    rig.backend.release(Order::FirstFirst);
    assert!(wait(&answer).unwrap() == rig.expected(&rig.pieces(2..5)));

    let store = rig.open();
    rig.hang();
    let answer = read(&store, &rig.pieces(2..5));
    until("request", || rig.backend.kept() == 1);
    std::fs::remove_file(rig.file(".blob.data")).unwrap();
    store.inner.blobs[0].renew(&store.inner);
    assert_eq!(rig.metrics.storage.cache_reopened.get(), 1);
    rig.backend.set(Fault::None);
    rig.backend.release(Order::FirstFirst);
    assert!(wait(&answer).unwrap() == rig.expected(&rig.pieces(2..5)));
}

#[test]
fn each_file_that_is_removed_in_use_is_missed() {
    for suffix in [".blob.data", ".blob.data.chunk_map", ".nydus_state"] {
        let rig = Rig::new(10);
        let store = rig.open();
        rig.read_right(&store, &rig.pieces(0..10));
        store.inner.blobs[0].renew(&store.inner);
        assert_eq!(rig.metrics.storage.cache_reopened.get(), 0, "nothing was removed");
        std::fs::remove_file(rig.file(suffix)).unwrap();
        store.inner.blobs[0].renew(&store.inner);
        assert_eq!(rig.metrics.storage.cache_reopened.get(), 1, "{suffix}");
        rig.read_right(&store, &rig.pieces(0..10));
    }
}

#[test]
fn truncated_map_or_side_file_is_made_anew_in_use() {
    for suffix in [".blob.data.chunk_map", ".nydus_state"] {
        let rig = Rig::new(10);
        let store = rig.open();
        rig.read_right(&store, &rig.pieces(0..5));
        File::create(rig.file(suffix)).unwrap();
        rig.read_right(&store, &rig.pieces(5..10));
        assert_eq!(rig.metrics.storage.cache_reopened.get(), 1, "{suffix}");
        rig.read_right(&store, &rig.pieces(0..10));
        let requests = rig.backend.requests();
        rig.read_right(&rig.open(), &rig.pieces(0..10));
        assert_eq!(rig.backend.requests(), requests, "{suffix}");
    }
}

#[test]
fn data_that_did_not_reach_the_disk_is_fetched_again_and_never_believed() {
    let rig = Rig::new(10);
    let (store, other) = (rig.open(), rig.open());
    rig.read_right(&store, &rig.pieces(0..10));
    rig.read_right(&other, &rig.pieces(0..10));
    let requests = rig.backend.requests();
    // What a flush does that the disk refuses.
    store.inner.blobs[0].files().unwrap().condemn();
    store.inner.blobs[0].renew(&store.inner);
    rig.read_right(&store, &rig.pieces(0..10));
    assert!(rig.backend.requests() > requests, "the pages of the old file are not believed");
    drop((store, other));
    rig.hang();
    rig.read_right(&rig.open_with(|options| options.boot_id = [9; 16]), &rig.pieces(0..10));
}
