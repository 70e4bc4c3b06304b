//! Doubts about the page cache: pages of ready chunks go away when memory is short.
//!
//! Nobody tells us. But a thread that copies from a page that is gone waits for the disk, and the kernel counts that.
//! When the count of a reading thread rises, no chunk is believed to be in memory any more, and each is probed anew.

use std::cell::Cell;
use std::time::Instant;

use crate::limits::DOUBT_INTERVAL;
use crate::limits::FAULT_SAMPLE_READS;
use crate::storage::sync::Mutex;
use crate::storage::sync::lock;
use crate::sys::faults::thread_major_faults;

thread_local! {
    /// Warm reads of this thread since the last look, and the count of that look.
    static SEEN: Cell<(u32, Option<u64>)> = const { Cell::new((0, None)) };
}

/// When doubts were last acted upon.
#[derive(Debug, Default)]
pub(super) struct Doubt(Mutex<Option<Instant>>);

impl Doubt {
    /// Called after each warm read: whether hints about the page cache should be dropped now.
    #[inline]
    pub(super) fn arises(&self) -> bool {
        let (reads, last) = SEEN.get();
        if reads < FAULT_SAMPLE_READS {
            SEEN.set((reads + 1, last));
            return false;
        }
        self.look(last, thread_major_faults())
    }

    #[cold]
    fn look(&self, last: Option<u64>, now: u64) -> bool {
        SEEN.set((0, Some(now)));
        last.is_some_and(|last| now > last) && self.is_due()
    }

    /// Not more often than is useful: each doubt costs a probe per chunk.
    fn is_due(&self) -> bool {
        let now = Instant::now();
        let mut last = lock(&self.0);
        let due = last.is_none_or(|at| now.saturating_duration_since(at) >= DOUBT_INTERVAL);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubts_arise_when_the_count_rises_and_not_too_often() {
        let doubt = Doubt::default();
        assert!(!doubt.look(None, 7), "the first look has nothing to compare with");
        assert!(!doubt.look(Some(7), 7));
        assert!(doubt.look(Some(7), 8));
        assert!(!doubt.look(Some(8), 9), "too soon");
    }
}
