//! The socket that the VMM connects to: made by us, or inherited from whoever started us, by number or as systemd's
//! socket activation does it (`sd_listen_fds(3)`).
//!
//! A path belongs to the process that holds the lock on `<path>.lock`; the kernel gives the lock back however that
//! process ends. A socket file that is left over is removed only when nobody listens on it, and our own files are removed
//! at the end only if they are still ours.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::fs::Permissions;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::FlockOperation;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use crate::limits::MAX_SOCKET_PATH_BYTES;
use crate::sys;

/// Connections that may wait for accept: one VMM, and those that try while another is served.
const BACKLOG: i32 = 16;

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into an address.
    #[error("socket path {} is too long: {len} bytes, at most {MAX_SOCKET_PATH_BYTES} are possible, use a shorter one", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// Somebody listens there.
    #[error("socket {} is in use by a live daemon, stop it or use another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} exists and is not a socket, remove it or use another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The directory of the path is not there.
    #[error("directory {} of the socket does not exist, make it or use another path", path.display())]
    NoDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// The file system or the kernel refuses.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// The number given is no listening socket.
    #[error("descriptor {number} of {from} cannot be listened on")]
    Inherited {
        /// The number.
        number: i32,
        /// Who gave it.
        from: Giver,
        /// Why.
        source: io::Error,
    },
    /// The variables of socket activation do not say which socket is ours.
    #[error("{variable}={value:?} of socket activation: {what}")]
    Activation {
        /// The variable.
        variable: &'static str,
        /// What it says.
        value: OsString,
        /// What is wrong with that.
        what: &'static str,
    },
}

/// Who hands over a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Giver {
    /// The command line.
    Option,
    /// systemd, or whoever does as it does.
    Activation,
}

impl fmt::Display for Giver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Option => "--fd",
            Self::Activation => "LISTEN_FDS",
        })
    }
}

/// What a socket unit calls our socket (`FileDescriptorName=`) where it passes several.
pub const ACTIVATION_NAME: &str = "vhost-user-fs";

/// First descriptor that socket activation passes (`SD_LISTEN_FDS_START`).
const FIRST_ACTIVATED: i32 = 3;

/// The number of the listening socket that was passed to process `pid` by socket activation, as its environment
/// `variable` tells; `None` when nothing was passed, or it was to another process. One socket is ours whatever its name;
/// of several it is the one named [`ACTIVATION_NAME`].
///
/// # Errors
/// [`SocketError::Activation`].
pub fn activated(variable: impl Fn(&str) -> Option<OsString>, pid: u32) -> Result<Option<i32>, SocketError> {
    let number = |name: &'static str| match variable(name) {
        None => Ok(None),
        Some(value) => match value.to_str().and_then(|text| text.parse::<u32>().ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(SocketError::Activation { variable: name, value, what: "not a number" }),
        },
    };
    if number("LISTEN_PID")? != Some(pid) {
        return Ok(None);
    }
    let place = match number("LISTEN_FDS")? {
        None | Some(0) => return Ok(None),
        Some(1) => 0,
        Some(count) => {
            let value = variable("LISTEN_FDNAMES").unwrap_or_default();
            let names = value.to_str().unwrap_or_default().split(':').take(count as usize);
            let mut ours = (0..).zip(names).filter(|(_, name)| *name == ACTIVATION_NAME);
            match (ours.next(), ours.next()) {
                (Some((place, _)), None) => place,
                _ => {
                    let what = "of several sockets exactly one must be named vhost-user-fs";
                    return Err(SocketError::Activation { variable: "LISTEN_FDNAMES", value, what });
                }
            }
        }
    };
    Ok(FIRST_ACTIVATED.checked_add(place))
}

/// A listening socket. Files that it made vanish with [`SocketFile::remove`], or when it is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: Option<Arc<SocketFile>>,
}

/// The files of a socket that we made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    lock_path: PathBuf,
    lock: File,
}

impl Socket {
    /// Takes the listening socket that the process inherited as `number` from `from`. To be called before the process opens files.
    ///
    /// # Errors
    /// [`SocketError::Inherited`].
    pub fn inherited(number: i32, from: Giver) -> Result<Self, SocketError> {
        match sys::inherited::listener(number) {
            Ok(listener) => Ok(Self { listener, file: None }),
            Err(source) => Err(SocketError::Inherited { number, from, source }),
        }
    }

    /// Listens at `path`, mode 0600 whatever the umask. Does not block.
    ///
    /// # Errors
    /// All of [`SocketError`] but `Inherited` and `Activation`.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let len = path.as_os_str().len();
        if len > MAX_SOCKET_PATH_BYTES {
            return Err(SocketError::TooLong { path: path.to_owned(), len });
        }
        if let Some(directory) =
            path.parent().filter(|parent| !parent.as_os_str().is_empty() && matches!(parent.try_exists(), Ok(false)))
        {
            return Err(SocketError::NoDirectory { path: directory.to_owned() });
        }
        let lock_path = lock_path_of(path);
        let lock = take_lock(&lock_path, path)?;
        remove_stale(path)?;
        let listener = listen(path).map_err(failed("listen on", path))?;
        let identity = identity_of(path).map_err(failed("look at", path))?;
        let file = SocketFile { path: path.to_owned(), identity, lock_path, lock };
        Ok(Self { listener, file: Some(Arc::new(file)) })
    }

    /// The listener, for the device.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// The files that we made, if any.
    pub fn file(&self) -> Option<Arc<SocketFile>> {
        self.file.clone()
    }
}

