//! Where blobs come from: ranges of stored bytes, answered by callback.
//!
//! A backend never blocks its caller and answers each request exactly once, on whatever thread it likes, in any order,
//! or late. What it hands out is not trusted: length, digest and checksum are checked behind it. It knows nothing of
//! chunks, caches or readers.

pub mod localfs;
pub mod routed;

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use rustix::io::Errno;

use super::sync::Arc;

/// Who waits for a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A reader in the guest.
    Demand,
    /// Nobody yet.
    Prefetch,
}

/// A question to a backend.
#[derive(Debug, Clone)]
pub struct Request {
    /// Blob id, checked to be harmless as a file name and in a URL.
    pub blob: Arc<str>,
    /// Bytes of the stored blob; not empty.
    pub range: Range<u64>,
    /// Who waits.
    pub class: Class,
    /// Nobody waits any longer then: the asker cancels and takes no answer.
    pub deadline: Option<Instant>,
}

/// A source of stored bytes.
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// Asks for a range. Returns at once; `answer` is completed later, or at once, with exactly the bytes of the range
    /// or an error. After [`Ticket::cancel`] the answer does not matter any more but must still be completed or dropped.
    fn read(&self, request: Request, answer: Answer) -> Ticket;
}

/// Why a backend has no bytes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BackendError {
    /// There is no such blob.
    #[error("blob {blob} is not in {place}")]
    NotFound {
        /// Blob id.
        blob: Arc<str>,
        /// Where it was looked for.
        place: String,
    },
    /// The blob ends before the range does.
    #[error("{} has {size} bytes, but the image refers to bytes up to {end}", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// End of the range.
        end: u64,
    },
    /// The system refuses.
    #[error("{} at offset {offset:#x}: {errno}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// First byte that could not be read.
        offset: u64,
        /// What the system says.
        errno: Errno,
    },
    /// The answer has another length than the question.
    #[error("{actual} bytes came where {expected} were asked for")]
    WrongLength {
        /// Bytes asked for.
        expected: u64,
        /// Bytes that came.
        actual: u64,
    },
    /// A failure that is expected to pass.
    #[error("{0}")]
    Passing(String),
    /// A failure that is expected to stay.
    #[error("{0}")]
    Lasting(String),
    /// No answer in time.
    #[error("no answer in time")]
    TimedOut,
    /// The asker, or the end of the daemon, called it off.
    #[error("called off")]
    Cancelled,
}

impl BackendError {
    /// Whether the same question may have another answer soon.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::WrongLength { .. } | Self::Passing(_) | Self::TimedOut => true,
            Self::Io { errno, .. } => matches!(*errno, Errno::IO | Errno::AGAIN | Errno::STALE | Errno::TIMEDOUT),
            Self::NotFound { .. } | Self::TooShort { .. } | Self::Lasting(_) | Self::Cancelled => false,
        }
    }

    /// The nearest error number.
    pub fn errno(&self) -> Errno {
        match self {
            Self::NotFound { .. } => Errno::NOENT,
            Self::Io { errno, .. } => *errno,
            Self::TimedOut => Errno::TIMEDOUT,
            Self::Cancelled => Errno::CANCELED,
            Self::TooShort { .. } | Self::WrongLength { .. } | Self::Passing(_) | Self::Lasting(_) => Errno::IO,
        }
    }
}

type Completion = Box<dyn FnOnce(Result<Vec<u8>, BackendError>) + Send>;

/// The duty to answer one request. Dropping it answers [`BackendError::Cancelled`].
pub struct Answer(Option<Completion>);

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answer")
    }
}

impl Answer {
    /// `completion` is called exactly once, on the thread that answers: it must be quick.
    pub fn new(completion: impl FnOnce(Result<Vec<u8>, BackendError>) + Send + 'static) -> Self {
        Self(Some(Box::new(completion)))
    }

    /// Answers.
    pub fn complete(mut self, result: Result<Vec<u8>, BackendError>) {
        if let Some(completion) = self.0.take() {
            completion(result);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(completion) = self.0.take() {
            completion(Err(BackendError::Cancelled));
        }
    }
}

/// A way to call a request off. Dropping it does nothing.
pub struct Ticket(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket")
    }
}

impl Ticket {
    /// `cancel` is called at most once: it must be quick.
    pub fn new(cancel: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(cancel))
    }

    /// A request that cannot be called off, or is answered already.
    pub fn none() -> Self {
        Self::new(|| ())
    }

    /// Nobody wants the answer any more.
    pub fn cancel(self) {
        (self.0)();
    }
}
