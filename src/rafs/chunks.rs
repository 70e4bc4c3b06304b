//! What the bootstrap says of chunks, found by (blob, chunk index).
//!
//! v5 keeps a record of 80 bytes per chunk behind each file's inode, v6 the same record in one table ordered by digest.
//! Either way the index is one `u32` per distinct chunk, ordered by blob and chunk index, that names the place of a
//! record; the record itself stays in the map and is checked again on each use.

use std::sync::Arc;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::NO_TOOLS;
use super::RafsError;
use super::facts::BlobFacts;
use super::facts::ChunkFacts;
use super::facts::Coding;
use super::facts::Digest;
use super::facts::Seal;
use super::facts::encrypted_bytes;
use super::facts::feature;
use super::grid;
use super::malformed;
use super::unknown;
use crate::limits;
use crate::sys::view::View;
use crate::sys::view::ViewError;

/// Bytes of a chunk record.
pub(super) const RECORD_BYTES: u64 = 80;

const COMPRESSED: u32 = 0x1;
const HOLE: u32 = 0x2;
const ENCRYPTED: u32 = 0x4;
const BATCH: u32 = 0x8;
const HAS_CRC32C: u32 = 0x10;

/// A chunk record as stored (format, section 3.9).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Record {
    pub(super) digest: [u8; 32],
    pub(super) blob: U32,
    flags: U32,
    compressed_bytes: U32,
    uncompressed_bytes: U32,
    compressed_offset: U64,
    uncompressed_offset: U64,
    pub(super) file_offset: U64,
    pub(super) index: U32,
    crc32c: U32,
}

impl Record {
    /// Index in its blob and what the record at `at` of a v5 image states, checked against its blob (section 14, rule 9).
    #[inline]
    pub(super) fn facts(
        &self,
        at: u64,
        blobs: &[BlobFacts],
        numbering: &Numbering,
    ) -> Result<(u32, ChunkFacts), RafsError> {
        let facts = self.describe(at, blobs)?;
        Ok((numbering.index(self, at, self.blob_of(at, blobs)?)?, facts))
    }

    /// What the record at `at` of a v5 image states, checked but for its index.
    #[inline]
    pub(super) fn describe(&self, at: u64, blobs: &[BlobFacts]) -> Result<ChunkFacts, RafsError> {
        let blob = self.blob_of(at, blobs)?;
        let flags = self.flags.get();
        if flags & (HOLE | ENCRYPTED | BATCH) != 0 {
            return Err(unknown(format!("chunk flags {flags:#x}"), format!("the RAFS v5 blob {}", blob.id), NO_TOOLS));
        }
        let facts = ChunkFacts {
            compressed_offset: self.compressed_offset.get(),
            compressed_bytes: self.compressed_bytes.get(),
            uncompressed_offset: self.uncompressed_offset.get(),
            uncompressed_bytes: self.uncompressed_bytes.get(),
            coding: if flags & COMPRESSED == 0 { Coding::Plain } else { Coding::Compressed },
            digest: self.known_digest(blob),
            crc32c: (flags & HAS_CRC32C != 0).then(|| self.crc32c.get()),
        };
        check_ranges(&facts, at, blob)?;
        let is_external = blob.features & feature::EXTERNAL != 0;
        if is_external && (facts.coding != Coding::Plain || facts.compressed_offset != facts.uncompressed_offset) {
            let reason = format!("{:#x}, stored at {:#x}", facts.uncompressed_offset, facts.compressed_offset);
            return Err(malformed("chunk uncompressed offset", at, reason + ": external blobs are used as they are"));
        }
        Ok(facts)
    }

    /// The digest, if there is one: those who describe external blobs have not read them, and leave zeros.
    #[inline]
    fn known_digest(&self, blob: &BlobFacts) -> Option<Digest> {
        (blob.features & feature::EXTERNAL == 0 || self.digest != [0; 32]).then_some(self.digest)
    }

    /// What the record at `at` of a v6 image seals, checked against its blob. Where the stored bytes are is told by the
    /// blob's own table; the record does not know it of chunks that share them.
    fn seal(&self, at: u64, blobs: &[BlobFacts]) -> Result<Option<Seal>, RafsError> {
        let blob = self.blob_of(at, blobs)?;
        let (uncompressed_offset, uncompressed_bytes) = (self.uncompressed_offset.get(), self.uncompressed_bytes.get());
        check_plain_range(uncompressed_offset, uncompressed_bytes, at, blob)?;
        Ok(self.known_digest(blob).map(|digest| Seal { digest, uncompressed_offset, uncompressed_bytes }))
    }

