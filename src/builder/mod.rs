//! The other way: a directory becomes a RAFS v6 image, that is a bootstrap and one data blob.
//!
//! Two passes over the source. The first (`scan`) reads names, attributes, xattrs and link targets into a flat
//! `tree::Tree`; the second (`data`) streams file contents, one chunk at a time, into the blob (`blob`). Then
//! `layout` gives every inode its place and `bootstrap` writes the metadata. File contents are never held beyond
//! one chunk, and outputs appear under their names only when they are complete (`output`).
//!
//! The same source gives the same bytes: children and xattrs are sorted, and nothing depends on time, on the order of
//! a directory or on the address of a hash.
//!
//! What it must not know: how images are served. The format is the format document's, sections 4 to 6; where that
//! leaves freedom (order of inodes, gaps filled, chunks shared) the choices are those of `nydus-image` 2.4.4, so that
//! equal options give equal files. One difference is on purpose: xattrs are sorted. Any inode but a directory that has
//! several names in the source has several names in the image, not only regular files.

mod blob;
mod bootstrap;
mod codec;
mod data;
mod dirent;
mod layout;
mod output;
mod scan;
mod tree;
mod wire;
mod xattr;

use std::io;
use std::path::Path;
use std::path::PathBuf;

use crate::limits::MAX_CHUNK_BYTES;
use crate::limits::MIN_CHUNK_BYTES;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;

/// Largest uncompressed size of a chunk: a power of two that the format allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkBytes(u32);

impl ChunkBytes {
    /// What is used when nothing is said, as upstream.
    pub const DEFAULT: Self = Self(1 << 20);

    /// `None` unless `bytes` is a power of two between 4 KiB and 16 MiB.
    pub fn new(bytes: u32) -> Option<Self> {
        let in_range = (MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&bytes);
        (in_range && bytes.is_power_of_two()).then_some(Self(bytes))
    }

    /// The number of bytes.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// Where an output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// This very file; a regular file of that name is replaced.
    File(PathBuf),
    /// Into this directory, under the SHA-256 of its content.
    Directory(PathBuf),
}

/// How an image is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How chunks are compressed; [`Compressor::Gzip`] cannot be chosen.
    pub compressor: Compressor,
    /// How chunks are digested.
    pub digester: Digester,
    /// Size of every chunk but the last of a file.
    pub chunk_bytes: ChunkBytes,
    /// Where the metadata goes.
    pub bootstrap: Target,
    /// Where the data goes. Nothing is written there when the source has no file data.
    pub blob: Target,
}

/// A blob that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltBlob {
    /// SHA-256 of the file, in lower-case hex.
    pub id: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Size of its data when uncompressed, each chunk rounded up to 4096.
    pub uncompressed_bytes: u64,
    /// Distinct chunks in it.
    pub chunks: u32,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// Where the metadata is.
    pub bootstrap: PathBuf,
    /// The data; `None` when no file has any.
    pub blob: Option<BuiltBlob>,
    /// Paths in the image, the root included.
    pub paths: u64,
    /// Bytes of all files, each counted once however many names it has.
    pub data_bytes: u64,
}

/// What the builder is doing, told as it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Paths found so far; more may come.
    Scanning {
        /// Number of paths.
        paths: u64,
    },
    /// The source is known completely; its data is read next.
    Scanned {
        /// Number of paths.
        paths: u64,
        /// Bytes of file data to read.
        data_bytes: u64,
    },
    /// This much more file data was read and stored.
    Stored {
        /// Bytes since the last such event.
        data_bytes: u64,
    },
    /// All data is stored; the bootstrap is being written.
    Metadata,
}

/// Why an image could not be built. Nothing is left under the names of the outputs then, except a blob that was
/// complete before the bootstrap failed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The operating system refused.
    #[error("cannot {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// A file of the source was written to, replaced or cut while it was read.
    #[error("{0:?} changed while it was read, build again when nothing writes to it")]
    Changed(PathBuf),
    /// The source must be a directory.
    #[error("{0:?} is not a directory")]
    NotADirectory(PathBuf),
    /// The directory for an output is missing.
    #[error("the directory {0:?} does not exist, make it first (mkdir -p)")]
    NoDirectory(PathBuf),
    /// An output exists and cannot be replaced by renaming.
    #[error("{0:?} exists and is not a regular file")]
    NotReplaceable(PathBuf),
    /// Something that the format cannot express.
    #[error("{path:?}: {what}, RAFS v6 can hold {limit}")]
    Format {
        /// The file of the source, or the output.
        path: PathBuf,
        /// What it has.
        what: String,
        /// What would be possible.
        limit: String,
    },
    /// A compressor failed, which it does not unless memory is short.
    #[error("cannot compress a chunk of {path:?}")]
    Compress {
        /// The file it was read from.
        path: PathBuf,
        /// What the compressor said.
        #[source]
        source: io::Error,
    },
}

impl BuildError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    fn format(path: &Path, what: impl Into<String>, limit: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), what: what.into(), limit: limit.into() }
    }
}

/// Builds an image of the directory `source`, which must not change meanwhile. Blocks until all is written; tells
/// `progress` what it does, on this thread.
///
/// # Errors
/// See [`BuildError`]; each names the file concerned.
pub fn create(source: &Path, options: &Options, progress: &mut dyn FnMut(Progress)) -> Result<Built, BuildError> {
    let source = source.canonicalize().map_err(BuildError::io("open", source))?;
    let mut tree = scan::scan(&source, progress)?;
    let data_bytes = tree.data_bytes();
    progress(Progress::Scanned { paths: tree.nodes.len() as u64, data_bytes });

    let blob = data::store(&source, &mut tree, options, progress)?;
    progress(Progress::Metadata);

    let bootstrap = bootstrap::write(&tree, blob.as_ref(), options)?;
    Ok(Built { bootstrap, blob: blob.map(|blob| blob.built), paths: tree.nodes.len() as u64, data_bytes })
}
