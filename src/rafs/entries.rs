//! What a directory listing gives.

/// One name of a directory, borrowed from the [`super::listing::Entries`] that gave it.
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
