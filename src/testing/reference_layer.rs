//! Images whose data is an unchanged layer: a tar, a gzip file, or a gzip file of many members.
//!
//! Made of an image that stores its chunks itself: these are written one after the other, with something between them
//! as a tar has, into the layer; the chunk tables are made anew, and the blob table of the bootstrap is changed to
//! match. Contexts are cut wherever a block begins, as often as possible, so that they begin inside of bytes, have
//! dictionaries, and are many.

use std::fs;
use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::Digest;
use sha2::Sha256;

use super::deflate;
use super::deflate::Border;
use super::make::noise;
use super::readback::Readback;
use crate::rafs::facts::feature;

/// What the layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// A plain tar.
    Tar,
    /// One gzip member.
    Gzip,
    /// A gzip member for each piece, as in eStargz.
    Members,
}

/// A chunk, and where it begins in the plain layer.
struct Placed {
    uncompressed_offset: u64,
    len: usize,
    at: usize,
    crc32c: u32,
}

/// A stretch of the gzip file that is decoded by itself.
struct Context {
    stored: std::ops::Range<usize>,
    plain: std::ops::Range<usize>,
    bits: u8,
    byte: u8,
}

/// Context bytes that are aimed at when decoded; few, so that there are many.
pub const SMALL_CONTEXTS: usize = 40_000;
/// As upstream's builder cuts: at most so many bytes where a block border allows.
pub const USUAL_CONTEXTS: usize = 2 << 20;

/// Writes the image of `bootstrap`, with its blobs in the directory `blobs`, over layers into the directory `out`, which
/// is made: `bootstrap` and `blobs/`. Contexts decode to about `context_bytes`.
///
/// # Panics
/// When the image cannot be read, or the other one not be written.
pub fn convert(bootstrap: &Path, blobs: &Path, out: &Path, layer: Layer, context_bytes: usize) {
    let readback = Readback::open(bootstrap, blobs).expect("the image can be read");
    let mut metadata = fs::read(bootstrap).expect("the bootstrap can be read");
    fs::create_dir_all(out.join("blobs")).expect("the directory can be made");
    let table = u64_at(&metadata, 1152 + 8) as usize;
    for index in 0..readback.image().blobs().len() {
        let (plain, chunks) = lay_out(&readback, index, layer);
        let file = match layer {
            Layer::Tar => plain.clone(),
            Layer::Gzip => gzip(&plain, Compression::new(6)),
            Layer::Members => {
                chunks_and_gaps(&plain, &chunks).flat_map(|part| gzip(part, Compression::new(9))).collect()
            }
        };
        let (array, contexts) = match layer {
            Layer::Tar => (chunks.iter().flat_map(tar_entry).collect(), 0),
            Layer::Gzip | Layer::Members => gzip_table(&file, &plain, &chunks, context_bytes),
        };
        let features = match layer {
            Layer::Tar => 0,
            Layer::Gzip | Layer::Members => feature::ZRAN,
        };
        let features = features | feature::ALIGNED | feature::CHUNK_INFO_V2 | feature::SEPARATE | feature::CAP_TAR_TOC;
        let stored = zstd::bulk::compress(&array, 3).expect("the table can be compressed");
        let mut holder = stored.clone();
        holder.extend(header(features, chunks.len(), contexts, stored.len(), array.len()));
        let id = write(out, &file);
        let holder_id = write(out, &holder);

        let entry = &mut metadata[table + index * 256..][..256];
        put(entry, 0, id.as_bytes());
        let compressor: u32 = if layer == Layer::Tar { 0 } else { 2 };
        put(entry, 76, &compressor.to_le_bytes());
        put(entry, 84, &features.to_le_bytes());
        put(entry, 88, &(file.len() as u64).to_le_bytes());
        put(entry, 104, &0u32.to_le_bytes());
        put(entry, 108, &3u32.to_le_bytes());
        put(entry, 112, &0u64.to_le_bytes());
        put(entry, 120, &(stored.len() as u64).to_le_bytes());
        put(entry, 128, &(array.len() as u64).to_le_bytes());
        put(entry, 136, &[0; 32]);
        put(entry, 168, &hex::decode(holder_id).expect("made from a digest"));
        put(entry, 200, &(holder.len() as u64).to_le_bytes());
        put(&mut metadata, 1408 + 128 * index, id.as_bytes());
    }
    fs::write(out.join("bootstrap"), metadata).expect("the bootstrap can be written");
}

/// The plain layer: all chunks in their order, with something before and behind each.
fn lay_out(readback: &Readback, index: usize, layer: Layer) -> (Vec<u8>, Vec<Placed>) {
    let (mut plain, mut chunks) = (Vec::new(), Vec::new());
    for chunk in 0..readback.image().blobs()[index].chunk_count {
        let (facts, bytes) = readback.unverified(index, chunk).expect("the chunk can be read");
        // Of all lengths, so that chunks begin anywhere; now and then as long as nobody reads through.
        let gap = if chunk % 7 == 3 { 3000 } else { 100 + chunk as usize % 500 };
        plain.extend(noise(&format!("{layer:?} {chunk}"), gap));
        chunks.push(Placed {
            uncompressed_offset: facts.uncompressed_offset,
            len: bytes.len(),
            at: plain.len(),
            crc32c: crc32c::crc32c(&bytes),
        });
        plain.extend(bytes);
    }
    plain.extend([0; 1024]);
    (plain, chunks)
}

