//! An image read with the crate's own reader, without daemon or cache, in the words of a manifest.
//!
//! Every chunk is decoded by the codec crates directly and checked against the digest in the bootstrap, so this is a
//! second opinion on both the builder and `storage`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use sha2::Digest;
use sha2::Sha256;
use smallvec::SmallVec;

use super::manifest::Entry;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;
use crate::rafs::facts::feature;
use crate::rafs::image::Image;
use crate::rafs::image::OpenOptions;
use crate::rafs::inode::InodeFacts;
use crate::rafs::inode::Kind;
use crate::rafs::meta;
use crate::rafs::meta::BlobMeta;
use crate::sys::view::View;

/// A v6 image with plain metadata and its blobs, opened.
#[derive(Debug)]
pub struct Readback {
    image: Image,
    blobs: Vec<(File, BlobMeta)>,
}

impl Readback {
    /// Opens the image whose metadata is `bootstrap`, with all its blobs in the directory `blobs`.
    ///
    /// # Errors
    /// Whatever does not open, or disagrees.
    pub fn open(bootstrap: &Path, blobs: &Path) -> Result<Self> {
        Self::open_with(bootstrap, &OpenOptions { placeholder_id: None }, blobs)
    }

    /// As [`Readback::open`], for metadata that was taken out of a blob.
    ///
    /// # Errors
    /// Whatever does not open, or disagrees.
    pub fn open_with(bootstrap: &Path, options: &OpenOptions, blobs: &Path) -> Result<Self> {
        let file = File::open(bootstrap).with_context(|| format!("{bootstrap:?}"))?;
        let view = View::map_file(file.as_fd(), file.metadata()?.len())?;
        let image = Image::open(view, options)?;
        let opened = image.blobs().iter().map(|facts| open_blob(facts, blobs)).collect::<Result<_>>()?;
        Ok(Self { image, blobs: opened })
    }

    /// The reader.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Every path of the image with everything it shows, sorted by path; as [`super::snapshot::of_tree`] has it.
    ///
    /// # Errors
    /// Whatever is malformed, or a chunk that does not match its digest.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut pending = vec![(b"/".to_vec(), self.image.root())];
        while let Some((path, ino)) = pending.pop() {
            let facts = self.image.inode(ino)?;
            if facts.kind == Kind::Directory {
                pending.extend(self.children(&path, &facts)?);
            }
            let entry = self.entry(&path, &facts).with_context(|| path.escape_ascii().to_string())?;
            entries.push(entry);
        }
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(entries)
    }

    /// Writes the uncompressed form of blob `index` to `path`: the device from which the kernel's EROFS reads it. Chunks that
    /// the image does not refer to are left out.
    ///
    /// # Errors
    /// Whatever cannot be read, decoded or written.
    pub fn write_device(&self, index: usize, path: &Path) -> Result<()> {
        let device = File::create(path).with_context(|| format!("{path:?}"))?;
        device.set_len(self.image.blobs()[index].uncompressed_bytes)?;
        let known = self.image.chunk_index()?;
        for chunk in 0..self.blobs[index].1.count() {
            // Of a blob that several images share, this one may know a part only.
            if known.digest(index as u32, chunk)?.is_some() {
                let (facts, plain) = self.chunk(index, chunk)?;
                device.write_all_at(&plain, facts.uncompressed_offset)?;
            }
        }
        Ok(())
    }

    fn children(&self, path: &[u8], facts: &InodeFacts) -> Result<Vec<(Vec<u8>, u32)>> {
        let mut children = Vec::new();
        let mut entries = self.image.entries(facts, 0)?;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            ensure!(self.image.lookup(facts, entry.name)? == Some(entry.ino), "lookup and listing disagree");
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let separator: &[u8] = if path == b"/" { b"" } else { b"/" };
            children.push(([path, separator, entry.name].concat(), entry.ino));
        }
        Ok(children)
    }

    fn entry(&self, path: &[u8], facts: &InodeFacts) -> Result<Entry> {
        let kind = match facts.kind {
            Kind::Regular => b'f',
            Kind::Directory => b'd',
            Kind::Symlink => b'l',
            Kind::CharDevice => b'c',
            Kind::BlockDevice => b'b',
            Kind::Fifo => b'p',
            Kind::Socket => b's',
        };
        let is_device = matches!(facts.kind, Kind::CharDevice | Kind::BlockDevice);
        let rdev = u64::from(facts.rdev);
        let mut xattrs = BTreeMap::new();
        let names = self.image.xattr_names(facts)?;
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let value = self.image.xattr(facts, name)?.context("a listed attribute is not found")?;
            xattrs.insert(name.to_vec(), value);
        }
        Ok(Entry {
            path: path.to_vec(),
            kind,
            mode: facts.mode & 0o7777,
            uid: facts.uid,
            gid: facts.gid,
            size: (kind != b'd').then_some(facts.size),
            nlink: facts.nlink,
            rdev: is_device.then_some((rustix::fs::major(rdev), rustix::fs::minor(rdev))),
            mtime: (path != b"/").then_some((facts.mtime, facts.mtime_ns)),
            sha256: if kind == b'f' { Some(self.sha256(facts)?) } else { None },
            target: if kind == b'l' { Some(self.image.symlink(facts)?) } else { None },
            xattrs,
        })
    }

    fn sha256(&self, facts: &InodeFacts) -> Result<[u8; 32]> {
        let mut pieces = SmallVec::new();
        self.image.plan(facts, 0..facts.size, &mut pieces)?;
        let mut hasher = Sha256::new();
        for piece in pieces {
            let (chunk, plain) = self.chunk(piece.blob as usize, piece.chunk)?;
            ensure!(chunk.uncompressed_offset == piece.offset, "a whole file is made of whole chunks");
            ensure!(plain.len() == piece.len as usize, "chunk of {} bytes for a piece of {}", plain.len(), piece.len);
            hasher.update(&plain);
        }
        Ok(hasher.finalize().into())
    }

    /// Facts and verified content of a chunk.
    ///
    /// # Errors
    /// Whatever cannot be read or decoded, or does not match its digest.
    pub fn chunk(&self, blob: usize, chunk: u32) -> Result<(ChunkFacts, Vec<u8>)> {
        let (facts, plain) = self.unverified(blob, chunk)?;
        let digest = self.image.chunk_index()?.digest(blob as u32, chunk)?.context("no digest")?;
        let found: [u8; 32] = match self.image.blobs()[blob].digester {
            Digester::Blake3 => blake3::hash(&plain).into(),
            Digester::Sha256 => Sha256::digest(&plain).into(),
        };
        ensure!(found == digest, "chunk {chunk} does not match its digest");
        Ok((facts, plain))
    }

    /// As [`Readback::chunk`], also for a chunk that the tree does not use, whose digest is not in the bootstrap.
    ///
    /// # Errors
    /// Whatever cannot be read or decoded.
    pub fn unverified(&self, blob: usize, chunk: u32) -> Result<(ChunkFacts, Vec<u8>)> {
        let (file, meta) = &self.blobs[blob];
        let facts = meta.chunk(chunk)?;
        let compressor =
            if facts.coding != Coding::Plain { self.image.blobs()[blob].compressor } else { Compressor::None };
        let (offset, len) = (facts.compressed_offset, facts.compressed_bytes.into());
        let plain = read_decoded(file, offset, len, compressor, facts.uncompressed_bytes as usize)?;
        Ok((facts, plain))
    }
}

