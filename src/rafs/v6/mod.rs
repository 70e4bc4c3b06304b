//! RAFS v6 (format, section 4).

pub(super) mod inode;
