//! Inodes of v6 (format, section 4.6).

/// Where the parts of an inode are.
#[derive(Debug, Clone, Copy)]
pub(in crate::rafs) struct Place {}
