//! Descriptor chains: from a head to spans of guest memory, with limits.
//!
//! Descriptors are read once, checked, and kept as (address, length): nothing here holds on to a map. What is wrong
//! with a chain is either its own matter ([`Fault`]: the request is answered with an error) or the ring's
//! ([`BrokenTable`]: nothing this ring says can be trusted any more).

use smallvec::SmallVec;

use super::split::DESCRIPTOR_BYTES;
use super::split::Descriptor;
use crate::limits::MAX_CHAIN_BYTES;
use crate::limits::MAX_CHAIN_DESCRIPTORS;
use crate::limits::PREFETCHED_BYTES;
use crate::sys::guest::GuestMap;
use crate::sys::guest::Unreachable;
use crate::sys::guest::Window;

/// A run of guest addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) address: u64,
    pub(super) len: u32,
}

/// Bytes of a request that are asked for ahead: all of most.
const REQUEST_LINES_BYTES: usize = 128;

/// Entries of an indirect table that are copied at once: those of a request and a page.
const NEAR_ENTRIES: usize = 8;

/// Spans in order. Four are enough for a reply header and two pages; more go to the heap, with a large read.
pub(super) type Spans = SmallVec<[Span; 4]>;

/// Why a chain cannot be a request. Its reply area is still good for an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("a readable descriptor behind a writable one")]
    Misordered,
    #[error("more than {MAX_CHAIN_DESCRIPTORS} descriptors")]
    TooMany,
    #[error("more than {MAX_CHAIN_BYTES} bytes, or beyond the end of the address space")]
    TooLarge,
    #[error("an indirect table that is nested, empty, of a bad size, looping or not the end of its chain")]
    BadIndirect,
    #[error("an address outside the guest's memory")]
    Unmapped,
}

/// Why the descriptor table of a ring is no such thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BrokenTable {
    #[error("descriptor {0} is beyond the end of the table")]
    OutOfRange(u16),
    #[error("the chain from descriptor {0} loops")]
    Loop(u16),
    #[error("the table is not mapped")]
    Unmapped,
}

/// One chain, taken apart.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// What the device may read: the request.
    pub(super) readable: Spans,
    /// What the device may write: the place of the reply.
    pub(super) writable: Spans,
    /// Bytes of `readable`.
    pub(super) readable_bytes: u64,
    /// Bytes of `writable`.
    pub(super) writable_bytes: u64,
    /// The first thing wrong with it.
    pub(super) fault: Option<Fault>,
    descriptors: usize,
}

impl Chain {
    /// Takes apart the chain that begins at `head` of a table of `size` descriptors. What was in `self` is forgotten.
    ///
    /// # Errors
    /// [`BrokenTable`].
    #[inline]
    pub(super) fn walk(&mut self, map: &GuestMap, table: &Window<'_>, size: u16, head: u16) -> Result<(), BrokenTable> {
        self.clear();
        let mut index = head;
        // One step more than there are descriptors is a loop.
        for _ in 0..size {
            if index >= size {
                return Err(BrokenTable::OutOfRange(index));
            }
            let mut bytes = [0; DESCRIPTOR_BYTES];
            let offset = usize::from(index).wrapping_mul(DESCRIPTOR_BYTES);
            table.read(offset, &mut bytes).map_err(|_| BrokenTable::Unmapped)?;
            let descriptor = Descriptor::from_bytes(bytes);
            if descriptor.flags & Descriptor::INDIRECT != 0 {
                if descriptor.flags & Descriptor::NEXT != 0 {
                    self.wrong(Fault::BadIndirect);
                }
                self.walk_indirect(map, descriptor);
                return Ok(());
            }
            self.add(descriptor);
            if descriptor.flags & Descriptor::NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(BrokenTable::Loop(head))
    }

    /// Asks for the bytes that are touched first when the request is served: its own, and the place of the reply's
    /// header.
    #[inline]
    pub(super) fn prefetch(&self, map: &GuestMap) {
        for span in self.readable.iter().take(2) {
            map.prefetch(span.address, (span.len as usize).min(REQUEST_LINES_BYTES));
        }
        if let Some(span) = self.writable.first() {
            map.prefetch(span.address, 1);
        }
    }

    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.readable_bytes = 0;
        self.writable_bytes = 0;
        self.fault = None;
        self.descriptors = 0;
    }