    /// The blob that the record refers to.
    #[inline]
    fn blob_of<'a>(&self, at: u64, blobs: &'a [BlobFacts]) -> Result<&'a BlobFacts, RafsError> {
        let blob_index = self.blob.get();
        let Some(blob) = usize::try_from(blob_index).ok().and_then(|index| blobs.get(index)) else {
            return Err(malformed("chunk blob index", at, format!("{blob_index} of {} blobs", blobs.len())));
        };
        Ok(blob)
    }

    /// Whether both records, of one chunk, describe the same bytes. Where in a file they were met does not count, nor an
    /// index that has no meaning.
    fn describes_same(&self, other: &Self) -> bool {
        let bare = |record: &Self| Self { file_offset: U64::ZERO, index: U32::ZERO, ..*record };
        bare(self).as_bytes() == bare(other).as_bytes()
    }
}

/// Where the index of a chunk in its blob comes from.
#[derive(Debug, Clone)]
pub(super) enum Numbering {
    /// The record states it.
    Stored,
    /// Old v5: the records state none. It is the rank of the chunk's place in the uncompressed blob.
    Ranked(Arc<Ranks>),
}

/// For each blob the offsets of its chunks in the uncompressed blob, ascending.
#[derive(Debug)]
pub(super) struct Ranks {
    offsets: Vec<Vec<u64>>,
}

impl Ranks {
    /// `offsets` must ascend without repetition, for each blob.
    pub(super) fn new(offsets: Vec<Vec<u64>>) -> Self {
        Self { offsets }
    }
}

impl Numbering {
    /// The index of the chunk that the record at `at` describes, in `blob`.
    #[inline]
    fn index(&self, record: &Record, at: u64, blob: &BlobFacts) -> Result<u32, RafsError> {
        let index = match self {
            Self::Stored => record.index.get(),
            Self::Ranked(ranks) => {
                let offsets = usize::try_from(blob.index).ok().and_then(|blob| ranks.offsets.get(blob));
                let rank = offsets.and_then(|offsets| offsets.binary_search(&record.uncompressed_offset.get()).ok());
                // Not found only if the record has changed since the image was opened.
                rank.and_then(|rank| u32::try_from(rank).ok()).unwrap_or(u32::MAX)
            }
        };
        if index < blob.chunk_count {
            return Ok(index);
        }
        Err(malformed("chunk index", at, format!("{index} of {} chunks", blob.chunk_count)))
    }
}

#[inline]
fn key(blob: u32, chunk: u32) -> u64 {
    u64::from(blob) << 32 | u64::from(chunk)
}

/// Checks a chunk's ranges against its blob (section 14, rule 9).
#[inline]
pub(super) fn check_ranges(chunk: &ChunkFacts, at: u64, blob: &BlobFacts) -> Result<(), RafsError> {
    check_plain_range(chunk.uncompressed_offset, chunk.uncompressed_bytes, at, blob)?;
    let stored_bytes = chunk.compressed_bytes;
    let is_stored_right = match chunk.coding {
        Coding::Plain if blob.cipher.is_some() => stored_bytes == encrypted_bytes(chunk.uncompressed_bytes),
        Coding::Plain => stored_bytes == chunk.uncompressed_bytes,
        _ => (1..=limits::MAX_CHUNK_BYTES).contains(&stored_bytes),
    };
    if !is_stored_right {
        let reason = format!("{stored_bytes} bytes for {}", chunk.uncompressed_bytes);
        return Err(malformed("chunk compressed size", at, reason));
    }
    let stored_end = chunk.compressed_offset.checked_add(u64::from(stored_bytes));
    if stored_end.is_none_or(|end| end > blob.data_bytes) {
        let reason = format!("{stored_bytes} bytes at {:#x}", chunk.compressed_offset);
        return Err(malformed(
            "chunk compressed offset",
            at,
            format!("{reason}, blob data ends at {}", blob.data_bytes),
        ));
    }
    Ok(())
}

/// Checks a chunk's place in the uncompressed blob (section 14, rule 9).
#[inline]
fn check_plain_range(offset: u64, bytes: u32, at: u64, blob: &BlobFacts) -> Result<(), RafsError> {
    if bytes == 0 || bytes > blob.chunk_bytes {
        let reason = format!("{bytes} bytes, chunk size {}", blob.chunk_bytes);
        return Err(malformed("chunk uncompressed size", at, reason));
    }
    if offset.checked_add(u64::from(bytes)).is_none_or(|end| end > blob.uncompressed_bytes) {
        let reason = format!("{bytes} bytes at {offset:#x}, blob ends at {}", blob.uncompressed_bytes);
        return Err(malformed("chunk uncompressed offset", at, reason));
    }
    Ok(())
}

/// How the numbers in the index become offsets of records, and what records are good for.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// Number × 8 is the offset; the record is complete.
    V5(Numbering),
    /// The number counts records from this offset; they seal chunks that the blobs' own tables describe.
    V6 { table: u64 },
    /// There are none: chunks are the parts of a grid.
    Grid,
}

