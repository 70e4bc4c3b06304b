//! From the file of `--bootstrap` to metadata in memory: a plain bootstrap, one inlined in a blob, or an OCI bootstrap
//! layer.
//!
//! Mode `direct` maps the file; `cached` holds a copy that later changes of the file do not reach. What has to be
//! decompressed is a copy in both.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use rustix::fs::OFlags;

use crate::config::Mode;
use crate::limits::MAX_BOOTSTRAP_BYTES;
use crate::rafs::RafsError;
use crate::rafs::detect;
use crate::rafs::detect::Content;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;
use crate::rafs::image::Image;
use crate::rafs::image::OpenOptions as ImageOptions;
use crate::rafs::toc::Section;
use crate::storage::codec;
use crate::storage::codec::CodecError;
use crate::sys::view::View;
use crate::sys::view::ViewError;

/// Why a file is no metadata that can be served.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// It cannot be opened, read or mapped.
    #[error("cannot be read")]
    Io(#[from] io::Error),
    /// It is a directory, a device or the like.
    #[error("not a regular file")]
    NotAFile,
    /// It holds no metadata.
    #[error(
        "wrong magic number at offset 0x0: neither RAFS v5, RAFS v6, a blob with metadata nor a bootstrap layer; is it the right file, and complete?"
    )]
    Unknown,
    /// The metadata is larger than any image's.
    #[error("more than {MAX_BOOTSTRAP_BYTES} bytes of metadata")]
    TooLarge,
    /// It was truncated while it was read.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The compressed metadata inside it is damaged.
    #[error("metadata at offset {offset:#x} is damaged")]
    Section {
        /// Where it is stored in the file.
        offset: u64,
        /// What is wrong.
        source: CodecError,
    },
    /// The metadata is malformed, or has features that are not served.
    #[error("{}", advice(.0))]
    Rafs(#[from] RafsError),
}

/// What to do about metadata that cannot be used.
fn advice(error: &RafsError) -> &'static str {
    match error {
        RafsError::Unknown { .. } | RafsError::Unsupported(_) => {
            "cannot be served, make the image without this feature"
        }
        RafsError::PlaceholderBlobId { .. } => "cannot be served, give it the name that is the blob's id",
        _ => "damaged or cut short, fetch or build it again",
    }
}

/// Opens the image whose metadata is in the file `path`.
///
/// # Errors
/// [`BootstrapError`].
pub fn open(path: &Path, mode: Mode) -> Result<Image, BootstrapError> {
    let view = metadata(path, mode)?;
    // The name up to the first dot is the blob's id where the metadata was inlined in a blob, and does not know it.
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let id = name.split('.').next().filter(|id| !id.is_empty());
    Ok(Image::open(view, &ImageOptions { placeholder_id: id.map(str::to_owned) })?)
}

/// The plain bootstrap in the file `path`.
fn metadata(path: &Path, mode: Mode) -> Result<View, BootstrapError> {
    // NONBLOCK: a fifo must not hold us up before we see what it is.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(BootstrapError::NotAFile);
    }
    let whole = View::map_file(file.as_fd(), about.len())?;
    match detect::detect(&whole)? {
        Content::Bootstrap(_) => match mode {
            Mode::Direct => Ok(whole),
            Mode::Cached if whole.len() > MAX_BOOTSTRAP_BYTES => Err(BootstrapError::TooLarge),
            Mode::Cached => Ok(View::sealed_copy(file.as_fd(), about.len())?),
        },
        Content::Inside(section) => extract(&whole, &section, mode),
        Content::Gzip => inside_layer(&file),
        Content::Other => Err(BootstrapError::Unknown),
    }
}

/// The metadata in a gzip compressed bootstrap layer.
fn inside_layer(file: &File) -> Result<View, BootstrapError> {
    let mut plain = Vec::new();
    // The layer holds little beside the metadata.
    let room = MAX_BOOTSTRAP_BYTES + (MAX_BOOTSTRAP_BYTES >> 4);
    MultiGzDecoder::new(file).take(room + 1).read_to_end(&mut plain)?;
    if plain.len() as u64 > room {
        return Err(BootstrapError::TooLarge);
    }
    let whole = View::from_bytes(plain);
    match detect::detect(&whole)? {
        Content::Bootstrap(_) => Ok(whole),
        // Already a copy: a part of it is one as well.
        Content::Inside(section) => extract(&whole, &section, Mode::Direct),
        Content::Gzip | Content::Other => Err(BootstrapError::Unknown),
    }
}

fn extract(whole: &View, section: &Section, mode: Mode) -> Result<View, BootstrapError> {
    if section.uncompressed_bytes > MAX_BOOTSTRAP_BYTES || section.compressed_bytes > MAX_BOOTSTRAP_BYTES {
        return Err(BootstrapError::TooLarge);
    }
    let stored = section.offset..section.offset.saturating_add(section.compressed_bytes);
    if section.compressor == Compressor::None && section.sha256.is_none() && mode == Mode::Direct {
        return Ok(whole.slice(stored)?);
    }
    let damaged = |source| BootstrapError::Section { offset: section.offset, source };
    let bytes = whole.vec_at(section.offset, section.compressed_bytes)?;
    let plain = if section.compressor == Compressor::None {
        bytes
    } else {
        let mut plain = vec![0; section.uncompressed_bytes as usize];
        codec::decode(section.compressor, &bytes, &mut plain).map_err(damaged)?;
        plain
    };
    if let Some(expected) = section.sha256
        && codec::digest(Digester::Sha256, &plain) != expected
    {
        return Err(damaged(CodecError::Digest));
    }
    // Where the file itself can be used it is, now that it was verified: its metadata needs no memory of ours.
    match (section.compressor, mode) {
        (Compressor::None, Mode::Direct) => Ok(whole.slice(stored)?),
        _ => Ok(View::from_bytes(plain)),
    }
}
