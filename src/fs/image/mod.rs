//! RAFS images as a file system.
//!
//! Stateless: an inode is its number in the image, a handle is nothing, and nothing a guest does leaves a trace but in
//! the cache of chunks. Content never changes, so names, attributes, and the absence of names may be believed for ever.
//! Metadata is read where it lies, on the calling thread; file data that is not ready is left to the store, with the
//! reply, so that no caller waits.

mod errno;
mod listing;

use std::sync::Arc;

use rustix::io::Errno;
use smallvec::SmallVec;

use super::ids::NodeIds;
use crate::fuse::filesystem::Request;
use crate::fuse::limiter::Limiter;
use crate::fuse::operation::Operation;
use crate::fuse::reply::Attr;
use crate::fuse::reply::Entry;
use crate::fuse::reply::Reply;
use crate::fuse::reply::Statfs;
use crate::fuse::reply::fopen;
use crate::fuse::slot::ReplySlot;
use crate::limits::FOREVER;
use crate::limits::GUEST_LOG_INTERVAL;
use crate::limits::MAX_NAME_BYTES;
use crate::rafs::RafsError;
use crate::rafs::facts::Piece;
use crate::rafs::image::Image;
use crate::rafs::inode::InodeFacts;
use crate::rafs::inode::Kind;
use crate::rafs::seek::Whence;
use crate::storage::store::Store;

/// `st_blksize`, and the unit of `statfs`: a page, as upstream's.
const BLOCK_BYTES: u32 = 4096;

/// Flags of open(2) on this wire (`include/uapi/asm-generic/fcntl.h`; those of all machines we serve).
mod open_flag {
    pub(super) const ACCMODE: u32 = 0o3;
    pub(super) const TRUNC: u32 = 0o1000;
}

/// Bits of access(2).
mod access {
    pub(super) const EXECUTE: u32 = 1;
    pub(super) const WRITE: u32 = 2;
    pub(super) const ALL: u32 = 7;
}

/// Whether extended attributes are served (`enable_xattr` of the configuration).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Xattrs {
    /// As the image has them.
    Served,
    /// Answered with EOPNOTSUPP.
    Hidden,
}

/// One RAFS image, read-only.
#[derive(Debug)]
pub struct ImageFs {
    image: Arc<Image>,
    store: Arc<Store>,
    xattrs: Xattrs,
    /// Shown where the image has no owner ids: those of this process.
    own_ids: (u32, u32),
    log: Limiter,
}

impl ImageFs {
    /// The file system in `image`, whose data comes from `store`.
    pub fn new(image: Arc<Image>, store: Arc<Store>, xattrs: Xattrs) -> Self {
        let own_ids = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { image, store, xattrs, own_ids, log: Limiter::new(GUEST_LOG_INTERVAL) }
    }

    /// Inode of the root directory.
    pub fn root(&self) -> u32 {
        self.image.root()
    }

    /// Whether any inode can have an extended attribute that is shown.
    pub fn has_xattrs(&self) -> bool {
        self.xattrs == Xattrs::Served && self.image.has_xattrs()
    }

