//! The metadata file: superblocks, tables, inodes and directory blocks (format, section 4).

use std::path::PathBuf;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::BuildError;
use super::Options;
use super::Target;
use super::blob;
use super::blob::Blob;
use super::blob::StoredChunk;
use super::codec::compressor_number;
use super::codec::digester_number;
use super::dirent;
use super::layout;
use super::layout::Layout;
use super::output::Output;
use super::tree::Body;
use super::tree::Node;
use super::tree::NodeIndex;
use super::tree::Tree;
use super::wire;
use super::wire::BLOCK;
use super::wire::SLOT;
use super::xattr;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;

/// Blob index of the only blob.
const BLOB: u32 = 0;

/// Superblock flags (format, section 1.3).
mod flag {
    pub const COMPRESSION_NONE: u64 = 0x1;
    pub const COMPRESSION_LZ4: u64 = 0x2;
    pub const HASH_BLAKE3: u64 = 0x4;
    pub const HASH_SHA256: u64 = 0x8;
    pub const EXPLICIT_UID_GID: u64 = 0x10;
    pub const HAS_XATTR: u64 = 0x20;
    pub const COMPRESSION_GZIP: u64 = 0x40;
    pub const COMPRESSION_ZSTD: u64 = 0x80;
    pub const INLINED_CHUNK_DIGEST: u64 = 0x100;
    pub const ENCRYPTION_NONE: u64 = 0x0100_0000;
}

/// Chunk table flags (format, section 3.9).
mod chunk_flag {
    pub const COMPRESSED: u32 = 0x1;
    pub const HAS_CRC32C: u32 = 0x10;
}

/// Bit of the chunk format that says "chunk addresses are records of 8 bytes".
const CHUNK_ADDRESSES: u32 = 0x20;

/// Writes the metadata of `tree`, whose data is in `blob`; where it is then.
pub fn write(tree: &Tree, blob: Option<&Blob>, options: &Options) -> Result<PathBuf, BuildError> {
    let output = Output::create(&options.bootstrap)?;
    let named = match &options.bootstrap {
        Target::File(path) | Target::Directory(path) => path.as_path(),
    };
    let layout = layout::place(tree, named)?;
    let writer = Writer { tree, blob, options, map: Map::new(&layout, blob), layout };
    writer.write_tables(&output)?;
    writer.write_inodes(&output)?;
    writer.write_chunk_table(&output)?;
    output.file().set_len(writer.map.file_bytes).map_err(BuildError::io("write", output.path()))?;
    output.finish(None)
}

/// Offsets of the parts in the file.
struct Map {
    blob_table: u64,
    meta: u64,
    chunk_table: u64,
    chunk_table_bytes: u64,
    file_bytes: u64,
}

impl Map {
    fn new(layout: &Layout, blob: Option<&Blob>) -> Self {
        let blobs = u64::from(blob.is_some());
        let blob_table = (wire::DEVICES_AT + blobs * size_of::<wire::Device>() as u64).next_multiple_of(BLOCK);
        let meta = match blob {
            Some(_) => (blob_table + size_of::<wire::BlobEntry>() as u64).next_multiple_of(BLOCK),
            None => 0, // the first block of the meta area is never used, so the superblock may lie in it
        };
        let chunk_table = (meta + layout.end).next_multiple_of(BLOCK);
        let chunks = blob.map_or(0, |blob| blob.chunks.len() as u64);
        let chunk_table_bytes = chunks * size_of::<wire::ChunkEntry>() as u64;
        let file_bytes = (chunk_table + chunk_table_bytes).next_multiple_of(BLOCK);
        Self { blob_table, meta, chunk_table, chunk_table_bytes, file_bytes }
    }
}

struct Writer<'a> {
    tree: &'a Tree,
    blob: Option<&'a Blob>,
    options: &'a Options,
    layout: Layout,
    map: Map,
}

