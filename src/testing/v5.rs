//! A v6 image written down again as RAFS v5, over the same blob: nothing here builds v5 images, and tests need some.
//!
//! Format, section 3. The outcome has everything that the reader looks at: digests of the tree, hard links, xattrs, an
//! extended blob table.

use std::collections::HashMap;
use std::ops::Range;

use smallvec::SmallVec;

use crate::rafs::RafsError;
use crate::rafs::chunks::ChunkIndex;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::Coding;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;
use crate::rafs::facts::feature;
use crate::rafs::image::Image;
use crate::rafs::inode::InodeFacts;
use crate::rafs::inode::Kind;
use crate::rafs::meta::BlobMeta;
use crate::storage::codec;

const SUPERBLOCK_BYTES: usize = 8192;
const RECORD_BYTES: usize = 128;

/// One record in the making.
struct Row {
    facts: InodeFacts,
    name: Vec<u8>,
    /// Index of the parent directory; the root's is 0.
    parent: u32,
    /// Indexes of the children.
    children: Range<u32>,
    chunks: Vec<u8>,
    digest: [u8; 32],
}

struct Writer<'a> {
    image: &'a Image,
    tables: &'a [BlobMeta],
    index: &'a ChunkIndex,
    rows: Vec<Row>,
}

/// The metadata of `image`, a v6 image with plain or compressed chunks, as v5. `tables` are the chunk tables of all its
/// blobs.
///
/// # Errors
/// What is wrong with the image.
///
/// # Panics
/// With a blob in pieces that v5 cannot express.
pub fn rewrite(image: &Image, tables: &[BlobMeta]) -> Result<Vec<u8>, RafsError> {
    let index = image.chunk_index()?;
    let mut writer = Writer { image, tables, index: &index, rows: Vec::new() };
    writer.push(image.root(), b"/", 0)?;
    writer.number(0)?;
    writer.digest();
    writer.write()
}

