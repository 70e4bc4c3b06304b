//! Stored bytes of chunks: whatever they are, decoding fills the buffer exactly or fails.

use nydus_vm::rafs::facts::Coding;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::image::OpenOptions;
use nydus_vm::rafs::meta::BlobMeta;
use nydus_vm::storage::codec;
use nydus_vm::sys::view::View;

use crate::blob_meta;
use crate::input::Input;
use crate::seeds;
use crate::seeds::Seed;

/// Decodes `data`: compressor, plain length (24 bits), stored bytes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let head = input.u32();
    let compressor = match head & 3 {
        0 => Compressor::None,
        1 => Compressor::Lz4Block,
        2 => Compressor::Gzip,
        _ => Compressor::Zstd,
    };
    let len = (head >> 8) as usize % (1 << 20);
    let mut plain = vec![0xa5; len];
    if codec::decode(compressor, input.0, &mut plain).is_ok() && compressor == Compressor::None {
        assert_eq!(plain, input.0);
    }
}

/// The first chunks of images of this project's builder, and a gzip member.
pub fn seeds() -> Vec<Seed> {
    let (_scratch, folders) = seeds::built();
    let mut found = vec![("gzip".to_owned(), input(2, 5, GZIP))];
    for (folder, (name, code)) in folders.iter().zip([("none", 0), ("lz4", 1), ("zstd", 3)]) {
        let bootstrap = std::fs::read(folder.join("bootstrap")).expect("it was built");
        let image =
            Image::open(View::from_bytes(bootstrap), &OpenOptions { placeholder_id: None }).expect("a good image");
        let blob = &image.blobs()[0];
        let file = std::fs::read(folder.join("blobs").join(&blob.id)).expect("it was built");
        let table = blob_meta::cache_file(blob, &file).expect("the blob has its table");
        let meta = BlobMeta::open(View::from_bytes(table), blob).expect("a good table");
        for chunk in 0..meta.count().min(5) {
            let facts = meta.chunk(chunk).expect("a good table");
            let start = facts.compressed_offset as usize;
            let stored = &file[start..start + facts.compressed_bytes as usize];
            let code = if facts.coding == Coding::Plain { 0 } else { code };
            found.push((format!("{name}-{chunk}"), input(code, facts.uncompressed_bytes, stored)));
        }
    }
    found
}

/// "hello" in a gzip member.
const GZIP: &[u8] =
    &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xcb, 0x48, 0xcd, 0xc9, 0xc9, 7, 0, 0x86, 0xa6, 0x10, 0x36, 5, 0, 0, 0];

fn input(code: u32, plain_bytes: u32, stored: &[u8]) -> Vec<u8> {
    [&(code | plain_bytes << 8).to_le_bytes(), stored].concat()
}
