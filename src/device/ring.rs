//! The life of one ring: what may touch guest memory for it, and when.
//!
//! Everything happens under one lock per ring, held only to look at the ring and to publish, never over a copy. Whoever
//! copies holds a *pass*: the right to touch guest memory for this ring until it is given back. A *fence* closes
//! the door for passes and waits for those that are out, never for a parked request, so it is short in every state.
//!
//! A request belongs to the *epoch* in which it was popped. Raising the epoch drops every parked request of the ring:
//! its completion finds another epoch and does nothing.
//!
//! Lock order: [`Shared::fences`], then a ring's state. No pass is held by whoever takes `fences`.

use std::fs::File;
use std::io::Write;
use std::time::Instant;

use arc_swap::ArcSwap;

use super::slot::Held;
use super::split::Events;
use super::split::Layout;
use super::state::Broken;
use super::state::Dry;
use super::state::Phase;
use super::state::State;
use super::state::Take;
use super::state::Told;
use super::state::Used;
use crate::limits::FENCE_WARN;
use crate::limits::GUEST_LOG_INTERVAL;
use crate::metrics::Metrics;
use crate::metrics::QueueCounters;
use crate::sys::guest::GuestMap;
use crate::sys::guest::Unreachable;
use crate::sys::sync::Arc;
use crate::sys::sync::AtomicBool;
use crate::sys::sync::Condvar;
use crate::sys::sync::Mutex;
use crate::sys::sync::MutexGuard;
use crate::sys::sync::Ordering;
use crate::sys::sync::PoisonError;

/// What all rings of one connection share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Guest memory as the VMM last told it.
    pub(super) map: ArcSwap<GuestMap>,
    /// The connection ends: workers return.
    pub(super) closing: AtomicBool,
    /// One fence at a time.
    fences: Mutex<()>,
    metrics: Arc<Metrics>,
}

impl Shared {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            map: ArcSwap::from_pointee(GuestMap::default()),
            closing: AtomicBool::new(false),
            fences: Mutex::new(()),
            metrics,
        }
    }
}

/// The right to touch guest memory for a ring; given back to [`Ring`] by [`Pass::end`] or by dropping it.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    ring: &'a Ring,
    side: usize,
    /// Guest memory, as it is for the time of this pass.
    pub(super) map: Arc<GuestMap>,
    pub(super) epoch: u64,
}

/// What a completion gets to hear.
pub(super) enum Admitted<'a> {
    /// Copy, then publish.
    Pass(Pass<'a>),
    /// It was kept for later.
    Kept,
    /// Its ring does not know it any more.
    Refused,
}

/// Whether the worker of a ring has to look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Wake {
    Worker,
    Nobody,
}

/// What [`Ring::outlook`] sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outlook {
    /// Something to begin with.
    Work,
    /// Nothing yet.
    Nothing,
    /// The ring is not worked on any more.
    Over,
}

/// How a batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Look for more.
    Batch,
    /// Give back the pass: something has to be done without it.
    Pause,
    /// The ring cannot be trusted.
    Broken(Broken),
}

/// A ring of the device.
#[derive(Debug)]
pub(super) struct Ring {
    index: usize,
    shared: Arc<Shared>,
    state: Mutex<State>,
    drained: Condvar,
}

impl Ring {
    pub(super) fn new(index: usize, shared: Arc<Shared>) -> Self {
        Self { index, shared, state: Mutex::new(State::default()), drained: Condvar::new() }
    }

    /// The counters of this ring, if the metrics were made for as many rings.
    #[inline]
    pub(super) fn counters(&self) -> Option<&QueueCounters> {
        self.shared.metrics.queues.get(self.index)
    }

    #[inline]
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under this lock leaves the state half changed when it panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is known about the ring, and starts it if that was what it waited for.
    fn tell(&self, change: impl FnOnce(&mut State)) -> Wake {
        let mut state = self.lock();
        change(&mut state);
        if let Some(broken) = state.try_start() {
            self.give_up(&mut state, broken);
        }
        let wake = if state.is_live() { Wake::Worker } else { Wake::Nobody };
        let waste = std::mem::take(&mut state.waste);
        drop(state);
        drop(waste);
        wake
    }

