//! Chunks that the cache files hold in another form than readers get: as the blob stores them, or encrypted.
//!
//! They are loaded, made plain and verified like those that come from a backend, each time that they are needed and not
//! remembered. What proves wrong is fetched again.

use super::Inner;
use super::fetch;
use super::fetch::Wanted;
use super::fetch::stored;
use super::foreign;
use super::keep;
use super::landing::Fetched;
use super::landing::Landing;
use super::lot::lots;
use crate::rafs::facts::ChunkFacts;
use crate::storage::cache::Generation;
use crate::storage::cache::generation::Presence;
use crate::storage::codec;
use crate::storage::sync::Arc;

/// Loads `chunks`, all in their cache files. Blocks on the disk.
pub(super) fn load(inner: &Arc<Inner>, mut chunks: Vec<Wanted>) {
    chunks.sort_by_key(|(claim, facts)| (claim.blob.facts.index, facts.compressed_offset, claim.chunk));
    let mut damaged = Vec::new();
    let mut chunks = chunks.into_iter().peekable();
    while let Some((claim, facts)) = chunks.next() {
        let Some(files) = claim.files.clone() else { continue };
        let blob = Arc::clone(&claim.blob);
        let is_stored = files.keeping().is_some_and(|keeping| keeping.is_stored());
        let range = stored(&facts);
        let mut unit = vec![(claim, facts)];
        // Chunks of one unit are loaded together.
        while is_stored
            && let Some(next) =
                chunks.next_if(|(claim, facts)| Arc::ptr_eq(&claim.blob, &blob) && stored(facts) == range)
        {
            unit.push(next);
        }
        match files.load(&facts) {
            Ok(bytes) if is_stored => {
                let fetched = Arc::new(Fetched::new(range.start, bytes));
                let lots = lots(&blob, unit);
                Landing::new(blob, fetched, lots).of_cache().land(inner);
            }
            Ok(bytes) => damaged.extend(unit.into_iter().filter_map(|wanted| decrypt(inner, wanted, &files, &bytes))),
            Err(error) => {
                tracing::debug!(blob = %blob.id, %error, "cached chunk cannot be read");
                damaged.extend(unit);
            }
        }
    }
    fetch_again(inner, damaged);
}

/// Lands a chunk, or gives it back if it is wrong.
fn decrypt(inner: &Inner, (claim, facts): Wanted, files: &Generation, bytes: &[u8]) -> Option<Wanted> {
    let digester = claim.blob.facts.digester;
    let plain = files.open_chunk(&facts, bytes);
    let plain = plain.filter(|plain| codec::verify(digester, facts.digest, facts.crc32c, plain).is_ok());
    let Some(plain) = plain else { return Some((claim, facts)) };
    let outcome = keep::found(inner, &claim, &facts, &plain);
    claim.land(&outcome);
    None
}

/// Fetches chunks whose cached bytes proved wrong.
pub(super) fn fetch_again(inner: &Arc<Inner>, chunks: Vec<Wanted>) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for (mut claim, facts) in chunks {
        refute(inner, &claim.blob.id, claim.files.as_deref(), (claim.chunk, &facts));
        // Only now: what is believed is loaded without a lock.
        if claim.try_lock() {
            ours.push((claim, facts));
        } else {
            theirs.push((claim, facts));
        }
    }
    foreign::wait(inner, theirs);
    let mut ours = ours.into_iter().peekable();
    while let Some(first) = ours.next() {
        let (blob, range) = (Arc::clone(&first.0.blob), stored(&first.1));
        let mut unit = vec![first];
        while let Some(next) = ours.next_if(|(claim, facts)| Arc::ptr_eq(&claim.blob, &blob) && stored(facts) == range)
        {
            unit.push(next);
        }
        fetch::submit_chunks(inner, &blob, range, unit);
    }
}

fn refute(inner: &Inner, blob: &str, files: Option<&Generation>, (chunk, facts): (u32, &ChunkFacts)) {
    let Some(files) = files else { return };
    if files.presence(chunk, facts) == Presence::Trusted {
        tracing::warn!(blob, chunk, "cached chunk is damaged; fetched again");
        inner.metrics.storage.digest_mismatches.add(1);
    } else {
        inner.metrics.storage.hints_refuted.add(1);
    }
    files.refute(chunk, facts);
}
