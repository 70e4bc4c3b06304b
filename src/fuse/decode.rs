//! Arguments of requests: bytes to [`Operation`].
//!
//! Lengths are checked here and nowhere later. Bytes behind the arguments we know are ignored, since newer kernels
//! append to their structures; where the arguments end in names, the end must be exact.

use rustix::io::Errno;
use zerocopy::FromBytes;

use super::name::Name;
use super::name::NameError;
use super::opcode;
use super::operation::Change;
use super::operation::Operation;
use super::wire;
use crate::limits::MAX_NAME_BYTES;
use crate::limits::MAX_SYMLINK_BYTES;
use crate::limits::MAX_XATTR_VALUE_BYTES;

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused {
    /// The answer.
    pub errno: Errno,
    /// For the log.
    pub reason: &'static str,
}

impl Refused {
    const fn malformed(reason: &'static str) -> Self {
        Self { errno: Errno::INVAL, reason }
    }
}

impl From<NameError> for Refused {
    fn from(error: NameError) -> Self {
        match error {
            NameError::Malformed => Self::malformed("malformed name"),
            NameError::TooLong => Self { errno: Errno::NAMETOOLONG, reason: "name too long" },
        }
    }
}

/// The arguments of one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Args<'a> {
    /// What was copied out of the request, behind its header.
    pub copied: &'a [u8],
    /// Bytes behind the header in the request itself; more than `copied` for WRITE.
    pub total_bytes: usize,
}

impl<'a> Args<'a> {
    /// The structure in front.
    fn fixed<T: FromBytes>(&self) -> Result<T, Refused> {
        Ok(self.split()?.0)
    }

    /// The structure in front, and what follows it.
    fn split<T: FromBytes>(&self) -> Result<(T, &'a [u8]), Refused> {
        let (bytes, rest) =
            self.copied.split_at_checked(size_of::<T>()).ok_or(Refused::malformed("arguments too short"))?;
        let value = T::read_from_bytes(bytes).map_err(|_| Refused::malformed("arguments too short"))?;
        Ok((value, rest))
    }
}

/// Decodes the arguments of an operation that a file system serves.
pub(super) fn decode<'a>(number: u32, args: &Args<'a>) -> Result<Operation<'a>, Refused> {
    match number {
        // That no other NUL lies in the name is one of its rules.
        opcode::LOOKUP => match args.copied.split_last() {
            Some((0, name)) => Ok(Operation::Lookup { name: Name::new(name)? }),
            _ => Err(Refused::malformed("name without NUL")),
        },
        opcode::GETATTR => {
            let wire::GetattrIn { getattr_flags, fh, .. } = args.fixed()?;
            Ok(Operation::Getattr { fh: (getattr_flags & wire::GETATTR_FH != 0).then_some(fh) })
        }
        opcode::STATX => {
            let wire::StatxIn { sx_flags, sx_mask, .. } = args.fixed()?;
            Ok(Operation::Statx { flags: sx_flags, mask: sx_mask })
        }
        opcode::READLINK => Ok(Operation::Readlink),
        opcode::STATFS => Ok(Operation::Statfs),
        opcode::SYNCFS => Ok(Operation::Syncfs),
        opcode::ACCESS => {
            let wire::AccessIn { mask, .. } = args.fixed()?;
            Ok(Operation::Access { mask })
        }
        opcode::OPEN
        | opcode::READ
        | opcode::RELEASE
        | opcode::FLUSH
        | opcode::FSYNC
        | opcode::LSEEK
        | opcode::OPENDIR
        | opcode::READDIR
        | opcode::READDIRPLUS
        | opcode::RELEASEDIR
        | opcode::FSYNCDIR => decode_opened(number, args),
        opcode::GETXATTR | opcode::LISTXATTR => decode_xattr(number, args),
        opcode::GETLK
        | opcode::SETLK
        | opcode::SETLKW
        | opcode::BMAP
        | opcode::IOCTL
        | opcode::POLL
        | opcode::NOTIFY_REPLY
        | opcode::SETUPMAPPING
        | opcode::REMOVEMAPPING => Ok(Operation::Other { opcode: number }),
        _ => decode_change(number, args).map(Operation::Change),
    }
}

