//! All codecs, right and wrong.

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
