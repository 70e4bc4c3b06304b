//! Where the parts of a v6 image lie, for [`crate::rafs::check`].

use std::ops::Range;

use super::EXTENDED_SUPERBLOCK;
use super::RawExtended;
use super::RawSuperblock;
use super::V6;
use super::devices_end;
use super::inode::CHUNK_INDEX_BYTES;
use super::tables_of;
use crate::rafs::RafsError;
use crate::rafs::count_chunks;
use crate::rafs::inode::Kind;
use crate::rafs::place::Layout;
use crate::rafs::place::V6Place;
use crate::rafs::version::SUPERBLOCK;

impl V6 {
    /// Superblocks and tables.
    pub(in crate::rafs) fn tables(&self) -> Result<Vec<(&'static str, Range<u64>)>, RafsError> {
        let raw: RawSuperblock = self.view.record_at(SUPERBLOCK)?;
        let extended: RawExtended = self.view.record_at(EXTENDED_SUPERBLOCK)?;
        let mut tables = vec![("superblock and device table", 0..devices_end(&raw))];
        let others = tables_of(&extended).into_iter();
        tables.extend(others.map(|(name, start, bytes, _)| (name, start..start.saturating_add(bytes))));
        Ok(tables)
    }

    /// The inode with its xattrs and what follows them, and the blocks of its data. Its facts were checked, so all of
    /// it lies in the file.
    pub(in crate::rafs) fn extents(&self, place: &V6Place, size: u64, kind: Kind) -> [Range<u64>; 2] {
        let alone = [place.at..place.xattrs_end, 0..0];
        match (kind, place.layout) {
            (Kind::Regular, _) => {
                let bytes = count_chunks(size, self.chunk_bytes).saturating_mul(CHUNK_INDEX_BYTES);
                if bytes == 0 { alone } else { [place.at..place.body.saturating_add(bytes), 0..0] }
            }
            (Kind::Directory | Kind::Symlink, layout) if size != 0 => {
                let (first, _) = self.data_block(place, size, 0);
                let (_, last) = self.data_block(place, size, self.last_block(size));
                let before = size.saturating_sub(last);
                match layout {
                    Layout::FlatInline if before == 0 => [place.at..place.body.saturating_add(last), 0..0],
                    Layout::FlatInline => {
                        [place.at..place.body.saturating_add(last), first..first.saturating_add(before)]
                    }
                    Layout::Flat | Layout::Chunks => [place.at..place.xattrs_end, first..first.saturating_add(size)],
                }
            }
            _ => alone,
        }
    }

    fn last_block(&self, size: u64) -> u64 {
        self.blocks.holding(size.saturating_sub(1))
    }
}

impl V6Place {
    /// Where the inode is.
    pub(in crate::rafs) fn offset(&self) -> u64 {
        self.at
    }

    /// Where chunk `number` of a regular file is described.
    pub(in crate::rafs) fn chunk_offset(&self, number: u64) -> u64 {
        self.body.saturating_add(number.saturating_mul(CHUNK_INDEX_BYTES))
    }
}
