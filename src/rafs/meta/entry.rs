//! Entries of the chunk information array (format, sections 6.3 and 6.4).

use crate::rafs::RafsError;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;
use crate::rafs::facts::feature;
use crate::rafs::malformed;

const COMPRESSED: u32 = 0x1;
const ZRAN: u32 = 0x2;
const BATCH: u32 = 0x4;
const ENCRYPTED: u32 = 0x8;
const HAS_CRC32C: u32 = 0x10;

/// `bits` of `value` from bit `shift`; at most 32 of them.
#[inline]
fn field<const SHIFT: u32, const BITS: u32>(value: u64) -> u32 {
    const { assert!(BITS <= 32 && SHIFT < 64) };
    let mask = const { ((1u64 << BITS).wrapping_sub(1)) as u32 };
    (value >> SHIFT) as u32 & mask
}

/// An entry of 16 bytes (section 6.3). Sizes are at most 2^24, so nothing overflows.
pub(super) fn decode_v1(plain: u64, stored: u64) -> ChunkFacts {
    let uncompressed_bytes = (field::<44, 20>(plain) | field::<8, 4>(plain) << 20).saturating_add(1);
    let compressed_bytes = (field::<44, 20>(stored) | field::<40, 4>(stored) << 20).saturating_add(1);
    ChunkFacts {
        compressed_offset: stored & 0xff_ffff_ffff,
        compressed_bytes,
        uncompressed_offset: plain & 0xfff_ffff_f000,
        uncompressed_bytes,
        coding: if compressed_bytes == uncompressed_bytes { Coding::Plain } else { Coding::Compressed },
        digest: None,
        crc32c: None,
    }
}

/// An entry of 24 bytes (section 6.4).
#[derive(Debug, Clone, Copy)]
pub(super) struct EntryV2 {
    /// What the entry states of its chunk, as if it had its stored bytes for itself.
    pub(super) facts: ChunkFacts,
    flags: u32,
    /// The context of a ZRan or batched chunk.
    pub(super) context: u32,
    /// Where such a chunk begins in what its context decodes to.
    pub(super) offset: u32,
}

impl EntryV2 {
    pub(super) fn decode(plain: u64, stored: u64, data: u64) -> Self {
        let flags = field::<56, 8>(plain);
        // The last word is a context for some, a checksum for others.
        let has_crc32c = flags & HAS_CRC32C != 0 && flags & (ZRAN | BATCH) == 0;
        let facts = ChunkFacts {
            compressed_offset: stored & 0xff_ffff_ffff,
            compressed_bytes: field::<40, 24>(stored),
            uncompressed_offset: u64::from(field::<0, 32>(plain)) << 12,
            uncompressed_bytes: field::<32, 24>(plain).saturating_add(1),
            coding: if flags & COMPRESSED == 0 { Coding::Plain } else { Coding::Compressed },
            digest: None,
            crc32c: has_crc32c.then_some(field::<0, 32>(data)),
        };
        Self { facts, flags, context: field::<32, 32>(data), offset: field::<0, 32>(data) }
    }

    /// Whether the chunk is a part of a stretch of a gzip file.
    pub(super) fn is_zran(&self) -> bool {
        self.flags & ZRAN != 0
    }

    /// Whether the chunk is a part of a batch.
    pub(super) fn is_batched(&self) -> bool {
        self.flags & BATCH != 0
    }

    /// Checks the flags against the features of the blob: ZRan and encryption are for all chunks or none, batches only
    /// where the blob has some (section 14, rule 21).
    pub(super) fn check_flags(&self, blob: &BlobFacts, at: u64) -> Result<(), RafsError> {
        let has = |bit: u32| blob.features & bit != 0;
        let is_right = self.flags & !(COMPRESSED | ZRAN | BATCH | ENCRYPTED | HAS_CRC32C) == 0
            && self.is_zran() == has(feature::ZRAN)
            && (!self.is_batched() || has(feature::BATCH))
            && (self.flags & ENCRYPTED != 0) == has(feature::ENCRYPTED);
        if is_right {
            return Ok(());
        }
        Err(malformed("CI flags", at, format!("{:#x} in a blob with features {:#x}", self.flags, blob.features)))
    }
}
