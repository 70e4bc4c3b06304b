//! Random chains and random FUSE bytes at the device: it answers or stops that ring, and lives on.

use std::cell::RefCell;
use std::time::Duration;
use std::time::Instant;

use nydus_vm::testing::driver::Descriptor;
use nydus_vm::testing::driver::Segment;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::vmm::PATIENCE;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::Config;
use proptest::test_runner::TestRunner;

use crate::support::Demo;
use crate::support::SMALL;

/// Where a random descriptor points.
#[derive(Debug, Clone, Copy)]
enum Place {
    Scratch(u32),
    EndOfMemory(u32),
    Anywhere(u64),
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        6 => (0..60_000u32).prop_map(Place::Scratch),
        1 => (0..5000u32).prop_map(Place::EndOfMemory),
        1 => any::<u64>().prop_map(Place::Anywhere),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..200u32, 2 => 0..70_000u32, 1 => any::<u32>()]
}

/// A descriptor: place, length, flags, next. Flags and next are mostly sensible.
fn descriptor() -> impl Strategy<Value = (Place, u32, u16, u16)> {
    let flags = prop_oneof![8 => 0..4u16, 2 => 0..8u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..12u16, 1 => any::<u16>()];
    (place(), length(), flags, next)
}

/// A FUSE request with a header that is mostly right.
fn request() -> impl Strategy<Value = Request> {
    let opcode = prop_oneof![12 => 0..60u32, 1 => any::<u32>()];
    let node = prop_oneof![4 => 0..64u64, 1 => any::<u64>()];
    let body =
        prop_oneof![vec(any::<u8>(), 0..120), vec(0..3u8, 0..120), vec(prop_oneof![Just(0u8), Just(255)], 0..120)];
    let room = prop_oneof![1 => Just(None), 4 => (0..200u32).prop_map(Some), 4 => (0..16_384u32).prop_map(Some)];
    (opcode, node, body, room).prop_map(|(opcode, node, body, room)| {
        let request = Request::new(opcode, node, &body, room.unwrap_or(0));
        Request { room, ..request }
    })
}

fn options() -> Config {
    // No files: the failing case is printed, and becomes a test of its own.
    Config { cases: cases(), failure_persistence: None, ..Config::default() }
}

/// `PROPTEST_CASES` as everywhere, 400 without it.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(400)
}

/// INIT and DESTROY end the session, which the other requests of the test need.
fn ends_session(opcode: u32) -> bool {
    matches!(opcode, 26 | 38)
}

#[test]
fn random_requests_in_good_chains_are_each_answered_once() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let guest = RefCell::new(Guest::boot(daemon.socket(), &SMALL).unwrap());
    let mut runner = TestRunner::new(options());
    let result = runner.run(&vec(request(), 1..8), |requests| {
        let mut guest = guest.borrow_mut();
        if guest.lane(1).room() < SMALL.depth {
            // Left by a failure that is being narrowed down.
            guest.reboot().unwrap();
            guest.mount().unwrap();
        }
        let lane = guest.lane(1);
        for request in &requests {
            lane.submit(request).unwrap();
        }
        lane.publish().unwrap();
        for _ in &requests {
            // The lane's oracle checks each completion.
            let done = lane.wait(PATIENCE).map_err(|error| TestCaseError::fail(error.to_string()))?;
            lane.release(done);
        }
        if requests.iter().any(|request| ends_session(request.opcode)) {
            guest.mount().unwrap();
        }
        prop_assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn random_chains_are_used_or_stop_their_ring() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let guest = Guest::boot(daemon.socket(), &GuestOptions { request_queues: 2, ..SMALL }).unwrap();
    let scratch = guest.scratch(256 << 10).unwrap();
    let end = guest.memory().regions().iter().map(|r| r.start() + r.size()).max().unwrap();
    let guest = RefCell::new(guest);
    let mut runner = TestRunner::new(options());
    let input = (vec(descriptor(), 12), vec(any::<u8>(), 200), request(), 0..12u16);
    let result = runner.run(&input, |(descriptors, noise, request, head)| {
        let mut guest = guest.borrow_mut();
        guest.memory().write(scratch, &noise);
        // Scratch 0 holds a request that may be right, so that some chains get far.
        guest.memory().write(scratch, &[request.header(2).as_slice(), &request.body].concat());
        let queue = guest.lane(1).queue();
        for (index, (place, len, flags, next)) in descriptors.into_iter().enumerate() {
            let address = match place {
                Place::Scratch(offset) => scratch + u64::from(offset / 2000 * 2000),
                Place::EndOfMemory(before) => end - u64::from(before),
                Place::Anywhere(address) => address,
            };
            queue.write_descriptor(index as u16, Descriptor { address, len, flags, next });
        }
        queue.offer(head, 0);
        queue.publish().unwrap();
        let start = Instant::now();
        while !queue.failed() && queue.take().unwrap().is_none() {
            prop_assert!(start.elapsed() < PATIENCE, "neither used nor stopped");
            queue.arm(1);
            queue.wait_call(Duration::from_millis(1)).unwrap();
        }
        prop_assert_eq!(guest.lane(2).call(&Request::statfs(1)).unwrap().body.len() % 8, 0, "another queue is served");
        guest.reboot().unwrap();
        guest.mount().unwrap();
        prop_assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

/// The guest changes the request and its descriptors while the device works on them: it must copy once.
#[test]
fn requests_that_change_while_they_are_served_do_no_harm() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions { request_queues: 2, ..SMALL }).unwrap();
    let (request_at, reply_at) = (guest.scratch(4096).unwrap(), guest.scratch(1 << 20).unwrap());
    let memory = std::sync::Arc::clone(guest.memory());
    let stop = std::sync::atomic::AtomicBool::new(false);
    let request = Request::read(2, 0, 0, 16_384);
    std::thread::scope(|scope| {
        let scribbler = scope.spawn(|| {
            let mut n = 0u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                n = n.wrapping_mul(1_103_515_245).wrapping_add(12_345);
                memory.write(request_at + u64::from(n >> 16) % 80, &n.to_le_bytes());
            }
        });
        for _ in 0..2000 {
            memory.write(request_at, &[request.header(2).as_slice(), &request.body].concat());
            let queue = guest.lane(1).queue();
            let readable = Segment { address: request_at, len: request.len() as u32 };
            queue.add(&[readable], &[Segment { address: reply_at, len: 16_400 }], 0).unwrap();
            queue.publish().unwrap();
            assert!(queue.wait(PATIENCE).unwrap(), "used");
            let used = queue.take().unwrap().unwrap();
            assert!(used.len <= 16_400);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        scribbler.join().unwrap();
    });
    guest.mount().unwrap();
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
}
