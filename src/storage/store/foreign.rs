//! Chunks that another process fetches at this moment.
//!
//! Its lock says so; nobody waits in the kernel. A timer looks at the shared bits and tries the lock again, so that the
//! chunk is ours to fetch when the other process has failed or died. One that lives and does not get on is waited for so
//! long only (`limits::FOREIGN_PATIENCE`): to fetch twice is a waste, and harmless, since both write the same bytes.

use std::time::Duration;
use std::time::Instant;

use super::Inner;
use super::fetch::Held;
use super::fetch::Wanted;
use super::resolve;
use crate::limits::FOREIGN_PATIENCE;
use crate::limits::FOREIGN_PAUSE;
use crate::storage::cache::generation::Presence;
use crate::storage::sync::Arc;
use crate::storage::sync::now;

/// Chunks whose locks other processes hold, and the next pause.
pub(super) struct Foreign {
    chunks: Vec<Wanted>,
    pause: Duration,
    patient_until: Instant,
}

/// Waits for `chunks`, if there are any.
pub(super) fn wait(inner: &Arc<Inner>, chunks: Vec<Wanted>) {
    let patience = inner.options.demand_deadline.map_or(FOREIGN_PATIENCE, |all| (all / 2).min(FOREIGN_PATIENCE));
    Foreign { chunks, pause: FOREIGN_PAUSE.start, patient_until: now() + patience }.go_on(inner);
}

impl Foreign {
    fn go_on(self, inner: &Arc<Inner>) {
        let pause = self.pause;
        if !self.chunks.is_empty() {
            inner.later(Held::Foreign(self), pause);
        }
    }

    /// Looks again.
    pub(super) fn look(self, inner: &Arc<Inner>) {
        let is_patient = now() < self.patient_until;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (claim, facts) in self.chunks {
            let Some(mut claim) = claim.unless_idle() else { continue };
            let is_there =
                claim.files.as_ref().is_some_and(|files| files.presence(claim.chunk, &facts) == Presence::Trusted);
            if is_there || claim.try_lock() {
                ours.push((claim, facts));
            } else if claim.is_contested(&facts) {
                claim.leave_files();
                ours.push((claim, facts));
            } else if is_patient {
                theirs.push((claim, facts));
            } else {
                tracing::debug!(blob = %claim.blob.id, chunk = claim.chunk, "another process does not get on");
                claim.ignore_lock();
                ours.push((claim, facts));
            }
        }
        let pause = self.pause.saturating_mul(2).min(FOREIGN_PAUSE.end);
        Self { chunks: theirs, pause, patient_until: self.patient_until }.go_on(inner);
        resolve::drive(inner, ours);
    }
}
