//! Images that name the same blob and describe it otherwise: one of them lies, and the other must not notice.

use super::*;

/// An image over the blob of `rig` that says what `change` makes of the truth.
fn liar(rig: &Rig, change: impl FnOnce(&mut BlobFacts, &mut Vec<ChunkFacts>)) -> (BlobFacts, Vec<ChunkFacts>) {
    let (mut facts, mut chunks) = (rig.facts.clone(), rig.chunks.clone());
    change(&mut facts, &mut chunks);
    (facts, chunks)
}

fn open_as(rig: &Rig, (facts, chunks): &(BlobFacts, Vec<ChunkFacts>)) -> Store {
    let backend = Arc::clone(&rig.backend) as Arc<dyn Backend>;
    let chunks = Arc::new(Chunks(chunks.clone()));
    Store::open(rig.options.clone(), vec![facts.clone()], chunks, backend, Arc::clone(&rig.metrics)).unwrap()
}

/// The bytes of a chunk as the liar describes it, which are real bytes of the blob.
fn read_as(store: &Store, lie: &(BlobFacts, Vec<ChunkFacts>), chunk: u32) -> Result<Vec<u8>, ReadError> {
    let facts = &lie.1[chunk as usize];
    let piece = Piece { blob: 0, chunk, offset: facts.uncompressed_offset, len: facts.uncompressed_bytes };
    wait(&read(store, &[piece]))
}

/// Takes the content of chunk `from`, and leaves the place.
fn with_content_of(chunk: &mut ChunkFacts, from: &ChunkFacts) {
    let place = chunk.uncompressed_offset;
    *chunk = ChunkFacts { uncompressed_offset: place, ..*from };
}

type Lie = fn(&mut BlobFacts, &mut Vec<ChunkFacts>);

const LIES: [(&str, Lie); 5] = [
    ("another content, with its digest", |_, chunks| {
        let other = chunks[7];
        with_content_of(&mut chunks[3], &other);
    }),
    ("another content, without digests", |_, chunks| {
        let other = chunks[7];
        with_content_of(&mut chunks[3], &other);
        chunks.iter_mut().for_each(|chunk| chunk.digest = None);
    }),
    ("another place, over a neighbour", |_, chunks| chunks[3].uncompressed_offset += 2500),
    ("numbers exchanged", |_, chunks| chunks.swap(3, 4)),
    ("one chunk more, within the same chunk map", |facts, chunks| {
        // It lies over chunk 3.
        let last = ChunkFacts { uncompressed_offset: chunks[3].uncompressed_offset, ..chunks[8] };
        chunks.push(last);
        facts.chunk_count += 1;
    }),
];

#[test]
fn truth_is_never_overwritten_nor_replaced_by_a_lie() {
    for (name, lie) in LIES {
        for order in 0..4 {
            let rig = Rig::new(10);
            let lie = liar(&rig, lie);
            let all = 0..lie.0.chunk_count;
            let tell_all = |store: &Store| {
                for chunk in all.clone() {
                    let bytes = read_as(store, &lie, chunk).unwrap();
                    let facts = &lie.1[chunk as usize];
                    let truth =
                        rig.chunks.iter().find(|real| real.compressed_offset == facts.compressed_offset).unwrap();
                    let at = truth.uncompressed_offset as usize;
                    assert!(bytes == rig.plain[at..][..5000], "{name}, order {order}: the liar's own chunk {chunk}");
                }
            };
            match order {
                // Both at once, the truth first; then the lie first.
                0 => {
                    let (honest, lying) = (rig.open(), open_as(&rig, &lie));
                    rig.read_right(&honest, &rig.pieces(0..10));
                    tell_all(&lying);
                    rig.read_right(&honest, &rig.pieces(0..10));
                    rig.read_right(&rig.open(), &rig.pieces(0..10));
                }
                1 => {
                    let (lying, honest) = (open_as(&rig, &lie), rig.open());
                    tell_all(&lying);
                    rig.read_right(&honest, &rig.pieces(0..10));
                    tell_all(&lying);
                    rig.read_right(&honest, &rig.pieces(0..10));
                }
                // One after the other, in one boot; then in the next.
                2 => {
                    tell_all(&open_as(&rig, &lie));
                    rig.read_right(&rig.open(), &rig.pieces(0..10));
                }
                _ => {
                    tell_all(&open_as(&rig, &lie));
                    rig.read_right(&rig.open_with(|options| options.boot_id = [2; 16]), &rig.pieces(0..10));
                }
            }
            assert_eq!(rig.metrics.storage.digest_mismatches.get(), 0, "{name}, order {order}");
        }
    }
}

