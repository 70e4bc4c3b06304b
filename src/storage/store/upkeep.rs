//! What a store does by the clock and at its end: deadlines, flushing, looking after its files.

use std::time::Instant;

use super::Inner;
use super::error::ReadError;
use super::fetch;
use super::fetch::Entry;
use super::fetch::Held;
use crate::limits::SWEEP_INTERVAL;
use crate::limits::SYNC_INTERVAL;
use crate::limits::SYNC_PATIENCE;
use crate::storage::backend::BackendError;
use crate::storage::pool::Urgency;
use crate::storage::sync::Arc;
use crate::storage::sync::Ordering;
use crate::storage::sync::Weak;
use crate::storage::sync::mpsc;
use crate::storage::sync::now;

/// Begins the regular flushing; it ends with the store.
pub(super) fn begin(inner: &Arc<Inner>) {
    let weak = Weak::clone(&inner.weak);
    inner.pool.after(SYNC_INTERVAL, move || {
        if let Some(inner) = weak.upgrade().filter(|inner| !inner.is_closing()) {
            inner.flush();
            inner.blobs.iter().for_each(|blob| blob.renew(&inner));
            begin(&inner);
        }
    });
}

/// Sees to it that a timer looks at deadlines while anything waits.
pub(super) fn watch_deadlines(inner: &Inner) {
    if inner.options.demand_deadline.is_none() || inner.register.is_watched.swap(true, Ordering::AcqRel) {
        return;
    }
    let weak = Weak::clone(&inner.weak);
    inner.pool.after(SWEEP_INTERVAL, move || {
        let Some(inner) = weak.upgrade() else { return };
        inner.sweep(now());
        inner.register.is_watched.store(false, Ordering::Release);
        // After the mark is gone: whoever parks from now on starts a new timer.
        if !inner.register.is_empty() {
            watch_deadlines(&inner);
        }
    });
}

impl Inner {
    /// Fails what waited too long, and takes questions back from a backend that had its time.
    fn sweep(self: &Arc<Self>, now: Instant) {
        for parked in self.register.expired(now) {
            self.metrics.storage.deadlines_missed.add(1);
            parked.fail(ReadError::Deadline);
        }
        for held in self.register.take_overdue(now).into_iter().filter_map(Entry::take_back) {
            if let Held::Work(work) = held {
                fetch::answered(self, work, Err(BackendError::TimedOut));
            }
        }
    }

    /// Flushes the caches of all blobs. Blocks on the disk.
    fn flush(&self) {
        for blob in &self.blobs {
            let Some(files) = blob.files() else { continue };
            if let Err(error) = files.sync() {
                self.metrics.storage.cache_write_errors.add(1);
                if blob.cache_warning.passes() {
                    tracing::warn!(blob = %blob.id, %error, "cached data cannot be flushed to the disk");
                }
                drop(files);
                blob.renew(self);
            }
        }
    }

    /// See [`super::Store::shutdown`].
    pub(super) fn shutdown(self: &Arc<Self>) {
        if self.closing.swap(true, Ordering::SeqCst) {
            return;
        }
        // Readers first: their answers must not wait for anything.
        self.register.take_parked().iter().for_each(|parked| parked.fail(ReadError::Shutdown));
        drop(self.register.take_held().into_iter().filter_map(Entry::take_back).collect::<Vec<_>>());
        self.budget.clear();
        self.gate.clear();
        self.shelf.clear();
        let (flushed, is_flushed) = mpsc::channel::<()>();
        let inner = Arc::clone(self);
        self.pool.spawn(Urgency::Demand, move || {
            inner.flush();
            drop(flushed);
        });
        // Nothing is ever sent: the channel closes when the job is done, or dropped.
        let _ = is_flushed.recv_timeout(SYNC_PATIENCE);
    }
}
