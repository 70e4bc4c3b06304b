//! Plain facts that images state about their blobs and chunks: what `rafs` produces and `storage` consumes.

use std::ops::Range;

/// How chunks, or a blob's metadata, are compressed (format, section 1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compressor {
    /// Stored as it is.
    None,
    /// A raw LZ4 block, without frame or length.
    Lz4Block,
    /// A gzip member per chunk (legacy), or the label of ZRan blobs.
    Gzip,
    /// One zstd frame.
    Zstd,
}

/// How chunks are digested (format, section 1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digester {
    /// Plain 32-byte BLAKE3.
    Blake3,
    /// SHA-256.
    Sha256,
}

/// A digest of 32 bytes.
pub type Digest = [u8; 32];

/// Which file holds the chunk information array of a v6 blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetaHolder {
    /// The blob itself.
    Blob,
    /// A file of its own, with this id: the data is an unchanged OCI layer.
    Other(String),
    /// The file that the bootstrap was taken from.
    Bootstrap,
}

/// How all chunks of a blob, its chunk information array and that array's header are encrypted: AES-128-XTS, one data
/// unit each, all with the same tweak (format, section 8).
#[derive(Clone, PartialEq, Eq)]
pub struct Cipher {
    /// Two AES-128 keys.
    pub key: [u8; 32],
    /// The tweak.
    pub iv: [u8; 16],
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cipher(..)")
    }
}

/// Where a v6 blob keeps its chunk information array (format, section 6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaLocation {
    /// Which file it is in.
    pub holder: MetaHolder,
    /// Offset in that file.
    pub offset: u64,
    /// Stored bytes of the array; the 4096-byte header follows directly.
    pub compressed_bytes: u64,
    /// Bytes of the array when decoded.
    pub uncompressed_bytes: u64,
    /// How the array is compressed.
    pub compressor: Compressor,
}

/// What the bootstrap says of one blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobFacts {
    /// Position in the blob table.
    pub index: u32,
    /// Blob id: file name and part of URLs. Checked: 1 to 255 characters of `[0-9A-Za-z._-]`, no leading dot.
    pub id: String,
    /// Feature bits (format, section 1.4), unknown compatible bits removed.
    pub features: u32,
    /// Chunks in the blob, referenced or not. Images of v5 without an extended blob table state none: there it counts the
    /// referenced ones.
    pub chunk_count: u32,
    /// Largest uncompressed size of a chunk.
    pub chunk_bytes: u32,
    /// Size of the uncompressed blob, which is the size of its cache file.
    pub uncompressed_bytes: u64,
    /// Size of the blob file as stated.
    pub compressed_bytes: u64,
    /// End of the chunk data in the blob file (format, section 4.5): every chunk's stored range lies below it.
    pub data_bytes: u64,
    /// How chunks that are flagged compressed are compressed.
    pub compressor: Compressor,
    /// How chunks are digested.
    pub digester: Digester,
    /// How its pieces are encrypted, if they are; v6 only.
    pub cipher: Option<Cipher>,
    /// The chunk information array; v6 only.
    pub meta: Option<MetaLocation>,
    /// Bytes at the start of the blob worth fetching first (v5 `--prefetch-policy blob`); 0 = none.
    pub prefetch_bytes: u32,
}

/// Feature bits of [`BlobFacts::features`] (format, section 1.4).
#[expect(missing_docs, reason = "the table in the format document says what each bit means")]
pub mod feature {
    pub const ALIGNED: u32 = 0x1;
    pub const INLINED_FS_META: u32 = 0x2;
    pub const CHUNK_INFO_V2: u32 = 0x4;
    pub const ZRAN: u32 = 0x8;
    pub const SEPARATE: u32 = 0x10;
    pub const INLINED_CHUNK_DIGEST: u32 = 0x20;
    pub const TARFS: u32 = 0x40;
    pub const BATCH: u32 = 0x80;
    pub const ENCRYPTED: u32 = 0x100;
    pub const IS_CHUNKDICT_GENERATED: u32 = 0x200;
    pub const EXTERNAL: u32 = 0x800;
    pub const HAS_TAR_HEADER: u32 = 0x1000_0000;
    pub const HAS_TOC: u32 = 0x2000_0000;
    pub const CAP_TAR_TOC: u32 = 0x4000_0000;
}

