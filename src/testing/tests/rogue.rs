//! A guest that writes its own chains, and what may come of each.

use std::time::Duration;
use std::time::Instant;

use nydus_vm::testing::driver::Chains;
use nydus_vm::testing::driver::Descriptor;
use nydus_vm::testing::driver::INDIRECT;
use nydus_vm::testing::driver::Segment;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::vmm::PATIENCE;

use crate::support::Demo;
use crate::support::SMALL;

/// An address that no region of the guest has.
pub const NOWHERE: u64 = 1 << 45;

/// What a bad request comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A reply with this error.
    Answered(i32),
    /// Used with length 0: there was no room for a reply.
    NoReply,
    /// The ring stopped and said so.
    Stopped,
}

/// A guest that writes its own chains on the first request queue.
pub struct Rogue {
    pub guest: Guest,
    /// Readable memory for a request.
    pub request: u64,
    /// Writable memory for a reply.
    pub reply: u64,
    /// Memory for a table of descriptors.
    pub table: u64,
}

impl Rogue {
    pub fn boot(daemon: &DaemonProcess, chains: Chains) -> Self {
        let guest = Guest::boot(daemon.socket(), &GuestOptions { chains, request_queues: 2, ..SMALL }).unwrap();
        let request = guest.scratch(256 << 10).unwrap();
        let reply = guest.scratch(2 << 20).unwrap();
        let table = guest.scratch(64 << 10).unwrap();
        Self { guest, request, reply, table }
    }

    /// Writes a request's bytes to guest memory.
    pub fn write(&self, request: &Request) -> Segment {
        self.write_bytes(&[request.header(0x4242).as_slice(), &request.body].concat())
    }

    pub fn write_bytes(&self, bytes: &[u8]) -> Segment {
        self.guest.memory().write(self.request, bytes);
        Segment { address: self.request, len: bytes.len() as u32 }
    }

    pub fn room(&self, len: u32) -> Segment {
        Segment { address: self.reply, len }
    }

    /// Sends one chain of `readable` and `writable` and sees what comes of it.
    pub fn send(&mut self, readable: &[Segment], writable: &[Segment]) -> Outcome {
        self.guest.memory().fill(self.reply, 64, 0xa5);
        self.guest.lane(1).queue().add(readable, writable, 0).unwrap();
        self.guest.lane(1).publish().unwrap();
        self.outcome(self.reply)
    }

    /// As [`Rogue::send`], for a reply that is expected at `at`.
    pub fn send_to(&mut self, readable: &[Segment], writable: &[Segment], at: u64) -> Outcome {
        self.guest.lane(1).queue().add(readable, writable, 0).unwrap();
        self.guest.lane(1).publish().unwrap();
        self.outcome(at)
    }

    /// Offers head 0 with descriptors as given, in the ring itself.
    pub fn send_raw(&mut self, descriptors: &[Descriptor]) -> Outcome {
        self.guest.memory().fill(self.reply, 64, 0xa5);
        let queue = self.guest.lane(1).queue();
        for (index, descriptor) in descriptors.iter().enumerate() {
            queue.write_descriptor(index as u16, *descriptor);
        }
        queue.offer(0, 0);
        self.guest.lane(1).publish().unwrap();
        self.outcome(self.reply)
    }

    /// Offers one indirect descriptor over a table with `entries`.
    pub fn send_table(&mut self, entries: &[Descriptor], len: u32, flags: u16) -> Outcome {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.bytes()).collect();
        self.guest.memory().write(self.table, &bytes);
        self.send_raw(&[Descriptor { address: self.table, len, flags: INDIRECT | flags, next: 1 }])
    }

    /// Waits for what comes of the last chain, whose reply is at `at`.
    pub fn outcome(&mut self, at: u64) -> Outcome {
        let start = Instant::now();
        let queue = self.guest.lane(1).queue();
        loop {
            if let Some(used) = queue.take().unwrap() {
                return self.judge(used.len, at);
            }
            if queue.failed() {
                return Outcome::Stopped;
            }
            assert!(start.elapsed() < PATIENCE, "neither used nor VRING_ERR");
            queue.arm(1);
            queue.wait_call(Duration::from_millis(1)).unwrap();
        }
    }

    fn judge(&self, len: u32, at: u64) -> Outcome {
        if len == 0 {
            return Outcome::NoReply;
        }
        let header = self.guest.memory().read_vec(at, 16);
        let said = u32::from_le_bytes(header[..4].try_into().unwrap());
        let error = i32::from_le_bytes(header[4..8].try_into().unwrap());
        assert_eq!(said, len, "used length and reply length");
        assert!((-511..=0).contains(&error), "error {error}");
        assert!(error == 0 || len == 16, "error {error} with {len} bytes");
        Outcome::Answered(-error)
    }

    /// The daemon serves the next request: on this queue, unless it stopped, and on another.
    fn lives(&mut self, outcome: Outcome, what: &str) {
        let other = self.guest.lane(2).call(&Request::getattr(1)).unwrap();
        assert_eq!(other.errno, 0, "{what}: another queue");
        if outcome == Outcome::Stopped {
            self.guest.reboot().unwrap();
            self.guest.mount().unwrap();
        }
        assert_eq!(self.guest.call(&Request::getattr(1)).unwrap().errno, 0, "{what}: the same queue");
    }
}

/// What it is called, what it does, and which outcomes are right.
pub type Case = (&'static str, fn(&mut Rogue) -> Outcome, fn(Outcome) -> bool);

pub fn any(_: Outcome) -> bool {
    true
}

pub fn not_stopped(outcome: Outcome) -> bool {
    outcome != Outcome::Stopped
}

pub fn refused(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Answered(errno) if errno != 0)
}

pub fn no_reply(outcome: Outcome) -> bool {
    outcome == Outcome::NoReply
}

pub fn stopped(outcome: Outcome) -> bool {
    outcome == Outcome::Stopped
}

/// Runs `cases` one after the other; the daemon must live after each.
pub fn run(cases: &[Case], chains: Chains) {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut rogue = Rogue::boot(&daemon, chains);
    for (what, case, is_right) in cases {
        let outcome = case(&mut rogue);
        assert!(is_right(outcome), "{what}: {outcome:?}");
        rogue.lives(outcome, what);
        // What a case left in the ring must not meet the next.
        rogue.guest.reboot().unwrap();
        rogue.guest.mount().unwrap();
    }
}
