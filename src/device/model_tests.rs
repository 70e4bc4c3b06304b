//! Passes, fences, parked requests and their end, under a model checker: the ring and its worker themselves, with shuttle's
//! locks behind `sys::sync`.
//!
//! The fill of each late reply lets others go on in the middle of its copy. So what a fence promises is seen: once it
//! is through, nothing is written to the guest, and what was dropped never comes.

use std::collections::BTreeSet;
use std::time::Duration;

use rustix::io::Errno;
use shuttle::scheduler::RandomScheduler;
use shuttle::thread;
use shuttle::thread::JoinHandle;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::ring::Ring;
use super::ring::Shared;
use super::slot::Slot;
use super::worker::Requests;
use super::worker::Worker;
use crate::fuse::slot::ReplySlot;
use crate::metrics::Metrics;
use crate::sys::guest::GuestMap;
use crate::sys::sync::Arc;

/// Orders tried of each model, unless `NYDUS_MODEL_ROUNDS` says otherwise.
const ROUNDS: usize = 1000;
/// No model takes longer, however slow the machine.
const LONGEST: Duration = Duration::from_secs(600);

const SIZE: u16 = 16;
const REQUESTS: u16 = 3;
const DESCRIPTORS: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x3000;
const BUFFER_BYTES: u64 = 256;
const MEMORY: usize = 0x8000;
/// Requests that are sessions of their own.
const SESSION: u32 = 26;
const PARK: u32 = 1000;

/// A file system that parks everything.
#[derive(Default)]
struct Parking {
    /// Of the system, not of the checker: no place at which others may go on.
    parked: std::sync::Mutex<Vec<(u64, Slot)>>,
}

impl Requests for Parking {
    fn is_init(&self, head: &[u8]) -> bool {
        head.get(4..8) == Some(&SESSION.to_le_bytes())
    }

    fn handle(&self, head: &[u8], _: usize, slot: Slot) {
        let unique = u64::from_le_bytes(head[8..16].try_into().unwrap());
        self.parked.lock().unwrap().push((unique, slot));
    }
}

impl Parking {
    /// Completes what is parked, one after the other, with a pause in the middle of each copy.
    fn complete(&self) {
        loop {
            let Some((unique, slot)) = self.parked.lock().unwrap().pop() else { return };
            slot.send_data(unique, |sink| {
                let put = |sink: &mut dyn crate::sys::sink::Sink| sink.put_bytes(b"half").map_err(|_| Errno::IO);
                put(sink)?;
                thread::yield_now();
                put(sink)?;
                Ok(8)
            });
        }
    }
}

/// A ring with [`REQUESTS`] requests on offer, and all that works on it.
struct Rig {
    memory: GuestMemoryMmap<()>,
    ring: Arc<Ring>,
    shared: Arc<Shared>,
    files: Arc<Parking>,
}

impl Rig {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let shared = Arc::new(Shared::new(Arc::new(Metrics::new(1))));
        shared.map.store(Arc::new(GuestMap::new(&memory, &GuestMap::default()).unwrap()));
        let ring = Arc::new(Ring::new(0, Arc::clone(&shared)));
        let rig = Self { memory, ring, shared, files: Arc::default() };
        rig.offer(0, PARK);
        let _ = rig.ring.enable();
        rig.start(0);
        rig
    }

    /// Offers [`REQUESTS`] requests, the first of them with this opcode, behind `count` earlier ones.
    fn offer(&self, count: u16, opcode: u32) {
        for n in count..count + REQUESTS {
            let buffer = BUFFERS + u64::from(n) * BUFFER_BYTES;
            let opcode = if n == count { opcode } else { PARK };
            let request = [&40u32.to_le_bytes()[..], &opcode.to_le_bytes(), &u64::from(n).to_le_bytes(), &[0; 24]];
            self.memory.write_slice(&request.concat(), GuestAddress(buffer)).unwrap();
            let head = 2 * n % SIZE;
            self.descriptor(head, buffer, 40, 1, head + 1);
            self.descriptor(head + 1, buffer + 128, 64, 2, 0);
            let place = AVAIL + 4 + 2 * u64::from(n % SIZE);
            self.memory.write_slice(&head.to_le_bytes(), GuestAddress(place)).unwrap();
        }
        self.memory.write_slice(&(count + REQUESTS).to_le_bytes(), GuestAddress(AVAIL + 2)).unwrap();
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let word = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.memory.write_slice(&word.to_le_bytes(), GuestAddress(DESCRIPTORS + 16 * u64::from(index))).unwrap();
    }

    /// The VMM's messages that start the ring at `base`.
    fn start(&self, base: u16) {
        let _ = self.ring.set_size(SIZE);
        self.ring.set_addresses(DESCRIPTORS, AVAIL, USED);
        let _ = self.ring.set_next_used(self.ring.used_index().unwrap());
        let _ = self.ring.set_next_avail(base);
        let _ = self.ring.make_ready();
    }

    /// Serves what is on offer, on this thread.
    fn serve(&self) {
        Worker::new(Arc::clone(&self.ring), Duration::ZERO).run(&*self.files, std::slice::from_ref(&self.ring));
    }

    /// A thread that serves what is on offer, `times` times.
    fn worker(&self, times: usize) -> JoinHandle<()> {
        let (ring, files) = (Arc::clone(&self.ring), Arc::clone(&self.files));
        thread::spawn(move || {
            let mut worker = Worker::new(Arc::clone(&ring), Duration::ZERO);
            for _ in 0..times {
                worker.run(&*files, std::slice::from_ref(&ring));
                thread::yield_now();
            }
        })
    }

    /// A thread that completes what is parked, `times` times.
    fn completer(&self, times: usize) -> JoinHandle<()> {
        let files = Arc::clone(&self.files);
        thread::spawn(move || {
            for _ in 0..times {
                files.complete();
                thread::yield_now();
            }
        })
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    /// Nothing is written to the guest for a while.
    fn expect_silence(&self, after: &str) {
        let before = self.bytes();
        for _ in 0..20 {
            thread::yield_now();
        }
        assert!(self.bytes() == before, "the guest's memory was written to after {after}");
    }

    /// Numbers of the requests that are completed, each once, and whole.
    fn completed(&self) -> BTreeSet<u16> {
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let mut all = BTreeSet::new();
        for n in 0..used {
            let entry = GuestAddress(USED + 4 + 8 * u64::from(n % SIZE));
            let [head, len]: [u32; 2] = self.memory.read_obj(entry).unwrap();
            let number = head as u16 / 2;
            let mut reply = [0; 24];
            let buffer = BUFFERS + u64::from(number) * BUFFER_BYTES;
            self.memory.read_slice(&mut reply, GuestAddress(buffer + 128)).unwrap();
            assert_eq!((len, &reply[..4], &reply[16..]), (24, &24u32.to_le_bytes()[..], &b"halfhalf"[..]));
            assert_eq!(reply[8..16], u64::from(number).to_le_bytes());
            assert!(all.insert(number), "request {number} is completed twice");
        }
        all
    }

    /// Serves and completes until there is nothing more to do.
    fn finish(&self) {
        for _ in 0..2 {
            self.serve();
            self.files.complete();
        }
        self.serve();
    }
}

