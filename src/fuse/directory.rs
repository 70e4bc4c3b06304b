//! Answers of READDIR and READDIRPLUS.
//!
//! Entries are collected in a buffer that the thread keeps, so that a request allocates nothing. The buffer grows to
//! what guests ask for (`limits::MAX_IO_BYTES` at most) and stays.

use std::cell::Cell;

use super::reply::Entry;
use super::reply::entry_out;
use super::wire;

/// Entries begin at multiples of this (`FUSE_DIRENT_ALIGN`).
const ALIGN: usize = 8;

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with `len` bytes of this thread's buffer, whatever they hold. Used within itself (a reply that is built
/// while another is), the inner one gets a buffer of its own.
pub(super) fn with_buffer(len: usize, work: impl FnOnce(&mut [u8])) {
    let mut buffer = BUFFER.take();
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    work(buffer.get_mut(..len).unwrap_or_default());
    BUFFER.set(buffer);
}

/// Builds the answer of READDIR and READDIRPLUS.
pub struct DirWriter<'a> {
    buffer: &'a mut [u8],
    used: usize,
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
    /// Collects into `buffer` until it is full.
    pub(super) fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, used: 0, full: false }
    }

    /// Whether an entry was refused.
    pub(super) fn is_full(&self) -> bool {
        self.full
    }

    /// What was collected.
    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.used).unwrap_or_default()
    }

    /// Adds an entry of READDIR. `next` is the offset at which the entry behind it is found, `kind` a `DT_*` value.
    pub fn plain(&mut self, ino: u64, next: u64, kind: u32, name: &[u8]) -> Added {
        self.append([0; 0], ino, next, kind, name)
    }

    /// Adds an entry of READDIRPLUS. `entry.node` 0 gives attributes only.
    #[inline]
    pub fn plus(&mut self, entry: &Entry, next: u64, name: &[u8]) -> Added {
        // DT_* values are the type bits of a mode (`include/linux/fs_types.h`, `S_DT`).
        let kind = (entry.attr.mode >> 12) & 0xf;
        let front: [u8; size_of::<wire::EntryOut>()] = zerocopy::transmute!(entry_out(entry));
        self.append(front, entry.attr.ino, next, kind, name)
    }

    #[inline]
    fn append<const FRONT: usize>(&mut self, entry: [u8; FRONT], ino: u64, next: u64, kind: u32, name: &[u8]) -> Added {
        const FIXED: usize = size_of::<wire::Dirent>();
        let padded = name.len().saturating_add(ALIGN - 1) & !(ALIGN - 1);
        let end = self.used.saturating_add(FRONT).saturating_add(FIXED).saturating_add(padded);
        let (Some(place), Ok(namelen)) = (self.buffer.get_mut(self.used..end), u32::try_from(name.len())) else {
            self.full = true;
            return Added::Full;
        };
        let Some((front, rest)) = place.split_first_chunk_mut::<FRONT>() else { return Added::Full };
        *front = entry;
        let Some((fixed, rest)) = rest.split_first_chunk_mut::<FIXED>() else { return Added::Full };
        *fixed = zerocopy::transmute!(wire::Dirent { ino, off: next, namelen, kind });
        // The padding first, since the name may cover some of it.
        if let Some(last) = rest.last_chunk_mut::<ALIGN>() {
            *last = [0; ALIGN];
        }
        if let Some(place) = rest.get_mut(..name.len()) {
            place.copy_from_slice(name);
        }
        self.used = end;
        Added::Yes
    }
}
