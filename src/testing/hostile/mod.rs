//! Images that somebody made to hurt: a good one of each version, damaged in one place each.
//!
//! A [`Case`] says which field `nydus-image check` must name, on which path, and which files a daemon still has to read
//! right. [`v6`], [`v5`] and [`blobs`] (chunk tables and chunks) have them.

pub mod blobs;
pub mod many;
pub mod v5;
pub mod v6;

use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::XattrFlags;

use super::make;
use super::v5::rewrite;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;
use crate::rafs::image::Image;
use crate::rafs::image::OpenOptions;
use crate::rafs::inode::InodeFacts;
use crate::rafs::meta::BlobMeta;
use crate::storage::audit::BlobFile;
use crate::sys::view::View;
use crate::testing::image::TestImage;

/// Bytes of a chunk in the specimens.
pub const CHUNK_BYTES: u32 = 4096;

/// A whole image in memory: metadata and the only blob.
#[derive(Debug, Clone)]
pub struct Specimen {
    /// The metadata.
    pub bootstrap: Vec<u8>,
    /// Id of the blob.
    pub blob_id: String,
    /// The blob.
    pub blob: Vec<u8>,
}

/// A damaged image, and what to expect of it.
#[derive(Debug, Clone)]
pub struct Case {
    /// What was done to it.
    pub name: String,
    /// The image.
    pub specimen: Specimen,
    /// The field that a check must name; one of these.
    pub fields: &'static [&'static str],
    /// The path that it must name with it; empty if it names none.
    pub path: &'static str,
    /// Files that a daemon must still read right, if it starts.
    pub spared: &'static [&'static str],
}

/// The files of a specimen, by path.
pub fn content(path: &str) -> Vec<u8> {
    match path {
        "/big" => make::noise("big", 5 * CHUNK_BYTES as usize + 100),
        "/text" => make::text("text", 3 * CHUNK_BYTES as usize),
        "/dir/inner" | "/same" => make::noise("inner", 3 * CHUNK_BYTES as usize),
        "/xattr" => make::noise("xattr", 10),
        _ => path.as_bytes().to_vec(),
    }
}

fn tree(root: &Path) -> io::Result<()> {
    fs::create_dir_all(root.join("dir/sub"))?;
    fs::create_dir_all(root.join("many"))?;
    fs::create_dir_all(root.join("void"))?;
    for path in ["/big", "/text", "/dir/inner", "/dir/aa", "/dir/bb", "/dir/c", "/xattr"] {
        fs::write(root.join(&path[1..]), content(path))?;
    }
    for number in 0..500 {
        fs::write(root.join(format!("many/file-{number:05}")), b"")?;
    }
    fs::hard_link(root.join("dir/inner"), root.join("same"))?;
    std::os::unix::fs::symlink("dir/inner", root.join("link"))?;
    for (name, value) in [("user.aa", "one"), ("user.bb", "three")] {
        rustix::fs::lsetxattr(root.join("xattr"), name, value.as_bytes(), XattrFlags::empty())?;
    }
    Ok(())
}

impl Specimen {
    /// A good v6 image of `tree`, zstd and BLAKE3.
    ///
    /// # Panics
    /// When it cannot be built.
    pub fn v6() -> Self {
        let home = tempfile::tempdir().unwrap_or_else(|error| panic!("a temporary directory: {error}"));
        let source = home.path().join("tree");
        tree(&source).unwrap_or_else(|error| panic!("the tree of a specimen: {error}"));
        let made = make::image(&source, home.path(), Compressor::Zstd, Digester::Blake3, CHUNK_BYTES);
        let blob_id = made.blob_id.expect("the tree has data");
        let read = |path: PathBuf| fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        Self { bootstrap: read(made.bootstrap), blob: read(made.blobs.join(&blob_id)), blob_id }
    }

    /// The same as v5.
    ///
    /// # Panics
    /// When it cannot be built.
    pub fn v5() -> Self {
        let v6 = Self::v6();
        let image = v6.image();
        let bootstrap = rewrite(&image, &v6.tables()).unwrap_or_else(|error| panic!("v5: {error}"));
        Self { bootstrap, ..v6 }
    }

