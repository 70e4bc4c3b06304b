//! What an image states of the chunks of a blob, as it is entered into the records of claims.

use super::claims::Statement;
use super::extents::pack;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;
use crate::rafs::facts::Compressor;

/// Makes the statements of one image about one blob.
#[derive(Debug, Clone)]
pub struct Author {
    key: [u8; blake3::KEY_LEN],
    /// How stored bytes become plain ones, as far as that is the same for all chunks.
    decoding: [u8; blake3::OUT_LEN],
    shift: u32,
}

impl Author {
    /// The author for `blob`, whose tags nobody can foresee without the `secret` of the side file.
    pub fn new(blob: &BlobFacts, secret: [u8; 16], keeping: [u8; 16], shift: u32) -> Self {
        let mut key = [0; blake3::KEY_LEN];
        key[..16].copy_from_slice(&secret);
        key[16..].copy_from_slice(&keeping);
        let mut decoding = blake3::Hasher::new();
        decoding.update(&[compressor(blob.compressor), u8::from(blob.cipher.is_some())]);
        if let Some(cipher) = &blob.cipher {
            decoding.update(&cipher.key).update(&cipher.iv);
        }
        Self { key, decoding: decoding.finalize().into(), shift }
    }

    /// The statement that the chunk of `facts` lies at `place` in the data file; `None`: it cannot be expressed, and so
    /// cannot be kept.
    pub fn state(&self, facts: &ChunkFacts, place: (u64, u32)) -> Option<Statement> {
        let word = pack(place.0, place.1, self.shift)?;
        let mut tag = blake3::Hasher::new_keyed(&self.key);
        tag.update(&place.0.to_le_bytes()).update(&place.1.to_le_bytes());
        tag.update(&facts.uncompressed_bytes.to_le_bytes());
        match &facts.digest {
            // It makes the content, wherever that comes from.
            Some(digest) => tag.update(digest),
            None => {
                let (code, unit, inner) = coding(facts.coding);
                tag.update(&[code]).update(&unit.to_le_bytes()).update(&inner.to_le_bytes());
                tag.update(&facts.compressed_offset.to_le_bytes()).update(&facts.compressed_bytes.to_le_bytes());
                tag.update(&facts.crc32c.map_or(u64::MAX, u64::from).to_le_bytes()).update(&self.decoding)
            }
        };
        let hash = tag.finalize();
        let first = hash.as_bytes().first_chunk().copied().unwrap_or_default();
        Some(Statement::new(word, u64::from_le_bytes(first)))
    }
}

fn compressor(compressor: Compressor) -> u8 {
    match compressor {
        Compressor::None => 0,
        Compressor::Lz4Block => 1,
        Compressor::Gzip => 2,
        Compressor::Zstd => 3,
    }
}

fn coding(coding: Coding) -> (u8, u32, u32) {
    match coding {
        Coding::Plain => (0, 0, 0),
        Coding::Compressed => (1, 0, 0),
        Coding::Batch { plain_bytes, offset } => (2, plain_bytes, offset),
        Coding::Zran { context, offset } => (3, context, offset),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rafs::facts::Cipher;
    use crate::rafs::facts::Digester;

    fn blob() -> BlobFacts {
        BlobFacts {
            index: 0,
            id: "x".into(),
            features: 0,
            chunk_count: 9,
            chunk_bytes: 4096,
            uncompressed_bytes: 36_864,
            compressed_bytes: 36_864,
            data_bytes: 36_864,
            compressor: Compressor::Zstd,
            digester: Digester::Blake3,
            meta: None,
            cipher: None,
            prefetch_bytes: 0,
        }
    }

    #[test]
    fn statements_differ_in_all_that_makes_the_content_and_in_nothing_else() {
        let sealed = ChunkFacts {
            compressed_offset: 10,
            compressed_bytes: 20,
            uncompressed_offset: 4096,
            uncompressed_bytes: 30,
            coding: Coding::Compressed,
            digest: Some([7; 32]),
            crc32c: None,
        };
        let bare = ChunkFacts { digest: None, ..sealed };
        let author = Author::new(&blob(), [1; 16], [0; 16], 0);
        let state = |author: &Author, facts: &ChunkFacts| author.state(facts, (4096, 30)).unwrap();
        let cipher = Some(Cipher { key: [1; 32], iv: [2; 16] });
        let other_ways: [(&str, Author, bool); 4] = [
            ("secret", Author::new(&blob(), [2; 16], [0; 16], 0), true),
            ("keeping", Author::new(&blob(), [1; 16], [3; 16], 0), true),
            ("cipher", Author::new(&BlobFacts { cipher, ..blob() }, [1; 16], [0; 16], 0), false),
            ("codec", Author::new(&BlobFacts { compressor: Compressor::Gzip, ..blob() }, [1; 16], [0; 16], 0), false),
        ];
        for (name, other, even_with_digest) in other_ways {
            assert_ne!(state(&author, &bare), state(&other, &bare), "{name}");
            assert_eq!(state(&author, &sealed) != state(&other, &sealed), even_with_digest, "{name}");
        }
        type Change = fn(&mut ChunkFacts);
        let changes: [(&str, Change, bool); 5] = [
            ("length", |facts| facts.uncompressed_bytes += 1, true),
            ("stored offset", |facts| facts.compressed_offset += 1, false),
            ("stored length", |facts| facts.compressed_bytes += 1, false),
            ("coding", |facts| facts.coding = Coding::Zran { context: 0, offset: 0 }, false),
            ("crc", |facts| facts.crc32c = Some(0), false),
        ];
        for (name, change, even_with_digest) in changes {
            let changed = |facts: &ChunkFacts| {
                let mut facts = *facts;
                change(&mut facts);
                facts
            };
            assert_ne!(state(&author, &bare), state(&author, &changed(&bare)), "{name}");
            let differs = state(&author, &sealed) != state(&author, &changed(&sealed));
            assert_eq!(differs, even_with_digest, "{name}");
        }
        assert_ne!(state(&author, &sealed), state(&author, &ChunkFacts { digest: Some([8; 32]), ..sealed }));
        assert_ne!(Some(state(&author, &sealed)), author.state(&sealed, (8192, 30)));
        assert_eq!(Author::new(&blob(), [1; 16], [0; 16], 12).state(&sealed, (4097, 30)), None, "not aligned");
    }
}
