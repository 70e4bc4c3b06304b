//! What a guest is told when an image fails it: the one table.

use rustix::io::Errno;

use crate::rafs::RafsError;

/// The error number of a failed question to an image.
pub(super) fn errno(error: &RafsError) -> Errno {
    match error {
        RafsError::NotDirectory => Errno::NOTDIR,
        RafsError::NotSymlink | RafsError::NotRegular => Errno::INVAL,
        RafsError::View(_)
        | RafsError::Malformed { .. }
        | RafsError::Unknown { .. }
        | RafsError::Unsupported(_)
        | RafsError::PlaceholderBlobId { .. } => Errno::IO,
    }
}

/// Whether the error tells of a broken image, not of a question that fits no such inode.
pub(super) fn is_damage(error: &RafsError) -> bool {
    errno(error) == Errno::IO
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::view::ViewError;

    #[test]
    fn every_error_has_its_number() {
        for (error, number, damage) in [
            (RafsError::NotDirectory, Errno::NOTDIR, false),
            (RafsError::NotSymlink, Errno::INVAL, false),
            (RafsError::NotRegular, Errno::INVAL, false),
            (RafsError::View(ViewError::Lost), Errno::IO, true),
            (RafsError::Unknown { what: String::new(), subject: String::new(), readers: "" }, Errno::IO, true),
            (RafsError::Unsupported("batch"), Errno::IO, true),
            (RafsError::PlaceholderBlobId { index: 0 }, Errno::IO, true),
            (RafsError::Malformed { field: "f", offset: 0, reason: String::new() }, Errno::IO, true),
        ] {
            assert_eq!((errno(&error), is_damage(&error)), (number, damage), "{error}");
        }
    }
}
