//! Blobs looked at as a whole, outside of any store: for `nydus-image check`.
//!
//! Reads the file of a blob, its chunk table, and on demand every chunk, decoded and verified as the store does it. What is
//! stored as one piece is in memory at a time. Blocks on the disk; nothing here is asked by a guest.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::OFlags;

use super::codec;
use super::codec::CodecError;
use super::codec::Sealing;
use super::codec::chunk;
use super::codec::chunk::Buffers;
use super::codec::unit::Unit;
use crate::limits::MAX_FINDINGS;
use crate::rafs::RafsError;
use crate::rafs::check::Finding;
use crate::rafs::check::Part;
use crate::rafs::chunks::ChunkIndex;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;
use crate::rafs::meta;
use crate::rafs::meta::BlobMeta;
use crate::sys::view::View;

/// The file of a blob.
#[derive(Debug)]
pub struct BlobFile {
    file: File,
    path: PathBuf,
    size: u64,
}

/// A chunk that is not what the image says.
#[derive(Debug)]
pub struct BadChunk {
    /// Index of its blob.
    pub blob: u32,
    /// Its index in the blob.
    pub chunk: u32,
    /// What is wrong.
    pub finding: Finding,
}

/// What was seen of the chunks of a blob.
#[derive(Debug, Default)]
pub struct Audited {
    /// Chunks that were decoded and verified.
    pub chunks: u64,
    /// Their bytes when decoded.
    pub bytes: u64,
    /// Chunks among them that the image carries neither digest nor checksum of: decoding is all the proof there is.
    pub unverified: u64,
    /// Those that are wrong, at most [`MAX_FINDINGS`]; with so many the rest was not looked at.
    pub bad: Vec<BadChunk>,
}

impl BlobFile {
    /// Opens the file at `path`, which is to be the blob `blob`.
    ///
    /// # Errors
    /// A file that is missing, none, or too short for what the image says of it.
    pub fn open(path: &Path, blob: &BlobFacts) -> Result<Self, Finding> {
        let wrong = |reason: String| malformed(Part::Blob(blob.id.clone()), "blob file", 0, reason);
        let io = |error: io::Error| wrong(format!("{}: {error}", path.display()));
        // NONBLOCK: a fifo must not hold us up before we see what it is.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(io)?;
        let about = file.metadata().map_err(io)?;
        if !about.is_file() {
            return Err(wrong(format!("{} is not a regular file", path.display())));
        }
        let size = about.len();
        if size < blob.data_bytes {
            let reason = format!("{} has {size} bytes, its chunks end at {}", path.display(), blob.data_bytes);
            return Err(malformed(Part::Blob(blob.id.clone()), "blob file size", size, reason));
        }
        Ok(Self { file, path: path.to_owned(), size })
    }

