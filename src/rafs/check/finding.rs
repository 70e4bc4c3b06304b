//! One broken rule, and how it is told.

use std::fmt;

use crate::rafs::RafsError;
use crate::sys::view::ViewError;

/// Which part of an image breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The metadata.
    Metadata,
    /// The chunk table of the blob with this id; offsets are those in the decoded table.
    ChunkTable(String),
    /// The file of the blob with this id.
    Blob(String),
}

/// A broken rule.
#[derive(Debug, Clone)]
pub struct Finding {
    /// Where it is broken.
    pub part: Part,
    /// The path it was met on, absolute in the image; `None` where it concerns the image as a whole.
    pub path: Option<Vec<u8>>,
    /// What is wrong.
    pub fault: RafsError,
}

impl Finding {
    /// A fault of the metadata as a whole.
    pub fn of_image(fault: RafsError) -> Self {
        Self { part: Part::Metadata, path: None, fault }
    }

    /// The field that is wrong, as the description of the format calls it.
    pub fn field(&self) -> &str {
        match &self.fault {
            RafsError::Malformed { field, .. } => field,
            RafsError::Unknown { what, .. } => what,
            RafsError::View(_) => "metadata",
            RafsError::PlaceholderBlobId { .. } => "blob id",
            _ => "image",
        }
    }

    /// Where that field is in its part; `None` where the fault has no place.
    pub fn offset(&self) -> Option<u64> {
        match &self.fault {
            RafsError::Malformed { offset, .. } | RafsError::View(ViewError::OutOfBounds { offset, .. }) => {
                Some(*offset)
            }
            _ => None,
        }
    }

    /// What is wrong with it.
    pub fn reason(&self) -> String {
        match &self.fault {
            RafsError::Malformed { reason, .. } => reason.clone(),
            RafsError::Unknown { readers, .. } => format!("can be read by {readers}"),
            RafsError::View(error) => error.to_string(),
            other => other.to_string(),
        }
    }

    /// The path with everything escaped that a terminal could take amiss.
    pub fn shown_path(&self) -> Option<String> {
        self.path.as_ref().map(|path| path.escape_ascii().to_string())
    }
}

/// One line: part, field, offset, path, reason.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.part {
            Part::Metadata => {}
            Part::ChunkTable(id) => write!(f, "chunk table of blob {id}: ")?,
            Part::Blob(id) => write!(f, "blob {id}: ")?,
        }
        f.write_str(self.field())?;
        if let Some(offset) = self.offset() {
            write!(f, " at offset {offset:#x}")?;
        }
        if let Some(path) = self.shown_path() {
            write!(f, " of {path}")?;
        }
        write!(f, ": {}", self.reason())
    }
}