    /// The image, which must be a good one.
    ///
    /// # Panics
    /// When it does not open.
    pub fn image(&self) -> Image {
        let view = View::from_bytes(self.bootstrap.clone());
        Image::open(view, &OpenOptions { placeholder_id: None }).unwrap_or_else(|error| panic!("a specimen: {error}"))
    }

    /// The chunk tables of a good v6 image.
    fn tables(&self) -> Vec<BlobMeta> {
        let home = tempfile::tempdir().unwrap_or_else(|error| panic!("a temporary directory: {error}"));
        let image = self.write(home.path());
        let open = |blob| BlobFile::open(&image.blobs.join(&self.blob_id), blob).and_then(|file| file.table(blob));
        let table = |blob| open(blob).unwrap_or_else(|finding| panic!("{finding}")).expect("v6 blobs have a table");
        self.image().blobs().iter().map(table).collect()
    }

    /// Writes the image into `home`: `bootstrap` and `blobs/<id>`.
    ///
    /// # Panics
    /// When that fails.
    pub fn write(&self, home: &Path) -> TestImage {
        let (bootstrap, blobs) = (home.join("bootstrap"), home.join("blobs"));
        let written = fs::create_dir_all(&blobs)
            .and_then(|()| fs::write(&bootstrap, &self.bootstrap))
            .and_then(|()| fs::write(blobs.join(&self.blob_id), &self.blob));
        written.unwrap_or_else(|error| panic!("{home:?}: {error}"));
        TestImage { name: "hostile".to_owned(), bootstrap, blobs, folder: home.to_owned() }
    }

    /// With `bytes` at `at` of the metadata.
    fn patched(&self, at: usize, bytes: &[u8]) -> Self {
        let mut changed = self.clone();
        changed.bootstrap[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bootstrap[at..at + 4].try_into().unwrap_or_default())
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bootstrap[at..at + 8].try_into().unwrap_or_default())
    }
}

/// The inode of `path` in a good image.
fn resolve(image: &Image, path: &str) -> InodeFacts {
    let found = path
        .split('/')
        .filter(|name| !name.is_empty())
        .try_fold(image.inode(image.root()), |dir, name| Some(Ok(image.find(&dir.ok()?, name.as_bytes()).ok()??)));
    found.and_then(Result::ok).unwrap_or_else(|| panic!("{path} is not in the specimen"))
}

/// Collects cases over one good image.
struct Corpus {
    good: Specimen,
    image: Image,
    cases: Vec<Case>,
}

impl Corpus {
    fn new(good: Specimen) -> Self {
        Self { image: good.image(), good, cases: Vec::new() }
    }

    /// A row of the table: bytes in the metadata, and what a check says of them.
    fn add(&mut self, name: &str, at: usize, bytes: &[u8], fields: &'static [&'static str], path: &'static str) {
        let specimen = self.good.patched(at, bytes);
        let spared: &[&str] = if matches!(path, "/big" | "/") { &[] } else { &["/big"] };
        self.cases.push(Case { name: name.to_owned(), specimen, fields, path, spared });
    }

    /// The same for a whole specimen.
    fn add_specimen(&mut self, name: &str, specimen: Specimen, fields: &'static [&'static str], path: &'static str) {
        self.cases.push(Case { name: name.to_owned(), specimen, fields, path, spared: &[] });
    }

    /// The metadata cut to `bytes`.
    fn cut(&mut self, bytes: usize) {
        let mut specimen = self.good.clone();
        specimen.bootstrap.truncate(bytes);
        let name = format!("cut to {bytes} bytes");
        self.cases.push(Case { name, specimen, fields: &["offset"], path: "", spared: &[] });
    }
}

/// All cases.
pub fn corpus() -> Vec<Case> {
    let mut cases = v6::cases();
    cases.extend(v5::cases());
    cases.extend(blobs::cases());
    cases
}
