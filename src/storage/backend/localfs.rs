//! Blobs as files of this machine: one directory with alternatives, or one file for all ids.
//!
//! Files are read on the pool. They are opened again for each request: blobs may be replaced or removed while we run,
//! and an `open` is small beside a fetch. Errors name file and offset.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Answer;
use super::Backend;
use super::BackendError;
use super::Class;
use super::Request;
use super::Ticket;
use crate::storage::pool::Pool;
use crate::storage::pool::Urgency;
use crate::storage::sync::Arc;
use crate::storage::sync::AtomicBool;
use crate::storage::sync::Ordering;

/// Where blob files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// One file, whatever the id.
    File(PathBuf),
    /// Files named by id in the first of these directories that has them; not empty.
    Directories(Vec<PathBuf>),
}

/// Blobs as local files.
#[derive(Debug)]
pub struct LocalFs {
    place: Arc<Place>,
    pool: Arc<Pool>,
}

impl LocalFs {
    /// A backend that reads on `pool`.
    pub fn new(place: Place, pool: Arc<Pool>) -> Self {
        Self { place: Arc::new(place), pool }
    }

    /// Looks whether the blob is there and holds `data_bytes` bytes of chunks, so that a wrong directory shows at
    /// start. Blocks on the disk.
    ///
    /// # Errors
    /// [`BackendError::NotFound`], [`BackendError::TooShort`], [`BackendError::Io`], [`BackendError::Lasting`] where it
    /// is no regular file.
    pub fn check(&self, blob: &str, data_bytes: u64) -> Result<(), BackendError> {
        let Opened { path, size, .. } = self.place.open(&Arc::from(blob))?;
        if size < data_bytes {
            return Err(BackendError::TooShort { path, size, end: data_bytes });
        }
        Ok(())
    }
}

impl Backend for LocalFs {
    fn read(&self, request: Request, answer: Answer) -> Ticket {
        let cancelled = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&cancelled);
        let place = Arc::clone(&self.place);
        let urgency = match request.class {
            Class::Demand => Urgency::Demand,
            Class::Prefetch => Urgency::Background,
        };
        self.pool.spawn(urgency, move || {
            // Relaxed: a hint that spares work.
            let result = if seen.load(Ordering::Relaxed) { Err(BackendError::Cancelled) } else { place.read(&request) };
            answer.complete(result);
        });
        Ticket::new(move || cancelled.store(true, Ordering::Relaxed))
    }
}

/// An open blob and its size in bytes.
struct Opened {
    file: File,
    path: PathBuf,
    size: u64,
}

impl Opened {
    fn new(file: File, path: PathBuf) -> Result<Self, BackendError> {
        let about = file.metadata().map_err(|error| failed(&path, 0, &error))?;
        match about.is_file() {
            true => Ok(Self { size: about.len(), file, path }),
            false => Err(BackendError::Lasting(format!("{} is not a regular file", path.display()))),
        }
    }
}

impl Place {
    fn candidates(&self, blob: &str) -> Vec<PathBuf> {
        match self {
            Self::File(path) => vec![path.clone()],
            Self::Directories(directories) => directories.iter().map(|directory| directory.join(blob)).collect(),
        }
    }

    /// The file of a blob: the first that exists, or the first place for one. Looks at the disk.
    pub fn find(&self, blob: &str) -> Option<PathBuf> {
        let candidates = self.candidates(blob);
        candidates.iter().find(|path| path.exists()).or(candidates.first()).cloned()
    }

