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
mod grid;
pub mod image;
pub mod inode;
pub mod listing;
pub mod meta;
mod place;
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
pub mod version;

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
    /// A flag, version or algorithm that is not known here, or that no reader knows.
    #[error("{what} of {subject} can be read by {readers}")]
    Unknown {
        /// The field, as the format document names it, and its value.
        what: String,
        /// The image, or the id of the blob that has it.
        subject: String,
        /// Which tools know it.
        readers: &'static str,
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

/// Readers of what came up after this reader was written.
const NEWER_TOOLS: &str = "tools newer than nydus v2.4.4 only";
/// Readers of what tools can write or have numbers for, and refuse to read.
const NO_TOOLS: &str = "no tools of nydus up to v2.4.4";

/// A value that only `readers` know.
#[cold]
fn unknown(what: impl Into<String>, subject: impl Into<String>, readers: &'static str) -> RafsError {
    RafsError::Unknown { what: what.into(), subject: subject.into(), readers }
}

/// Chunks of a file of `size` bytes. `chunk_bytes` is a power of two, checked when the image was opened, which saves a
/// division for every inode.
#[inline]
fn count_chunks(size: u64, chunk_bytes: u32) -> u64 {
    let full = size.wrapping_shr(chunk_bytes.trailing_zeros());
    let rest = size & u64::from(chunk_bytes).wrapping_sub(1);
    full.saturating_add(u64::from(rest != 0))
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
    // Eight bytes at a time, the last eight perhaps twice, and no early exit: names are short.
    let bad = match name.last_chunk::<8>() {
        Some(last) => {
            let (words, _) = name.as_chunks::<8>();
            words.iter().fold(illegal_bytes(u64::from_le_bytes(*last)), |bad, word| {
                bad | illegal_bytes(u64::from_le_bytes(*word))
            }) != 0
        }
        None => name.iter().any(|byte| matches!(byte, b'/' | 0)),
    };
    !name.is_empty() && name.len() <= crate::limits::MAX_NAME_BYTES && !bad
}

/// Not 0 if a byte of `word` is `/` or NUL.
#[inline]
fn illegal_bytes(word: u64) -> u64 {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const SLASHES: u64 = u64::from_ne_bytes([b'/'; 8]);
    // The lowest zero byte borrows into its top bit; bytes with the top bit set are none.
    let zero_bytes = |word: u64| word.wrapping_sub(ONES) & !word & (ONES << 7);
    zero_bytes(word) | zero_bytes(word ^ SLASHES)
}

/// A name that is looked for, ready to be compared with many. Most names differ in their first bytes, which are
/// compared as numbers.
#[derive(Debug, Clone, Copy)]
struct Needle<'a> {
    name: &'a [u8],
    /// Its first bytes, the first one highest; zeros where it ends.
    words: [u64; NEEDLE_WORDS],
}

/// Words of a [`Needle`]: 32 bytes, more than most names have.
const NEEDLE_WORDS: usize = 4;
const WORD_BYTES: u64 = size_of::<u64>() as u64;

impl<'a> Needle<'a> {
    #[inline]
    fn new(name: &'a [u8]) -> Self {
        let mut bytes = [0; NEEDLE_WORDS * WORD_BYTES as usize];
        let front = name.get(..bytes.len()).unwrap_or(name);
        if let Some(place) = bytes.get_mut(..front.len()) {
            place.copy_from_slice(front);
        }
        let words: [[u8; WORD_BYTES as usize]; NEEDLE_WORDS] = zerocopy::transmute!(bytes);
        Self { name, words: words.map(u64::from_be_bytes) }
    }

    /// Orders the name of `len` bytes at `at`, at least one, against this one, bytewise.
    #[inline(always)]
    fn order_of(&self, view: &View, at: u64, len: u64) -> Result<Ordering, RafsError> {
        let mut done = 0;
        for ours in self.words {
            // At the very end of the metadata there may be no whole word.
            let Ok(bytes) = view.array_at(at.wrapping_add(done)) else { break };
            let left = len.wrapping_sub(done);
            // What follows the name counts as zeros, as in our words: so words that differ tell the order.
            let behind = if left < WORD_BYTES { u64::MAX.wrapping_shr(left.wrapping_mul(8) as u32) } else { 0 };
            let theirs = u64::from_be_bytes(bytes) & !behind;
            if theirs != ours {
                return Ok(theirs.cmp(&ours));
            }
            // Neither overflows: both are at most some 256.
            done = done.wrapping_add(WORD_BYTES);
            if len.min(self.name.len() as u64) <= done {
                // One of them ends here, and the other begins like it.
                return Ok(len.cmp(&(self.name.len() as u64)));
            }
        }
        let rest = usize::try_from(done).ok().and_then(|done| self.name.get(done..)).unwrap_or_default();
        Ok(view.compare_at(at.saturating_add(done), len.saturating_sub(done), rest)?)
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
