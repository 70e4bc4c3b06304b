//! What can go wrong with a store and with a read.

use rustix::io::Errno;

use crate::rafs::RafsError;
use crate::storage::backend::BackendError;
use crate::storage::cache::CacheError;
use crate::storage::codec::CodecError;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The cache directory cannot be used.
    #[error("the blob cache cannot be used, check its directory")]
    Cache(#[from] CacheError),
}

/// Why a read has no bytes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The plan names a blob that is not in the blob table.
    #[error("the image has no blob {0}")]
    NoBlob(u32),
    /// The plan names a chunk that does not exist, or bytes that are not part of it.
    #[error("chunk {chunk} of blob {blob} does not hold the bytes that the file refers to")]
    NotInChunk {
        /// Index of the blob.
        blob: u32,
        /// Index of the chunk.
        chunk: u32,
    },
    /// The chunk's description is malformed.
    #[error("chunk {chunk} of blob {blob}: {reason}")]
    BadChunk {
        /// Index of the blob.
        blob: u32,
        /// Index of the chunk.
        chunk: u32,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The chunk table of a blob, or the bootstrap's, cannot be used.
    #[error("the chunk table of blob {blob} cannot be used")]
    Table {
        /// Index of the blob.
        blob: u32,
        /// Why.
        source: RafsError,
    },
    /// The chunk table of a blob cannot be decoded.
    #[error("the chunk table of blob {blob}, at offset {offset:#x} of its file, cannot be decoded")]
    TableData {
        /// Index of the blob.
        blob: u32,
        /// Where the table is stored.
        offset: u64,
        /// Why.
        source: CodecError,
    },
    /// The backend has no bytes.
    #[error("blob {blob} cannot be fetched")]
    Backend {
        /// Index of the blob.
        blob: u32,
        /// Why.
        source: BackendError,
    },
    /// The backend's bytes are not those of the chunk.
    #[error("chunk {chunk} of blob {blob}, stored at offset {offset:#x}, is damaged")]
    Damaged {
        /// Index of the blob.
        blob: u32,
        /// Index of the chunk.
        chunk: u32,
        /// Where its stored bytes begin, or those of the piece that it is a part of.
        offset: u64,
        /// How it shows.
        source: CodecError,
    },
    /// The demand deadline passed.
    #[error("no answer within the demand deadline")]
    Deadline,
    /// The cache files changed while the read was served.
    #[error("the cache files of blob {0} were lost")]
    Lost(u32),
    /// The chunk table of a blob was found damaged in the cache, and is loaded anew.
    #[error("the cached chunk table of blob {0} is damaged")]
    Outdated(u32),
    /// The work was dropped: the store is shutting down, or a job of it failed.
    #[error("the store is shutting down")]
    Shutdown,
}

impl ReadError {
    /// Whether the same read finds other files or another table when it begins anew.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Outdated(_))
    }

    /// The error number for a reader. Whatever the cause, a guest sees an I/O error, as from a disk.
    pub fn errno(&self) -> Errno {
        Errno::IO
    }
}
