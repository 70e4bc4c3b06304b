//! What goes on while 256 cold reads are parked and their backend never answers.
//!
//! Independence is shown by its happening at all: nothing here can complete by waiting for the backend.

use std::sync::Arc;
use std::time::Duration;

use nydus_vm::testing::fault::Fault;
use nydus_vm::testing::fault::Order as Release;
use nydus_vm::testing::fuse_client::EntryReply;
use nydus_vm::testing::fuse_client::Listing;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::fuse_client::directory_entries;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::guest::RINGS;
use nydus_vm::testing::guest::SLOTS;
use nydus_vm::testing::lane::Mode;
use nydus_vm::testing::orders::Order;
use nydus_vm::testing::room::Room;
use nydus_vm::testing::vmm::PATIENCE;

use crate::support::CHUNK_BYTES;
use crate::support::Demo;
use crate::support::SMALL_FILES;
use crate::support::eventually;
use crate::support::find;
use crate::support::read_file;

pub const READS: usize = 256;
const READ_BYTES: usize = 4096;

pub const GUEST: GuestOptions =
    GuestOptions { request_queues: 1, depth: READS + 20, reply_bytes: 64 << 10, ..GuestOptions::LINUX };

/// A guest with 256 reads parked on a backend that hangs; `/warm` and all small files have been read before.
pub struct Parked {
    pub guest: Guest,
    warm: EntryReply,
    cold: EntryReply,
    /// Unique number and offset of each parked read.
    reads: Vec<(u64, usize)>,
    pub room: Room,
    _demo: Demo,
}

impl Parked {
    pub fn new(options: &GuestOptions) -> Self {
        let demo = Demo::new();
        let room = demo.room();
        let mut guest = Guest::boot(&room.socket, options).unwrap();
        let warm = find(&mut guest, "/warm");
        assert_eq!(read_file(&mut guest, &warm, 64 << 10), Demo::warm());
        let cold = find(&mut guest, "/cold");
        room.faults.set(Fault::Hang);
        let mut parked = Self { guest, warm, cold, reads: Vec::new(), room, _demo: demo };
        parked.park();
        parked
    }

    /// Sends the reads, each of another chunk, and waits until all are parked.
    pub fn park(&mut self) {
        let before = self.room.metrics.storage.parked_reads.get();
        let lane = self.guest.lane(1);
        for n in 0..READS {
            let offset = n * CHUNK_BYTES + n;
            let request = Request::read(self.cold.node, 0, offset as u64, READ_BYTES as u32);
            self.reads.push((lane.submit(&request).unwrap(), offset));
        }
        lane.publish().unwrap();
        eventually("256 parked reads", || self.room.metrics.storage.parked_reads.get() >= before + READS as u64);
        assert_eq!(self.guest.lane(1).ready().unwrap(), 0, "a read that cannot be answered was");
    }

    /// Reads what is warm and asks for metadata, request after request.
    pub fn expect_service(&mut self) {
        assert_eq!(read_file(&mut self.guest, &self.warm, 64 << 10), Demo::warm());
        let dir = find(&mut self.guest, "/dir").node;
        let mut names = 0;
        let mut offset = 0;
        loop {
            let body = self.guest.call(&Request::readdirplus(dir, 0, offset, 4096)).unwrap().body().unwrap();
            let entries = directory_entries(&body, Listing::Plus).unwrap();
            let Some(last) = entries.last() else { break };
            offset = last.next;
            names += entries.len();
        }
        assert_eq!(names, SMALL_FILES + 2);
        assert_eq!(self.guest.call(&Request::getattr(self.cold.node)).unwrap().errno, 0);
        self.guest.lane(0).forget(self.warm.node, 1).unwrap();
    }

    /// Lets the backend answer.
    pub fn release(&self) {
        self.room.faults.set(Fault::None);
        self.room.faults.release(Release::LastFirst);
    }

    /// All parked reads complete with the right bytes, the guest being interrupted for them.
    pub fn expect_all(&mut self) {
        let content = Demo::cold();
        for (unique, offset) in std::mem::take(&mut self.reads) {
            let done = self.guest.lane(1).wait_for(unique, PATIENCE).unwrap();
            let body = self.guest.lane(1).reply(done).body().unwrap();
            assert_eq!(body, content[offset..offset + READ_BYTES], "offset {offset}");
        }
    }

    /// The VMM goes; `next` is the guest of another one, which waits for that.
    pub fn followed_by(self, next: impl FnOnce() -> Guest) -> Self {
        let Self { guest, warm, cold, reads, room, _demo } = self;
        drop(guest);
        Self { guest: next(), warm, cold, reads, room, _demo }
    }

