//! The chunk state machine of one blob: missing, in flight with its waiters, ready.
//!
//! In flight is an entry of `flights`; ready is a word of the generation's extents, set before the entry goes away. So
//! under the lock of `flights` a chunk is in exactly one state. A [`Claim`] is the right, and the duty, to end a flight:
//! dropping it anywhere, for whatever reason, fails the waiters and leaves the chunk missing.
//!
//! `flights` is a leaf lock but for [`Parked`]'s own; it is never held over I/O or a callback.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;
use arc_swap::Guard;

use super::Inner;
use super::error::ReadError;
use super::fetch::Wanted;
use super::parked::Outcome;
use super::parked::Parked;
use super::table::TableCell;
use crate::limits::STORAGE_WARNING_INTERVAL;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::storage::cache::Generation;
use crate::storage::cache::Setup;
use crate::storage::cache::claims::Right;
use crate::storage::cache::generation::Presence;
use crate::storage::codec::Sealing;
use crate::storage::sync::Arc;
use crate::storage::sync::Mutex;
use crate::storage::sync::lock;

/// One blob of an image.
pub(super) struct Blob {
    /// What the image says of it.
    pub(super) facts: BlobFacts,
    /// Its id, shared with requests.
    pub(super) id: Arc<str>,
    /// What is known of its chunks.
    pub(super) table: TableCell,
    /// How its pieces are encrypted.
    pub(super) sealing: Option<Sealing>,
    /// Warnings about its cache.
    pub(super) cache_warning: RateLimit,
    /// Warnings about reads of it.
    pub(super) read_warning: RateLimit,
    files: Option<ArcSwap<Generation>>,
    setup: Setup,
    flights: Mutex<HashMap<u32, Vec<Arc<Parked>>>>,
    renewing: Mutex<()>,
    /// What tests do in the moment before a chunk is locked.
    #[cfg(test)]
    pub(super) before_lock: Seam,
}

/// A place at which tests can step in, once.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Seam(Mutex<Option<Step>>);

#[cfg(test)]
type Step = Box<dyn FnOnce(u32) + Send>;

#[cfg(test)]
impl Seam {
    /// At the next pass, `step` is called with the chunk.
    #[cfg_attr(feature = "model", expect(dead_code, reason = "the models need no help to meet such moments"))]
    pub(super) fn set(&self, step: impl FnOnce(u32) + Send + 'static) {
        *lock(&self.0) = Some(Box::new(step));
    }

    fn pass(&self, chunk: u32) {
        let step = lock(&self.0).take();
        if let Some(step) = step {
            step(chunk);
        }
    }
}

/// How a parked read stands to a chunk.
pub(super) enum Admission {
    /// The chunk is ready and in memory.
    Here,
    /// It is in flight; the read will be told.
    Joined,
    /// It was not in flight; the caller has to see to it.
    Claimed(Claim),
}

/// How long somebody waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    /// Nobody does.
    Nobody,
    /// Somebody, until then.
    Until(Instant),
    /// Somebody, without end.
    Forever,
}

impl Interest {
    /// Both together.
    pub(super) fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Forever, _) | (_, Self::Forever) => Self::Forever,
            (Self::Until(one), Self::Until(two)) => Self::Until(one.max(two)),
            (Self::Nobody, other) | (other, Self::Nobody) => other,
        }
    }

    /// That of the live ones of `waiters`.
    pub(super) fn of(waiters: &[Arc<Parked>]) -> Self {
        let live = waiters.iter().filter(|parked| parked.is_live());
        live.fold(Self::Nobody, |all, parked| all.or(parked.deadline.map_or(Self::Forever, Self::Until)))
    }
}

impl Blob {
    /// A blob whose cache files are `files`, opened as `setup` says; `None`: it is not cached.
    pub(super) fn new(facts: BlobFacts, files: Option<Generation>, setup: Setup) -> Self {
        Self {
            id: Arc::from(facts.id.as_str()),
            sealing: facts.cipher.as_ref().map(Sealing::new),
            facts,
            table: TableCell::default(),
            cache_warning: RateLimit::default(),
            read_warning: RateLimit::default(),
            files: files.map(ArcSwap::from_pointee),
            setup,
            flights: Mutex::default(),
            renewing: Mutex::default(),
            #[cfg(test)]
            before_lock: Seam::default(),
        }
    }

    /// The open cache files.
    #[inline]
    pub(super) fn files(&self) -> Option<Guard<Arc<Generation>>> {
        self.files.as_ref().map(ArcSwap::load)
    }

    /// The cache files for work that takes a while; opened again if they were lost. `None`: there is no cache, or none
    /// that can be used now. Blocks on the disk.
    pub(super) fn usable_files(&self, inner: &Inner) -> Option<Arc<Generation>> {
        let files = self.files.as_ref()?.load_full();
        if !files.is_lost() {
            return Some(files);
        }
        self.renew(inner);
        self.files.as_ref().map(ArcSwap::load_full).filter(|files| !files.is_lost())
    }

