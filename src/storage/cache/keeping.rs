//! How chunks are kept in the files of the cache directory (format, section 11).

use std::borrow::Cow;

use super::claims::Sharing;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Digest;
use crate::rafs::facts::feature;
use crate::storage::codec::xts::Xts;
use crate::storage::sync::Arc;

/// Chunks of aligned blobs begin at multiples of `1 << 12` (format, section 1.4).
const ALIGNED_SHIFT: u32 = 12;

/// What is encrypted as one piece.
const PAGE_BYTES: u32 = 1 << ALIGNED_SHIFT;

/// Every page has the same tweak.
const TWEAK: [u8; 16] = [0; 16];

/// The key of chunks whose digest is none (both halves are equal).
const KEY_WITHOUT_DIGEST: [u8; 32] = [
    0xac, 0xed, 0x14, 0x69, 0x94, 0x23, 0x1e, 0xca, 0x44, 0x8c, 0xed, 0x2f, 0x6b, 0x40, 0x0c, 0x00, //
    0xfd, 0xbb, 0x3f, 0xac, 0xdd, 0xc7, 0xd9, 0xee, 0x83, 0xf6, 0x5c, 0xd9, 0x3c, 0xaa, 0x28, 0x7c,
];

/// How chunks are kept.
#[derive(Debug, Clone)]
pub enum Keeping {
    /// Decoded, in `<id>.blob.data`, each at its offset in the uncompressed blob.
    Plain,
    /// As the blob stores them, in `<id>.blob.raw`, each at its offset in the blob.
    Stored,
    /// As [`Keeping::Plain`], each encrypted page by page, the last page padded with zeros.
    Encrypted(PageKeys),
}

/// The keys of an encrypted cache.
#[derive(Clone)]
pub struct PageKeys(Keys);

#[derive(Clone)]
enum Keys {
    One { xts: Arc<Xts>, identity: [u8; 16] },
    Digests,
}

impl PageKeys {
    /// One key for all chunks.
    pub fn one(key: &[u8; 32]) -> Self {
        let hash = blake3::hash(key);
        let identity = hash.as_bytes().first_chunk().copied().unwrap_or_default();
        Self(Keys::One { xts: Arc::new(Xts::new(key)), identity })
    }

    /// The digest of each chunk, as far as it is known.
    pub fn digests() -> Self {
        Self(Keys::Digests)
    }

    /// The one key that upstream uses for chunks whose digests it does not look at.
    pub fn without_digests() -> Self {
        Self::one(&KEY_WITHOUT_DIGEST)
    }

    fn for_chunk(&self, digest: Option<&Digest>) -> Arc<Xts> {
        match &self.0 {
            Keys::One { xts, .. } => Arc::clone(xts),
            Keys::Digests => {
                let digest = digest.filter(|digest| digest[..16] != digest[16..]);
                Arc::new(Xts::new(digest.unwrap_or(&KEY_WITHOUT_DIGEST)))
            }
        }
    }
}

impl std::fmt::Debug for PageKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageKeys(..)")
    }
}

/// A chunk in its two forms, for a cache to keep one of them.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    /// As the blob stores it: the bytes of its whole unit, or nothing if they were written with another chunk of it.
    /// `None`: not at hand.
    pub stored: Option<&'a [u8]>,
    /// Decoded and verified.
    pub plain: &'a [u8],
}

impl Keeping {
    /// Whether reads are served from a map of the data file.
    pub fn is_mapped(&self) -> bool {
        matches!(self, Self::Plain)
    }

    /// Whether chunks are kept as the blob stores them.
    pub fn is_stored(&self) -> bool {
        matches!(self, Self::Stored)
    }

    /// Whether it can be done with `blob`: encrypted pages must not overlap. v5 does not say whether its chunks are
    /// aligned, but the size of the blob tells; a chunk that is not, all the same, has no place.
    pub(super) fn fits(&self, blob: &BlobFacts) -> bool {
        let may_be_aligned = blob.features & feature::ALIGNED != 0 || blob.meta.is_none();
        let is_whole = blob.uncompressed_bytes.is_multiple_of(PAGE_BYTES.into());
        !matches!(self, Self::Encrypted(_)) || may_be_aligned && is_whole
    }

