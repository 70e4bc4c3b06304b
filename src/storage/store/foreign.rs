//! Chunks that another process fetches at this moment.
//!
//! Its lock says so; nobody waits in the kernel. A timer looks at the shared bits and tries the lock again, so that the
//! chunk is ours to fetch when the other process has failed or died.

use std::time::Duration;

use super::Inner;
use super::fetch::Held;
use super::fetch::Wanted;
use super::resolve;
use crate::limits::FOREIGN_PAUSE;
use crate::storage::cache::generation::Presence;
use crate::storage::sync::Arc;

/// Chunks whose locks other processes hold, and the next pause.
pub(super) struct Foreign {
    chunks: Vec<Wanted>,
    pause: Duration,
}

/// Waits for `chunks`, if there are any.
pub(super) fn wait(inner: &Arc<Inner>, chunks: Vec<Wanted>) {
    wait_for(inner, chunks, FOREIGN_PAUSE.start);
}

fn wait_for(inner: &Arc<Inner>, chunks: Vec<Wanted>, pause: Duration) {
    if !chunks.is_empty() {
        inner.later(Held::Foreign(Foreign { chunks, pause }), pause);
    }
}

impl Foreign {
    /// Looks again.
    pub(super) fn look(self, inner: &Arc<Inner>) {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (claim, facts) in self.chunks {
            let Some(mut claim) = claim.unless_idle() else { continue };
            let is_there = claim.files.as_ref().is_some_and(|files| files.presence(claim.chunk) == Presence::Trusted);
            if is_there || claim.try_lock() {
                ours.push((claim, facts));
            } else {
                theirs.push((claim, facts));
            }
        }
        wait_for(inner, theirs, self.pause.saturating_mul(2).min(FOREIGN_PAUSE.end));
        resolve::drive(inner, ours);
    }
}
