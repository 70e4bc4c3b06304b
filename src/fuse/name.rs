//! File names from a guest, checked.

use crate::limits::MAX_NAME_BYTES;

/// One path component: 1 to 255 bytes without `/` and NUL. `.` and `..` are names too: see [`Name::is_dot`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a [u8]);

/// Why bytes are no [`Name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No byte, or a `/` or NUL inside.
    #[error("empty name, or a slash or NUL in it")]
    Malformed,
    /// More than 255 bytes.
    #[error("name longer than {MAX_NAME_BYTES} bytes")]
    TooLong,
}

impl<'a> Name<'a> {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn new(bytes: &'a [u8]) -> Result<Self, NameError> {
        if bytes.is_empty() || bytes.iter().any(|b| matches!(b, b'/' | 0)) {
            return Err(NameError::Malformed);
        }
        if bytes.len() > MAX_NAME_BYTES {
            return Err(NameError::TooLong);
        }
        Ok(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(self) -> &'a [u8] {
        self.0
    }

    /// Whether the name is `.` or `..`, which only LOOKUP may use.
    pub fn is_dot(self) -> bool {
        matches!(self.0, b"." | b"..")
    }
}