    /// Name of the data file of blob `id`.
    pub fn data_name(&self, id: &str) -> String {
        match self {
            Self::Plain | Self::Encrypted(_) => format!("{id}.blob.data"),
            Self::Stored => format!("{id}.blob.raw"),
        }
    }

    /// Name of our side file. The chunk map has one name for all; this one tells which data file it speaks of.
    pub(super) fn side_name(&self, id: &str) -> String {
        match self {
            Self::Plain | Self::Encrypted(_) => format!("{id}.nydus_state"),
            Self::Stored => format!("{id}.raw.nydus_state"),
        }
    }

    /// Length of the data file.
    pub fn data_bytes(&self, blob: &BlobFacts) -> u64 {
        match self {
            Self::Plain | Self::Encrypted(_) => blob.uncompressed_bytes,
            Self::Stored => blob.data_bytes,
        }
    }

    /// Offset and length of a chunk in the data file.
    pub(super) fn place(&self, facts: &ChunkFacts) -> (u64, u32) {
        match self {
            Self::Plain => (facts.uncompressed_offset, facts.uncompressed_bytes),
            Self::Stored => (facts.compressed_offset, facts.compressed_bytes),
            Self::Encrypted(_) => (facts.uncompressed_offset, facts.uncompressed_bytes.next_multiple_of(PAGE_BYTES)),
        }
    }

    /// Chunks begin at multiples of `1 << shift`.
    pub(super) fn shift(&self, blob: &BlobFacts) -> u32 {
        match self {
            Self::Encrypted(_) => ALIGNED_SHIFT,
            Self::Plain if blob.features & feature::ALIGNED != 0 => ALIGNED_SHIFT,
            Self::Plain | Self::Stored => 0,
        }
    }

    /// Whether chunks may lie at the same place.
    pub(super) fn sharing(&self) -> Sharing {
        if self.is_stored() { Sharing::Units } else { Sharing::None }
    }

    /// What tells it from other ways to keep chunks in the same file.
    pub(super) fn identity(&self) -> [u8; 16] {
        match self {
            Self::Plain => [0; 16],
            Self::Stored => *b"stored bytes\0\0\0\0",
            Self::Encrypted(PageKeys(Keys::Digests)) => *b"key: digests\0\0\0\0",
            Self::Encrypted(PageKeys(Keys::One { identity, .. })) => *identity,
        }
    }

    /// The bytes that are written for a chunk; `None`: they are not at hand.
    pub(super) fn pick<'a>(&self, facts: &ChunkFacts, content: Content<'a>) -> Option<Cow<'a, [u8]>> {
        match self {
            Self::Plain => Some(Cow::Borrowed(content.plain)),
            Self::Stored => content.stored.map(Cow::Borrowed),
            Self::Encrypted(keys) => {
                let mut pages = content.plain.to_vec();
                pages.resize(pages.len().next_multiple_of(PAGE_BYTES as usize), 0);
                let xts = keys.for_chunk(facts.digest.as_ref());
                let mut each = pages.chunks_exact_mut(PAGE_BYTES as usize);
                each.all(|page| xts.encrypt(&TWEAK, page).is_ok()).then_some(Cow::Owned(pages))
            }
        }
    }

    /// The plain bytes of a chunk whose kept bytes are `loaded`; `None`: it is kept as stored, or too few are there.
    pub(super) fn open(&self, facts: &ChunkFacts, loaded: &[u8]) -> Option<Vec<u8>> {
        let mut plain = loaded.to_vec();
        match self {
            Self::Stored => return None,
            Self::Plain => {}
            Self::Encrypted(keys) => {
                let xts = keys.for_chunk(facts.digest.as_ref());
                let mut each = plain.chunks_mut(PAGE_BYTES as usize);
                each.all(|page| xts.decrypt(&TWEAK, page).is_ok()).then_some(())?;
            }
        }
        let len = facts.uncompressed_bytes as usize;
        (plain.len() >= len).then(|| {
            plain.truncate(len);
            plain
        })
    }
}
