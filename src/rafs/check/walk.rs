//! The walk over a whole image: from the root, without recursion.

use std::collections::HashMap;
use std::collections::HashSet;
use std::collections::hash_map::Entry;
use std::ops::ControlFlow;
use std::sync::Arc;

use smallvec::SmallVec;

use super::Blobs;
use super::Finding;
use super::Part;
use super::Report;
use super::Seen;
use super::extents::Extents;
use super::extents::Owner;
use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::chunks::ChunkIndex;
use crate::rafs::entries::DirEntry;
use crate::rafs::facts::Piece;
use crate::rafs::image::Format;
use crate::rafs::image::Image;
use crate::rafs::inode::InodeFacts;
use crate::rafs::inode::Kind;
use crate::rafs::malformed;
use crate::rafs::place::Place;
use crate::rafs::version::Version;

/// Chunks of a file that are looked at together.
const STEP_CHUNKS: u64 = 8;

/// The survey gives up; why is in the report.
pub(super) struct GiveUp;

pub(super) type Steps<T = ()> = Result<T, GiveUp>;

/// A directory that was met: its way up, for paths.
pub(super) struct Directory {
    pub(super) ino: u32,
    /// Number of its parent; the root's is its own.
    parent: u32,
    name: Box<[u8]>,
    depth: usize,
}

/// What was met of an inode that is no directory.
struct Names {
    /// How many names it states, and how many it has.
    stated: u32,
    found: u32,
    /// The directory of the first of them.
    directory: u32,
}

/// What a listing has seen of a directory.
struct Listing {
    number: u32,
    facts: InodeFacts,
    /// Inode of the directory above.
    parent: u32,
    dots: u32,
    dotdots: u32,
    directories: u32,
    last: Vec<u8>,
    /// Whether some of its entries could not be read.
    is_broken: bool,
    /// Names whose inodes could not be read: perhaps directories.
    strange: u32,
}

