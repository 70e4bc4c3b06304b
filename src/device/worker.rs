//! What the thread of one ring does: batches of heads become requests, and their replies are published together.

use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;

use super::chain::BrokenTable;
use super::chain::Chain;
use super::chain::SpanReader;
use super::chain::prefetch_table;
use super::patience::Patience;
use super::ring::Ended;
use super::ring::Outlook;
use super::ring::Pass;
use super::ring::Ring;
use super::slot::Batch;
use super::slot::Slot;
use super::split::SplitRing;
use super::state::Broken;
use super::state::Dry;
use super::state::Take;
use super::state::Used;
use crate::fuse::FileSystem;
use crate::fuse::server::Server;
use crate::limits::BATCH_HEADS;
use crate::limits::BATCH_REPLY_BYTES;
use crate::limits::LOOKS_PER_CLOCK;
use crate::limits::REQUEST_HEAD_BYTES;
use crate::limits::SHOWN_BYTES;
use crate::limits::SHOWN_TOGETHER;
use crate::sys::guest::GuestMap;

/// Bytes of `struct fuse_in_header`.
const IN_HEADER_BYTES: usize = 40;
/// `FUSE_WRITE`.
const WRITE: u32 = 16;
/// Bytes of a WRITE that are no data: header and `struct fuse_write_in`.
const WRITE_HEAD_BYTES: usize = 80;

/// Bytes of a request that is copied at once: all but names and bulk data.
const SMALL_BYTES: usize = 256;

/// Who answers requests: the FUSE server, or the double of a test.
pub(super) trait Requests: Send + Sync + 'static {
    /// Whether `head` begins a new FUSE session.
    fn is_init(&self, head: &[u8]) -> bool;
    /// Serves one request: `head` is what was copied of it, `readable_bytes` its whole length.
    fn handle(&self, head: &[u8], readable_bytes: usize, slot: Slot);
}

impl<F: FileSystem> Requests for Server<F> {
    #[inline]
    fn is_init(&self, head: &[u8]) -> bool {
        crate::fuse::server::is_init(head)
    }

    #[inline]
    fn handle(&self, head: &[u8], readable_bytes: usize, slot: Slot) {
        Server::handle(self, head, readable_bytes, slot);
    }
}

/// The buffers of one ring's thread, reused from request to request.
#[derive(Debug)]
pub(super) struct Worker {
    ring: Arc<Ring>,
    take: Take,
    /// The chain that is served, and the next one: it is walked before, so that its bytes are there in time.
    chain: Box<Chain>,
    next: Box<Chain>,
    head: Vec<u8>,
    used: Vec<Used>,
    shown: Vec<Used>,
    patience: Patience,
}

/// What became of one head.
enum Step {
    Done,
    /// A new session begins with this head: fence first.
    Session,
}

/// Whether the fence of a new session is through for the next INIT.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fenced {
    Yes,
    No,
}

impl Worker {
    /// The worker of `ring`, which stays awake for `awake` at most when the ring runs dry.
    pub(super) fn new(ring: Arc<Ring>, awake: Duration) -> Self {
        Self {
            ring,
            take: Take::default(),
            chain: Box::default(),
            next: Box::default(),
            head: Vec::new(),
            used: Vec::new(),
            shown: Vec::new(),
            patience: Patience::new(awake),
        }
    }

    /// Serves the ring until it has nothing to offer. `rings` are all rings of the device: a new session concerns all.
    pub(super) fn run<R: Requests>(&mut self, requests: &R, rings: &[Arc<Ring>]) {
        let ring = Arc::clone(&self.ring);
        let mut fenced = Fenced::No;
        let mut pass = ring.begin(&mut self.take);
        if pass.is_none() {
            return;
        }
        self.patience.woke();
        while let Some(now) = pass {
            let ended = self.batch(&now, requests, fenced);
            self.patience.served(self.take.begun);
            let dry = if self.patience.stays_awake() { Dry::StayAwake } else { Dry::Sleep };
            pass = ring.turn(now, &self.used, ended, &mut self.take, dry);
            fenced = Fenced::No;
            if ended == Ended::Pause {
                for ring in rings {
                    ring.begin_session();
                }
                fenced = Fenced::Yes;
                pass = ring.begin(&mut self.take);
            } else if pass.is_none() && dry == Dry::StayAwake {
                pass = self.stay_awake(&ring);
            }
        }
        self.patience.sleeps();
    }