impl Writer<'_> {
    fn write_tables(&self, output: &Output) -> Result<(), BuildError> {
        output.write_at(self.superblock().as_bytes(), wire::SUPERBLOCK_AT)?;
        let extended_at = wire::SUPERBLOCK_AT + size_of::<wire::Superblock>() as u64;
        output.write_at(self.extended_superblock().as_bytes(), extended_at)?;
        let Some(blob) = self.blob else { return Ok(()) };
        output.write_at(device(blob, self.map.file_bytes).as_bytes(), wire::DEVICES_AT)?;
        output.write_at(blob_entry(blob, self.options).as_bytes(), self.map.blob_table)
    }

    fn superblock(&self) -> wire::Superblock {
        wire::Superblock {
            inodes: U64::new(self.tree.nodes.len() as u64),
            blocks: U32::new(self.blob.map_or(0, device_blocks)),
            meta_blkaddr: U32::new((self.map.meta / BLOCK) as u32), // the second block, or the first
            extra_devices: U16::new(u16::from(self.blob.is_some())),
            ..wire::Superblock::new()
        }
    }

    fn extended_superblock(&self) -> wire::ExtendedSuperblock {
        let blob_table_bytes = self.blob.map_or(0, |_| size_of::<wire::BlobEntry>() as u32);
        wire::ExtendedSuperblock {
            flags: U64::new(self.flags()),
            blob_table_offset: U64::new(self.map.blob_table),
            blob_table_bytes: U32::new(blob_table_bytes),
            chunk_bytes: U32::new(self.options.chunk_bytes.get()),
            chunk_table_offset: U64::new(self.map.chunk_table),
            chunk_table_bytes: U64::new(self.map.chunk_table_bytes),
            prefetch_table_offset: U64::ZERO,
            prefetch_table_bytes: U32::ZERO,
            padding: U32::ZERO,
            reserved: [0; 200],
        }
    }

    fn flags(&self) -> u64 {
        let compression = match self.options.compressor {
            Compressor::None => flag::COMPRESSION_NONE,
            Compressor::Lz4Block => flag::COMPRESSION_LZ4,
            Compressor::Gzip => flag::COMPRESSION_GZIP,
            Compressor::Zstd => flag::COMPRESSION_ZSTD,
        };
        let hash = match self.options.digester {
            Digester::Blake3 => flag::HASH_BLAKE3,
            Digester::Sha256 => flag::HASH_SHA256,
        };
        let mut flags = compression | hash | flag::EXPLICIT_UID_GID | flag::ENCRYPTION_NONE;
        if self.tree.has_xattrs() {
            flags |= flag::HAS_XATTR;
        }
        if self.blob.is_none() {
            // It is said of every blob, and true of none of them.
            flags |= flag::INLINED_CHUNK_DIGEST;
        }
        flags
    }

    fn write_inodes(&self, output: &Output) -> Result<(), BuildError> {
        let mut record = Vec::new();
        for (index, node) in (0..).zip(&self.tree.nodes) {
            if matches!(node.body, Body::Link(_)) {
                continue;
            }
            record.clear();
            record.extend_from_slice(self.inode(index, node).as_bytes());
            record.extend_from_slice(&node.xattrs);
            match &node.body {
                Body::Directory(_) => {
                    let entries = dirent::entries(self.tree, index);
                    let data = dirent::encode(&entries, |node| self.nid(node));
                    self.append_data(output, index, &data, &mut record)?;
                }
                Body::Symlink(target) => self.append_data(output, index, target, &mut record)?,
                Body::Regular { chunks, .. } => self.append_chunk_addresses(chunks, &mut record),
                Body::Device(_) | Body::Special | Body::Link(_) => {}
            }
            output.write_at(&record, self.map.meta + self.layout.places[index as usize].offset)?;
        }
        Ok(())
    }

    fn nid(&self, node: NodeIndex) -> u64 {
        self.layout.places[self.tree.inode(node) as usize].offset / SLOT
    }

    fn inode(&self, index: NodeIndex, node: &Node) -> wire::Inode {
        let place = &self.layout.places[index as usize];
        let (bytes, union) = match &node.body {
            Body::Directory(_) | Body::Symlink(_) => {
                (place.data_bytes, ((self.map.meta + place.data_offset) / BLOCK) as u32)
            }
            Body::Regular { identity, chunks } => (identity.bytes, self.chunk_format(identity.bytes, chunks)),
            Body::Device(number) => (0, *number),
            Body::Special | Body::Link(_) => (0, 0),
        };
        wire::Inode {
            format: U16::new(1 | (place.layout as u16) << 1), // extended form
            xattr_count: U16::new(xattr::inode_count(&node.xattrs)),
            mode: U16::new(node.mode),
            reserved: U16::ZERO,
            bytes: U64::new(bytes),
            union: U32::new(union),
            ino: U32::new(index + 1),
            uid: U32::new(node.uid),
            gid: U32::new(node.gid),
            mtime: U64::new(node.mtime as u64), // two's complement
            mtime_ns: U32::new(node.mtime_ns),
            nlink: U32::new(node.nlink),
            reserved2: [0; 16],
        }
    }

    /// The chunk size that the kernel is told: a file that lies in one piece may be a single chunk to it.
    fn chunk_format(&self, bytes: u64, chunks: &[u32]) -> u32 {
        let step = u64::from(self.options.chunk_bytes.get());
        let is_contiguous = self.stored(chunks).is_some_and(|stored| {
            stored.zip(0..).all(|(chunk, i)| chunk.uncompressed_offset == self.first_offset(chunks) + i * step)
        });
        let kernel_chunk = match chunks.len() > 1 && is_contiguous {
            true => bytes.next_power_of_two(),
            false => step,
        };
        CHUNK_ADDRESSES | (kernel_chunk.ilog2() - BLOCK.ilog2())
    }

    fn first_offset(&self, chunks: &[u32]) -> u64 {
        self.stored(chunks).and_then(|mut stored| stored.next()).map_or(0, |chunk| chunk.uncompressed_offset)
    }

    fn stored<'b>(&'b self, chunks: &'b [u32]) -> Option<impl Iterator<Item = &'b StoredChunk>> {
        let blob = self.blob?;
        Some(chunks.iter().map(|&index| &blob.chunks[index as usize]))
    }

    fn append_chunk_addresses(&self, chunks: &[u32], record: &mut Vec<u8>) {
        record.resize(record.len().next_multiple_of(size_of::<wire::ChunkAddress>()), 0);
        for (&index, chunk) in chunks.iter().zip(self.stored(chunks).into_iter().flatten()) {
            let address = wire::ChunkAddress {
                index_low: U16::new(index as u16),                             // the low half
                device: BLOB as u8 + 1,                                        // 0 is the bootstrap itself
                index_high: (index >> 16) as u8,                               // below 2^24
                blkaddr: U32::new((chunk.uncompressed_offset / BLOCK) as u32), // below 2^44
            };
            record.extend_from_slice(address.as_bytes());
        }
    }

    /// Writes the full blocks of an inode's data and appends the rest to its record.
    fn append_data(
        &self,
        output: &Output,
        index: NodeIndex,
        data: &[u8],
        record: &mut Vec<u8>,
    ) -> Result<(), BuildError> {
        let place = &self.layout.places[index as usize];
        let on_blocks = match place.layout {
            layout::DataLayout::Inline => data.len() - data.len() % BLOCK as usize,
            _ => data.len(),
        };
        let (blocks, tail) = data.split_at(on_blocks);
        record.extend_from_slice(tail);
        output.write_at(blocks, self.map.meta + place.data_offset)
    }

    fn write_chunk_table(&self, output: &Output) -> Result<(), BuildError> {
        let Some(blob) = self.blob else { return Ok(()) };
        let mut sorted: Vec<(u32, &StoredChunk)> = (0..).zip(&blob.chunks).collect();
        sorted.sort_unstable_by_key(|(index, chunk)| (chunk.digest, *index));
        let mut table = Vec::new();
        let mut at = self.map.chunk_table;
        for some in sorted.chunks(TABLE_BATCH) {
            table.clear();
            some.iter().for_each(|(index, chunk)| table.extend_from_slice(chunk_entry(*index, chunk).as_bytes()));
            output.write_at(&table, at)?;
            at += table.len() as u64;
        }
        Ok(())
    }
}

