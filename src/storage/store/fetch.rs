//! Questions to a backend: asked as the budget allows, asked again, given up.
//!
//! A [`Work`] is one question to the backend with all it needs to be asked again. Wherever it is dropped, its claims
//! fail their waiters. While the backend has it, or a timer, it lies in the store's register, from where a deadline or
//! the end of the store takes it away from a backend that never answers.

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
use super::landing::Fetched;
use super::landing::Landing;
use super::lot;
use super::lot::Lot;
use super::parked::Outcome;
use super::table::Duty;
use crate::limits::RETRY_PAUSE;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::MetaLocation;
use crate::storage::backend::Answer;
use crate::storage::backend::Backend;
use crate::storage::backend::BackendError;
use crate::storage::backend::Class;
use crate::storage::backend::Request;
use crate::storage::backend::Ticket;
use crate::storage::pool::Urgency;
use crate::storage::sync::Arc;
use crate::storage::sync::Mutex;
use crate::storage::sync::lock;
use crate::storage::sync::now;

/// A claimed chunk and how to get it.
pub(super) type Wanted = (Claim, ChunkFacts);

/// What is asked for.
enum Goal {
    /// Chunks whose stored bytes lie in the range.
    Chunks { lots: Vec<Lot>, damaged: u32 },
    /// The chunk table of a blob.
    Table { duty: Duty, location: MetaLocation },
}

/// One question to the backend.
pub(super) struct Work {
    /// Its share of the budget while bytes may come.
    pub(super) permit: Option<Permit>,
    blob: Arc<Blob>,
    place: Place,
    range: Range<u64>,
    failures: u32,
    goal: Goal,
}

/// Where the bytes of a range are.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// Who has them.
    pub(super) backend: Arc<dyn Backend>,
    /// Name of the file there.
    pub(super) file: Arc<str>,
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
    /// The chunk table of a blob, which is at `place`.
    pub(super) fn table(duty: Duty, location: MetaLocation, place: Place, range: Range<u64>) -> Self {
        let blob = Arc::clone(&duty.blob);
        Self { permit: None, blob, place, range, failures: 0, goal: Goal::Table { duty, location } }
    }

    /// Bytes that it may hold at once: those of the range, one decoded piece, and all decoded units.
    pub(super) fn weight(&self) -> u64 {
        let decoded = match &self.goal {
            Goal::Chunks { lots, .. } => {
                let chunks = lots.iter().flat_map(|lot| &lot.chunks);
                let largest = chunks.map(|(_, facts)| facts.uncompressed_bytes).max().unwrap_or(0);
                let units: u64 = lots.iter().map(|lot| u64::from(lot.recipe.plain_bytes())).sum();
                units.saturating_add(largest.into())
            }
            Goal::Table { location, .. } => location.uncompressed_bytes,
        };
        self.range.end.saturating_sub(self.range.start).saturating_add(decoded)
    }

    fn interest(&self) -> Interest {
        match &self.goal {
            Goal::Chunks { lots, .. } => {
                let chunks = lots.iter().flat_map(|lot| &lot.chunks);
                chunks.fold(Interest::Nobody, |all, (claim, _)| all.or(claim.interest()))
            }
            Goal::Table { duty, .. } => duty.interest(),
        }
    }

    /// `None` if nobody waits for any of its chunks any more: what is only amplification is not worth a request.
    fn unless_idle(mut self) -> Option<Self> {
        if self.interest() == Interest::Nobody
            && let Goal::Chunks { lots, .. } = &mut self.goal
        {
            // One by one, since a read may join at any moment.
            let live = |(claim, facts): Wanted| claim.unless_idle().map(|claim| (claim, facts));
            for lot in &mut *lots {
                lot.chunks = std::mem::take(&mut lot.chunks).into_iter().filter_map(live).collect();
            }
            lots.retain(|lot| !lot.chunks.is_empty());
            if lots.is_empty() {
                return None;
            }
        }
        Some(self)
    }

    fn fail(self, error: BackendError) {
        let error = ReadError::Backend { blob: self.blob.facts.index, source: error };
        match self.goal {
            Goal::Chunks { lots, .. } => {
                let chunks = lots.into_iter().flat_map(|lot| lot.chunks);
                chunks.for_each(|(claim, _)| claim.land(&Outcome::Failed(error.clone())));
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

/// Asks for `chunks` of `blob`, whose stored bytes lie in `range`, as soon as the budget allows.
pub(super) fn submit_chunks(inner: &Arc<Inner>, blob: &Arc<Blob>, range: Range<u64>, chunks: Vec<Wanted>) {
    submit_lots(inner, blob, range, chunks, 0);
}

/// Asks for chunks whose stored bytes are the same, after those were wrong `damaged` times.
pub(super) fn submit_unit(inner: &Arc<Inner>, unit: Vec<Wanted>, damaged: u32) {
    let Some((claim, facts)) = unit.first() else { return };
    let (blob, range) = (Arc::clone(&claim.blob), facts.stored());
    submit_lots(inner, &blob, range, unit, damaged);
}

fn submit_lots(inner: &Arc<Inner>, blob: &Arc<Blob>, range: Range<u64>, chunks: Vec<Wanted>, damaged: u32) {
    let lots = lot::lots(blob, chunks);
    if lots.is_empty() {
        return;
    }
    let place = Place { backend: Arc::clone(&inner.backend), file: Arc::clone(&blob.id) };
    let goal = Goal::Chunks { lots, damaged };
    submit(inner, Work { permit: None, blob: Arc::clone(blob), place, range, failures: 0, goal });
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
    let (Place { backend, file }, range) = (work.place.clone(), work.range.clone());
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
    let ticket = backend.read(Request { blob: file, range, class: Class::Demand, deadline }, answer);
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
            tracing::debug!(blob = %work.blob.id, file = %work.place.file, range = ?work.range, %error, "backend request failed");
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
    match goal {
        Goal::Table { duty, location } => duty.arrived(inner, &location, &bytes),
        Goal::Chunks { lots, damaged } => {
            let fetched = Arc::new(Fetched::new(range.start, bytes));
            Landing::new(blob, fetched, lots).after(damaged, permit).land(inner);
        }
    }
}
