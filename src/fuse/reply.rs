//! The owned reply of one request, with a method per kind of answer.

use std::time::Duration;

use rustix::io::Errno;
use zerocopy::Immutable;
use zerocopy::IntoBytes;

use super::directory::with_buffer;
use super::filesystem::NodeId;
use super::slot::OUT_HEADER_BYTES;
use super::slot::ReplySlot;
use super::wire;
use crate::limits::MAX_IO_BYTES;
use crate::sys::sink::Sink;

pub use super::directory::Added;
pub use super::directory::DirWriter;

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
        self.slot.capacity().saturating_sub(OUT_HEADER_BYTES)
    }

    /// Answers an error.
    pub fn error(self, errno: Errno) {
        if self.slot.capacity() < OUT_HEADER_BYTES {
            return self.slot.send_nothing();
        }
        let header = wire::OutHeader {
            len: OUT_HEADER_BYTES as u32,
            error: errno.raw_os_error().saturating_neg(),
            unique: self.unique,
        };
        self.slot.send(&[header.as_bytes()]);
    }

    /// Success without a body.
    pub fn empty(self) {
        self.raw(&[], Errno::IO);
    }

    /// No reply at all: FORGET.
    pub fn nothing(self) {
        self.slot.send_nothing();
    }

    /// A name that exists.
    pub fn entry(self, entry: &Entry) {
        self.body(&entry_out(entry));
    }

    /// A name that does not exist, and may be believed not to for `valid`. `Duration::ZERO` answers ENOENT.
    pub fn negative(self, valid: Duration) {
        if valid.is_zero() {
            return self.error(Errno::NOENT);
        }
        let nothing =
            Entry { node: 0, generation: 0, entry_valid: valid, attr_valid: Duration::ZERO, attr: Attr::default() };
        self.body(&entry_out(&nothing));
    }

    /// Attributes.
    pub fn attr(self, attr: &Attr, valid: Duration) {
        self.body(&wire::AttrReply {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr: attr_out(attr),
        });
    }

    /// OPEN and OPENDIR, with `fopen` flags.
    pub fn opened(self, fh: u64, flags: u32) {
        self.body(&wire::OpenOut { fh, open_flags: flags, padding: 0 });
    }

    /// Plain bytes: READLINK, an xattr value, a list of xattr names. ERANGE when they do not fit.
    pub fn bytes(self, bytes: &[u8]) {
        self.raw(bytes, Errno::RANGE);
    }

    /// The size of an xattr value or list that was asked for.
    pub fn xattr_size(self, size: u32) {
        self.body(&wire::GetxattrOut { size, padding: 0 });
    }

    /// STATFS.
    pub fn statfs(self, statfs: &Statfs) {
        self.body(&wire::StatfsOut {
            blocks: statfs.blocks,
            bfree: statfs.bfree,
            bavail: statfs.bavail,
            files: statfs.files,
            ffree: statfs.ffree,
            bsize: statfs.bsize,
            namelen: statfs.namelen,
            frsize: statfs.frsize,
            padding: 0,
            spare: [0; 6],
        });
    }

    /// LSEEK.
    pub fn position(self, offset: u64) {
        self.body(&wire::LseekOut { offset });
    }

    /// READ: `fill` puts the bytes straight into the requester's memory and returns their number.
    pub fn data<F>(self, fill: F)
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send + 'static,
    {
        if self.slot.capacity() < OUT_HEADER_BYTES {
            return self.slot.send_nothing();
        }
        self.slot.send_data(self.unique, fill);
    }

    /// READDIR and READDIRPLUS: `build` adds entries until it is told that the buffer of `size` bytes is full.
    ///
    /// An error of `build` behind entries that were added is not lost: they are answered, and the guest meets the
    /// error when it asks for the next one. A first entry that does not fit is EINVAL, as getdents(2) has it; an empty
    /// answer would be taken for the end of the directory.
    pub fn directory<F>(self, size: u32, build: F)
    where
        F: FnOnce(&mut DirWriter<'_>) -> Result<(), Errno>,
    {
        let limit = (size.min(MAX_IO_BYTES) as usize).min(self.room());
        with_buffer(limit, |buffer| {
            let mut writer = DirWriter::new(buffer);
            let built = build(&mut writer);
            match built {
                Err(errno) if writer.bytes().is_empty() => self.error(errno),
                Ok(()) if writer.bytes().is_empty() && writer.is_full() => self.error(Errno::INVAL),
                _ => self.raw(writer.bytes(), Errno::IO),
            }
        });
    }

    /// A body whose layout is fixed. A requester that left no room for it is broken: EIO.
    pub(super) fn body<B: IntoBytes + Immutable>(self, body: &B) {
        self.raw(body.as_bytes(), Errno::IO);
    }

    /// `body` if it fits, else the error `unless_it_fits`.
    pub(super) fn raw(self, body: &[u8], unless_it_fits: Errno) {
        let len = body.len().saturating_add(OUT_HEADER_BYTES);
        if len > self.slot.capacity() {
            return self.error(unless_it_fits);
        }
        let Ok(len) = u32::try_from(len) else { return self.error(unless_it_fits) };
        let header = wire::OutHeader { len, error: 0, unique: self.unique };
        if body.is_empty() {
            self.slot.send(&[header.as_bytes()]);
        } else {
            self.slot.send(&[header.as_bytes(), body]);
        }
    }
}

