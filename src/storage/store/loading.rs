//! Chunks that the cache files hold in another form than readers get: as the blob stores them, or encrypted.
//!
//! They are loaded, made plain and verified like those that come from a backend, each time that they are needed and not
//! remembered. What proves wrong is fetched again.

use super::Inner;
use super::blob::Claim;
use super::fetch;
use super::fetch::Wanted;
use super::foreign;
use super::keep;
use super::landing::Fetched;
use super::landing::Landing;
use super::lot::lots;
use super::lot::units;
use crate::rafs::facts::ChunkFacts;
use crate::storage::cache::Generation;
use crate::storage::cache::Keeping;
use crate::storage::codec;
use crate::storage::sync::Arc;

/// Loads `chunks`, all in their cache files. Blocks on the disk.
pub(super) fn load(inner: &Arc<Inner>, mut chunks: Vec<Wanted>) {
    chunks.sort_by_key(|(claim, facts)| (claim.blob.facts.index, facts.compressed_offset, claim.chunk));
    let mut damaged = Vec::new();
    for unit in units(chunks) {
        let is_stored = |files: &Generation| files.keeping().is_some_and(Keeping::is_stored);
        if unit[0].0.files.as_deref().is_some_and(is_stored) {
            damaged.extend(load_unit(inner, unit));
        } else {
            damaged.extend(unit.into_iter().filter_map(|wanted| load_one(inner, wanted)));
        }
    }
    fetch_again(inner, damaged);
}

/// Lands chunks that are kept as they are stored, in one piece; gives them back where that cannot be read.
fn load_unit(inner: &Arc<Inner>, unit: Vec<Wanted>) -> Vec<Wanted> {
    let (claim, facts) = &unit[0];
    let Some(bytes) = bytes_of(claim, facts) else { return unit };
    let blob = Arc::clone(&claim.blob);
    let fetched = Arc::new(Fetched::new(facts.compressed_offset, bytes));
    let lots = lots(&blob, unit);
    Landing::new(blob, fetched, lots).of_cache().land(inner);
    Vec::new()
}

/// Lands a chunk that is kept encrypted, or gives it back if it is wrong or cannot be read.
fn load_one(inner: &Inner, (claim, facts): Wanted) -> Option<Wanted> {
    let digester = claim.blob.facts.digester;
    let plain = bytes_of(&claim, &facts)
        .and_then(|bytes| claim.files.as_ref()?.open_chunk(&facts, &bytes))
        .filter(|plain| codec::verify(digester, facts.digest, facts.crc32c, plain).is_ok());
    let Some(plain) = plain else { return Some((claim, facts)) };
    let outcome = keep::found(inner, &claim, &facts, &plain);
    claim.land(&outcome);
    None
}

/// What the cache files keep of a chunk.
fn bytes_of(claim: &Claim, facts: &ChunkFacts) -> Option<Vec<u8>> {
    let loaded = claim.files.as_ref()?.load(facts);
    loaded.inspect_err(|error| tracing::debug!(blob = %claim.blob.id, %error, "cached chunk cannot be read")).ok()
}

/// Fetches chunks whose cached bytes proved wrong.
pub(super) fn fetch_again(inner: &Arc<Inner>, chunks: Vec<Wanted>) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for (mut claim, facts) in chunks {
        if let Some(files) = &claim.files {
            let presence = files.presence(claim.chunk, &facts);
            keep::refuted(inner, files, &claim, &facts, presence);
        }
        // Only now: what is believed is loaded without a lock.
        if claim.try_lock() {
            ours.push((claim, facts));
        } else {
            theirs.push((claim, facts));
        }
    }
    foreign::wait(inner, theirs);
    units(ours).for_each(|unit| fetch::submit_unit(inner, unit, 0));
}
