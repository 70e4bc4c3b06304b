//! Extended attributes of v6 (format, section 4.9).

use super::V6;
use super::inode::XATTR_HEADER_BYTES;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::inode::EachXattr;
use crate::rafs::malformed;
use crate::rafs::place::V6Place;

/// The prefix with the number `number`, and whether it is the whole name.
fn prefix(number: u8) -> Option<(&'static [u8], bool)> {
    match number {
        1 => Some((b"user.", false)),
        2 => Some((b"system.posix_acl_access", true)),
        3 => Some((b"system.posix_acl_default", true)),
        4 => Some((b"trusted.", false)),
        6 => Some((b"security.", false)),
        _ => None,
    }
}

impl V6 {
    /// Calls `each` with every name and the range of its value, until it breaks (section 14, rule 11).
    pub(in crate::rafs) fn for_each_xattr(&self, place: &V6Place, each: &mut EachXattr<'_>) -> Result<(), RafsError> {
        if place.xattrs_end == place.xattrs {
            return Ok(());
        }
        let header: [u8; XATTR_HEADER_BYTES as usize] = self.view.array_at(place.xattrs)?;
        let [_, _, _, _, shared, ..] = header;
        if shared != 0 {
            return Err(malformed("xattr shared count", place.xattrs, format!("{shared} instead of 0")));
        }
        let mut at = place.xattrs.saturating_add(XATTR_HEADER_BYTES);
        while at < place.xattrs_end {
            let [name_bytes, number, value_low, value_high] = self.view.array_at(at)?;
            let value_bytes = u16::from_le_bytes([value_low, value_high]);
            let name_at = at.saturating_add(4);
            let value_at = name_at.saturating_add(name_bytes.into());
            let value = value_at..value_at.saturating_add(value_bytes.into());
            let (prefix, is_whole) =
                prefix(number).ok_or_else(|| malformed("xattr prefix", at, format!("{number}")))?;
            let length = prefix.len().saturating_add(name_bytes.into());
            if value.end > place.xattrs_end || is_whole != (name_bytes == 0) || length > limits::MAX_NAME_BYTES {
                let reason = format!("{name_bytes} bytes of name, {value_bytes} of value");
                return Err(malformed("xattr entry", at, reason));
            }
            let mut buffer = [0u8; limits::MAX_NAME_BYTES];
            let (head, tail) = buffer.split_at_mut_checked(prefix.len()).unwrap_or_default();
            head.copy_from_slice(prefix);
            self.view.copy_at(name_at, tail.get_mut(..usize::from(name_bytes)).unwrap_or_default())?;
            let name = buffer.get(..length).unwrap_or_default();
            if name.contains(&0) {
                return Err(malformed("xattr name", at, "contains NUL"));
            }
            let end = value.end;
            if each(name, value).is_break() {
                break;
            }
            // `at` is a multiple of 4, so the padding is too.
            at = end.saturating_add(3) & !3;
        }
        Ok(())
    }
}
