//! From missing chunks to landed ones: merge, ask the backend, decode, verify, write, publish.
//!
//! A [`Work`] is one question to the backend with all it needs to be asked again. Wherever it is dropped, its claims
//! fail their waiters. While the backend has it, or a timer, it lies in the store's register, from where a deadline or
//! the end of the store takes it away from a backend that never answers.

use std::cell::RefCell;
use std::ops::Range;
use std::time::Duration;
use std::time::Instant;

use super::Inner;
use super::blob::Blob;
use super::blob::Claim;
use super::blob::Interest;
use super::blob::back_off;
use super::budget::Permit;
use super::error::ReadError;
use super::foreign::Foreign;
use super::parked::Outcome;
use super::table::Duty;
use crate::limits::DAMAGE_RETRIES;
use crate::limits::RETRY_PAUSE;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;
use crate::rafs::facts::MetaLocation;
use crate::storage::backend::Answer;
use crate::storage::backend::BackendError;
use crate::storage::backend::Class;
use crate::storage::backend::Request;
use crate::storage::backend::Ticket;
use crate::storage::codec;
use crate::storage::codec::CodecError;
use crate::storage::pool::Urgency;
use crate::storage::pool::when_idle;
use crate::storage::sync::Arc;
use crate::storage::sync::Mutex;
use crate::storage::sync::lock;
use crate::storage::sync::now;
use crate::sys::heap::discard;

/// A claimed chunk and how to get it.
pub(super) type Wanted = (Claim, ChunkFacts);

/// What is asked for.
enum Goal {
    /// Chunks whose stored bytes lie in the range.
    Chunks { chunks: Vec<Wanted>, damaged: u32 },
    /// The chunk table of a blob.
    Table { duty: Duty, location: MetaLocation },
}

/// One question to the backend.
pub(super) struct Work {
    /// Its share of the budget while bytes may come.
    pub(super) permit: Option<Permit>,
    blob: Arc<Blob>,
    range: Range<u64>,
    failures: u32,
    goal: Goal,
}

/// What lies in the register.
pub(super) enum Held {
    /// A question that the backend has, or that is asked again later.
    Work(Work),
    /// Chunks that other processes fetch.
    Foreign(Foreign),
}

/// An entry of the register.
pub(super) struct Entry {
    held: Arc<Mutex<Option<Held>>>,
    ticket: Option<Ticket>,
    deadline: Option<Instant>,
}

impl Entry {
    /// An entry for what is in `held`; overdue at `deadline`.
    pub(super) fn new(held: Arc<Mutex<Option<Held>>>, deadline: Option<Instant>) -> Self {
        Self { held, ticket: None, deadline }
    }

    /// Adds the way to call the request off.
    pub(super) fn attach(&mut self, ticket: Ticket) {
        self.ticket = Some(ticket);
    }

    /// Whether the backend had its time.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Takes back what is held, if the backend has not answered meanwhile, and calls the request off.
    pub(super) fn take_back(self) -> Option<Held> {
        let held = lock(&self.held).take();
        if let Some(ticket) = self.ticket {
            ticket.cancel();
        }
        held
    }
}

impl Work {
    /// Chunks of `blob` in `range`, at least one.
    pub(super) fn chunks(blob: Arc<Blob>, range: Range<u64>, chunks: Vec<Wanted>) -> Self {
        Self { permit: None, blob, range, failures: 0, goal: Goal::Chunks { chunks, damaged: 0 } }
    }

    /// The chunk table of a blob.
    pub(super) fn table(duty: Duty, location: MetaLocation, range: Range<u64>) -> Self {
        Self { permit: None, blob: Arc::clone(&duty.blob), range, failures: 0, goal: Goal::Table { duty, location } }
    }

    /// Bytes that it may hold at once: those of the range and one decoded piece.
    pub(super) fn weight(&self) -> u64 {
        let decoded = match &self.goal {
            Goal::Chunks { chunks, .. } => {
                chunks.iter().map(|(_, facts)| u64::from(facts.uncompressed_bytes)).max().unwrap_or(0)
            }
            Goal::Table { location, .. } => location.uncompressed_bytes,
        };
        self.range.end.saturating_sub(self.range.start).saturating_add(decoded)
    }

    fn interest(&self) -> Interest {
        match &self.goal {
            Goal::Chunks { chunks, .. } => {
                chunks.iter().fold(Interest::Nobody, |all, (claim, _)| all.or(claim.interest()))
            }
            Goal::Table { duty, .. } => duty.interest(),
        }
    }

