//! Extended attributes of v5 (format, section 3.7).

use std::ops::Range;

use super::V5;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::inode::EachXattr;
use crate::rafs::malformed;
use crate::rafs::place::V5Place;

/// Prefixes a name may have.
const PREFIXES: [&[u8]; 3] = [b"user.", b"security.", b"trusted."];
/// Names allowed as a whole.
const NAMES: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

impl V5 {
    /// The range of the pairs; `None` without a table.
    fn xattr_pairs(&self, place: &V5Place) -> Result<Option<Range<u64>>, RafsError> {
        if !place.has_xattrs {
            return Ok(None);
        }
        let bytes = self.view.u64_at(place.tail)?;
        if bytes > limits::MAX_XATTR_TABLE_BYTES {
            return Err(malformed("xattr table size", place.tail, format!("{bytes} bytes")));
        }
        let start = place.tail.saturating_add(8);
        Ok(Some(start..start.saturating_add(bytes)))
    }

    /// Where the chunk array of a file starts: behind the xattr table and its padding.
    #[inline]
    pub(super) fn chunks_offset(&self, place: &V5Place) -> Result<u64, RafsError> {
        Ok(match self.xattr_pairs(place)? {
            // The start is a multiple of 8.
            Some(pairs) => pairs.end.saturating_add(7) & !7,
            None => place.tail,
        })
    }

    /// Calls `each` with every name and the range of its value, until it breaks (section 14, rule 11).
    pub(in crate::rafs) fn for_each_xattr(&self, place: &V5Place, each: &mut EachXattr<'_>) -> Result<(), RafsError> {
        let Some(pairs) = self.xattr_pairs(place)? else { return Ok(()) };
        let mut at = pairs.start;
        while at < pairs.end {
            let start = at.saturating_add(4);
            let end = start.saturating_add(self.view.u32_at(at)?.into());
            if end > pairs.end {
                return Err(malformed("xattr pair length", at, "reaches beyond the table"));
            }
            let mut buffer = [0u8; limits::MAX_NAME_BYTES + 1];
            let longest = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX).min(buffer.len());
            let head = buffer.get_mut(..longest).unwrap_or_default();
            self.view.copy_at(start, head)?;
            let Some(name) = head.iter().position(|&byte| byte == 0).and_then(|length| head.get(..length)) else {
                return Err(malformed("xattr name", start, "does not end"));
            };
            let is_allowed = NAMES.contains(&name)
                || PREFIXES.iter().any(|prefix| name.len() > prefix.len() && name.starts_with(prefix));
            if !is_allowed {
                return Err(malformed("xattr name", start, format!("{:?}", String::from_utf8_lossy(name))));
            }
            let value = start.saturating_add(name.len() as u64).saturating_add(1)..end;
            if value.end.saturating_sub(value.start) > limits::MAX_XATTR_VALUE_BYTES.into() {
                return Err(malformed("xattr value", value.start, "is longer than 64 KiB"));
            }
            if each(name, value).is_break() {
                break;
            }
            at = end;
        }
        Ok(())
    }
}
