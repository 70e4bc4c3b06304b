//! One type over RAFS v5 and v6: metadata used in place, through a [`View`], with no heap bytes per inode.
//!
//! Opening checks the superblock and the tables; what an inode, a directory block or a chunk states is checked when it
//! is used, so opening costs the same for every size of image. A malformed image answers [`RafsError::Malformed`]
//! from the call that meets the fault; it never makes a call run longer than its metadata is long.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::RafsError;
use super::chunks::ChunkIndex;
use super::entries::Entries;
use super::facts::BlobFacts;
use super::facts::Piece;
use super::inode::InodeFacts;
use super::seek::Whence;
use crate::sys::view::View;

/// What the caller knows about an image before it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenOptions {
    /// The id of the blob that the metadata was extracted from: stands in for the placeholder id of such metadata
    /// (format, section 10.3).
    pub placeholder_id: Option<String>,
}

/// Format version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// RAFS v5.
    V5,
    /// RAFS v6, an EROFS image.
    V6,
}

/// What `statfs` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Inodes, as the superblock counts them.
    pub inodes: u64,
    /// Bytes of the uncompressed blobs together.
    pub data_bytes: u64,
}

/// An opened image. Every method may be called from any thread and takes no lock but where it says so.
#[derive(Debug)]
pub struct Image {}

impl Image {
    /// Opens the metadata in `view`, which must be the plain bootstrap (see [`super::detect`]). Checks superblock and
    /// tables, not the tree.
    ///
    /// # Errors
    /// [`RafsError::Unsupported`] names a feature that is not served; [`RafsError::PlaceholderBlobId`] when the blob id
    /// is needed; [`RafsError::Malformed`] and [`RafsError::View`] for everything that is wrong.
    pub fn open(view: View, options: &OpenOptions) -> Result<Self, RafsError> {
        let _ = (view, options);
        todo!()
    }

    /// Format version.
    pub fn version(&self) -> Version {
        todo!()
    }

    /// Inode of the root directory.
    pub fn root(&self) -> u32 {
        todo!()
    }

    /// Largest chunk of the image in bytes, a power of two.
    pub fn chunk_bytes(&self) -> u32 {
        todo!()
    }

    /// Whether `uid` and `gid` of the inodes mean something. If not (`--repeatable`), the server shows its own.
    pub fn has_owner_ids(&self) -> bool {
        todo!()
    }

    /// Whether any inode may have extended attributes.
    pub fn has_xattrs(&self) -> bool {
        todo!()
    }

    /// The blobs, in the order of the blob table.
    pub fn blobs(&self) -> &[BlobFacts] {
        todo!()
    }

    /// What `statfs` tells.
    pub fn totals(&self) -> Totals {
        todo!()
    }

    /// The inodes to fetch first, in order; a directory stands for everything below it. Empty when the image names none.
    ///
    /// # Errors
    /// An inode number out of range; a lost map.
    pub fn prefetch(&self) -> Result<Vec<u32>, RafsError> {
        todo!()
    }

    /// The attributes of an inode.
    ///
    /// # Errors
    /// [`RafsError::Malformed`] also for a number that names no inode; a lost map.
    #[inline]
    pub fn inode(&self, ino: u32) -> Result<InodeFacts, RafsError> {
        let _ = ino;
        todo!()
    }

    /// The inode that `name` names in `dir`, `.` and `..` included: a binary search.
    ///
    /// # Errors
    /// [`RafsError::NotDirectory`]; a malformed directory; a lost map.
    #[inline]
    pub fn lookup(&self, dir: &InodeFacts, name: &[u8]) -> Result<Option<u32>, RafsError> {
        let _ = (dir, name);
        todo!()
    }

    /// Lists `dir`, `.` and `..` included, from the position `from`: 0, or the `next` of an entry. Any other value is
    /// harmless and lists from somewhere, or nothing.
    ///
    /// # Errors
    /// [`RafsError::NotDirectory`]. What is wrong with the entries shows while iterating.
    #[inline]
    pub fn entries(&self, dir: &InodeFacts, from: u64) -> Result<Entries<'_>, RafsError> {
        let _ = (dir, from);
        todo!()
    }

    /// The target of a symbolic link, 1 to 4095 bytes.
    ///
    /// # Errors
    /// [`RafsError::NotSymlink`]; a malformed link; a lost map.
    pub fn symlink(&self, inode: &InodeFacts) -> Result<Vec<u8>, RafsError> {
        let _ = inode;
        todo!()
    }

    /// The names of the extended attributes with their prefixes, each followed by NUL, as `listxattr` gives them.
    ///
    /// # Errors
    /// A malformed table; a lost map.
    pub fn xattr_names(&self, inode: &InodeFacts) -> Result<Vec<u8>, RafsError> {
        let _ = inode;
        todo!()
    }

    /// The value of an extended attribute, by its name with prefix; `None` where there is none.
    ///
    /// # Errors
    /// A malformed table; a lost map.
    pub fn xattr(&self, inode: &InodeFacts, name: &[u8]) -> Result<Option<Vec<u8>>, RafsError> {
        let _ = (inode, name);
        todo!()
    }

    /// Appends the pieces of chunks that hold the bytes `range` of a regular file, in order and without gaps. The range
    /// is clipped to the file's size; a range beyond it adds nothing.
    ///
    /// # Errors
    /// [`RafsError::NotRegular`]; a malformed chunk list; a lost map. `out` then holds some of the pieces.
    #[inline]
    pub fn plan(&self, inode: &InodeFacts, range: Range<u64>, out: &mut SmallVec<[Piece; 8]>) -> Result<(), RafsError> {
        let _ = (inode, range, out);
        todo!()
    }

    /// The next data, or hole, at or behind `offset`; `None` is `ENXIO`. A hole is a run of chunks whose digest is that
    /// of zeros of their length; the end of the file is a hole. May build the chunk index ([`Image::chunk_index`]).
    ///
    /// # Errors
    /// [`RafsError::NotRegular`]; a malformed chunk list; a lost map.
    pub fn seek(&self, inode: &InodeFacts, offset: u64, whence: Whence) -> Result<Option<u64>, RafsError> {
        let _ = (inode, offset, whence);
        todo!()
    }

    /// What the image says of each chunk, found by blob and index. Built by the first call, which walks all chunk
    /// records once while other callers wait for it; the outcome, an error too, is kept.
    ///
    /// # Errors
    /// A malformed chunk; chunks that are described in two ways; a lost map.
    pub fn chunk_index(&self) -> Result<Arc<ChunkIndex>, RafsError> {
        todo!()
    }
}
