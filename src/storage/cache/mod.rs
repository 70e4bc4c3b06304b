//! `blobcache`: the files of one blob in the cache directory, and what of them may be believed.
//!
//! File names and the chunk map are upstream's (format, section 11), so that a directory can be taken over in both
//! directions. Our own state is in one side file per blob ([`side`]). A [`Generation`] is one opening of all of them;
//! when files were lost or removed under it, a new generation replaces it and the old one ends with its last user.
//!
//! Order of publishing a chunk: the claim of its place ([`claims`]), data by `pwrite`, the bit of the chunk map, the mark
//! "written" of the claim, the process's own [`extents`]. A process that dies in between leaves a chunk that is missing
//! or a hint, never a wrong one.
//!
//! Nothing in the directory is believed beyond its owner (format, rule 23): regular files only, no symlinks, sizes and
//! magics checked.
//!
//! A file that shrinks under its map is noticed by the SIGBUS guard and by [`crate::sys::view`].

mod author;
pub mod chunk_map;
pub mod claims;
pub mod extents;
mod file;
pub mod generation;
pub mod keeping;
mod setup;
pub mod side;

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

pub use file::Directory;
pub use file::TEMPORARY;
pub use generation::Generation;
pub use keeping::Keeping;
pub use keeping::PageKeys;
pub use setup::Index;
pub use setup::Setup;

impl CacheError {
    /// Whether it is a full disk, one that fails, or another image, rather than a file or a right that somebody has to see
    /// to: the blob is served without a cache.
    pub fn is_survivable(&self) -> bool {
        if matches!(self, Self::Contradicted { .. }) {
            return true;
        }
        let Self::File { source, .. } = self else { return false };
        let errno = source.raw_os_error().map(Errno::from_raw_os_error);
        matches!(errno, Some(Errno::NOSPC | Errno::DQUOT | Errno::IO))
    }
}

/// Why the cache files of a blob cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The system refuses an operation.
    #[error("cache file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A symlink, directory, device or the like.
    #[error("cache file {} is not a regular file; remove it", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// Longer than the blob: another blob's, or another image's idea of this one.
    #[error("cache file {} has {actual} bytes, more than the {expected} of the blob; remove it", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its size.
        actual: u64,
        /// The size the image states.
        expected: u64,
    },
    /// The chunk map is for another number of chunks.
    #[error("chunk map {} has {actual} bytes, more than the {expected} for the chunks of the blob; remove it", path.display())]
    MapSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        actual: u64,
        /// The size for the number of chunks the image states.
        expected: u64,
    },
    /// Another process holds the side file's setup lock for too long.
    #[error("cache file {} is being set up by another process and does not become free", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// Another image is served from the same data file, and lays its chunks out otherwise.
    #[error("cache file {} is in use by an image that describes the same blob otherwise", path.display())]
    Contradicted {
        /// The file.
        path: PathBuf,
    },
    /// A cache that is to be encrypted page by page cannot hold chunks that share pages.
    #[error("the cache of blob {id} cannot be encrypted, since its chunks are not aligned; turn encryption off")]
    NotAligned {
        /// Blob id.
        id: String,
    },
    /// Larger than what can be addressed.
    #[error("blob {id} has {bytes} bytes uncompressed, more than can be cached")]
    TooLarge {
        /// Blob id.
        id: String,
        /// What the image states.
        bytes: u64,
    },
}
