//! Chunk arrays of v5 files (format, section 3.9).

use std::ops::Range;
use std::sync::Arc;

use super::V5;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::blob;
use crate::rafs::chunks::Builder;
use crate::rafs::chunks::ChunkIndex;
use crate::rafs::chunks::RECORD_BYTES;
use crate::rafs::chunks::Record;
use crate::rafs::chunks::Source;
use crate::rafs::count_chunks;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::feature;
use crate::rafs::inode::Kind;
use crate::rafs::malformed;
use crate::rafs::place::Place;
use crate::rafs::place::V5Place;

/// What a chunk of a file is: its record and what that states.
pub(in crate::rafs) struct FileChunk {
    pub(in crate::rafs) blob: u32,
    pub(in crate::rafs) index: u32,
    pub(in crate::rafs) facts: ChunkFacts,
}

/// The chunk array of one file.
#[derive(Clone, Copy)]
pub(in crate::rafs) struct ChunkList<'a> {
    image: &'a V5,
    start: u64,
    size: u64,
    chunk_bytes: u32,
}

impl ChunkList<'_> {
    /// Chunk `number` of the file, which must have the length that its position implies (section 14, rule 9).
    #[inline]
    pub(in crate::rafs) fn get(&self, number: u64) -> Result<FileChunk, RafsError> {
        let at = number
            .checked_mul(RECORD_BYTES)
            .and_then(|offset| self.start.checked_add(offset))
            .ok_or_else(|| malformed("chunk record", self.start, "reaches beyond the end of the metadata"))?;
        let record: Record = self.image.view.record_at(at)?;
        let (index, facts) = record.facts(at, &self.image.blobs, &self.image.numbering)?;
        let chunk_bytes = u64::from(self.chunk_bytes);
        let expected = self.size.saturating_sub(number.saturating_mul(chunk_bytes)).min(chunk_bytes);
        if u64::from(facts.uncompressed_bytes) != expected {
            let reason = format!("{} instead of {expected} bytes", facts.uncompressed_bytes);
            return Err(malformed("chunk uncompressed size", at, reason));
        }
        Ok(FileChunk { blob: record.blob.get(), index, facts })
    }
}

/// What is called with each chunk record, or with what is wrong with a file.
pub(super) type EachChunk<'a> = dyn FnMut(Result<(u32, Record), RafsError>) -> Result<(), RafsError> + 'a;

impl V5 {
    /// The chunks of the regular file at `place`.
    #[inline]
    pub(in crate::rafs) fn chunk_list(&self, place: &V5Place, size: u64) -> Result<ChunkList<'_>, RafsError> {
        let start = self.chunks_offset(place)?;
        Ok(ChunkList { image: self, start, size, chunk_bytes: place.chunk_bytes })
    }

    /// Bytes of each chunk but the last of the regular file of `size` bytes at `place`: a power of two, with which the
    /// file has as many chunks as it states (section 14, rule 8). It is the image's, but for files in external blobs:
    /// those have their own (the first chunk tells), since chunks there are made by what keeps the blob.
    #[inline]
    pub(super) fn file_chunk_bytes(&self, place: &V5Place, size: u64) -> Result<u32, RafsError> {
        let count = u64::from(place.child_count);
        let mut chunk_bytes = self.chunk_bytes;
        if self.has_external && count != 0 {
            let at = self.chunks_offset(place)?;
            let first: Record = self.view.record_at(at)?;
            let facts = first.describe(at, &self.blobs)?;
            let is_external = |blob: &BlobFacts| blob.features & feature::EXTERNAL != 0;
            if self.blobs.get(usize::try_from(first.blob.get()).unwrap_or(usize::MAX)).is_some_and(is_external) {
                // A chunk that is alone has any length.
                let alone = facts.uncompressed_bytes.next_power_of_two().max(self.chunk_bytes);
                let stated = if count == 1 { alone } else { facts.uncompressed_bytes };
                chunk_bytes = blob::chunk_bytes(stated, at)?;
            }
        }
        if count_chunks(size, chunk_bytes) == count {
            return Ok(chunk_bytes);
        }
        Err(malformed("inode child count", place.record, format!("{count} chunks for {size} bytes")))
    }

    /// Builds the index over all chunk records. Files and chunks that are malformed are left out: nobody can read them,
    /// and all others must not suffer.
    pub(in crate::rafs) fn chunk_index(&self) -> Result<ChunkIndex, RafsError> {
        let mut builder = Builder::new(self.view.clone(), Arc::clone(&self.blobs), Source::V5(self.numbering.clone()));
        self.for_each_chunk(&mut |chunk| {
            let added = chunk.and_then(|(number, record)| builder.add(number, &record));
            added.or_else(|fault| builder.leave_out(fault))
        })?;
        builder.finish()
    }

    /// Calls `each` with the number (offset / 8) and the content of every chunk record, those of later hard links
    /// excepted: a file is read through its first record. Instead of the chunks of a malformed file it gets what is wrong
    /// with it.
    pub(super) fn for_each_chunk(&self, each: &mut EachChunk<'_>) -> Result<(), RafsError> {
        // Records do not overlap, so there is room for this many. It bounds the work for inodes that share chunks.
        let mut left = self.view.len() / RECORD_BYTES;
        for index in 1..=self.entries {
            let ranges = match self.first_chunk_ranges(index) {
                Ok(Some(ranges)) => ranges,
                Ok(None) => continue,
                Err(fault) => {
                    each(Err(fault))?;
                    continue;
                }
            };
            for range in ranges {
                left = left
                    .checked_sub(1)
                    .ok_or_else(|| malformed("chunk array", range.start, "overlaps that of another inode"))?;
                let record: Record = self.view.record_at(range.start)?;
                each(Ok((u32::try_from(range.start / super::UNIT).unwrap_or(u32::MAX), record)))?;
            }
        }
        Ok(())
    }

    /// The ranges of the chunk records of the record with the index `index`; `None` if that is no regular file, or a later
    /// record of one.
    fn first_chunk_ranges(&self, index: u32) -> Result<Option<impl Iterator<Item = Range<u64>> + use<>>, RafsError> {
        let (at, record) = self.record(index)?;
        if record.ino.get() != u64::from(index) || record.kind(at)? != Kind::Regular {
            return Ok(None);
        }
        let facts = self.facts(&record, at, index)?;
        let Place::V5(place) = facts.place else { return Ok(None) };
        self.chunk_ranges(&place).map(Some)
    }

    /// The ranges of a file's chunk records, all inside the metadata.
    fn chunk_ranges(&self, place: &V5Place) -> Result<impl Iterator<Item = Range<u64>> + use<>, RafsError> {
        let start = self.chunks_offset(place)?;
        let bytes = u64::from(place.child_count).saturating_mul(RECORD_BYTES);
        let array = crate::rafs::part("chunk array", start, bytes, self.view.len())?;
        Ok((0..u64::from(place.child_count)).map(move |number| {
            let at = array.start.saturating_add(number.saturating_mul(RECORD_BYTES));
            at..at.saturating_add(RECORD_BYTES)
        }))
    }
}

/// The 29-bit record numbers of the inode table, and so all of a v5 image, fit the index's numbers.
const _: () = assert!(limits::MAX_BOOTSTRAP_BYTES / super::UNIT <= u32::MAX as u64);
