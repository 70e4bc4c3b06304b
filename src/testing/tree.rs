//! A walk over the whole tree of a mount through the fake guest, with many requests in flight, and its comparison with
//! the manifest of a reference image.
//!
//! Every path is listed both ways, looked up, its attributes asked for, its content, target and xattrs read. What the
//! ways say must agree with each other first, then with the manifest.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::VecDeque;

use sha2::Digest;
use sha2::Sha256;

use super::error::HarnessError;
use super::fuse_client::Attributes;
use super::fuse_client::DirectoryEntry;
use super::fuse_client::EntryReply;
use super::fuse_client::Listing;
use super::fuse_client::Request;
use super::fuse_client::directory_entries;
use super::fuse_client::opened;
use super::guest::Guest;
use super::lane::Reply;
use super::manifest;
use super::vmm::PATIENCE;

const ENOENT: i32 = 2;
const EIO: i32 = 5;
const ENOSYS: i32 = 38;
const ENODATA: i32 = 61;
const EOPNOTSUPP: i32 = 95;

/// How a tree is walked.
#[derive(Debug, Clone, Copy)]
pub struct WalkOptions {
    /// Requests in flight at most, over all queues.
    pub in_flight: usize,
    /// Bytes of one READ.
    pub read_bytes: u32,
    /// Bytes of one listing request.
    pub list_bytes: u32,
    /// End after so many replies, in the middle of everything; for tests that kill the daemon.
    pub end_after: Option<usize>,
}

impl WalkOptions {
    /// 32 requests in flight, reads of 64 KiB, listings of a page.
    pub const USUAL: Self = Self { in_flight: 32, read_bytes: 64 << 10, list_bytes: 4096, end_after: None };
}

/// One inode under one of its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Path from the root of the mount.
    pub path: Vec<u8>,
    /// Node id.
    pub node: u64,
    /// Attributes that LOOKUP answered.
    pub attributes: Attributes,
    /// Content of a regular file, as far as it was read.
    pub content: Vec<u8>,
    /// Bytes of the content that are not read yet.
    pub missing: u64,
    /// Target of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    fh: u64,
    listed: [Vec<(u64, u32, Vec<u8>)>; 2],
}

/// A reply with an error that a healthy image does not give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Path it is about.
    pub path: Vec<u8>,
    /// What was asked.
    pub what: String,
    /// The error.
    pub errno: i32,
}

/// What a walk has seen.
#[derive(Debug, Default)]
pub struct Tree {
    /// Everything found, in the order of discovery; the root first.
    pub found: Vec<Found>,
    /// Errors answered.
    pub failures: Vec<Failure>,
    /// Differences between the ways to ask the same, and broken promises.
    pub contradictions: Vec<String>,
    /// Replies received.
    pub replies: usize,
}

#[derive(Debug, Clone)]
enum Purpose {
    Lookup { dir: usize, listed: Box<DirectoryEntry> },
    Missing { dir: usize },
    Getattr { inode: usize },
    Opendir { inode: usize },
    List { inode: usize, listing: Listing },
    Open { inode: usize },
    Read { inode: usize, offset: u64, wanted: u64 },
    Readlink { inode: usize },
    XattrNames { inode: usize },
    Xattr { inode: usize, name: Vec<u8> },
}

impl Purpose {
    /// The inode it is about, and its verb.
    fn subject(&self) -> (usize, &'static str) {
        match self {
            Self::Lookup { dir, .. } => (*dir, "LOOKUP in it"),
            Self::Missing { dir } => (*dir, "LOOKUP of a missing name"),
            Self::Getattr { inode } => (*inode, "GETATTR"),
            Self::Opendir { inode } => (*inode, "OPENDIR"),
            Self::List { inode, listing: Listing::Plain } => (*inode, "READDIR"),
            Self::List { inode, listing: Listing::Plus } => (*inode, "READDIRPLUS"),
            Self::Open { inode } => (*inode, "OPEN"),
            Self::Read { inode, .. } => (*inode, "READ"),
            Self::Readlink { inode } => (*inode, "READLINK"),
            Self::XattrNames { inode } => (*inode, "LISTXATTR"),
            Self::Xattr { inode, .. } => (*inode, "GETXATTR"),
        }
    }
}

