//! Structures on the wire, as in `include/uapi/linux/fuse.h` (protocol 7.45).
//!
//! FUSE is host-endian on both sides; virtio-fs says little-endian, which every machine we run on is. Fields keep the
//! kernel's names. Replies have the layout of 7.9 and later (but INIT's own, which comes before the version is
//! settled): the first kernels with virtio-fs spoke 7.27. Requests end where the fields we use end; what a newer kernel
//! appends is ignored.

#![expect(missing_docs, reason = "fields are those of the kernel's structures")]

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// Major version of the protocol.
pub const MAJOR: u32 = 7;

/// Newest minor version that this module knows.
pub const MINOR: u32 = 45;

/// Declares plain structures without padding that bytes can be read into and written from.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $(pub $field: $kind,)* }
    )*};
}

wire! {
    /// `fuse_in_header`
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16, padding: u16,
    }
    /// `fuse_out_header`
    OutHeader { len: u32, error: i32, unique: u64, }
    /// `fuse_attr`
    AttrOut {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// `fuse_entry_out`
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: AttrOut,
    }
    /// `fuse_attr_out`
    AttrReply { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: AttrOut, }
    /// `fuse_kstatfs`
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    /// `fuse_open_out`
    OpenOut { fh: u64, open_flags: u32, padding: u32, }
    /// `fuse_getxattr_out`
    GetxattrOut { size: u32, padding: u32, }
    /// `fuse_lseek_out`
    LseekOut { offset: u64, }
    /// `fuse_dirent` without the name
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32, }
    /// `fuse_init_out`
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, unused: [u32; 7],
    }

    /// `fuse_init_in`, the part every version has
    InitIn { major: u32, minor: u32, }
    /// `fuse_init_in`, the part since 7.6
    InitInFlags { max_readahead: u32, flags: u32, }
    /// `fuse_forget_in`
    ForgetIn { nlookup: u64, }
    /// `fuse_batch_forget_in`
    BatchForgetIn { count: u32, dummy: u32, }
    /// `fuse_forget_one`
    ForgetOne { nodeid: u64, nlookup: u64, }
    /// `fuse_getattr_in`
    GetattrIn { getattr_flags: u32, dummy: u32, fh: u64, }
    /// `fuse_statx_in`
    StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    /// `fuse_setattr_in`
    SetattrIn { words: [u64; 11], }
    /// `fuse_mknod_in`
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32, }
    /// `fuse_mkdir_in`
    MkdirIn { mode: u32, umask: u32, }
    /// `fuse_rename_in`
    RenameIn { newdir: u64, }
    /// `fuse_rename2_in`
    Rename2In { newdir: u64, flags: u32, padding: u32, }
    /// `fuse_link_in`
    LinkIn { oldnodeid: u64, }
    /// `fuse_open_in`
    OpenIn { flags: u32, open_flags: u32, }
    /// `fuse_create_in`
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// `fuse_release_in`
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// `fuse_flush_in`
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// `fuse_read_in`
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32, }
    /// `fuse_write_in`
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32, }
    /// `fuse_fsync_in`
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    /// `fuse_setxattr_in` without what SETXATTR_EXT adds
    SetxattrIn { size: u32, flags: u32, }
    /// `fuse_getxattr_in`
    GetxattrIn { size: u32, padding: u32, }
    /// `fuse_access_in`
    AccessIn { mask: u32, padding: u32, }
    /// `fuse_fallocate_in`
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// `fuse_lseek_in`
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32, }
    /// `fuse_copy_file_range_in`
    CopyFileRangeIn { fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64, }
}

/// `fuse_getattr_in.getattr_flags`: `fh` is valid.
pub const GETATTR_FH: u32 = 1 << 0;

/// `fuse_fsync_in.fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        for (name, ours, kernel) in [
            ("fuse_in_header", size_of::<InHeader>(), 40),
            ("fuse_out_header", size_of::<OutHeader>(), 16),
            ("fuse_attr", size_of::<AttrOut>(), 88),
            ("fuse_entry_out", size_of::<EntryOut>(), 128),
            ("fuse_attr_out", size_of::<AttrReply>(), 104),
            ("fuse_kstatfs", size_of::<StatfsOut>(), 80),
            ("fuse_open_out", size_of::<OpenOut>(), 16),
            ("fuse_dirent", size_of::<Dirent>(), 24),
            ("fuse_init_out", size_of::<InitOut>(), 64),
            ("fuse_setattr_in", size_of::<SetattrIn>(), 88),
            ("fuse_statx_in", size_of::<StatxIn>(), 24),
            ("fuse_read_in", size_of::<ReadIn>(), 40),
            ("fuse_write_in", size_of::<WriteIn>(), 40),
            ("fuse_release_in", size_of::<ReleaseIn>(), 24),
            ("fuse_flush_in", size_of::<FlushIn>(), 24),
            ("fuse_fallocate_in", size_of::<FallocateIn>(), 32),
            ("fuse_lseek_in", size_of::<LseekIn>(), 24),
            ("fuse_copy_file_range_in", size_of::<CopyFileRangeIn>(), 56),
        ] {
            assert_eq!(ours, kernel, "{name}");
        }
    }
}
