//! Where the parts of a v5 image lie, and what its later hard links must repeat, for [`crate::rafs::check`].

use std::ops::Range;

use super::RawSuperblock;
use super::V5;
use super::inode::RECORD_BYTES;
use super::tables_of;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::chunks;
use crate::rafs::inode::Kind;
use crate::rafs::malformed;
use crate::rafs::place::Place;
use crate::rafs::place::V5Place;

/// A later record of a hard link.
#[derive(Debug)]
pub(in crate::rafs) struct LaterLink {
    /// The inode, which is the index of the first record.
    pub(in crate::rafs) first: u32,
    at: u64,
    place: V5Place,
    size: u64,
    digest: [u8; 32],
    nlink: u32,
}

impl V5 {
    /// Superblock and tables.
    pub(in crate::rafs) fn tables(&self) -> Result<Vec<(&'static str, Range<u64>)>, RafsError> {
        let raw: RawSuperblock = self.view.record_at(0)?;
        Ok(tables_of(&raw).into_iter().map(|(name, start, bytes)| (name, start..start.saturating_add(bytes))).collect())
    }

    /// The record with all that belongs to it.
    ///
    /// # Errors
    /// A record that reaches beyond the end of the metadata.
    pub(in crate::rafs) fn extent(&self, place: &V5Place, kind: Kind) -> Result<Range<u64>, RafsError> {
        let chunks = if kind == Kind::Regular { u64::from(place.child_count) } else { 0 };
        let end = self.chunks_offset(place)?.saturating_add(chunks.saturating_mul(chunks::RECORD_BYTES));
        crate::rafs::part("inode record", place.record, end.saturating_sub(place.record), self.view.len())
    }

    /// The record with the index `index` if it is a later one of a hard link.
    ///
    /// # Errors
    /// A malformed record.
    pub(in crate::rafs) fn later_link(&self, index: u32) -> Result<Option<LaterLink>, RafsError> {
        let (at, record) = self.record(index)?;
        let Some(first) = u32::try_from(record.ino.get()).ok().filter(|&first| first != index) else {
            return Ok(None);
        };
        let facts = self.facts(&record, at, index)?;
        let Place::V5(place) = facts.place else { return Ok(None) };
        let (digest, nlink, size) = (record.digest, facts.nlink, facts.size);
        Ok(Some(LaterLink { first, at, place, size, digest, nlink }))
    }

    /// The directory and the name of the record with the index `index`; the name may be illegal.
    ///
    /// # Errors
    /// A record that reaches beyond the end of the metadata.
    pub(in crate::rafs) fn name_of(&self, index: u32) -> Result<(u32, Vec<u8>), RafsError> {
        let (at, record) = self.record(index)?;
        let name_bytes = u64::from(record.name_bytes.get()).min(limits::MAX_NAME_BYTES as u64);
        let name = self.view.vec_at(at.saturating_add(RECORD_BYTES), name_bytes)?;
        Ok((u32::try_from(record.parent.get()).unwrap_or(u32::MAX), name))
    }

    /// Where all of a later link's record is.
    ///
    /// # Errors
    /// A record that reaches beyond the end of the metadata.
    pub(in crate::rafs) fn link_extent(&self, link: &LaterLink) -> Result<Range<u64>, RafsError> {
        self.extent(&link.place, Kind::Regular)
    }

    /// Compares a later record with the first of its inode (section 14, rule 14).
    ///
    /// # Errors
    /// What differs.
    pub(in crate::rafs) fn compare_link(&self, link: &LaterLink) -> Result<(), RafsError> {
        let (first_at, record) = self.record(link.first)?;
        let facts = self.facts(&record, first_at, link.first)?;
        let Place::V5(place) = facts.place else { return Ok(()) };
        let other = |field, ours: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
            let reason = format!("{ours}, the first record of this inode ({}) says {theirs}", link.first);
            Err(malformed(field, link.at, reason))
        };
        if link.size != facts.size {
            return other("inode size", &link.size, &facts.size);
        }
        if link.nlink != facts.nlink {
            return other("inode nlink", &link.nlink, &facts.nlink);
        }
        if link.digest != record.digest {
            return other("inode digest", &hex::encode(link.digest), &hex::encode(record.digest));
        }
        let (ours, theirs) = (self.chunks_offset(&link.place)?, self.chunks_offset(&place)?);
        for number in 0..u64::from(link.place.child_count) {
            let offset = number.saturating_mul(chunks::RECORD_BYTES);
            let at = ours.saturating_add(offset);
            let our: [u8; chunks::RECORD_BYTES as usize] = self.view.array_at(at)?;
            let their: [u8; chunks::RECORD_BYTES as usize] = self.view.array_at(theirs.saturating_add(offset))?;
            if our != their {
                let reason = format!("chunk {number} differs from that of the first record ({})", link.first);
                return Err(malformed("chunk record", at, reason));
            }
        }
        Ok(())
    }

    /// Where chunk `number` of a regular file is described.
    pub(in crate::rafs) fn chunk_offset(&self, place: &V5Place, number: u64) -> u64 {
        let start = self.chunks_offset(place).unwrap_or(place.record);
        start.saturating_add(number.saturating_mul(chunks::RECORD_BYTES))
    }
}

impl V5Place {
    /// Where the record is.
    pub(in crate::rafs) fn offset(&self) -> u64 {
        self.record
    }
}
