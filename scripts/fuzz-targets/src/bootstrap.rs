//! A bootstrap of either version, read completely: opened, every inode, name, link, attribute and chunk list, the index of
//! all chunks, and the checks.

use std::collections::HashSet;

use nydus_vm::rafs::RafsError;
use nydus_vm::rafs::check;
use nydus_vm::rafs::detect;
use nydus_vm::rafs::facts::Piece;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::image::OpenOptions;
use nydus_vm::rafs::inode::InodeFacts;
use nydus_vm::rafs::inode::Kind;
use nydus_vm::rafs::seek::Whence;
use nydus_vm::sys::view::View;
use smallvec::SmallVec;

use crate::seeds;
use crate::seeds::Seed;

/// Calls per input. Inodes may share chunk lists and directories, so that what an image shows can be much more than its
/// bytes; each single call must still be short.
const CALLS: u32 = 100_000;

/// Reads `data` as a bootstrap.
pub fn run(data: &[u8]) {
    let view = View::from_bytes(data.to_vec());
    let _ = detect::detect(&view);
    let Ok(image) = Image::open(view, &OpenOptions { placeholder_id: Some("placeholder".to_owned()) }) else { return };
    let mut reader = Reader { image: &image, calls: CALLS, known: HashSet::new() };
    reader.tables();
    reader.tree();
    let _ = image.verify_tree();
    let _ = check::walk(&image);
}

struct Reader<'a> {
    image: &'a Image,
    calls: u32,
    known: HashSet<u32>,
}

impl Reader<'_> {
    fn may_call(&mut self) -> bool {
        self.calls = self.calls.saturating_sub(1);
        self.calls > 0
    }

    fn tables(&mut self) {
        let image = self.image;
        let _ = (image.totals(), image.has_owner_ids(), image.has_xattrs(), image.prefetch());
        assert!(image.chunk_bytes().is_power_of_two());
        let Ok(index) = image.chunk_index() else { return };
        for blob in image.blobs() {
            for chunk in (0..blob.chunk_count.saturating_add(1)).take(2000) {
                if let (Ok(Some(facts)), true) = (index.chunk(blob.index, chunk), self.may_call()) {
                    let end = facts.uncompressed_offset + u64::from(facts.uncompressed_bytes);
                    assert!(end <= blob.uncompressed_bytes.next_multiple_of(4096), "a chunk outside its blob");
                }
                let _ = (index.digest(blob.index, chunk), index.seal(blob.index, chunk));
            }
        }
    }

    fn tree(&mut self) {
        let mut pending = vec![self.image.root()];
        while let Some(ino) = pending.pop() {
            if !self.known.insert(ino) || !self.may_call() {
                continue;
            }
            if let Ok(facts) = self.image.inode(ino) {
                self.inode(&facts, &mut pending);
            }
        }
        // Numbers that no name leads to: a guest may make them up.
        for ino in (0..64).chain((0..64).map(|shift| u32::MAX >> (shift % 32))) {
            if let Ok(facts) = self.image.inode(ino) {
                self.inode(&facts, &mut Vec::new());
            }
        }
    }

    fn inode(&mut self, facts: &InodeFacts, pending: &mut Vec<u32>) {
        assert!(facts.mtime_ns < 1_000_000_000);
        assert!(facts.nlink >= 1);
        self.xattrs(facts);
        match facts.kind {
            Kind::Directory => self.directory(facts, pending),
            Kind::Regular => self.file(facts),
            Kind::Symlink => {
                if let Ok(target) = self.image.symlink(facts) {
                    assert!((1..=4095).contains(&target.len()));
                }
            }
            _ => {
                let (mut pieces, whole) = (SmallVec::new(), 0..u64::MAX);
                assert!(matches!(self.image.plan(facts, whole, &mut pieces), Err(RafsError::NotRegular)));
            }
        }
    }

    fn xattrs(&mut self, facts: &InodeFacts) {
        let Ok(names) = self.image.xattr_names(facts) else { return };
        for name in names.split(|byte| *byte == 0) {
            if self.may_call() {
                let _ = self.image.xattr(facts, name);
            }
        }
    }

    fn directory(&mut self, facts: &InodeFacts, pending: &mut Vec<u32>) {
        let mut positions = vec![1, u64::MAX, 1 << 32];
        let Ok(mut entries) = self.image.entries(facts, 0) else { return };
        while let Some(Ok(entry)) = entries.next() {
            assert!((1..=255).contains(&entry.name.len()));
            assert!(entry.name.iter().all(|byte| !matches!(byte, b'/' | 0)));
            assert_ne!(entry.next, 0);
            let _ = self.image.find(facts, entry.name);
            pending.push(entry.ino);
            if positions.len() < 8 {
                positions.push(entry.next);
            }
            if !self.may_call() {
                break;
            }
        }
        let longest = [b'x'; 255];
        for name in [b".".as_slice(), b"..", b"", b"a", b"zz", b"\xff", &longest] {
            let _ = self.image.find(facts, name);
        }
        for position in positions {
            let Ok(mut entries) = self.image.entries(facts, position) else { continue };
            for _ in 0..20 {
                if entries.next().is_none() {
                    break;
                }
            }
        }
    }

    fn file(&mut self, facts: &InodeFacts) {
        let step = u64::from(self.image.chunk_bytes()) * 8;
        let mut at = 0;
        while at < facts.size && self.may_call() {
            if !self.pieces(facts, at, step) {
                break;
            }
            at = at.saturating_add(step);
        }
        for (at, len) in [(facts.size.saturating_sub(1), 5), (facts.size / 2 + 1, 3), (u64::MAX - 1, 1), (0, 0)] {
            self.pieces(facts, at, len);
        }
        for (offset, whence) in [(0, Whence::Data), (0, Whence::Hole), (facts.size.saturating_sub(1), Whence::Hole)] {
            // A file of zeros is hashed as a whole: only short ones, for the speed of the target.
            if facts.size <= 1 << 20 {
                let _ = self.image.seek(facts, offset, whence);
            }
        }
    }

    /// Whether the plan for `len` bytes at `at` could be made. A plan has the bytes asked for, in pieces of blobs.
    fn pieces(&mut self, facts: &InodeFacts, at: u64, len: u64) -> bool {
        let mut pieces: SmallVec<[Piece; 8]> = SmallVec::new();
        let end = at.saturating_add(len);
        if self.image.plan(facts, at..end, &mut pieces).is_err() {
            return false;
        }
        let planned: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        assert_eq!(planned, end.min(facts.size).saturating_sub(at), "a plan without gaps");
        for piece in pieces {
            assert!(piece.len != 0);
            let blob = &self.image.blobs()[piece.blob as usize];
            assert!(blob.chunk_count == 0 || piece.chunk < blob.chunk_count);
        }
        true
    }
}

/// Bootstraps of version 5.
pub fn seeds_v5() -> Vec<Seed> {
    seeds::references(|name| name.starts_with("v5-") && name.ends_with("bootstrap"))
}

/// Bootstraps of version 6.
pub fn seeds_v6() -> Vec<Seed> {
    let mut found = seeds::references(|name| name.starts_with("v6-") && name.ends_with("bootstrap"));
    let (_scratch, folders) = seeds::built();
    for folder in folders {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        found.push((name, std::fs::read(folder.join("bootstrap")).expect("it was built a moment ago")));
    }
    found
}
