//! Answers of READDIR and READDIRPLUS.
//!
//! Entries are collected in a buffer that the thread keeps, so that a request allocates nothing. The buffer grows to
//! what guests ask for (`limits::MAX_IO_BYTES` at most) and stays.

use std::cell::Cell;

use zerocopy::IntoBytes;

use super::reply::Entry;
use super::reply::entry_out;
use super::wire;

/// Entries begin at multiples of this (`FUSE_DIRENT_ALIGN`).
const ALIGN: usize = 8;

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with this thread's buffer, empty. Used within itself (a reply that is built while another is), the inner
/// one gets a buffer of its own.
pub(super) fn with_buffer(work: impl FnOnce(&mut Vec<u8>)) {
    let mut buffer = BUFFER.take();
    buffer.clear();
    work(&mut buffer);
    BUFFER.set(buffer);
}

/// Builds the answer of READDIR and READDIRPLUS.
pub struct DirWriter<'a> {
    buffer: &'a mut Vec<u8>,
    limit: usize,
    full: bool,
}

/// Whether an entry was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// It was; there may be room for another.
    Yes,
    /// It was not: the buffer is full. Stop.
    Full,
}

impl<'a> DirWriter<'a> {
    /// Collects into `buffer` until it holds `limit` bytes.
    pub(super) fn new(buffer: &'a mut Vec<u8>, limit: usize) -> Self {
        Self { buffer, limit, full: false }
    }

    /// Whether an entry was refused.
    pub(super) fn is_full(&self) -> bool {
        self.full
    }

    /// Adds an entry of READDIR. `next` is the offset at which the entry behind it is found, `kind` a `DT_*` value.
    pub fn plain(&mut self, ino: u64, next: u64, kind: u32, name: &[u8]) -> Added {
        self.append(&[], ino, next, kind, name)
    }

    /// Adds an entry of READDIRPLUS. `entry.node` 0 gives attributes only.
    pub fn plus(&mut self, entry: &Entry, next: u64, name: &[u8]) -> Added {
        // DT_* values are the type bits of a mode (`include/linux/fs_types.h`, `S_DT`).
        let kind = (entry.attr.mode >> 12) & 0xf;
        self.append(entry_out(entry).as_bytes(), entry.attr.ino, next, kind, name)
    }

    fn append(&mut self, entry: &[u8], ino: u64, next: u64, kind: u32, name: &[u8]) -> Added {
        let Ok(namelen) = u32::try_from(name.len()) else { return self.refuse() };
        let unpadded = entry.len().saturating_add(size_of::<wire::Dirent>()).saturating_add(name.len());
        let padding = unpadded.wrapping_neg() % ALIGN;
        let end = self.buffer.len().saturating_add(unpadded).saturating_add(padding);
        if end > self.limit {
            return self.refuse();
        }
        self.buffer.extend_from_slice(entry);
        self.buffer.extend_from_slice(wire::Dirent { ino, off: next, namelen, kind }.as_bytes());
        self.buffer.extend_from_slice(name);
        self.buffer.resize(end, 0);
        Added::Yes
    }

    fn refuse(&mut self) -> Added {
        self.full = true;
        Added::Full
    }
}
