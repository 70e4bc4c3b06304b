//! Which bytes of the metadata belong to what: no two parts may share any (format, section 14, rule 1).

use std::ops::Range;

/// Whose bytes they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    /// The inode; 0, which no inode has, for tables.
    pub(super) ino: u32,
    /// The number of the directory it was met in; of a table its number.
    pub(super) directory: u32,
}

/// Bytes with their owner. Metadata ends below 2 GiB.
#[derive(Debug, Clone, Copy)]
struct Extent {
    start: u32,
    end: u32,
    owner: Owner,
}

/// All bytes that were claimed.
#[derive(Debug)]
pub(super) struct Extents {
    extents: Vec<Extent>,
    /// Bytes that can still be claimed without an overlap.
    left: u64,
}

impl Extents {
    /// None of `file_bytes` bytes.
    pub(super) fn new(file_bytes: u64) -> Self {
        Self { extents: Vec::new(), left: file_bytes }
    }

    /// Claims `range`, which lies in the file. `false`: more was claimed than there is, so that parts overlap, and going
    /// on could take for ever.
    pub(super) fn claim(&mut self, range: &Range<u64>, owner: Owner) -> bool {
        let (Ok(start), Ok(end)) = (u32::try_from(range.start), u32::try_from(range.end)) else { return true };
        if start >= end {
            return true;
        }
        self.extents.push(Extent { start, end, owner });
        match self.left.checked_sub(range.end.saturating_sub(range.start)) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }

    /// Orders the claims, and gives each that overlaps one before it: its offset, its owner, and the other owner.
    pub(super) fn overlaps(&mut self) -> Vec<(u64, Owner, Owner)> {
        self.extents.sort_unstable_by_key(|extent| (extent.start, extent.end));
        let mut overlaps = Vec::new();
        let mut last: Option<Extent> = None;
        for &extent in &self.extents {
            match last {
                Some(before) if extent.start < before.end => {
                    overlaps.push((extent.start.into(), extent.owner, before.owner));
                    if extent.end > before.end {
                        last = Some(extent);
                    }
                }
                _ => last = Some(extent),
            }
        }
        overlaps
    }

    /// Whose the byte at `offset` is, after [`Extents::overlaps`].
    pub(super) fn owner_of(&self, offset: u64) -> Option<Owner> {
        let behind = self.extents.partition_point(|extent| u64::from(extent.start) <= offset);
        let extent = self.extents.get(behind.checked_sub(1)?)?;
        (offset < u64::from(extent.end)).then_some(extent.owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(ino: u32) -> Owner {
        Owner { ino, directory: 0 }
    }

    #[test]
    fn overlaps_names_each_later_part_once() {
        let mut extents = Extents::new(1000);
        for (range, ino) in [(0..10, 1), (10..20, 2), (50..60, 4), (15..40, 3), (16..17, 5), (39..45, 6), (60..60, 7)] {
            assert!(extents.claim(&range, owner(ino)));
        }
        let expected = [(15, owner(3), owner(2)), (16, owner(5), owner(3)), (39, owner(6), owner(3))];
        assert_eq!(extents.overlaps(), expected);
        assert_eq!(extents.owner_of(52), Some(owner(4)));
        assert_eq!(extents.owner_of(47), None);
    }

    #[test]
    fn claim_of_more_than_there_is_is_noticed() {
        let mut extents = Extents::new(100);
        assert!(extents.claim(&(0..60), owner(1)));
        assert!(extents.claim(&(20..60), owner(2)));
        assert!(!extents.claim(&(20..21), owner(3)));
    }
}
