//! Directory listings without an allocation per entry.

use super::RafsError;

/// One name of a directory, borrowed from the [`Entries`] that gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The name: 1 to 255 bytes, no `/`, no NUL; `.` and `..` are listed too.
    pub name: &'a [u8],
    /// Inode of the mount, for [`super::image::Image::inode`].
    pub ino: u32,
    /// `DT_*` value.
    pub kind: u8,
    /// Where to go on behind this entry: the `from` of another [`super::image::Image::entries`]. Never 0, and valid as
    /// long as the image, without any state.
    pub next: u64,
}

/// A lending cursor over a directory.
pub struct Entries<'a> {
    image: std::marker::PhantomData<&'a ()>,
}

impl Entries<'_> {
    /// The next entry; it borrows from the cursor, so that no name is copied twice. After an error the listing is at
    /// its end.
    #[expect(clippy::should_implement_trait, reason = "a lending cursor cannot be an Iterator")]
    pub fn next(&mut self) -> Option<Result<DirEntry<'_>, RafsError>> {
        todo!()
    }
}