    /// Serves one request about `inode`, which need not exist. `ids` are those under which the image is mounted.
    ///
    /// Completes `reply` on this thread, but for READ of data that is not ready: then on a thread of the store. Does
    /// not block.
    pub fn call<S: ReplySlot>(&self, ids: NodeIds, inode: u32, request: &Request<'_>, reply: Reply<S>) {
        match request.operation {
            Operation::Lookup { name } => self.lookup(ids, inode, name.as_bytes(), reply),
            Operation::Getattr { .. } => match self.inode(inode) {
                Ok(inode) => reply.attr(&self.attr(&inode), FOREVER),
                Err(errno) => reply.error(errno),
            },
            Operation::Readlink => match self.inode(inode).and_then(|inode| self.told(self.image.symlink(&inode))) {
                Ok(target) => reply.bytes(&target),
                Err(errno) => reply.error(errno),
            },
            Operation::Open { flags } => self.open(inode, flags, reply),
            Operation::Read { offset, size, .. } => self.read(inode, offset, size, reply),
            Operation::Opendir { .. } => match self.inode(inode) {
                Ok(inode) if inode.kind == Kind::Directory => reply.opened(0, fopen::KEEP_CACHE | fopen::CACHE_DIR),
                Ok(_) => reply.error(Errno::NOTDIR),
                Err(errno) => reply.error(errno),
            },
            Operation::Readdir { offset, size, .. } => self.readdir(inode, offset, size, reply),
            Operation::Readdirplus { offset, size, .. } => self.readdirplus(ids, inode, offset, size, reply),
            Operation::Getxattr { name, size } => self.getxattr(inode, name, size, reply),
            Operation::Listxattr { size } => self.listxattr(inode, size, reply),
            Operation::Statfs => reply.statfs(&self.statfs()),
            Operation::Access { mask } => match self.access(inode, request.uid, request.gid, mask) {
                Ok(()) => reply.empty(),
                Err(errno) => reply.error(errno),
            },
            Operation::Lseek { offset, whence, .. } => match self.seek(inode, offset, whence) {
                Ok(position) => reply.position(position),
                Err(errno) => reply.error(errno),
            },
            // Nothing is ever dirty, and handles hold nothing.
            Operation::Release { .. }
            | Operation::Releasedir { .. }
            | Operation::Flush { .. }
            | Operation::Fsync { .. }
            | Operation::Fsyncdir { .. }
            | Operation::Syncfs => reply.empty(),
            // Inodes are numbers of the image: there is no lookup to count.
            Operation::Forget { .. } => reply.nothing(),
            Operation::Change(_) => reply.error(Errno::ROFS),
            Operation::Statx { .. } | Operation::Other { .. } => reply.error(Errno::OPNOTSUPP),
        }
    }

    fn lookup<S: ReplySlot>(&self, ids: NodeIds, dir: u32, name: &[u8], reply: Reply<S>) {
        match self.child(dir, name) {
            Ok(Some(inode)) => reply.entry(&self.entry(ids, &inode)),
            Ok(None) => reply.negative(FOREVER),
            Err(errno) => reply.error(errno),
        }
    }

    fn child(&self, dir: u32, name: &[u8]) -> Result<Option<InodeFacts>, Errno> {
        let dir = self.inode(dir)?;
        // Export asks for `.` of any inode, to learn whether a file handle still names something.
        if matches!(name, b".") || matches!(name, b"..") && dir.ino == self.image.root() {
            return Ok(Some(dir));
        }
        self.told(self.image.find(&dir, name))
    }

    fn open<S: ReplySlot>(&self, inode: u32, flags: u32, reply: Reply<S>) {
        match self.inode(inode) {
            Ok(inode) if inode.kind == Kind::Directory => reply.error(Errno::ISDIR),
            Ok(_) if flags & (open_flag::ACCMODE | open_flag::TRUNC) != 0 => reply.error(Errno::ROFS),
            Ok(_) => reply.opened(0, fopen::KEEP_CACHE | fopen::NOFLUSH),
            Err(errno) => reply.error(errno),
        }
    }

    fn read<S: ReplySlot>(&self, inode: u32, offset: u64, size: u32, reply: Reply<S>) {
        let pieces = match self.plan(inode, offset, size) {
            Ok(pieces) => pieces,
            Err(errno) => return reply.error(errno),
        };
        if pieces.is_empty() {
            return reply.empty();
        }
        self.store.read(&pieces, move |read| match read {
            Ok(ready) => reply.data(move |sink| match ready.copy_into(sink) {
                Ok(()) => Ok(ready.len()),
                Err(_) => Err(Errno::IO),
            }),
            Err(error) => reply.error(error.errno()),
        });
    }

    /// The pieces of chunks that a read takes, clipped to the file.
    fn plan(&self, inode: u32, offset: u64, size: u32) -> Result<SmallVec<[Piece; 8]>, Errno> {
        let inode = self.inode(inode)?;
        if inode.kind == Kind::Directory {
            return Err(Errno::ISDIR);
        }
        let mut pieces = SmallVec::new();
        self.told(self.image.plan(&inode, offset..offset.saturating_add(size.into()), &mut pieces))?;
        Ok(pieces)
    }

    fn getxattr<S: ReplySlot>(&self, inode: u32, name: &[u8], size: u32, reply: Reply<S>) {
        if self.xattrs == Xattrs::Hidden {
            return reply.error(Errno::OPNOTSUPP);
        }
        match self.inode(inode).and_then(|inode| self.told(self.image.xattr(&inode, name))) {
            Ok(Some(value)) => answer_sized(&value, size, reply),
            Ok(None) => reply.error(Errno::NODATA),
            Err(errno) => reply.error(errno),
        }
    }

