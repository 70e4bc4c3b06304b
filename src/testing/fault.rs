//! Backends that misbehave on command: late, never, out of order, short, wrong, failing.
//!
//! [`FaultBackend`] wraps another backend and is controlled while it runs. It adds no threads: what it holds back is
//! kept as data, delays are timers of the pool. [`MemoryBackend`] has its blobs in memory and answers at once.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use crate::storage::backend::Answer;
use crate::storage::backend::Backend;
use crate::storage::backend::BackendError;
use crate::storage::backend::Request;
use crate::storage::backend::Ticket;
use crate::storage::pool::Pool;
use crate::storage::sync::Arc;
use crate::storage::sync::Mutex;
use crate::storage::sync::lock;

/// Blobs in memory.
#[derive(Debug, Default)]
pub struct MemoryBackend {
    blobs: Mutex<HashMap<String, Arc<Vec<u8>>>>,
}

impl MemoryBackend {
    /// Puts, or replaces, a blob.
    pub fn put(&self, id: &str, bytes: Vec<u8>) {
        lock(&self.blobs).insert(id.to_owned(), Arc::new(bytes));
    }

    /// What blob `id` holds; nothing where there is none.
    pub fn get(&self, id: &str) -> Vec<u8> {
        lock(&self.blobs).get(id).map(|bytes| bytes.to_vec()).unwrap_or_default()
    }
}

impl Backend for MemoryBackend {
    fn read(&self, request: Request, answer: Answer) -> Ticket {
        let blob = lock(&self.blobs).get(&*request.blob).cloned();
        let result = match blob {
            None => Err(BackendError::NotFound { blob: request.blob, place: "memory".into() }),
            Some(blob) => {
                let range = request.range.start as usize..request.range.end as usize;
                let lasting = || BackendError::Lasting(format!("{range:?} is outside the blob"));
                blob.get(range.clone()).map(<[u8]>::to_vec).ok_or_else(lasting)
            }
        };
        answer.complete(result);
        Ticket::none()
    }
}

/// What happens to a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// It is passed on.
    None,
    /// It is kept until [`FaultBackend::release`], or for ever.
    Hang,
    /// It is passed on after this time.
    Delay(Duration),
    /// The answer lacks this many bytes at its end.
    Short(usize),
    /// Every byte of the answer is inverted.
    Wrong,
    /// It fails.
    Fail(BackendError),
}

/// In which order kept requests go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As they came.
    FirstFirst,
    /// The other way round.
    LastFirst,
}

/// A backend that misbehaves on command.
#[derive(Debug)]
pub struct FaultBackend {
    below: Arc<dyn Backend>,
    pool: Arc<Pool>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    next: VecDeque<Fault>,
    then: Fault,
    kept: Vec<(Request, Answer)>,
    log: Vec<(Arc<str>, Range<u64>)>,
}

impl FaultBackend {
    /// Wraps `below`; passes everything on at first.
    pub fn new(below: Arc<dyn Backend>, pool: Arc<Pool>) -> Arc<Self> {
        let state = State { next: VecDeque::new(), then: Fault::None, kept: Vec::new(), log: Vec::new() };
        Arc::new(Self { below, pool, state: Mutex::new(state) })
    }

    /// From now on every request meets `fault`; faults queued by [`FaultBackend::once`] come first.
    pub fn set(&self, fault: Fault) {
        lock(&self.state).then = fault;
    }

    /// The next request (after those already queued) meets `fault`.
    pub fn once(&self, fault: Fault) {
        lock(&self.state).next.push_back(fault);
    }

    /// Requests so far, in order: blob and range.
    pub fn log(&self) -> Vec<(Arc<str>, Range<u64>)> {
        lock(&self.state).log.clone()
    }

    /// Number of requests so far.
    pub fn requests(&self) -> usize {
        lock(&self.state).log.len()
    }

    /// Number of requests that are kept.
    pub fn kept(&self) -> usize {
        lock(&self.state).kept.len()
    }

    /// Passes on what is kept, and returns how many requests that were. Later ones meet the fault that is set.
    pub fn release(&self, order: Order) -> usize {
        let mut kept = std::mem::take(&mut lock(&self.state).kept);
        if order == Order::LastFirst {
            kept.reverse();
        }
        let count = kept.len();
        for (request, answer) in kept {
            self.below.read(request, answer);
        }
        count
    }

    /// Fails what is kept, and returns how many requests that were.
    pub fn fail_kept(&self, error: &BackendError) -> usize {
        let kept = std::mem::take(&mut lock(&self.state).kept);
        let count = kept.len();
        kept.into_iter().for_each(|(_, answer)| answer.complete(Err(error.clone())));
        count
    }
}

impl Backend for FaultBackend {
    fn read(&self, request: Request, answer: Answer) -> Ticket {
        let fault = {
            let mut state = lock(&self.state);
            state.log.push((Arc::clone(&request.blob), request.range.clone()));
            let fault = state.next.pop_front().unwrap_or_else(|| state.then.clone());
            if matches!(fault, Fault::Hang) {
                // Under the lock that decided it: whoever releases at this moment must not miss it.
                state.kept.push((request, answer));
                return Ticket::none();
            }
            fault
        };
        match fault {
            Fault::None | Fault::Hang => return self.below.read(request, answer),
            Fault::Delay(delay) => {
                let below = Arc::clone(&self.below);
                self.pool.after(delay, move || drop(below.read(request, answer)));
            }
            Fault::Short(missing) => {
                let cut = move |mut bytes: Vec<u8>| {
                    bytes.truncate(bytes.len().saturating_sub(missing));
                    bytes
                };
                return self.below.read(request, Answer::new(move |result| answer.complete(result.map(cut))));
            }
            Fault::Wrong => {
                let invert = |bytes: Vec<u8>| bytes.into_iter().map(|byte| !byte).collect();
                return self.below.read(request, Answer::new(move |result| answer.complete(result.map(invert))));
            }
            Fault::Fail(error) => answer.complete(Err(error)),
        }
        Ticket::none()
    }
}