/// Walks the whole tree of `guest`'s mount over all its request queues.
///
/// # Errors
/// What ends the walk: a broken rule, a daemon that is gone. Errors the daemon answers are in [`Tree::failures`].
pub fn walk(guest: &mut Guest, options: &WalkOptions) -> Result<Tree, HarnessError> {
    let mut walk = Walk { options: *options, tree: Tree::default(), todo: VecDeque::new(), flying: HashMap::new() };
    let root = Attributes { mode: 0o040_000, ..Attributes::default() };
    walk.discover(b"/".to_vec(), 1, root);
    let mut turn = 0;
    loop {
        while walk.flying.len() < options.in_flight && walk.launch(guest, &mut turn)? {}
        guest.lanes().iter_mut().try_for_each(super::lane::Lane::publish)?;
        if walk.flying.is_empty() {
            walk.compare_listings();
            return Ok(walk.tree);
        }
        let (lane, done) = guest.wait_any(PATIENCE)?;
        let (unique, reply) = (done.unique, guest.lane(lane).reply(done));
        let purpose = walk.flying.remove(&unique);
        let purpose = purpose.ok_or_else(|| HarnessError::Violation(format!("reply to unknown request {unique}")))?;
        walk.tree.replies += 1;
        walk.take(&purpose, reply)?;
        if options.end_after.is_some_and(|limit| walk.tree.replies >= limit) {
            return Ok(walk.tree);
        }
    }
}

struct Walk {
    options: WalkOptions,
    tree: Tree,
    todo: VecDeque<(Request, Purpose)>,
    flying: HashMap<u64, Purpose>,
}

impl Walk {
    /// Submits the next request on the next queue with room; whether it did.
    fn launch(&mut self, guest: &mut Guest, turn: &mut usize) -> Result<bool, HarnessError> {
        let queues = guest.lanes().len() - 1;
        for _ in 0..queues {
            *turn = *turn % queues + 1;
            let lane = guest.lane(*turn);
            if lane.room() == 0 {
                continue;
            }
            let Some((request, purpose)) = self.todo.pop_front() else { return Ok(false) };
            let unique = lane.submit(&request)?;
            self.flying.insert(unique, purpose);
            return Ok(true);
        }
        Ok(false)
    }

    fn ask(&mut self, request: Request, purpose: Purpose) {
        self.todo.push_back((request, purpose));
    }

    fn contradiction(&mut self, inode: usize, what: impl AsRef<str>) {
        let path = String::from_utf8_lossy(&self.tree.found[inode].path);
        self.tree.contradictions.push(format!("{path}: {}", what.as_ref()));
    }

    /// Notes a new path and asks everything about it.
    fn discover(&mut self, path: Vec<u8>, node: u64, attributes: Attributes) {
        let inode = self.tree.found.len();
        let kind = attributes.mode & 0o170_000;
        let size = if kind == 0o100_000 { attributes.size } else { 0 };
        self.tree.found.push(Found {
            path,
            node,
            attributes,
            content: vec![0; size as usize],
            missing: size,
            target: None,
            xattrs: BTreeMap::new(),
            fh: 0,
            listed: [Vec::new(), Vec::new()],
        });
        self.ask(Request::getattr(node), Purpose::Getattr { inode });
        self.ask(Request::listxattr(node, 65536), Purpose::XattrNames { inode });
        match kind {
            0o040_000 => {
                self.ask(Request::opendir(node), Purpose::Opendir { inode });
                self.ask(Request::lookup(node, b"no such name"), Purpose::Missing { dir: inode });
            }
            0o100_000 => self.ask(Request::open(node, 0o100_000), Purpose::Open { inode }),
            0o120_000 => self.ask(Request::readlink(node), Purpose::Readlink { inode }),
            _ => {}
        }
    }

