//! The data blob: chunks back to back, then the chunk information array and its header (format, sections 5 and 6).
//!
//! Equal chunks are stored once. Uncompressed offsets are multiples of 4096, so that the uncompressed blob is a device
//! that EROFS can read.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::BufWriter;
use std::io::Write;
use std::path::Path;

use sha2::Digest as _;
use sha2::Sha256;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::BuildError;
use super::BuiltBlob;
use super::Options;
use super::codec;
use super::codec::Encoder;
use super::codec::compressor_number;
use super::output::Output;
use super::wire::BLOB_META_MAGIC;
use super::wire::BLOCK;
use super::wire::BlobMetaHeader;
use crate::limits::MAX_BLOB_BYTES;
use crate::limits::MAX_BLOB_FILE_BYTES;
use crate::limits::MAX_CHUNKS_PER_BLOB;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digest;
use crate::rafs::facts::feature;

/// Features of every blob made here.
pub const FEATURES: u32 = feature::ALIGNED | feature::CAP_TAR_TOC;

/// A chunk that was stored.
#[derive(Debug, Clone)]
pub struct StoredChunk {
    /// Digest of its content.
    pub digest: Digest,
    /// CRC-32C of its content.
    pub crc32c: u32,
    /// Where its stored form begins in the blob.
    pub compressed_offset: u64,
    /// Bytes of its stored form; fewer than of its content if, and only if, it is compressed.
    pub compressed_bytes: u32,
    /// Where its content begins in the uncompressed blob.
    pub uncompressed_offset: u64,
    /// Bytes of its content.
    pub uncompressed_bytes: u32,
    /// Where its content begins in the file that used it last.
    pub file_offset: u64,
}

/// A complete blob: what the bootstrap says of it.
#[derive(Debug)]
pub struct Blob {
    /// What the caller is told.
    pub built: BuiltBlob,
    /// Its chunks by index.
    pub chunks: Vec<StoredChunk>,
    /// Where the chunk information array begins, which is the end of the chunk data.
    pub ci_offset: u64,
    /// Stored bytes of the array.
    pub ci_compressed_bytes: u64,
    /// Plain bytes of the array.
    pub ci_uncompressed_bytes: u64,
    /// How the array is stored.
    pub ci_compressor: Compressor,
}

/// A blob being written.
pub struct BlobWriter {
    output: Output,
    stream: BufWriter<File>,
    sha256: Sha256,
    written: u64,
    uncompressed_end: u64,
    options: Options,
    encoder: Encoder,
    chunks: Vec<StoredChunk>,
    /// Chunks by content: a digest and a length to an index.
    known: HashMap<(Digest, u32), u32>,
}

impl BlobWriter {
    /// A blob without chunks, as a hidden file beside its place.
    pub fn create(options: &Options) -> Result<Self, BuildError> {
        let output = Output::create(&options.blob)?;
        let file = output.file().try_clone().map_err(BuildError::io("open", output.path()))?;
        let encoder = Encoder::new(options.compressor).map_err(BuildError::io("compress into", output.path()))?;
        Ok(Self {
            stream: BufWriter::with_capacity(1 << 20, file),
            output,
            sha256: Sha256::new(),
            written: 0,
            uncompressed_end: 0,
            options: options.clone(),
            encoder,
            chunks: Vec::new(),
            known: HashMap::new(),
        })
    }

    /// Stores a chunk unless an equal one is there; its index either way. `path` and `file_offset` say where it is from.
    pub fn store(&mut self, plain: &[u8], path: &Path, file_offset: u64) -> Result<u32, BuildError> {
        let digest = codec::digest(self.options.digester, plain);
        let uncompressed_bytes = plain.len() as u32; // at most 16 MiB
        let index = self.chunks.len() as u32; // bounded below
        match self.known.entry((digest, uncompressed_bytes)) {
            Entry::Occupied(known) => {
                let index = *known.get();
                self.chunks[index as usize].file_offset = file_offset;
                return Ok(index);
            }
            Entry::Vacant(place) => place.insert(index),
        };
        let end = self.uncompressed_end + u64::from(uncompressed_bytes);
        if index >= MAX_CHUNKS_PER_BLOB || end.next_multiple_of(BLOCK) >= MAX_BLOB_BYTES {
            let what = format!("chunk {index} that ends at {end:#x} of the uncompressed data");
            let limit = format!("{MAX_CHUNKS_PER_BLOB} chunks of {MAX_BLOB_BYTES:#x} bytes, try larger chunks");
            return Err(BuildError::format(path, what, limit));
        }

        let compress_error = |source| BuildError::Compress { path: path.to_path_buf(), source };
        let stored = self.encoder.compress(plain).map_err(compress_error)?.unwrap_or(plain);
        if self.written + stored.len() as u64 > MAX_BLOB_FILE_BYTES {
            let limit = format!("{MAX_BLOB_FILE_BYTES:#x} bytes of compressed data");
            return Err(BuildError::format(path, "no room in the blob", limit));
        }
        self.chunks.push(StoredChunk {
            digest,
            crc32c: crc32c::crc32c(plain),
            compressed_offset: self.written,
            compressed_bytes: stored.len() as u32,
            uncompressed_offset: self.uncompressed_end,
            uncompressed_bytes,
            file_offset,
        });
        self.sha256.update(stored);
        self.written += stored.len() as u64;
        self.uncompressed_end = end.next_multiple_of(BLOCK);
        self.stream.write_all(stored).map_err(BuildError::io("write", self.output.path()))?;
        Ok(index)
    }

