//! One flight per chunk; what is warm never waits for what is cold.

use super::*;
use crate::testing::fault::Order;

#[test]
fn cold_read_fetches_verifies_and_keeps_then_is_warm() {
    let rig = Rig::new(20);
    let store = rig.open();
    let pieces = [Piece { offset: 5100, len: 300, ..rig.piece(1) }, rig.piece(2), rig.piece(7), rig.piece(4)];
    rig.read_right(&store, &pieces);
    let requests = rig.backend.requests();
    let caller = std::thread::current().id();
    let (tell, told) = mpsc::channel();
    store.read(&pieces, move |result| tell.send((result.unwrap().len(), std::thread::current().id())).unwrap());
    assert_eq!(told.try_recv().unwrap(), (15300, caller), "answered before read returned");
    assert_eq!(rig.backend.requests(), requests);
    assert_eq!((rig.metrics.storage.warm_reads.get(), rig.metrics.storage.parked_reads.get()), (1, 1));
    assert_eq!(rig.metrics.storage.chunks_fetched.get(), 4);
}

#[test]
fn empty_plan_is_answered_at_once() {
    let rig = Rig::new(1);
    assert!(wait(&read(&rig.open(), &[])).unwrap().is_empty());
}

#[test]
fn neighbours_in_one_read_are_one_request() {
    let rig = Rig::new(100);
    let store = rig.open();
    let pieces = rig.pieces(10..60);
    rig.read_right(&store, &pieces);
    let end = rig.chunks[60].compressed_offset;
    assert_eq!(rig.backend.log(), [(Arc::from(ID), rig.chunks[10].compressed_offset..end)]);
}

#[test]
fn amplification_fetches_what_follows_and_stops_at_its_limit() {
    let rig = Rig::new(100);
    let limit = rig.chunks[20].compressed_offset - rig.chunks[3].compressed_offset;
    let store = rig.open_with(|options| options.amplify_bytes = limit);
    rig.read_right(&store, &[rig.piece(10)]);
    until("neighbours arrive", || rig.metrics.storage.chunks_fetched.get() > 10);
    rig.read_right(&store, &rig.pieces(10..20));
    let log = rig.backend.log();
    assert_eq!(log.len(), 1);
    assert!(log[0].1.end - log[0].1.start <= limit);
    // A chunk before them: nothing is fetched twice.
    rig.read_right(&store, &[rig.piece(8)]);
    assert_eq!(rig.backend.log()[1].1, rig.chunks[8].compressed_offset..rig.chunks[10].compressed_offset);
}

#[test]
fn neighbour_without_digest_is_not_amplified_into() {
    let mut rig = Rig::new(20);
    rig.chunks[5].digest = None;
    let store = rig.open_with(|options| options.amplify_bytes = 1 << 20);
    rig.read_right(&store, &[rig.piece(2)]);
    assert_eq!(rig.backend.log()[0].1.end, rig.chunks[5].compressed_offset);
}

#[test]
fn many_readers_of_one_chunk_are_one_request() {
    let rig = Rig::new(4);
    let store = rig.open();
    rig.hang();
    let answers: Vec<_> = (0..256).map(|_| read(&store, &[rig.piece(1)])).collect();
    until("request", || rig.backend.kept() == 1);
    until("all parked", || rig.metrics.storage.parked_reads.get() == 256);
    assert!(answers.iter().all(is_waiting));
    rig.backend.release(Order::FirstFirst);
    for answer in &answers {
        assert!(wait(answer).unwrap() == rig.expected(&[rig.piece(1)]));
    }
    assert_eq!(rig.backend.requests(), 1);
}

#[test]
fn reads_complete_in_the_order_of_the_answers() {
    let rig = Rig::new(40);
    let store = rig.open();
    rig.hang();
    let answers: Vec<_> = (0..8).map(|n| read(&store, &[rig.piece(n * 5)])).collect();
    until("requests", || rig.backend.kept() == 8);
    rig.backend.set(Fault::None);
    rig.backend.release(Order::LastFirst);
    for (n, answer) in answers.iter().enumerate() {
        assert!(wait(answer).unwrap() == rig.expected(&[rig.piece(n as u32 * 5)]));
    }
}

#[test]
fn read_completes_with_its_own_chunks_though_another_hangs() {
    let rig = Rig::new(40);
    let store = rig.open();
    rig.hang();
    let both = read(&store, &[rig.piece(3), rig.piece(30)]);
    until("requests", || rig.backend.kept() == 2);
    rig.backend.set(Fault::None);
    let other = read(&store, &[rig.piece(20)]);
    assert!(wait(&other).is_ok());
    assert!(is_waiting(&both));
    rig.backend.release(Order::LastFirst);
    assert!(wait(&both).unwrap() == rig.expected(&[rig.piece(3), rig.piece(30)]));
}

