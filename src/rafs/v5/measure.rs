//! Images without an extended blob table, from old builders, whose chunk records may lack an index too. What the table
//! would state is found by one pass over the chunk records when such an image is opened.

use std::sync::Arc;

use super::V5;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::chunks::Numbering;
use crate::rafs::chunks::Ranks;
use crate::rafs::facts::BlobFacts;
use crate::rafs::malformed;

impl V5 {
    /// Sizes and counts of blobs that no table states: those that the chunks imply (section 3.5). Chunks are numbered by
    /// their place in the uncompressed blob. Costs 8 bytes per distinct chunk as long as the image is open.
    pub(super) fn measure_blobs(&self) -> Result<(Vec<BlobFacts>, Numbering), RafsError> {
        let mut measured: Vec<BlobFacts> = self.blobs.to_vec();
        for blob in &mut measured {
            (blob.chunk_count, blob.uncompressed_bytes, blob.data_bytes) = (0, 0, 0);
        }
        let mut offsets: Vec<Vec<u64>> = vec![Vec::new(); measured.len()];
        self.for_each_chunk(&mut |chunk| {
            let (number, record) = chunk?;
            let facts = record.describe(u64::from(number).saturating_mul(super::UNIT), &self.blobs)?;
            // The index was checked just now.
            let index = usize::try_from(record.blob.get()).unwrap_or(usize::MAX);
            let (Some(blob), Some(offsets)) = (measured.get_mut(index), offsets.get_mut(index)) else { return Ok(()) };
            let end = |offset: u64, bytes: u32| offset.saturating_add(bytes.into());
            blob.uncompressed_bytes =
                blob.uncompressed_bytes.max(end(facts.uncompressed_offset, facts.uncompressed_bytes));
            blob.data_bytes = blob.data_bytes.max(end(facts.compressed_offset, facts.compressed_bytes));
            blob.compressed_bytes = blob.data_bytes;
            // Chunks mostly come in the order of their places; those that come again need no room.
            if offsets.last() != Some(&facts.uncompressed_offset) {
                offsets.push(facts.uncompressed_offset);
            }
            Ok(())
        })?;
        for (blob, offsets) in measured.iter_mut().zip(&mut offsets) {
            offsets.sort_unstable();
            offsets.dedup();
            offsets.shrink_to_fit();
            let count = u32::try_from(offsets.len()).ok().filter(|&count| count <= limits::MAX_CHUNKS_PER_BLOB);
            blob.chunk_count = count
                .ok_or_else(|| malformed("blob chunk count", 0, format!("{} of blob {}", offsets.len(), blob.id)))?;
        }
        Ok((measured, Numbering::Ranked(Arc::new(Ranks::new(offsets)))))
    }
}
