//! Stored bytes of a chunk to its plain bytes, and the proof that they are the right ones.
//!
//! The exact length is part of every question: a decoder that yields less, more, or leaves input over is an error
//! (format, sections 5.1 and 14.10). Knows nothing of blobs, files or threads; decoders that are expensive to make are
//! kept per thread.
//!
//! - [`chunk`]: chunks that are stored alone; [`mod@unit`]: several that are stored as one piece;
//! - [`table`]: chunk tables;
//! - [`inflate`]: stretches of gzip files; [`sealed`], [`xts`]: encrypted pieces.

pub mod chunk;
pub mod inflate;
pub mod sealed;
pub mod table;
pub mod unit;
pub mod xts;

use std::cell::RefCell;
use std::io::Read;

use sha2::Digest as _;
use zstd::bulk::Decompressor;
use zstd::zstd_safe;

pub use self::sealed::Sealing;
use self::sealed::without_padding;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digest;
use crate::rafs::facts::Digester;
use crate::storage::pool::when_idle;

/// Why bytes are not those of the chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The decoder does not understand its input.
    #[error("the stored bytes are not valid {0:?} data of the stated length")]
    Malformed(Compressor),
    /// More or fewer bytes than stated.
    #[error("decoded to {actual} bytes where {expected} are stated")]
    Length {
        /// What the image states.
        expected: usize,
        /// What came out.
        actual: usize,
    },
    /// Input left over behind the end of the compressed data.
    #[error("{0} bytes follow the compressed data")]
    Trailing(usize),
    /// The digest differs.
    #[error("the digest does not match")]
    Digest,
    /// The checksum differs.
    #[error("the CRC-32C does not match")]
    Crc,
    /// No encrypted piece is so short.
    #[error("an encrypted piece of {0} bytes is shorter than one block of the cipher")]
    Unit(usize),
}

/// Whether stored bytes, decrypted where that is needed, are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// They are not.
    Plain,
    /// They are.
    Compressed,
    /// They are, unless their length is that of the plain bytes: batches (format, section 6.5).
    ByLength,
}

thread_local! {
    /// A decompression context is some 100 KiB and slow to make; kept while there is work.
    static ZSTD: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decodes `stored` into `out`, which must be filled exactly.
///
/// # Errors
/// [`CodecError::Malformed`], [`CodecError::Length`], [`CodecError::Trailing`]; `out` then holds undefined bytes.
pub fn decode(compressor: Compressor, stored: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
    let actual = match compressor {
        Compressor::None => {
            if stored.len() == out.len() {
                out.copy_from_slice(stored);
            }
            stored.len()
        }
        Compressor::Lz4Block => lz4(stored, out)?,
        Compressor::Zstd => zstd_frame(stored, out)?,
        Compressor::Gzip => gzip_member(stored, out)?,
    };
    if actual == out.len() { Ok(()) } else { Err(CodecError::Length { expected: out.len(), actual }) }
}

/// As [`decode`], for stored bytes in any form. `stored` is decrypted; `sealing` tells whether it was encrypted, and may
/// have been padded for that.
///
/// # Errors
/// As [`decode`].
pub fn decode_form(
    compressor: Compressor,
    form: Form,
    stored: &[u8],
    sealing: Option<&Sealing>,
    out: &mut [u8],
) -> Result<(), CodecError> {
    let short = sealing.and_then(|_| without_padding(stored));
    if form != Form::Compressed {
        // The length tells padding from data that looks like it.
        let plain = [Some(stored), short].into_iter().flatten().find(|bytes| bytes.len() == out.len());
        match (plain, form) {
            (Some(plain), _) => {
                out.copy_from_slice(plain);
                return Ok(());
            }
            (None, Form::Plain) => return Err(CodecError::Length { expected: out.len(), actual: stored.len() }),
            (None, _) => {}
        }
    }
    match short.map(|short| decode(compressor, short, out)) {
        Some(Ok(())) => Ok(()),
        Some(Err(_)) | None => decode(compressor, stored, out),
    }
}

/// `stored`, decrypted into `scratch` if it is encrypted.
///
/// # Errors
/// [`CodecError::Unit`].
pub fn open_piece<'a>(
    sealing: Option<&Sealing>,
    stored: &'a [u8],
    scratch: &'a mut Vec<u8>,
) -> Result<&'a [u8], CodecError> {
    let Some(sealing) = sealing else { return Ok(stored) };
    scratch.clear();
    scratch.extend_from_slice(stored);
    sealing.open(scratch)?;
    Ok(scratch)
}

/// LZ4 has neither length nor end mark: the decoder itself refuses input that is left over or does not fit.
fn lz4(stored: &[u8], out: &mut [u8]) -> Result<usize, CodecError> {
    let malformed = CodecError::Malformed(Compressor::Lz4Block);
    let room = i32::try_from(out.len()).map_err(|_| malformed)?;
    lz4::block::decompress_to_buffer(stored, Some(room), out).map_err(|_| malformed)
}

fn zstd_frame(stored: &[u8], out: &mut [u8]) -> Result<usize, CodecError> {
    let malformed = CodecError::Malformed(Compressor::Zstd);
    let frame = zstd_safe::find_frame_compressed_size(stored).map_err(|_| malformed)?;
    if frame != stored.len() {
        return Err(CodecError::Trailing(stored.len().saturating_sub(frame)));
    }
    ZSTD.with_borrow_mut(|kept| {
        let decoder = match kept {
            Some(decoder) => decoder,
            None => {
                when_idle(|| drop(ZSTD.take()));
                kept.insert(Decompressor::new().map_err(|_| malformed)?)
            }
        };
        decoder.decompress_to_buffer(stored, out).map_err(|_| malformed)
    })
}

fn gzip_member(stored: &[u8], out: &mut [u8]) -> Result<usize, CodecError> {
    let malformed = CodecError::Malformed(Compressor::Gzip);
    let mut decoder = flate2::bufread::GzDecoder::new(stored);
    let mut filled = 0;
    while filled < out.len() {
        match decoder.read(&mut out[filled..]).map_err(|_| malformed)? {
            0 => return Ok(filled),
            n => filled += n,
        }
    }
    // The end must be here: this read checks the member's own trailer too.
    if decoder.read(&mut [0]).map_err(|_| malformed)? != 0 {
        return Err(CodecError::Length { expected: out.len(), actual: out.len().saturating_add(1) });
    }
    match decoder.into_inner().len() {
        0 => Ok(filled),
        trailing => Err(CodecError::Trailing(trailing)),
    }
}

/// The digest of `plain`.
pub fn digest(digester: Digester, plain: &[u8]) -> Digest {
    match digester {
        Digester::Blake3 => *blake3::hash(plain).as_bytes(),
        Digester::Sha256 => sha2::Sha256::digest(plain).into(),
    }
}

/// Checks `plain` against its digest, or against its CRC where the image carries no digest. An image that carries
/// neither has nothing to check.
///
/// # Errors
/// [`CodecError::Digest`], [`CodecError::Crc`].
pub fn verify(
    digester: Digester,
    expected: Option<Digest>,
    crc32c: Option<u32>,
    plain: &[u8],
) -> Result<(), CodecError> {
    match (expected, crc32c) {
        (Some(expected), _) if digest(digester, plain) != expected => Err(CodecError::Digest),
        (None, Some(expected)) if crc32c::crc32c(plain) != expected => Err(CodecError::Crc),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
