//! What a backend answered becomes ready chunks: decode, verify, write, publish.
//!
//! Chunks that somebody waits for go first, each published as soon as it is out. The others follow on the same decoder,
//! in slices, as work of the background. A unit whose chunks could not be kept lies on the [`super::shelf`] for a while.

use std::cell::RefCell;
use std::ops::Range;

use super::Inner;
use super::blob::Blob;
use super::blob::Claim;
use super::blob::Interest;
use super::budget::Permit;
use super::error::ReadError;
use super::fetch;
use super::fetch::Wanted;
use super::keep;
use super::loading;
use super::lot::Lot;
use super::lot::Recipe;
use super::lot::units;
use super::parked::Outcome;
use super::resolve;
use crate::limits::DAMAGE_RETRIES;
use crate::limits::LANDING_SLICE_BYTES;
use crate::rafs::facts::ChunkFacts;
use crate::storage::cache::keeping::Content;
use crate::storage::codec::CodecError;
use crate::storage::codec::chunk;
use crate::storage::codec::chunk::Buffers;
use crate::storage::codec::unit::Unit;
use crate::storage::pool::Urgency;
use crate::storage::pool::when_idle;
use crate::storage::sync::Arc;
use crate::sys::heap::discard;

/// Bytes of a blob file.
#[derive(Debug, Default)]
pub(super) struct Fetched {
    start: u64,
    bytes: Vec<u8>,
}

impl Fetched {
    /// `bytes` that begin at `start` in the blob.
    pub(super) fn new(start: u64, bytes: Vec<u8>) -> Self {
        Self { start, bytes }
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    fn piece(&self, range: &Range<u64>) -> Option<&[u8]> {
        let from = usize::try_from(range.start.checked_sub(self.start)?).ok()?;
        let len = usize::try_from(range.end.checked_sub(range.start)?).ok()?;
        self.bytes.get(from..)?.get(..len)
    }
}

/// A unit at work; nothing before its first chunk is asked for. What it failed with is remembered.
pub(super) type Decoded = Option<Result<Unit, CodecError>>;

/// A lot, what is decoded of it, and its chunks that nobody waits for.
struct Part {
    lot: Lot,
    decoded: Decoded,
    /// Whether a chunk of it could not be kept.
    is_loose: bool,
    /// Chunks that are out and cannot be kept. Their readers are answered when the unit is on the shelf, so that the
    /// next ones find it there.
    held_back: Vec<(Claim, Outcome)>,
    /// Whether the cache has the stored bytes of this unit already.
    is_written: bool,
    origin: Origin,
}

/// Where bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Backend,
    /// The cache files, which keep chunks as they are stored.
    Cache,
}

/// Chunks whose stored bytes are here.
pub(super) struct Landing {
    blob: Arc<Blob>,
    fetched: Arc<Fetched>,
    /// How often the bytes of these chunks were wrong already.
    damaged: u32,
    parts: Vec<Part>,
    /// Given back when all is done.
    _permit: Option<Permit>,
}

impl Landing {
    /// `lots` of `blob`, whose bytes are `fetched`.
    pub(super) fn new(blob: Arc<Blob>, fetched: Arc<Fetched>, lots: Vec<Lot>) -> Self {
        let parts = lots.into_iter().map(Part::new).collect();
        Self { blob, fetched, damaged: 0, parts, _permit: None }
    }

    /// The bytes come from the cache files.
    pub(super) fn of_cache(mut self) -> Self {
        self.parts.iter_mut().for_each(|part| part.origin = Origin::Cache);
        self
    }

    /// Bytes of these chunks were wrong `damaged` times already; `permit` is given back at the end.
    pub(super) fn after(mut self, damaged: u32, permit: Option<Permit>) -> Self {
        (self.damaged, self._permit) = (damaged, permit);
        self
    }

    /// The only lot was decoded before.
    pub(super) fn resumed(mut self, unit: Unit) -> Self {
        self.parts.iter_mut().for_each(|part| part.is_loose = true);
        if let [part] = &mut self.parts[..] {
            part.decoded = Some(Ok(unit));
        }
        self
    }

