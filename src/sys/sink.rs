//! Where the bytes of a reply go: guest memory, a buffer, a file descriptor.

use super::view::View;
use super::view::ViewError;

/// Why bytes could not be put into a [`Sink`].
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum SinkError {
    /// The source vanished or was asked beyond its end.
    #[error("the source of the bytes failed")]
    Source(#[from] ViewError),
    /// More bytes than the receiver has room for.
    #[error("the receiver has room for {room} bytes, {wanted} were offered")]
    Full {
        /// Bytes left.
        room: usize,
        /// Bytes offered.
        wanted: usize,
    },
    /// The receiver's memory is not there (an address outside the guest's memory, or a page that faults).
    #[error("the receiver's memory is not accessible")]
    Unmapped,
}

/// A place that takes bytes in order.
///
/// Every method either takes all of the bytes or fails; after a failure what was written is undefined, and the owner
/// of the sink must not publish it.
pub trait Sink {
    /// Bytes that still fit.
    fn room(&self) -> usize;
    /// Appends `bytes`.
    fn put_bytes(&mut self, bytes: &[u8]) -> Result<(), SinkError>;
    /// Appends `len` zero bytes.
    fn put_zeros(&mut self, len: usize) -> Result<(), SinkError>;
    /// Appends `len` bytes of `view` from `offset`, without a copy in between where the sink can do so.
    fn put_view(&mut self, view: &View, offset: u64, len: usize) -> Result<(), SinkError>;
}

/// A sink that collects into memory, bounded by the capacity it was made with.
#[derive(Debug)]
pub struct MemorySink {
    bytes: Vec<u8>,
    limit: usize,
}

impl MemorySink {
    /// A sink that takes at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), limit }
    }

    /// What was put so far.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn reserve(&mut self, wanted: usize) -> Result<(), SinkError> {
        let room = self.room();
        if wanted > room {
            return Err(SinkError::Full { room, wanted });
        }
        Ok(())
    }
}

impl Sink for MemorySink {
    fn room(&self) -> usize {
        self.limit.saturating_sub(self.bytes.len())
    }

    fn put_bytes(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.reserve(bytes.len())?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn put_zeros(&mut self, len: usize) -> Result<(), SinkError> {
        self.reserve(len)?;
        self.bytes.resize(self.bytes.len() + len, 0);
        Ok(())
    }

    fn put_view(&mut self, view: &View, offset: u64, len: usize) -> Result<(), SinkError> {
        self.reserve(len)?;
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        view.copy_at(offset, &mut self.bytes[start..])?;
        Ok(())
    }
}
