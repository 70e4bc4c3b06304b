//! What becomes of a verified chunk: it is kept in the cache files, and remembered where readers cannot map those.

use super::Inner;
use super::blob::Claim;
use super::blob::Interest;
use super::decoded::Chunk;
use super::parked::Outcome;
use crate::rafs::facts::ChunkFacts;
use crate::storage::cache::Generation;
use crate::storage::cache::generation::Kept;
use crate::storage::cache::generation::Presence;
use crate::storage::cache::keeping::Content;
use crate::storage::sync::Arc;

/// Writes a verified chunk to the cache; where readers are not served from there, they get it from memory. The second
/// value tells whether the cache has it now.
pub(super) fn keep(inner: &Inner, claim: &Claim, facts: &ChunkFacts, content: Content<'_>) -> (Outcome, bool) {
    let Some(files) = &claim.files else { return (remembered(inner, claim, facts, content.plain), false) };
    match files.store(claim.chunk, facts, content, claim.right()) {
        Ok(Kept::InFile) if files.is_mapped() => (Outcome::Ready, true),
        Ok(Kept::InFile) => (remembered(inner, claim, facts, content.plain), true),
        Ok(Kept::Disputed) => {
            claim.blob.note_disputed(inner, claim.chunk);
            (remembered(inner, claim, facts, content.plain), false)
        }
        Ok(Kept::Lacking) => (remembered(inner, claim, facts, content.plain), false),
        Err(error) => {
            inner.metrics.storage.cache_write_errors.add(1);
            if claim.blob.cache_warning.passes() {
                tracing::warn!(blob = %claim.blob.id, %error, "cache cannot be written; reads are served from memory");
            }
            (Outcome::Memory(chunk(facts, content.plain)), false)
        }
    }
}

/// A chunk that the cache files hold in another form proved right.
pub(super) fn found(inner: &Inner, claim: &Claim, facts: &ChunkFacts, plain: &[u8]) -> Outcome {
    if let Some(files) = &claim.files
        && files.presence(claim.chunk, facts) == Presence::Hint
    {
        inner.metrics.storage.hints_confirmed.add(1);
        files.confirm(claim.chunk, facts);
    }
    remembered(inner, claim, facts, plain)
}

/// What `files` hold of a chunk, of which they said `presence`, proved wrong.
pub(super) fn refuted(inner: &Inner, files: &Generation, claim: &Claim, facts: &ChunkFacts, presence: Presence) {
    if presence == Presence::Trusted {
        tracing::warn!(blob = %claim.blob.id, chunk = claim.chunk, "cached chunk is damaged; fetched again");
        inner.metrics.storage.digest_mismatches.add(1);
    } else {
        inner.metrics.storage.hints_refuted.add(1);
    }
    files.refute(claim.chunk, facts);
}

/// The chunk in memory: for those who wait, and for who comes next.
fn remembered(inner: &Inner, claim: &Claim, facts: &ChunkFacts, plain: &[u8]) -> Outcome {
    if claim.interest() == Interest::Nobody {
        // Who joins in this moment begins anew.
        return Outcome::Ready;
    }
    let chunk = chunk(facts, plain);
    inner.decoded.put(inner, claim.blob.facts.index, claim.chunk, &chunk);
    Outcome::Memory(chunk)
}

fn chunk(facts: &ChunkFacts, plain: &[u8]) -> Chunk {
    Chunk { offset: facts.uncompressed_offset, plain: Arc::new(plain.to_vec()) }
}
