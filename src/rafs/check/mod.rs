//! Everything that an image states, looked at once: for `nydus-image check` and for tests.
//!
//! Serving an image leaves each rule to the moment of use, and some are none of its business at all. A [`survey`] reads
//! all of the metadata, goes on behind a fault wherever that makes sense, and tells every broken rule with its field,
//! its offset and the path it was met on. It takes a time that grows with the size of the metadata only, whatever they
//! say: the parts of inodes may not overlap, so together they are no longer than the file, and it gives up at
//! [`limits::MAX_FINDINGS`]. Holds some 100 bytes per inode while it runs.

mod extents;
mod finding;
mod links;
#[cfg(test)]
mod tests;
mod walk;

pub use finding::Finding;
pub use finding::Part;

use std::collections::HashMap;
use std::collections::HashSet;

use super::RafsError;
use super::image::Image;
use super::meta::BlobMeta;
use crate::limits;

/// What a walk has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Names, those of hard links too, the root included.
    pub paths: u64,
    /// Different inodes.
    pub inodes: u64,
    /// Directories among them.
    pub directories: u64,
    /// Regular files among them.
    pub files: u64,
    /// Bytes of regular files, hard links once.
    pub file_bytes: u64,
    /// Chunks of regular files, hard links once.
    pub chunks: u64,
}

/// The outcome of a [`survey`].
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// What was seen. With findings, what could be seen in spite of them.
    pub seen: Seen,
    /// Every broken rule, in the order in which they were met.
    pub findings: Vec<Finding>,
    /// Whether the survey gave up: after [`limits::MAX_FINDINGS`], or because parts overlap without end.
    pub gave_up: bool,
    /// A path for each damaged chunk that a file refers to.
    pub damaged: HashMap<(u32, u32), Vec<u8>>,
}

/// What is known of the blobs of an image.
#[derive(Debug, Default)]
pub struct Blobs {
    /// Their chunk tables, where they are known, in the order of the blob table: what files say of their chunks is
    /// compared with them.
    pub tables: Vec<Option<BlobMeta>>,
    /// Chunks, by blob and index, that are damaged: a path is looked for.
    pub damaged: HashSet<(u32, u32)>,
}

impl Report {
    /// Adds a finding; `false` when there are too many already, and it is time to give up.
    pub fn add(&mut self, finding: Finding) -> bool {
        if self.findings.len() >= limits::MAX_FINDINGS {
            self.gave_up = true;
            return false;
        }
        self.findings.push(finding);
        true
    }
}

/// Reads all of `image`.
pub fn survey(image: &Image, blobs: &Blobs) -> Report {
    walk::Walk::new(image, blobs).run()
}

/// Reads all of `image` without chunk tables, up to the first fault.
///
/// # Errors
/// The first broken rule.
pub fn walk(image: &Image) -> Result<Seen, RafsError> {
    let report = survey(image, &Blobs::default());
    match report.findings.into_iter().next() {
        Some(finding) => Err(finding.fault),
        None => Ok(report.seen),
    }
}
