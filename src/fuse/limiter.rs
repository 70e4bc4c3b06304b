//! At most one log line per interval for what a guest can trigger as often as it likes.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

/// Lets one event through per interval and counts the others.
#[derive(Debug)]
pub(crate) struct Limiter {
    started: Instant,
    interval: Duration,
    /// Milliseconds since `started` before which nothing passes.
    next_ms: AtomicU64,
    suppressed: AtomicU64,
}

impl Limiter {
    pub(crate) fn new(interval: Duration) -> Self {
        Self { started: Instant::now(), interval, next_ms: AtomicU64::new(0), suppressed: AtomicU64::new(0) }
    }

    /// Whether an event may be logged now, and how many were not since the last one that was.
    pub(crate) fn pass(&self) -> Option<u64> {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let now = millis(self.started.elapsed());
        // Relaxed: an event too many or too few in the log hurts nobody.
        let next = self.next_ms.load(Ordering::Relaxed);
        let later = now.saturating_add(millis(self.interval));
        let passes =
            now >= next && self.next_ms.compare_exchange(next, later, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if passes {
            return Some(self.suppressed.swap(0, Ordering::Relaxed));
        }
        self.suppressed.fetch_add(1, Ordering::Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_event_within_the_interval_is_counted_not_passed() {
        let limiter = Limiter::new(Duration::from_secs(3600));
        assert_eq!(limiter.pass(), Some(0));
        assert_eq!(limiter.pass(), None);
        let eager = Limiter::new(Duration::ZERO);
        assert_eq!((eager.pass(), eager.pass()), (Some(0), Some(0)));
    }
}