impl Source {
    fn offset(&self, number: u32) -> u64 {
        match self {
            Self::V5(_) | Self::Grid => u64::from(number).wrapping_mul(8),
            // A u32 times 80 is far below 2^64, and the table's offset lies in the file.
            Self::V6 { table } => table.saturating_add(u64::from(number).wrapping_mul(RECORD_BYTES)),
        }
    }

    /// Blob and index of a record in one number, which orders the index.
    fn key(&self, record: &Record, at: u64, blobs: &[BlobFacts]) -> Result<u64, RafsError> {
        let blob = record.blob_of(at, blobs)?;
        let index = match self {
            Self::V5(numbering) => numbering.index(record, at, blob)?,
            Self::V6 { .. } | Self::Grid => Numbering::Stored.index(record, at, blob)?,
        };
        Ok(key(blob.index, index))
    }
}

/// Chunk records of a bootstrap by blob and chunk index: 4 bytes per chunk, built by one pass over the image on the
/// first cold read, and not at all when everything is cached.
#[derive(Debug)]
pub struct ChunkIndex {
    view: View,
    blobs: Arc<[BlobFacts]>,
    source: Source,
    /// For each blob the position in `records` of its first chunk, and one more: the end.
    starts: Vec<usize>,
    /// Numbers of the records, ordered by blob and chunk index, each pair once.
    records: Vec<u32>,
    /// What is wrong with records that were left out.
    faults: Vec<RafsError>,
}

/// Collects the places of records for a [`ChunkIndex`].
pub(super) struct Builder {
    view: View,
    blobs: Arc<[BlobFacts]>,
    source: Source,
    found: Vec<(u64, u32)>,
    faults: Vec<RafsError>,
}

impl Builder {
    pub(super) fn new(view: View, blobs: Arc<[BlobFacts]>, source: Source) -> Self {
        Self { view, blobs, source, found: Vec::new(), faults: Vec::new() }
    }

    /// Takes the record with the number `number` into the index, after checking it.
    pub(super) fn add(&mut self, number: u32, record: &Record) -> Result<(), RafsError> {
        let at = self.source.offset(number);
        match self.source {
            Source::V5(_) => record.describe(at, &self.blobs).map(drop)?,
            Source::V6 { .. } => record.seal(at, &self.blobs).map(drop)?,
            Source::Grid => {}
        }
        self.found.push((self.source.key(record, at, &self.blobs)?, number));
        Ok(())
    }

    /// Leaves something out because of `fault`. Without its record a chunk of v5 cannot be read, and that is all; a chunk
    /// of v6 could, unverified, so there it is an error.
    ///
    /// # Errors
    /// `fault`, where nothing may be left out, or the metadata were lost.
    pub(super) fn leave_out(&mut self, fault: RafsError) -> Result<(), RafsError> {
        if !matches!(self.source, Source::V5(_)) || matches!(fault, RafsError::View(ViewError::Lost)) {
            return Err(fault);
        }
        if self.faults.len() < limits::MAX_FINDINGS {
            self.faults.push(fault);
        }
        Ok(())
    }

    /// Orders what was added, and leaves out chunks that are described in two ways or overlap in the uncompressed blob:
    /// two files would disagree about one cache slot.
    pub(super) fn finish(mut self) -> Result<ChunkIndex, RafsError> {
        let mut found = std::mem::take(&mut self.found);
        found.sort_unstable();
        let mut records = Vec::new();
        let mut starts = vec![0; self.blobs.len().saturating_add(1)];
        let mut last: Option<(u64, Record)> = None;
        let mut refused = None;
        for &(key, number) in &found {
            if refused == Some(key) {
                continue;
            }
            let at = self.source.offset(number);
            let record: Record = self.view.record_at(at)?;
            match &last {
                Some((last_key, known)) if *last_key == key => {
                    if !known.describes_same(&record) {
                        let reason = format!("blob {} chunk {} is described in two ways", record.blob, record.index);
                        self.leave_out(malformed("chunk record", at, reason))?;
                        // Neither of them: nobody knows which file is right.
                        records.pop();
                        set_end(&mut starts, key, records.len());
                        refused = Some(key);
                    }
                    continue;
                }
                // What is used as it is may overlap: the bytes are the same.
                Some((last_key, known)) if last_key >> 32 == key >> 32 && !self.is_external(&record) => {
                    let end = known.uncompressed_offset.get().saturating_add(known.uncompressed_bytes.get().into());
                    if record.uncompressed_offset.get() < end {
                        let reason = format!("blob {} chunk {} overlaps the chunk before", record.blob, record.index);
                        self.leave_out(malformed("chunk uncompressed offset", at, reason))?;
                        refused = Some(key);
                        continue;
                    }
                }
                _ => {}
            }
            records.push(number);
            set_end(&mut starts, key, records.len());
            last = Some((key, record));
        }
        // Blobs without chunks end where the blob before ends.
        let mut end = 0;
        for start in &mut starts {
            end = end.max(*start);
            *start = end;
        }
        records.shrink_to_fit();
        let Self { view, blobs, source, faults, .. } = self;
        Ok(ChunkIndex { view, blobs, source, starts, records, faults })
    }

