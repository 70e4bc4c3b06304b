//! Blocks of a v6 image: 4096 bytes, or 512 in tarfs mode (format, section 4).

/// The block size, as its exponent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocks {
    bits: u8,
}

impl Blocks {
    /// 4096 bytes.
    pub(super) const PAGES: Self = Self { bits: 12 };
    /// 512 bytes, those of a tar.
    pub(super) const SECTORS: Self = Self { bits: 9 };

    pub(super) fn bits(self) -> u8 {
        self.bits
    }

    /// Bytes of a block.
    #[inline]
    pub(super) fn bytes(self) -> u64 {
        1u64.wrapping_shl(self.bits.into())
    }

    /// Where block `number` of a device or of the metadata starts: 32 bits of blocks, so nothing is lost.
    #[inline]
    pub(super) fn start(self, number: u32) -> u64 {
        u64::from(number).wrapping_shl(self.bits.into())
    }

    /// The block that holds the byte at `offset`.
    #[inline]
    pub(super) fn holding(self, offset: u64) -> u64 {
        offset.wrapping_shr(self.bits.into())
    }

    /// Bytes of `size` behind its last full block.
    #[inline]
    pub(super) fn rest(self, size: u64) -> u64 {
        size & self.bytes().wrapping_sub(1)
    }

    /// Blocks that `size` bytes need.
    #[inline]
    pub(super) fn count(self, size: u64) -> u64 {
        self.holding(size).saturating_add(u64::from(self.rest(size) != 0))
    }
}
