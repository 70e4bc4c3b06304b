//! The versions of the format, and the numbers that tell them apart (format, sections 2, 3.2 and 4.2).

/// Format version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// RAFS v5.
    V5,
    /// RAFS v6, an EROFS image.
    V6,
}

/// First four bytes of RAFS v5, and of older versions.
pub(super) const V5_MAGIC: u32 = 0x5241_4653;
/// The next four of v5.
pub(super) const V5_VERSION: u32 = 0x500;

/// Where the EROFS superblock is.
pub(super) const SUPERBLOCK: u64 = 1024;
/// Its magic number.
pub(super) const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
/// Where the compatible features are.
pub(super) const FEATURES: u64 = SUPERBLOCK + 8;
/// The compatible feature that tells RAFS from plain EROFS.
pub(super) const RAFS_FEATURE: u32 = 0x4000_0000;
