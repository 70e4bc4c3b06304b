//! Claim, park, complete, detach under a model checker: the store itself, on real files, with shuttle's threads, locks and
//! atomics behind `storage::sync`. It decides at each of them who goes on, and a wait for time may end at any moment.
//!
//! What it sees that other tests do not: a reader that joins a flight which ends at this moment, an end of the store in the
//! middle of a claim, two processes at the same chunk, in orders that a machine shows once in a million runs. A lost
//! wake-up is a deadlock here, and reported as one.
//!
//! What it does not see: effects of orderings weaker than SeqCst, and what happens inside of arc-swap and the system, which are
//! one step each.
//!
//! Run by `scripts/test`; `NYDUS_MODEL_ROUNDS` says how many orders are tried. A failure prints the schedule that led there.

use shuttle::rand::Rng;
use shuttle::scheduler::RandomScheduler;

use super::*;
use crate::storage::backend::BackendError;
use crate::storage::cache::Directory;
use crate::storage::cache::Generation;
use crate::storage::sync::thread;
use crate::testing::fault::Order;

/// Orders tried of each model.
const ROUNDS: usize = 200;
/// Turns of others, for something to happen anywhere in the course of a read.
const LATER: u32 = 100;
/// No model takes longer, however slow the machine.
const LONGEST: Duration = Duration::from_secs(600);

fn check(model: impl Fn() + Send + Sync + 'static) {
    let rounds = std::env::var("NYDUS_MODEL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS);
    let mut config = shuttle::Config::new();
    // An order in which nobody gets on is a failure.
    config.max_steps = shuttle::MaxSteps::FailAfter(200_000);
    config.stack_size = 1 << 19;
    config.max_time = Some(LONGEST);
    // That orderings weaker than SeqCst are not modelled is said above.
    config.silence_warnings = true;
    shuttle::Runner::new(RandomScheduler::new(rounds), config).run(model);
}

/// A blob whose reads are waited for without end: the clock of a model is no measure.
fn patient(count: u32) -> Arc<Rig> {
    let mut rig = Rig::new(count);
    rig.options.demand_deadline = None;
    Arc::new(rig)
}

/// Reads `chunks` on a thread of its own, and waits for the answer there.
fn reader(
    rig: &Arc<Rig>,
    store: &Arc<Store>,
    chunks: std::ops::Range<u32>,
) -> thread::JoinHandle<Result<(), ReadError>> {
    let (rig, store) = (Arc::clone(rig), Arc::clone(store));
    thread::spawn(move || {
        let pieces = rig.pieces(chunks);
        let bytes = wait(&read(&store, &pieces))?;
        assert!(bytes == rig.expected(&pieces), "wrong bytes for {pieces:?}");
        Ok(())
    })
}

/// How often the bytes of `chunk` were asked for.
fn asked_for(rig: &Rig, chunk: u32) -> usize {
    let place = rig.chunks[chunk as usize].compressed_offset;
    rig.backend.log().iter().filter(|(_, range)| range.contains(&place)).count()
}

/// Lets others go on for a while, long or short: what follows meets them anywhere on their way.
fn later() {
    for _ in 0..shuttle::rand::thread_rng().gen_range(0..LATER) {
        thread::yield_now();
    }
}

/// As another process has the files of `rig` open.
fn another_process(rig: &Rig) -> Generation {
    Generation::open(&Directory::open(rig.cache_dir()).unwrap(), &rig.facts, BOOT).unwrap()
}

/// No flight is open, and no lock held: every chunk can be claimed, or is there.
fn expect_no_flight(rig: &Rig, store: &Store) {
    let other = another_process(rig);
    let blob = &store.inner.blobs[0];
    let files = blob.usable_files(&store.inner).unwrap();
    for chunk in 0..rig.facts.chunk_count {
        assert!(other.locks().try_lock_chunks(chunk..chunk + 1).unwrap(), "chunk {chunk} is locked");
        other.locks().unlock_chunks(chunk..chunk + 1);
        let facts = &rig.chunks[chunk as usize];
        let is_missing = other.presence(chunk, facts) == crate::storage::cache::generation::Presence::Missing;
        assert!(
            !is_missing || blob.claim_missing(chunk, facts, &files).is_some(),
            "chunk {chunk} is in flight for ever"
        );
    }
}

#[test]
fn readers_of_overlapping_chunks_share_their_flights() {
    check(|| {
        let rig = patient(4);
        let store = Arc::new(rig.open());
        let readers = [reader(&rig, &store, 1..2), reader(&rig, &store, 0..3), reader(&rig, &store, 2..4)];
        readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());
        (0..4).for_each(|chunk| assert_eq!(asked_for(&rig, chunk), 1, "chunk {chunk}"));
        expect_no_flight(&rig, &store);
    });
}

#[test]
fn readers_of_one_batch_fetch_it_once() {
    check(|| {
        let mut rig = Rig::batched(2, None);
        rig.options.demand_deadline = None;
        let rig = Arc::new(rig);
        let store = Arc::new(rig.open());
        let readers = [reader(&rig, &store, 3..4), reader(&rig, &store, 0..1), reader(&rig, &store, 5..7)];
        readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());
        for batch in 0..2 {
            assert_eq!(asked_for(&rig, batch * super::units::MEMBERS), 1, "batch {batch}");
        }
    });
}

#[test]
fn stores_on_one_directory_share_their_flights() {
    check(|| {
        let rig = patient(3);
        let (one, two) = (Arc::new(rig.open()), Arc::new(rig.open()));
        let readers = [reader(&rig, &one, 0..2), reader(&rig, &two, 1..3), reader(&rig, &two, 0..1)];
        readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());
        (0..3).for_each(|chunk| assert_eq!(asked_for(&rig, chunk), 1, "chunk {chunk}"));
        expect_no_flight(&rig, &one);
        expect_no_flight(&rig, &two);
    });
}

