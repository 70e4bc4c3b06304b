//! What a metadata file is (format, section 2).

use super::NEWER_TOOLS;
use super::RafsError;
use super::tar;
use super::toc;
use super::toc::Section;
use super::unknown;
use super::version;
use super::version::Version;
use crate::limits;
use crate::sys::view::View;
use crate::sys::view::ViewError;

/// First bytes of gzip.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Readers of versions before RAFS v5.
const OLDER_TOOLS: &str = "tools older than nydus v2 only";

/// The bootstrap in an OCI bootstrap layer.
const LAYER_MEMBER: &[u8] = b"image/image.boot";

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A plain bootstrap, ready for [`super::image::Image::open`].
    Bootstrap(Version),
    /// A bootstrap in a part of the file: inlined in a blob, or the member `image/image.boot` of an OCI bootstrap layer
    /// that is a plain tar.
    Inside(Section),
    /// gzip, probably an OCI bootstrap layer: decompress it and ask again.
    Gzip,
    /// None of these: perhaps a blob without metadata.
    Other,
}

/// Tells what `file`, a whole file, holds. The tail comes first: an inlined blob without chunks starts with a
/// superblock.
///
/// # Errors
/// A tail that is broken; a lost map.
pub fn detect(file: &View) -> Result<Content, RafsError> {
    if let Some(section) = toc::find_bootstrap(file)? {
        return Ok(Content::Inside(section));
    }
    if let Some(version) = version(file)? {
        return Ok(Content::Bootstrap(version));
    }
    if within(file.array_at(0))? == Some(GZIP_MAGIC) {
        return Ok(Content::Gzip);
    }
    Ok(find_member(file)?.map_or(Content::Other, Content::Inside))
}

/// The version of a plain bootstrap, by its magic numbers.
pub(super) fn version(file: &View) -> Result<Option<Version>, RafsError> {
    if within(file.u32_at(0))? == Some(version::V5_MAGIC) {
        return match within(file.u32_at(4))? {
            Some(version::V5_VERSION) => Ok(Some(Version::V5)),
            Some(other) => {
                let readers = if other < version::V5_VERSION { OLDER_TOOLS } else { NEWER_TOOLS };
                Err(unknown(format!("RAFS version {other:#x}"), "the image", readers))
            }
            None => Ok(None),
        };
    }
    if within(file.u32_at(version::SUPERBLOCK))? == Some(version::EROFS_MAGIC)
        && within(file.u32_at(version::FEATURES))?.is_some_and(|features| features & version::RAFS_FEATURE != 0)
    {
        return Ok(Some(Version::V6));
    }
    Ok(None)
}

/// `None` for what lies beyond the end of a short file.
fn within<T>(read: Result<T, ViewError>) -> Result<Option<T>, ViewError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(ViewError::OutOfBounds { .. }) => Ok(None),
        Err(ViewError::Lost) => Err(ViewError::Lost),
    }
}

/// The bootstrap in a plain tar.
fn find_member(file: &View) -> Result<Option<Section>, RafsError> {
    let mut at = 0u64;
    for _ in 0..limits::MAX_LAYER_MEMBERS {
        let Some(header) = within(file.array_at(at))? else { break };
        let Some(member) = tar::parse(&header) else { break };
        let offset = at.saturating_add(tar::HEADER_BYTES);
        let name = member.name.strip_prefix(b"./").unwrap_or(&member.name);
        if member.is_file && name == LAYER_MEMBER {
            super::part("image/image.boot", offset, member.bytes, file.len())?;
            return Ok(Some(Section::plain(offset, member.bytes)));
        }
        let Some(padded) = super::align_up(member.bytes, tar::HEADER_BYTES) else { break };
        at = offset.saturating_add(padded);
    }
    Ok(None)
}