    /// Looks at the dry `ring` for a while. `None`: there is nothing to do, and the driver kicks when there is.
    fn stay_awake<'a>(&mut self, ring: &'a Ring) -> Option<Pass<'a>> {
        let began = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                match ring.outlook() {
                    Outlook::Work => {
                        self.patience.paid();
                        return ring.begin(&mut self.take);
                    }
                    Outlook::Over => return None,
                    Outlook::Nothing => std::hint::spin_loop(),
                }
            }
            if began.elapsed() >= self.patience.limit() {
                self.patience.ran_out();
                return ring.begin(&mut self.take);
            }
        }
    }

    /// Works on what was taken. What was completed and not shown yet is in `self.used` afterwards.
    fn batch<R: Requests>(&mut self, pass: &Pass<'_>, requests: &R, fenced: Fenced) -> Ended {
        self.used.clear();
        self.used.reserve(BATCH_HEADS);
        self.shown.reserve(BATCH_HEADS);
        Batch::open(&self.ring, pass.epoch, &pass.map, std::mem::take(&mut self.used));
        for held in self.take.held.drain(..) {
            let _ = catch_unwind(AssertUnwindSafe(|| held.release()));
        }
        let ended = self.heads(pass, requests, fenced);
        let (used, body_bytes) = Batch::close();
        self.used = used;
        if let Some(counters) = self.ring.counters() {
            counters.requests.add(self.take.begun as u64);
            counters.bytes.add(body_bytes);
        }
        ended
    }

    /// Serves the heads that were taken, in an open batch, and shows the replies now and then.
    fn heads<R: Requests>(&mut self, pass: &Pass<'_>, requests: &R, fenced: Fenced) -> Ended {
        // Opened just before under the same pass, so it is mapped.
        let Some(split) = self.take.layout.open(&pass.map) else { return Ended::Batch };
        let together = (self.take.count / 4).clamp(1, SHOWN_TOGETHER);
        let (mut all_bytes, mut unshown_bytes) = (0u64, 0u64);
        let mut walked = self.walk_next(pass, &split, 0);
        while let Some(head) = self.take.heads().get(self.take.begun).copied() {
            std::mem::swap(&mut self.chain, &mut self.next);
            let now = walked;
            walked = self.walk_next(pass, &split, self.take.begun.saturating_add(1));
            if let Err(broken) = now {
                return Ended::Broken(Broken::Table(broken));
            }
            let may_begin_session = if self.take.begun == 0 { fenced } else { Fenced::No };
            match self.one(head, pass, requests, may_begin_session) {
                Step::Done => self.take.begun = self.take.begun.saturating_add(1),
                Step::Session => return Ended::Pause,
            }
            all_bytes = all_bytes.saturating_add(self.chain.writable_bytes);
            unshown_bytes = unshown_bytes.saturating_add(self.chain.writable_bytes);
            if all_bytes >= BATCH_REPLY_BYTES as u64 || self.take.begun == self.take.count {
                break;
            }
            if Batch::collected() >= together || unshown_bytes >= SHOWN_BYTES {
                self.show(pass);
                unshown_bytes = 0;
            }
        }
        Ended::Batch
    }

    /// Walks the chain of head `ordinal`, if there is one, into `self.next`, and asks for what will be needed of it.
    #[inline]
    fn walk_next(&mut self, pass: &Pass<'_>, split: &SplitRing<'_>, ordinal: usize) -> Result<(), BrokenTable> {
        let Some(head) = self.take.heads().get(ordinal).copied() else { return Ok(()) };
        self.next.walk(&pass.map, split.descriptors(), self.take.layout.size, head)?;
        self.next.prefetch(&pass.map);
        if let Some(head) = self.take.heads().get(ordinal.saturating_add(1)).copied() {
            prefetch_table(&pass.map, split.descriptors(), head);
        }
        Ok(())
    }

    /// Shows the guest what the open batch has collected.
    fn show(&mut self, pass: &Pass<'_>) {
        Batch::collect(&mut self.shown);
        self.ring.show(pass, &self.shown, &mut self.take);
        self.shown.clear();
    }

    /// Makes the walked chain of `head` a request and serves it.
    #[inline]
    fn one<R: Requests>(&mut self, head: u16, pass: &Pass<'_>, requests: &R, fenced: Fenced) -> Step {
        let chain = &mut *self.chain;
        let copied = copy_head(&pass.map, chain, &mut self.head);
        let (request, whole) = match copied {
            Copied::Whole(len) => (self.head.get(..len).unwrap_or_default(), chain.fault.is_none()),
            Copied::Part(len) => (self.head.get(..len).unwrap_or_default(), false),
        };
        if whole && fenced == Fenced::No && requests.is_init(request) {
            return Step::Session;
        }
        let spans = std::mem::take(&mut chain.writable);
        let mut slot = Slot::new(&self.ring, pass.epoch, head, spans, chain.writable_bytes);
        slot.set_unique(unique_of(request));
        if !whole || request.is_empty() {
            if let Some(counters) = self.ring.counters() {
                counters.malformed.add(1);
            }
            tracing::debug!(head, fault = ?chain.fault, "a chain is no request");
            slot.fail(Errno::IO);
            return Step::Done;
        }
        let readable_bytes = usize::try_from(chain.readable_bytes).unwrap_or(usize::MAX);
        // A panic of a file system costs its request (the slot answers EIO when it is dropped), never the thread.
        let served = catch_unwind(AssertUnwindSafe(|| requests.handle(request, readable_bytes, slot)));
        if served.is_err() {
            tracing::error!(unique = unique_of(request), "a request made the daemon panic; it was answered with EIO");
        }
        Step::Done
    }
}

