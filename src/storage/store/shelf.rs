//! Decoded units whose chunks the cache does not hold: there is none, or it could not be written.
//!
//! Reads of neighbouring chunks then go on where the last one ended, instead of fetching and decoding the unit from its
//! beginning each time. Bounded in bytes (`limits::SHELF_BYTES`) and in time (`limits::SHELF_REST`): an image at rest
//! keeps nothing here. A unit that is in use is not on the shelf.

use std::time::Instant;

use super::Inner;
use super::fetch::Wanted;
use super::landing::Fetched;
use super::landing::Landing;
use super::lot::UnitKey;
use super::lot::lots;
use crate::limits::SHELF_BYTES;
use crate::limits::SHELF_REST;
use crate::storage::codec::unit::Unit;
use crate::storage::sync::Arc;
use crate::storage::sync::Mutex;
use crate::storage::sync::lock;
use crate::storage::sync::now;

/// A blob and a unit of it.
pub(super) type ShelfKey = (u32, UnitKey);

struct Entry {
    key: ShelfKey,
    unit: Unit,
    fetched: Arc<Fetched>,
    bytes: usize,
    since: Instant,
}

/// The shelf of a store: the one that was used last at the end.
#[derive(Default)]
pub(super) struct Shelf {
    entries: Mutex<Vec<Entry>>,
}

impl Shelf {
    /// Lays `unit`, decoded from `fetched`, down. The oldest ones make room.
    pub(super) fn put(&self, inner: &Inner, key: ShelfKey, unit: Unit, fetched: &Arc<Fetched>) {
        let fetched = if unit.is_complete() { Arc::default() } else { Arc::clone(fetched) };
        let bytes = unit.room_bytes().saturating_add(fetched.len());
        let mut gone = Vec::new();
        let was_empty = {
            let mut entries = lock(&self.entries);
            let was_empty = entries.is_empty();
            gone.extend(entries.extract_if(.., |entry| entry.key == key));
            entries.push(Entry { key, unit, fetched, bytes, since: now() });
            let mut all: usize = entries.iter().map(|entry| entry.bytes).sum();
            while all > SHELF_BYTES {
                let oldest = entries.remove(0);
                all = all.saturating_sub(oldest.bytes);
                gone.push(oldest);
            }
            was_empty && !entries.is_empty()
        };
        drop(gone);
        if was_empty {
            tidy_later(inner);
        }
    }

    fn take(&self, key: ShelfKey) -> Option<Entry> {
        let mut entries = lock(&self.entries);
        let at = entries.iter().position(|entry| entry.key == key)?;
        Some(entries.remove(at))
    }

    fn is_empty(&self) -> bool {
        lock(&self.entries).is_empty()
    }

    /// Drops everything.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *lock(&self.entries));
        drop(all);
    }

    /// Drops what was not used for a while; whether anything is left.
    fn tidy(&self) -> bool {
        let now = now();
        let old: Vec<_> = {
            let mut entries = lock(&self.entries);
            entries.extract_if(.., |entry| now.saturating_duration_since(entry.since) >= SHELF_REST).collect()
        };
        drop(old);
        !self.is_empty()
    }
}

fn tidy_later(inner: &Inner) {
    let weak = inner.weak.clone();
    inner.pool.after(SHELF_REST, move || {
        if let Some(inner) = weak.upgrade()
            && inner.shelf.tidy()
        {
            tidy_later(&inner);
        }
    });
}

/// Answers those of `chunks` whose units lie on the shelf, and gives the others back.
pub(super) fn serve(inner: &Arc<Inner>, chunks: Vec<Wanted>) -> Vec<Wanted> {
    if inner.shelf.is_empty() {
        return chunks;
    }
    let mut found: Vec<(Entry, Vec<Wanted>)> = Vec::new();
    let mut others = Vec::new();
    for (claim, facts) in chunks {
        let Some(key) = UnitKey::of(&facts).map(|key| (claim.blob.facts.index, key)) else {
            others.push((claim, facts));
            continue;
        };
        if let Some((_, group)) = found.iter_mut().find(|(entry, _)| entry.key == key) {
            group.push((claim, facts));
        } else if let Some(entry) = inner.shelf.take(key) {
            found.push((entry, vec![(claim, facts)]));
        } else {
            others.push((claim, facts));
        }
    }
    for (entry, group) in found {
        let Some(blob) = group.first().map(|(claim, _)| Arc::clone(&claim.blob)) else { continue };
        let lots = lots(&blob, group);
        Landing::new(blob, entry.fetched, lots).resumed(entry.unit).land(inner);
    }
    others
}
