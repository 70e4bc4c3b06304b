//! The owned reply of one request, with a method per kind of answer.

use std::time::Duration;

use rustix::io::Errno;

use super::filesystem::NodeId;
use super::slot::ReplySlot;
use crate::sys::sink::Sink;

/// Attributes of an inode (`struct fuse_attr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "fields are those of stat(2)")]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: i64,
    pub mtime: i64,
    pub ctime: i64,
    pub atime_ns: u32,
    pub mtime_ns: u32,
    pub ctime_ns: u32,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// As the kernel encodes it on this wire: `new_encode_dev`.
    pub rdev: u32,
    pub blksize: u32,
}

/// A name that was looked up (`struct fuse_entry_out`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Node id; 0 in READDIRPLUS: attributes only, no inode is made and no lookup counted.
    pub node: NodeId,
    /// Generation of the node id.
    pub generation: u64,
    /// How long the name may be believed.
    pub entry_valid: Duration,
    /// How long the attributes may be believed.
    pub attr_valid: Duration,
    /// The attributes.
    pub attr: Attr,
}

/// Answer of STATFS (`struct fuse_kstatfs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "fields are those of statfs(2)")]
pub struct Statfs {
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
    pub bsize: u32,
    pub namelen: u32,
    pub frsize: u32,
}

/// `FOPEN_*` flags of OPEN and OPENDIR answers.
#[expect(missing_docs, reason = "named as in include/uapi/linux/fuse.h")]
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const NONSEEKABLE: u32 = 1 << 2;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const STREAM: u32 = 1 << 4;
    pub const NOFLUSH: u32 = 1 << 5;
}

/// The reply to one request. Consumed by its answer; dropped without one, the requester gets EIO.
pub struct Reply<S: ReplySlot> {
    slot: S,
    unique: u64,
}

impl<S: ReplySlot> Reply<S> {
    /// The reply to request `unique` that goes into `slot`.
    pub fn new(slot: S, unique: u64) -> Self {
        Self { slot, unique }
    }

    /// The kernel's id of the request.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Bytes of body that fit.
    pub fn room(&self) -> usize {
        self.slot.capacity().saturating_sub(super::slot::OUT_HEADER_BYTES)
    }

    /// Answers an error.
    pub fn error(self, errno: Errno) {
        let _ = errno;
        todo!()
    }

    /// Success without a body.
    pub fn empty(self) {
        todo!()
    }

    /// No reply at all: FORGET.
    pub fn nothing(self) {
        self.slot.send_nothing();
    }

    /// A name that exists.
    pub fn entry(self, entry: &Entry) {
        let _ = entry;
        todo!()
    }

    /// A name that does not exist, and may be believed not to for `valid`. `Duration::ZERO` answers ENOENT.
    pub fn negative(self, valid: Duration) {
        let _ = valid;
        todo!()
    }

    /// Attributes.
    pub fn attr(self, attr: &Attr, valid: Duration) {
        let _ = (attr, valid);
        todo!()
    }

    /// OPEN and OPENDIR, with `fopen` flags.
    pub fn opened(self, fh: u64, flags: u32) {
        let _ = (fh, flags);
        todo!()
    }

    /// Plain bytes: READLINK, an xattr value, a list of xattr names.
    pub fn bytes(self, bytes: &[u8]) {
        let _ = bytes;
        todo!()
    }

    /// The size of an xattr value or list that was asked for.
    pub fn xattr_size(self, size: u32) {
        let _ = size;
        todo!()
    }

    /// STATFS.
    pub fn statfs(self, statfs: &Statfs) {
        let _ = statfs;
        todo!()
    }

    /// LSEEK.
    pub fn position(self, offset: u64) {
        let _ = offset;
        todo!()
    }

    /// READ: `fill` puts the bytes straight into the requester's memory and returns their number.
    pub fn data<F>(self, fill: F)
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send + 'static,
    {
        self.slot.send_data(self.unique, fill);
    }

    /// READDIR and READDIRPLUS: `build` adds entries until it is told that the buffer of `size` bytes is full.
    pub fn directory<F>(self, size: u32, build: F)
    where
        F: FnOnce(&mut DirWriter<'_>) -> Result<(), Errno>,
    {
        let _ = (size, build);
        todo!()
    }
}

/// Builds the answer of READDIR and READDIRPLUS.
pub struct DirWriter<'a> {
    buffer: &'a mut Vec<u8>,
    limit: usize,
}

/// Whether an entry was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// It was; there may be room for another.
    Yes,
    /// It was not: the buffer is full. Stop.
    Full,
}

impl DirWriter<'_> {
    /// Adds an entry of READDIR. `next` is the offset at which the entry behind it is found, `kind` a `DT_*` value.
    pub fn plain(&mut self, ino: u64, next: u64, kind: u32, name: &[u8]) -> Added {
        let _ = (ino, next, kind, name, &mut self.buffer, self.limit);
        todo!()
    }

    /// Adds an entry of READDIRPLUS. `entry.node` 0 gives attributes only.
    pub fn plus(&mut self, entry: &Entry, next: u64, name: &[u8]) -> Added {
        let _ = (entry, next, name);
        todo!()
    }
}