    /// Opens the file at `path`, which is to hold the chunk table of `blob`, not its chunks.
    ///
    /// # Errors
    /// A file that is missing, or none.
    pub fn holder(path: &Path, blob: &BlobFacts) -> Result<Self, Finding> {
        Self::open(path, &BlobFacts { data_bytes: 0, ..blob.clone() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, field: &'static str, part: &Part, offset: u64, buffer: &mut [u8]) -> Result<(), Finding> {
        let end = offset.saturating_add(buffer.len() as u64);
        if end > self.size {
            let reason = format!("{} bytes, {} has {}", buffer.len(), self.path.display(), self.size);
            return Err(malformed(part.clone(), field, offset, reason));
        }
        let failed = |error| malformed(part.clone(), field, offset, format!("{}: {error}", self.path.display()));
        self.file.read_exact_at(buffer, offset).map_err(failed)
    }

    /// The chunk table of `blob`, read, decoded and checked. `None`: it has none (v5, tarfs).
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn table(&self, blob: &BlobFacts) -> Result<Option<BlobMeta>, Finding> {
        let Some(location) = &blob.meta else { return Ok(None) };
        let part = Part::ChunkTable(blob.id.clone());
        let bad = |fault| Finding { part: part.clone(), path: None, fault };
        let stored = meta::stored_range(blob).map_err(bad)?;
        let size = meta::cache_bytes(blob).map_err(bad)?;
        let mut content = vec![0; stored.end.saturating_sub(stored.start) as usize];
        self.read("CI", &Part::Blob(blob.id.clone()), stored.start, &mut content)?;
        let wrong = |error: CodecError| malformed(Part::Blob(blob.id.clone()), "CI", stored.start, error.to_string());
        let sealing = blob.cipher.as_ref().map(Sealing::new);
        let plain = codec::table::decode(location, sealing.as_ref(), &content, size).map_err(wrong)?;
        BlobMeta::open(View::from_bytes(plain), blob).map(Some).map_err(bad)
    }

    /// Reads, decodes and verifies every chunk of `blob`: those of its `table`, or, without one, those in the image's
    /// `index`. `progress` is told of each chunk's bytes.
    pub fn chunks(
        &self,
        blob: &BlobFacts,
        table: Option<&BlobMeta>,
        index: &ChunkIndex,
        progress: &mut dyn FnMut(u64),
    ) -> Audited {
        let mut audited = Audited::default();
        let mut work = Work { sealing: blob.cipher.as_ref().map(Sealing::new), ..Work::default() };
        for chunk in 0..blob.chunk_count {
            if audited.bad.len() >= MAX_FINDINGS {
                break;
            }
            let facts = match facts(blob, table, index, chunk) {
                Ok(Some(facts)) => facts,
                Ok(None) => continue,
                Err(finding) => {
                    audited.bad.push(BadChunk { blob: blob.index, chunk, finding });
                    continue;
                }
            };
            audited.chunks += 1;
            audited.bytes += u64::from(facts.uncompressed_bytes);
            audited.unverified += u64::from(facts.digest.is_none() && facts.crc32c.is_none());
            progress(facts.uncompressed_bytes.into());
            if let Err(finding) = self.chunk(blob, table, chunk, &facts, &mut work) {
                audited.bad.push(BadChunk { blob: blob.index, chunk, finding });
            }
        }
        audited
    }

    fn chunk(
        &self,
        blob: &BlobFacts,
        table: Option<&BlobMeta>,
        chunk: u32,
        facts: &ChunkFacts,
        work: &mut Work,
    ) -> Result<(), Finding> {
        let part = Part::Blob(blob.id.clone());
        let stored = facts.stored();
        if work.stored != stored {
            work.unit = None;
            work.bytes.resize(facts.compressed_bytes as usize, 0);
            // Not that of anything while it is being read.
            work.stored = 0..0;
            self.read("chunk data", &part, facts.compressed_offset, &mut work.bytes)?;
            work.stored = stored;
        }
        let wrong = |error: CodecError| {
            let field = match error {
                CodecError::Digest => "chunk digest",
                CodecError::Crc => "chunk CRC32C",
                _ => "chunk data",
            };
            malformed(part.clone(), field, facts.compressed_offset, format!("chunk {chunk}: {error}"))
        };
        match facts.coding {
            Coding::Plain | Coding::Compressed => work.piece(blob, facts),
            Coding::Batch { plain_bytes, .. } => work.part(blob, facts, |work| {
                Unit::batch(blob.compressor, work.sealing.as_ref(), &work.bytes, plain_bytes)
            }),
            Coding::Zran { context, .. } => {
                let Some(Ok(context)) = table.map(|table| table.zran(context)) else {
                    return Err(malformed(
                        part,
                        "ZRan context",
                        0,
                        format!("chunk {chunk}: there is no context {context}"),
                    ));
                };
                work.part(blob, facts, |_| Unit::context(&context))
            }
        }
        .map_err(wrong)
    }
}

/// What is in memory of the blob at work.
#[derive(Default)]
struct Work {
    sealing: Option<Sealing>,
    /// Which bytes of the blob `bytes` are.
    stored: std::ops::Range<u64>,
    bytes: Vec<u8>,
    /// What they decode to, where they are several chunks.
    unit: Option<Unit>,
    buffers: Buffers,
}

impl Work {
    /// Decodes and verifies a chunk that is stored alone.
    fn piece(&mut self, blob: &BlobFacts, facts: &ChunkFacts) -> Result<(), CodecError> {
        let Self { sealing, bytes, buffers, .. } = self;
        chunk::alone(blob, sealing.as_ref(), facts, bytes, buffers).map(drop)
    }

    /// Verifies a chunk that is a part of what the stored bytes decode to; they are decoded once for all their chunks.
    fn part(
        &mut self,
        blob: &BlobFacts,
        facts: &ChunkFacts,
        decode: impl FnOnce(&Self) -> Result<Unit, CodecError>,
    ) -> Result<(), CodecError> {
        let mut unit = match self.unit.take() {
            Some(unit) => unit,
            None => decode(self)?,
        };
        unit.chunk(blob, facts, &self.bytes)?;
        self.unit = Some(unit);
        Ok(())
    }
}

/// Everything about a chunk; `None`: the image refers to no such chunk.
fn facts(
    blob: &BlobFacts,
    table: Option<&BlobMeta>,
    index: &ChunkIndex,
    chunk: u32,
) -> Result<Option<ChunkFacts>, Finding> {
    let in_image = |fault| Finding { part: Part::Metadata, path: None, fault };
    let Some(table) = table else { return index.chunk(blob.index, chunk).map_err(in_image) };
    let part = || Part::ChunkTable(blob.id.clone());
    let mut facts = table.chunk(chunk).map_err(|fault| Finding { part: part(), path: None, fault })?;
    if let Some(seal) = index.seal(blob.index, chunk).map_err(in_image)? {
        if !seal.agrees_with(&facts) {
            let ours = format!("{} bytes at {:#x}", facts.uncompressed_bytes, facts.uncompressed_offset);
            let theirs = format!("{} at {:#x}", seal.uncompressed_bytes, seal.uncompressed_offset);
            let reason = format!("chunk {chunk}: {ours}, the metadata says {theirs}");
            return Err(malformed(part(), "CI uncompressed offset", 0, reason));
        }
        facts.digest = Some(seal.digest);
    }
    Ok(Some(facts))
}

fn malformed(part: Part, field: &'static str, offset: u64, reason: String) -> Finding {
    Finding { part, path: None, fault: RafsError::Malformed { field, offset, reason } }
}
