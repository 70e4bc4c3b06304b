//! What can go wrong for the fake guest and VMM.

use std::io;
use std::time::Duration;

/// Why a step of the fake guest or VMM failed.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// A system call of the harness failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The daemon did not do in time what was waited for.
    #[error("{what} did not happen within {waited:?}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The daemon acknowledged a vhost-user message with an error.
    #[error("the daemon refused message {message} with {code}")]
    Refused {
        /// The message's number.
        message: u32,
        /// The code of its acknowledgement.
        code: u64,
    },
    /// The daemon closed the control connection.
    #[error("the daemon closed the connection at message {message}")]
    Closed {
        /// The message that was sent or whose answer was waited for.
        message: u32,
    },
    /// The daemon broke a rule of virtio, vhost-user or FUSE.
    #[error("rule broken by the daemon: {0}")]
    Violation(String),
    /// The harness itself was asked for something impossible: ring full, memory used up.
    #[error("not possible: {0}")]
    Misuse(String),
}

impl HarnessError {
    /// An [`HarnessError::Io`] from whatever converts to an I/O error.
    pub fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }
}
