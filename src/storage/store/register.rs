//! Everything of a store that waits: parked reads, questions a backend has, and pauses.
//!
//! What lies here can be taken away from whoever was to wake it, by a deadline or by the end of the store.

use std::collections::HashMap;
use std::time::Duration;
use std::time::Instant;

use super::Inner;
use super::fetch;
use super::fetch::Entry;
use super::fetch::Held;
use super::parked::Parked;
use crate::storage::backend::Ticket;
use crate::storage::sync::Arc;
use crate::storage::sync::AtomicBool;
use crate::storage::sync::AtomicU64;
use crate::storage::sync::Mutex;
use crate::storage::sync::Ordering;
use crate::storage::sync::Weak;
use crate::storage::sync::lock;

/// What waits.
#[derive(Default)]
pub(super) struct Register {
    serial: AtomicU64,
    parked: Mutex<HashMap<u64, Arc<Parked>>>,
    held: Mutex<HashMap<u64, Entry>>,
    /// Whether a timer looks at deadlines.
    pub(super) is_watched: AtomicBool,
}

impl Register {
    /// A number that was not given before.
    pub(super) fn next_id(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Notes a parked read.
    pub(super) fn park(&self, parked: &Arc<Parked>) {
        lock(&self.parked).insert(parked.id, Arc::clone(parked));
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.parked).is_empty() && lock(&self.held).is_empty()
    }

    /// The parked reads whose deadline has passed.
    pub(super) fn expired(&self, now: Instant) -> Vec<Arc<Parked>> {
        let parked = lock(&self.parked);
        parked.values().filter(|parked| parked.deadline.is_some_and(|at| at <= now)).cloned().collect()
    }

    /// Takes the entries whose time is up.
    pub(super) fn take_overdue(&self, now: Instant) -> Vec<Entry> {
        lock(&self.held).extract_if(|_, entry| entry.is_overdue(now)).map(|(_, entry)| entry).collect()
    }

    /// Takes all entries.
    pub(super) fn take_held(&self) -> Vec<Entry> {
        std::mem::take(&mut *lock(&self.held)).into_values().collect()
    }

    /// Takes all parked reads.
    pub(super) fn take_parked(&self) -> Vec<Arc<Parked>> {
        std::mem::take(&mut *lock(&self.parked)).into_values().collect()
    }
}

impl Inner {
    /// Lays something into the register. It comes out again by being taken from the returned place; then
    /// [`Inner::release`] removes the entry.
    pub(super) fn hold(&self, held: Held, deadline: Option<Instant>) -> (u64, Arc<Mutex<Option<Held>>>) {
        let id = self.register.next_id();
        let place = Arc::new(Mutex::new(Some(held)));
        let entry = Entry::new(Arc::clone(&place), deadline);
        lock(&self.register.held).insert(id, entry);
        // After the entry: the end of the store sees the entry, or we see the end.
        if self.is_closing() {
            let entry = lock(&self.register.held).remove(&id);
            drop(entry.and_then(Entry::take_back));
        }
        (id, place)
    }

    /// Adds the way to call the request off, if it is not over yet.
    pub(super) fn attach(&self, id: u64, ticket: Ticket) {
        if let Some(entry) = lock(&self.register.held).get_mut(&id) {
            entry.attach(ticket);
        }
    }

    /// Removes an entry whose content was taken.
    pub(super) fn release(&self, id: u64) {
        let entry = lock(&self.register.held).remove(&id);
        drop(entry);
    }

    /// Removes an answered read.
    pub(super) fn forget(&self, id: u64) {
        let parked = lock(&self.register.parked).remove(&id);
        drop(parked);
    }

    /// Goes on with `held` after `pause`.
    pub(super) fn later(&self, held: Held, pause: Duration) {
        let (id, place) = self.hold(held, None);
        let weak = Weak::clone(&self.weak);
        self.pool.after(pause, move || {
            let Some(held) = lock(&place).take() else { return };
            let Some(inner) = weak.upgrade() else { return };
            inner.release(id);
            match held {
                Held::Work(work) => fetch::submit(&inner, work),
                Held::Foreign(foreign) => foreign.look(&inner),
            }
        });
    }
}