#[test]
fn chunk_taken_along_is_joined_or_fetched_once() {
    check(|| {
        let rig = patient(4);
        let store = Arc::new(rig.open_with(|options| options.amplify_bytes = 1 << 20));
        let readers = [reader(&rig, &store, 0..1), reader(&rig, &store, 2..3), reader(&rig, &store, 3..4)];
        readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());
        (0..4).for_each(|chunk| assert!(asked_for(&rig, chunk) <= 1, "chunk {chunk}"));
    });
}

#[test]
fn neighbour_that_another_process_has_is_given_up_and_joined_at_once() {
    check(|| {
        let rig = patient(2);
        let store = Arc::new(rig.open_with(|options| options.amplify_bytes = 1 << 20));
        let other = another_process(&rig);
        assert!(other.locks().try_lock_chunks(1..2).unwrap());
        let readers = [reader(&rig, &store, 0..1), reader(&rig, &store, 1..2)];
        later();
        other.locks().unlock_chunks(1..2);
        readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());
        (0..2).for_each(|chunk| assert_eq!(asked_for(&rig, chunk), 1, "chunk {chunk}"));
        expect_no_flight(&rig, &store);
    });
}

#[test]
fn question_that_begins_while_the_store_ends_is_given_up() {
    check(|| {
        let rig = patient(1);
        rig.hang();
        let store = Arc::new(rig.open());
        let reader = reader(&rig, &store, 0..1);
        later();
        store.shutdown();
        assert!(matches!(reader.join().unwrap(), Err(ReadError::Shutdown)));
        // Nobody waits for the silent one: what it had is given up, though the store is still there.
        let other = another_process(&rig);
        while !other.locks().try_lock_chunks(0..1).unwrap() {
            thread::yield_now();
        }
    });
}

#[test]
fn end_of_the_store_answers_every_read_once() {
    check(|| {
        let rig = patient(4);
        let store = Arc::new(rig.open());
        let readers = [reader(&rig, &store, 0..2), reader(&rig, &store, 1..4)];
        later();
        store.shutdown();
        for reader in readers {
            let answer = reader.join().unwrap();
            assert!(matches!(answer, Ok(()) | Err(ReadError::Shutdown)), "{answer:?}");
        }
        drop(store);
        let next = Arc::new(rig.open());
        reader(&rig, &next, 0..4).join().unwrap().unwrap();
        expect_no_flight(&rig, &next);
    });
}

#[test]
fn end_of_the_store_takes_everything_from_a_silent_backend() {
    check(|| {
        let rig = patient(3);
        rig.hang();
        let store = Arc::new(rig.open());
        let readers = [reader(&rig, &store, 0..2), reader(&rig, &store, 1..3)];
        let releaser = thread::spawn({
            let rig = Arc::clone(&rig);
            move || {
                later();
                rig.backend.release(Order::LastFirst)
            }
        });
        later();
        store.shutdown();
        for reader in readers {
            let answer = reader.join().unwrap();
            assert!(matches!(answer, Ok(()) | Err(ReadError::Shutdown)), "{answer:?}");
        }
        releaser.join().unwrap();
        drop(store);
        rig.backend.set(Fault::None);
        let next = Arc::new(rig.open());
        reader(&rig, &next, 0..3).join().unwrap().unwrap();
        expect_no_flight(&rig, &next);
    });
}

#[test]
fn deadline_and_answer_do_not_both_count() {
    check(|| {
        let rig = patient(3);
        let store = Arc::new(rig.open_with(|options| options.demand_deadline = Some(Duration::from_millis(150))));
        rig.hang();
        let readers = [reader(&rig, &store, 0..2), reader(&rig, &store, 1..3)];
        later();
        rig.backend.set(Fault::None);
        rig.backend.release(Order::FirstFirst);
        for reader in readers {
            let answer = reader.join().unwrap();
            let is_late = matches!(answer, Err(ReadError::Deadline | ReadError::Backend { .. }));
            assert!(is_late || answer.is_ok(), "{answer:?}");
        }
        // Who gave up in time leaves nothing behind.
        let patient = Arc::new(rig.open());
        reader(&rig, &patient, 0..3).join().unwrap().unwrap();
    });
}

#[test]
fn failure_reaches_those_who_wait_and_nobody_later() {
    check(|| {
        let rig = patient(3);
        let store = Arc::new(rig.open());
        rig.backend.once(Fault::Fail(BackendError::Lasting("on purpose".into())));
        let readers = [reader(&rig, &store, 0..2), reader(&rig, &store, 1..3)];
        let failed = readers.into_iter().map(|reader| reader.join().unwrap()).filter(Result::is_err).count();
        assert!((1..=2).contains(&failed), "{failed} reads failed");
        reader(&rig, &store, 0..3).join().unwrap().unwrap();
        expect_no_flight(&rig, &store);
    });
}

#[test]
fn files_made_anew_under_a_flight_lose_no_reader() {
    check(|| {
        let rig = patient(3);
        let store = Arc::new(rig.open());
        let readers = [reader(&rig, &store, 0..2), reader(&rig, &store, 1..3)];
        let remover = thread::spawn({
            let (rig, store) = (Arc::clone(&rig), Arc::clone(&store));
            move || {
                later();
                std::fs::remove_file(rig.file(".blob.data")).unwrap();
                store.inner.blobs[0].renew(&store.inner);
            }
        });
        readers.into_iter().for_each(|reader| reader.join().unwrap().unwrap());
        remover.join().unwrap();
        reader(&rig, &store, 0..3).join().unwrap().unwrap();
        expect_no_flight(&rig, &store);
    });
}
