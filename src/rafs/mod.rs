//! RAFS on-disk formats: bytes to facts and read plans. Pure: no I/O, no threads, no clock, no unsafe.
//!
//! Everything read here is hostile until checked, and checked where it is used: the bytes live in a file map that can
//! change between two looks, so a check made when an image was opened proves nothing later. All numbers of the format
//! are combined with checked arithmetic. Sections and rules named in comments are those of the project's description of
//! the format (`rafs-format`), which follows nydus v2.4.4 and Linux 6.18 EROFS.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

mod blob;
pub mod check;
pub mod chunks;
pub mod detect;
pub mod entries;
pub mod facts;
pub mod image;
pub mod inode;
pub mod meta;
#[cfg(test)]
#[cfg(feature = "testing")]
mod reference_tests;
pub mod seek;
mod tar;
#[cfg(test)]
mod test_images;
#[cfg(test)]
mod tests;
pub mod toc;
mod v5;
mod v6;

use std::cmp::Ordering;

use crate::sys::view::View;

/// What is wrong with an image, or with a question to it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RafsError {
    /// Bytes beyond the end of the metadata, or lost with its file.
    #[error("metadata cannot be read")]
    View(#[from] crate::sys::view::ViewError),
    /// A field that breaks the format's rules.
    #[error("{field} at offset {offset:#x}: {reason}")]
    Malformed {
        /// The field, as the format document names it.
        field: &'static str,
        /// Where it is.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A feature of the format that is not served yet.
    #[error("{0} is not supported yet")]
    Unsupported(&'static str),
    /// The metadata was inlined in a blob, and does not know that blob's id.
    #[error("the metadata comes from a blob whose id must be given (blob {index} has the placeholder id)")]
    PlaceholderBlobId {
        /// Position in the blob table.
        index: u32,
    },
    /// The inode is not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// The inode is not a symbolic link.
    #[error("not a symbolic link")]
    NotSymlink,
    /// The inode is not a regular file.
    #[error("not a regular file")]
    NotRegular,
}

/// A broken rule: `field` at `offset` in the metadata.
#[cold]
fn malformed(field: &'static str, offset: u64, reason: impl Into<String>) -> RafsError {
    RafsError::Malformed { field, offset, reason: reason.into() }
}

/// `value` rounded up to a multiple of `unit`, a power of two; `None` on overflow.
#[inline]
fn align_up(value: u64, unit: u64) -> Option<u64> {
    let mask = unit.wrapping_sub(1);
    value.checked_add(mask).map(|sum| sum & !mask)
}

/// Whether `name` may stand in a directory: 1 to 255 bytes without `/` and NUL. `.` and `..` are up to the caller.
#[inline]
fn is_legal_name(name: &[u8]) -> bool {
    // No early exit, so that it runs on vectors: names are short.
    let bad = name.iter().fold(false, |bad, &byte| bad | (byte == b'/') | (byte == 0));
    !name.is_empty() && name.len() <= crate::limits::MAX_NAME_BYTES && !bad
}

/// Orders the name of `len` bytes at `at` against `name`. Most names are short, and take one copy to a small buffer.
#[inline]
fn compare_name(view: &View, at: u64, len: u64, name: &[u8]) -> Result<Ordering, RafsError> {
    let mut buffer = [0u8; 32];
    match usize::try_from(len).ok().and_then(|len| buffer.get_mut(..len)) {
        Some(short) => {
            view.copy_at(at, short)?;
            Ok((*short).cmp(name))
        }
        None => Ok(view.compare_at(at, len, name)?),
    }
}

/// Checks that no two of the named parts overlap (section 14, rule 1). Empty parts overlap nothing.
fn check_disjoint(parts: &mut Vec<(&'static str, std::ops::Range<u64>)>) -> Result<(), RafsError> {
    parts.retain(|(_, range)| !range.is_empty());
    parts.sort_by_key(|(_, range)| range.start);
    for pair in parts.windows(2) {
        if let [(first, before), (second, after)] = pair
            && after.start < before.end
        {
            return Err(malformed(second, after.start, format!("overlaps the {first}")));
        }
    }
    Ok(())
}

/// The range of `len` bytes at `start`, which must lie inside a file of `file_bytes` (section 14, rule 1).
fn part(field: &'static str, start: u64, len: u64, file_bytes: u64) -> Result<std::ops::Range<u64>, RafsError> {
    match start.checked_add(len) {
        Some(end) if end <= file_bytes => Ok(start..end),
        _ => Err(malformed(field, start, format!("{len} bytes reach beyond the end of the metadata ({file_bytes})"))),
    }
}