/// How stored bytes become the plain bytes of a chunk. In encrypted blobs this is after decryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// They are the chunk.
    Plain,
    /// They are the chunk, compressed with the blob's compressor.
    Compressed,
    /// They are several small chunks, compressed as one piece unless their length is `plain_bytes` already (format, section 6.5).
    Batch {
        /// Bytes of the whole batch when decoded.
        plain_bytes: u32,
        /// Where the chunk begins in them.
        offset: u32,
    },
    /// They are a stretch of a gzip file, decoded with a context of the blob's table (format, section 7).
    Zran {
        /// Number of the context.
        context: u32,
        /// Where the chunk begins in what the context decodes to.
        offset: u32,
    },
}

/// Everything needed to fetch, decode and verify one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkFacts {
    /// Offset of the stored bytes in the blob file: those of the whole batch or context, where [`Coding`] names one.
    pub compressed_offset: u64,
    /// Stored bytes.
    pub compressed_bytes: u32,
    /// Offset in the uncompressed blob, and so in the cache file.
    pub uncompressed_offset: u64,
    /// Bytes when decoded.
    pub uncompressed_bytes: u32,
    /// How the stored bytes are decoded.
    pub coding: Coding,
    /// Digest of the decoded bytes, where the image carries one.
    pub digest: Option<Digest>,
    /// CRC-32C of the decoded bytes, where the image carries one.
    pub crc32c: Option<u32>,
}

/// Where decoding of a gzip file can begin, and how: a context of a ZRan blob (format, section 7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZranContext {
    /// Bytes of the gzip file that it decodes.
    pub stored: Range<u64>,
    /// Bytes that they decode to.
    pub plain_bytes: u32,
    /// The last byte before them, and how many of its upper bits, 0 to 7, belong to the stream.
    pub prime: (u8, u8),
    /// What was decoded before, as far as it is referred to; at most 32 KiB.
    pub dictionary: Vec<u8>,
}

impl ChunkFacts {
    /// Where its stored bytes are in the blob file: those of its whole unit.
    #[inline]
    pub fn stored(&self) -> Range<u64> {
        self.compressed_offset..self.compressed_offset.saturating_add(u64::from(self.compressed_bytes))
    }

    /// Where the chunk begins in what its stored bytes decode to.
    #[inline]
    pub fn offset_in_unit(&self) -> u32 {
        match self.coding {
            Coding::Plain | Coding::Compressed => 0,
            Coding::Batch { offset, .. } | Coding::Zran { offset, .. } => offset,
        }
    }
}

/// Bytes of an encrypted piece that was shorter than one AES block, and so padded (format, section 8).
pub const PADDED_BYTES: u32 = 18;

/// Stored bytes of a piece of `plain` bytes that is encrypted and not compressed.
pub fn encrypted_bytes(plain: u32) -> u32 {
    if plain < 16 { PADDED_BYTES } else { plain }
}

/// What the bootstrap says of the content of a chunk and of its place in the uncompressed blob. The table that a v6 blob
/// carries itself is not covered by any digest: it must agree with this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// Digest of the decoded bytes.
    pub digest: Digest,
    /// Offset in the uncompressed blob.
    pub uncompressed_offset: u64,
    /// Bytes when decoded.
    pub uncompressed_bytes: u32,
}

impl Seal {
    /// Whether `facts` give the chunk the same place. One written to another place than readers look for it would pass its
    /// digest all the same, and overwrite others.
    pub fn agrees_with(&self, facts: &ChunkFacts) -> bool {
        (self.uncompressed_offset, self.uncompressed_bytes) == (facts.uncompressed_offset, facts.uncompressed_bytes)
    }
}

/// A piece of one chunk that a read wants: the unit of a read plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the blob in the blob table.
    pub blob: u32,
    /// Index of the chunk in the blob.
    pub chunk: u32,
    /// Offset of the piece in the uncompressed blob: the chunk's own offset plus where the piece begins in it.
    pub offset: u64,
    /// Bytes of the piece, never 0.
    pub len: u32,
}
