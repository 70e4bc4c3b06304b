//! RAFS v6 (format, section 4): an EROFS image with one extra device per blob. Superblocks and tables.

mod audit;
mod blocks;
pub(super) mod chunks;
pub(super) mod dir;
pub(super) mod inode;
mod tables;
pub(super) mod xattr;

use std::sync::Arc;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use self::blocks::Blocks;
use super::NO_TOOLS;
use super::RafsError;
use super::blob;
use super::blob::Flags;
use super::check_disjoint;
use super::chunks::RECORD_BYTES;
use super::facts::BlobFacts;
use super::inode::Kind;
use super::malformed;
use super::part;
use super::unknown;
use super::version::EROFS_MAGIC;
use super::version::RAFS_FEATURE;
use super::version::SUPERBLOCK;
use crate::sys::view::View;

/// Unit of a nid.
const NID_BYTES: u64 = 32;

const EXTENDED_SUPERBLOCK: u64 = 1152;
const DEVICE_TABLE: u64 = 1408;
/// The device table's place in units of 128 bytes.
const DEVICE_TABLE_SLOT: u16 = 11;
/// Chunked files and a device table.
const INCOMPATIBLE_FEATURES: u32 = 0xc;

/// The EROFS superblock as stored (section 4.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: U32,
    checksum: U32,
    compatible: U32,
    block_bits: u8,
    extension_slots: u8,
    root_nid: U16,
    inodes: U64,
    build_time: U64,
    build_time_ns: U32,
    blocks: U32,
    meta_block: U32,
    xattr_block: U32,
    uuid: [u8; 16],
    volume: [u8; 16],
    incompatible: U32,
    union: U16,
    devices: U16,
    device_slot: U16,
    reserved: [u8; 38],
}

/// The extended superblock as stored (section 4.3), without its reserved end.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtended {
    flags: U64,
    blob_table: U64,
    blob_table_bytes: U32,
    chunk_bytes: U32,
    chunk_table: U64,
    chunk_table_bytes: U64,
    prefetch_table: U64,
    prefetch_bytes: U32,
    padding: U32,
}

/// An opened v6 image.
#[derive(Debug)]
pub(super) struct V6 {
    pub(super) view: View,
    pub(super) blobs: Arc<[BlobFacts]>,
    pub(super) flags: Flags,
    pub(super) chunk_bytes: u32,
    blocks: Blocks,
    /// Inodes as the superblock counts them: paths.
    pub(super) inodes: u64,
    pub(super) root: u32,
    /// Offset of nid 0.
    meta: u64,
    chunk_table: u64,
    chunk_records: u64,
    prefetch_table: u64,
    prefetch_entries: u32,
}

impl V6 {
    /// Checks superblocks and tables (sections 4.2 to 4.5; 14, rules 1 to 4 and 16).
    pub(super) fn open(view: View, placeholder_id: Option<&str>) -> Result<Self, RafsError> {
        let raw: RawSuperblock = view.record_at(SUPERBLOCK)?;
        let extended: RawExtended = view.record_at(EXTENDED_SUPERBLOCK)?;
        // The flags come first: they name what is not served, the rest would only look malformed.
        let flags = Flags::parse(extended.flags.get(), EXTENDED_SUPERBLOCK)?;
        let blocks = if flags.is_tarfs { Blocks::SECTORS } else { Blocks::PAGES };
        check_superblock(&raw, blocks)?;
        let chunk_bytes = blob::chunk_bytes(extended.chunk_bytes.get(), EXTENDED_SUPERBLOCK.saturating_add(20))?;
        check_tables(&raw, &extended, view.len())?;
        let blobs = tables::Tables { extended: &extended, blocks, placeholder_id }.read(&view, raw.devices.get())?;
        let image = Self {
            blobs: blobs.into(),
            flags,
            chunk_bytes,
            inodes: raw.inodes.get(),
            root: raw.root_nid.get().into(),
            blocks,
            meta: blocks.start(raw.meta_block.get()),
            chunk_table: extended.chunk_table.get(),
            chunk_records: extended.chunk_table_bytes.get() / RECORD_BYTES,
            prefetch_table: extended.prefetch_table.get(),
            prefetch_entries: extended.prefetch_bytes.get() / 4,
            view,
        };
        let root = image.inode(image.root)?;
        if root.kind != Kind::Directory {
            return Err(malformed("root nid", SUPERBLOCK.saturating_add(14), "the root is not a directory"));
        }
        Ok(image)
    }

    /// The prefetch table (section 4.11).
    pub(super) fn prefetch(&self) -> Result<Vec<u32>, RafsError> {
        let mut inodes = Vec::new();
        for number in 0..self.prefetch_entries {
            let at = self.prefetch_table.saturating_add(u64::from(number).saturating_mul(4));
            let nid = self.view.u32_at(at)?;
            if nid == 0 || self.inode_offset(nid)? >= self.view.len() {
                return Err(malformed("prefetch table", at, format!("nid {nid} is out of range")));
            }
            inodes.push(nid);
        }
        Ok(inodes)
    }

