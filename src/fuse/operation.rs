//! What a guest can ask for, decoded.

use super::name::Name;

/// One request's operation and arguments (`include/uapi/linux/fuse.h`, protocol 7.45). INIT, DESTROY, INTERRUPT and
/// BATCH_FORGET do not appear: the server answers the first three itself and hands on each FORGET of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are those of the kernel's structures")]
pub enum Operation<'a> {
    /// Name in a directory; `.` and `..` are allowed (EXPORT_SUPPORT).
    Lookup {
        name: Name<'a>,
    },
    Forget {
        lookups: u64,
    },
    Getattr {
        fh: Option<u64>,
    },
    /// Flags and mask of STATX are those of the system call.
    Statx {
        flags: u32,
        mask: u32,
    },
    Readlink,
    Open {
        flags: u32,
    },
    Read {
        fh: u64,
        offset: u64,
        size: u32,
        flags: u32,
    },
    Release {
        fh: u64,
    },
    Flush {
        fh: u64,
    },
    Fsync {
        fh: u64,
        datasync: bool,
    },
    Statfs,
    Syncfs,
    /// `size` 0 asks for the length of the value.
    Getxattr {
        name: &'a [u8],
        size: u32,
    },
    /// `size` 0 asks for the length of the list.
    Listxattr {
        size: u32,
    },
    Opendir {
        flags: u32,
    },
    Readdir {
        fh: u64,
        offset: u64,
        size: u32,
    },
    Readdirplus {
        fh: u64,
        offset: u64,
        size: u32,
    },
    Releasedir {
        fh: u64,
    },
    Fsyncdir {
        fh: u64,
        datasync: bool,
    },
    Access {
        mask: u32,
    },
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    /// An operation that changes the file system; the read-only ones answer EROFS without looking inside.
    Change(Change),
    /// An operation nobody here serves (IOCTL, POLL, BMAP, locks, DAX mappings, ...), by its number.
    Other {
        opcode: u32,
    },
}

/// Operations that change a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the kernel")]
pub enum Change {
    Setattr,
    Symlink,
    Mknod,
    Mkdir,
    Unlink,
    Rmdir,
    Rename,
    Link,
    Write,
    Setxattr,
    Removexattr,
    Create,
    Tmpfile,
    Fallocate,
    CopyFileRange,
}