    /// SET_VRING_NUM.
    pub(super) fn set_size(&self, size: u16) -> Wake {
        self.tell(|state| {
            state.detach_disabled();
            state.layout.size = size;
            state.told.size = true;
        })
    }

    /// First half of SET_VRING_ADDR: guest addresses of the three areas.
    pub(super) fn set_addresses(&self, descriptors: u64, avail: u64, used: u64) {
        let mut state = self.lock();
        state.detach_disabled();
        state.layout = Layout { descriptors, avail, used, ..state.layout };
    }

    /// The used index in guest memory, read by SET_VRING_ADDR.
    pub(super) fn used_index(&self) -> Result<u16, Unreachable> {
        let layout = self.lock().layout;
        layout.used_index(&self.shared.map.load())
    }

    /// Second half of SET_VRING_ADDR. A running ring knows its index better: QEMU repeats the addresses then.
    pub(super) fn set_next_used(&self, index: u16) -> Wake {
        self.tell(|state| {
            if state.phase != Phase::Running {
                state.next_used = index;
            }
            state.told.addresses = true;
        })
    }

    /// SET_VRING_BASE.
    pub(super) fn set_next_avail(&self, base: u16) -> Wake {
        self.tell(|state| {
            state.detach_disabled();
            state.next_avail = base;
            state.told.base = true;
        })
    }

    /// Where the ring goes on, for GET_VRING_BASE.
    pub(super) fn next_avail(&self) -> u16 {
        self.lock().next_avail
    }

    /// Whether EVENT_IDX was negotiated.
    pub(super) fn set_events(&self, events: Events) {
        let mut state = self.lock();
        state.events = events;
        state.signalled = None;
    }

    /// The kick descriptor arrived: the ring starts as soon as all else is known.
    pub(super) fn make_ready(&self) -> Wake {
        self.tell(|state| state.ready = true)
    }

    /// GET_VRING_BASE: fences; parked requests are detached.
    pub(super) fn stop(&self) {
        let _one = self.serial();
        let mut state = self.lock();
        state.ready = false;
        state.told = Told::default();
        match state.phase {
            Phase::Running => state.phase = Phase::Detached(None),
            Phase::Broken => state.forget_parked(Phase::Stopped),
            Phase::Stopped | Phase::Detached(_) => {}
        }
        state = self.drain(state);
        if state.phase == Phase::Detached(None) {
            state.phase = Phase::Detached(Some(state.record()));
        }
        state.call = None;
        let waste = std::mem::take(&mut state.waste);
        drop(state);
        drop(waste);
    }

    /// SET_VRING_ENABLE 1, or features without PROTOCOL_FEATURES.
    pub(super) fn enable(&self) -> Wake {
        self.tell(|state| state.enabled = true)
    }

    /// SET_VRING_ENABLE 0: fences; completions are held from now on.
    pub(super) fn disable(&self) {
        let _one = self.serial();
        let mut state = self.lock();
        state.enabled = false;
        drop(self.drain(state));
    }

    /// RESET_DEVICE: fences, drops parked requests, forgets how the ring was set up.
    pub(super) fn reset(&self) {
        let _one = self.serial();
        let mut state = self.lock();
        state.ready = false;
        state.enabled = false;
        state.told = Told::default();
        state.forget_parked(Phase::Stopped);
        state = self.drain(state);
        let waste = std::mem::take(&mut state.waste);
        drop(state);
        drop(waste);
    }

    /// The end of the connection: [`Self::reset`], and the descriptors are closed.
    pub(super) fn disconnect(&self) {
        self.reset();
        let mut state = self.lock();
        state.call = None;
        state.err = None;
    }

    /// Memory changed: waits for copies that may use the old map.
    pub(super) fn fence(&self) {
        let _one = self.serial();
        drop(self.drain(self.lock()));
    }

    /// A new FUSE session: fences, drops parked requests; the ring goes on.
    pub(super) fn begin_session(&self) {
        let _one = self.serial();
        let mut state = self.lock();
        let phase = match state.phase {
            Phase::Detached(_) => Phase::Stopped,
            other => other,
        };
        state.forget_parked(phase);
        state = self.drain(state);
        let waste = std::mem::take(&mut state.waste);
        drop(state);
        drop(waste);
    }

