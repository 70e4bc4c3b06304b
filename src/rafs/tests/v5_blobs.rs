//! Blobs of v5 that are not described as usual: without an extended table, or kept elsewhere.

use smallvec::SmallVec;

use super::open;
use super::patched;
use super::resolve;
use super::samples;
use crate::rafs::RafsError;
use crate::rafs::check;
use crate::rafs::facts::Piece;
use crate::rafs::facts::feature;
use crate::rafs::image::Image;
use crate::rafs::seek::Whence;
use crate::rafs::test_images;
use crate::rafs::test_images::CHUNK;
use crate::rafs::test_images::CHUNKS;
use crate::rafs::test_images::LAST_CHUNK;

#[test]
fn v5_image_without_extended_blob_table_is_measured() {
    let [good, _] = samples();
    let image = open(&patched(&good, &[(68, &[0; 12])])).unwrap();
    let blob = &image.blobs()[0];
    // Chunks 0 to 5 and 15 are referred to, by whatever number.
    assert_eq!((blob.chunk_count, blob.uncompressed_bytes), (7, u64::from(CHUNKS - 1) * CHUNK + LAST_CHUNK));
    assert_eq!((blob.data_bytes, blob.compressed_bytes), (blob.uncompressed_bytes, blob.uncompressed_bytes));
    check::walk(&image).unwrap();
    check_ranked(&image);
}

/// Every chunk that a file refers to is found by the number it has there.
fn check_ranked(image: &Image) {
    let index = image.chunk_index().unwrap();
    assert_eq!(index.len(), 7);
    for (path, numbers) in [("sparse", &[0, 1, 3, 4, 5, 3][..]), ("tail", &[0, 2, 6]), ("attributed", &[6])] {
        let facts = image.inode(resolve(image, path)).unwrap();
        let mut pieces: SmallVec<[Piece; 8]> = SmallVec::new();
        image.plan(&facts, 0..facts.size, &mut pieces).unwrap();
        assert_eq!(pieces.iter().map(|piece| piece.chunk).collect::<Vec<_>>(), numbers, "{path}");
        for piece in pieces {
            let chunk = index.chunk(0, piece.chunk).unwrap().unwrap();
            assert_eq!((chunk.uncompressed_offset, chunk.uncompressed_bytes), (piece.offset, piece.len));
            assert_eq!(index.digest(0, piece.chunk).unwrap(), chunk.digest);
        }
    }
    assert_eq!(index.chunk(0, 7).unwrap(), None);
    let sparse = image.inode(resolve(image, "sparse")).unwrap();
    assert_eq!(image.seek(&sparse, 0, Whence::Hole).unwrap(), Some(2 * CHUNK));
}

#[test]
fn v5_image_whose_chunks_have_no_index_is_read() {
    let [mut image, _] = samples();
    image[68..80].fill(0);
    for chunk in 0..CHUNKS {
        let record = test_images::chunk_digest(chunk);
        let places: Vec<usize> = image.windows(32).enumerate().filter(|(_, w)| *w == record).map(|row| row.0).collect();
        for at in places {
            // The digest of a file of one chunk is not that of its chunk, so these are records.
            image[at + 72..at + 76].fill(0);
        }
    }
    check_ranked(&open(&image).unwrap());
}

#[test]
fn v5_file_in_an_external_blob_has_chunks_of_its_own_size() {
    let [good, _] = samples();
    let u32_at = |at: usize| u32::from_le_bytes(good[at..at + 4].try_into().unwrap());
    let extended = u32_at(72) as usize;
    let find = |name: &[u8]| good.windows(name.len()).position(|window| window == name).unwrap();
    // `tail` becomes a file of two chunks of 8192 bytes and a rest, as they lie in the blob, without digests.
    let tail = find(b"tail\0\0\0\0");
    let mut image = patched(&good, &[(extended + 4, &feature::EXTERNAL.to_le_bytes())]);
    image[tail - 128 + 64..][..8].copy_from_slice(&(2 * 8192u64 + 5).to_le_bytes());
    for (number, bytes) in [8192u32, 8192, 5].into_iter().enumerate() {
        let record = &mut image[tail + 8 + number * 80..][..80];
        record[..32].fill(0);
        record[40..44].copy_from_slice(&bytes.to_le_bytes());
        record[44..48].copy_from_slice(&bytes.to_le_bytes());
        // They overlap those of other files, which is no harm: they hold the same bytes.
        let offset = (512 + number as u64 * 8192).to_le_bytes();
        record[48..56].copy_from_slice(&offset);
        record[56..64].copy_from_slice(&offset);
        record[72..76].copy_from_slice(&(6 + number as u32).to_le_bytes());
    }
    let image = image;
    let opened = open(&image).unwrap();
    assert_eq!(opened.blobs()[0].features, feature::EXTERNAL);
    let facts = opened.inode(resolve(&opened, "tail")).unwrap();
    let mut pieces: SmallVec<[Piece; 8]> = SmallVec::new();
    opened.plan(&facts, 8190..1 << 20, &mut pieces).unwrap();
    let found: Vec<_> = pieces.iter().map(|piece| (piece.chunk, piece.offset, piece.len)).collect();
    assert_eq!(found, [(6, 8702, 2), (7, 8704, 8192), (8, 16_896, 5)]);
    let index = opened.chunk_index().unwrap();
    let chunk = index.chunk(0, 7).unwrap().unwrap();
    assert_eq!((chunk.digest, chunk.uncompressed_bytes), (None, 8192));
    assert!(index.digest(0, 0).unwrap().is_some(), "other chunks keep theirs");
    assert_eq!(opened.seek(&facts, 0, Whence::Hole).unwrap(), Some(facts.size));
    // A blob that is used as it is has its chunks at one place.
    let moved = open(&patched(&image, &[(tail + 8 + 48, &[1])])).and_then(|image| check::walk(&image));
    assert!(matches!(moved, Err(RafsError::Malformed { field: "chunk uncompressed offset", .. })), "{moved:?}");
}
