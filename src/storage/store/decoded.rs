//! Chunks that were decoded a moment ago, for blobs whose data file cannot be mapped for readers: there is none
//! (`dummycache`), or it holds chunks in another form (`compressed`, encryption), or another image's.
//!
//! Bounded in bytes (`limits::DECODED_BYTES`), the one that was used longest ago goes first; and in time: what nobody
//! used for a while goes too, so that an image at rest keeps nothing here.

use std::collections::BTreeMap;
use std::collections::HashMap;

use super::Inner;
use super::ready::ReadyRead;
use crate::limits::DECODED_BYTES;
use crate::limits::DECODED_REST;
use crate::rafs::facts::Piece;
use crate::storage::sync::Arc;
use crate::storage::sync::AtomicBool;
use crate::storage::sync::Mutex;
use crate::storage::sync::Ordering;
use crate::storage::sync::lock;

/// Index of a blob, and of a chunk in it.
type Key = (u32, u32);

/// A verified chunk in memory.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    /// Offset in the uncompressed blob.
    pub(super) offset: u64,
    /// All of it.
    pub(super) plain: Arc<Vec<u8>>,
}

struct Entry {
    chunk: Chunk,
    /// Key in the order of use.
    used: u64,
}

#[derive(Default)]
struct State {
    chunks: HashMap<Key, Entry>,
    order: BTreeMap<u64, Key>,
    clock: u64,
    /// What `clock` was at the last round of tidying.
    rested_at: u64,
    bytes: usize,
}

/// The decoded chunks of a store.
#[derive(Default)]
pub(super) struct Decoded {
    /// Whether there may be any: looked at without the lock.
    is_used: AtomicBool,
    state: Mutex<State>,
}

impl Decoded {
    /// The chunk, if it is here; it is then the one that was used last.
    pub(super) fn get(&self, blob: u32, chunk: u32) -> Option<Chunk> {
        if !self.is_used() {
            return None;
        }
        let mut state = lock(&self.state);
        let State { chunks, order, clock, .. } = &mut *state;
        let entry = chunks.get_mut(&(blob, chunk))?;
        *clock = clock.wrapping_add(1);
        order.remove(&entry.used);
        entry.used = *clock;
        order.insert(*clock, (blob, chunk));
        Some(entry.chunk.clone())
    }

    /// Takes a chunk in.
    pub(super) fn put(&self, inner: &Inner, blob: u32, chunk: u32, content: &Chunk) {
        let mut gone = Vec::new();
        {
            let mut state = lock(&self.state);
            gone.extend(state.remove((blob, chunk)));
            state.clock = state.clock.wrapping_add(1);
            let used = state.clock;
            state.bytes = state.bytes.saturating_add(content.plain.len());
            state.order.insert(used, (blob, chunk));
            state.chunks.insert((blob, chunk), Entry { chunk: content.clone(), used });
            while state.bytes > DECODED_BYTES
                && let Some((_, key)) = state.order.first_key_value()
            {
                let key = *key;
                gone.extend(state.remove(key));
            }
        }
        // Outside the lock: freeing takes a while.
        drop(gone);
        if !self.is_used.swap(true, Ordering::AcqRel) {
            tidy_later(inner);
        }
    }

    fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Acquire)
    }

    /// Drops what was not used since the last call; whether anything is left.
    fn tidy(&self) -> bool {
        let (gone, is_left) = {
            let mut state = lock(&self.state);
            let since = state.rested_at;
            let old: Vec<Key> = state.order.range(..=since).map(|(_, key)| *key).collect();
            let gone: Vec<_> = old.into_iter().filter_map(|key| state.remove(key)).collect();
            state.rested_at = state.clock;
            (gone, !state.chunks.is_empty())
        };
        drop(gone);
        is_left
    }
}

impl State {
    fn remove(&mut self, key: Key) -> Option<Chunk> {
        let Entry { chunk, used } = self.chunks.remove(&key)?;
        self.order.remove(&used);
        self.bytes = self.bytes.saturating_sub(chunk.plain.len());
        Some(chunk)
    }
}

fn tidy_later(inner: &Inner) {
    let weak = inner.weak.clone();
    inner.pool.after(DECODED_REST, move || {
        let Some(inner) = weak.upgrade() else { return };
        if inner.decoded.tidy() {
            return tidy_later(&inner);
        }
        inner.decoded.is_used.store(false, Ordering::Release);
        // Somebody may have put one in between.
        if inner.decoded.tidy() && !inner.decoded.is_used.swap(true, Ordering::AcqRel) {
            tidy_later(&inner);
        }
    });
}

impl Inner {
    /// The read, if every chunk is here, or ready in a mapped file. Never waits for more than the lock.
    pub(super) fn ready_decoded(&self, pieces: &[Piece]) -> Option<ReadyRead> {
        if !self.decoded.is_used() {
            return None;
        }
        let mut ready = ReadyRead::new();
        for piece in pieces {
            match self.decoded.get(piece.blob, piece.chunk) {
                Some(chunk) => ready.push_chunk(&chunk, piece)?,
                None => {
                    let files = self.blobs.get(piece.blob as usize)?.files()?;
                    if files.view.is_lost() || !super::holds(&files, piece) {
                        return None;
                    }
                    ready.push_cached(piece, files);
                }
            }
        }
        Some(ready)
    }
}