/// How much of a request could be copied.
enum Copied {
    /// All that is wanted.
    Whole(usize),
    /// Its memory is not there.
    Part(usize),
}

/// Copies the request out of the guest, each byte that is looked at once: all of it up to the limit, of a WRITE what is no
/// data.
#[inline]
fn copy_head(map: &GuestMap, chain: &Chain, buffer: &mut Vec<u8>) -> Copied {
    let readable = usize::try_from(chain.readable_bytes).unwrap_or(usize::MAX);
    let first = if readable <= SMALL_BYTES { readable } else { IN_HEADER_BYTES };
    if buffer.len() < SMALL_BYTES {
        buffer.resize(4096, 0);
    }
    let mut reader = SpanReader::new(map, &chain.readable);
    if buffer.get_mut(..first).is_none_or(|place| reader.read(place).is_err()) {
        // The header alone is enough to answer.
        let header = buffer.get_mut(..first.min(IN_HEADER_BYTES)).unwrap_or_default();
        return match SpanReader::new(map, &chain.readable).read(header) {
            Ok(()) => Copied::Part(header.len()),
            Err(_) => Copied::Part(0),
        };
    }
    let opcode = buffer.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    let limit = if first >= IN_HEADER_BYTES && opcode == WRITE { WRITE_HEAD_BYTES } else { REQUEST_HEAD_BYTES };
    let len = readable.min(limit);
    if len <= first {
        return Copied::Whole(len);
    }
    if buffer.len() < len {
        buffer.resize(len.next_power_of_two(), 0);
    }
    match buffer.get_mut(first..len).is_none_or(|rest| reader.read(rest).is_ok()) {
        true => Copied::Whole(len),
        false => Copied::Part(first),
    }
}

/// The id of a request, 0 when it is too short to have one.
#[inline]
fn unique_of(request: &[u8]) -> u64 {
    request.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}