    /// Opens the cache files anew if they were removed or truncated. If another thread is about it, that is enough.
    /// Blocks on the disk.
    pub(super) fn renew(&self, inner: &Inner) {
        let (Some(files), Some(directory)) = (&self.files, &inner.directory) else { return };
        let Ok(_one_at_a_time) = self.renewing.try_lock() else { return };
        let old = files.load_full();
        if old.is_current(directory, &self.facts) {
            return;
        }
        match old.reopen(directory, &self.facts, &self.setup) {
            // What is open goes on.
            Ok(None) => {}
            Ok(Some(new)) => {
                tracing::warn!(blob = %self.id, "cache files were removed or truncated while in use; opened anew");
                inner.metrics.storage.cache_reopened.add(1);
                files.store(Arc::new(new));
            }
            Err(error) if self.cache_warning.passes() => {
                tracing::warn!(blob = %self.id, error = &error as &dyn std::error::Error, "cache files were lost");
            }
            Err(_) => {}
        }
    }

    /// Whether somebody sees to `chunk` at this moment.
    pub(super) fn is_in_flight(&self, chunk: u32) -> bool {
        lock(&self.flights).contains_key(&chunk)
    }

    /// Lets `parked` wait for `chunk` where that is needed; it then expects one arrival more. If the chunk is claimed,
    /// those of `companions` that are missing and not in flight are claimed with it, in the same moment.
    pub(super) fn admit(
        self: &Arc<Self>,
        chunk: u32,
        companions: Vec<(u32, ChunkFacts)>,
        files: Option<&Arc<Generation>>,
        parked: &Arc<Parked>,
    ) -> (Admission, Vec<Wanted>) {
        let mut flights = lock(&self.flights);
        if let Some(waiters) = flights.get_mut(&chunk) {
            parked.expect_one();
            waiters.push(Arc::clone(parked));
            return (Admission::Joined, Vec::new());
        }
        if files.is_some_and(|files| files.extents.get(chunk).is_some_and(|extent| extent.touched)) {
            return (Admission::Here, Vec::new());
        }
        parked.expect_one();
        flights.insert(chunk, vec![Arc::clone(parked)]);
        let mut claimed = Vec::with_capacity(companions.len());
        for (chunk, facts) in companions {
            let Entry::Vacant(flight) = flights.entry(chunk) else { continue };
            if files.is_none_or(|files| files.presence(chunk, &facts) == Presence::Missing) {
                flight.insert(Vec::new());
                claimed.push((self.claim(chunk, files), facts));
            }
        }
        (Admission::Claimed(self.claim(chunk, files)), claimed)
    }

    /// Claims `chunk`, for which nobody waits, if it is missing and not in flight.
    pub(super) fn claim_missing(
        self: &Arc<Self>,
        chunk: u32,
        facts: &ChunkFacts,
        files: &Arc<Generation>,
    ) -> Option<Claim> {
        let mut flights = lock(&self.flights);
        if flights.contains_key(&chunk) || files.presence(chunk, facts) != Presence::Missing {
            return None;
        }
        flights.insert(chunk, Vec::new());
        Some(self.claim(chunk, Some(files)))
    }

    /// Ends the flights of those of `chunks`, all of this blob and without cache files, for which nobody waits, all in
    /// the same moment, and gives the others back: whoever claims one of them next can claim all.
    pub(super) fn drop_idle(&self, chunks: Vec<Wanted>) -> Vec<Wanted> {
        let mut flights = lock(&self.flights);
        let mut live = Vec::new();
        for (mut claim, facts) in chunks {
            let waiters = flights.get(&claim.chunk);
            if waiters.is_some_and(|waiters| Interest::of(waiters) != Interest::Nobody) {
                live.push((claim, facts));
            } else {
                flights.remove(&claim.chunk);
                claim.is_open = false;
            }
        }
        live
    }

    fn claim(self: &Arc<Self>, chunk: u32, files: Option<&Arc<Generation>>) -> Claim {
        Claim { blob: Arc::clone(self), files: files.cloned(), chunk, is_locked: false, is_alone: false, is_open: true }
    }

    /// The place of a chunk is another image's: said once in a while, since it costs speed.
    pub(super) fn note_disputed(&self, inner: &Inner, chunk: u32) {
        // Lost files have no place for anything, and are made anew.
        if self.files().is_none_or(|files| files.is_lost()) {
            return;
        }
        inner.metrics.storage.disputed_chunks.add(1);
        if self.cache_warning.passes() {
            tracing::warn!(blob = %self.id, chunk, "another image describes this blob otherwise; not cached");
        }
    }

