//! What the bootstrap says of chunks, found by (blob, chunk index).

use super::facts::ChunkFacts;
use super::facts::Digest;

/// Chunk records of a bootstrap by blob and chunk index: 4 bytes per chunk, built by one pass over the image on the
/// first cold read, and not at all when everything is cached.
#[derive(Debug)]
pub struct ChunkIndex {}

impl ChunkIndex {
    /// The complete facts of a chunk, where the bootstrap holds them (v5). `None` for v6, whose blobs carry their own
    /// table ([`super::meta::BlobMeta`]).
    ///
    /// # Errors
    /// A lost or malformed bootstrap.
    pub fn chunk(&self, blob: u32, chunk: u32) -> Result<Option<ChunkFacts>, super::RafsError> {
        let _ = (blob, chunk);
        todo!()
    }

    /// The digest of a chunk; `None` when the image refers to no such chunk, or carries no digest of it.
    ///
    /// # Errors
    /// A lost or malformed bootstrap.
    pub fn digest(&self, blob: u32, chunk: u32) -> Result<Option<Digest>, super::RafsError> {
        let _ = (blob, chunk);
        todo!()
    }
}
