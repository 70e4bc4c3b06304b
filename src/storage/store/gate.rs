//! A bound on the chunks that waiting reads hold in memory, for blobs that are not served from a mapped file.
//!
//! A read of several such chunks holds those that have arrived until the last one is there. So it passes the gate with
//! the bytes of all its chunks before it asks for any; what does not fit waits as data, in order. Reads of one chunk hold
//! nothing and need no pass, and neither do chunks that are remembered ([`super::decoded`]).

use std::collections::VecDeque;

use super::Inner;
use super::parked::Parked;
use super::resolve;
use crate::limits::HELD_BYTES;
use crate::storage::sync::Arc;
use crate::storage::sync::Mutex;
use crate::storage::sync::Weak;
use crate::storage::sync::lock;

#[derive(Default)]
struct State {
    used: u64,
    waiting: VecDeque<(Arc<Parked>, u64)>,
}

/// The gate of a store.
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
}

/// Room for the chunks of one read. Dropping it lets others in.
pub(super) struct Pass {
    store: Weak<Inner>,
    bytes: u64,
}

impl Gate {
    /// Lets `parked` in with `bytes`; else it waits, and is resolved again when there is room (`false`).
    pub(super) fn enter(&self, inner: &Inner, parked: &Arc<Parked>, bytes: u64) -> bool {
        let mut state = lock(&self.state);
        if !state.waiting.is_empty() || !fits(&state, bytes) {
            state.waiting.push_back((Arc::clone(parked), bytes));
            return false;
        }
        state.used = state.used.saturating_add(bytes);
        drop(state);
        parked.admit(Pass { store: Weak::clone(&inner.weak), bytes });
        true
    }

    /// Forgets who waits.
    pub(super) fn clear(&self) {
        let waiting = std::mem::take(&mut lock(&self.state).waiting);
        drop(waiting);
    }

    fn leave(&self, inner: &Inner, bytes: u64) {
        let mut state = lock(&self.state);
        state.used = state.used.saturating_sub(bytes);
        let mut gone = Vec::new();
        let mut next = Vec::new();
        while let Some((parked, bytes)) = state.waiting.pop_front() {
            if !parked.is_live() {
                gone.push(parked);
            } else if fits(&state, bytes) {
                state.used = state.used.saturating_add(bytes);
                next.push((parked, bytes));
            } else {
                state.waiting.push_front((parked, bytes));
                break;
            }
        }
        drop(state);
        drop(gone);
        for (parked, bytes) in next {
            parked.admit(Pass { store: Weak::clone(&inner.weak), bytes });
            resolve::queue(inner, parked);
        }
    }
}

/// One that is larger than all the room goes alone.
fn fits(state: &State, bytes: u64) -> bool {
    state.used == 0 || state.used.saturating_add(bytes) <= HELD_BYTES
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            store.gate.leave(&store, self.bytes);
        }
    }
}