    /// Answers who waits, then sees to the rest.
    pub(super) fn land(mut self, inner: &Arc<Inner>) {
        let mut again = Vec::new();
        for part in &mut self.parts {
            let chunks = std::mem::take(&mut part.lot.chunks);
            let (wanted, rest) = chunks.into_iter().partition(|(claim, _)| claim.interest() != Interest::Nobody);
            part.lot.chunks = rest;
            for wanted in wanted {
                again.extend(part.finish(inner, wanted, &self.fetched, self.damaged));
            }
        }
        self.again(inner, again);
        self.give_up_loose(inner);
        self.go_on(inner);
    }

    /// Where nothing can be kept, decoding for nobody is of no use.
    fn give_up_loose(&mut self, inner: &Arc<Inner>) {
        for part in &mut self.parts {
            let is_kept = |(claim, _): &Wanted| claim.files.is_some();
            if part.lot.chunks.iter().any(is_kept) {
                part.answer_held_back();
                continue;
            }
            let rest = std::mem::take(&mut part.lot.chunks);
            // On the shelf before any claim ends: whoever claims one of these chunks next finds it there.
            part.shelve(inner, &self.blob, &self.fetched);
            let joined = self.blob.drop_idle(rest);
            part.answer_held_back();
            resolve::drive(inner, joined);
        }
        self.parts.retain(|part| !part.lot.chunks.is_empty());
    }

    /// Makes the rest ready, a slice at a time, so that nobody waits long for this thread.
    fn go_on(self, inner: &Arc<Inner>) {
        if self.parts.is_empty() {
            return;
        }
        let is_waited_for = |part: &Part| part.lot.chunks.iter().any(|(c, _)| c.interest() != Interest::Nobody);
        let urgency = if self.parts.iter().any(is_waited_for) { Urgency::Demand } else { Urgency::Background };
        let later = Arc::clone(inner);
        inner.pool.spawn(urgency, move || self.slice(&later));
    }

    fn slice(mut self, inner: &Arc<Inner>) {
        let (mut done, mut again) = (0u64, Vec::new());
        while done < LANDING_SLICE_BYTES
            && let Some(part) = self.parts.last_mut()
        {
            let mut chunks = std::mem::take(&mut part.lot.chunks).into_iter();
            while done < LANDING_SLICE_BYTES
                && let Some(wanted) = chunks.next()
            {
                done = done.saturating_add(u64::from(wanted.1.uncompressed_bytes));
                again.extend(part.finish(inner, wanted, &self.fetched, self.damaged));
            }
            part.lot.chunks = chunks.collect();
            if part.lot.chunks.is_empty() {
                part.shelve(inner, &self.blob, &self.fetched);
                part.answer_held_back();
                self.parts.pop();
            }
        }
        self.again(inner, again);
        self.go_on(inner);
    }

    /// Fetches damaged chunks once more.
    fn again(&self, inner: &Arc<Inner>, chunks: Vec<Wanted>) {
        if self.parts.iter().any(|part| part.origin == Origin::Cache) {
            return loading::fetch_again(inner, chunks);
        }
        for unit in units(chunks) {
            fetch::submit_unit(inner, unit, self.damaged.saturating_add(1));
        }
    }
}

impl Part {
    fn new(lot: Lot) -> Self {
        let (held_back, origin) = (Vec::new(), Origin::Backend);
        Self { lot, decoded: None, is_loose: false, held_back, is_written: false, origin }
    }

