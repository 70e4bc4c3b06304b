//! A bound on the bytes that fetches hold. What does not fit waits as data, in order; no thread does.

use std::collections::VecDeque;

use super::Inner;
use super::fetch;
use super::fetch::Work;
use crate::storage::pool::Urgency;
use crate::storage::sync::Arc;
use crate::storage::sync::Mutex;
use crate::storage::sync::Weak;
use crate::storage::sync::lock;

struct State {
    used: u64,
    waiting: VecDeque<Work>,
}

/// The budget of one store.
pub(super) struct Budget {
    limit: u64,
    store: Weak<Inner>,
    state: Mutex<State>,
}

/// Some of the budget. Dropping it lets waiting work begin.
pub(super) struct Permit {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    /// A budget of `limit` bytes for `store`.
    pub(super) fn new(limit: u64, store: Weak<Inner>) -> Arc<Self> {
        Arc::new(Self { limit, store, state: Mutex::new(State { used: 0, waiting: VecDeque::new() }) })
    }

    /// Gives `work` its permit, or keeps it until there is room. Work that is larger than the budget goes alone.
    pub(super) fn admit(self: &Arc<Self>, work: Work) -> Option<Work> {
        let mut state = lock(&self.state);
        if !state.waiting.is_empty() || !self.fits(&state, &work) {
            state.waiting.push_back(work);
            return None;
        }
        Some(self.permit(&mut state, work))
    }

    /// Drops all waiting work.
    pub(super) fn clear(&self) {
        let waiting = std::mem::take(&mut lock(&self.state).waiting);
        drop(waiting);
    }

    fn fits(&self, state: &State, work: &Work) -> bool {
        state.used == 0 || state.used.saturating_add(work.weight()) <= self.limit
    }

    fn permit(self: &Arc<Self>, state: &mut State, mut work: Work) -> Work {
        let bytes = work.weight();
        state.used = state.used.saturating_add(bytes);
        work.permit = Some(Permit { budget: Arc::clone(self), bytes });
        work
    }

    /// Issues what fits now.
    fn pump(self: &Arc<Self>, store: &Arc<Inner>) {
        loop {
            let work = {
                let mut state = lock(&self.state);
                match state.waiting.pop_front() {
                    None => return,
                    Some(work) if self.fits(&state, &work) => self.permit(&mut state, work),
                    Some(work) => {
                        state.waiting.push_front(work);
                        return;
                    }
                }
            };
            fetch::issue(store, work);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let has_waiting = {
            let mut state = lock(&self.budget.state);
            state.used = state.used.saturating_sub(self.bytes);
            !state.waiting.is_empty()
        };
        if has_waiting && let Some(store) = self.budget.store.upgrade() {
            let budget = Arc::clone(&self.budget);
            let pool = Arc::clone(&store.pool);
            pool.spawn(Urgency::Demand, move || budget.pump(&store));
        }
    }
}