    /// Where the inode `nid` starts.
    #[inline]
    fn inode_offset(&self, nid: u32) -> Result<u64, RafsError> {
        if nid == 0 {
            return Err(malformed("nid", self.meta, "0 is no inode"));
        }
        // 32 bits of blocks and 32 bits of nids: no overflow.
        Ok(self.meta.saturating_add(u64::from(nid).saturating_mul(NID_BYTES)))
    }
}

/// Section 14, rule 16. Times, uuid, name and block count have no effect and are not looked at.
fn check_superblock(raw: &RawSuperblock, blocks: Blocks) -> Result<(), RafsError> {
    let rows: [(&'static str, u64, u64, u64); 9] = [
        ("EROFS magic", 0, raw.magic.get().into(), EROFS_MAGIC.into()),
        ("checksum", 4, raw.checksum.get().into(), 0),
        ("feature_compat", 8, raw.compatible.get().into(), RAFS_FEATURE.into()),
        ("extension slots", 13, raw.extension_slots.into(), 0),
        ("xattr_blkaddr", 44, raw.xattr_block.get().into(), 0),
        ("feature_incompat", 80, raw.incompatible.get().into(), INCOMPATIBLE_FEATURES.into()),
        ("union", 84, raw.union.get().into(), 0),
        ("device table slot", 88, raw.device_slot.get().into(), DEVICE_TABLE_SLOT.into()),
        ("block size bits", 12, raw.block_bits.into(), blocks.bits().into()),
    ];
    let strange = raw.incompatible.get() & !INCOMPATIBLE_FEATURES;
    if strange != 0 {
        return Err(unknown(format!("feature_incompat {strange:#x}"), "the EROFS image", NO_TOOLS));
    }
    for (field, offset, found, expected) in rows {
        if found != expected {
            return Err(malformed(
                field,
                SUPERBLOCK.saturating_add(offset),
                format!("{found:#x} instead of {expected:#x}"),
            ));
        }
    }
    if raw.inodes.get() == 0 {
        return Err(malformed("inode count", SUPERBLOCK.saturating_add(16), "is 0"));
    }
    Ok(())
}

/// Checks that the tables are inside the file and disjoint (section 14, rule 1).
fn check_tables(raw: &RawSuperblock, extended: &RawExtended, file_bytes: u64) -> Result<(), RafsError> {
    let mut parts = vec![("superblock and device table", part("device table", 0, devices_end(raw), file_bytes)?)];
    for (name, start, bytes, each) in tables_of(extended) {
        if bytes == 0 {
            continue;
        }
        if !bytes.is_multiple_of(each) {
            return Err(malformed(name, start, format!("{bytes} bytes are no multiple of {each}")));
        }
        parts.push((name, part(name, start, bytes, file_bytes)?));
    }
    check_disjoint(&mut parts)
}

/// Where the device table ends, which follows the superblocks.
fn devices_end(raw: &RawSuperblock) -> u64 {
    DEVICE_TABLE.saturating_add(u64::from(raw.devices.get()).saturating_mul(tables::DEVICE_BYTES))
}

/// The other tables: name, offset, bytes, bytes of an entry.
fn tables_of(extended: &RawExtended) -> [(&'static str, u64, u64, u64); 3] {
    [
        ("blob table", extended.blob_table.get(), extended.blob_table_bytes.get().into(), tables::BLOB_BYTES),
        ("chunk table", extended.chunk_table.get(), extended.chunk_table_bytes.get(), RECORD_BYTES),
        ("prefetch table", extended.prefetch_table.get(), extended.prefetch_bytes.get().into(), 4),
    ]
}

/// The worked examples of the format description (section 18).
#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::rafs::facts::Compressor;
    use crate::rafs::facts::Digester;
    use crate::rafs::facts::feature;
    use crate::rafs::inode::InodeFacts;
    use crate::rafs::place::Place;
    use crate::rafs::place::V6Place;

    /// An image of nothing but `parts`, each at its offset, with a blob of 4 KiB chunks.
    fn image_of(parts: &[(usize, &str)]) -> V6 {
        let mut bytes = vec![0; 1 << 16];
        for (at, text) in parts {
            let part = hex::decode(text.replace(' ', "")).unwrap();
            bytes[*at..*at + part.len()].copy_from_slice(&part);
        }
        let blob = BlobFacts {
            index: 0,
            id: "blob".to_owned(),
            features: feature::ALIGNED,
            chunk_count: 136,
            chunk_bytes: 4096,
            uncompressed_bytes: 557_056,
            compressed_bytes: 66_076,
            data_bytes: 61_175,
            compressor: Compressor::Zstd,
            digester: Digester::Blake3,
            cipher: None,
            meta: None,
            prefetch_bytes: 0,
        };
        V6 {
            view: View::from_bytes(bytes),
            blobs: Arc::new([blob]),
            flags: Flags::parse(0x24, 0).unwrap(),
            chunk_bytes: 4096,
            blocks: Blocks::PAGES,
            inodes: 1,
            root: 128,
            meta: 0,
            chunk_table: 0,
            chunk_records: 0,
            prefetch_table: 0,
            prefetch_entries: 0,
        }
    }

    fn place(facts: &InodeFacts) -> V6Place {
        let Place::V6(place) = facts.place else { panic!("{facts:?}") };
        place
    }

    #[test]
    fn inode_of_a_file_with_its_chunk_indexes_is_read() {
        let inode = "0900 0000 a481 0000 7011010000000000 25000000 9b000000 00000000 00000000 c61b5e5f00000000 4c860a0a \
                     01000000 00000000000000000000000000000000 7200 01 00 72000000 7300 01 00 73000000";
        let image = image_of(&[(870 * 32, inode)]);
        let facts = image.inode(870).unwrap();
        assert_eq!((facts.kind, facts.mode, facts.size, facts.nlink), (Kind::Regular, 0o100644, 70_000, 1));
        assert_eq!((facts.mtime, facts.mtime_ns, facts.blocks), (0x5f5e_1bc6, 0x0a0a_864c, 137));
        for (number, index) in [(0, 0x72), (1, 0x73)] {
            let chunk = image.file_chunk(&place(&facts), facts.size, number).unwrap();
            assert_eq!((chunk.blob, chunk.index, chunk.offset), (0, index, u64::from(index) * 4096));
        }
        // The entries behind are zeros: device number 0 is the bootstrap, which holds no chunks.
        assert!(image.file_chunk(&place(&facts), facts.size, 2).is_err());
    }

    #[test]
    fn directory_data_are_listed_and_searched() {
        // An inode of our own for the data of `nest`, and one for each type its entries state.
        let nest = "0500 0000 ed41 0000 5100000000000000 00000000 00000000 00000000 00000000 0000000000000000 00000000 \
                    04000000 00000000000000000000000000000000";
        let data = "ea02000000000000 3c00 02 00 8000000000000000 3d00 02 00 ef02000000000000 3f00 02 00 \
                    1303000000000000 4000 02 00 af00000000000000 4500 01 00 \
                    2e 2e2e 61 656d707479 686172642d6f757473696465";
        let (directory, file) = ("0000 0000 ed41 0100", "0800 0000 a481 0100 00000000 00000000 20000000");
        let parts = [(746 * 32, nest), (746 * 32 + 64, data), (751 * 32, directory), (175 * 32, file)];
        let image = image_of(&parts);
        let facts = image.inode(746).unwrap();
        let mut cursor = dir::Cursor::new(&image, facts.ino, place(&facts), facts.size, 0);
        let mut found = Vec::new();
        while let Some(entry) = cursor.next() {
            let entry = entry.unwrap();
            found.push((String::from_utf8(entry.name.to_vec()).unwrap(), entry.ino, entry.kind));
        }
        let expected = [(".", 746, 4), ("..", 128, 4), ("a", 751, 4), ("empty", 787, 4), ("hard-outside", 175, 8)];
        assert_eq!(found, expected.map(|(name, nid, kind)| (name.to_owned(), nid, kind)));
        let find = |name: &str| image.find(&place(&facts), facts.size, name.as_bytes());
        for (name, nid) in [("hard-outside", Some(175)), ("a", Some(751)), ("b", None), ("hard-outside!", None)] {
            assert_eq!(find(name).unwrap().map(|inode| inode.ino), nid, "{name}");
        }
        assert!(find("empty").is_err(), "the inode of that entry is missing here");
    }

    #[test]
    fn xattrs_get_their_prefixes() {
        let inode = "0100 0800 8011 0000 0000000000000000 00000000 00000000 00000000 00000000 0000000000000000 00000000 \
                     01000000 00000000000000000000000000000000 000000000000000000000000 \
                     01 04 0900 74 726f6f74206f6e6c79 0000 03 06 0300 666f6f 626172 0000";
        let image = image_of(&[(4096, inode)]);
        let facts = image.inode(128).unwrap();
        let mut found = Vec::new();
        image
            .for_each_xattr(&place(&facts), &mut |name, value| {
                let value = image.view.vec_at(value.start, value.end - value.start).unwrap();
                found.push((String::from_utf8(name.to_vec()).unwrap(), String::from_utf8(value).unwrap()));
                ControlFlow::Continue(())
            })
            .unwrap();
        let expected = [("trusted.t", "root only"), ("security.foo", "bar")];
        assert_eq!(found, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
}
