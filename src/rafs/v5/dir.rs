//! Directories of v5: children have consecutive inode indexes, in the order of their names (format, section 3.8).

use std::cmp::Ordering;

use zerocopy::FromBytes;

use super::V5;
use super::inode;
use super::inode::RECORD_BYTES;
use super::inode::Record;
use crate::limits;
use crate::rafs::Needle;
use crate::rafs::RafsError;
use crate::rafs::entries::DirEntry;
use crate::rafs::inode::InodeFacts;
use crate::rafs::inode::Kind;
use crate::rafs::is_legal_name;
use crate::rafs::malformed;
use crate::rafs::place::V5Place;

/// What is copied of a child at once: its record and the longest name.
const CHILD_BYTES: usize = RECORD_BYTES as usize + limits::MAX_NAME_BYTES;

impl V5 {
    /// The inode that `name` names in the directory `ino` at `place`.
    #[inline]
    pub(in crate::rafs) fn find(
        &self,
        ino: u32,
        place: &V5Place,
        name: &[u8],
    ) -> Result<Option<InodeFacts>, RafsError> {
        match name {
            b"." => return self.inode(ino).map(Some),
            b".." => return self.inode(place.parent).map(Some),
            _ => {}
        }
        let needle = Needle::new(name);
        let (mut low, mut high) = (0u32, place.child_count);
        while low < high {
            let middle = low.midpoint(high);
            let index = place.child_index.saturating_add(middle);
            let at = self.record_offset(index)?;
            let name_bytes = inode::name_bytes(self.view.u16_at(at.saturating_add(inode::NAME_BYTES_FIELD))?, at)?;
            match needle.order_of(&self.view, at.saturating_add(RECORD_BYTES), name_bytes)? {
                Ordering::Equal => return self.found(index, at, ino).map(Some),
                Ordering::Less => low = middle.saturating_add(1),
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The inode of the record with the index `index`, at `at`, a child of `dir`.
    #[inline]
    fn found(&self, index: u32, at: u64, dir: u32) -> Result<InodeFacts, RafsError> {
        let record: Record = self.view.record_at(at)?;
        match self.child(&record, at, index, dir)? {
            (child, _) if child == index => self.facts(&record, at, index),
            (first, _) => self.inode(first),
        }
    }

    /// Inode and type of the child with the index `index` of directory `dir`. A later hard link leads to the first
    /// record of its number (section 14, rules 13 and 14).
    #[inline]
    pub(super) fn child(&self, record: &Record, at: u64, index: u32, dir: u32) -> Result<(u32, Kind), RafsError> {
        if record.parent.get() != u64::from(dir) {
            return Err(malformed("inode parent", at, format!("{} in directory {dir}", record.parent)));
        }
        let kind = record.kind(at)?;
        let ino = record.ino.get();
        if ino == u64::from(index) {
            return Ok((index, kind));
        }
        let Some(first) = u32::try_from(ino).ok().filter(|&first| first < index && kind == Kind::Regular) else {
            return Err(malformed("inode number", at, format!("{ino} in the record of index {index} ({kind:?})")));
        };
        let (first_at, target) = self.record(first)?;
        if target.ino.get() != ino || target.kind(first_at)? != Kind::Regular {
            return Err(malformed("inode number", at, format!("{ino} does not lead to a regular file")));
        }
        Ok((first, kind))
    }
}

/// A position in a listing: 0 is `.`, 1 is `..`, then the children.
pub(in crate::rafs) struct Cursor<'a> {
    image: &'a V5,
    dir: u32,
    place: V5Place,
    position: u64,
    child: [u8; CHILD_BYTES],
}

impl<'a> Cursor<'a> {
    #[inline]
    pub(in crate::rafs) fn new(image: &'a V5, dir: u32, place: V5Place, from: u64) -> Self {
        Self { image, dir, place, position: from, child: [0; CHILD_BYTES] }
    }

    #[inline]
    pub(in crate::rafs) fn next(&mut self) -> Option<Result<DirEntry<'_>, RafsError>> {
        let position = self.position;
        let next = position.checked_add(1)?;
        let directory = Kind::Directory.dirent_type();
        let entry = match position {
            0 => DirEntry { name: b".", ino: self.dir, kind: directory, next },
            1 => DirEntry { name: b"..", ino: self.place.parent, kind: directory, next },
            _ => {
                let child = u32::try_from(position.saturating_sub(2)).ok()?;
                if child >= self.place.child_count {
                    return None;
                }
                match self.read(child) {
                    Ok((name_end, ino, kind)) => {
                        let name = self.child.get(RECORD_BYTES as usize..name_end).unwrap_or_default();
                        DirEntry { name, ino, kind: kind.dirent_type(), next }
                    }
                    Err(error) => {
                        self.position = u64::MAX;
                        return Some(Err(error));
                    }
                }
            }
        };
        self.position = next;
        Some(Ok(entry))
    }

    /// Copies a child's record and name into the buffer; where the name ends in it, its inode and its type.
    fn read(&mut self, child: u32) -> Result<(usize, u32, Kind), RafsError> {
        let index = self.place.child_index.saturating_add(child);
        let at = self.image.record_offset(index)?;
        // The last record may be shorter than the buffer; then the file ends.
        let available = usize::try_from(self.image.view.len().saturating_sub(at)).unwrap_or(usize::MAX);
        let copied = self.child.get_mut(..available.min(CHILD_BYTES)).unwrap_or_default();
        self.image.view.copy_at(at, copied)?;
        let (record, rest) = Record::read_from_prefix(copied)
            .map_err(|_| malformed("inode record", at, "reaches beyond the end of the metadata"))?;
        let name_bytes = usize::try_from(inode::name_bytes(record.name_bytes.get(), at)?).unwrap_or(usize::MAX);
        let name = rest
            .get(..name_bytes)
            .ok_or_else(|| malformed("inode name", at, "reaches beyond the end of the metadata"))?;
        if !is_legal_name(name) || matches!(name, b"." | b"..") {
            return Err(malformed("inode name", at, format!("{:?}", String::from_utf8_lossy(name))));
        }
        let name_end = copied.len().saturating_sub(rest.len()).saturating_add(name_bytes);
        let (ino, kind) = self.image.child(&record, at, index, self.dir)?;
        Ok((name_end, ino, kind))
    }
}
