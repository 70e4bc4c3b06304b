//! Whether a worker whose ring ran dry stays awake for a while, or sleeps at once.
//!
//! A sleep costs a kick of the driver and two switches of the processor, some microseconds for both sides, and the wake-up
//! delays the next request. Staying awake costs what it lasts. It pays where the driver answers replies with the next
//! requests at once, as one that waits for each reply does, and only then. So a worker stays awake
//! - if few requests came since the ring was dry the last time: many of them share the costs of one wake-up;
//! - if the last pause was so short that staying awake would have bridged it. Each time it did not, twice as many such
//!   pauses must be seen before the next attempt, so a guest whose requests come a little too late costs next to nothing,
//!   and an idle one nothing.

use std::time::Duration;
use std::time::Instant;

use crate::limits::AWAKE_BELOW_REQUESTS;
use crate::limits::MAX_PAUSES_BEFORE_AWAKE;
use crate::limits::WAKE_UP;

/// What a worker remembers of its ring's pauses.
#[derive(Debug)]
pub(super) struct Patience {
    /// How long the worker stays awake at most.
    limit: Duration,
    /// Requests since the ring was dry the last time.
    requests: usize,
    /// When the worker went to sleep.
    asleep_since: Option<Instant>,
    /// Short pauses in a row.
    short_pauses: u32,
    /// Short pauses in a row after which it stays awake.
    wanted: u32,
}

impl Patience {
    /// A worker that stays awake for `limit` at most; zero: never.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, requests: 0, asleep_since: None, short_pauses: 0, wanted: 1 }
    }

    /// How long the worker may stay awake.
    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// Work came after a sleep, if there was one.
    pub(super) fn woke(&mut self) {
        let Some(since) = self.asleep_since.take() else { return };
        let is_short = since.elapsed() < self.limit.saturating_add(WAKE_UP);
        self.short_pauses = if is_short { self.short_pauses.saturating_add(1) } else { 0 };
    }

    /// `count` requests were begun.
    #[inline]
    pub(super) fn served(&mut self, count: usize) {
        self.requests = self.requests.saturating_add(count);
    }

    /// Whether to stay awake should the ring be dry now.
    #[inline]
    pub(super) fn stays_awake(&self) -> bool {
        self.short_pauses >= self.wanted && self.requests < AWAKE_BELOW_REQUESTS
    }

    /// Work came while the worker was awake.
    pub(super) fn paid(&mut self) {
        self.requests = 0;
        self.wanted = 1;
    }

    /// The worker stayed awake for nothing.
    pub(super) fn ran_out(&mut self) {
        self.short_pauses = 0;
        self.wanted = self.wanted.saturating_mul(2).min(MAX_PAUSES_BEFORE_AWAKE);
    }

    /// The worker goes to sleep.
    pub(super) fn sleeps(&mut self) {
        self.requests = 0;
        self.asleep_since = (!self.limit.is_zero()).then(Instant::now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(1000);

    fn pause(patience: &mut Patience) {
        patience.sleeps();
        patience.woke();
        patience.served(1);
    }

    #[test]
    fn short_pauses_keep_a_worker_awake_and_long_ones_do_not() {
        let mut patience = Patience::new(LIMIT);
        patience.served(1);
        assert!(!patience.stays_awake(), "nothing is known yet");
        pause(&mut patience);
        assert!(patience.stays_awake());
        patience.asleep_since = Instant::now().checked_sub(2 * LIMIT);
        patience.woke();
        assert!(!patience.stays_awake(), "staying awake would not have bridged it");
    }

    #[test]
    fn many_requests_between_two_pauses_are_worth_a_wake_up() {
        let mut patience = Patience::new(LIMIT);
        pause(&mut patience);
        patience.served(AWAKE_BELOW_REQUESTS);
        assert!(!patience.stays_awake());
        patience.paid();
        assert!(patience.stays_awake(), "counted anew");
    }

    #[test]
    fn vain_waits_become_rare_and_one_that_pays_is_enough_to_begin_anew() {
        let mut patience = Patience::new(LIMIT);
        let mut rounds = Vec::new();
        for _ in 0..10 {
            let mut pauses = 0;
            while !patience.stays_awake() {
                pause(&mut patience);
                pauses += 1;
            }
            rounds.push(pauses);
            patience.ran_out();
        }
        assert_eq!(rounds[..4], [1, 2, 4, 8]);
        assert_eq!(rounds[9], MAX_PAUSES_BEFORE_AWAKE);
        patience.paid();
        pause(&mut patience);
        assert!(patience.stays_awake());
    }

    #[test]
    fn without_a_limit_a_worker_never_stays_awake() {
        let mut patience = Patience::new(Duration::ZERO);
        (0..100).for_each(|_| pause(&mut patience));
        assert!(!patience.stays_awake());
    }
}
