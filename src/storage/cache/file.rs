//! How files of the cache directory are opened: never through a symlink, never anything but a regular file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::AtFlags;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::StatxFlags;
use rustix::io::Errno;

use super::CacheError;
use crate::sys::lock::Lock;
use crate::sys::lock::try_lock;

/// Names of temporary files end with this.
pub const TEMPORARY: &str = ".tmp";
/// Held on a temporary file by its maker.
const OWNER_LOCK: Range<u64> = 0..1;

/// Mode of new cache files.
const PRIVATE: Mode = Mode::from_raw_mode(0o600);

/// An open cache directory.
#[derive(Debug)]
pub struct Directory {
    handle: OwnedFd,
    path: PathBuf,
}

/// What tells one file from another that later has the same name, even with a reused inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Inode number.
    pub inode: u64,
    /// Time of birth in nanoseconds, where the file system knows it, else 0.
    pub born_ns: u64,
}

/// An opened file and how it came about.
#[derive(Debug)]
pub struct Opened {
    /// Open for reading and writing.
    pub file: File,
    /// Its size in bytes.
    pub len: u64,
    /// Whether this call made it.
    pub is_new: bool,
}

impl Directory {
    /// Opens `path`, making it (and what is missing above it) first if it is not there.
    ///
    /// # Errors
    /// [`CacheError::File`].
    pub fn open(path: &Path) -> Result<Self, CacheError> {
        let failed = |source: io::Error| CacheError::File { path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let handle = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
        Ok(Self { handle, path: path.to_owned() })
    }

    /// Full path of `name`, for messages.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// An error that names `name`.
    pub fn failed(&self, name: &str, source: impl Into<io::Error>) -> CacheError {
        CacheError::File { path: self.path_of(name), source: source.into() }
    }

    /// Opens `name` for reading and writing; makes it, with mode 0600, if it is not there.
    ///
    /// # Errors
    /// [`CacheError::NotRegular`], [`CacheError::File`].
    pub fn open_or_create(&self, name: &str) -> Result<Opened, CacheError> {
        for _ in 0..8 {
            if let Some(file) = self.open_existing(name)? {
                let len = file.metadata().map_err(|error| self.failed(name, error))?.len();
                return Ok(Opened { file, len, is_new: false });
            }
            match self.open_with(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL) {
                Ok(handle) => return Ok(Opened { file: File::from(handle), len: 0, is_new: true }),
                // Somebody was quicker: open theirs.
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(self.failed(name, errno)),
            }
        }
        Err(self.failed(name, Errno::BUSY))
    }

    /// Opens `name` for reading and writing; `None` if it is not there.
    ///
    /// # Errors
    /// [`CacheError::NotRegular`], [`CacheError::File`].
    pub fn open_existing(&self, name: &str) -> Result<Option<File>, CacheError> {
        self.open_regular(name, OFlags::RDWR)
    }

    /// Opens `name` for reading; `None` if it is not there.
    ///
    /// # Errors
    /// [`CacheError::NotRegular`], [`CacheError::File`].
    pub fn open_readable(&self, name: &str) -> Result<Option<File>, CacheError> {
        self.open_regular(name, OFlags::RDONLY)
    }

    fn open_regular(&self, name: &str, access: OFlags) -> Result<Option<File>, CacheError> {
        let handle = match self.open_with(name, access) {
            Ok(handle) => handle,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => {
                return Err(CacheError::NotRegular { path: self.path_of(name) });
            }
            Err(errno) => return Err(self.failed(name, errno)),
        };
        let stat = rustix::fs::fstat(&handle).map_err(|errno| self.failed(name, errno))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(CacheError::NotRegular { path: self.path_of(name) });
        }
        Ok(Some(File::from(handle)))
    }

    /// Makes a file that has its final name only after [`Directory::publish`]. As long as it is open here, it is not
    /// [abandoned](Directory::remove_abandoned).
    ///
    /// # Errors
    /// [`CacheError::File`].
    pub fn create_temporary(&self, name: &str) -> Result<File, CacheError> {
        let _ = rustix::fs::unlinkat(&self.handle, name, AtFlags::empty());
        let handle = self.open_with(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL);
        let file = handle.map(File::from).map_err(|errno| self.failed(name, errno))?;
        // A file system that cannot lock has nothing to tell the abandoned by.
        let _ = try_lock(file.as_fd(), OWNER_LOCK, Lock::Exclusive);
        Ok(file)
    }