#[test]
fn disputed_chunk_is_read_from_memory_and_the_others_from_the_cache() {
    let rig = Rig::new(10);
    let lie = liar(&rig, LIES[0].1);
    let (honest, lying) = (rig.open(), open_as(&rig, &lie));
    rig.read_right(&honest, &rig.pieces(0..10));
    let requests = rig.backend.requests();
    for _ in 0..2 {
        (0..10).for_each(|chunk| drop(read_as(&lying, &lie, chunk).unwrap()));
    }
    assert_eq!(rig.metrics.storage.disputed_chunks.get(), 1);
    assert_eq!(rig.backend.requests(), requests + 1, "what both say the same of is shared");
}

#[test]
fn image_with_another_layout_of_the_same_file_is_served_without_cache() {
    let rig = Rig::with_chunks(8, 4096);
    let lie = liar(&rig, |facts, _| facts.features |= crate::rafs::facts::feature::ALIGNED);
    let honest = rig.open();
    rig.read_right(&honest, &rig.pieces(0..4));
    let lying = open_as(&rig, &lie);
    for chunk in 0..8 {
        assert!(read_as(&lying, &lie, chunk).unwrap() == rig.expected(&[rig.piece(chunk)]));
    }
    rig.read_right(&honest, &rig.pieces(0..8));
    assert_eq!(rig.metrics.storage.chunks_fetched.get(), 16);
    drop((honest, lying));
    // Alone, it has the file for itself, and believes nothing of it.
    let lying = open_as(&rig, &lie);
    assert!(read_as(&lying, &lie, 5).unwrap() == rig.expected(&[rig.piece(5)]));
    assert_eq!(rig.metrics.storage.hints_confirmed.get(), 1);
}

#[test]
fn disputed_chunk_does_not_wait_for_the_flight_of_the_other_image() {
    let rig = Rig::new(10);
    let lie = liar(&rig, LIES[0].1);
    let (honest, lying) = (rig.open(), open_as(&rig, &lie));
    rig.read_right(&honest, &[rig.piece(3)]);
    let other = honest.inner.blobs[0].files().unwrap();
    assert!(other.locks().try_lock_chunks(3..4).unwrap());
    let begin = Instant::now();
    assert!(read_as(&lying, &lie, 3).is_ok());
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[test]
fn flight_of_a_liar_that_gets_no_answer_holds_nobody_else_up() {
    let rig = Rig::new(10);
    let lie = liar(&rig, LIES[0].1);
    let (honest, lying) = (rig.open(), open_as(&rig, &lie));
    rig.hang();
    let facts = &lie.1[3];
    let hangs = read(&lying, &[Piece { blob: 0, chunk: 3, offset: facts.uncompressed_offset, len: 5000 }]);
    until("request", || rig.backend.kept() == 1);
    rig.backend.set(Fault::None);
    let begin = Instant::now();
    rig.read_right(&honest, &[rig.piece(3)]);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(is_waiting(&hangs));
    drop(lying);
    // Its lock is gone with it, and its claim is taken over.
    let store = rig.open();
    rig.read_right(&store, &[rig.piece(3)]);
    let requests = rig.backend.requests();
    rig.read_right(&rig.open(), &[rig.piece(3)]);
    assert_eq!(rig.backend.requests(), requests);
}

#[test]
fn flights_of_two_images_in_the_same_moment_show_each_its_own() {
    let rig = Rig::new(10);
    let lie = liar(&rig, LIES[0].1);
    rig.backend.set(Fault::Delay(Duration::from_millis(1)));
    for _ in 0..20 {
        std::fs::remove_dir_all(rig.cache_dir()).ok();
        let (honest, lying) = (rig.open(), open_as(&rig, &lie));
        std::thread::scope(|scope| {
            scope.spawn(|| (0..10).for_each(|chunk| rig.read_right(&honest, &[rig.piece(chunk)])));
            scope.spawn(|| (0..10).rev().for_each(|chunk| drop(read_as(&lying, &lie, chunk).unwrap())));
        });
        rig.read_right(&honest, &rig.pieces(0..10));
        assert!(read_as(&lying, &lie, 3).unwrap() == rig.expected(&[rig.piece(7)]));
    }
}
