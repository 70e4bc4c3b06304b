//! RAFS on-disk formats: bytes to facts and read plans. Pure: no I/O, no threads, no clock, no unsafe.

pub mod chunks;
pub mod entries;
pub mod facts;
pub mod image;
pub mod inode;
pub mod meta;
pub mod seek;
mod v5;
mod v6;

/// What is wrong with an image, or with a question to it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RafsError {
    /// Bytes beyond the end of the metadata, or lost with its file.
    #[error("metadata cannot be read")]
    View(#[from] crate::sys::view::ViewError),
    /// A field that breaks the format's rules.
    #[error("{field} at offset {offset:#x}: {reason}")]
    Malformed {
        /// The field, as the format document names it.
        field: &'static str,
        /// Where it is.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A feature of the format that is not served yet.
    #[error("{0} is not supported yet")]
    Unsupported(&'static str),
    /// The metadata was inlined in a blob, and does not know that blob's id.
    #[error("the metadata comes from a blob whose id must be given (blob {index} has the placeholder id)")]
    PlaceholderBlobId {
        /// Position in the blob table.
        index: u32,
    },
    /// The inode is not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// The inode is not a symbolic link.
    #[error("not a symbolic link")]
    NotSymlink,
    /// The inode is not a regular file.
    #[error("not a regular file")]
    NotRegular,
}