    fn take(&mut self, purpose: &Purpose, reply: Reply) -> Result<(), HarnessError> {
        let tolerated: &[i32] = match purpose {
            Purpose::Missing { .. } => &[ENOENT],
            Purpose::Open { .. } | Purpose::Opendir { .. } => &[ENOSYS],
            // ENOSYS: no inode of this device has any.
            Purpose::XattrNames { .. } => &[EOPNOTSUPP, ENODATA, ENOSYS],
            _ => &[],
        };
        if reply.errno != 0 && !tolerated.contains(&reply.errno) {
            let (inode, what) = purpose.subject();
            let failure = Failure { path: self.tree.found[inode].path.clone(), what: what.into(), errno: reply.errno };
            self.tree.failures.push(failure);
            return Ok(());
        }
        match purpose {
            Purpose::Lookup { dir, listed } => self.take_lookup(*dir, listed, &reply.body),
            Purpose::Missing { dir } => self.take_missing(*dir, &reply),
            Purpose::Getattr { inode } => self.take_getattr(*inode, &reply.body),
            Purpose::Opendir { inode } => self.take_opendir(*inode, &reply),
            Purpose::List { inode, listing } => self.take_listing(*inode, *listing, &reply.body),
            Purpose::Open { inode } => self.take_open(*inode, &reply),
            Purpose::Read { inode, offset, wanted } => {
                self.take_read(*inode, *offset, *wanted, &reply.body);
                Ok(())
            }
            Purpose::Readlink { inode } => {
                self.tree.found[*inode].target = Some(reply.body);
                Ok(())
            }
            Purpose::XattrNames { inode } => {
                let node = self.tree.found[*inode].node;
                for name in reply.body.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
                    let purpose = Purpose::Xattr { inode: *inode, name: name.to_vec() };
                    self.ask(Request::getxattr(node, name, 65536), purpose);
                }
                Ok(())
            }
            Purpose::Xattr { inode, name } => {
                self.tree.found[*inode].xattrs.insert(name.clone(), reply.body);
                Ok(())
            }
        }
    }

    fn take_lookup(&mut self, dir: usize, listed: &DirectoryEntry, body: &[u8]) -> Result<(), HarnessError> {
        let entry = EntryReply::from_lookup(body)?;
        let name = String::from_utf8_lossy(&listed.name).into_owned();
        if entry.node == 0 {
            self.contradiction(dir, format!("{name} is listed but does not exist"));
            return Ok(());
        }
        if listed.entry.is_some_and(|plus| plus.node != 0 && plus != entry) {
            self.contradiction(dir, format!("READDIRPLUS and LOOKUP of {name} disagree"));
        }
        if listed.kind != entry.attributes.mode >> 12 || listed.ino != entry.attributes.ino {
            self.contradiction(dir, format!("kind or inode number of {name} differ between listing and LOOKUP"));
        }
        let parent = &self.tree.found[dir].path;
        let slash: &[u8] = if parent == b"/" { b"" } else { b"/" };
        let path = [parent, slash, &listed.name].concat();
        self.discover(path, entry.node, entry.attributes);
        Ok(())
    }

    /// A missing name is ENOENT, or an entry with node 0 that may be believed for a time.
    fn take_missing(&mut self, dir: usize, reply: &Reply) -> Result<(), HarnessError> {
        if reply.errno == 0 && EntryReply::from_lookup(&reply.body)?.node != 0 {
            self.contradiction(dir, "a name that nobody made exists");
        }
        Ok(())
    }

    fn take_getattr(&mut self, inode: usize, body: &[u8]) -> Result<(), HarnessError> {
        let (attributes, _) = Attributes::from_getattr(body)?;
        if inode == 0 {
            self.tree.found[0].attributes = attributes;
        } else if attributes != self.tree.found[inode].attributes {
            self.contradiction(inode, "GETATTR and LOOKUP disagree");
        }
        Ok(())
    }

    fn take_opendir(&mut self, inode: usize, reply: &Reply) -> Result<(), HarnessError> {
        let fh = if reply.errno == ENOSYS { 0 } else { opened(&reply.body)?.0 };
        self.tree.found[inode].fh = fh;
        self.list(inode, Listing::Plus, 0);
        self.list(inode, Listing::Plain, 0);
        Ok(())
    }

    fn list(&mut self, inode: usize, listing: Listing, offset: u64) {
        let Found { node, fh, .. } = self.tree.found[inode];
        let size = self.options.list_bytes;
        let request = match listing {
            Listing::Plain => Request::readdir(node, fh, offset, size),
            Listing::Plus => Request::readdirplus(node, fh, offset, size),
        };
        self.ask(request, Purpose::List { inode, listing });
    }

    fn take_listing(&mut self, inode: usize, listing: Listing, body: &[u8]) -> Result<(), HarnessError> {
        let entries = directory_entries(body, listing)?;
        if let Some(last) = entries.last() {
            self.list(inode, listing, last.next);
        }
        let node = self.tree.found[inode].node;
        for entry in entries {
            let seen = (entry.ino, entry.kind, entry.name.clone());
            self.tree.found[inode].listed[usize::from(listing == Listing::Plus)].push(seen);
            if listing == Listing::Plus && !matches!(entry.name.as_slice(), b"." | b"..") {
                let request = Request::lookup(node, &entry.name);
                self.ask(request, Purpose::Lookup { dir: inode, listed: Box::new(entry) });
            }
        }
        Ok(())
    }

    fn take_open(&mut self, inode: usize, reply: &Reply) -> Result<(), HarnessError> {
        let fh = if reply.errno == ENOSYS { 0 } else { opened(&reply.body)?.0 };
        let node = self.tree.found[inode].node;
        let size = self.tree.found[inode].attributes.size;
        let step = u64::from(self.options.read_bytes);
        // One read more than there are bytes: the end must show as a read of nothing.
        for offset in (0..=size).step_by(step as usize).chain((size > 0).then_some(size)) {
            let wanted = step.min(size - offset);
            self.ask(Request::read(node, fh, offset, step as u32), Purpose::Read { inode, offset, wanted });
        }
        Ok(())
    }

    fn take_read(&mut self, inode: usize, offset: u64, wanted: u64, body: &[u8]) {
        if body.len() as u64 != wanted {
            self.contradiction(inode, format!("{} bytes read at {offset}, {wanted} wanted", body.len()));
            return;
        }
        let found = &mut self.tree.found[inode];
        found.content[offset as usize..][..body.len()].copy_from_slice(body);
        found.missing -= body.len() as u64;
    }

    fn compare_listings(&mut self) {
        for inode in 0..self.tree.found.len() {
            let [plain, plus] = &self.tree.found[inode].listed;
            let mut names: Vec<_> = plain.iter().map(|entry| &entry.2).collect();
            names.sort();
            let count = names.len();
            names.dedup();
            if names.len() != count {
                self.contradiction(inode, "a name is listed twice");
            } else if plain != plus {
                self.contradiction(inode, "READDIR and READDIRPLUS disagree");
            }
        }
    }
}

