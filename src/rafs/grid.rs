//! Chunks of tarfs blobs. Such a blob is an uncompressed tar, and its image knows no chunks of it: files are ranges of
//! the tar. So a grid is laid over the blob: chunk `n` is the `n`-th part of the image's chunk size, the last one being
//! shorter, stored as it is, without a digest.

use super::RafsError;
use super::facts::BlobFacts;
use super::facts::ChunkFacts;
use super::facts::Coding;
use super::facts::Piece;
use super::facts::feature;
use super::malformed;

/// Chunks of a blob of `bytes`.
pub(super) fn count(bytes: u64, chunk_bytes: u32) -> u64 {
    super::count_chunks(bytes, chunk_bytes)
}

/// Chunk `chunk` of the tarfs blob `blob`; `None` behind its end, and in other blobs.
pub(super) fn facts(blob: &BlobFacts, chunk: u32) -> Option<ChunkFacts> {
    if blob.features & feature::TARFS == 0 || chunk >= blob.chunk_count {
        return None;
    }
    let chunk_bytes = u64::from(blob.chunk_bytes);
    let start = u64::from(chunk).saturating_mul(chunk_bytes);
    let bytes = blob.uncompressed_bytes.saturating_sub(start).min(chunk_bytes);
    Some(ChunkFacts {
        compressed_offset: start,
        compressed_bytes: u32::try_from(bytes).ok()?,
        uncompressed_offset: start,
        uncompressed_bytes: u32::try_from(bytes).ok()?,
        coding: Coding::Plain,
        digest: None,
        crc32c: None,
    })
}

/// Appends the pieces of the grid of `chunk_bytes` that hold the bytes of `piece`, whose chunk does not count.
pub(super) fn cut(piece: &Piece, chunk_bytes: u32, mut each: impl FnMut(Piece)) -> Result<(), RafsError> {
    let size = u64::from(chunk_bytes);
    let end = piece.offset.saturating_add(piece.len.into());
    let mut at = piece.offset;
    while at < end {
        let skip = at & size.wrapping_sub(1);
        // Neither is more than the piece has.
        let len = u32::try_from(end.saturating_sub(at).min(size.saturating_sub(skip))).unwrap_or(u32::MAX);
        let chunk = u32::try_from(at.wrapping_shr(chunk_bytes.trailing_zeros()))
            .map_err(|_| malformed("chunk address", 0, format!("{at:#x} is out of range")))?;
        each(Piece { chunk, offset: at, len, ..*piece });
        // At least 1: `skip` is below the size.
        at = at.saturating_add(len.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rafs::facts::Compressor;
    use crate::rafs::facts::Digester;

    fn tar(bytes: u64) -> BlobFacts {
        BlobFacts {
            index: 0,
            id: "tar".to_owned(),
            features: feature::TARFS,
            chunk_count: count(bytes, 4096) as u32,
            chunk_bytes: 4096,
            uncompressed_bytes: bytes,
            compressed_bytes: bytes,
            data_bytes: bytes,
            compressor: Compressor::None,
            digester: Digester::Sha256,
            cipher: None,
            meta: None,
            prefetch_bytes: 0,
        }
    }

    #[test]
    fn grid_covers_the_blob_and_no_more() {
        for bytes in [0, 512, 4096, 4608, 8192 - 512, 10 << 20] {
            let blob = tar(bytes);
            let mut end = 0;
            for chunk in 0..blob.chunk_count {
                let facts = facts(&blob, chunk).unwrap();
                assert_eq!((facts.compressed_offset, facts.uncompressed_offset), (end, end));
                assert_eq!(facts.compressed_bytes, facts.uncompressed_bytes);
                end += u64::from(facts.uncompressed_bytes);
            }
            assert_eq!(end, bytes);
            assert_eq!(facts(&blob, blob.chunk_count), None);
        }
        assert_eq!(facts(&BlobFacts { features: feature::ALIGNED, ..tar(8192) }, 0), None);
    }

    #[test]
    fn piece_is_cut_where_the_grid_has_its_lines() {
        let cut_of = |offset, len| {
            let mut pieces = Vec::new();
            cut(&Piece { blob: 3, chunk: 99, offset, len }, 4096, |piece| pieces.push(piece)).unwrap();
            assert!(pieces.iter().all(|piece| piece.blob == 3));
            pieces.iter().map(|piece| (piece.chunk, piece.offset, piece.len)).collect::<Vec<_>>()
        };
        assert_eq!(cut_of(512, 100), [(0, 512, 100)]);
        assert_eq!(cut_of(512, 4096), [(0, 512, 3584), (1, 4096, 512)]);
        assert_eq!(cut_of(4096, 8192), [(1, 4096, 4096), (2, 8192, 4096)]);
        assert_eq!(cut_of(8191, 2), [(1, 8191, 1), (2, 8192, 1)]);
    }
}