/// Entries of the chunk table that are written at once.
const TABLE_BATCH: usize = 8192;

fn device_blocks(blob: &Blob) -> u32 {
    (blob.built.uncompressed_bytes / BLOCK) as u32 // less than 2^32: the last chunk of a full blob would need index 2^32
}

fn device(blob: &Blob, bootstrap_bytes: u64) -> wire::Device {
    /// On a flattened disk devices begin at multiples of this.
    const DEVICE_ALIGN: u64 = 512 << 10;
    wire::Device {
        blob_id: blob_id(blob),
        blocks: U32::new(device_blocks(blob)),
        mapped_blkaddr: U32::new((bootstrap_bytes.next_multiple_of(DEVICE_ALIGN) / BLOCK) as u32),
        reserved: [0; 56],
    }
}

fn blob_entry(blob: &Blob, options: &Options) -> wire::BlobEntry {
    wire::BlobEntry {
        blob_id: blob_id(blob),
        index: U32::new(BLOB),
        chunk_bytes: U32::new(options.chunk_bytes.get()),
        chunk_count: U32::new(blob.built.chunks),
        compressor: U32::new(compressor_number(options.compressor)),
        digester: U32::new(digester_number(options.digester)),
        features: U32::new(blob::FEATURES),
        compressed_bytes: U64::new(blob.built.bytes),
        uncompressed_bytes: U64::new(blob.built.uncompressed_bytes),
        toc_bytes: U32::ZERO,
        ci_compressor: U32::new(compressor_number(blob.ci_compressor)),
        ci_offset: U64::new(blob.ci_offset),
        ci_compressed_bytes: U64::new(blob.ci_compressed_bytes),
        ci_uncompressed_bytes: U64::new(blob.ci_uncompressed_bytes),
        toc_digest: [0; 32],
        rafs_blob_digest: [0; 32],
        rafs_blob_bytes: U64::ZERO,
        iv: U64::ZERO,
        cipher: U32::ZERO,
        reserved: [0; 36],
    }
}

/// The id as the tables have it: 64 hex digits fill the field.
fn blob_id(blob: &Blob) -> [u8; 64] {
    let mut id = [0; 64];
    id.copy_from_slice(blob.built.id.as_bytes());
    id
}

fn chunk_entry(index: u32, chunk: &StoredChunk) -> wire::ChunkEntry {
    let mut flags = chunk_flag::HAS_CRC32C;
    if chunk.compressed_bytes < chunk.uncompressed_bytes {
        flags |= chunk_flag::COMPRESSED;
    }
    wire::ChunkEntry {
        digest: chunk.digest,
        blob: U32::new(BLOB),
        flags: U32::new(flags),
        compressed_bytes: U32::new(chunk.compressed_bytes),
        uncompressed_bytes: U32::new(chunk.uncompressed_bytes),
        compressed_offset: U64::new(chunk.compressed_offset),
        uncompressed_offset: U64::new(chunk.uncompressed_offset),
        file_offset: U64::new(chunk.file_offset),
        index: U32::new(index),
        crc32c: U32::new(chunk.crc32c),
    }
}