fn open_blob(facts: &BlobFacts, directory: &Path) -> Result<(File, BlobMeta)> {
    let path = directory.join(&facts.id);
    let file = File::open(&path).with_context(|| format!("{path:?}"))?;
    // Behind the blob there may be what the table does not count: metadata, and headers.
    let (len, stated) = (file.metadata()?.len(), facts.compressed_bytes);
    let may_be_longer = facts.features & (feature::INLINED_FS_META | feature::HAS_TAR_HEADER) != 0;
    ensure!(len == stated || may_be_longer && len > stated, "{path:?}: length is not that of the blob table");
    let location = facts.meta.as_ref().context("a v6 blob has metadata")?;
    let (offset, len) = (location.offset, location.compressed_bytes);
    let mut content = read_decoded(&file, offset, len, location.compressor, location.uncompressed_bytes as usize)?;
    content.resize(content.len().next_multiple_of(4096), 0);
    let header = offset + len;
    ensure!(meta::stored_range(facts)?.end == header + meta::META_HEADER_BYTES, "the header follows the array");
    content.extend(read_decoded(&file, header, meta::META_HEADER_BYTES, Compressor::None, 4096)?);
    Ok((file, BlobMeta::open(View::from_bytes(content), facts)?))
}

fn read_decoded(file: &File, offset: u64, len: u64, compressor: Compressor, plain_bytes: usize) -> Result<Vec<u8>> {
    let mut stored = vec![0; usize::try_from(len)?];
    file.read_exact_at(&mut stored, offset)?;
    let plain = match compressor {
        Compressor::None => stored,
        Compressor::Lz4Block => lz4::block::decompress(&stored, Some(i32::try_from(plain_bytes)?))?,
        Compressor::Zstd => zstd::bulk::decompress(&stored, plain_bytes)?,
        Compressor::Gzip => anyhow::bail!("chunks of gzip are not made by any builder that is at hand"),
    };
    ensure!(plain.len() == plain_bytes, "decoded to {} bytes instead of {plain_bytes}", plain.len());
    Ok(plain)
}

#[cfg(test)]
mod tests;