/// `entry` as it lies on the wire.
pub(super) fn entry_out(entry: &Entry) -> wire::EntryOut {
    wire::EntryOut {
        nodeid: entry.node,
        generation: entry.generation,
        entry_valid: entry.entry_valid.as_secs(),
        attr_valid: entry.attr_valid.as_secs(),
        entry_valid_nsec: entry.entry_valid.subsec_nanos(),
        attr_valid_nsec: entry.attr_valid.subsec_nanos(),
        attr: attr_out(&entry.attr),
    }
}

fn attr_out(attr: &Attr) -> wire::AttrOut {
    wire::AttrOut {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        // The wire says u64; the kernel takes it for a signed number.
        atime: attr.atime.cast_unsigned(),
        mtime: attr.mtime.cast_unsigned(),
        ctime: attr.ctime.cast_unsigned(),
        atimensec: attr.atime_ns,
        mtimensec: attr.mtime_ns,
        ctimensec: attr.ctime_ns,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: attr.blksize,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::recording::Ending;
    use super::super::recording::RecordingSlot;
    use super::*;
    use crate::limits::FOREVER;

    fn answer(capacity: usize, work: impl FnOnce(Reply<RecordingSlot>)) -> Ending {
        let (slot, record) = RecordingSlot::new(capacity);
        work(Reply::new(slot, 77));
        record.only()
    }

    fn u64_at(body: &[u8], offset: usize) -> u64 {
        u64::from_ne_bytes(body[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn bodies_lie_as_the_kernel_reads_them() {
        let attr = Attr { ino: 3, size: 4, mtime: -1, mtime_ns: 5, mode: 0o100_644, blksize: 4096, ..Attr::default() };
        let entry = Entry { node: 9, generation: 1, entry_valid: FOREVER, attr_valid: FOREVER, attr };
        let body = answer(4096, |reply| reply.entry(&entry)).body();
        assert_eq!(body.len(), 128);
        assert_eq!([0, 8, 16, 24].map(|at| u64_at(&body, at)), [9, 1, 1 << 32, 1 << 32]);
        assert_eq!((u64_at(&body, 40), u64_at(&body, 48), u64_at(&body, 72)), (3, 4, u64::MAX));
        let body = answer(4096, |reply| reply.attr(&attr, Duration::from_millis(1500))).body();
        assert_eq!(body.len(), 104);
        assert_eq!((u64_at(&body, 0), u64_at(&body, 8), u64_at(&body, 16)), (1, 500_000_000, 3));
        let body = answer(4096, |reply| reply.negative(FOREVER)).body();
        assert_eq!((u64_at(&body, 0), u64_at(&body, 16), body.len()), (0, 1 << 32, 128));
        assert_eq!(answer(4096, |reply| reply.negative(Duration::ZERO)).errno(), Some(Errno::NOENT));
        assert_eq!(u64_at(&answer(4096, |reply| reply.opened(7, fopen::KEEP_CACHE)).body(), 8), 2);
        assert_eq!(answer(4096, |reply| reply.xattr_size(8)).body(), [8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(u64_at(&answer(4096, |reply| reply.position(5)).body(), 0), 5);
        let statfs = Statfs { files: 6, namelen: 255, ..Statfs::default() };
        let body = answer(4096, |reply| reply.statfs(&statfs)).body();
        assert_eq!((body.len(), u64_at(&body, 24), body[44]), (80, 6, 255));
    }

    #[test]
    fn replies_that_do_not_fit_become_errors_or_nothing() {
        let entry = Entry { node: 9, generation: 0, entry_valid: FOREVER, attr_valid: FOREVER, attr: Attr::default() };
        assert_eq!(answer(143, |reply| reply.entry(&entry)).errno(), Some(Errno::IO));
        assert_eq!(answer(144, |reply| reply.entry(&entry)).errno(), None);
        assert_eq!(answer(19, |reply| reply.bytes(b"value")).errno(), Some(Errno::RANGE));
        assert_eq!(answer(21, |reply| reply.bytes(b"value")).body(), b"value");
        assert_eq!(answer(16, |reply| reply.bytes(b"")).body(), b"");
        assert_eq!(answer(15, Reply::empty), Ending::Nothing);
        assert_eq!(answer(15, |reply| reply.entry(&entry)), Ending::Nothing);
        assert_eq!(answer(15, |reply| reply.data(|_| Ok(0))), Ending::Nothing);
        assert_eq!(answer(0, |reply| reply.error(Errno::NOENT)), Ending::Nothing);
        assert_eq!(answer(4096, drop), Ending::Dropped);
    }

    #[test]
    fn directory_entries_are_aligned_and_stop_at_the_limit() {
        let names = [&b"."[..], b"..", b"eight888", b"nine99999"];
        let list = |size: u32, capacity: usize| {
            answer(capacity, |reply| {
                reply.directory(size, |writer| {
                    let _ = names.iter().zip(1..).all(|(name, at)| writer.plain(at, at + 10, 4, name) == Added::Yes);
                    Ok(())
                });
            })
        };
        let whole = list(4096, 4096).body();
        assert_eq!(whole.len(), 32 + 32 + 32 + 40);
        assert_eq!((u64_at(&whole, 64), u64_at(&whole, 72)), (3, 13));
        assert_eq!(&whole[88..96], b"eight888");
        assert_eq!(list(64 + 31, 4096).body(), whole[..64]);
        assert_eq!(list(4096, 16 + 96).body(), whole[..96], "bounded by the room as well");
        assert_eq!(list(u32::MAX, 4096).body(), whole);
        assert_eq!(list(31, 4096).errno(), Some(Errno::INVAL), "not the end of the directory");
        assert_eq!(list(4096, 16).errno(), Some(Errno::INVAL));
        assert_eq!(answer(4096, |reply| reply.directory(100, |_| Ok(()))).body(), b"");
    }

    #[test]
    fn directory_error_shows_only_where_no_entry_came_before() {
        let fail_after = |entries: u64| {
            answer(4096, |reply| {
                reply.directory(4096, |writer| {
                    (0..entries).for_each(|at| assert_eq!(writer.plain(at, at, 8, b"name"), Added::Yes));
                    Err(Errno::IO)
                });
            })
        };
        assert_eq!(fail_after(0).errno(), Some(Errno::IO));
        assert_eq!(fail_after(1).body().len(), 32);
    }

    #[test]
    fn plus_entries_carry_attributes_and_their_type() {
        let attr = Attr { ino: 3, mode: 0o040_755, ..Attr::default() };
        let entry = Entry { node: 9, generation: 0, entry_valid: FOREVER, attr_valid: FOREVER, attr };
        let body = answer(4096, |reply| {
            reply.directory(4096, |writer| {
                assert_eq!(writer.plus(&entry, 2, b"sub"), Added::Yes);
                Ok(())
            });
        })
        .body();
        assert_eq!(body.len(), 128 + 24 + 8);
        assert_eq!((u64_at(&body, 0), u64_at(&body, 128), u64_at(&body, 136)), (9, 3, 2));
        assert_eq!((body[144], body[148], &body[152..155]), (3, 4, &b"sub"[..]));
    }
}