    /// `None` if nobody waits for any of its chunks any more: what is only amplification is not worth a request.
    fn unless_idle(mut self) -> Option<Self> {
        if self.interest() == Interest::Nobody
            && let Goal::Chunks { chunks, .. } = &mut self.goal
        {
            // One by one, since a read may join at any moment.
            let live = |(claim, facts): Wanted| claim.unless_idle().map(|claim| (claim, facts));
            *chunks = std::mem::take(chunks).into_iter().filter_map(live).collect();
            if chunks.is_empty() {
                return None;
            }
        }
        Some(self)
    }

    fn fail(self, error: BackendError) {
        let error = ReadError::Backend { blob: self.blob.facts.index, source: error };
        match self.goal {
            Goal::Chunks { chunks, .. } => {
                chunks.into_iter().for_each(|(claim, _)| claim.land(&Outcome::Failed(error.clone())));
            }
            Goal::Table { duty, .. } => duty.fail(error),
        }
    }

    /// How long to wait before it is worth asking again; `None`: it is not.
    fn pause(&self, inner: &Inner, error: &BackendError) -> Option<Duration> {
        inner.options.demand_deadline?;
        if !error.is_retryable() {
            return None;
        }
        let pause = back_off(&RETRY_PAUSE, self.failures);
        match self.interest() {
            Interest::Nobody => None,
            Interest::Until(deadline) => (now() + pause < deadline).then_some(pause),
            Interest::Forever => Some(pause),
        }
    }
}

/// Asks as soon as the budget allows.
pub(super) fn submit(inner: &Arc<Inner>, work: Work) {
    match inner.budget.admit(work) {
        Some(work) => issue(inner, work),
        None => inner.metrics.storage.budget_waits.add(1),
    }
}

/// Asks the backend.
pub(super) fn issue(inner: &Arc<Inner>, work: Work) {
    if inner.is_closing() {
        return;
    }
    let Some(work) = work.unless_idle() else { return };
    let deadline = match work.interest() {
        Interest::Until(deadline) => Some(deadline),
        Interest::Forever => None,
        Interest::Nobody => inner.deadline(),
    };
    inner.metrics.storage.backend_requests.add(1);
    let (blob, range) = (Arc::clone(&work.blob.id), work.range.clone());
    let (id, held) = inner.hold(Held::Work(work), deadline);
    let weak = Arc::downgrade(inner);
    let answer = Answer::new(move |result| {
        // Taken by the deadline or the end of the store: too late.
        let Some(Held::Work(work)) = lock(&held).take() else { return };
        let Some(inner) = weak.upgrade() else { return };
        inner.release(id);
        let pool = Arc::clone(&inner.pool);
        pool.spawn(Urgency::Demand, move || answered(&inner, work, result));
    });
    let ticket = inner.backend.read(Request { blob, range, class: Class::Demand, deadline }, answer);
    inner.attach(id, ticket);
}

/// The backend's answer to `work`.
pub(super) fn answered(inner: &Arc<Inner>, work: Work, result: Result<Vec<u8>, BackendError>) {
    let expected = work.range.end.saturating_sub(work.range.start);
    let result = match result {
        Ok(bytes) if bytes.len() as u64 == expected => Ok(bytes),
        Ok(bytes) => Err(BackendError::WrongLength { expected, actual: bytes.len() as u64 }),
        Err(error) => Err(error),
    };
    match result {
        Ok(bytes) => {
            inner.metrics.storage.backend_bytes.add(bytes.len() as u64);
            arrived(inner, work, bytes);
        }
        Err(error) => {
            inner.metrics.storage.backend_errors.add(1);
            tracing::debug!(blob = %work.blob.id, range = ?work.range, %error, "backend request failed");
            failed(inner, work, error);
        }
    }
}

/// Asks again later if that makes sense, else fails the waiters.
fn failed(inner: &Arc<Inner>, mut work: Work, error: BackendError) {
    match work.pause(inner, &error) {
        Some(pause) => {
            work.failures = work.failures.saturating_add(1);
            // It holds no bytes while it waits.
            work.permit = None;
            inner.later(Held::Work(work), pause);
        }
        None => work.fail(error),
    }
}

