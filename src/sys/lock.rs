//! Open-file-description locks on byte ranges: how processes that share a cache directory agree who fetches a chunk.
//!
//! Never waits in the kernel. The locks belong to the open file description, so they vanish with it, however the
//! process ends.

#![expect(unsafe_code, reason = "fcntl has no safe wrapper for OFD locks")]

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

/// What kind of lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// Many may hold it.
    Shared,
    /// One holds it, and no shared one is held by others.
    Exclusive,
    /// Gives up what is held.
    Unlock,
}

/// Sets a lock on the bytes `range` of `file` for its open file description. `Ok(false)`: somebody else holds a lock
/// that conflicts. Does not wait.
///
/// # Errors
/// What `fcntl(F_OFD_SETLK)` answers apart from a conflict (`ENOLCK`, `EBADF`).
pub fn try_lock(file: BorrowedFd<'_>, range: Range<u64>, lock: Lock) -> io::Result<bool> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Unlock => libc::F_UNLCK,
    };
    let overflow = || io::Error::from_raw_os_error(libc::EOVERFLOW);
    let flock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: i64::try_from(range.start).map_err(|_| overflow())?,
        l_len: i64::try_from(range.end.saturating_sub(range.start)).map_err(|_| overflow())?,
        l_pid: 0,
    };
    // SAFETY: `flock` is initialised and outlives the call; the descriptor is open for the borrow's time.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &flock) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn two_descriptions_conflict_on_one_byte_only() {
        let one = tempfile::NamedTempFile::new().unwrap();
        let two = one.reopen().unwrap();
        let one = one.as_file();
        assert!(try_lock(one.as_fd(), 5..6, Lock::Exclusive).unwrap());
        assert!(!try_lock(two.as_fd(), 5..6, Lock::Exclusive).unwrap());
        assert!(!try_lock(two.as_fd(), 0..6, Lock::Shared).unwrap());
        assert!(try_lock(two.as_fd(), 6..7, Lock::Exclusive).unwrap());
        assert!(try_lock(one.as_fd(), 5..6, Lock::Unlock).unwrap());
        assert!(try_lock(two.as_fd(), 5..6, Lock::Exclusive).unwrap());
    }
}