    fn walk_indirect(&mut self, map: &GuestMap, table: Descriptor) {
        let len = table.len as usize;
        let entries = len / DESCRIPTOR_BYTES;
        if entries == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            return self.wrong(Fault::BadIndirect);
        }
        let window = map.whole(table.address, len);
        // A short table is copied at once, others entry by entry: mostly all of it is needed.
        let mut near = [0; NEAR_ENTRIES * DESCRIPTOR_BYTES];
        let near_bytes = if len <= near.len() { len } else { 0 };
        if let Some(bytes) = near.get_mut(..near_bytes)
            && map.read(table.address, bytes).is_err()
        {
            return self.wrong(Fault::Unmapped);
        }
        let (near, _) = near.get(..near_bytes).unwrap_or_default().as_chunks::<DESCRIPTOR_BYTES>();
        let mut index = 0usize;
        // The table may be larger than what a chain may use of it: the steps are what is bounded.
        for _ in 0..entries.min(MAX_CHAIN_DESCRIPTORS.saturating_add(1)) {
            let read = match (near.get(index), &window) {
                (Some(bytes), _) => Ok(*bytes),
                (None, window) => read_entry(map, window.as_ref(), table.address, index),
            };
            let Ok(bytes) = read else { return self.wrong(Fault::Unmapped) };
            let descriptor = Descriptor::from_bytes(bytes);
            if descriptor.flags & Descriptor::INDIRECT != 0 {
                return self.wrong(Fault::BadIndirect);
            }
            self.add(descriptor);
            if descriptor.flags & Descriptor::NEXT == 0 {
                return;
            }
            index = usize::from(descriptor.next);
            if index >= entries {
                return self.wrong(Fault::BadIndirect);
            }
        }
        self.wrong(Fault::BadIndirect);
    }

    /// Adds what `descriptor` points to, unless that breaks a limit.
    #[inline]
    fn add(&mut self, descriptor: Descriptor) {
        if descriptor.len == 0 {
            return;
        }
        let span = Span { address: descriptor.address, len: descriptor.len };
        self.descriptors = self.descriptors.saturating_add(1);
        if self.descriptors > MAX_CHAIN_DESCRIPTORS {
            return self.wrong(Fault::TooMany);
        }
        let len = u64::from(span.len);
        // The sum of what was taken is below the limit, and a length has 32 bits.
        let total = self.readable_bytes.wrapping_add(self.writable_bytes).wrapping_add(len);
        if total > MAX_CHAIN_BYTES || span.address.checked_add(len).is_none() {
            return self.wrong(Fault::TooLarge);
        }
        if descriptor.is_writable() {
            self.writable_bytes = self.writable_bytes.saturating_add(len);
            push(&mut self.writable, span);
        } else {
            if !self.writable.is_empty() {
                self.wrong(Fault::Misordered);
            }
            self.readable_bytes = self.readable_bytes.saturating_add(len);
            push(&mut self.readable, span);
        }
    }

    #[cold]
    fn wrong(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }
}

/// Asks for the indirect table of the chain that begins at `head`, if it has one: it is about to be walked.
#[inline]
pub(super) fn prefetch_table(map: &GuestMap, table: &Window<'_>, head: u16) {
    let mut bytes = [0; DESCRIPTOR_BYTES];
    if table.read(usize::from(head).wrapping_mul(DESCRIPTOR_BYTES), &mut bytes).is_ok() {
        let descriptor = Descriptor::from_bytes(bytes);
        if descriptor.flags & Descriptor::INDIRECT != 0 {
            map.prefetch(descriptor.address, (descriptor.len as usize).min(PREFETCHED_BYTES));
        }
    }
}

/// Entry `index` of an indirect table at `address`, which `window` shows if it lies in one region.
#[inline]
fn read_entry(
    map: &GuestMap,
    window: Option<&Window<'_>>,
    address: u64,
    index: usize,
) -> Result<[u8; DESCRIPTOR_BYTES], Unreachable> {
    let mut bytes = [0; DESCRIPTOR_BYTES];
    let offset = index.wrapping_mul(DESCRIPTOR_BYTES);
    match window {
        Some(window) => window.read(offset, &mut bytes)?,
        None => map.read(address.checked_add(offset as u64).ok_or(Unreachable)?, &mut bytes)?,
    }
    Ok(bytes)
}

/// Appends `span`, to the last one if they touch: pages of a large buffer often do.
#[inline]
fn push(spans: &mut Spans, span: Span) {
    if let Some(last) = spans.last_mut()
        && last.address.checked_add(u64::from(last.len)) == Some(span.address)
        && let Some(len) = last.len.checked_add(span.len)
    {
        last.len = len;
        return;
    }
    spans.push(span);
}

/// Reads spans in order, each byte once.
#[derive(Debug)]
pub(super) struct SpanReader<'a> {
    map: &'a GuestMap,
    spans: &'a [Span],
    /// Bytes of the first span that were read.
    done: u32,
}

impl<'a> SpanReader<'a> {
    /// A reader of `spans` in `map`.
    pub(super) fn new(map: &'a GuestMap, spans: &'a [Span]) -> Self {
        Self { map, spans, done: 0 }
    }

    /// Fills `out` with the next bytes.
    ///
    /// # Errors
    /// [`Unreachable`], also when the spans end first.
    #[inline]
    pub(super) fn read(&mut self, mut out: &mut [u8]) -> Result<(), Unreachable> {
        while !out.is_empty() {
            let (span, rest) = self.spans.split_first().ok_or(Unreachable)?;
            let left = span.len.saturating_sub(self.done);
            let step = out.len().min(left as usize);
            let (now, later) = out.split_at_mut(step);
            let from = span.address.checked_add(u64::from(self.done)).ok_or(Unreachable)?;
            self.map.read(from, now)?;
            out = later;
            if step == left as usize {
                self.spans = rest;
                self.done = 0;
            } else {
                self.done = self.done.saturating_add(step as u32);
            }
        }
        Ok(())
    }
}
