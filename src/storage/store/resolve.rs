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
use super::keep;
use super::loading;
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
    if !parked.is_admitted() {
        let bytes = held_bytes(inner, &parked.pieces);
        if bytes > 0 && !inner.gate.enter(inner, parked, bytes) {
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

/// Bytes of chunks that a read holds while it waits for its last one; 0 if it holds none.
fn held_bytes(inner: &Inner, pieces: &[Piece]) -> u64 {
    let mut last = None;
    let (mut chunks, mut bytes) = (0u32, 0u64);
    for piece in pieces {
        let Some(blob) = inner.blobs.get(piece.blob as usize) else { continue };
        if last.replace((piece.blob, piece.chunk)) == Some((piece.blob, piece.chunk))
            || blob.files().is_some_and(|files| files.is_mapped())
        {
            continue;
        }
        // What cannot be looked up fails later, with its reason.
        let facts = blob.table.loaded().and_then(|table| table.chunk(&blob.facts, piece.chunk).ok());
        chunks = chunks.saturating_add(1);
        bytes = bytes.saturating_add(facts.map_or(0, |facts| u64::from(facts.uncompressed_bytes)));
    }
    if chunks > 1 { bytes } else { 0 }
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
pub(super) fn drive(inner: &Arc<Inner>, mut claims: Vec<Wanted>) {
    claims.sort_by_key(|(claim, facts)| (claim.blob.facts.index, facts.compressed_offset, claim.chunk));
    let (mut missing, mut foreign, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    // The unit at hand, if another process has one of its chunks. All lock in the same order, so it will have the others,
    // and two processes do not share a unit that both would have to fetch.
    let mut theirs = None;
    for (mut claim, facts) in claims {
        let unit = lot::UnitKey::of(&facts).map(|key| (claim.blob.facts.index, key));
        let is_missing = |files: &Arc<Generation>| files.presence(claim.chunk, &facts) == Presence::Missing;
        let is_theirs = unit.is_some() && unit == theirs && claim.files.as_ref().is_some_and(is_missing);
        let way = if is_theirs { Way::Foreign } else { way(inner, &mut claim, &facts) };
        match way {
            Way::Here(outcome) => claim.land(&outcome),
            Way::Foreign => {
                theirs = unit;
                foreign.push((claim, facts));
            }
            Way::Kept => kept.push((claim, facts)),
            Way::Missing => missing.push((claim, facts)),
        }
    }
    loading::load(inner, kept);
    foreign::wait(inner, foreign);
    let mut missing = shelf::serve(inner, missing).into_iter().peekable();
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
        let can_be_verified = lot::can_be_verified(&facts);
        let claim = if can_be_verified { blob.claim_missing(next, &facts, &files) } else { None };
        let Some(mut claim) = claim else {
            if is_free {
                continue;
            }
            return;
        };
        let is_ours = claim.try_lock() && files.presence(next, &facts) == Presence::Missing;
        if !is_ours || !files.claim(next, &facts, claim.right()) {
            // Another process has it, or had it a moment ago, or another image has its place. That is as well, unless a
            // reader joined in this moment.
            foreign::wait(inner, claim.unless_idle().map(|wanted| (wanted, facts)).into_iter().collect());
            return;
        }
        *span = longer;
        chunks.push((claim, facts));
    }
}

/// How a claimed chunk is come by.
enum Way {
    /// It is at hand.
    Here(Outcome),
    /// Another process sees to it.
    Foreign,
    /// The cache files hold it in another form.
    Kept,
    /// From the backend.
    Missing,
}

fn way(inner: &Inner, claim: &mut Claim, facts: &ChunkFacts) -> Way {
    if let Some(chunk) = inner.decoded.get(claim.blob.facts.index, claim.chunk) {
        return Way::Here(Outcome::Memory(chunk));
    }
    let Some(files) = claim.files.clone() else { return Way::Missing };
    let presence = files.presence(claim.chunk, facts);
    if matches!(presence, Presence::Disputed | Presence::Beyond) {
        if presence == Presence::Disputed {
            claim.blob.note_disputed(inner, claim.chunk);
        }
        claim.leave_files();
        return Way::Missing;
    }
    let is_mapped = files.is_mapped();
    if is_mapped && is_believed(inner, claim, facts, presence) {
        return Way::Here(Outcome::Ready);
    }
    if !is_mapped && presence == Presence::Trusted {
        return Way::Kept;
    }
    if !claim.try_lock() {
        if !claim.is_contested(facts) {
            return Way::Foreign;
        }
        claim.leave_files();
        return Way::Missing;
    }
    // Fetched by another process between our look and our lock; or found, and verified under the lock: by one process
    // only, and never while another writes it.
    if is_mapped && is_cached(inner, claim, facts) {
        return Way::Here(Outcome::Ready);
    }
    if !is_mapped && is_kept(&files, claim, facts) {
        return Way::Kept;
    }
    // Before it is fetched, so that others see whose flight this is.
    if !files.claim(claim.chunk, facts, claim.right()) {
        claim.blob.note_disputed(inner, claim.chunk);
        claim.leave_files();
    }
    Way::Missing
}

/// Whether files that are not mapped hold the chunk, so that it can be told whether it is right. The caller has its
/// lock.
fn is_kept(files: &Generation, claim: &Claim, facts: &ChunkFacts) -> bool {
    match files.presence(claim.chunk, facts) {
        Presence::Trusted => true,
        Presence::Hint => facts.digest.is_some() && files.claim(claim.chunk, facts, claim.right()),
        Presence::Missing | Presence::Disputed | Presence::Beyond => false,
    }
}

/// Whether the chunk, of which the cache says `presence`, needs no proof, and is in memory now. Blocks on the disk.
fn is_believed(inner: &Inner, claim: &Claim, facts: &ChunkFacts, presence: Presence) -> bool {
    let Some(files) = &claim.files else { return false };
    let (chunk, offset, len) = (claim.chunk, facts.uncompressed_offset, facts.uncompressed_bytes);
    let is_asked_for = (inner.options.validate || files.is_doubtful()) && facts.digest.is_some();
    let needs_proof = is_asked_for && files.extents.get(chunk).is_none();
    if needs_proof || presence != Presence::Trusted {
        return false;
    }
    match files.touch(offset, len) {
        Ok(()) => {
            files.note_touched(chunk, offset, len);
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
    let Some(files) = &claim.files else { return false };
    let chunk = claim.chunk;
    let presence = files.presence(chunk, facts);
    if is_believed(inner, claim, facts, presence) {
        return true;
    }
    match presence {
        Presence::Missing | Presence::Disputed | Presence::Beyond => false,
        // Claimed first: what is looked at must not be written by another image meanwhile.
        Presence::Trusted | Presence::Hint if !files.claim(chunk, facts, claim.right()) => false,
        Presence::Trusted | Presence::Hint => {
            let is_right = is_right(files, &claim.blob, facts);
            if !is_right {
                keep::refuted(inner, files, claim, facts, presence);
                return false;
            }
            if presence == Presence::Hint {
                inner.metrics.storage.hints_confirmed.add(1);
            }
            files.confirm(chunk, facts);
            true
        }
    }
}

/// Whether the cached bytes match the digest. Without a digest nothing can be said for them.
fn is_right(files: &Generation, blob: &Blob, facts: &ChunkFacts) -> bool {
    let Some(digest) = facts.digest else { return false };
    files.load(facts).is_ok_and(|plain| codec::digest(blob.facts.digester, &plain) == digest)
}