impl Writer<'_> {
    fn push(&mut self, ino: u32, name: &[u8], parent: u32) -> Result<(), RafsError> {
        let facts = self.image.inode(ino)?;
        let chunks = if facts.kind == Kind::Regular { self.chunks(&facts)? } else { Vec::new() };
        self.rows.push(Row { facts, name: name.to_vec(), parent, children: 0..0, chunks, digest: [0; 32] });
        Ok(())
    }

    /// Gives the children of row `dir`, and all below, their indexes: each directory a run, then directory by directory.
    fn number(&mut self, dir: usize) -> Result<(), RafsError> {
        if self.rows[dir].facts.kind != Kind::Directory {
            return Ok(());
        }
        let image = self.image;
        let first = self.rows.len();
        let facts = self.rows[dir].facts;
        let mut entries = image.entries(&facts, 0)?;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            if !matches!(entry.name, b"." | b"..") {
                self.push(entry.ino, entry.name, dir as u32 + 1)?;
            }
        }
        let end = self.rows.len();
        if end > first {
            self.rows[dir].children = first as u32 + 1..end as u32 + 1;
        }
        (first..end).try_for_each(|child| self.number(child))
    }

    /// The chunk records of a file.
    fn chunks(&self, facts: &InodeFacts) -> Result<Vec<u8>, RafsError> {
        let mut pieces: SmallVec<[_; 8]> = SmallVec::new();
        self.image.plan(facts, 0..facts.size, &mut pieces)?;
        let mut records = Vec::new();
        let mut file_offset = 0u64;
        for piece in pieces {
            let chunk = self.tables[piece.blob as usize].chunk(piece.chunk)?;
            let digest = self.index.digest(piece.blob, piece.chunk)?.expect("our images carry digests");
            let flags = match chunk.coding {
                Coding::Plain => 0u32,
                Coding::Compressed => 1,
                other => panic!("{other:?}"),
            };
            records.extend(digest);
            for word in [piece.blob, flags, chunk.compressed_bytes, chunk.uncompressed_bytes] {
                records.extend(word.to_le_bytes());
            }
            for word in [chunk.compressed_offset, chunk.uncompressed_offset, file_offset] {
                records.extend(word.to_le_bytes());
            }
            records.extend(piece.chunk.to_le_bytes());
            records.extend([0; 4]);
            file_offset += u64::from(piece.len);
        }
        Ok(records)
    }

    fn digester(&self) -> Digester {
        self.image.blobs().first().map_or(Digester::Blake3, |blob| blob.digester)
    }

    /// Fills in the digests. Children come behind their directory, so from the end.
    fn digest(&mut self) {
        let digester = self.digester();
        for row in (0..self.rows.len()).rev() {
            let Row { facts, children, chunks, .. } = &self.rows[row];
            let input: Vec<u8> = match facts.kind {
                Kind::Directory => children.clone().flat_map(|child| self.rows[child as usize - 1].digest).collect(),
                Kind::Regular => chunks.chunks(80).flat_map(|record| record[..32].to_vec()).collect(),
                Kind::Symlink => self.image.symlink(facts).unwrap_or_default(),
                _ => Vec::new(),
            };
            self.rows[row].digest = codec::digest(digester, &input);
        }
    }

    fn write(&self) -> Result<Vec<u8>, RafsError> {
        let mut bytes = vec![0; SUPERBLOCK_BYTES + self.rows.len() * 4];
        pad(&mut bytes);
        let blob_table = bytes.len();
        let blobs = self.image.blobs();
        for (number, blob) in blobs.iter().enumerate() {
            bytes.extend([0; 8]);
            bytes.extend(blob.id.as_bytes());
            bytes.extend((number + 1 < blobs.len()).then_some(0));
        }
        pad(&mut bytes);
        let blob_table_bytes = bytes.len() - blob_table;
        let extended = bytes.len();
        blobs.iter().for_each(|blob| bytes.extend(extended_entry(blob)));
        let mut firsts = HashMap::new();
        for (slot, row) in self.rows.iter().enumerate() {
            let number = (bytes.len() / 8) as u32;
            bytes[SUPERBLOCK_BYTES + slot * 4..][..4].copy_from_slice(&number.to_le_bytes());
            let ino = *firsts.entry(row.facts.ino).or_insert(slot as u32 + 1);
            self.record(&mut bytes, row, ino)?;
        }
        let count = self.rows.len() as u32;
        for (at, word) in [
            (0, 0x5241_4653),
            (4, 0x500),
            (8, SUPERBLOCK_BYTES as u32),
            (12, self.image.chunk_bytes()),
            (16, self.flags()),
            (24, firsts.len() as u32),
            (32, SUPERBLOCK_BYTES as u32),
            (40, 0),
            (48, blob_table as u32),
            (56, count),
            (64, blob_table_bytes as u32),
            (68, blobs.len() as u32),
            (72, extended as u32),
        ] {
            bytes[at..at + 4].copy_from_slice(&u32::to_le_bytes(word));
        }
        Ok(bytes)
    }

    fn flags(&self) -> u32 {
        let compressor = match self.image.blobs().first().map(|blob| blob.compressor) {
            None | Some(Compressor::None) => 1,
            Some(Compressor::Lz4Block) => 2,
            Some(Compressor::Gzip) => 0x40,
            Some(Compressor::Zstd) => 0x80,
        };
        let digester = if self.digester() == Digester::Blake3 { 4 } else { 8 };
        // With owners and xattrs.
        compressor | digester | 0x30
    }

    fn record(&self, bytes: &mut Vec<u8>, row: &Row, ino: u32) -> Result<(), RafsError> {
        let facts = &row.facts;
        let link = if facts.kind == Kind::Symlink { self.image.symlink(facts)? } else { Vec::new() };
        let names = self.image.xattr_names(facts)?;
        let count =
            if facts.kind == Kind::Regular { (row.chunks.len() / 80) as u32 } else { row.children.len() as u32 };
        let flags = u64::from(facts.kind == Kind::Symlink) | u64::from(!names.is_empty()) << 2;
        let at = bytes.len();
        bytes.extend(row.digest);
        bytes.extend(u64::from(row.parent).to_le_bytes());
        bytes.extend(u64::from(ino).to_le_bytes());
        [facts.uid, facts.gid, 0, facts.mode].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        [facts.size, facts.blocks, flags].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        [facts.nlink, row.children.start, count].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        [row.name.len() as u16, link.len() as u16].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        [facts.rdev, facts.mtime_ns].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes.extend(facts.mtime.to_le_bytes());
        bytes.resize(at + RECORD_BYTES, 0);
        bytes.extend(&row.name);
        pad(bytes);
        bytes.extend(link);
        pad(bytes);
        if !names.is_empty() {
            let size_at = bytes.len();
            bytes.extend([0; 8]);
            for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
                let value = self.image.xattr(facts, name)?.unwrap_or_default();
                bytes.extend((name.len() as u32 + 1 + value.len() as u32).to_le_bytes());
                bytes.extend(name);
                bytes.push(0);
                bytes.extend(value);
            }
            let size = (bytes.len() - size_at - 8) as u64;
            bytes[size_at..size_at + 8].copy_from_slice(&size.to_le_bytes());
            pad(bytes);
        }
        bytes.extend(&row.chunks);
        Ok(())
    }
}

fn extended_entry(blob: &BlobFacts) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend(blob.chunk_count.to_le_bytes());
    entry.extend((blob.features & feature::ALIGNED).to_le_bytes());
    entry.extend(blob.uncompressed_bytes.to_le_bytes());
    entry.extend(blob.data_bytes.to_le_bytes());
    entry.resize(64, 0);
    entry
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rafs::check;
    use crate::rafs::image::OpenOptions;
    use crate::rafs::version::Version;
    use crate::sys::view::View;
    use crate::testing::hostile::Specimen;

    #[test]
    fn rewritten_image_is_one_of_v5_without_fault() {
        let specimen = Specimen::v5();
        let image = Image::open(View::from_bytes(specimen.bootstrap), &OpenOptions { placeholder_id: None }).unwrap();
        assert_eq!(image.version(), Version::V5);
        let report = check::survey(&image, &check::Blobs::default());
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        image.verify_tree().unwrap();
    }
}
