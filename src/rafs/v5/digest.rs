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

impl V5 {
    /// Verifies all inodes that can be reached from the root. Every index is visited once: children come behind their
    /// directory, and more visits than indexes mean runs that overlap.
    pub(in crate::rafs) fn verify_tree(&self) -> Result<(), RafsError> {
        let mut directories = Vec::new();
        let mut left = self.entries;
        self.verify(ROOT, ROOT, &mut directories)?;
        while let Some((dir, first, count)) = directories.pop() {
            left = left.checked_sub(count).ok_or_else(|| {
                malformed("inode child count", 0, format!("the children of directory {dir} belong to another one too"))
            })?;
            for index in first..first.saturating_add(count) {
                self.verify(index, dir, &mut directories)?;
            }
        }
        Ok(())
    }

    /// Verifies the record with the index `index`, a child of `dir`. Directories are added to `directories`, with the
    /// run of their children.
    fn verify(&self, index: u32, dir: u32, directories: &mut Vec<(u32, u32, u32)>) -> Result<(), RafsError> {
        let (at, record) = self.record(index)?;
        if index != ROOT {
            let (ino, _) = self.child(&record, at, index, dir)?;
            if ino != index {
                return self.verify_link(&record, at, ino);
            }
        }
        let digest = self.digest_of(&record, at, index, directories)?;
        self.compare(&record, at, &digest)
    }

    /// A later hard link shows the content of the first record, so both must have the digest that this name is bound to.
    fn verify_link(&self, record: &Record, at: u64, first: u32) -> Result<(), RafsError> {
        let (first_at, target) = self.record(first)?;
        if target.digest != record.digest {
            return Err(malformed("inode digest", at, format!("differs from that of inode {first}, a hard link")));
        }
        let digest = self.digest_of(&target, first_at, first, &mut Vec::new())?;
        self.compare(&target, first_at, &digest)
    }

    fn compare(&self, record: &Record, at: u64, digest: &Digest) -> Result<(), RafsError> {
        if record.digest == *digest {
            return Ok(());
        }
        Err(malformed("inode digest", at, format!("inode {} does not match its digest", record.ino)))
    }

    fn digest_of(
        &self,
        record: &Record,
        at: u64,
        ino: u32,
        directories: &mut Vec<(u32, u32, u32)>,
    ) -> Result<Digest, RafsError> {
        let facts = self.facts(record, at, ino)?;
        let mut hasher = Hasher::new(self.flags.digester);
        let Place::V5(place) = facts.place else { return Ok(hasher.finish()) };
        match facts.kind {
            Kind::Directory => {
                for child in place.child_index..place.child_index.saturating_add(place.child_count) {
                    hasher.update(&self.record(child)?.1.digest);
                }
                directories.push((ino, place.child_index, place.child_count));
            }
            Kind::Regular => {
                let start = self.chunks_offset(&place)?;
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