    fn listxattr<S: ReplySlot>(&self, inode: u32, size: u32, reply: Reply<S>) {
        if self.xattrs == Xattrs::Hidden {
            return reply.error(Errno::OPNOTSUPP);
        }
        match self.inode(inode).and_then(|inode| self.told(self.image.xattr_names(&inode))) {
            Ok(names) => answer_sized(&names, size, reply),
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self) -> Statfs {
        let totals = self.image.totals();
        Statfs {
            blocks: totals.data_bytes.div_ceil(BLOCK_BYTES.into()),
            files: totals.inodes,
            bsize: BLOCK_BYTES,
            frsize: BLOCK_BYTES,
            namelen: MAX_NAME_BYTES as u32,
            ..Statfs::default()
        }
    }

    /// access(2) by mode and owner. Guests check that themselves (`default_permissions`); this is for others.
    fn access(&self, inode: u32, uid: u32, gid: u32, mask: u32) -> Result<(), Errno> {
        let attr = self.attr(&self.inode(inode)?);
        if mask & !access::ALL != 0 {
            return Err(Errno::INVAL);
        }
        if mask & access::WRITE != 0 {
            return Err(Errno::ROFS);
        }
        let granted = if uid == 0 {
            let is_executable = attr.mode & 0o111 != 0 || Kind::of_mode(attr.mode) == Some(Kind::Directory);
            if is_executable { access::ALL } else { access::ALL & !access::EXECUTE }
        } else if uid == attr.uid {
            attr.mode >> 6
        } else if gid == attr.gid {
            attr.mode >> 3
        } else {
            attr.mode
        };
        if mask & !granted == 0 { Ok(()) } else { Err(Errno::ACCESS) }
    }

    fn seek(&self, inode: u32, offset: u64, whence: u32) -> Result<u64, Errno> {
        // SEEK_DATA and SEEK_HOLE; the others never leave the guest.
        let whence = match whence {
            3 => Whence::Data,
            4 => Whence::Hole,
            _ => return Err(Errno::INVAL),
        };
        let inode = self.inode(inode)?;
        self.told(self.image.seek(&inode, offset, whence))?.ok_or(Errno::NXIO)
    }

    #[inline]
    fn inode(&self, inode: u32) -> Result<InodeFacts, Errno> {
        self.told(self.image.inode(inode))
    }

    /// The error number of `outcome`; damage of the image is logged.
    #[inline]
    fn told<T>(&self, outcome: Result<T, RafsError>) -> Result<T, Errno> {
        outcome.map_err(|error| self.errno(&error))
    }

    #[cold]
    fn errno(&self, error: &RafsError) -> Errno {
        if errno::is_damage(error)
            && let Some(suppressed) = self.log.pass()
        {
            tracing::warn!(%error, suppressed, "image cannot be used");
        }
        errno::errno(error)
    }

    #[inline]
    fn entry(&self, ids: NodeIds, inode: &InodeFacts) -> Entry {
        Entry {
            node: ids.to_node(inode.ino),
            generation: 0,
            entry_valid: FOREVER,
            attr_valid: FOREVER,
            attr: self.attr(inode),
        }
    }

    #[inline]
    fn attr(&self, inode: &InodeFacts) -> Attr {
        let (uid, gid) = if self.image.has_owner_ids() { (inode.uid, inode.gid) } else { self.own_ids };
        // The image stores one time; a file that never changes has no other.
        let (time, ns) = (inode.mtime, inode.mtime_ns);
        Attr {
            ino: inode.ino.into(),
            size: inode.size,
            blocks: inode.blocks,
            atime: time,
            mtime: time,
            ctime: time,
            atime_ns: ns,
            mtime_ns: ns,
            ctime_ns: ns,
            mode: inode.mode,
            nlink: inode.nlink,
            uid,
            gid,
            rdev: inode.rdev,
            blksize: BLOCK_BYTES,
        }
    }
}

/// GETXATTR and LISTXATTR: the size if it is asked for, the bytes if they fit.
fn answer_sized<S: ReplySlot>(bytes: &[u8], size: u32, reply: Reply<S>) {
    match u32::try_from(bytes.len()) {
        Ok(len) if size == 0 => reply.xattr_size(len),
        Ok(len) if len <= size => reply.bytes(bytes),
        _ => reply.error(Errno::RANGE),
    }
}
