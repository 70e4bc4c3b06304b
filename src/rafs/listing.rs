//! Directory listings without an allocation per entry.

use super::RafsError;
use super::entries::DirEntry;
use super::v5;
use super::v6;

/// A lending cursor over a directory, with a buffer for one name (v6), or one record and name (v5).
///
/// v5 lists `.` and `..` first; v6 lists them where they are stored, which is where their names sort.
pub struct Entries<'a> {
    pub(super) cursor: Cursor<'a>,
}

pub(super) enum Cursor<'a> {
    V5(v5::dir::Cursor<'a>),
    V6(v6::dir::Cursor<'a>),
}

impl Entries<'_> {
    /// The next entry; it borrows from the cursor, so that no name is copied twice. After an error the listing is at
    /// its end.
    #[expect(clippy::should_implement_trait, reason = "a lending cursor cannot be an Iterator")]
    #[inline]
    pub fn next(&mut self) -> Option<Result<DirEntry<'_>, RafsError>> {
        match &mut self.cursor {
            Cursor::V5(cursor) => cursor.next(),
            Cursor::V6(cursor) => cursor.next(),
        }
    }
}
