//! The chunk information array of a blob (v6), as it lies in the cache directory: opened, and every entry looked at.

use nydus_vm::rafs::facts::BlobFacts;
use nydus_vm::rafs::facts::ChunkFacts;
use nydus_vm::rafs::facts::Coding;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::MetaHolder;
use nydus_vm::rafs::facts::MetaLocation;
use nydus_vm::rafs::facts::feature;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::image::OpenOptions;
use nydus_vm::rafs::meta;
use nydus_vm::rafs::meta::BlobMeta;
use nydus_vm::storage::codec;
use nydus_vm::sys::view::View;

use crate::input::Input;
use crate::seeds;
use crate::seeds::Seed;
use crate::served::world;

/// Largest table of an input.
const TABLE_BYTES: u64 = 1 << 20;

/// Facts in front of an input.
const FACTS_BYTES: usize = 64;

/// Opens the table behind the facts in `data`.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let blob = take_facts(&mut input);
    let _ = meta::stored_range(&blob);
    let Ok(bytes) = meta::cache_bytes(&blob) else { return };
    if bytes > TABLE_BYTES {
        return;
    }
    // A table of any other length is refused at once. The header is at the end, and so it is in the input.
    let header_bytes = meta::META_HEADER_BYTES as usize;
    let (array, header) = input.0.split_at(input.0.len().saturating_sub(header_bytes));
    let mut table = array.to_vec();
    table.resize((bytes as usize).saturating_sub(header_bytes), 0);
    table.extend_from_slice(header);
    table.resize(bytes as usize, 0);
    let _ = meta::check_header(header, &blob);
    let Ok(meta) = BlobMeta::open(View::from_bytes(table), &blob) else { return };
    assert_eq!(meta.count(), blob.chunk_count);
    let mut end = 0;
    for chunk in 0..meta.count() {
        // Checked when it was opened, so that it can be used.
        let facts = meta.chunk(chunk).expect("opening looks at every entry");
        assert!(facts.uncompressed_offset >= end, "in order, without overlaps");
        end = facts.uncompressed_offset + u64::from(facts.uncompressed_bytes);
        assert!(facts.compressed_offset + u64::from(facts.compressed_bytes) <= blob.data_bytes, "inside the blob");
        check_unit(&meta, &facts);
    }
    assert!(meta.chunk(meta.count()).is_err());
}

/// A chunk lies inside of what its batch or context decodes to, and there is such a context.
fn check_unit(meta: &BlobMeta, chunk: &ChunkFacts) {
    let (offset, plain_bytes) = match chunk.coding {
        Coding::Plain | Coding::Compressed => return,
        Coding::Batch { plain_bytes, offset } => (offset, plain_bytes),
        Coding::Zran { context, offset } => {
            let context = meta.zran(context).expect("opening looks at every context");
            assert_eq!(context.stored.start, chunk.compressed_offset);
            assert_eq!(context.stored.end - context.stored.start, u64::from(chunk.compressed_bytes));
            assert!(context.prime.1 <= 7 && context.dictionary.len() <= 32 << 10);
            (offset, context.plain_bytes)
        }
    };
    assert!(u64::from(offset) + u64::from(chunk.uncompressed_bytes) <= u64::from(plain_bytes), "{chunk:?}");
}

/// What the bootstrap says of the blob.
fn take_facts(input: &mut Input<'_>) -> BlobFacts {
    let mut facts = Input(input.bytes(FACTS_BYTES));
    let base = world().blob().clone();
    BlobFacts {
        features: facts.u32(),
        chunk_count: facts.u32(),
        chunk_bytes: 1 << (facts.u8() % 25),
        meta: Some(MetaLocation {
            holder: MetaHolder::Blob,
            compressor: match facts.u8() % 4 {
                0 => Compressor::None,
                1 => Compressor::Lz4Block,
                2 => Compressor::Gzip,
                _ => Compressor::Zstd,
            },
            offset: facts.u64(),
            compressed_bytes: facts.u64(),
            uncompressed_bytes: facts.u64(),
        }),
        uncompressed_bytes: facts.u64(),
        compressed_bytes: facts.u64(),
        data_bytes: facts.u64(),
        ..base
    }
}

fn put_facts(blob: &BlobFacts, location: &MetaLocation) -> Vec<u8> {
    let compressor = match location.compressor {
        Compressor::None => 0,
        Compressor::Lz4Block => 1,
        Compressor::Gzip => 2,
        Compressor::Zstd => 3,
    };
    let mut bytes = [blob.features.to_le_bytes(), blob.chunk_count.to_le_bytes()].concat();
    bytes.extend([blob.chunk_bytes.trailing_zeros() as u8, compressor]);
    let numbers = [
        location.offset,
        location.compressed_bytes,
        location.uncompressed_bytes,
        blob.uncompressed_bytes,
        blob.compressed_bytes,
        blob.data_bytes,
    ];
    bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    bytes.resize(FACTS_BYTES, 0);
    bytes
}

/// The tables of images with plain metadata, those of reference images too.
pub fn seeds() -> Vec<Seed> {
    let (_scratch, folders) = seeds::built();
    let mut blobs: Vec<Seed> = Vec::new();
    let mut bootstraps: Vec<Seed> = seeds::references(|name| name.starts_with("v6-") && name.ends_with("-bootstrap"));
    blobs.extend(seeds::references(|name| name.contains("-blobs-")));
    for folder in folders {
        bootstraps.push((folder.display().to_string(), std::fs::read(folder.join("bootstrap")).expect("it was built")));
        for blob in folder.join("blobs").read_dir().expect("it was built") {
            let path = blob.expect("it was built").path();
            blobs.push((path.display().to_string(), std::fs::read(&path).expect("it was built")));
        }
    }
    let mut found = Vec::new();
    for (name, bootstrap) in bootstraps {
        let Ok(image) = Image::open(View::from_bytes(bootstrap), &OpenOptions { placeholder_id: None }) else {
            continue;
        };
        for blob in image.blobs() {
            let holder = holder(blob);
            let file = blobs.iter().find(|(name, _)| name.ends_with(holder));
            if let Some(table) = file.and_then(|(_, bytes)| table(blob, bytes)) {
                found.push((format!("{}-{}", name.replace('/', "-"), blob.index), table));
            }
        }
    }
    found
}

/// The input for the table of `blob` in its file; `None` where it is elsewhere, or encrypted.
fn table(blob: &BlobFacts, file: &[u8]) -> Option<Vec<u8>> {
    let location = blob.meta.as_ref().filter(|_| blob.features & feature::ENCRYPTED == 0)?;
    Some([put_facts(blob, location), cache_file(blob, file)?].concat())
}

/// The table of `blob` as its cache file has it, from the blob's own file.
pub fn cache_file(blob: &BlobFacts, file: &[u8]) -> Option<Vec<u8>> {
    let location = blob.meta.as_ref()?;
    let range = meta::stored_range(blob).ok()?;
    let stored = file.get(range.start as usize..range.end as usize)?;
    let (array, header) = stored.split_at(location.compressed_bytes as usize);
    let mut plain = vec![0; location.uncompressed_bytes as usize];
    codec::decode(location.compressor, array, &mut plain).ok()?;
    plain.resize(plain.len().next_multiple_of(4096), 0);
    Some([&plain, header].concat())
}

/// The id of the file that holds the table of `blob`.
pub fn holder(blob: &BlobFacts) -> &str {
    match blob.meta.as_ref().map(|meta| &meta.holder) {
        Some(MetaHolder::Other(id)) => id,
        _ => &blob.id,
    }
}
