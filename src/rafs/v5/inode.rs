//! Inode records of v5 (format, section 3.6).

/// Where the parts of an inode record are.
#[derive(Debug, Clone, Copy)]
pub(in crate::rafs) struct Place {}
