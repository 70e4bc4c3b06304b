//! One type over RAFS v5 and v6: metadata used in place, through a [`View`], with no heap bytes per inode.
//!
//! Opening checks the superblock and the tables; what an inode, a directory block or a chunk states is checked when it
//! is used, so opening costs the same for every size of image. A malformed image answers [`RafsError::Malformed`]
//! from the call that meets the fault; it never makes a call run longer than its metadata is long.

use std::ops::ControlFlow;
use std::ops::Range;
use std::sync::Arc;
use std::sync::OnceLock;

use smallvec::SmallVec;

use super::RafsError;
use super::chunks::ChunkIndex;
use super::facts::BlobFacts;
use super::facts::Piece;
use super::grid;
use super::inode::EachXattr;
use super::inode::InodeFacts;
use super::inode::Kind;
use super::listing::Cursor;
use super::listing::Entries;
use super::malformed;
use super::place::Place;
use super::seek::Whence;
use super::seek::ZeroDigests;
use super::v5;
use super::v5::V5;
use super::v6;
use super::v6::V6;
use super::version::Version;
use crate::limits;
use crate::sys::view::View;

/// What the caller knows about an image before it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenOptions {
    /// The id of the blob that the metadata was extracted from: stands in for the placeholder id of such metadata
    /// (format, section 10.3).
    pub placeholder_id: Option<String>,
}

/// What `statfs` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Inodes, as the superblock counts them.
    pub inodes: u64,
    /// Bytes of the uncompressed blobs together.
    pub data_bytes: u64,
}

/// An opened image. Every method may be called from any thread; none takes a lock but where it says so.
#[derive(Debug)]
pub struct Image {
    pub(super) format: Format,
    chunk_index: OnceLock<Result<Arc<ChunkIndex>, RafsError>>,
    zeros: ZeroDigests,
}

#[derive(Debug)]
pub(super) enum Format {
    V5(V5),
    V6(V6),
}

impl Image {
    /// Opens the metadata in `view`, which must be the plain bootstrap (see [`super::detect`]). Checks superblock and
    /// tables, not the tree.
    ///
    /// # Errors
    /// [`RafsError::Unknown`] names what only other tools read; [`RafsError::PlaceholderBlobId`] when the blob id
    /// is needed; [`RafsError::Malformed`] and [`RafsError::View`] for everything that is wrong.
    pub fn open(view: View, options: &OpenOptions) -> Result<Self, RafsError> {
        if view.len() > limits::MAX_BOOTSTRAP_BYTES {
            return Err(malformed("bootstrap size", 0, format!("{} bytes, at most 2 GiB", view.len())));
        }
        let placeholder_id = options.placeholder_id.as_deref();
        let format = match super::detect::version(&view)? {
            Some(Version::V5) => Format::V5(V5::open(view, placeholder_id)?),
            Some(Version::V6) => Format::V6(V6::open(view, placeholder_id)?),
            None => return Err(malformed("superblock magic", 0, "neither RAFS v5 nor RAFS v6")),
        };
        Ok(Self { format, chunk_index: OnceLock::new(), zeros: ZeroDigests::new() })
    }

    /// Format version.
    pub fn version(&self) -> Version {
        match &self.format {
            Format::V5(_) => Version::V5,
            Format::V6(_) => Version::V6,
        }
    }

    /// Inode of the root directory.
    pub fn root(&self) -> u32 {
        match &self.format {
            Format::V5(_) => v5::ROOT,
            Format::V6(image) => image.root,
        }
    }

    /// Largest chunk of the image in bytes, a power of two.
    pub fn chunk_bytes(&self) -> u32 {
        match &self.format {
            Format::V5(image) => image.chunk_bytes,
            Format::V6(image) => image.chunk_bytes,
        }
    }

    /// Whether `uid` and `gid` of the inodes mean something. If not (`--repeatable`), the server shows its own.
    pub fn has_owner_ids(&self) -> bool {
        self.flags().has_owner_ids
    }

