//! The composition root: configuration in, wired objects, serving, and an ordered end.
//!
//! The only place that knows all rooms. It decides nothing that another room could: it turns settings into arguments,
//! and refuses in one line what is configured and not built. Order of the start: signals blocked, log, configuration,
//! file limit, image and its storage, socket, serving; the end takes them apart in the opposite order, within
//! [`crate::limits::SHUTDOWN`] whatever is under way.

use std::io;
use std::path::PathBuf;

use crate::config::Config;

pub mod logging;
pub mod open_files;
pub mod signals;
pub mod socket;

pub use crate::device::AfterDisconnect;
use socket::Socket;
use socket::SocketError;

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Signals cannot be blocked or waited for.
    #[error("cannot set up signals")]
    Signals(#[source] io::Error),
    /// The log cannot be opened.
    #[error("log file")]
    Log {
        /// Why, with the file's name.
        source: io::Error,
    },
    /// The directory of the start is gone.
    #[error("cannot tell the current directory")]
    Directory(#[source] io::Error),
    /// The machine may open too few files.
    #[error("fs.file-max is {machine}: at least 32768 are needed, raise it or give --rlimit-nofile 0")]
    FewFiles {
        /// `fs.file-max`.
        machine: u64,
    },
    /// There is no socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// What a daemon serves, and where.
#[derive(Debug)]
pub struct Options {
    /// Where the VMM connects.
    pub endpoint: Endpoint,
    /// What follows when it has gone.
    pub after_disconnect: AfterDisconnect,
    /// Request queues offered.
    pub request_queues: u16,
    /// Mount tag in the device's configuration space.
    pub tag: Option<String>,
    /// Whether guests open files without a message.
    pub zero_message_open: ZeroMessageOpen,
    /// The image's metadata, an absolute path.
    pub bootstrap: PathBuf,
    /// Where its blobs come from, and how it is served.
    pub config: Config,
}

/// Where the VMM connects.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket that is made at this path.
    Path(PathBuf),
    /// A listening socket that was there before us.
    Inherited(Socket),
}

/// Whether guests open files and directories without a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMessageOpen {
    /// Where nothing can change: a device that serves one read-only image from the start.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Runs a daemon until a signal, or the end of its only connection, ends it.
///
/// # Errors
/// [`DaemonError`], each in one line with its causes.
pub fn run(options: Options, signals: signals::Signals) -> Result<(), DaemonError> {
    let _ = (options, signals);
    todo!()
}