    /// Removes temporary files whose names begin with `prefix` and whose makers have ended in the middle. One that is made
    /// at this very moment may go as well: its maker then fails to publish it.
    pub fn remove_abandoned(&self, prefix: &str) {
        let Ok(entries) = rustix::fs::Dir::read_from(&self.handle) else { return };
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().to_str() else { continue };
            let is_temporary = name.starts_with(prefix) && name.ends_with(TEMPORARY);
            if is_temporary
                && let Ok(Some(file)) = self.open_existing(name)
                && try_lock(file.as_fd(), OWNER_LOCK, Lock::Exclusive).unwrap_or(false)
            {
                let _ = self.remove(name);
            }
        }
    }

    /// Gives the temporary file `from` its final name, replacing what had it.
    ///
    /// # Errors
    /// [`CacheError::File`].
    pub fn publish(&self, from: &str, to: &str) -> Result<(), CacheError> {
        rustix::fs::renameat(&self.handle, from, &self.handle, to).map_err(|errno| self.failed(to, errno))
    }

    /// Removes `name`; not being there is fine.
    ///
    /// # Errors
    /// [`CacheError::File`].
    pub fn remove(&self, name: &str) -> Result<(), CacheError> {
        match rustix::fs::unlinkat(&self.handle, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.failed(name, errno)),
        }
    }

    /// Identity of the file that `name` names now; `None` if there is none.
    ///
    /// # Errors
    /// [`CacheError::File`].
    pub fn identity_of(&self, name: &str) -> Result<Option<Identity>, CacheError> {
        match identity(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(identity) => Ok(Some(identity)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.failed(name, errno)),
        }
    }

    fn open_with(&self, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        // NONBLOCK: a fifo or device of that name must not hold us up before we see what it is.
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::openat(&self.handle, name, flags, PRIVATE)
    }
}

/// Makes `file` `len` bytes long, with room on the disk where the file system can give it: a page without room cannot be
/// written through a map later, and that would be noticed by a signal only.
///
/// # Errors
/// What the system answers, [`io::ErrorKind::StorageFull`] among it.
pub fn set_len_with_room(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)?;
    give_room(file, 0, len)
}

/// Gives the bytes from `offset` on, which lie inside the file, their room on the disk, where the file system can do that.
///
/// # Errors
/// What the system answers, [`io::ErrorKind::StorageFull`] among it.
pub fn give_room(file: &File, offset: u64, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::KEEP_SIZE, offset, len) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Identity of an open file.
pub fn identity_of_open(file: &File) -> io::Result<Identity> {
    Ok(identity(file, "", AtFlags::EMPTY_PATH)?)
}

fn identity(handle: impl AsFd, name: &str, flags: AtFlags) -> rustix::io::Result<Identity> {
    let stat = rustix::fs::statx(handle, name, flags, StatxFlags::INO | StatxFlags::BTIME)?;
    let born_ns = if stat.stx_mask & StatxFlags::BTIME.bits() != 0 {
        let seconds = u64::from_ne_bytes(stat.stx_btime.tv_sec.to_ne_bytes());
        seconds.wrapping_mul(1_000_000_000).wrapping_add(u64::from(stat.stx_btime.tv_nsec))
    } else {
        0
    };
    Ok(Identity { inode: stat.stx_ino, born_ns })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_files_go_with_their_makers_only() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        let made = directory.create_temporary("a.1.tmp").unwrap();
        drop(directory.create_temporary("a.2.tmp").unwrap());
        drop(directory.create_temporary("b.1.tmp").unwrap());
        std::fs::write(dir.path().join("a.meta"), "").unwrap();
        directory.remove_abandoned("a.");
        let left = |name: &str| dir.path().join(name).exists();
        assert_eq!(["a.1.tmp", "a.2.tmp", "b.1.tmp", "a.meta"].map(left), [true, false, true, true]);
        drop(made);
        directory.remove_abandoned("a.");
        assert!(!left("a.1.tmp"));
    }
}