#[test]
fn warm_reads_go_on_while_256_reads_hang_and_no_thread_is_added() {
    let rig = Rig::new(600);
    let store = rig.open();
    rig.read_right(&store, &rig.pieces(0..10));
    let before = threads();
    rig.hang();
    let parked: Vec<_> = (0..256).map(|n| read(&store, &[rig.piece(20 + 2 * n)])).collect();
    until("requests", || rig.backend.kept() == 256);
    // Other tests of this process come and go; what counts is that there are not hundreds more.
    assert!(threads() < before + 64, "{} threads after {before}", threads());
    let begin = Instant::now();
    for n in 0..2000 {
        rig.read_right(&store, &[rig.piece(n % 10)]);
    }
    assert!(begin.elapsed() < LONG);
    assert_eq!(rig.metrics.storage.warm_reads.get(), 2000);
    assert!(parked.iter().all(is_waiting));
    let begin = Instant::now();
    store.shutdown();
    assert!(begin.elapsed() < Duration::from_secs(1), "shutdown took {:?}", begin.elapsed());
    for answer in &parked {
        assert!(matches!(wait(answer), Err(ReadError::Shutdown)));
    }
    assert!(matches!(wait(&read(&store, &[rig.piece(599)])), Err(ReadError::Shutdown)));
    rig.read_right(&store, &[rig.piece(3)]);
}

#[test]
fn budget_queues_what_does_not_fit_and_everything_is_answered() {
    // 20 chunks of 16 MiB cannot be in flight together.
    let mut rig = Rig::with_chunks(20, 16 << 20);
    rig.chunks.iter_mut().for_each(|chunk| chunk.digest = None);
    let store = rig.open();
    rig.hang();
    let answers: Vec<_> = (0..20).map(|n| read(&store, &[Piece { len: 10, ..rig.piece(n) }])).collect();
    until("requests", || rig.backend.kept() > 5);
    std::thread::sleep(Duration::from_millis(50));
    let held = rig.backend.kept();
    assert!(held < 20, "{held} requests of 16 MiB decoded at once");
    assert_eq!(rig.metrics.storage.budget_waits.get(), 20 - held as u64);
    rig.backend.set(Fault::None);
    rig.backend.release(Order::FirstFirst);
    for answer in &answers {
        assert_eq!(wait(answer).unwrap().len(), 10);
    }
}

#[test]
fn pieces_outside_their_chunk_are_refused_cold_and_warm() {
    let rig = Rig::new(10);
    let store = rig.open();
    let bad = |offset: u64, len: u32, chunk: u32| [Piece { blob: 0, chunk, offset, len }];
    let plans = [bad(4999, 10, 1), bad(9999, 2, 1), bad(u64::MAX, 1, 1), bad(5000, u32::MAX, 1), bad(5000, 1, 99)];
    for round in ["cold", "warm"] {
        for plan in &plans {
            let result = wait(&read(&store, plan));
            assert!(matches!(result, Err(ReadError::NotInChunk { .. })), "{round} {plan:?}: {result:?}");
        }
        let none = wait(&read(&store, &[Piece { blob: 1, ..rig.piece(0) }]));
        assert!(matches!(none, Err(ReadError::NoBlob(1))));
        rig.read_right(&store, &rig.pieces(0..10));
    }
}

#[test]
fn malformed_chunk_facts_fail_only_their_reads() {
    type Change = fn(&mut ChunkFacts);
    let changes: [(&str, Change); 6] = [
        ("empty", |chunk| chunk.uncompressed_bytes = 0),
        ("huge", |chunk| chunk.uncompressed_bytes = u32::MAX),
        ("nothing stored", |chunk| chunk.compressed_bytes = 0),
        ("beyond the blob", |chunk| chunk.compressed_offset = u64::MAX - 3),
        ("beyond the cache", |chunk| chunk.uncompressed_offset = u64::MAX - 3),
        ("plain in another size", |chunk| chunk.coding = Coding::Plain),
    ];
    for (name, change) in changes {
        let mut rig = Rig::new(10);
        let piece = rig.piece(3);
        change(&mut rig.chunks[3]);
        let store = rig.open_with(|options| options.amplify_bytes = 1 << 20);
        let result = wait(&read(&store, &[piece]));
        assert!(matches!(result, Err(ReadError::BadChunk { chunk: 3, .. })), "{name}: {result:?}");
        rig.read_right(&store, &rig.pieces(0..3));
    }
}

#[test]
fn store_without_blobs_opens() {
    let rig = Rig::new(1);
    let chunks = Arc::new(Chunks(Vec::new()));
    let backend = Arc::clone(&rig.backend) as Arc<dyn Backend>;
    let store = Store::open(rig.options.clone(), Vec::new(), chunks, backend, Arc::clone(&rig.metrics)).unwrap();
    assert!(matches!(wait(&read(&store, &[rig.piece(0)])), Err(ReadError::NoBlob(0))));
}

#[test]
fn ready_reads_can_be_kept_and_sent_to_other_threads() {
    fn is_send<T: Send>() {}
    is_send::<crate::storage::store::ReadyRead>();
    let rig = Rig::new(30);
    let store = rig.open();
    rig.read_right(&store, &rig.pieces(0..30));
    let kept = Arc::new(Mutex::new(Vec::new()));
    for chunk in 0..30 {
        let keep = Arc::clone(&kept);
        store.read(&[rig.piece(chunk)], move |result| lock(&keep).push(result.unwrap()));
    }
    drop(store);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (chunk, ready) in lock(&kept).iter().enumerate() {
                let mut sink = MemorySink::new(ready.len());
                ready.copy_into(&mut sink).unwrap();
                assert!(sink.into_bytes() == rig.expected(&[rig.piece(chunk as u32)]));
            }
        });
    });
}
