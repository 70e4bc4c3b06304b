//! Stored bytes of a chunk to its plain bytes, and the proof that they are the right ones.
//!
//! The exact length is part of every question: a decoder that yields less, more, or leaves input over is an error
//! (format, sections 5.1 and 14.10). Knows nothing of blobs, files or threads; decoders that are expensive to make are
//! kept per thread.

use std::cell::RefCell;
use std::io::Read;

use sha2::Digest as _;
use zstd::bulk::Decompressor;
use zstd::zstd_safe;

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
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    const ALL: [Compressor; 4] = [Compressor::None, Compressor::Lz4Block, Compressor::Gzip, Compressor::Zstd];

    fn encode(compressor: Compressor, plain: &[u8]) -> Vec<u8> {
        match compressor {
            Compressor::None => plain.to_vec(),
            Compressor::Lz4Block => lz4::block::compress(plain, None, false).unwrap(),
            Compressor::Zstd => zstd::bulk::compress(plain, 3).unwrap(),
            Compressor::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
        }
    }

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| ((i * i) >> 7) as u8).collect()
    }

    #[test]
    fn every_codec_round_trips_and_demands_the_exact_length() {
        for compressor in ALL {
            for len in [1usize, 15, 4096, 70_000] {
                let plain = sample(len);
                let stored = encode(compressor, &plain);
                let mut out = vec![0; len];
                decode(compressor, &stored, &mut out).unwrap();
                assert_eq!(out, plain, "{compressor:?} {len}");
                for wrong in [len - 1, len + 1, len * 2 + 7] {
                    let mut out = vec![0; wrong];
                    assert!(decode(compressor, &stored, &mut out).is_err(), "{compressor:?} {len} as {wrong}");
                }
            }
        }
    }

    #[test]
    fn trailing_truncated_and_empty_input_is_refused() {
        for compressor in [Compressor::Lz4Block, Compressor::Gzip, Compressor::Zstd] {
            let plain = sample(5000);
            let stored = encode(compressor, &plain);
            let mut out = vec![0; plain.len()];
            for extra in [&b"x"[..], &stored[..]] {
                let long = [&stored[..], extra].concat();
                assert!(decode(compressor, &long, &mut out).is_err(), "{compressor:?} with {} more", extra.len());
            }
            for keep in [0, 1, stored.len() / 2, stored.len() - 1] {
                assert!(decode(compressor, &stored[..keep], &mut out).is_err(), "{compressor:?} cut to {keep}");
            }
        }
    }

    #[test]
    fn verify_prefers_the_digest_and_falls_back_to_the_crc() {
        let plain = sample(1000);
        let crc = crc32c::crc32c(&plain);
        for digester in [Digester::Blake3, Digester::Sha256] {
            let right = digest(digester, &plain);
            let wrong = digest(digester, b"other");
            assert_eq!(verify(digester, Some(right), None, &plain), Ok(()));
            assert_eq!(verify(digester, Some(wrong), Some(crc), &plain), Err(CodecError::Digest));
            assert_eq!(verify(digester, None, Some(crc), &plain), Ok(()));
            assert_eq!(verify(digester, None, Some(crc ^ 1), &plain), Err(CodecError::Crc));
            assert_eq!(verify(digester, None, None, &plain), Ok(()));
        }
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283, "the published check value of CRC-32C");
    }

    proptest! {
        #[test]
        fn arbitrary_input_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), len in 0usize..600) {
            for compressor in ALL {
                let _ = decode(compressor, &bytes, &mut vec![0; len]);
            }
        }

        #[test]
        fn flipped_bytes_never_pass_the_digest(at in 0usize..4000, flip in 1u8..) {
            let plain = sample(4000);
            let right = digest(Digester::Blake3, &plain);
            for compressor in ALL {
                let mut stored = encode(compressor, &plain);
                let at = at % stored.len();
                stored[at] ^= flip;
                let mut out = vec![0; plain.len()];
                if decode(compressor, &stored, &mut out).is_ok() && out != plain {
                    prop_assert_eq!(verify(Digester::Blake3, Some(right), None, &out), Err(CodecError::Digest));
                }
            }
        }
    }
}
