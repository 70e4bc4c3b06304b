//! Why a daemon cannot serve.

use std::io;
use std::path::PathBuf;

use super::bootstrap::BootstrapError;
use super::socket::SocketError;
use crate::device::DeviceError;
use crate::storage::backend::BackendError;
use crate::storage::store::StoreError;

/// Why the daemon cannot serve. With its sources, each is one line that names the file or the field and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Signals cannot be blocked or waited for.
    #[error("cannot set up signals")]
    Signals(#[source] io::Error),
    /// The log cannot be opened.
    #[error("no log")]
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
    /// The machine does not give what a daemon needs.
    #[error("cannot {what}")]
    Machine {
        /// What was tried.
        what: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// The configuration asks for what is not built.
    #[error("{0} is configured, and not built yet, take it out of the configuration")]
    NotBuilt(String),
    /// The configuration names a backend that is not built.
    #[error("backend `{0}` is configured, and not built yet, use `localfs`")]
    BackendNotBuilt(&'static str),
    /// The configuration lacks what the image needs.
    #[error("the image has blobs, but the configuration lacks `{0}`, set it or use --localfs-dir")]
    Missing(String),
    /// The metadata cannot be served.
    #[error("bootstrap {}", path.display())]
    Bootstrap {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BootstrapError,
    },
    /// A blob is not there, or is not what the image says.
    #[error("a blob of the image cannot be served, check the directories of the backend")]
    Blob(#[source] BackendError),
    /// The cache cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The device cannot be served.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