    /// SET_VRING_CALL. A completion may have had nobody to call: QEMU sends this after ENABLE. So the guest is
    /// interrupted once, at once.
    pub(super) fn set_call(&self, call: Option<File>) {
        let call = call.map(Arc::new);
        self.lock().call.clone_from(&call);
        if let Some(call) = call {
            self.signal(&call);
        }
    }

    /// SET_VRING_ERR.
    pub(super) fn set_err(&self, err: Option<File>) {
        self.lock().err = err;
    }

    /// Whether kicks are to be listened to.
    pub(super) fn is_enabled(&self) -> bool {
        self.lock().enabled
    }

    /// Requests that were popped and not completed; `None` for a ring that cannot be trusted.
    #[cfg(feature = "testing")]
    pub(super) fn in_flight(&self) -> Option<u32> {
        let state = self.lock();
        (state.phase != Phase::Broken).then_some(state.in_flight)
    }

    /// Whether the ring can be worked on.
    pub(super) fn is_live(&self) -> bool {
        self.lock().is_live()
    }

    /// Takes a pass and what the ring offers. `None`: there is nothing to do, or nothing may be done.
    pub(super) fn begin(&self, take: &mut Take) -> Option<Pass<'_>> {
        let mut state = self.lock();
        if !state.is_live() || self.shared.closing.load(Ordering::Relaxed) {
            return None;
        }
        let pass = self.pass(&mut state);
        self.look(state, pass, take, Dry::Sleep)
    }

    /// What a worker that stays awake sees: a short look at the driver's index.
    pub(super) fn outlook(&self) -> Outlook {
        let state = self.lock();
        if !state.is_live() || self.shared.closing.load(Ordering::Relaxed) {
            return Outlook::Over;
        }
        // No pass: a fence takes the lock behind us, so it cannot be through while we look.
        if state.has_work(&self.shared.map.load()) { Outlook::Work } else { Outlook::Nothing }
    }

    /// Shows the driver what a batch completed so far. It is interrupted for that at the end of the batch only, if it wants
    /// to be.
    pub(super) fn show(&self, pass: &Pass<'_>, used: &[Used], take: &mut Take) {
        let mut state = self.lock();
        state.settle(pass.epoch, take, used);
        // A ring that cannot be written to shows at the end of the batch.
        let _ = state.add_used(&pass.map, used);
    }

    /// Publishes the rest of what a batch completed, and goes on with what the ring offers now; `None` when there is
    /// nothing, or the batch ended otherwise. One lock, at most one interrupt.
    pub(super) fn turn<'a>(
        &'a self,
        mut pass: Pass<'a>,
        used: &[Used],
        ended: Ended,
        take: &mut Take,
        dry: Dry,
    ) -> Option<Pass<'a>> {
        let mut state = self.lock();
        state.settle(pass.epoch, take, used);
        state.return_rest(pass.epoch, take);
        let signal = state.publish(&pass.map, used);
        if let Ended::Broken(broken) = ended {
            self.give_up(&mut state, broken);
        }
        // Passes are given back and taken anew, so that a fence can come in between.
        self.give_back(&mut state, &mut pass);
        let go_on = ended == Ended::Batch && state.is_live() && !self.shared.closing.load(Ordering::Relaxed);
        let next = if go_on {
            let pass = self.pass(&mut state);
            self.look(state, pass, take, dry)
        } else {
            let waste = std::mem::take(&mut state.waste);
            drop(state);
            drop(waste);
            None
        };
        if let Some(call) = signal {
            self.signal(&call);
        }
        next
    }

    /// Looks at the ring with `pass` and fills `take`; gives the pass back when there is nothing.
    fn look<'a>(
        &self,
        mut state: MutexGuard<'_, State>,
        mut pass: Pass<'a>,
        take: &mut Take,
        dry: Dry,
    ) -> Option<Pass<'a>> {
        take.clear();
        take.layout = state.layout;
        let looked = match state.layout.open(&pass.map) {
            Some(split) if split.is_lost() => Err(Broken::Lost),
            Some(split) => {
                state.take_held(&mut take.held);
                state.take_heads(&split, take, dry)
            }
            // The VMM took the region away; the next memory table wakes us.
            None => Ok(()),
        };
        if let Err(broken) = looked {
            self.give_up(&mut state, broken);
        }
        let found = looked.is_ok() && (take.count > 0 || !take.held.is_empty());
        if !found {
            self.give_back(&mut state, &mut pass);
        }
        let mut waste = std::mem::take(&mut state.waste);
        drop(state);
        if !found {
            waste.append(&mut take.held);
        }
        drop(waste);
        found.then_some(pass)
    }

    /// Asks whether a request of `epoch` may be completed now, from any thread. `keep` makes what is kept if it has to
    /// wait.
    pub(super) fn admit(&self, epoch: u64, keep: impl FnOnce() -> Held) -> Admitted<'_> {
        let mut state = self.lock();
        if state.epoch != epoch {
            return Admitted::Refused;
        }
        match state.phase {
            Phase::Running if state.enabled => {
                let mut pass = self.pass(&mut state);
                if state.layout.open(&pass.map).is_some() {
                    return Admitted::Pass(pass);
                }
                // The VMM took the ring's region away for a while; the next memory table wakes the worker.
                self.give_back(&mut state, &mut pass);
            }
            Phase::Running | Phase::Detached(_) => {}
            Phase::Stopped | Phase::Broken => return Admitted::Refused,
        }
        state.held.push(keep());
        Admitted::Kept
    }

    /// Gives the pass back without having completed anything.
    fn release(&self, pass: &mut Pass<'_>) {
        let mut state = self.lock();
        self.give_back(&mut state, pass);
    }

    /// The ring says things that cannot be: nothing is read from or written to it until it is set up anew. One log line
    /// now and then, since a guest can do this as often as it likes.
    fn give_up(&self, state: &mut State, broken: Broken) {
        state.forget_parked(Phase::Broken);
        if let Some(mut err) = state.err.as_ref() {
            // A full counter says the same.
            let _ = err.write(&1u64.to_ne_bytes());
        }
        if let Some(counters) = self.counters() {
            counters.broken.add(1);
        }
        if state.last_log.is_none_or(|last| last.elapsed() >= GUEST_LOG_INTERVAL) {
            state.last_log = Some(Instant::now());
            tracing::warn!(queue = self.index, reason = %broken, "the guest broke a ring; this queue stops");
        }
    }

    #[inline]
    fn pass(&self, state: &mut State) -> Pass<'_> {
        Pass { ring: self, side: state.enter(), map: self.shared.map.load_full(), epoch: state.epoch }
    }

    #[inline]
    fn give_back(&self, state: &mut State, pass: &mut Pass<'_>) {
        if pass.side == GIVEN_BACK {
            return;
        }
        state.leave(pass.side);
        pass.side = GIVEN_BACK;
        if state.fence_waits {
            self.drained.notify_all();
        }
    }

    fn signal(&self, mut call: &File) {
        // A full counter says the same.
        let _ = call.write(&1u64.to_ne_bytes());
        if let Some(counters) = self.counters() {
            counters.calls.add(1);
        }
    }

    fn serial(&self) -> MutexGuard<'_, ()> {
        self.shared.fences.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the passes that are out. The caller holds `fences` and has closed the door it wants closed.
    fn drain<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let side = state.turn_side();
        let began = Instant::now();
        let mut said = false;
        while state.is_occupied(side) {
            state.fence_waits = true;
            let waited = self.drained.wait_timeout(state, FENCE_WARN).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
            if waited.1.timed_out() && !said {
                said = true;
                tracing::warn!(queue = self.index, waited = ?began.elapsed(), "a fence waits for copies under way");
            }
        }
        state.fence_waits = false;
        state
    }
}

/// The side of a [`Pass`] that was given back.
const GIVEN_BACK: usize = usize::MAX;

impl Pass<'_> {
    /// Publishes one completed request and gives the pass back.
    pub(super) fn end(mut self, used: Used) {
        let ring = self.ring;
        let mut state = ring.lock();
        state.settle_late(self.epoch);
        let signal = state.publish(&self.map, &[used]);
        ring.give_back(&mut state, &mut self);
        drop(state);
        if let Some(call) = signal {
            ring.signal(&call);
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.side != GIVEN_BACK {
            self.ring.release(self);
        }
    }
}