impl Tree {
    /// Everything that differs from `manifest`, one line each; empty when all is right.
    pub fn differences(&self, manifest: &[manifest::Entry]) -> Vec<String> {
        let mut lines = self.contradictions.clone();
        lines.extend(
            self.failures
                .iter()
                .map(|failure| format!("{}: {} answered errno {}", text(&failure.path), failure.what, failure.errno)),
        );
        let found: BTreeMap<_, _> = self.found.iter().map(|found| (&found.path, found)).collect();
        for wanted in manifest {
            match found.get(&wanted.path) {
                Some(found) => found.compare(wanted, &mut lines),
                None => lines.push(format!("{}: missing", text(&wanted.path))),
            }
        }
        let known: std::collections::BTreeSet<_> = manifest.iter().map(|entry| &entry.path).collect();
        lines.extend(found.keys().filter(|p| !known.contains(**p)).map(|p| format!("{}: not in the image", text(p))));
        lines
    }

    /// For a mount whose files are damaged: what was answered, and is neither as in `manifest` nor EIO; one line each.
    pub fn lies(&self, manifest: &[manifest::Entry]) -> Vec<String> {
        let mut lines = Vec::new();
        for failure in self.failures.iter().filter(|failure| failure.errno != EIO) {
            lines.push(format!("{}: {} answered errno {}", text(&failure.path), failure.what, failure.errno));
        }
        let wanted: BTreeMap<_, _> = manifest.iter().map(|entry| (&entry.path, entry)).collect();
        for found in self.found.iter().filter(|found| found.missing == 0 && found.path != b"/") {
            let seen = found.as_manifest();
            match wanted.get(&found.path) {
                None => lines.push(format!("{}: not in the image", text(&found.path))),
                Some(wanted) if (seen.kind, seen.mode, seen.size) != (wanted.kind, wanted.mode, wanted.size) => {
                    lines.push(format!("{}: is {seen:?}, should be {wanted:?}", text(&found.path)));
                }
                Some(wanted) if seen.sha256 != wanted.sha256 => {
                    lines.push(format!("{}: wrong content", text(&found.path)));
                }
                Some(_) => {}
            }
        }
        lines
    }
}

