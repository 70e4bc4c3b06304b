//! Blob metadata (chunk information array, "CI") of v6 blobs: format, section 6.

use super::facts::BlobFacts;
use super::facts::ChunkFacts;
use crate::sys::view::View;

/// Bytes of the header behind the array.
pub const META_HEADER_BYTES: u64 = 4096;

/// The decoded chunk information array of one blob, used in place.
#[derive(Debug, Clone)]
pub struct BlobMeta {}

impl BlobMeta {
    /// Opens the content of a `<id>.blob.meta` cache file: the plain array padded to 4096 bytes, then the header
    /// (format, section 11). Checks the header against the blob table and the array against section 14, rule 21.
    ///
    /// # Errors
    /// What disagrees, with its field and offset.
    pub fn open(view: View, blob: &BlobFacts) -> Result<Self, super::RafsError> {
        let _ = (view, blob);
        todo!()
    }

    /// Entries.
    pub fn count(&self) -> u32 {
        todo!()
    }

    /// Facts of entry `chunk`, without its digest (which is in the bootstrap).
    ///
    /// # Errors
    /// An index out of range, a lost map, an entry that breaks the rules.
    pub fn chunk(&self, chunk: u32) -> Result<ChunkFacts, super::RafsError> {
        let _ = chunk;
        todo!()
    }
}