    /// Whether any inode may have extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.flags().has_xattrs
    }

    fn flags(&self) -> &super::blob::Flags {
        match &self.format {
            Format::V5(image) => &image.flags,
            Format::V6(image) => &image.flags,
        }
    }

    /// The blobs, in the order of the blob table.
    pub fn blobs(&self) -> &[BlobFacts] {
        match &self.format {
            Format::V5(image) => &image.blobs,
            Format::V6(image) => &image.blobs,
        }
    }

    /// What `statfs` tells.
    pub fn totals(&self) -> Totals {
        let inodes = match &self.format {
            Format::V5(image) => image.inodes,
            Format::V6(image) => image.inodes,
        };
        let data_bytes = self.blobs().iter().fold(0u64, |sum, blob| sum.saturating_add(blob.uncompressed_bytes));
        Totals { inodes, data_bytes }
    }

    /// The inodes to fetch first, in order; a directory stands for everything below it. Empty when the image names none.
    ///
    /// # Errors
    /// An inode number out of range; a lost map.
    pub fn prefetch(&self) -> Result<Vec<u32>, RafsError> {
        match &self.format {
            Format::V5(image) => image.prefetch(),
            Format::V6(image) => image.prefetch(),
        }
    }

    /// The attributes of an inode.
    ///
    /// # Errors
    /// [`RafsError::Malformed`] also for a number that names no inode; a lost map.
    #[inline]
    pub fn inode(&self, ino: u32) -> Result<InodeFacts, RafsError> {
        match &self.format {
            Format::V5(image) => image.inode(ino),
            Format::V6(image) => image.inode(ino),
        }
    }

    /// The inode that `name` names in `dir`, as [`Image::find`] finds it.
    ///
    /// # Errors
    /// Those of [`Image::find`].
    pub fn lookup(&self, dir: &InodeFacts, name: &[u8]) -> Result<Option<u32>, RafsError> {
        Ok(self.find(dir, name)?.map(|inode| inode.ino))
    }

    /// The attributes of what `name` names in `dir`, `.` and `..` included: a binary search.
    ///
    /// # Errors
    /// [`RafsError::NotDirectory`]; a malformed directory or inode; a lost map.
    #[inline]
    pub fn find(&self, dir: &InodeFacts, name: &[u8]) -> Result<Option<InodeFacts>, RafsError> {
        if dir.kind != Kind::Directory {
            return Err(RafsError::NotDirectory);
        }
        match (&self.format, &dir.place) {
            (Format::V5(image), Place::V5(place)) => image.find(dir.ino, place, name),
            (Format::V6(image), Place::V6(place)) => image.find(place, dir.size, name),
            _ => Err(other_image()),
        }
    }

    /// Lists `dir`, `.` and `..` included, from the position `from`: 0, or the `next` of an entry. Any other value is
    /// harmless and lists from somewhere, or nothing.
    ///
    /// # Errors
    /// [`RafsError::NotDirectory`]. What is wrong with the entries shows while iterating.
    #[inline]
    pub fn entries(&self, dir: &InodeFacts, from: u64) -> Result<Entries<'_>, RafsError> {
        if dir.kind != Kind::Directory {
            return Err(RafsError::NotDirectory);
        }
        let cursor = match (&self.format, dir.place) {
            (Format::V5(image), Place::V5(place)) => Cursor::V5(v5::dir::Cursor::new(image, dir.ino, place, from)),
            (Format::V6(image), Place::V6(place)) => {
                Cursor::V6(v6::dir::Cursor::new(image, dir.ino, place, dir.size, from))
            }
            _ => return Err(other_image()),
        };
        Ok(Entries { cursor })
    }

    /// The target of a symbolic link, 1 to 4095 bytes.
    ///
    /// # Errors
    /// [`RafsError::NotSymlink`]; a malformed link; a lost map.
    pub fn symlink(&self, inode: &InodeFacts) -> Result<Vec<u8>, RafsError> {
        if inode.kind != Kind::Symlink {
            return Err(RafsError::NotSymlink);
        }
        match (&self.format, &inode.place) {
            (Format::V5(image), Place::V5(place)) => image.symlink(place, inode.size),
            (Format::V6(image), Place::V6(place)) => image.symlink(place, inode.size),
            _ => Err(other_image()),
        }
    }

    /// The names of the extended attributes with their prefixes, each followed by NUL, as `listxattr` gives them.
    ///
    /// # Errors
    /// A malformed table; a lost map.
    pub fn xattr_names(&self, inode: &InodeFacts) -> Result<Vec<u8>, RafsError> {
        let mut names = Vec::new();
        self.for_each_xattr(inode, &mut |name, _| {
            names.extend_from_slice(name);
            names.push(0);
            ControlFlow::Continue(())
        })?;
        Ok(names)
    }

    /// The value of an extended attribute, by its name with prefix; `None` where there is none.
    ///
    /// # Errors
    /// A malformed table; a lost map.
    pub fn xattr(&self, inode: &InodeFacts, name: &[u8]) -> Result<Option<Vec<u8>>, RafsError> {
        let mut found = None;
        self.for_each_xattr(inode, &mut |candidate, value| {
            if candidate == name {
                found = Some(value);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        let Some(value) = found else { return Ok(None) };
        Ok(Some(self.view().vec_at(value.start, value.end.saturating_sub(value.start))?))
    }

    pub(super) fn for_each_xattr(&self, inode: &InodeFacts, each: &mut EachXattr<'_>) -> Result<(), RafsError> {
        match (&self.format, &inode.place) {
            (Format::V5(image), Place::V5(place)) => image.for_each_xattr(place, each),
            (Format::V6(image), Place::V6(place)) => image.for_each_xattr(place, each),
            _ => Err(other_image()),
        }
    }

    /// Appends the pieces of chunks that hold the bytes `range` of a regular file, in order and without gaps. The range
    /// is clipped to the file's size; a range beyond it adds nothing.
    ///
    /// # Errors
    /// [`RafsError::NotRegular`]; a malformed chunk list; a lost map. `out` then holds some of the pieces.
    #[inline]
    pub fn plan(&self, inode: &InodeFacts, range: Range<u64>, out: &mut SmallVec<[Piece; 8]>) -> Result<(), RafsError> {
        if inode.kind != Kind::Regular {
            return Err(RafsError::NotRegular);
        }
        let end = range.end.min(inode.size);
        if range.start >= end {
            return Ok(());
        }
        match (&self.format, &inode.place) {
            (Format::V5(image), Place::V5(place)) => {
                let chunks = image.chunk_list(place, inode.size)?;
                let chunk = |number| {
                    let chunk = chunks.get(number)?;
                    Ok((chunk.blob, chunk.index, chunk.facts.uncompressed_offset))
                };
                cut(range.start..end, place.chunk_bytes, chunk, out)
            }
            (Format::V6(image), Place::V6(place)) => {
                let chunk = |number| {
                    let chunk = image.file_chunk(place, inode.size, number)?;
                    Ok((chunk.blob, chunk.index, chunk.offset))
                };
                if image.flags.is_tarfs {
                    let mut ranges = SmallVec::new();
                    cut(range.start..end, image.chunk_bytes, chunk, &mut ranges)?;
                    return ranges
                        .iter()
                        .try_for_each(|piece| grid::cut(piece, image.chunk_bytes, |piece| out.push(piece)));
                }
                cut(range.start..end, image.chunk_bytes, chunk, out)
            }
            _ => Err(other_image()),
        }
    }

    /// The next data, or hole, at or behind `offset`; `None` is `ENXIO`. A hole is a run of chunks whose digest is that
    /// of zeros of their length; the end of the file is a hole. May build the chunk index ([`Image::chunk_index`]), and
    /// takes a short lock for digests of zeros.
    ///
    /// # Errors
    /// [`RafsError::NotRegular`]; a malformed chunk list; a lost map.
    pub fn seek(&self, inode: &InodeFacts, offset: u64, whence: Whence) -> Result<Option<u64>, RafsError> {
        if inode.kind != Kind::Regular {
            return Err(RafsError::NotRegular);
        }
        let chunk_bytes = u64::from(match &inode.place {
            Place::V5(place) => place.chunk_bytes,
            Place::V6(_) => self.chunk_bytes(),
        });
        let wants_hole = whence == Whence::Hole;
        let mut at = offset;
        while at < inode.size {
            let number = at.wrapping_shr(chunk_bytes.trailing_zeros());
            let start = number.saturating_mul(chunk_bytes);
            let len = inode.size.saturating_sub(start).min(chunk_bytes);
            if self.is_zero(inode, number, len)? == wants_hole {
                return Ok(Some(at));
            }
            at = start.saturating_add(len);
        }
        Ok((wants_hole && offset < inode.size).then_some(inode.size))
    }

    /// Whether the digest of chunk `number` of a file tells that its `len` bytes are zeros.
    fn is_zero(&self, inode: &InodeFacts, number: u64, len: u64) -> Result<bool, RafsError> {
        let (blob, digest) = match (&self.format, &inode.place) {
            (Format::V5(image), Place::V5(place)) => {
                let chunk = image.chunk_list(place, inode.size)?.get(number)?;
                (chunk.blob, chunk.facts.digest)
            }
            (Format::V6(image), Place::V6(place)) => {
                let chunk = image.file_chunk(place, inode.size, number)?;
                (chunk.blob, self.chunk_index()?.digest(chunk.blob, chunk.index)?)
            }
            _ => return Err(other_image()),
        };
        let digester = usize::try_from(blob).ok().and_then(|blob| self.blobs().get(blob)).map(|blob| blob.digester);
        let (Some(digest), Some(digester)) = (digest, digester) else { return Ok(false) };
        Ok(digest == self.zeros.digest(digester, len))
    }

    /// What the image says of each chunk, found by blob and index. Built by the first call, which walks all chunk
    /// records once while other callers wait for it; the outcome, an error too, is kept.
    ///
    /// # Errors
    /// A malformed chunk; chunks that are described in two ways; a lost map.
    pub fn chunk_index(&self) -> Result<Arc<ChunkIndex>, RafsError> {
        let built = self.chunk_index.get_or_init(|| match &self.format {
            Format::V5(image) => image.chunk_index().map(Arc::new),
            Format::V6(image) => image.chunk_index().map(Arc::new),
        });
        built.clone()
    }

    /// Verifies the digests of all inodes of a v5 image from the root downwards: proves directory structure, link
    /// targets and chunk digests, not names and attributes. v6 has no such digests, and passes.
    ///
    /// # Errors
    /// [`RafsError::Malformed`] at the first inode whose digest is wrong.
    pub fn verify_tree(&self) -> Result<(), RafsError> {
        match &self.format {
            Format::V5(image) => image.verify_tree(),
            Format::V6(_) => Ok(()),
        }
    }

    pub(super) fn view(&self) -> &View {
        match &self.format {
            Format::V5(image) => &image.view,
            Format::V6(image) => &image.view,
        }
    }
}

/// Cuts `range` of a file at the borders of its chunks of `chunk_bytes`. `chunk` tells blob, index and offset of a chunk, by
/// its number in the file.
#[inline]
fn cut(
    range: Range<u64>,
    chunk_bytes: u32,
    chunk: impl Fn(u64) -> Result<(u32, u32, u64), RafsError>,
    out: &mut SmallVec<[Piece; 8]>,
) -> Result<(), RafsError> {
    let shift = chunk_bytes.trailing_zeros();
    let chunk_bytes = u64::from(chunk_bytes);
    let mut at = range.start;
    while at < range.end {
        let number = at.wrapping_shr(shift);
        let skip = at & chunk_bytes.wrapping_sub(1);
        let len = range.end.wrapping_sub(at).min(chunk_bytes.wrapping_sub(skip));
        let (blob, chunk, start) = chunk(number)?;
        out.push(Piece {
            blob,
            chunk,
            // The chunk lies inside its blob, which was checked, and `skip` inside the chunk.
            offset: start.wrapping_add(skip),
            len: u32::try_from(len).unwrap_or(u32::MAX),
        });
        // `len` is at least 1 and ends at the range's end at the latest.
        at = at.wrapping_add(len);
    }
    Ok(())
}

/// Facts were given to an image they do not come from.
#[cold]
fn other_image() -> RafsError {
    malformed("inode", 0, "belongs to an image of another version")
}