    /// The backend answers, and nothing of it reaches a guest that has forgotten the reads.
    pub fn expect_dropped(&mut self) {
        self.reads.clear();
        let fetched = self.room.metrics.storage.chunks_fetched.get();
        self.release();
        // A read of the last chunk asked for waits for its flight, if there is one still.
        let offset = (READS - 1) * CHUNK_BYTES;
        let body = self.guest.call(&Request::read(self.cold.node, 0, offset as u64, 4096)).unwrap().body().unwrap();
        assert_eq!(body, Demo::cold()[offset..offset + 4096]);
        eventually("a fetch", || self.room.metrics.storage.chunks_fetched.get() > fetched);
        self.expect_service();
        assert_eq!(self.guest.lane(1).ready().unwrap(), 0, "a completion nobody asked for");
    }

    fn digests(&self) -> ([u8; 32], [u8; 32]) {
        (self.guest.memory().digest(RINGS), self.guest.memory().digest(SLOTS))
    }
}

#[test]
fn parked_reads_leave_warm_reads_and_metadata_alone_and_add_no_thread() {
    let demo = Demo::new();
    let room = demo.room();
    let guest = Guest::boot(&room.socket, &GUEST).unwrap();
    // Threads give themselves their names, some after the guest is served already; `vhost_stop` is the last to begin,
    // and a moment later all have theirs.
    eventually("the last thread", || room.threads().iter().any(|name| name.starts_with("vhost_stop")));
    std::thread::sleep(Duration::from_millis(200));
    let idle = room.threads();
    drop((guest, room));
    for mode in [Mode::Event, Mode::Poll] {
        let mut parked = Parked::new(&GuestOptions { mode, ..GUEST });
        // Here as well: names come a little later than threads.
        eventually("the threads of an idle device and no more", || parked.room.threads() == idle);
        parked.expect_service();
        assert_eq!(parked.room.threads(), idle);
        parked.release();
        parked.expect_all();
    }
}

#[test]
fn parked_reads_complete_after_stop_and_cont() {
    let mut parked = Parked::new(&GUEST);
    let bases = parked.guest.stop().unwrap();
    parked.guest.continue_rings(&bases).unwrap();
    parked.expect_service();
    parked.release();
    parked.expect_all();
}

#[test]
fn answers_that_come_while_stopped_are_written_after_cont_only() {
    let mut parked = Parked::new(&GUEST);
    let bases = parked.guest.stop().unwrap();
    let stopped = parked.digests();
    parked.release();
    eventually("the fetches", || parked.room.metrics.storage.chunks_fetched.get() >= READS as u64);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(parked.digests(), stopped, "memory of a stopped guest changed");
    parked.guest.continue_rings(&bases).unwrap();
    // CALL came after ENABLE: the guest must be interrupted for what was completed in between.
    parked.expect_all();
    parked.expect_service();
}

#[test]
fn parked_reads_are_dropped_by_a_reboot() {
    let mut parked = Parked::new(&GUEST);
    parked.guest.reboot().unwrap();
    parked.guest.mount().unwrap();
    parked.expect_service();
    parked.expect_dropped();
}

#[test]
fn parked_reads_are_dropped_by_reset_device() {
    let mut parked = Parked::new(&GuestOptions { order: Order::OpenVmm, ..GUEST });
    parked.guest.vmm().reset_device().unwrap();
    parked.guest.forget_rings();
    parked.guest.start_rings(&[]).unwrap();
    parked.guest.mount().unwrap();
    parked.expect_service();
    parked.expect_dropped();
}

#[test]
fn parked_reads_are_dropped_by_init() {
    let mut parked = Parked::new(&GUEST);
    parked.guest.mount().unwrap();
    parked.expect_service();
    parked.expect_dropped();
}

#[test]
fn parked_reads_are_dropped_by_stop_and_init() {
    let mut parked = Parked::new(&GUEST);
    let bases = parked.guest.stop().unwrap();
    parked.guest.continue_rings(&bases).unwrap();
    parked.guest.mount().unwrap();
    parked.expect_dropped();
}

#[test]
fn next_vmm_is_served_after_a_disconnect_with_parked_reads() {
    let parked = Parked::new(&GUEST);
    let socket = parked.room.socket.clone();
    let memory = Arc::clone(parked.guest.memory());
    // The second VMM is in the backlog until the first has gone, so it is started from another thread.
    let next = std::thread::spawn(move || Guest::boot(&socket, &GUEST).unwrap());
    let mut parked = parked.followed_by(|| next.join().unwrap());
    let left = memory.digest(SLOTS);
    parked.expect_service();
    parked.expect_dropped();
    assert_eq!(memory.digest(SLOTS), left, "memory of a guest that has gone was written to");
}