pub(super) struct Walk<'a> {
    pub(super) image: &'a Image,
    blobs: &'a Blobs,
    pub(super) report: Report,
    pub(super) extents: Extents,
    /// All directories, in the order in which they were met: the root is 0.
    pub(super) directories: Vec<Directory>,
    /// Their numbers by inode.
    pub(super) numbers: HashMap<u32, u32>,
    names: HashMap<u32, Names>,
    index: Option<Arc<ChunkIndex>>,
    /// Names of the tables, by their numbers as owners.
    pub(super) parts: Vec<&'static str>,
    /// Faults that were met again.
    repeats: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(image: &'a Image, blobs: &'a Blobs) -> Self {
        Self {
            image,
            blobs,
            report: Report::default(),
            extents: Extents::new(image.view().len()),
            directories: Vec::new(),
            numbers: HashMap::new(),
            names: HashMap::new(),
            index: None,
            parts: Vec::new(),
            repeats: 0,
        }
    }

    pub(super) fn run(mut self) -> Report {
        if self.all().is_err() {
            self.report.gave_up = true;
        }
        // What overlaps explains why it gave up.
        let _ = self.overlaps();
        self.name_findings();
        self.report
    }

    fn all(&mut self) -> Steps {
        self.claim_tables()?;
        match self.image.chunk_index() {
            Ok(index) => self.index = Some(index),
            Err(fault) => self.found(None, fault)?,
        }
        self.tree()?;
        self.left_out()?;
        self.links()?;
        self.prefetch()?;
        if self.report.findings.is_empty()
            && let Err(fault) = self.image.verify_tree()
        {
            self.found(None, fault)?;
        }
        Ok(())
    }

    /// What the index of chunks leaves out, and nothing else has told.
    fn left_out(&mut self) -> Steps {
        let Some(index) = self.index.clone() else { return Ok(()) };
        let told: HashSet<(String, Option<u64>)> =
            self.report.findings.iter().map(|finding| (finding.field().to_owned(), finding.offset())).collect();
        for fault in index.faults() {
            let finding = Finding::of_image(fault.clone());
            if !told.contains(&(finding.field().to_owned(), finding.offset())) && !self.report.add(finding) {
                return Err(GiveUp);
            }
        }
        Ok(())
    }

    fn tree(&mut self) -> Steps {
        let root = self.image.root();
        self.directories.push(Directory { ino: root, parent: 0, name: Box::default(), depth: 0 });
        self.numbers.insert(root, 0);
        self.report.seen.paths = 1;
        match self.image.inode(root) {
            Ok(facts) => self.inode(&facts, 0, b"")?,
            Err(fault) => self.found(Some(b"/".to_vec()), fault)?,
        }
        let mut pending = vec![0];
        while let Some(number) = pending.pop() {
            self.directory(number, &mut pending)?;
        }
        self.count_names()?;
        self.count_inodes()
    }

    /// Notes a broken rule.
    pub(super) fn found(&mut self, path: Option<Vec<u8>>, fault: RafsError) -> Steps {
        if self.report.add(Finding { part: Part::Metadata, path, fault }) { Ok(()) } else { Err(GiveUp) }
    }

    /// As [`Walk::found`], on the name `name` in a directory; an empty one means the directory itself.
    fn found_at(&mut self, directory: u32, name: &[u8], fault: RafsError) -> Steps {
        let path = self.path(directory, name);
        self.found(Some(path), fault)
    }

    /// Lists a directory, whose inode was looked at before; directories in it are added to `pending`.
    fn directory(&mut self, number: u32, pending: &mut Vec<u32>) -> Steps {
        let image = self.image;
        let Some(ino) = self.directory_at(number).map(|directory| directory.ino) else { return Ok(()) };
        // What is wrong with the inode was told when it was met.
        let Ok(facts) = image.inode(ino) else { return Ok(()) };
        let mut listing = Listing::new(number, facts, self.parent_of(number));
        let (mut from, mut last) = (0, String::new());
        loop {
            let mut entries = match image.entries(&facts, from) {
                Ok(entries) => entries,
                Err(fault) => return self.found_at(number, b"", fault),
            };
            let fault = loop {
                match entries.next() {
                    None => return self.end_of_listing(&listing),
                    Some(Err(fault)) => break fault,
                    Some(Ok(entry)) => {
                        from = entry.next;
                        self.entry(&mut listing, &entry, pending)?;
                    }
                }
            };
            listing.is_broken = true;
            let text = fault.to_string();
            if text == last {
                // The whole block is bad, and the rest of it would only say so again.
                from = self.behind(from);
                self.repeat()?;
            } else {
                from = from.saturating_add(1);
                last = text;
                self.found_at(number, b"", fault)?;
            }
        }
    }

    /// A position behind the block of a listing that has `from`.
    fn behind(&self, from: u64) -> u64 {
        match self.image.version() {
            Version::V5 => from.saturating_add(1),
            Version::V6 => crate::rafs::v6::dir::next_block(from),
        }
    }

    /// Counts faults that are not told, because they were told already.
    fn repeat(&mut self) -> Steps {
        self.repeats = self.repeats.saturating_add(1);
        if self.repeats > limits::MAX_FINDINGS { Err(GiveUp) } else { Ok(()) }
    }

    fn entry(&mut self, listing: &mut Listing, entry: &DirEntry<'_>, pending: &mut Vec<u32>) -> Steps {
        match entry.name {
            b"." => listing.dots = listing.dots.saturating_add(1),
            b".." => {
                listing.dotdots = listing.dotdots.saturating_add(1);
                if entry.ino != listing.parent {
                    let reason = format!("{} instead of {}, the directory above", entry.ino, listing.parent);
                    let fault = malformed("inode of ..", offset(&listing.facts), reason);
                    self.found_at(listing.number, b"", fault)?;
                }
            }
            name => {
                self.order(listing, name, entry.ino)?;
                if let Some(directory) = self.child(listing, entry)? {
                    listing.directories = listing.directories.saturating_add(1);
                    pending.push(directory);
                }
            }
        }
        Ok(())
    }

    /// Names ascend, and what is listed is found.
    fn order(&mut self, listing: &mut Listing, name: &[u8], ino: u32) -> Steps {
        let shown = name.escape_ascii();
        let at = offset(&listing.facts);
        if name <= listing.last.as_slice() {
            let what = if name == listing.last.as_slice() { "stands twice in" } else { "is out of order in" };
            self.found_at(listing.number, name, malformed("name", at, format!("\"{shown}\" {what} its directory")))?;
        } else if !listing.is_broken {
            match self.image.lookup(&listing.facts, name) {
                Ok(Some(found)) if found == ino => {}
                Ok(_) => {
                    let fault = malformed("name", at, format!("\"{shown}\" is listed and not found"));
                    self.found_at(listing.number, name, fault)?;
                }
                // The entry or its inode: told elsewhere.
                Err(_) => {}
            }
        }
        listing.last.clear();
        listing.last.extend_from_slice(name);
        Ok(())
    }

    /// What the whole of a listing tells.
    fn end_of_listing(&mut self, listing: &Listing) -> Steps {
        if listing.is_broken {
            return Ok(());
        }
        let at = offset(&listing.facts);
        if (listing.dots, listing.dotdots) != (1, 1) {
            let reason = format!("has {} of ., {} of ..", listing.dots, listing.dotdots);
            self.found_at(listing.number, b"", malformed("directory", at, reason))?;
        }
        let expected = listing.directories.saturating_add(2);
        if listing.facts.nlink != expected && listing.strange == 0 {
            let reason = format!("{} instead of {expected}, for its directories", listing.facts.nlink);
            self.found_at(listing.number, b"", malformed("inode nlink", at, reason))?;
        }
        Ok(())
    }

    /// Follows a name. A directory that is met for the first time gets a number, which is given back.
    fn child(&mut self, listing: &mut Listing, entry: &DirEntry<'_>) -> Steps<Option<u32>> {
        self.report.seen.paths = self.report.seen.paths.saturating_add(1);
        let (directory, name) = (listing.number, entry.name);
        let facts = match self.image.inode(entry.ino) {
            Ok(facts) => facts,
            Err(fault) => {
                listing.strange = listing.strange.saturating_add(1);
                return self.found_at(directory, name, fault).map(|()| None);
            }
        };
        let at = offset(&facts);
        if facts.kind.dirent_type() != entry.kind {
            let reason = format!("{} for inode {}, which is a {:?}", entry.kind, entry.ino, facts.kind);
            self.found_at(directory, name, malformed("dirent type", at, reason))?;
        }
        if facts.kind == Kind::Directory {
            return self.child_directory(listing, &facts, name);
        }
        let is_new = match self.names.entry(facts.ino) {
            Entry::Vacant(row) => {
                row.insert(Names { stated: facts.nlink, found: 1, directory });
                true
            }
            Entry::Occupied(mut row) => {
                row.get_mut().found = row.get().found.saturating_add(1);
                false
            }
        };
        if is_new {
            self.inode(&facts, directory, name)?;
        } else if facts.kind != Kind::Regular && self.image.version() == Version::V5 {
            let reason = format!("inode {} is a {:?} with several names", facts.ino, facts.kind);
            self.found_at(directory, name, malformed("inode number", at, reason))?;
        }
        Ok(None)
    }

    fn child_directory(&mut self, listing: &Listing, facts: &InodeFacts, name: &[u8]) -> Steps<Option<u32>> {
        if self.numbers.contains_key(&facts.ino) {
            let reason = format!("inode {} has several names, or contains itself", facts.ino);
            self.found_at(listing.number, name, malformed("directory", offset(facts), reason))?;
            return Ok(None);
        }
        let depth = self.directory_at(listing.number).map_or(0, |parent| parent.depth).saturating_add(1);
        let number = u32::try_from(self.directories.len()).unwrap_or(u32::MAX);
        self.numbers.insert(facts.ino, number);
        self.directories.push(Directory { ino: facts.ino, parent: listing.number, name: name.into(), depth });
        self.inode(facts, listing.number, name)?;
        if depth > limits::MAX_TREE_DEPTH {
            let reason = format!("deeper than {} levels", limits::MAX_TREE_DEPTH);
            self.found_at(number, b"", malformed("directory tree", offset(facts), reason))?;
            return Ok(None);
        }
        Ok(Some(number))
    }

    /// Looks at all that belongs to one inode, met as `name` in `directory`.
    fn inode(&mut self, facts: &InodeFacts, directory: u32, name: &[u8]) -> Steps {
        let seen = &mut self.report.seen;
        seen.inodes = seen.inodes.saturating_add(1);
        let owner = Owner { ino: facts.ino, directory };
        let extents = match (&self.image.format, &facts.place) {
            (Format::V5(image), Place::V5(place)) => image.extent(place, facts.kind).map(|extent| [extent, 0..0]),
            (Format::V6(image), Place::V6(place)) => Ok(image.extents(place, facts.size, facts.kind)),
            _ => return Ok(()),
        };
        match extents {
            // Before any of it is read: what overlaps without end must not be read without end.
            Ok(extents) => extents.iter().try_for_each(|extent| self.claim(extent, owner))?,
            Err(fault) => return self.found_at(directory, name, fault),
        }
        match facts.kind {
            Kind::Regular => self.chunks(facts, directory, name)?,
            Kind::Symlink => {
                if let Err(fault) = self.image.symlink(facts) {
                    self.found_at(directory, name, fault)?;
                }
            }
            Kind::Directory => self.report.seen.directories = self.report.seen.directories.saturating_add(1),
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo | Kind::Socket => {}
        }
        self.xattrs(facts, directory, name)
    }

    pub(super) fn claim(&mut self, extent: &std::ops::Range<u64>, owner: Owner) -> Steps {
        if self.extents.claim(extent, owner) { Ok(()) } else { Err(GiveUp) }
    }

    fn xattrs(&mut self, facts: &InodeFacts, directory: u32, name: &[u8]) -> Steps {
        let mut known: HashSet<Vec<u8>> = HashSet::new();
        let (mut list_bytes, mut twice) = (0u64, None);
        let end = self.image.view().len();
        let outcome = self.image.for_each_xattr(facts, &mut |name, value| {
            list_bytes = list_bytes.saturating_add(name.len() as u64).saturating_add(1);
            if value.end > end {
                twice = Some(malformed("xattr value", value.start, "reaches beyond the end of the metadata"));
                return ControlFlow::Break(());
            }
            if !known.insert(name.to_vec()) {
                twice = Some(malformed("xattr name", value.start, format!("\"{}\" twice", name.escape_ascii())));
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        let is_hidden = !known.is_empty() && !self.image.has_xattrs();
        for fault in outcome.err().into_iter().chain(twice) {
            self.found_at(directory, name, fault)?;
        }
        let at = offset(facts);
        if list_bytes > limits::MAX_XATTR_LIST_BYTES.into() {
            let reason = format!("{list_bytes} bytes of names, at most {}", limits::MAX_XATTR_LIST_BYTES);
            self.found_at(directory, name, malformed("xattr names", at, reason))?;
        }
        if is_hidden {
            let fault = malformed("superblock flags", at, "HAS_XATTR is not set, and this inode has xattrs");
            self.found_at(directory, name, fault)?;
        }
        Ok(())
    }

    /// Reads a file's chunks in parts, so that memory does not grow with the file.
    fn chunks(&mut self, facts: &InodeFacts, directory: u32, name: &[u8]) -> Steps {
        let chunk_bytes = u64::from(self.image.chunk_bytes());
        let mut at = 0u64;
        while at < facts.size {
            let end = at.saturating_add(chunk_bytes.saturating_mul(STEP_CHUNKS));
            let mut pieces: SmallVec<[Piece; 8]> = SmallVec::new();
            let outcome = self.image.plan(facts, at..end, &mut pieces);
            for piece in &pieces {
                if let Err(fault) = self.piece(facts, at, piece) {
                    self.found_at(directory, name, fault)?;
                }
                let chunk = (piece.blob, piece.chunk);
                if self.blobs.damaged.contains(&chunk) && !self.report.damaged.contains_key(&chunk) {
                    let path = self.path(directory, name);
                    self.report.damaged.insert(chunk, path);
                }
                at = at.saturating_add(piece.len.into());
            }
            self.report.seen.chunks = self.report.seen.chunks.saturating_add(pieces.len() as u64);
            if let Err(fault) = outcome {
                self.found_at(directory, name, fault)?;
                // Behind the chunk that is wrong. Chunk sizes are powers of two.
                at = at.saturating_add(1).checked_next_multiple_of(chunk_bytes).unwrap_or(u64::MAX);
            }
        }
        let seen = &mut self.report.seen;
        seen.files = seen.files.saturating_add(1);
        seen.file_bytes = seen.file_bytes.saturating_add(facts.size);
        Ok(())
    }

    /// Compares what a file says of its chunk at `at` with the other places that describe it.
    fn piece(&self, facts: &InodeFacts, at: u64, piece: &Piece) -> Result<(), RafsError> {
        let disagrees = |whose: &str, offset: u64, bytes: u32| {
            let number = at / u64::from(self.image.chunk_bytes()).max(1);
            let place = match (&self.image.format, &facts.place) {
                (Format::V5(image), Place::V5(place)) => image.chunk_offset(place, number),
                (_, Place::V6(place)) => place.chunk_offset(number),
                (_, Place::V5(place)) => place.offset(),
            };
            let reason = format!(
                "{} bytes at {:#x} of blob {}, chunk {}; {whose} says {bytes} bytes at {offset:#x}",
                piece.len, piece.offset, piece.blob, piece.chunk
            );
            Err(malformed("chunk address", place, reason))
        };
        let ours = (piece.offset, piece.len);
        if let Some(index) = &self.index
            && let Some(seal) = index.seal(piece.blob, piece.chunk)?
            && ours != (seal.uncompressed_offset, seal.uncompressed_bytes)
        {
            return disagrees("another record", seal.uncompressed_offset, seal.uncompressed_bytes);
        }
        let blob = usize::try_from(piece.blob).unwrap_or(usize::MAX);
        if let Some(Some(table)) = self.blobs.tables.get(blob) {
            let chunk = table.chunk(piece.chunk)?;
            if ours != (chunk.uncompressed_offset, chunk.uncompressed_bytes) {
                return disagrees("the blob's chunk table", chunk.uncompressed_offset, chunk.uncompressed_bytes);
            }
        }
        Ok(())
    }

    /// Compares the names of each inode with its link count.
    fn count_names(&mut self) -> Steps {
        let mut wrong: Vec<(u32, u32, u32, u32)> = self
            .names
            .iter()
            .filter(|(_, names)| names.stated != names.found)
            .map(|(&ino, names)| (ino, names.stated, names.found, names.directory))
            .take(limits::MAX_FINDINGS.saturating_add(1))
            .collect();
        wrong.sort_unstable();
        for (ino, stated, found, directory) in wrong {
            let at = self.image.inode(ino).map_or(0, |facts| offset(&facts));
            let fault =
                malformed("inode nlink", at, format!("inode {ino} states {stated} links and has {found} names"));
            let name = self.name_in(directory, ino);
            self.found_at(directory, &name, fault)?;
        }
        Ok(())
    }

    /// Compares what was seen with what the superblock counts. Where something is broken the difference follows from it.
    fn count_inodes(&mut self) -> Steps {
        if !self.report.findings.is_empty() {
            return Ok(());
        }
        let stated = self.image.totals().inodes;
        let Seen { paths, inodes, .. } = self.report.seen;
        let (at, counted) = match self.image.version() {
            Version::V5 => (24, inodes),
            Version::V6 => (1040, paths),
        };
        if stated != counted {
            self.found(None, malformed("inode count", at, format!("{stated} stated, {counted} found")))?;
        }
        Ok(())
    }

    fn prefetch(&mut self) -> Steps {
        let inodes = match self.image.prefetch() {
            Ok(inodes) => inodes,
            Err(fault) => return self.found(None, fault),
        };
        let strange = |ino: &&u32| !self.names.contains_key(ino) && !self.numbers.contains_key(ino);
        let strange: Vec<u32> = inodes.iter().filter(strange).copied().collect();
        for ino in strange {
            self.found(None, malformed("prefetch table", 0, format!("inode {ino} has no name")))?;
        }
        Ok(())
    }

    pub(super) fn directory_at(&self, number: u32) -> Option<&Directory> {
        self.directories.get(usize::try_from(number).unwrap_or(usize::MAX))
    }

    fn parent_of(&self, number: u32) -> u32 {
        let parent = self.directory_at(number).and_then(|directory| self.directory_at(directory.parent));
        parent.map_or(0, |parent| parent.ino)
    }

    /// The path of `name` in a directory; of the directory itself if it is empty.
    pub(super) fn path(&self, directory: u32, name: &[u8]) -> Vec<u8> {
        let mut parts = Vec::new();
        let (mut number, mut bytes) = (directory, 0usize);
        while let Some(directory) = self.directory_at(number).filter(|_| number != 0) {
            bytes = bytes.saturating_add(directory.name.len());
            if bytes > limits::MAX_SHOWN_PATH_BYTES {
                parts.push(&b"..."[..]);
                break;
            }
            parts.push(&directory.name);
            number = directory.parent;
        }
        parts.reverse();
        parts.extend((!name.is_empty()).then_some(name));
        parts.iter().fold(if parts.is_empty() { b"/".to_vec() } else { Vec::new() }, |mut path, part| {
            path.push(b'/');
            path.extend_from_slice(part);
            path
        })
    }

    /// A name of `ino` in a directory; empty where it cannot be found any more.
    pub(super) fn name_in(&self, directory: u32, ino: u32) -> Vec<u8> {
        let facts = self.directory_at(directory).and_then(|directory| self.image.inode(directory.ino).ok());
        let Some(mut entries) = facts.as_ref().and_then(|facts| self.image.entries(facts, 0).ok()) else {
            return Vec::new();
        };
        while let Some(Ok(entry)) = entries.next() {
            if entry.ino == ino && !matches!(entry.name, b"." | b"..") {
                return entry.name.to_vec();
            }
        }
        Vec::new()
    }
}

impl Listing {
    fn new(number: u32, facts: InodeFacts, parent: u32) -> Self {
        Self {
            number,
            facts,
            parent,
            dots: 0,
            dotdots: 0,
            directories: 0,
            last: Vec::new(),
            is_broken: false,
            strange: 0,
        }
    }
}

/// Where an inode is.
pub(super) fn offset(facts: &InodeFacts) -> u64 {
    match &facts.place {
        Place::V5(place) => place.offset(),
        Place::V6(place) => place.offset(),
    }
}
