//! A walk over everything an image states, for `nydus-image check` and for tests: each rule that serving an image
//! leaves to the moment of use, and those it can do without.

use std::collections::HashMap;
use std::collections::HashSet;
use std::collections::hash_map::Entry;

use smallvec::SmallVec;

use super::RafsError;
use super::facts::Piece;
use super::image::Image;
use super::inode::InodeFacts;
use super::inode::Kind;
use super::malformed;
use crate::limits;

/// What a walk has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Names, those of hard links too, the root included.
    pub paths: u64,
    /// Different inodes.
    pub inodes: u64,
    /// Bytes of regular files, hard links once.
    pub file_bytes: u64,
    /// Chunks of regular files, hard links once.
    pub chunks: u64,
}

/// A directory that is still to be listed.
struct Pending {
    ino: u32,
    parent: u32,
    depth: usize,
}

/// Walks the tree from the root, without recursion, and reads every inode, name, link, xattr and chunk list. Holds some
/// 50 bytes per inode while it runs.
///
/// # Errors
/// The first fault: also a tree deeper than [`limits::MAX_TREE_DEPTH`], a directory with two names, names out of order,
/// and more names of an inode than it states.
pub fn walk(image: &Image) -> Result<Seen, RafsError> {
    let mut walk = Walk { image, seen: Seen::default(), directories: HashSet::new(), names: HashMap::new() };
    let root = image.root();
    walk.directories.insert(root);
    walk.inode(root)?;
    let mut pending = vec![Pending { ino: root, parent: root, depth: 0 }];
    while let Some(dir) = pending.pop() {
        walk.directory(&dir, &mut pending)?;
    }
    for (ino, (left, stated)) in &walk.names {
        if *left != 0 {
            let reason = format!("inode {ino} states {stated} links, {left} are missing");
            return Err(malformed("inode nlink", 0, reason));
        }
    }
    image.prefetch()?;
    image.chunk_index()?;
    Ok(walk.seen)
}

struct Walk<'a> {
    image: &'a Image,
    seen: Seen,
    /// Directories that have a name.
    directories: HashSet<u32>,
    /// Names that inodes with several still miss, and how many they state.
    names: HashMap<u32, (u32, u32)>,
}

impl Walk<'_> {
    fn directory(&mut self, dir: &Pending, pending: &mut Vec<Pending>) -> Result<(), RafsError> {
        if dir.depth > limits::MAX_TREE_DEPTH {
            return Err(malformed("directory tree", 0, format!("deeper than {} levels", limits::MAX_TREE_DEPTH)));
        }
        let facts = self.image.inode(dir.ino)?;
        let mut entries = self.image.entries(&facts, 0)?;
        let (mut dots, mut dotdots) = (0u32, 0u32);
        let mut last: Vec<u8> = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            match entry.name {
                b"." => dots = dots.saturating_add(1),
                b".." if entry.ino == dir.parent => dotdots = dotdots.saturating_add(1),
                b".." => {
                    let reason = format!("{} instead of {} in directory {}", entry.ino, dir.parent, dir.ino);
                    return Err(malformed("inode of ..", 0, reason));
                }
                name => {
                    let shown = || String::from_utf8_lossy(name).into_owned();
                    if name <= last.as_slice() {
                        return Err(malformed("name", 0, format!("{:?} in directory {}: order", shown(), dir.ino)));
                    }
                    last.clear();
                    last.extend_from_slice(name);
                    let child = self.child(entry.ino, entry.kind)?;
                    if self.image.lookup(&facts, name)? != Some(entry.ino) {
                        let reason = format!("{:?} in directory {} is listed and not found", shown(), dir.ino);
                        return Err(malformed("name", 0, reason));
                    }
                    if child == Kind::Directory {
                        let depth = dir.depth.saturating_add(1);
                        pending.push(Pending { ino: entry.ino, parent: dir.ino, depth });
                    }
                }
            }
        }
        if (dots, dotdots) != (1, 1) {
            return Err(malformed("directory", 0, format!("{} has {dots} of ., {dotdots} of ..", dir.ino)));
        }
        Ok(())
    }

    /// A name that leads to `ino`, listed with the type `kind`.
    fn child(&mut self, ino: u32, kind: u8) -> Result<Kind, RafsError> {
        let facts = self.image.inode(ino)?;
        if facts.kind.dirent_type() != kind {
            return Err(malformed("dirent type", 0, format!("{kind} for inode {ino}, {:?}", facts.kind)));
        }
        if facts.kind == Kind::Directory {
            if !self.directories.insert(ino) {
                return Err(malformed("directory", 0, format!("{ino} has two names")));
            }
        } else if facts.nlink > 1 {
            match self.names.entry(ino) {
                Entry::Vacant(row) => {
                    row.insert((facts.nlink.saturating_sub(1), facts.nlink));
                }
                Entry::Occupied(mut row) => {
                    self.seen.paths = self.seen.paths.saturating_add(1);
                    let left = row.get().0.checked_sub(1);
                    row.get_mut().0 = left.ok_or_else(|| {
                        malformed("inode nlink", 0, format!("inode {ino} has more than {} names", facts.nlink))
                    })?;
                    return Ok(facts.kind);
                }
            }
        }
        self.inode(ino)?;
        Ok(facts.kind)
    }

    /// Reads all that belongs to one inode.
    fn inode(&mut self, ino: u32) -> Result<(), RafsError> {
        let facts = self.image.inode(ino)?;
        self.seen.paths = self.seen.paths.saturating_add(1);
        self.seen.inodes = self.seen.inodes.saturating_add(1);
        match facts.kind {
            Kind::Regular => self.chunks(&facts)?,
            Kind::Symlink => drop(self.image.symlink(&facts)?),
            Kind::Directory | Kind::CharDevice | Kind::BlockDevice | Kind::Fifo | Kind::Socket => {}
        }
        let names = self.image.xattr_names(&facts)?;
        let mut known = HashSet::new();
        for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            self.image.xattr(&facts, name)?;
            if !known.insert(name) {
                return Err(malformed("xattr name", 0, format!("{:?} twice", String::from_utf8_lossy(name))));
            }
        }
        Ok(())
    }

    /// Reads a file's chunks in parts, so that memory does not grow with the file.
    fn chunks(&mut self, facts: &InodeFacts) -> Result<(), RafsError> {
        let step = u64::from(self.image.chunk_bytes()).saturating_mul(8);
        let mut at = 0u64;
        while at < facts.size {
            let end = at.saturating_add(step);
            let mut pieces: SmallVec<[Piece; 8]> = SmallVec::new();
            self.image.plan(facts, at..end, &mut pieces)?;
            self.seen.chunks = self.seen.chunks.saturating_add(pieces.len() as u64);
            at = end;
        }
        self.seen.file_bytes = self.seen.file_bytes.saturating_add(facts.size);
        Ok(())
    }
}
