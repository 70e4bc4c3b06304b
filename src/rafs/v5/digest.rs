//! Inode digests of v5 (format, section 3.9).

use sha2::Digest as _;

use super::ROOT;
use super::V5;
use super::inode::Record;
use crate::rafs::RafsError;
use crate::rafs::chunks;
use crate::rafs::facts::Digest;
use crate::rafs::facts::Digester;
use crate::rafs::inode::Kind;
use crate::rafs::malformed;
use crate::rafs::place::Place;

/// A digest in the making.
enum Hasher {
    Blake3(Box<blake3::Hasher>),
    Sha256(sha2::Sha256),
}

impl Hasher {
    fn new(digester: Digester) -> Self {
        match digester {
            Digester::Blake3 => Self::Blake3(Box::new(blake3::Hasher::new())),
            Digester::Sha256 => Self::Sha256(sha2::Sha256::new()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
            Self::Sha256(hasher) => hasher.update(bytes),
        }
    }

    fn finish(self) -> Digest {
        match self {
            Self::Blake3(hasher) => *hasher.finalize().as_bytes(),
            Self::Sha256(hasher) => hasher.finalize().into(),
        }
    }
}

/// What a verification still has to do.
struct UnderWay {
    /// Directories with the run of their children.
    directories: Vec<(u32, u32, u32)>,
    /// Chunk records that may still be hashed.
    chunks_left: u64,
}

impl V5 {
    /// Verifies all inodes that can be reached from the root. Every index is visited once: children come behind their
    /// directory, and more visits than indexes mean runs that overlap.
    pub(in crate::rafs) fn verify_tree(&self) -> Result<(), RafsError> {
        // Chunk records of different inodes do not overlap either, so this many are hashed at most.
        let mut under_way = UnderWay { directories: Vec::new(), chunks_left: self.view.len() / chunks::RECORD_BYTES };
        let mut left = self.entries;
        self.verify(ROOT, ROOT, &mut under_way)?;
        while let Some((dir, first, count)) = under_way.directories.pop() {
            left = left.checked_sub(count).ok_or_else(|| {
                malformed("inode child count", 0, format!("the children of directory {dir} belong to another one too"))
            })?;
            for index in first..first.saturating_add(count) {
                self.verify(index, dir, &mut under_way)?;
            }
        }
        Ok(())
    }

    /// Verifies the record with the index `index`, a child of `dir`. Directories are added to those under way.
    fn verify(&self, index: u32, dir: u32, under_way: &mut UnderWay) -> Result<(), RafsError> {
        let (at, record) = self.record(index)?;
        if index != ROOT {
            let (ino, _) = self.child(&record, at, index, dir)?;
            if ino != index {
                return self.verify_link(&record, at, ino, under_way);
            }
        }
        let digest = self.digest_of(&record, at, index, under_way)?;
        self.compare(&record, at, &digest)
    }

    /// A later hard link shows the content of the first record, so both must have the digest that this name is bound to.
    fn verify_link(&self, record: &Record, at: u64, first: u32, under_way: &mut UnderWay) -> Result<(), RafsError> {
        let (first_at, target) = self.record(first)?;
        if target.digest != record.digest {
            return Err(malformed("inode digest", at, format!("differs from that of inode {first}, a hard link")));
        }
        let digest = self.digest_of(&target, first_at, first, under_way)?;
        self.compare(&target, first_at, &digest)
    }

    fn compare(&self, record: &Record, at: u64, digest: &Digest) -> Result<(), RafsError> {
        if record.digest == *digest {
            return Ok(());
        }
        Err(malformed("inode digest", at, format!("inode {} does not match its digest", record.ino)))
    }

    fn digest_of(&self, record: &Record, at: u64, ino: u32, under_way: &mut UnderWay) -> Result<Digest, RafsError> {
        let facts = self.facts(record, at, ino)?;
        let mut hasher = Hasher::new(self.flags.digester);
        let Place::V5(place) = facts.place else { return Ok(hasher.finish()) };
        match facts.kind {
            Kind::Directory => {
                for child in place.child_index..place.child_index.saturating_add(place.child_count) {
                    hasher.update(&self.record(child)?.1.digest);
                }
                under_way.directories.push((ino, place.child_index, place.child_count));
            }
            Kind::Regular => {
                let start = self.chunks_offset(&place)?;
                under_way.chunks_left = under_way
                    .chunks_left
                    .checked_sub(place.child_count.into())
                    .ok_or_else(|| malformed("chunk array", start, "overlaps that of another inode"))?;
                for number in 0..u64::from(place.child_count) {
                    let offset = number.saturating_mul(chunks::RECORD_BYTES);
                    let record: chunks::Record = self.view.record_at(start.saturating_add(offset))?;
                    hasher.update(&record.digest);
                }
            }
            Kind::Symlink => hasher.update(&self.symlink(&place, facts.size)?),
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo | Kind::Socket => {}
        }
        Ok(hasher.finish())
    }
}
