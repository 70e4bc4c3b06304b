//! Chunk indexes of v6 files, and the chunk table (format, sections 4.8 and 4.10).

use std::sync::Arc;

use super::V6;
use super::inode::CHUNK_INDEX_BYTES;
use crate::rafs::RafsError;
use crate::rafs::chunks::Builder;
use crate::rafs::chunks::ChunkIndex;
use crate::rafs::chunks::RECORD_BYTES;
use crate::rafs::chunks::Record;
use crate::rafs::chunks::Source;
use crate::rafs::malformed;
use crate::rafs::place::V6Place;

/// What a chunk index states.
pub(in crate::rafs) struct FileChunk {
    pub(in crate::rafs) blob: u32,
    /// Index in the blob; without a meaning in tarfs mode.
    pub(in crate::rafs) index: u32,
    /// Offset in the uncompressed blob.
    pub(in crate::rafs) offset: u64,
}

impl V6 {
    /// Chunk `number` of the regular file of `size` bytes at `place` (section 14, rules 9 and 20). The blob's own
    /// array, which states the offset too, is not needed.
    #[inline]
    pub(in crate::rafs) fn file_chunk(&self, place: &V6Place, size: u64, number: u64) -> Result<FileChunk, RafsError> {
        let at = number
            .checked_mul(CHUNK_INDEX_BYTES)
            .and_then(|offset| place.body.checked_add(offset))
            .ok_or_else(|| malformed("chunk index", place.body, "reaches beyond the end of the metadata"))?;
        let [low, high, device, top, address @ ..]: [u8; CHUNK_INDEX_BYTES as usize] = self.view.array_at(at)?;
        let index = u32::from_le_bytes([low, high, top, 0]);
        let offset = self.blocks.start(u32::from_le_bytes(address));
        let blob = device.checked_sub(1).and_then(|blob| self.blobs.get(usize::from(blob)));
        let Some(blob) = blob else {
            return Err(malformed("chunk device number", at, format!("{device} of {} blobs", self.blobs.len())));
        };
        // In a tar only the offset means something.
        if index >= blob.chunk_count && !self.flags.is_tarfs {
            return Err(malformed("chunk index", at, format!("{index} of {} chunks", blob.chunk_count)));
        }
        let chunk_bytes = u64::from(self.chunk_bytes);
        let bytes = size.saturating_sub(number.saturating_mul(chunk_bytes)).min(chunk_bytes);
        if offset.saturating_add(bytes) > blob.uncompressed_bytes {
            let reason = format!("{bytes} bytes at {offset:#x}, blob ends at {}", blob.uncompressed_bytes);
            return Err(malformed("chunk address", at, reason));
        }
        Ok(FileChunk { blob: blob.index, index, offset })
    }

    /// Builds the index over the chunk table; that of tarfs means nothing (section 4.10).
    pub(in crate::rafs) fn chunk_index(&self) -> Result<ChunkIndex, RafsError> {
        if self.flags.is_tarfs {
            return Builder::new(self.view.clone(), Arc::clone(&self.blobs), Source::Grid).finish();
        }
        let source = Source::V6 { table: self.chunk_table };
        let mut builder = Builder::new(self.view.clone(), Arc::clone(&self.blobs), source);
        for number in 0..u32::try_from(self.chunk_records).unwrap_or(u32::MAX) {
            let offset = u64::from(number).saturating_mul(RECORD_BYTES);
            let record: Record = self.view.record_at(self.chunk_table.saturating_add(offset))?;
            builder.add(number, &record)?;
        }
        builder.finish()
    }
}
