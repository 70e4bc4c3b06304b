//! Chunks that share their stored bytes: batches, encrypted or not, and contexts of gzip files. Whatever is stored, decoding
//! in any steps gives the same bytes or an error, and never more than was stated.

use nydus_vm::rafs::facts::Cipher;
use nydus_vm::rafs::facts::Coding;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::ZranContext;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::image::OpenOptions;
use nydus_vm::rafs::meta::BlobMeta;
use nydus_vm::storage::codec::Sealing;
use nydus_vm::storage::codec::unit::Unit;
use nydus_vm::sys::view::View;

use crate::blob_meta;
use crate::input::Input;
use crate::seeds;
use crate::seeds::Seed;

/// Largest unit of an input.
const PLAIN_BYTES: u32 = 1 << 20;

/// Reads of one input.
const READS: usize = 4;

/// Bits of the first byte of an input.
mod flag {
    /// A context of a gzip file, else a batch.
    pub const CONTEXT: u8 = 1;
    /// Encrypted, which only batches are.
    pub const SEALED: u8 = 2;
    /// Compressed with zstd, else with lz4.
    pub const ZSTD: u8 = 4;
}

/// Decodes parts of the unit in `data`: flags, byte and bits before it, plain bytes (32 bits), reads (offset and length, 32
/// bits each), dictionary with its length in front (16 bits), stored bytes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let flags = input.u8();
    let prime = (input.u8(), input.u8() & 7);
    let plain_bytes = input.u32() % (PLAIN_BYTES + 1);
    let reads: [_; READS] = std::array::from_fn(|_| (input.u32(), input.u32()));
    let dictionary_bytes = input.u16();
    let dictionary = input.bytes(usize::from(dictionary_bytes).min(32 << 10)).to_vec();
    let stored = input.0;
    let begin = || match flags & flag::CONTEXT {
        0 => {
            let sealing = (flags & flag::SEALED != 0).then(|| Sealing::new(&Cipher { key: KEY, iv: [3; 16] }));
            let compressor = if flags & flag::ZSTD != 0 { Compressor::Zstd } else { Compressor::Lz4Block };
            Unit::batch(compressor, sealing.as_ref(), stored, plain_bytes)
        }
        _ => {
            let dictionary = dictionary.clone();
            let stored = if prime.1 == 0 { 0..stored.len() as u64 } else { 1..stored.len() as u64 + 1 };
            Unit::context(&ZranContext { stored, plain_bytes, prime, dictionary })
        }
    };
    let (Ok(mut unit), Ok(mut whole)) = (begin(), begin()) else { return };
    let all = whole.bytes(stored, 0, plain_bytes).ok();
    assert!(all.is_none_or(|all| all.len() == plain_bytes as usize));
    for (offset, len) in reads {
        let read = unit.bytes(stored, offset, len);
        let expected = all.and_then(|all| all.get(offset as usize..(offset as usize).checked_add(len as usize)?));
        match (read, expected) {
            (Ok(read), Some(expected)) => assert!(read == expected, "other bytes in steps than at once"),
            (Ok(read), None) => {
                assert!(read.len() == len as usize && u64::from(offset) + u64::from(len) <= plain_bytes.into())
            }
            (Err(error), Some(_)) => panic!("{offset}, {len}: {error}"),
            (Err(_), None) => {}
        }
    }
}

/// Halves that differ, as the cipher wants it.
const KEY: [u8; 32] = {
    let mut key = [1; 32];
    key[0] = 2;
    key
};

/// "hello" as a stored deflate block, a batch of as many bytes, and the units of the reference images.
pub fn seeds() -> Vec<Seed> {
    let hello = [1, 5, 0, 0xfa, 0xff, b'h', b'e', b'l', b'l', b'o'];
    let context = ZranContext { stored: 0..10, plain_bytes: 5, prime: (0, 0), dictionary: Vec::new() };
    let mut found = vec![
        ("hello".to_owned(), input(flag::CONTEXT, &context, &hello)),
        ("batch".to_owned(), input(0, &context, b"hello")),
        ("sealed".to_owned(), input(flag::SEALED, &ZranContext { plain_bytes: 16, ..context }, &[7; 16])),
    ];
    let blobs = seeds::references(|name| name.contains("-blobs-"));
    for (name, bootstrap) in seeds::references(|name| name.starts_with("v6-") && name.ends_with("-bootstrap")) {
        let Ok(image) = Image::open(View::from_bytes(bootstrap), &OpenOptions { placeholder_id: None }) else {
            continue;
        };
        for blob in image.blobs() {
            let holder = blob_meta::holder(blob);
            let file = |id: &str| blobs.iter().find(|(name, _)| name.ends_with(id)).map(|(_, bytes)| bytes);
            let (Some(data), Some(table)) = (file(&blob.id), file(holder)) else { continue };
            let Some(table) = blob_meta::cache_file(blob, table) else { continue };
            let Ok(meta) = BlobMeta::open(View::from_bytes(table), blob) else { continue };
            for facts in (0..meta.count()).filter_map(|chunk| meta.chunk(chunk).ok()) {
                let stored = facts.compressed_offset as usize
                    ..facts.compressed_offset as usize + facts.compressed_bytes as usize;
                let (flags, context) = match facts.coding {
                    Coding::Plain | Coding::Compressed => continue,
                    Coding::Batch { plain_bytes, .. } => {
                        let flags = if blob.compressor == Compressor::Zstd { flag::ZSTD } else { 0 };
                        (flags, ZranContext { stored: 0..0, plain_bytes, prime: (0, 0), dictionary: Vec::new() })
                    }
                    Coding::Zran { context, .. } => (flag::CONTEXT, meta.zran(context).expect("a good table")),
                };
                found.push((format!("{name}-{}", stored.start), input(flags, &context, &data[stored])));
            }
        }
    }
    found
}

/// An input that reads all of a unit in steps, and a part once more.
fn input(flags: u8, context: &ZranContext, stored: &[u8]) -> Vec<u8> {
    let len = context.plain_bytes;
    let reads = [(0, len / 3), (len / 3, len - len / 3), (1, len / 2), (0, len)];
    let dictionary_bytes = u16::try_from(context.dictionary.len()).expect("at most 32 KiB");
    let mut bytes = vec![flags, context.prime.0, context.prime.1];
    bytes.extend(len.to_le_bytes());
    bytes.extend(reads.iter().flat_map(|(offset, len)| [offset.to_le_bytes(), len.to_le_bytes()].concat()));
    bytes.extend(dictionary_bytes.to_le_bytes());
    [&bytes, &context.dictionary[..], stored].concat()
}