    fn land(&self, chunk: u32, outcome: &Outcome) {
        let waiters = lock(&self.flights).remove(&chunk).unwrap_or_default();
        if let Outcome::Failed(error) = outcome
            && !waiters.is_empty()
            && !matches!(error, ReadError::Shutdown)
            && !error.is_passing()
            && self.read_warning.passes()
        {
            let error = error as &dyn std::error::Error;
            tracing::warn!(blob = %self.id, chunk, error, "chunk cannot be read");
        }
        for parked in waiters {
            parked.arrive(self.facts.index, chunk, outcome);
        }
    }
}

/// The right and the duty to end the flight of a chunk.
pub(super) struct Claim {
    /// Its blob.
    pub(super) blob: Arc<Blob>,
    /// The cache files it belongs into.
    pub(super) files: Option<Arc<Generation>>,
    /// Its index.
    pub(super) chunk: u32,
    is_locked: bool,
    /// Whether the locks of other processes do not count any more.
    is_alone: bool,
    is_open: bool,
}

impl Claim {
    /// Ends the flight and tells the waiters.
    pub(super) fn land(mut self, outcome: &Outcome) {
        self.end(outcome);
    }

    /// Ends the flight if nobody waits any more, and leaves the chunk missing; else gives the claim back.
    pub(super) fn unless_idle(mut self) -> Option<Self> {
        {
            let blob = Arc::clone(&self.blob);
            let mut flights = lock(&blob.flights);
            let waiters = flights.get(&self.chunk);
            if waiters.is_some_and(|waiters| Interest::of(waiters) != Interest::Nobody) {
                drop(flights);
                return Some(self);
            }
            // While nobody can claim the chunk anew: the lock is this process's, and would be given up under the next
            // claim.
            self.unlock();
            flights.remove(&self.chunk);
        }
        self.is_open = false;
        None
    }

    /// How long somebody waits for the chunk.
    pub(super) fn interest(&self) -> Interest {
        lock(&self.blob.flights).get(&self.chunk).map_or(Interest::Nobody, |waiters| Interest::of(waiters))
    }

    /// Keeps other processes from fetching the chunk. `false`: one of them does. A file system that cannot lock leaves
    /// us alone with it.
    pub(super) fn try_lock(&mut self) -> bool {
        let Some(files) = &self.files else { return true };
        if self.is_locked || self.is_alone {
            return true;
        }
        #[cfg(test)]
        self.blob.before_lock.pass(self.chunk);
        match files.locks().try_lock_chunks(self.chunk..self.chunk.saturating_add(1)) {
            Ok(true) => {
                self.is_locked = true;
                true
            }
            Ok(false) => false,
            Err(error) => {
                if self.blob.cache_warning.passes() {
                    tracing::warn!(blob = %self.blob.id, %error, "chunks cannot be locked against other processes");
                }
                true
            }
        }
    }

    /// Fetches the chunk although another process has it: that one does not get on.
    pub(super) fn ignore_lock(&mut self) {
        self.is_alone = true;
    }

    /// By which right the place of the chunk can be claimed.
    pub(super) fn right(&self) -> Right {
        if self.is_locked { Right::Locked } else { Right::Unlocked }
    }

    /// Whether who has the lock fetches what another image calls by this number: then there is nothing to wait for.
    pub(super) fn is_contested(&self, facts: &ChunkFacts) -> bool {
        self.files.as_ref().is_some_and(|files| files.is_contested(self.chunk, facts))
    }

    /// The chunk has no place in the cache files: it is read into memory, and is no business of other processes.
    pub(super) fn leave_files(&mut self) {
        self.unlock();
        self.files = None;
    }

    fn unlock(&mut self) {
        if std::mem::take(&mut self.is_locked)
            && let Some(files) = &self.files
        {
            files.locks().unlock_chunks(self.chunk..self.chunk.saturating_add(1));
        }
    }

    fn end(&mut self, outcome: &Outcome) {
        self.unlock();
        if std::mem::take(&mut self.is_open) {
            self.blob.land(self.chunk, outcome);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.end(&Outcome::Failed(ReadError::Shutdown));
    }
}

/// Lets something pass once in `limits::STORAGE_WARNING_INTERVAL`.
#[derive(Debug, Default)]
pub(super) struct RateLimit(Mutex<Option<Instant>>);

impl RateLimit {
    /// Whether it is time again.
    pub(super) fn passes(&self) -> bool {
        let now = Instant::now();
        let mut last = lock(&self.0);
        let due = last.is_none_or(|at| now.saturating_duration_since(at) >= STORAGE_WARNING_INTERVAL);
        if due {
            *last = Some(now);
        }
        due
    }
}

/// The pause before attempt `attempt` (from 0): doubled each time, with a jitter of half of it.
pub(super) fn back_off(pause: &std::ops::Range<Duration>, attempt: u32) -> Duration {
    let full = pause.start.saturating_mul(1 << attempt.min(16)).min(pause.end);
    // A random number without a generator: the standard library seeds each hasher state from one.
    let random = std::hash::BuildHasher::hash_one(&std::collections::hash_map::RandomState::new(), attempt);
    full.mul_f64(0.5 + (random % 1024) as f64 / 2048.0)
}