    fn open(&self, blob: &Arc<str>) -> Result<Opened, BackendError> {
        // NONBLOCK: a fifo must not hold us up before we see what it is.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        for path in self.candidates(blob) {
            match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
                Ok(file) => return Opened::new(file, path),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&path, 0, &error)),
            }
        }
        let place = match self {
            Self::File(path) => path.display().to_string(),
            Self::Directories(directories) => {
                directories.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
            }
        };
        Err(BackendError::NotFound { blob: Arc::clone(blob), place })
    }

    fn read(&self, request: &Request) -> Result<Vec<u8>, BackendError> {
        let Opened { file, path, size } = self.open(&request.blob)?;
        let too_short = || BackendError::TooShort { path: path.clone(), size, end: request.range.end };
        // Before anything is allocated: the range comes from an image.
        if size < request.range.end {
            return Err(too_short());
        }
        let len = usize::try_from(request.range.end.saturating_sub(request.range.start)).map_err(|_| too_short())?;
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let offset = request.range.start + bytes.len() as u64;
            match rustix::io::pread(&file, rustix::buffer::spare_capacity(&mut bytes), offset) {
                Ok(0) => return Err(too_short()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(BackendError::Io { path, offset, errno }),
            }
        }
        // The allocator may have given more room than asked for.
        bytes.truncate(len);
        Ok(bytes)
    }
}

fn failed(path: &Path, offset: u64, error: &io::Error) -> BackendError {
    let errno = error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error);
    BackendError::Io { path: path.to_owned(), offset, errno }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    fn ask(place: Place, blob: &str, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
        let backend = LocalFs::new(place, Pool::new(1).unwrap());
        let (tell, told) = mpsc::channel();
        let request = Request { blob: Arc::from(blob), range, class: Class::Demand, deadline: None };
        backend.read(request, Answer::new(move |result| tell.send(result).unwrap()));
        told.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn directories_are_searched_in_order() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(two.path().join("a"), b"second").unwrap();
        std::fs::write(two.path().join("b"), b"only").unwrap();
        std::fs::write(one.path().join("a"), b"first!").unwrap();
        let place = Place::Directories(vec![one.path().into(), two.path().into()]);
        assert_eq!(ask(place.clone(), "a", 0..6).unwrap(), b"first!");
        assert_eq!(ask(place.clone(), "b", 1..3).unwrap(), b"nl");
        let missing = ask(place, "c", 0..1).unwrap_err();
        assert!(!missing.is_retryable());
        let said = missing.to_string();
        assert!(said.contains("blob c") && said.contains(&one.path().display().to_string()), "{said}");
    }

    #[test]
    fn short_blob_is_an_error_that_names_file_and_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blob");
        std::fs::write(&path, [7; 100]).unwrap();
        assert_eq!(ask(Place::File(path.clone()), "any", 90..100).unwrap(), [7; 10]);
        let short = ask(Place::File(path.clone()), "any", 90..101).unwrap_err();
        assert_eq!(
            short.to_string(),
            format!("{} has 100 bytes, but the image refers to bytes up to 101", path.display())
        );
        let huge = ask(Place::File(path.clone()), "any", 0..u64::MAX).unwrap_err();
        assert!(matches!(huge, BackendError::TooShort { .. }));
        let backend = LocalFs::new(Place::File(path), Pool::new(1).unwrap());
        backend.check("any", 100).unwrap();
        assert!(matches!(backend.check("any", 101), Err(BackendError::TooShort { size: 100, end: 101, .. })));
    }

    #[test]
    fn cancelled_request_is_answered_once_without_reading() {
        let pool = Pool::new(1).unwrap();
        let (release, gate) = mpsc::channel::<()>();
        pool.spawn(Urgency::Demand, move || gate.recv_timeout(Duration::from_secs(10)).unwrap());
        let backend = LocalFs::new(Place::File("/nonexistent".into()), pool);
        let (tell, told) = mpsc::channel();
        let request = Request { blob: Arc::from("x"), range: 0..1, class: Class::Demand, deadline: None };
        let ticket = backend.read(request, Answer::new(move |result| tell.send(result).unwrap()));
        ticket.cancel();
        release.send(()).unwrap();
        let result = told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(matches!(result, Err(BackendError::Cancelled)));
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
    }
}