    /// Writes what follows the chunks and gives the blob its name. `None`, and no file, if there are no chunks.
    pub fn finish(mut self) -> Result<Option<Blob>, BuildError> {
        if self.chunks.is_empty() {
            return Ok(None);
        }
        let plain: Vec<u8> = self.chunks.iter().flat_map(ci_entry).collect();
        let ci_offset = self.written;
        let compressed = self.encoder.compress(&plain).map_err(BuildError::io("compress into", self.output.path()))?;
        let (ci_compressor, stored) = match compressed {
            Some(stored) => (self.options.compressor, stored),
            None => (Compressor::None, &plain[..]),
        };
        let header = BlobMetaHeader {
            magic: U32::new(BLOB_META_MAGIC),
            features: U32::new(FEATURES),
            ci_compressor: U32::new(compressor_number(ci_compressor)),
            entries: U32::new(self.chunks.len() as u32),
            ci_offset: U64::new(ci_offset),
            ci_compressed_bytes: U64::new(stored.len() as u64),
            ci_uncompressed_bytes: U64::new(plain.len() as u64),
            context_offset: U64::ZERO,
            context_bytes: U64::ZERO,
            contexts: U32::ZERO,
            reserved: [0; 4032],
            end_magic: U32::new(BLOB_META_MAGIC),
        };
        for part in [stored, header.as_bytes()] {
            self.sha256.update(part);
            self.written += part.len() as u64;
            self.stream.write_all(part).map_err(BuildError::io("write", self.output.path()))?;
        }
        self.stream.flush().map_err(BuildError::io("write", self.output.path()))?;

        let ci_compressed_bytes = stored.len() as u64;
        let sha256: [u8; 32] = self.sha256.finalize().into();
        let built = BuiltBlob {
            id: hex::encode(sha256),
            path: self.output.finish(Some(sha256))?,
            bytes: self.written,
            uncompressed_bytes: self.uncompressed_end,
            chunks: self.chunks.len() as u32,
        };
        let ci_uncompressed_bytes = plain.len() as u64;
        let chunks = self.chunks;
        Ok(Some(Blob { built, chunks, ci_offset, ci_compressed_bytes, ci_uncompressed_bytes, ci_compressor }))
    }
}

/// Entry of the chunk information array, first version: both sizes are stored less one, their low 20 bits at the top
/// of a word and their upper 4 bits where the offset leaves room (format, section 6.3).
fn ci_entry(chunk: &StoredChunk) -> [u8; 16] {
    let uncompressed = u64::from(chunk.uncompressed_bytes - 1);
    let compressed = u64::from(chunk.compressed_bytes - 1);
    let u = (uncompressed & 0xF_FFFF) << 44 | chunk.uncompressed_offset | (uncompressed >> 20) << 8;
    let c = (compressed & 0xF_FFFF) << 44 | (compressed >> 20) << 40 | chunk.compressed_offset;
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&u.to_le_bytes());
    entry[8..].copy_from_slice(&c.to_le_bytes());
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ci_entry_of_the_documented_chunks_gives_the_documented_bytes() {
        let check = |uncompressed: (u64, u32), compressed: (u64, u32), expected: &str| {
            let chunk = StoredChunk {
                digest: [0; 32],
                crc32c: 0,
                compressed_offset: compressed.0,
                compressed_bytes: compressed.1,
                uncompressed_offset: uncompressed.0,
                uncompressed_bytes: uncompressed.1,
                file_offset: 0,
            };
            assert_eq!(hex::encode(ci_entry(&chunk)), expected);
        };
        check((0, 1), (0, 1), "00000000000000000000000000000000");
        check((163840, 2), (9554, 2), "00800200001000005225000000100000");
        check((25878528, 10485760), (2176691, 10485760), "00e98a0100f0ffffb336210000f9ffff");
        check((46911488, 10485760), (15854542, 33913), "00d9cb0200f0ffffceebf10000804708");
    }
}