/// Operations around an open file or directory.
fn decode_opened<'a>(number: u32, args: &Args<'a>) -> Result<Operation<'a>, Refused> {
    Ok(match number {
        opcode::OPEN => Operation::Open { flags: args.fixed::<wire::OpenIn>()?.flags },
        opcode::OPENDIR => Operation::Opendir { flags: args.fixed::<wire::OpenIn>()?.flags },
        opcode::READ => {
            let wire::ReadIn { fh, offset, size, flags, .. } = args.fixed()?;
            Operation::Read { fh, offset, size, flags }
        }
        opcode::READDIR => {
            let wire::ReadIn { fh, offset, size, .. } = args.fixed()?;
            Operation::Readdir { fh, offset, size }
        }
        opcode::READDIRPLUS => {
            let wire::ReadIn { fh, offset, size, .. } = args.fixed()?;
            Operation::Readdirplus { fh, offset, size }
        }
        opcode::RELEASE => Operation::Release { fh: args.fixed::<wire::ReleaseIn>()?.fh },
        opcode::RELEASEDIR => Operation::Releasedir { fh: args.fixed::<wire::ReleaseIn>()?.fh },
        opcode::FLUSH => Operation::Flush { fh: args.fixed::<wire::FlushIn>()?.fh },
        opcode::FSYNC => {
            let wire::FsyncIn { fh, fsync_flags, .. } = args.fixed()?;
            Operation::Fsync { fh, datasync: fsync_flags & wire::FSYNC_FDATASYNC != 0 }
        }
        opcode::FSYNCDIR => {
            let wire::FsyncIn { fh, fsync_flags, .. } = args.fixed()?;
            Operation::Fsyncdir { fh, datasync: fsync_flags & wire::FSYNC_FDATASYNC != 0 }
        }
        _ => {
            let wire::LseekIn { fh, offset, whence, .. } = args.fixed()?;
            Operation::Lseek { fh, offset, whence }
        }
    })
}

fn decode_xattr<'a>(number: u32, args: &Args<'a>) -> Result<Operation<'a>, Refused> {
    let (wire::GetxattrIn { size, .. }, rest) = args.split()?;
    if number == opcode::LISTXATTR {
        return Ok(Operation::Listxattr { size });
    }
    Ok(Operation::Getxattr { name: xattr_name(only_string(rest)?)?, size })
}