/// The layer in pieces that begin at gaps and at chunks.
fn chunks_and_gaps<'a>(plain: &'a [u8], chunks: &'a [Placed]) -> impl Iterator<Item = &'a [u8]> {
    let mut at = 0;
    let borders = chunks.iter().flat_map(|chunk| [chunk.at, chunk.at + chunk.len]).chain([plain.len()]);
    borders.map(move |border| &plain[std::mem::replace(&mut at, border)..border])
}

/// A gzip member that ends with an empty block, as Go writes them.
fn gzip(plain: &[u8], level: Compression) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), level);
    encoder.write_all(plain).expect("memory takes all");
    encoder.flush().expect("memory takes all");
    encoder.finish().expect("memory takes all")
}

fn tar_entry(chunk: &Placed) -> [u8; 24] {
    entry(chunk, 0x10, (chunk.at as u64, chunk.len as u64), chunk.crc32c.into())
}

fn entry(chunk: &Placed, flags: u64, (offset, len): (u64, u64), data: u64) -> [u8; 24] {
    let plain = chunk.uncompressed_offset >> 12 | (chunk.len as u64 - 1) << 32 | flags << 56;
    let words = [plain, offset | len << 40, data];
    let mut bytes = [0; 24];
    words.iter().zip(bytes.chunks_mut(8)).for_each(|(word, place)| place.copy_from_slice(&word.to_le_bytes()));
    bytes
}

/// Entries, contexts and dictionaries, and how many contexts there are.
fn gzip_table(file: &[u8], plain: &[u8], chunks: &[Placed], context_bytes: usize) -> (Vec<u8>, usize) {
    let (borders, decoded) = deflate::walk(file);
    assert!(decoded == plain, "the layer decodes to what it was made of");
    let (mut array, mut contexts) = (Vec::new(), Vec::<Context>::new());
    for chunk in chunks {
        let end = chunk.at + chunk.len;
        let from = borders.iter().rfind(|border| border.plain <= chunk.at).expect("the file begins with a border");
        let fits =
            |context: &&mut Context| end - context.plain.start <= context_bytes || from.plain == context.plain.start;
        match contexts.last_mut().filter(fits) {
            Some(context) => context.reach(end, file, &borders),
            None => contexts.push(Context::begin(*from, end, file, &borders)),
        }
        let number = contexts.len() - 1;
        let context = &contexts[number];
        let data = (number as u64) << 32 | (chunk.at - context.plain.start) as u64;
        array.extend(entry(chunk, 3, (context.stored.start as u64, 0), data));
    }
    let (mut table, mut dictionaries) = (Vec::new(), Vec::<u8>::new());
    for context in &contexts {
        let dictionary = &plain[context.plain.start.saturating_sub(32768)..context.plain.start];
        table.extend((context.stored.start as u64).to_le_bytes());
        table.extend((context.plain.start as u64).to_le_bytes());
        table.extend((dictionaries.len() as u64).to_le_bytes());
        table.extend((context.stored.len() as u32).to_le_bytes());
        table.extend((context.plain.len() as u32).to_le_bytes());
        table.extend((dictionary.len() as u32).to_le_bytes());
        table.extend([context.byte, context.bits, 0, 0]);
        dictionaries.extend(dictionary);
    }
    array.extend(table);
    array.extend(dictionaries);
    (array, contexts.len())
}

impl Context {
    /// Begins at `from`.
    fn begin(from: Border, end: usize, file: &[u8], borders: &[Border]) -> Self {
        let start = from.bit.div_ceil(8);
        let bits = (start * 8 - from.bit) as u8;
        let byte = if bits == 0 { 0 } else { file[start - 1] };
        let mut context = Self { stored: start..start, plain: from.plain..from.plain, bits, byte };
        context.reach(end, file, borders);
        context
    }

    /// Goes on up to `end` of the plain layer.
    fn reach(&mut self, end: usize, file: &[u8], borders: &[Border]) {
        let behind = borders.iter().find(|border| border.plain >= end);
        self.stored.end = behind.map_or(file.len(), |border| border.bit.div_ceil(8));
        self.plain.end = end;
    }
}

fn header(features: u32, chunks: usize, contexts: usize, stored: usize, plain: usize) -> Vec<u8> {
    let mut header = vec![0; 4096];
    put(&mut header, 0, &0xb10b_b10bu32.to_le_bytes());
    put(&mut header, 4, &features.to_le_bytes());
    put(&mut header, 8, &3u32.to_le_bytes());
    put(&mut header, 12, &(chunks as u32).to_le_bytes());
    put(&mut header, 24, &(stored as u64).to_le_bytes());
    put(&mut header, 32, &(plain as u64).to_le_bytes());
    if contexts > 0 {
        put(&mut header, 40, &(chunks as u64 * 24).to_le_bytes());
        put(&mut header, 48, &((plain - chunks * 24) as u64).to_le_bytes());
        put(&mut header, 56, &(contexts as u32).to_le_bytes());
    }
    put(&mut header, 4092, &0xb10b_b10bu32.to_le_bytes());
    header
}

fn write(out: &Path, bytes: &[u8]) -> String {
    let id = hex::encode(Sha256::digest(bytes));
    fs::write(out.join("blobs").join(&id), bytes).expect("the blob can be written");
    id
}

fn put(place: &mut [u8], at: usize, bytes: &[u8]) {
    place[at..][..bytes.len()].copy_from_slice(bytes);
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..][..8].try_into().expect("eight bytes"))
}