    /// Whether the record is of an external blob of v5.
    fn is_external(&self, record: &Record) -> bool {
        let blob = usize::try_from(record.blob.get()).ok().and_then(|blob| self.blobs.get(blob));
        matches!(self.source, Source::V5(_)) && blob.is_some_and(|blob| blob.features & feature::EXTERNAL != 0)
    }
}

/// The chunks of the blob of `key` end at position `end`.
fn set_end(starts: &mut [usize], key: u64, end: usize) {
    let blob = usize::try_from(key >> 32).unwrap_or(usize::MAX);
    if let Some(place) = blob.checked_add(1).and_then(|next| starts.get_mut(next)) {
        *place = end;
    }
}

impl ChunkIndex {
    /// What is wrong with the chunks and files that were left out: what needs them cannot be read (v5).
    pub fn faults(&self) -> &[RafsError] {
        &self.faults
    }

    /// The complete facts of a chunk, where the bootstrap holds them (v5) or the blob is a tar (tarfs). `None` for other
    /// blobs of v6, which carry their own table ([`super::meta::BlobMeta`]), and for a chunk that the image does not refer
    /// to.
    ///
    /// # Errors
    /// A lost or malformed bootstrap.
    pub fn chunk(&self, blob: u32, chunk: u32) -> Result<Option<ChunkFacts>, RafsError> {
        match self.source {
            Source::V5(_) => match self.find(blob, chunk)? {
                Some((at, record)) => record.describe(at, &self.blobs).map(Some),
                None => Ok(None),
            },
            Source::V6 { .. } => Ok(None),
            Source::Grid => {
                let blob = usize::try_from(blob).ok().and_then(|blob| self.blobs.get(blob));
                Ok(blob.and_then(|blob| grid::facts(blob, chunk)))
            }
        }
    }

    /// The digest of a chunk; `None` when the image refers to no such chunk, or carries no digest of it.
    ///
    /// # Errors
    /// A lost or malformed bootstrap.
    pub fn digest(&self, blob: u32, chunk: u32) -> Result<Option<Digest>, RafsError> {
        match self.find(blob, chunk)? {
            Some((at, record)) => Ok(record.known_digest(record.blob_of(at, &self.blobs)?)),
            None => Ok(None),
        }
    }

    /// What a chunk must be, whoever describes where its stored bytes are; `None` as for [`ChunkIndex::digest`].
    ///
    /// # Errors
    /// A lost or malformed bootstrap.
    pub fn seal(&self, blob: u32, chunk: u32) -> Result<Option<Seal>, RafsError> {
        match self.find(blob, chunk)? {
            Some((at, record)) => record.seal(at, &self.blobs),
            None => Ok(None),
        }
    }

    /// Distinct chunks that the image refers to; of a grid, none is counted.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether the image refers to no chunk.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    fn find(&self, blob: u32, chunk: u32) -> Result<Option<(u64, Record)>, RafsError> {
        let Some(records) = self.of_blob(blob) else { return Ok(None) };
        let wanted = key(blob, chunk);
        // An image mostly refers to all chunks of a blob: then the chunk's index is its position.
        let guess = usize::try_from(chunk).unwrap_or(usize::MAX);
        if let Some(&number) = records.get(guess) {
            let (at, record) = self.record(number)?;
            if self.source.key(&record, at, &self.blobs)? == wanted {
                return Ok(Some((at, record)));
            }
        }
        let (mut low, mut high) = (0usize, records.len());
        while low < high {
            let middle = low.midpoint(high);
            let Some(&number) = records.get(middle) else { break };
            let (at, record) = self.record(number)?;
            match self.source.key(&record, at, &self.blobs)?.cmp(&wanted) {
                std::cmp::Ordering::Equal => return Ok(Some((at, record))),
                std::cmp::Ordering::Less => low = middle.saturating_add(1),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    fn of_blob(&self, blob: u32) -> Option<&[u32]> {
        let blob = usize::try_from(blob).ok()?;
        let (&start, &end) = (self.starts.get(blob)?, self.starts.get(blob.checked_add(1)?)?);
        self.records.get(start..end)
    }

    fn record(&self, number: u32) -> Result<(u64, Record), RafsError> {
        let at = self.source.offset(number);
        Ok((at, self.view.record_at(at)?))
    }
}
