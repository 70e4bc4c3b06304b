//! RAFS on-disk formats: bytes to facts and read plans. Pure: no I/O, no threads, no clock, no unsafe.

pub mod chunks;
pub mod facts;
pub mod meta;

/// What is wrong with an image.
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
}
