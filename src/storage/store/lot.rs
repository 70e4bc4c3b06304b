//! Chunks that are decoded together: those of a batch, those of a context of a gzip file, and single ones.
//!
//! A unit is worth more than the chunk that is asked for: whoever claims one of its chunks claims all that are missing,
//! in the same moment ([`Blob::admit`]), so that a unit is fetched once and decoded once however many readers there
//! are, and whichever of its chunks they want.

use super::blob::Blob;
use super::error::ReadError;
use super::fetch::Wanted;
use super::parked::Outcome;
use super::table::Table;
use crate::limits::MAX_UNIT_COMPANIONS;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;
use crate::rafs::facts::ZranContext;
use crate::storage::cache::Generation;
use crate::storage::cache::generation::Presence;
use crate::storage::sync::Arc;

/// What tells one unit of a blob from another, also where a table contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct UnitKey {
    offset: u64,
    bytes: u32,
    kind: UnitKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum UnitKind {
    Batch { plain_bytes: u32 },
    Context(u32),
}

impl UnitKey {
    /// The unit of a chunk; `None`: it is stored alone.
    pub(super) fn of(facts: &ChunkFacts) -> Option<Self> {
        let kind = match facts.coding {
            Coding::Plain | Coding::Compressed => return None,
            Coding::Batch { plain_bytes, .. } => UnitKind::Batch { plain_bytes },
            Coding::Zran { context, .. } => UnitKind::Context(context),
        };
        Some(Self { offset: facts.compressed_offset, bytes: facts.compressed_bytes, kind })
    }
}

/// Whether the bytes of a chunk can be told from others. What cannot is fetched only for a reader that asks for it.
pub(super) fn can_be_verified(facts: &ChunkFacts) -> bool {
    facts.digest.is_some() || facts.crc32c.is_some()
}

/// The chunks that are stored in one piece with `chunk` and may have to be fetched with it. Empty where that is not
/// worth looking for: `chunk` is single, in flight, or in the cache.
pub(super) fn companions(
    blob: &Blob,
    table: &Table,
    files: Option<&Generation>,
    (chunk, facts): (u32, &ChunkFacts),
) -> Vec<(u32, ChunkFacts)> {
    let unit = UnitKey::of(facts);
    let may_be_cached = files.is_some_and(|files| files.presence(chunk, facts) != Presence::Missing);
    if unit.is_none() || may_be_cached || blob.is_in_flight(chunk) {
        return Vec::new();
    }
    let member = |chunk: u32| {
        let facts = table.chunk(&blob.facts, chunk).ok()?;
        (UnitKey::of(&facts) == unit).then_some((chunk, facts))
    };
    let before = (0..chunk).rev().map_while(member).take(MAX_UNIT_COMPANIONS);
    let behind = (chunk.saturating_add(1)..blob.facts.chunk_count).map_while(member).take(MAX_UNIT_COMPANIONS);
    before.chain(behind).filter(|(_, facts)| can_be_verified(facts)).collect()
}

/// How the chunks of a lot come out of its stored bytes.
#[derive(Debug)]
pub(super) enum Recipe {
    /// Each by itself.
    Single,
    /// From one batch.
    Batch { key: UnitKey, plain_bytes: u32 },
    /// From one context.
    Context { key: UnitKey, context: ZranContext },
}

/// Chunks that are decoded together.
pub(super) struct Lot {
    /// How.
    pub(super) recipe: Recipe,
    /// At least one, in the order in which they come out.
    pub(super) chunks: Vec<Wanted>,
}

impl Recipe {
    /// That of `chunk`. Where a unit cannot be, so that its chunks have no bytes: why.
    fn of(blob: &Blob, chunk: u32, facts: &ChunkFacts) -> Result<Self, ReadError> {
        let Some(key) = UnitKey::of(facts) else { return Ok(Self::Single) };
        match key.kind {
            UnitKind::Batch { plain_bytes } => Ok(Self::Batch { key, plain_bytes }),
            UnitKind::Context(number) => {
                // Given up by another thread since: a read that begins anew finds the next one.
                let table = blob.table.loaded().ok_or(ReadError::Outdated(blob.facts.index))?;
                let context = table.zran(&blob.facts, number)?;
                let end = facts.offset_in_unit().checked_add(facts.uncompressed_bytes);
                let fits = context.stored == facts.stored() && end.is_some_and(|end| end <= context.plain_bytes);
                if !fits {
                    let reason = "it does not lie in its context";
                    return Err(ReadError::BadChunk { blob: blob.facts.index, chunk, reason });
                }
                Ok(Self::Context { key, context })
            }
        }
    }

    /// The unit; `None`: single chunks.
    pub(super) fn key(&self) -> Option<UnitKey> {
        match self {
            Self::Single => None,
            Self::Batch { key, .. } | Self::Context { key, .. } => Some(*key),
        }
    }

    /// Bytes of the decoded unit.
    pub(super) fn plain_bytes(&self) -> u32 {
        match self {
            Self::Single => 0,
            Self::Batch { plain_bytes, .. } => *plain_bytes,
            Self::Context { context, .. } => context.plain_bytes,
        }
    }

    /// Whether a chunk that has its key lies in it.
    fn holds(&self, facts: &ChunkFacts) -> bool {
        let end = facts.offset_in_unit().checked_add(facts.uncompressed_bytes);
        end.is_some_and(|end| end <= self.plain_bytes())
    }
}

/// Sorts `chunks`, all of `blob`, into lots. A chunk whose unit cannot be is answered with an error.
pub(super) fn lots(blob: &Blob, mut chunks: Vec<Wanted>) -> Vec<Lot> {
    chunks.sort_by_key(|(claim, facts)| (UnitKey::of(facts), facts.offset_in_unit(), claim.chunk));
    let mut lots: Vec<Lot> = Vec::new();
    for (claim, facts) in chunks {
        let key = UnitKey::of(&facts);
        if let Some(lot) = lots.last_mut().filter(|lot| lot.recipe.key() == key)
            && (key.is_none() || lot.recipe.holds(&facts))
        {
            lot.chunks.push((claim, facts));
            continue;
        }
        match Recipe::of(blob, claim.chunk, &facts) {
            Ok(recipe) => lots.push(Lot { recipe, chunks: vec![(claim, facts)] }),
            Err(error) => claim.land(&Outcome::Failed(error)),
        }
    }
    lots
}

/// Neighbours among `chunks` whose stored bytes are the same: those of a unit, or a chunk that is stored alone.
pub(super) fn units(chunks: Vec<Wanted>) -> impl Iterator<Item = Vec<Wanted>> {
    let mut chunks = chunks.into_iter().peekable();
    std::iter::from_fn(move || {
        let first = chunks.next()?;
        let (blob, range) = (Arc::clone(&first.0.blob), first.1.stored());
        let mut unit = vec![first];
        let is_of_it = |(claim, facts): &Wanted| Arc::ptr_eq(&claim.blob, &blob) && facts.stored() == range;
        while let Some(next) = chunks.next_if(is_of_it) {
            unit.push(next);
        }
        Some(unit)
    })
}