impl SocketFile {
    /// Removes socket and lock file, unless they are somebody else's by now. A second time is harmless.
    pub fn remove(&self) {
        // The socket first: whoever gets the lock afterwards finds nothing stale. Errors have nobody to help them.
        if identity_of(&self.path).is_ok_and(|identity| identity == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
        if is_current(&self.lock, &self.lock_path) {
            let _ = fs::remove_file(&self.lock_path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError::Io { what, path, source }
}

fn lock_path_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".lock");
    PathBuf::from(name)
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Whether `path` still names `file`: a lock on a file that was removed meanwhile locks nothing.
fn is_current(file: &File, path: &Path) -> bool {
    let ours = file.metadata().map(|meta| (meta.dev(), meta.ino()));
    ours.is_ok_and(|ours| identity_of(path).is_ok_and(|there| there == ours))
}

fn take_lock(lock_path: &Path, socket_path: &Path) -> Result<File, SocketError> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(lock_path)
            .map_err(failed("open lock file", lock_path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if is_current(&file, lock_path) => return Ok(file),
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(SocketError::InUse { path: socket_path.to_owned() }),
            Err(errno) => return Err(failed("lock", lock_path)(errno.into())),
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", path)(error)),
    };
    if !meta.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.to_owned() });
    }
    match try_connect(path) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed("remove stale socket", path)),
        // Full backlog means that somebody listens, and is busy.
        Ok(()) | Err(Errno::AGAIN) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(errno) => Err(failed("find out who listens on", path)(errno.into())),
    }
}

fn try_connect(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path.as_os_str().as_bytes())?)
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // On Linux the file gets the socket's mode less the umask: nobody else can connect, not even for a moment.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path.as_os_str().as_bytes())?)?;
    // A umask may have taken bits of ours as well.
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.sock");
        (directory, path)
    }

    #[test]
    fn bound_socket_is_private_and_leaves_nothing_behind() {
        let (directory, path) = place();
        let socket = Socket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn live_daemon_is_left_alone() {
        let (_directory, path) = place();
        let _first = Socket::bind(&path).unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::InUse { .. })));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn foreign_listener_without_our_lock_is_left_alone() {
        let (_directory, path) = place();
        let foreign = UnixListener::bind(&path).unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::InUse { .. })));
        assert!(path.exists());
        drop(foreign);
        Socket::bind(&path).expect("nobody listens any more");
    }

    #[test]
    fn other_files_are_left_alone() {
        let (_directory, path) = place();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn path_limits_and_missing_directories_are_named() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(103)));
        assert!(matches!(Socket::bind(&long), Err(SocketError::TooLong { len: 108, .. })));
        let (directory, _) = place();
        let nowhere = directory.path().join("missing/s.sock");
        let Err(SocketError::NoDirectory { path }) = Socket::bind(&nowhere) else {
            panic!("bound in a missing directory")
        };
        assert_eq!(path, directory.path().join("missing"));
    }

    #[test]
    fn socket_of_a_successor_is_not_removed() {
        let (_directory, path) = place();
        let ours = Socket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn activation_names_one_socket_or_none_or_says_what_is_wrong() {
        // LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES, and what comes of them for process 42.
        let cases = [
            (None, None, None, Ok(None)),
            (None, Some("1"), None, Ok(None)),
            (Some("42"), None, None, Ok(None)),
            (Some("42"), Some("0"), None, Ok(None)),
            (Some("41"), Some("1"), None, Ok(None)),
            (Some("41"), Some("many"), None, Ok(None)),
            (Some("42"), Some("1"), None, Ok(Some(3))),
            (Some("42"), Some("1"), Some("anything"), Ok(Some(3))),
            (Some("42"), Some("3"), Some("api:vhost-user-fs:unknown"), Ok(Some(4))),
            (Some("42"), Some("2"), Some("vhost-user-fs:api"), Ok(Some(3))),
            (Some("42"), Some("2"), Some("a:b:vhost-user-fs"), Err("LISTEN_FDNAMES")),
            (Some("42"), Some("2"), Some("vhost-user-fs:vhost-user-fs"), Err("LISTEN_FDNAMES")),
            (Some("42"), Some("2"), None, Err("LISTEN_FDNAMES")),
            (Some("42"), Some("-1"), None, Err("LISTEN_FDS")),
            (Some("42"), Some("one"), None, Err("LISTEN_FDS")),
            (Some("me"), Some("1"), None, Err("LISTEN_PID")),
        ];
        for (pid, count, names, expected) in cases {
            let variable = |name: &str| match name {
                "LISTEN_PID" => pid.map(OsString::from),
                "LISTEN_FDS" => count.map(OsString::from),
                _ => names.map(OsString::from),
            };
            let seen = activated(variable, 42).map_err(|error| match error {
                SocketError::Activation { variable, .. } => variable,
                other => panic!("{other}"),
            });
            assert_eq!(seen, expected, "{pid:?} {count:?} {names:?}");
        }
    }
}