impl Found {
    fn compare(&self, wanted: &manifest::Entry, lines: &mut Vec<String>) {
        let seen = self.as_manifest();
        let mut wanted = wanted.clone();
        if wanted.path == b"/" {
            // The manifests show upstream's idea of the root's attributes, not the image's.
            (wanted.mode, wanted.uid, wanted.gid, wanted.mtime) = (seen.mode, seen.uid, seen.gid, seen.mtime);
        }
        if self.missing > 0 {
            // Said by the failures already.
            wanted.sha256 = None;
        }
        let mut unlike = |field: &str, seen: &dyn std::fmt::Debug, wanted: &dyn std::fmt::Debug| {
            let (seen, wanted) = (format!("{seen:?}"), format!("{wanted:?}"));
            if seen != wanted {
                lines.push(format!("{}: {field} is {seen}, should be {wanted}", text(&self.path)));
            }
        };
        unlike("kind", &char::from(seen.kind), &char::from(wanted.kind));
        unlike("mode", &seen.mode, &wanted.mode);
        unlike("owner", &(seen.uid, seen.gid), &(wanted.uid, wanted.gid));
        unlike("size", &seen.size, &wanted.size);
        unlike("link count", &seen.nlink, &wanted.nlink);
        unlike("device", &seen.rdev, &wanted.rdev);
        unlike("mtime", &seen.mtime, &wanted.mtime);
        unlike("content", &seen.sha256, &wanted.sha256);
        unlike("target", &seen.target, &wanted.target);
        unlike("xattrs", &seen.xattrs, &wanted.xattrs);
    }

    /// What was seen, in the manifest's terms.
    pub fn as_manifest(&self) -> manifest::Entry {
        let a = &self.attributes;
        let kind = match a.mode & 0o170_000 {
            0o040_000 => b'd',
            0o100_000 => b'f',
            0o120_000 => b'l',
            0o020_000 => b'c',
            0o060_000 => b'b',
            0o010_000 => b'p',
            0o140_000 => b's',
            _ => b'?',
        };
        manifest::Entry {
            path: self.path.clone(),
            kind,
            mode: a.mode & 0o7777,
            uid: a.uid,
            gid: a.gid,
            size: (kind != b'd').then_some(a.size),
            nlink: a.nlink,
            rdev: matches!(kind, b'c' | b'b').then(|| a.device()),
            mtime: Some((a.mtime, a.mtime_ns)),
            sha256: (kind == b'f' && self.missing == 0).then(|| Sha256::digest(&self.content).into()),
            target: self.target.clone(),
            xattrs: self.xattrs.clone(),
        }
    }
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
