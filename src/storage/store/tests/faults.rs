//! Backends that fail, lie, or never answer.

use super::*;
use crate::storage::backend::BackendError;

#[test]
fn wrong_bytes_are_tried_once_more_then_fail_and_are_fetched_again() {
    let rig = Rig::new(10);
    let store = rig.open();
    rig.backend.set(Fault::Wrong);
    let result = wait(&read(&store, &[rig.piece(3)]));
    assert!(matches!(result, Err(ReadError::Damaged { chunk: 3, .. })), "{result:?}");
    assert_eq!(rig.backend.requests(), 2);
    assert_eq!(rig.metrics.storage.digest_mismatches.get(), 2);
    rig.backend.set(Fault::None);
    rig.read_right(&store, &[rig.piece(3)]);
    assert_eq!(rig.backend.requests(), 3);
}

#[test]
fn one_torn_answer_is_repaired_without_anybody_noticing() {
    let rig = Rig::new(10);
    let store = rig.open();
    rig.backend.once(Fault::Wrong);
    rig.read_right(&store, &rig.pieces(2..6));
    assert!(rig.metrics.storage.digest_mismatches.get() > 0);
}

#[test]
fn damaged_neighbour_does_not_fail_the_read_that_did_not_want_it() {
    let rig = Rig::new(10);
    let mut stored = vec![0; rig.facts.data_bytes as usize];
    let (tell, told) = mpsc::channel();
    let whole = crate::storage::backend::Request {
        blob: Arc::from(ID),
        range: 0..rig.facts.data_bytes,
        class: crate::storage::backend::Class::Demand,
        deadline: None,
    };
    rig.memory.read(whole, crate::storage::backend::Answer::new(move |result| tell.send(result).unwrap()));
    stored.copy_from_slice(&told.recv().unwrap().unwrap());
    stored[rig.chunks[5].compressed_offset as usize + 20] ^= 0x40;
    rig.memory.put(ID, stored);
    let store = rig.open_with(|options| options.amplify_bytes = 1 << 20);
    rig.read_right(&store, &[rig.piece(2)]);
    rig.read_right(&store, &[rig.piece(3), rig.piece(4), rig.piece(6)]);
    let damaged = wait(&read(&store, &[rig.piece(5)]));
    assert!(matches!(damaged, Err(ReadError::Damaged { chunk: 5, .. })), "{damaged:?}");
    assert_eq!(damaged.unwrap_err().errno(), rustix::io::Errno::IO);
}

#[test]
fn passing_failures_are_waited_out() {
    let rig = Rig::new(10);
    let store = rig.open();
    for fault in
        [Fault::Fail(BackendError::Passing("busy".into())), Fault::Short(1), Fault::Fail(BackendError::TimedOut)]
    {
        rig.backend.once(fault);
    }
    rig.read_right(&store, &[rig.piece(3)]);
    assert_eq!(rig.backend.requests(), 4);
    assert_eq!(rig.metrics.storage.backend_errors.get(), 3);
}

#[test]
fn lasting_failure_fails_at_once_and_nothing_is_remembered() {
    let rig = Rig::new(10);
    let store = rig.open();
    rig.backend.once(Fault::Fail(BackendError::Lasting("gone".into())));
    let result = wait(&read(&store, &[rig.piece(3), rig.piece(4)]));
    assert!(matches!(result, Err(ReadError::Backend { .. })), "{result:?}");
    rig.read_right(&store, &[rig.piece(3), rig.piece(4)]);
    assert_eq!(rig.backend.requests(), 2);
}

#[test]
fn deadline_ends_passing_failures_and_silence_and_the_next_read_asks_anew() {
    for fault in [Fault::Fail(BackendError::Passing("down".into())), Fault::Hang] {
        let rig = Rig::new(10);
        let store = rig.open_with(|options| options.demand_deadline = Some(Duration::from_millis(300)));
        rig.backend.set(fault.clone());
        let begin = Instant::now();
        let result = wait(&read(&store, &[rig.piece(3)]));
        assert!(matches!(result, Err(ReadError::Deadline | ReadError::Backend { .. })), "{result:?}");
        assert!(begin.elapsed() < Duration::from_secs(3));
        // The flight of a backend that is silent for ever has ended too.
        until("flight ends", || {
            rig.backend.set(Fault::None);
            wait(&read(&store, &[rig.piece(3)])).is_ok_and(|bytes| bytes == rig.expected(&[rig.piece(3)]))
        });
    }
}

#[test]
fn without_deadline_a_failure_is_final_for_its_read() {
    let rig = Rig::new(10);
    let store = rig.open_with(|options| options.demand_deadline = None);
    rig.backend.once(Fault::Fail(BackendError::Passing("busy".into())));
    assert!(matches!(wait(&read(&store, &[rig.piece(3)])), Err(ReadError::Backend { .. })));
    rig.read_right(&store, &[rig.piece(3)]);
}

#[test]
fn late_answers_after_the_deadline_are_ignored() {
    let rig = Rig::new(10);
    let store = rig.open_with(|options| options.demand_deadline = Some(Duration::from_millis(200)));
    rig.hang();
    assert!(wait(&read(&store, &[rig.piece(3)])).is_err());
    std::thread::sleep(Duration::from_millis(300));
    rig.backend.set(Fault::None);
    rig.read_right(&store, &[rig.piece(3)]);
    assert_eq!(rig.backend.release(crate::testing::fault::Order::FirstFirst), 1);
    rig.read_right(&store, &[rig.piece(3), rig.piece(4)]);
}

#[test]
fn delayed_answers_leave_the_pool_free() {
    let rig = Rig::new(100);
    let store = rig.open();
    rig.backend.set(Fault::Delay(Duration::from_millis(200)));
    let begin = Instant::now();
    let answers: Vec<_> = (0..50).map(|n| read(&store, &[rig.piece(2 * n)])).collect();
    for (n, answer) in answers.iter().enumerate() {
        assert!(wait(answer).unwrap() == rig.expected(&[rig.piece(2 * n as u32)]));
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "one after the other would take 10 s");
}

#[test]
fn panicking_reader_harms_nobody_else() {
    let rig = Rig::new(10);
    let store = rig.open();
    rig.hang();
    store.read(&[rig.piece(3)], |_| panic!("on purpose"));
    until("request", || rig.backend.kept() == 1);
    let other = read(&store, &[rig.piece(3), rig.piece(4)]);
    until("request", || rig.backend.kept() == 2);
    rig.backend.set(Fault::None);
    rig.backend.release(crate::testing::fault::Order::FirstFirst);
    assert!(wait(&other).unwrap() == rig.expected(&rig.pieces(3..5)));
    rig.read_right(&store, &rig.pieces(0..10));
}