    /// Makes a chunk ready. Gives it back if it is damaged and worth another attempt.
    fn finish(&mut self, inner: &Inner, wanted: Wanted, fetched: &Fetched, damaged: u32) -> Option<Wanted> {
        when_idle(give_back);
        let (claim, facts) = wanted;
        let blob = Arc::clone(&claim.blob);
        let (origin, is_unit) = (self.origin, self.lot.recipe.key().is_some());
        let stored = if is_unit && self.is_written { Some(&[][..]) } else { fetched.piece(&facts.stored()) };
        let keep = |plain: &[u8]| match origin {
            Origin::Backend => keep::keep(inner, &claim, &facts, Content { stored, plain }),
            Origin::Cache => (keep::found(inner, &claim, &facts, plain), true),
        };
        let verified = match &self.lot.recipe {
            Recipe::Single => single(&blob, &facts, fetched, keep),
            recipe => shared(inner, &blob, recipe, &mut self.decoded, &facts, fetched).map(keep),
        };
        match verified {
            Ok((outcome, is_kept)) => {
                self.is_loose |= matches!(outcome, Outcome::Memory(_));
                self.is_written |= is_kept;
                if origin == Origin::Backend {
                    inner.metrics.storage.chunks_fetched.add(1);
                }
                if claim.files.is_none() && is_unit {
                    self.held_back.push((claim, outcome));
                } else {
                    claim.land(&outcome);
                }
                None
            }
            Err(_) if origin == Origin::Cache => Some((claim, facts)),
            Err(source) => {
                inner.metrics.storage.digest_mismatches.add(1);
                // Where nobody waits, nobody is told.
                let claim = claim.unless_idle()?;
                if damaged < DAMAGE_RETRIES {
                    return Some((claim, facts));
                }
                let (blob, chunk, offset) = (blob.facts.index, claim.chunk, facts.compressed_offset);
                // The table may be what is wrong.
                let error = if claim.blob.table.suspect_found() {
                    ReadError::Outdated(blob)
                } else {
                    ReadError::Damaged { blob, chunk, offset, source }
                };
                claim.land(&Outcome::Failed(error));
                None
            }
        }
    }

    fn answer_held_back(&mut self) {
        self.held_back.drain(..).for_each(|(claim, outcome)| claim.land(&outcome));
    }

    /// Lays what was decoded on the shelf, where the cache did not take it.
    fn shelve(&mut self, inner: &Inner, blob: &Blob, fetched: &Arc<Fetched>) {
        if let (true, Some(key), Some(Ok(unit))) = (self.is_loose, self.lot.recipe.key(), self.decoded.take()) {
            inner.shelf.put(inner, (blob.facts.index, key), unit, fetched);
        }
    }
}

/// The plain, verified bytes of a chunk of a unit.
fn shared<'a>(
    inner: &Inner,
    blob: &Blob,
    recipe: &Recipe,
    decoded: &'a mut Decoded,
    facts: &ChunkFacts,
    fetched: &Fetched,
) -> Result<&'a [u8], CodecError> {
    let piece = fetched.piece(&facts.stored()).unwrap_or_default();
    let unit = decoded.get_or_insert_with(|| {
        inner.metrics.storage.units_decoded.add(1);
        match recipe {
            Recipe::Context { context, .. } => Unit::context(context),
            Recipe::Single | Recipe::Batch { .. } => {
                Unit::batch(blob.facts.compressor, blob.sealing.as_ref(), piece, recipe.plain_bytes())
            }
        }
    });
    let unit = unit.as_mut().map_err(|error| *error)?;
    unit.chunk(&blob.facts, facts, piece)
}

thread_local! {
    /// For the chunk at work; kept, while there is work, so that their pages are not taken from the system each time.
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// Stored bytes and units leave their mark in the allocator too: it is trimmed behind this.
fn give_back() {
    let Buffers { opened, plain } = BUFFERS.take();
    discard(opened);
    discard(plain);
}

/// Decodes and verifies a chunk that is stored alone; `use_plain` sees the plain bytes only if they are right.
fn single<T>(
    blob: &Blob,
    facts: &ChunkFacts,
    fetched: &Fetched,
    use_plain: impl FnOnce(&[u8]) -> T,
) -> Result<T, CodecError> {
    let missing = CodecError::Length { expected: facts.compressed_bytes as usize, actual: 0 };
    let stored = fetched.piece(&facts.stored()).ok_or(missing)?;
    // Taken out for the time of use: who uses the bytes is not ours to know.
    let mut buffers = BUFFERS.take();
    let used = chunk::alone(&blob.facts, blob.sealing.as_ref(), facts, stored, &mut buffers).map(use_plain);
    BUFFERS.set(buffers);
    used
}