fn check(model: impl Fn(&Rig) + Send + Sync + 'static) {
    let rounds = std::env::var("NYDUS_MODEL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS);
    let mut config = shuttle::Config::new();
    config.max_steps = shuttle::MaxSteps::FailAfter(100_000);
    config.max_time = Some(LONGEST);
    // Orderings weaker than SeqCst are not modelled; the ring's state is under a lock.
    config.silence_warnings = true;
    shuttle::Runner::new(RandomScheduler::new(rounds), config).run(move || model(&Rig::new()));
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn numbers(range: std::ops::Range<u16>) -> BTreeSet<u16> {
    range.collect()
}

#[test]
fn stop_silences_the_ring_and_a_start_where_it_was_loses_nothing() {
    check(|rig| {
        let threads = [rig.worker(3), rig.completer(4), rig.completer(4)];
        rig.ring.stop();
        rig.expect_silence("the stop");
        rig.start(rig.ring.next_avail());
        join(threads);
        rig.finish();
        assert_eq!(rig.completed(), numbers(0..REQUESTS));
    });
}

#[test]
fn pause_silences_the_ring_and_keeps_what_is_completed_meanwhile() {
    check(|rig| {
        let threads = [rig.worker(3), rig.completer(4), rig.completer(4)];
        rig.ring.disable();
        rig.expect_silence("the pause");
        let _ = rig.ring.enable();
        join(threads);
        rig.finish();
        assert_eq!(rig.completed(), numbers(0..REQUESTS));
    });
}

#[test]
fn memory_that_was_taken_away_is_not_written_to_and_comes_back() {
    check(|rig| {
        let threads = [rig.worker(3), rig.completer(4), rig.completer(4)];
        let map = rig.shared.map.swap(Arc::new(GuestMap::default()));
        rig.ring.fence();
        rig.expect_silence("its memory was taken away");
        rig.shared.map.store(map);
        rig.ring.fence();
        join(threads);
        rig.finish();
        assert_eq!(rig.completed(), numbers(0..REQUESTS));
    });
}

#[test]
fn reset_drops_what_is_parked_for_good() {
    check(|rig| {
        let threads = [rig.worker(3), rig.completer(4), rig.completer(4)];
        rig.ring.reset();
        rig.expect_silence("the reset");
        let completed = rig.completed();
        join(threads);
        // A new driver, in the same place, without a request.
        let _ = rig.ring.enable();
        rig.start(REQUESTS);
        rig.finish();
        assert_eq!(rig.completed(), completed, "a request of the old driver");
    });
}

#[test]
fn session_drops_the_requests_of_the_one_before_and_serves_its_own() {
    check(|rig| {
        rig.serve();
        let threads = [rig.completer(3), rig.completer(3)];
        rig.ring.begin_session();
        let before = rig.completed();
        rig.offer(REQUESTS, PARK);
        rig.serve();
        join(threads);
        rig.finish();
        let all = rig.completed();
        assert!(all.is_superset(&numbers(REQUESTS..2 * REQUESTS)), "{all:?}");
        let late: Vec<_> = all.range(..REQUESTS).filter(|number| !before.contains(number)).collect();
        assert!(late.is_empty(), "{late:?} are of the session before");
    });
}

#[test]
fn session_that_a_request_begins_meets_a_stop_without_a_deadlock() {
    check(|rig| {
        rig.serve();
        rig.offer(REQUESTS, SESSION);
        let threads = [rig.worker(3), rig.completer(4)];
        rig.ring.stop();
        rig.expect_silence("the stop");
        rig.start(rig.ring.next_avail());
        join(threads);
        rig.finish();
        let all = rig.completed();
        assert!(all.is_superset(&numbers(REQUESTS..2 * REQUESTS)), "{all:?}");
    });
}
