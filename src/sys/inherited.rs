//! Descriptors that the process was started with.

#![expect(unsafe_code, reason = "a bare number becomes an owned descriptor")]

use std::io;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use rustix::io::FdFlags;
use rustix::net::AddressFamily;
use rustix::net::SocketType;
use rustix::net::sockopt;

/// Takes the listening unix stream socket that the process inherited as number `fd`, and marks it close-on-exec.
///
/// Call it once for a number, and before the process opens files of its own: the number must not name anything that
/// this process opened.
///
/// # Errors
/// `EBADF` when the number is closed, `ENOTSOCK`, and `InvalidInput` when it is a socket of another kind.
pub fn listener(fd: i32) -> io::Result<UnixListener> {
    if fd < 0 {
        return Err(rustix::io::Errno::BADF.into());
    }
    // SAFETY: the number is not -1, and is only used for system calls that answer EBADF if it is closed.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let is_ours = sockopt::socket_domain(borrowed)? == AddressFamily::UNIX
        && sockopt::socket_type(borrowed)? == SocketType::STREAM
        && sockopt::socket_acceptconn(borrowed)?;
    if !is_ours {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a listening unix stream socket"));
    }
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: the number is open (the calls above succeeded), and by this function's contract nobody else owns it.
    Ok(UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_listening_unix_sockets_are_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let number = UnixListener::bind(&path).unwrap().into_raw_fd();
        let taken = listener(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(rustix::io::fcntl_getfd(&taken).unwrap().contains(FdFlags::CLOEXEC));
        let (connected, _peer) = UnixStream::pair().unwrap();
        assert_eq!(listener(connected.as_raw_fd()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let file = tempfile::tempfile().unwrap();
        assert_eq!(listener(file.as_raw_fd()).unwrap_err().raw_os_error(), Some(libc::ENOTSOCK));
        assert_eq!(listener(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(listener(1 << 20).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
