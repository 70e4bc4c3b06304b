//! Which missing chunks go into one ranged request. Pure.

use std::ops::Range;

use crate::limits::GAP_SHIFT;
use crate::rafs::facts::ChunkFacts;

/// The stored bytes of some chunks, in the order of their offsets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    range: Range<u64>,
    /// Those of the last chunk.
    last: Range<u64>,
    limit: u64,
}

impl Span {
    /// The span of one chunk, which may grow to `limit` bytes (a larger chunk stays alone).
    pub(super) fn new(first: &ChunkFacts, limit: u64) -> Self {
        Self { range: first.stored(), last: first.stored(), limit }
    }

    /// The bytes to ask for.
    pub(super) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Bytes to ask for.
    pub(super) fn len(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// Whether the stored bytes of `next` are asked for already: it lies in the same unit as the chunk taken last.
    pub(super) fn ends_with(&self, next: &ChunkFacts) -> bool {
        next.stored() == self.last
    }

    /// Takes `next` in if it follows, at most a small gap behind the end, and the limit allows; or if it shares the
    /// stored bytes of the last one.
    pub(super) fn take(&mut self, next: &ChunkFacts) -> bool {
        if self.ends_with(next) {
            return true;
        }
        let next = next.stored();
        let Some(gap) = next.start.checked_sub(self.range.end) else { return false };
        let fits = next.end.saturating_sub(self.range.start) <= self.limit;
        let takes = fits && gap <= self.len() >> GAP_SHIFT;
        if takes {
            self.range.end = next.end;
            self.last = next;
        }
        takes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, bytes: u32) -> ChunkFacts {
        ChunkFacts {
            compressed_offset: offset,
            compressed_bytes: bytes,
            uncompressed_offset: 0,
            uncompressed_bytes: bytes,
            coding: crate::rafs::facts::Coding::Plain,
            digest: None,
            crc32c: None,
        }
    }

    #[test]
    fn span_takes_neighbours_and_small_gaps_up_to_its_limit() {
        let mut span = Span::new(&chunk(1000, 1280), 3000);
        assert!(!span.take(&chunk(500, 10)), "backwards");
        assert!(!span.take(&chunk(2279, 10)), "overlapping");
        assert!(!span.take(&chunk(2291, 10)), "a gap of 11 is more than 1280 >> 7");
        assert!(span.take(&chunk(2290, 10)));
        assert!(span.take(&chunk(2300, 700)));
        assert!(span.take(&chunk(3000, 1000)));
        assert!(!span.take(&chunk(4000, 1)), "limit");
        assert!(span.ends_with(&chunk(3000, 1000)) && span.take(&chunk(3000, 1000)), "the same unit again");
        assert!(!span.take(&chunk(2300, 700)), "the unit before");
        assert_eq!(span.range(), 1000..4000);
        assert_eq!(span.len(), 3000);
    }

    #[test]
    fn hostile_offsets_do_not_overflow() {
        let mut span = Span::new(&chunk(u64::MAX - 1, u32::MAX), 100);
        assert!(!span.take(&chunk(0, 1)));
        assert_eq!(span.range(), u64::MAX - 1..u64::MAX);
    }
}
