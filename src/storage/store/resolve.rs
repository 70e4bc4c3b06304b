//! A parked read meets the chunk states: what is ready is touched, what is said to be ready is verified, what is in
//! flight is joined, what is missing is fetched. Runs on the pool.

use super::Inner;
use super::blob::Admission;
use super::blob::Blob;
use super::blob::Claim;
use super::error::ReadError;
use super::fetch;
use super::fetch::Wanted;
use super::foreign;
use super::lot;
use super::parked::Outcome;
use super::parked::Parked;
use super::plan::Span;
use super::shelf;
use super::table;
use super::table::Table;
use crate::limits::MERGED_FETCH_BYTES;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Piece;
use crate::storage::cache::Generation;
use crate::storage::cache::extents::Extent;
use crate::storage::cache::generation::Presence;
use crate::storage::codec;
use crate::storage::pool::Urgency;
use crate::storage::sync::Arc;
use crate::storage::sync::Weak;

/// Has `parked` resolved by the pool.
pub(super) fn queue(inner: &Inner, parked: Arc<Parked>) {
    let weak = Weak::clone(&inner.weak);
    inner.pool.spawn(Urgency::Demand, move || {
        if let Some(inner) = weak.upgrade() {
            resolve(&inner, &parked);
        }
    });
}

/// Sees to everything that `parked` needs. Called again from the beginning when a chunk table had to be loaded first.
fn resolve(inner: &Arc<Inner>, parked: &Arc<Parked>) {
    if !parked.is_live() {
        return;
    }
    for run in runs(&parked.pieces) {
        let Some(blob) = inner.blobs.get(run[0].blob as usize) else {
            return parked.fail(ReadError::NoBlob(run[0].blob));
        };
        if table::get(inner, blob, parked).is_none() {
            return;
        }
    }
    let mut claims = Vec::new();
    for run in runs(&parked.pieces) {
        if let Err(error) = admit(inner, parked, run, &mut claims) {
            // What was claimed so far goes its way; nothing is fetched for which nobody waits.
            if error.is_passing() {
                parked.note(&error);
            } else {
                parked.fail(error);
            }
            break;
        }
    }
    drive(inner, claims);
    parked.resolved();
}

/// Neighbouring pieces of the same blob.
fn runs(pieces: &[Piece]) -> impl Iterator<Item = &[Piece]> {
    pieces.chunk_by(|one, two| one.blob == two.blob)
}

/// Lets `parked` wait for the chunks of `run`, all of one blob; adds those to `claims` that nobody sees to yet.
fn admit(inner: &Inner, parked: &Arc<Parked>, run: &[Piece], claims: &mut Vec<Wanted>) -> Result<(), ReadError> {
    let blob = inner.blobs.get(run[0].blob as usize).ok_or(ReadError::NoBlob(run[0].blob))?;
    let files = blob.usable_files(inner);
    // Loaded a moment ago; another thread may have found it wrong since.
    let table = blob.table.loaded().ok_or(ReadError::Lost(run[0].blob))?;
    let mut last = None;
    for piece in run {
        let facts = facts_of(blob, &table, piece.chunk)?;
        let place = Extent { offset: facts.uncompressed_offset, len: facts.uncompressed_bytes, touched: false };
        if !place.holds(piece.offset, piece.len) {
            return Err(ReadError::NotInChunk { blob: piece.blob, chunk: piece.chunk });
        }
        if last.replace(piece.chunk) == Some(piece.chunk) {
            continue;
        }
        let companions = lot::companions(blob, &table, files.as_deref(), (piece.chunk, &facts));
        let (admission, along) = blob.admit(piece.chunk, companions, files.as_ref(), parked);
        if let Admission::Claimed(claim) = admission {
            claims.push((claim, facts));
        }
        claims.extend(along);
    }
    Ok(())
}

fn facts_of(blob: &Blob, table: &Arc<Table>, chunk: u32) -> Result<ChunkFacts, ReadError> {
    table
        .chunk(&blob.facts, chunk)
        .map_err(|error| if blob.table.suspect(table, &error) { ReadError::Outdated(blob.facts.index) } else { error })
}

/// Sees to claimed chunks: those that are in the cache land, the others are fetched.
pub(super) fn drive(inner: &Arc<Inner>, claims: Vec<Wanted>) {
    let (mut missing, mut foreign) = (Vec::new(), Vec::new());
    for (mut claim, facts) in claims {
        if is_believed(inner, &claim, &facts) {
            claim.land(&Outcome::Ready);
        } else if !claim.try_lock() {
            foreign.push((claim, facts));
        } else if is_cached(inner, &claim, &facts) {
            // Fetched by another process between our look and our lock; or found, and verified under the lock: by one
            // process only, and never while another writes it.
            claim.land(&Outcome::Ready);
        } else {
            missing.push((claim, facts));
        }
    }
    foreign::wait(inner, foreign);
    let mut missing = shelf::serve(inner, missing);
    missing.sort_by_key(|(claim, facts)| (claim.blob.facts.index, facts.compressed_offset, claim.chunk));
    let mut missing = missing.into_iter().peekable();
    while let Some(first) = missing.next() {
        let limit = inner.options.amplify_bytes.max(MERGED_FETCH_BYTES);
        let mut span = Span::new(&first.1, limit);
        let mut chunks = vec![first];
        while let Some(next) =
            missing.next_if(|(claim, facts)| Arc::ptr_eq(&claim.blob, &chunks[0].0.blob) && span.take(facts))
        {
            chunks.push(next);
        }
        amplify(inner, &mut span, &mut chunks);
        let blob = Arc::clone(&chunks[0].0.blob);
        fetch::submit_chunks(inner, &blob, span.range(), chunks);
    }
}

