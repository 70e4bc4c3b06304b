//! What lies in a cache directory, looked at and damaged from outside: by the format's description, not by the code that
//! is tested.

use std::fs;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;

use nydus_vm::rafs::facts::BlobFacts;
use nydus_vm::rafs::facts::ChunkFacts;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::image::OpenOptions;
use nydus_vm::rafs::meta::BlobMeta;
use nydus_vm::sys::view::View;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use nydus_vm::testing::manifest::Entry;
use nydus_vm::testing::readback::Readback;

/// Suffixes of the files of a blob.
pub const DATA: &str = ".blob.data";
pub const MAP: &str = ".blob.data.chunk_map";
pub const META: &str = ".blob.meta";
pub const SIDE: &str = ".nydus_state";

/// Bytes before the bits of a chunk map, and before the records of a side file.
pub const HEADER: usize = 4096;

/// A v6 image in `home`, and what it shows: a few files of `file_bytes` that do not compress, some text, chunks of 4 KiB.
pub fn small_image(home: &Path, files: usize, file_bytes: usize) -> (TestImage, Vec<Entry>) {
    let (tree, out) = (home.join("tree"), home.join("image"));
    fs::create_dir_all(tree.join("dir")).unwrap();
    for n in 0..files {
        fs::write(tree.join("dir").join(n.to_string()), make::noise(&n.to_string(), file_bytes + n)).unwrap();
    }
    fs::write(tree.join("text"), make::text("text", 3000)).unwrap();
    let made = make::image(&tree, &out, Compressor::Lz4Block, Digester::Blake3, 4096);
    let manifest = Readback::open(&made.bootstrap, &made.blobs).unwrap().entries().unwrap();
    (TestImage::made("small", made, &out), manifest)
}

/// The metadata of an image, opened.
pub fn opened(image: &TestImage) -> Image {
    let bootstrap = File::open(&image.bootstrap).unwrap();
    let view = View::map_file(bootstrap.as_fd(), bootstrap.metadata().unwrap().len()).unwrap();
    Image::open(view, &OpenOptions { placeholder_id: None }).unwrap()
}

/// A blob, what is known of its chunks, and its plain bytes: from a cache that is whole.
pub struct Known {
    pub blob: BlobFacts,
    pub chunks: Vec<ChunkFacts>,
    pub plain: Vec<u8>,
}

impl Known {
    /// The first blob of `image`, whose cache directory `cache` is filled.
    pub fn new(image: &TestImage, cache: &Path) -> Self {
        let opened = opened(image);
        let blob = opened.blobs()[0].clone();
        let files = Files::new(cache, &blob);
        let chunks = if blob.meta.is_some() {
            let meta = File::open(files.at(META)).unwrap();
            let meta = View::map_file(meta.as_fd(), meta.metadata().unwrap().len()).unwrap();
            let meta = BlobMeta::open(meta, &blob).unwrap();
            (0..blob.chunk_count).map(|chunk| meta.chunk(chunk).unwrap()).collect()
        } else {
            let index = opened.chunk_index().unwrap();
            (0..blob.chunk_count).map(|chunk| index.chunk(0, chunk).unwrap().unwrap()).collect()
        };
        let plain = fs::read(files.at(DATA)).unwrap();
        Self { blob, chunks, plain }
    }

    /// The bytes of `chunk`.
    pub fn bytes(&self, chunk: u32) -> &[u8] {
        let facts = &self.chunks[chunk as usize];
        &self.plain[facts.uncompressed_offset as usize..][..facts.uncompressed_bytes as usize]
    }

    /// Chunks whose stored bytes are asked for by a request of `range`.
    pub fn asked_for(&self, range: &std::ops::Range<u64>) -> Vec<u32> {
        let is_asked = |chunk: &u32| {
            let facts = &self.chunks[*chunk as usize];
            let end = facts.compressed_offset + u64::from(facts.compressed_bytes);
            facts.compressed_offset < range.end && range.start < end
        };
        (0..self.blob.chunk_count).filter(is_asked).collect()
    }
}

/// The files of one blob.
pub struct Files {
    cache: PathBuf,
    id: String,
    chunks: usize,
}

impl Files {
    pub fn new(cache: &Path, blob: &BlobFacts) -> Self {
        Self { cache: cache.to_path_buf(), id: blob.id.clone(), chunks: blob.chunk_count as usize }
    }

    pub fn at(&self, suffix: &str) -> PathBuf {
        self.cache.join(format!("{}{suffix}", self.id))
    }

    /// Chunks that the chunk map says are there.
    pub fn published(&self) -> Vec<u32> {
        let map = fs::read(self.at(MAP)).unwrap_or_default();
        self.bits(map.get(HEADER..).unwrap_or_default(), |chunk| 0x80 >> (chunk % 8))
    }

    /// Chunks that the side file says are right; none, if it speaks of another data file.
    pub fn trusted(&self) -> Vec<u32> {
        let side = fs::read(self.at(SIDE)).unwrap_or_default();
        let data = fs::metadata(self.at(DATA)).map_or(0, |data| std::os::unix::fs::MetadataExt::ino(&data));
        if side.get(32..40) != Some(&data.to_le_bytes()) {
            return Vec::new();
        }
        // The bit "written" of each record (`storage::cache::claims`).
        let is_written = |chunk: &usize| side.get(HEADER + 16 * chunk + 8).is_some_and(|byte| byte & 1 != 0);
        (0..self.chunks).filter(is_written).map(|chunk| chunk as u32).collect()
    }

    fn bits(&self, bytes: &[u8], mask: impl Fn(usize) -> u8) -> Vec<u32> {
        let is_set = |chunk: &usize| bytes.get(chunk / 8).is_some_and(|byte| byte & mask(*chunk) != 0);
        (0..self.chunks).filter(is_set).map(|chunk| chunk as u32).collect()
    }

    /// Whether the data file holds `chunk` as it should.
    pub fn is_right(&self, known: &Known, chunk: u32) -> bool {
        let facts = &known.chunks[chunk as usize];
        let mut found = vec![0; facts.uncompressed_bytes as usize];
        let data = File::open(self.at(DATA)).unwrap();
        data.read_exact_at(&mut found, facts.uncompressed_offset).is_ok() && found == known.bytes(chunk)
    }

    /// Writes over bytes of a file, in place.
    pub fn write(&self, suffix: &str, offset: u64, bytes: &[u8]) {
        File::options().write(true).open(self.at(suffix)).unwrap().write_all_at(bytes, offset).unwrap();
    }

    /// Inverts the bits `mask` of one byte of a file, in place.
    pub fn flip(&self, suffix: &str, offset: u64, mask: u8) {
        let file = File::options().read(true).write(true).open(self.at(suffix)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ mask], offset).unwrap();
    }

    /// Cuts a file.
    pub fn cut(&self, suffix: &str, keep: u64) {
        File::options().write(true).open(self.at(suffix)).unwrap().set_len(keep).unwrap();
    }
}

/// Copies the files of a cache directory; their contents, that is: they are other files.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
