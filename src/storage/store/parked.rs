//! A read that waits for chunks: data, not a thread.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use smallvec::SmallVec;

use super::Inner;
use super::decoded::Chunk;
use super::error::ReadError;
use super::gate::Pass;
use super::ready::ReadyRead;
use super::resolve;
use crate::limits::READ_ATTEMPTS;
use crate::rafs::facts::Piece;
use crate::storage::sync::Arc;
use crate::storage::sync::AtomicU64;
use crate::storage::sync::Mutex;
use crate::storage::sync::Ordering;
use crate::storage::sync::Weak;
use crate::storage::sync::lock;

/// Called once with the outcome of a read.
pub(super) type Done = Box<dyn FnOnce(Result<ReadyRead, ReadError>) + Send>;

/// What became of a chunk.
#[derive(Clone)]
pub(super) enum Outcome {
    /// It is in the data file.
    Ready,
    /// It is verified, and in memory only.
    Memory(Chunk),
    /// It cannot be had.
    Failed(ReadError),
}

/// A chunk that lives in memory only.
pub(super) struct Loose {
    blob: u32,
    chunk: u32,
    content: Chunk,
}

struct State {
    /// Taken when the read is answered.
    done: Option<Done>,
    loose: Vec<Loose>,
    /// Room for what is in `loose`, where that needs any.
    pass: Option<Pass>,
    error: Option<ReadError>,
    /// How often it began.
    attempts: u32,
}

/// A parked read. It is answered when everything it expects has arrived, or at once by [`Parked::fail`].
pub(super) struct Parked {
    /// Key in the store's register.
    pub(super) id: u64,
    /// What is read.
    pub(super) pieces: SmallVec<[Piece; 8]>,
    /// When it is answered with an error.
    pub(super) deadline: Option<Instant>,
    store: Weak<Inner>,
    expected: AtomicU64,
    state: Mutex<State>,
}

impl Parked {
    /// A read that expects one arrival: that of its resolution.
    pub(super) fn new(
        id: u64,
        pieces: SmallVec<[Piece; 8]>,
        deadline: Option<Instant>,
        store: Weak<Inner>,
        done: Done,
    ) -> Self {
        let state = Mutex::new(State { done: Some(done), loose: Vec::new(), pass: None, error: None, attempts: 1 });
        Self { id, pieces, deadline, store, expected: AtomicU64::new(1), state }
    }

    /// Whether somebody still waits for the answer.
    pub(super) fn is_live(&self) -> bool {
        lock(&self.state).done.is_some()
    }

    /// Whether it has room for its chunks.
    pub(super) fn is_admitted(&self) -> bool {
        lock(&self.state).pass.is_some()
    }

    /// Gives it room for its chunks, until it is answered.
    pub(super) fn admit(&self, pass: Pass) {
        let unused = {
            let mut state = lock(&self.state);
            match state.done {
                Some(_) => state.pass.replace(pass),
                // Answered meanwhile: nobody would give it back.
                None => Some(pass),
            }
        };
        drop(unused);
    }

    /// One more arrival is expected; called while at least one is.
    pub(super) fn expect_one(&self) {
        // Relaxed: the caller holds an expectation itself, so the count cannot reach 0 meanwhile.
        self.expected.fetch_add(1, Ordering::Relaxed);
    }

    /// A chunk arrived. The last arrival answers the read, on this thread.
    pub(super) fn arrive(self: &Arc<Self>, blob: u32, chunk: u32, outcome: &Outcome) {
        match outcome {
            Outcome::Ready => {}
            Outcome::Memory(content) => {
                let mut state = lock(&self.state);
                if state.done.is_some() {
                    state.loose.push(Loose { blob, chunk, content: content.clone() });
                }
            }
            Outcome::Failed(error) => self.note(error),
        }
        self.resolved();
    }

    /// The read will fail with `error`, or begin anew if that helps, when all it expects has arrived.
    pub(super) fn note(&self, error: &ReadError) {
        let mut state = lock(&self.state);
        // What does not pass counts.
        if state.error.as_ref().is_none_or(ReadError::is_passing) {
            state.error = Some(error.clone());
        }
    }

    /// One expected arrival less.
    pub(super) fn resolved(self: &Arc<Self>) {
        // AcqRel: the last one sees what all others noted.
        if self.expected.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.answer();
        }
    }

    /// Answers with `error`, if there was no answer yet. What arrives later is of no interest.
    pub(super) fn fail(&self, error: ReadError) {
        let (done, loose) = {
            let mut state = lock(&self.state);
            (state.done.take(), std::mem::take(&mut state.loose))
        };
        drop(loose);
        self.complete(done, Err(error));
    }

    fn answer(self: &Arc<Self>) {
        let (loose, error) = {
            let mut state = lock(&self.state);
            (std::mem::take(&mut state.loose), state.error.take())
        };
        let store = self.store.upgrade();
        let result = match (error, &store) {
            (Some(error), _) => Err(error),
            (None, None) => Err(ReadError::Shutdown),
            (None, Some(store)) => self.assemble(store, &loose),
        };
        if let (Err(error), Some(store)) = (&result, &store)
            && error.is_passing()
            && self.begins_anew()
        {
            tracing::debug!(%error, "read begins anew");
            return resolve::queue(store, Arc::clone(self));
        }
        let done = lock(&self.state).done.take();
        self.complete(done, result);
    }

    /// Whether it may; it then expects one arrival, that of its resolution, as in the beginning.
    fn begins_anew(&self) -> bool {
        let mut state = lock(&self.state);
        let may = state.done.is_some() && state.attempts < READ_ATTEMPTS;
        if may {
            state.attempts = state.attempts.saturating_add(1);
            // Relaxed: everything expected has arrived, so nobody else counts.
            self.expected.store(1, Ordering::Relaxed);
        }
        may
    }

    fn complete(&self, done: Option<Done>, result: Result<ReadyRead, ReadError>) {
        let Some(done) = done else { return };
        // Given back when the bytes were copied.
        let _pass = lock(&self.state).pass.take();
        if let Some(store) = self.store.upgrade() {
            store.forget(self.id);
        }
        // A reader that panics ends alone: others may wait for the same chunk.
        if std::panic::catch_unwind(AssertUnwindSafe(|| done(result))).is_err() {
            tracing::error!("the completion of a read panicked");
        }
    }

    fn assemble(&self, store: &Inner, loose: &[Loose]) -> Result<ReadyRead, ReadError> {
        let mut ready = ReadyRead::new();
        for piece in &self.pieces {
            let lost = || ReadError::Lost(piece.blob);
            let in_memory = loose.iter().find(|loose| (loose.blob, loose.chunk) == (piece.blob, piece.chunk));
            if let Some(loose) = in_memory {
                ready.push_chunk(&loose.content, piece).ok_or_else(lost)?;
                continue;
            }
            let blob = store.blobs.get(piece.blob as usize).ok_or_else(lost)?;
            let files = blob.files().ok_or_else(lost)?;
            let extent = files.extents.get(piece.chunk).ok_or_else(lost)?;
            if files.view.is_lost() || !extent.holds(piece.offset, piece.len) {
                return Err(lost());
            }
            // The files may have been opened anew since the last piece, and then another file is meant.
            let same_files = ready.files_before(piece).is_some_and(|last| std::ptr::eq(last, &**files));
            match same_files {
                true => ready.extend(piece),
                false => ready.push_cached(piece, files),
            }
        }
        Ok(ready)
    }
}
