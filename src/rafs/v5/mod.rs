//! RAFS v5 (format, section 3).

pub(super) mod inode;