#[test]
fn answers_that_come_while_paused_are_written_after_enable_only() {
    let mut parked = Parked::new(&GuestOptions { order: Order::CloudHypervisor, ..GUEST });
    let rings = parked.guest.rings();
    parked.guest.vmm().pause(&rings).unwrap();
    let paused = parked.digests();
    parked.release();
    eventually("the fetches", || parked.room.metrics.storage.chunks_fetched.get() >= READS as u64);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(parked.digests(), paused, "memory of a paused guest changed");
    parked.guest.vmm().resume(&rings).unwrap();
    parked.expect_all();
}

#[test]
fn pause_and_resume_leave_parked_reads_parked() {
    let mut parked = Parked::new(&GuestOptions { order: Order::CloudHypervisor, ..GUEST });
    let rings = parked.guest.rings();
    for _ in 0..3 {
        parked.guest.vmm().pause(&rings).unwrap();
        parked.guest.vmm().resume(&rings).unwrap();
        parked.expect_service();
    }
    parked.release();
    parked.expect_all();
}

#[test]
fn memory_that_was_removed_is_not_written_to() {
    let mut parked = Parked::new(&GuestOptions { order: Order::QemuSlots, ..GUEST });
    parked.guest.vmm().remove_region(SLOTS).unwrap();
    let before = parked.guest.memory().digest(SLOTS);
    parked.release();
    for _ in 0..READS {
        let queue = parked.guest.lane(1).queue();
        assert!(queue.wait(PATIENCE).unwrap(), "a completion although its memory is gone");
        assert_eq!(queue.take().unwrap().unwrap().len, 0, "a reply that cannot have been written");
    }
    assert_eq!(parked.guest.memory().digest(SLOTS), before, "memory was written to after it was removed");
    parked.guest.vmm().add_region(SLOTS).unwrap();
    parked.guest.reboot().unwrap();
    parked.guest.mount().unwrap();
    parked.expect_service();
}

#[test]
fn memory_that_was_removed_and_added_again_is_found_again() {
    let mut parked = Parked::new(&GuestOptions { order: Order::QemuSlots, ..GUEST });
    parked.guest.vmm().remove_region(SLOTS).unwrap();
    parked.guest.vmm().add_region(SLOTS).unwrap();
    parked.expect_service();
    parked.release();
    parked.expect_all();
}

#[test]
fn device_ends_within_a_second_with_reads_parked() {
    let mut parked = Parked::new(&GUEST);
    parked.room.end(Duration::from_secs(1)).unwrap();
}

#[test]
fn second_reader_of_a_parked_chunk_is_answered_by_the_same_flight() {
    let mut parked = Parked::new(&GUEST);
    eventually("256 requests at the backend", || parked.room.faults.kept() == READS);
    let requests = parked.room.faults.requests();
    let lane = parked.guest.lane(1);
    let unique = lane.submit(&Request::read(parked.cold.node, 0, 100, 4096)).unwrap();
    lane.publish().unwrap();
    parked.expect_service();
    assert_eq!(parked.room.faults.requests(), requests, "one flight per chunk");
    parked.release();
    let done = parked.guest.lane(1).wait_for(unique, PATIENCE).unwrap();
    assert_eq!(parked.guest.lane(1).reply(done).body().unwrap(), Demo::cold()[100..4196]);
    parked.expect_all();
}

#[test]
fn wrong_short_and_failed_answers_are_eio_and_asked_for_again() {
    let demo = Demo::new();
    let room = demo.room();
    let mut guest = Guest::boot(&room.socket, &GUEST).unwrap();
    let cold = find(&mut guest, "/cold");
    let content = Demo::cold();
    // The table of chunks is fetched with the first read; it is not what this is about.
    assert_eq!(guest.call(&Request::read(cold.node, 0, 0, 4096)).unwrap().errno, 0);
    let failure = nydus_vm::storage::backend::BackendError::Lasting("on purpose".into());
    for (chunk, fault) in
        [(1, Fault::Wrong), (2, Fault::Short(1)), (3, Fault::Short(1 << 30)), (4, Fault::Fail(failure))]
    {
        let offset = chunk * CHUNK_BYTES;
        let request = Request::read(cold.node, 0, offset as u64, 4096);
        room.faults.set(fault.clone());
        let reply = guest.call(&request).unwrap();
        assert_eq!((reply.errno, reply.body.len()), (5, 0), "{fault:?}");
        room.faults.set(Fault::None);
        let body = guest.call(&request).unwrap().body().unwrap();
        assert_eq!(body, content[offset..offset + 4096], "{fault:?}: fetched again");
    }
    assert!(room.metrics.storage.digest_mismatches.get() > 0);
}

#[test]
fn answers_out_of_order_and_late_complete_their_own_reads() {
    let mut parked = Parked::new(&GUEST);
    for n in 0..4 {
        parked.room.faults.once(Fault::Delay(Duration::from_millis(5 * (4 - n))));
    }
    parked.release();
    parked.expect_all();
}