/// Adds the missing chunks that follow, up to `amplify_bytes`: the next reads are likely to want them. A unit is added
/// with all its chunks. Never a chunk that could not be verified, nor one that is in the works elsewhere.
fn amplify(inner: &Arc<Inner>, span: &mut Span, chunks: &mut Vec<Wanted>) {
    let Some((last, _)) = chunks.last() else { return };
    let (blob, mut next) = (Arc::clone(&last.blob), last.chunk);
    let (Some(files), Some(table)) = (last.files.clone(), blob.table.loaded()) else { return };
    loop {
        next = match next.checked_add(1) {
            Some(next) if next < blob.facts.chunk_count => next,
            _ => return,
        };
        let Ok(facts) = table.chunk(&blob.facts, next) else { return };
        let is_free = lot::UnitKey::of(&facts).is_some() && span.ends_with(&facts);
        let mut longer = span.clone();
        let fits = is_free || longer.take(&facts) && longer.len() <= inner.options.amplify_bytes;
        if !fits || !is_free && !lot::can_be_verified(&facts) {
            return;
        }
        let claim = if lot::can_be_verified(&facts) { blob.claim_missing(next, &files) } else { None };
        let Some(mut claim) = claim else {
            if is_free {
                continue;
            }
            return;
        };
        if !claim.try_lock() || files.presence(next) != Presence::Missing {
            // Another process has it, or had it a moment ago. That is as well, unless a reader joined in this moment.
            foreign::wait(inner, claim.unless_idle().map(|wanted| (wanted, facts)).into_iter().collect());
            return;
        }
        *span = longer;
        chunks.push((claim, facts));
    }
}

/// Whether the chunk is in the cache, needs no proof, and is in memory now. Blocks on the disk.
fn is_believed(inner: &Inner, claim: &Claim, facts: &ChunkFacts) -> bool {
    let Some(files) = &claim.files else { return false };
    let (chunk, offset, len) = (claim.chunk, facts.uncompressed_offset, facts.uncompressed_bytes);
    let needs_proof = inner.options.validate && facts.digest.is_some() && files.extents.get(chunk).is_none();
    if needs_proof || files.presence(chunk) != Presence::Trusted {
        return false;
    }
    match files.touch(offset, len) {
        Ok(()) => {
            files.note_touched(chunk, offset, len as usize);
            true
        }
        Err(error) => {
            tracing::debug!(blob = %claim.blob.id, chunk, %error, "cached chunk cannot be read");
            false
        }
    }
}

/// Whether the chunk is in the cache, right as far as the settings ask, and in memory. The caller has its lock. Blocks
/// on the disk.
fn is_cached(inner: &Inner, claim: &Claim, facts: &ChunkFacts) -> bool {
    if is_believed(inner, claim, facts) {
        return true;
    }
    let Some(files) = &claim.files else { return false };
    let chunk = claim.chunk;
    let (offset, len) = (facts.uncompressed_offset, facts.uncompressed_bytes);
    let presence = files.presence(chunk);
    match presence {
        Presence::Missing => false,
        Presence::Trusted | Presence::Hint => {
            let is_right = is_right(files, &claim.blob, facts);
            match (presence, is_right) {
                (Presence::Hint, true) => inner.metrics.storage.hints_confirmed.add(1),
                (Presence::Hint, false) => inner.metrics.storage.hints_refuted.add(1),
                (_, true) => {}
                (_, false) => {
                    tracing::warn!(blob = %claim.blob.id, chunk, "cached chunk is damaged; fetched again");
                    inner.metrics.storage.digest_mismatches.add(1);
                }
            }
            if is_right {
                files.confirm(chunk, offset, len as usize);
            } else {
                files.refute(chunk);
            }
            is_right
        }
    }
}

/// Whether the cached bytes match the digest. Without a digest nothing can be said for them.
fn is_right(files: &Generation, blob: &Blob, facts: &ChunkFacts) -> bool {
    let Some(digest) = facts.digest else { return false };
    // Its size was checked against the chunk size.
    let mut plain = vec![0; facts.uncompressed_bytes as usize];
    files.read(facts.uncompressed_offset, &mut plain).is_ok() && codec::digest(blob.facts.digester, &plain) == digest
}