/// Operations that change: checked as if they were to be served, so that what a file system is handed is sound.
fn decode_change(number: u32, args: &Args<'_>) -> Result<Change, Refused> {
    match number {
        opcode::SETATTR => args.fixed::<wire::SetattrIn>().map(|_| Change::Setattr),
        opcode::SYMLINK => {
            let (name, target) = two_strings(args.copied)?;
            new_name(name)?;
            if target.is_empty() {
                return Err(Refused { errno: Errno::NOENT, reason: "empty symlink target" });
            }
            if target.len() as u64 > MAX_SYMLINK_BYTES {
                return Err(Refused { errno: Errno::NAMETOOLONG, reason: "symlink target too long" });
            }
            Ok(Change::Symlink)
        }
        opcode::MKNOD => named::<wire::MknodIn>(args).map(|()| Change::Mknod),
        opcode::MKDIR => named::<wire::MkdirIn>(args).map(|()| Change::Mkdir),
        opcode::CREATE => named::<wire::CreateIn>(args).map(|()| Change::Create),
        opcode::LINK => named::<wire::LinkIn>(args).map(|()| Change::Link),
        opcode::UNLINK => new_name(only_string(args.copied)?).map(|()| Change::Unlink),
        opcode::RMDIR => new_name(only_string(args.copied)?).map(|()| Change::Rmdir),
        opcode::RENAME => renamed::<wire::RenameIn>(args),
        opcode::RENAME2 => renamed::<wire::Rename2In>(args),
        opcode::WRITE => {
            let wire::WriteIn { size, .. } = args.fixed()?;
            let data_bytes = args.total_bytes.saturating_sub(size_of::<wire::WriteIn>());
            if (size as usize) > data_bytes {
                return Err(Refused::malformed("less data than WRITE announces"));
            }
            Ok(Change::Write)
        }
        opcode::SETXATTR => {
            let (wire::SetxattrIn { size, .. }, rest) = args.split()?;
            let (name, value) = string_and_rest(rest)?;
            xattr_name(name)?;
            if size > MAX_XATTR_VALUE_BYTES {
                return Err(Refused { errno: Errno::TOOBIG, reason: "xattr value too long" });
            }
            if size as usize != value.len() {
                return Err(Refused::malformed("xattr value of another length than announced"));
            }
            Ok(Change::Setxattr)
        }
        opcode::REMOVEXATTR => xattr_name(only_string(args.copied)?).map(|_| Change::Removexattr),
        // The kernel names what has no name yet `/`: the name says nothing and is not looked at.
        opcode::TMPFILE => args.fixed::<wire::CreateIn>().map(|_| Change::Tmpfile),
        opcode::FALLOCATE => args.fixed::<wire::FallocateIn>().map(|_| Change::Fallocate),
        opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => {
            args.fixed::<wire::CopyFileRangeIn>().map(|_| Change::CopyFileRange)
        }
        _ => Err(Refused { errno: Errno::NOSYS, reason: "unknown operation" }),
    }
}

/// A structure and the name of an entry to change.
fn named<T: FromBytes>(args: &Args<'_>) -> Result<(), Refused> {
    let (_, rest) = args.split::<T>()?;
    new_name(only_string(rest)?)
}

/// A structure and two names of entries to change.
fn renamed<T: FromBytes>(args: &Args<'_>) -> Result<Change, Refused> {
    let (_, rest) = args.split::<T>()?;
    let (from, to) = two_strings(rest)?;
    new_name(from)?;
    new_name(to)?;
    Ok(Change::Rename)
}

/// Checks the name of an entry to change: `.` and `..` are none.
fn new_name(bytes: &[u8]) -> Result<(), Refused> {
    match Name::new(bytes)? {
        name if name.is_dot() => Err(Refused::malformed("a dot name in a change")),
        _ => Ok(()),
    }
}

fn xattr_name(bytes: &[u8]) -> Result<&[u8], Refused> {
    if bytes.is_empty() || bytes.len() > MAX_NAME_BYTES {
        return Err(Refused { errno: Errno::RANGE, reason: "empty or long xattr name" });
    }
    Ok(bytes)
}

/// The string that fills `bytes`, its one NUL at the end.
fn only_string(bytes: &[u8]) -> Result<&[u8], Refused> {
    match string_and_rest(bytes)? {
        (string, []) => Ok(string),
        _ => Err(Refused::malformed("bytes behind the name")),
    }
}

/// The two strings that fill `bytes`.
fn two_strings(bytes: &[u8]) -> Result<(&[u8], &[u8]), Refused> {
    let (first, rest) = string_and_rest(bytes)?;
    Ok((first, only_string(rest)?))
}

/// The string in front without its NUL, and what follows the NUL.
fn string_and_rest(bytes: &[u8]) -> Result<(&[u8], &[u8]), Refused> {
    let end = bytes.iter().position(|byte| *byte == 0).ok_or(Refused::malformed("name without NUL"))?;
    let (string, rest) = bytes.split_at_checked(end).ok_or(Refused::malformed("name without NUL"))?;
    Ok((string, rest.get(1..).unwrap_or_default()))
}
