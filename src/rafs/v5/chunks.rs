//! Chunk arrays of v5 files (format, section 3.9).

use std::ops::Range;
use std::sync::Arc;

use super::V5;
use super::inode::Place;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::chunks::Builder;
use crate::rafs::chunks::ChunkIndex;
use crate::rafs::chunks::RECORD_BYTES;
use crate::rafs::chunks::Record;
use crate::rafs::chunks::Source;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::inode;
use crate::rafs::inode::Kind;
use crate::rafs::malformed;

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
        let facts = record.facts(at, &self.image.blobs)?;
        let chunk_bytes = u64::from(self.image.chunk_bytes);
        let expected = self.size.saturating_sub(number.saturating_mul(chunk_bytes)).min(chunk_bytes);
        if u64::from(facts.uncompressed_bytes) != expected {
            let reason = format!("{} instead of {expected} bytes", facts.uncompressed_bytes);
            return Err(malformed("chunk uncompressed size", at, reason));
        }
        Ok(FileChunk { blob: record.blob.get(), index: record.index.get(), facts })
    }
}

impl V5 {
    /// The chunks of the regular file at `place`.
    #[inline]
    pub(in crate::rafs) fn chunk_list(&self, place: &Place, size: u64) -> Result<ChunkList<'_>, RafsError> {
        Ok(ChunkList { image: self, start: self.chunks_offset(place)?, size })
    }

    /// Builds the index over all chunk records.
    pub(in crate::rafs) fn chunk_index(&self) -> Result<ChunkIndex, RafsError> {
        let mut builder = Builder::new(self.view.clone(), Arc::clone(&self.blobs), Source::V5);
        self.for_each_chunk(&mut |number, record| builder.add(number, record))?;
        builder.finish()
    }

    /// Sizes and counts of blobs for images without an extended blob table, which state none: those that the chunks
    /// imply (section 3.5). Only old images pay for this walk.
    pub(super) fn measure_blobs(&self) -> Result<Vec<BlobFacts>, RafsError> {
        let mut measured: Vec<BlobFacts> = self.blobs.to_vec();
        for blob in &mut measured {
            (blob.chunk_count, blob.uncompressed_bytes, blob.data_bytes) = (0, 0, 0);
        }
        self.for_each_chunk(&mut |number, record| {
            let facts = record.facts(u64::from(number).saturating_mul(super::UNIT), &self.blobs)?;
            // The index was checked just now.
            let Some(blob) = measured.get_mut(record.blob.get() as usize) else { return Ok(()) };
            let end = |offset: u64, bytes: u32| offset.saturating_add(bytes.into());
            blob.chunk_count = blob.chunk_count.max(record.index.get().saturating_add(1));
            blob.uncompressed_bytes =
                blob.uncompressed_bytes.max(end(facts.uncompressed_offset, facts.uncompressed_bytes));
            blob.data_bytes = blob.data_bytes.max(end(facts.compressed_offset, facts.compressed_bytes));
            blob.compressed_bytes = blob.data_bytes;
            Ok(())
        })?;
        Ok(measured)
    }

    /// Calls `each` with the number (offset / 8) and the content of every chunk record, those of later hard links
    /// excepted: a file is read through its first record.
    fn for_each_chunk(&self, each: &mut dyn FnMut(u32, &Record) -> Result<(), RafsError>) -> Result<(), RafsError> {
        // Records do not overlap, so there is room for this many. It bounds the work for inodes that share chunks.
        let mut left = self.view.len() / RECORD_BYTES;
        for index in 1..=self.entries {
            let (at, record) = self.record(index)?;
            if record.ino.get() != u64::from(index) || record.kind(at)? != Kind::Regular {
                continue;
            }
            let facts = self.facts(&record, at, index)?;
            let inode::Place::V5(place) = facts.place else { continue };
            for range in self.chunk_ranges(&place)? {
                left = left
                    .checked_sub(1)
                    .ok_or_else(|| malformed("chunk array", range.start, "overlaps that of another inode"))?;
                let record: Record = self.view.record_at(range.start)?;
                each(u32::try_from(range.start / super::UNIT).unwrap_or(u32::MAX), &record)?;
            }
        }
        Ok(())
    }

    /// The ranges of a file's chunk records, all inside the metadata.
    fn chunk_ranges(&self, place: &Place) -> Result<impl Iterator<Item = Range<u64>> + use<>, RafsError> {
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
