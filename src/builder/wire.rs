//! The structures of a v6 bootstrap and of blob metadata as they lie on disk (format, sections 4 and 6).
//!
//! Plain little-endian records without padding; what a field means is said in the format document under the same name.

use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

/// Bytes of a block: the unit of addresses.
pub const BLOCK: u64 = 4096;
/// Bytes of a slot: the unit of inode addresses.
pub const SLOT: u64 = 32;
/// Where the superblock is.
pub const SUPERBLOCK_AT: u64 = 1024;
/// Where the device table is, directly behind both superblocks.
pub const DEVICES_AT: u64 = 1408;
/// Inode number of the root.
pub const ROOT_NID: u16 = 128;
/// First and last word of the blob metadata header.
pub const BLOB_META_MAGIC: u32 = 0xB10B_B10B;

/// EROFS superblock, 128 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct Superblock {
    pub magic: U32,
    pub checksum: U32,
    pub feature_compat: U32,
    pub block_bits: u8,
    pub extension_slots: u8,
    pub root_nid: U16,
    pub inodes: U64,
    pub build_time: U64,
    pub build_time_ns: U32,
    pub blocks: U32,
    pub meta_blkaddr: U32,
    pub xattr_blkaddr: U32,
    pub uuid: [u8; 16],
    pub volume_name: [u8; 16],
    pub feature_incompat: U32,
    pub union: U16,
    pub extra_devices: U16,
    pub device_table_slot: U16,
    pub reserved: [u8; 38],
}

impl Superblock {
    /// The fixed values of RAFS, all counts and addresses 0.
    pub fn new() -> Self {
        Self {
            magic: U32::new(0xE0F5_E1E2),
            checksum: U32::ZERO,
            feature_compat: U32::new(0x4000_0000), // RAFS
            block_bits: 12,
            extension_slots: 0,
            root_nid: U16::new(ROOT_NID),
            inodes: U64::ZERO,
            build_time: U64::ZERO,
            build_time_ns: U32::ZERO,
            blocks: U32::ZERO,
            meta_blkaddr: U32::ZERO,
            xattr_blkaddr: U32::ZERO,
            uuid: [0; 16],
            volume_name: [0; 16],
            feature_incompat: U32::new(0xC), // chunked files, device table
            union: U16::ZERO,
            extra_devices: U16::ZERO,
            device_table_slot: U16::new(11),
            reserved: [0; 38],
        }
    }
}

/// Extended superblock, 256 bytes, directly behind the superblock.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct ExtendedSuperblock {
    pub flags: U64,
    pub blob_table_offset: U64,
    pub blob_table_bytes: U32,
    pub chunk_bytes: U32,
    pub chunk_table_offset: U64,
    pub chunk_table_bytes: U64,
    pub prefetch_table_offset: U64,
    pub prefetch_table_bytes: U32,
    pub padding: U32,
    pub reserved: [u8; 200],
}

/// Device table entry, 128 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct Device {
    pub blob_id: [u8; 64],
    pub blocks: U32,
    pub mapped_blkaddr: U32,
    pub reserved: [u8; 56],
}

/// Blob table entry, 256 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct BlobEntry {
    pub blob_id: [u8; 64],
    pub index: U32,
    pub chunk_bytes: U32,
    pub chunk_count: U32,
    pub compressor: U32,
    pub digester: U32,
    pub features: U32,
    pub compressed_bytes: U64,
    pub uncompressed_bytes: U64,
    pub toc_bytes: U32,
    pub ci_compressor: U32,
    pub ci_offset: U64,
    pub ci_compressed_bytes: U64,
    pub ci_uncompressed_bytes: U64,
    pub toc_digest: [u8; 32],
    pub rafs_blob_digest: [u8; 32],
    pub rafs_blob_bytes: U64,
    pub iv: U64,
    pub cipher: U32,
    pub reserved: [u8; 36],
}

/// Extended inode, 64 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct Inode {
    pub format: U16,
    pub xattr_count: U16,
    pub mode: U16,
    pub reserved: U16,
    pub bytes: U64,
    pub union: U32,
    pub ino: U32,
    pub uid: U32,
    pub gid: U32,
    pub mtime: U64,
    pub mtime_ns: U32,
    pub nlink: U32,
    pub reserved2: [u8; 16],
}

/// Directory entry without its name, 12 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct Dirent {
    pub nid: U64,
    pub name_offset: U16,
    pub file_type: u8,
    pub reserved: u8,
}

/// Chunk address in the body of a regular file, 8 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct ChunkAddress {
    pub index_low: U16,
    pub device: u8,
    pub index_high: u8,
    pub blkaddr: U32,
}

/// Chunk table entry, 80 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct ChunkEntry {
    pub digest: [u8; 32],
    pub blob: U32,
    pub flags: U32,
    pub compressed_bytes: U32,
    pub uncompressed_bytes: U32,
    pub compressed_offset: U64,
    pub uncompressed_offset: U64,
    pub file_offset: U64,
    pub index: U32,
    pub crc32c: U32,
}

/// Blob metadata header, 4096 bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct BlobMetaHeader {
    pub magic: U32,
    pub features: U32,
    pub ci_compressor: U32,
    pub entries: U32,
    pub ci_offset: U64,
    pub ci_compressed_bytes: U64,
    pub ci_uncompressed_bytes: U64,
    pub context_offset: U64,
    pub context_bytes: U64,
    pub contexts: U32,
    pub reserved: [u8; 4032],
    pub end_magic: U32,
}

const _: () = assert!(size_of::<Superblock>() == 128 && size_of::<ExtendedSuperblock>() == 256);
const _: () = assert!(size_of::<Device>() == 128 && size_of::<BlobEntry>() == 256);
const _: () = assert!(size_of::<Inode>() == 64 && size_of::<Dirent>() == 12 && size_of::<ChunkAddress>() == 8);
const _: () = assert!(size_of::<ChunkEntry>() == 80 && size_of::<BlobMetaHeader>() == 4096);
