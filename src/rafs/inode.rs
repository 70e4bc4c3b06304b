//! Attributes of one inode, and where its parts lie in the metadata.

use std::ops::ControlFlow;
use std::ops::Range;

use super::place::Place;

/// The seven file types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
}

impl Kind {
    /// The type in the type bits of an `st_mode`; `None` for a combination that no file type has.
    #[inline]
    pub fn of_mode(mode: u32) -> Option<Self> {
        match mode & 0xf000 {
            0x1000 => Some(Self::Fifo),
            0x2000 => Some(Self::CharDevice),
            0x4000 => Some(Self::Directory),
            0x6000 => Some(Self::BlockDevice),
            0x8000 => Some(Self::Regular),
            0xa000 => Some(Self::Symlink),
            0xc000 => Some(Self::Socket),
            _ => None,
        }
    }

    /// The `DT_*` value of directory entries.
    #[inline]
    pub fn dirent_type(self) -> u8 {
        match self {
            Self::Fifo => 1,
            Self::CharDevice => 2,
            Self::Directory => 4,
            Self::BlockDevice => 6,
            Self::Regular => 8,
            Self::Symlink => 10,
            Self::Socket => 12,
        }
    }
}

/// Attributes of an inode, as stored. Cheap to copy; stays valid as long as its [`super::image::Image`], and must be
/// given back only to that image.
#[derive(Debug, Clone, Copy)]
pub struct InodeFacts {
    /// Inode of the mount, and the `st_ino` to show: v5 the index of the first record with that inode number (which
    /// is the number), v6 the nid. Hard links share it.
    pub ino: u32,
    /// File type.
    pub kind: Kind,
    /// Full `st_mode`: type and permission bits.
    pub mode: u32,
    /// Owner as stored; meaningless without [`super::image::Image::has_owner_ids`].
    pub uid: u32,
    /// Group as stored; meaningless without [`super::image::Image::has_owner_ids`].
    pub gid: u32,
    /// Hard links, at least 1.
    pub nlink: u32,
    /// Device number in the kernel's 32-bit encoding (`minor & 0xff | major << 8 | (minor & !0xff) << 12`, which FUSE
    /// uses too); 0 for everything but devices.
    pub rdev: u32,
    /// `st_size` in bytes.
    pub size: u64,
    /// `st_blocks` in units of 512 bytes.
    pub blocks: u64,
    /// Modification time, seconds since 1970, may be negative.
    pub mtime: i64,
    /// Nanoseconds of the modification time, below 10^9.
    pub mtime_ns: u32,
    /// Where the inode's parts are.
    pub(super) place: Place,
}

/// What is called with the full name of each xattr and the range of its value in the metadata, until it breaks.
pub(super) type EachXattr<'a> = dyn FnMut(&[u8], Range<u64>) -> ControlFlow<()> + 'a;
