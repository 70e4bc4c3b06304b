//! Compression and digests of chunks, as the format wants them (format, sections 1.1 and 5.1).

use std::io;

use sha2::Digest as _;
use sha2::Sha256;

use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digest;
use crate::rafs::facts::Digester;

/// Level 3, zstd's own default and upstream's.
const ZSTD_LEVEL: i32 = 3;

/// Compresses pieces, through a buffer and a context that it keeps.
pub struct Encoder {
    compressor: Compressor,
    zstd: zstd::bulk::Compressor<'static>,
    buffer: Vec<u8>,
}

impl Encoder {
    /// An encoder for `compressor`.
    pub fn new(compressor: Compressor) -> io::Result<Self> {
        Ok(Self { compressor, zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL)?, buffer: Vec::new() })
    }

    /// The compressed form of `plain`; `None` when it is to be stored as it is, since it would not become smaller.
    pub fn compress(&mut self, plain: &[u8]) -> io::Result<Option<&[u8]>> {
        let bound = match self.compressor {
            Compressor::None => return Ok(None),
            Compressor::Gzip => return Err(io::ErrorKind::Unsupported.into()),
            Compressor::Lz4Block => lz4::block::compress_bound(plain.len())?,
            Compressor::Zstd => zstd::zstd_safe::compress_bound(plain.len()),
        };
        if self.buffer.len() < bound {
            self.buffer.resize(bound, 0);
        }
        let len = match self.compressor {
            Compressor::Zstd => self.zstd.compress_to_buffer(plain, &mut self.buffer[..])?,
            _ => lz4::block::compress_to_buffer(plain, None, false, &mut self.buffer)?,
        };
        Ok((len < plain.len()).then(|| &self.buffer[..len]))
    }
}

/// The digest of a chunk.
pub fn digest(digester: Digester, plain: &[u8]) -> Digest {
    match digester {
        Digester::Blake3 => *blake3::hash(plain).as_bytes(),
        Digester::Sha256 => Sha256::digest(plain).into(),
    }
}

/// The number of a compressor on disk.
pub fn compressor_number(compressor: Compressor) -> u32 {
    match compressor {
        Compressor::None => 0,
        Compressor::Lz4Block => 1,
        Compressor::Gzip => 2,
        Compressor::Zstd => 3,
    }
}

/// The number of a digest algorithm on disk.
pub fn digester_number(digester: Digester) -> u32 {
    match digester {
        Digester::Blake3 => 0,
        Digester::Sha256 => 1,
    }
}