fn arrived(inner: &Arc<Inner>, work: Work, bytes: Vec<u8>) {
    let Work { permit, blob, range, goal, .. } = work;
    let (chunks, damaged) = match goal {
        Goal::Table { duty, location } => return duty.arrived(inner, &location, &bytes),
        Goal::Chunks { chunks, damaged } => (chunks, damaged),
    };
    let (wanted, rest): (Vec<_>, Vec<_>) =
        chunks.into_iter().partition(|(claim, _)| claim.interest() != Interest::Nobody);
    for wanted in wanted {
        if let Some(again) = finish(inner, wanted, &bytes, range.start, damaged) {
            let range = stored(&again.1);
            let goal = Goal::Chunks { chunks: vec![again], damaged: damaged.saturating_add(1) };
            submit(inner, Work { permit: None, blob: Arc::clone(&blob), range, failures: 0, goal });
        }
    }
    if rest.is_empty() {
        return;
    }
    let inner_later = Arc::clone(inner);
    inner.pool.spawn(Urgency::Background, move || {
        let _until_done = permit;
        for chunk in rest {
            finish(&inner_later, chunk, &bytes, range.start, DAMAGE_RETRIES);
        }
    });
}

/// Stored bytes of a chunk in its blob.
pub(super) fn stored(facts: &ChunkFacts) -> Range<u64> {
    facts.compressed_offset..facts.compressed_offset.saturating_add(u64::from(facts.compressed_bytes))
}

thread_local! {
    /// Decoded bytes of the chunk at work; kept, while there is work, so that its pages are not taken from the system
    /// each time.
    static PLAIN: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Makes a chunk of `bytes`, which begin at `start` in the blob, ready. Gives it back if it is damaged and worth
/// another attempt.
fn finish(inner: &Inner, wanted: Wanted, bytes: &[u8], start: u64, damaged: u32) -> Option<Wanted> {
    let (claim, facts) = wanted;
    let from = facts.compressed_offset.checked_sub(start).and_then(|from| usize::try_from(from).ok());
    let stored = from.and_then(|from| bytes.get(from..)?.get(..facts.compressed_bytes as usize));
    let verified = match stored {
        None => Err(CodecError::Length { expected: facts.compressed_bytes as usize, actual: 0 }),
        Some(stored) => with_plain(&claim.blob, &facts, stored, |plain| keep(inner, &claim, &facts, plain)),
    };
    match verified {
        Ok(outcome) => {
            inner.metrics.storage.chunks_fetched.add(1);
            claim.land(&outcome);
            None
        }
        Err(source) => {
            inner.metrics.storage.digest_mismatches.add(1);
            if damaged < DAMAGE_RETRIES && claim.interest() != Interest::Nobody {
                return Some((claim, facts));
            }
            let (blob, chunk) = (claim.blob.facts.index, claim.chunk);
            // The table may be what is wrong.
            let error = if claim.blob.table.suspect_found() {
                ReadError::Outdated(blob)
            } else {
                ReadError::Damaged { blob, chunk, source }
            };
            claim.land(&Outcome::Failed(error));
            None
        }
    }
}

/// Decodes and verifies `stored`; `use_plain` sees the plain bytes only if they are right.
fn with_plain<T>(
    blob: &Blob,
    facts: &ChunkFacts,
    stored: &[u8],
    use_plain: impl FnOnce(&[u8]) -> T,
) -> Result<T, CodecError> {
    // The stored bytes leave their mark in the allocator too.
    when_idle(|| discard(PLAIN.take()));
    let verify = |plain: &[u8]| codec::verify(blob.facts.digester, facts.digest, facts.crc32c, plain);
    if facts.coding == Coding::Plain {
        verify(stored)?;
        return Ok(use_plain(stored));
    }
    // Taken out for the time of use: who uses the bytes is not ours to know.
    let mut buffer = PLAIN.take();
    let len = facts.uncompressed_bytes as usize;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let plain = buffer.get_mut(..len).unwrap_or_default();
    let verified = codec::decode(blob.facts.compressor, stored, plain).and_then(|()| verify(plain));
    let used = verified.map(|()| use_plain(plain));
    PLAIN.set(buffer);
    used
}

/// Writes a verified chunk to the cache; if that fails, the waiters get it from memory.
fn keep(inner: &Inner, claim: &Claim, facts: &ChunkFacts, plain: &[u8]) -> Outcome {
    let in_memory = || Outcome::Memory { offset: facts.uncompressed_offset, plain: Arc::new(plain.to_vec()) };
    let Some(files) = &claim.files else { return in_memory() };
    match files.store(claim.chunk, facts.uncompressed_offset, plain) {
        Ok(()) => Outcome::Ready,
        Err(error) => {
            inner.metrics.storage.cache_write_errors.add(1);
            if claim.blob.cache_warning.passes() {
                tracing::warn!(blob = %claim.blob.id, %error, "cache cannot be written; reads are served from memory");
            }
            in_memory()
        }
    }
}
