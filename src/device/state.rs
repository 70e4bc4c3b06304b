//! What is known of one ring, and what that allows: pure state, changed under the lock of [`super::ring::Ring`].
//!
//! Knows neither threads nor descriptors of events; guest memory only through a map that it is given.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use super::chain::BrokenTable;
use super::slot::Held;
use super::split::Events;
use super::split::Layout;
use super::split::SplitRing;
use crate::limits::BATCH_HEADS;
use crate::limits::BATCH_REPLY_BYTES;
use crate::sys::guest::GuestMap;
use crate::sys::guest::Unreachable;

/// Why a ring was given up until it is set up anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("size {size} is no power of two, or an area is not aligned")]
    Illegal { size: u16 },
    #[error("the available index is {ahead} entries ahead of a ring of {size}")]
    TooFarAhead { ahead: u16, size: u16 },
    #[error("more requests than the ring has descriptors: a head was offered twice")]
    TooMany,
    #[error("head {0} is beyond the end of the descriptor table")]
    Head(u16),
    #[error(transparent)]
    Table(#[from] BrokenTable),
    #[error("the memory of the ring faults")]
    Lost,
}

/// Where a ring stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Phase {
    /// Nothing set up, nothing parked.
    #[default]
    Stopped,
    /// Stopped by GET_VRING_BASE; parked requests wait whether it goes on where it was. The record is there once the
    /// fence is through.
    Detached(Option<Record>),
    /// Set up and started; it works while it is enabled too.
    Running,
    /// Given up until it is stopped or reset.
    Broken,
}

/// What a start must match to go on where the ring was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    layout: Layout,
    next_avail: u16,
    next_used: u16,
}

/// What has been told about a ring since its last stop. A ring starts when all of it is there, in whatever order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Told {
    pub(super) size: bool,
    pub(super) addresses: bool,
    pub(super) base: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) layout: Layout,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    pub(super) events: Events,
    pub(super) told: Told,
    pub(super) ready: bool,
    pub(super) enabled: bool,
    pub(super) phase: Phase,
    pub(super) epoch: u64,
    /// Requests of this epoch that were taken and not completed.
    pub(super) in_flight: u32,
    /// Used index at the last decision on an interrupt.
    pub(super) signalled: Option<u16>,
    /// Entries were shown since then.
    undecided: bool,
    kicks_refused: bool,
    /// Completions that came while the ring was disabled or detached.
    pub(super) held: Vec<Held>,
    /// Held completions that will never be published; dropped without the lock.
    pub(super) waste: Vec<Held>,
    pub(super) call: Option<Arc<File>>,
    pub(super) err: Option<File>,
    /// Passes that are out, by the side of the last fence they were taken on.
    passes: [u32; 2],
    side: usize,
    pub(super) fence_waits: bool,
    pub(super) last_log: Option<Instant>,
}

/// A completed request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Used {
    pub(super) head: u16,
    pub(super) len: u32,
}

/// What a worker does when its ring has nothing to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dry {
    /// It sleeps: the driver must kick for what comes next.
    Sleep,
    /// It looks again by itself; the driver need not kick.
    StayAwake,
}

/// What a worker took from a ring.
#[derive(Debug)]
pub(super) struct Take {
    heads: [u16; BATCH_HEADS],
    pub(super) count: usize,
    /// How many of the heads were begun.
    pub(super) begun: usize,
    /// How many of those the ring has been told of.
    settled: usize,
    /// Held completions to run first.
    pub(super) held: Vec<Held>,
    pub(super) layout: Layout,
}

impl Default for Take {
    fn default() -> Self {
        Self { heads: [0; BATCH_HEADS], count: 0, begun: 0, settled: 0, held: Vec::new(), layout: Layout::default() }
    }
}

impl Take {
    /// Forgets the heads.
    pub(super) fn clear(&mut self) {
        (self.count, self.begun, self.settled) = (0, 0, 0);
    }

    /// The heads, in the order of the ring.
    pub(super) fn heads(&self) -> &[u16] {
        self.heads.get(..self.count).unwrap_or_default()
    }
}

impl State {
    #[inline]
    pub(super) fn is_live(&self) -> bool {
        self.phase == Phase::Running && self.enabled
    }

    pub(super) fn record(&self) -> Record {
        Record { layout: self.layout, next_avail: self.next_avail, next_used: self.next_used }
    }

    /// Starts the ring if all is known. A start that matches the record of the stop goes on with its parked requests.
    pub(super) fn try_start(&mut self) -> Option<Broken> {
        let all = Told { size: true, addresses: true, base: true };
        let waits = matches!(self.phase, Phase::Stopped | Phase::Detached(_));
        if !self.ready || self.told != all || !waits {
            return None;
        }
        if self.phase == Phase::Detached(Some(self.record())) {
            self.phase = Phase::Running;
        } else {
            self.forget_parked(Phase::Running);
        }
        self.signalled = None;
        self.undecided = false;
        self.kicks_refused = false;
        (!self.layout.is_legal()).then_some(Broken::Illegal { size: self.layout.size })
    }

    /// A VMM begins to set the ring up. If it runs, but is disabled, it was stopped without a word: User-Mode Linux and
    /// alioth never send GET_VRING_BASE. It is detached then, as after a proper stop.
    pub(super) fn detach_disabled(&mut self) {
        match self.phase {
            Phase::Running if !self.enabled => self.phase = Phase::Detached(Some(self.record())),
            Phase::Broken if !self.enabled => self.phase = Phase::Stopped,
            _ => {}
        }
    }

    /// Raises the epoch.
    pub(super) fn forget_parked(&mut self, phase: Phase) {
        self.phase = phase;
        self.epoch = self.epoch.wrapping_add(1);
        self.in_flight = 0;
        self.waste.append(&mut self.held);
    }

    /// Takes a pass: the side it is counted on.
    #[inline]
    pub(super) fn enter(&mut self) -> usize {
        if let Some(passes) = self.passes.get_mut(self.side) {
            *passes = passes.saturating_add(1);
        }
        self.side
    }

    /// Gives back a pass that was taken on `side`.
    #[inline]
    pub(super) fn leave(&mut self, side: usize) {
        if let Some(passes) = self.passes.get_mut(side) {
            *passes = passes.saturating_sub(1);
        }
    }

    /// Turns the door: passes from now on count on the other side. Returns the side to wait for.
    pub(super) fn turn_side(&mut self) -> usize {
        let side = self.side;
        self.side ^= 1;
        side
    }

    /// Whether passes are out that were taken on `side`.
    pub(super) fn is_occupied(&self, side: usize) -> bool {
        self.passes.get(side).is_some_and(|passes| *passes > 0)
    }

    /// Moves held completions to `out`, as much as a batch may be.
    #[inline]
    pub(super) fn take_held(&mut self, out: &mut Vec<Held>) {
        if self.held.is_empty() {
            return;
        }
        let mut bytes = 0usize;
        let fits = |held: &&Held| {
            let before = bytes;
            bytes = bytes.saturating_add(held.reply_bytes());
            before < BATCH_REPLY_BYTES
        };
        let count = self.held.iter().take(BATCH_HEADS).take_while(fits).count();
        out.extend(self.held.drain(..count));
    }

    /// Whether there is something to do that came without a kick.
    #[inline]
    pub(super) fn has_work(&self, map: &GuestMap) -> bool {
        let index = self.layout.open(map).and_then(|split| split.avail_index().ok());
        index.is_some_and(|index| index != self.next_avail) || !self.held.is_empty()
    }

    /// Notes which heads of `take` were begun and that `used` were completed, for a batch of `epoch`.
    #[inline]
    pub(super) fn settle(&mut self, epoch: u64, take: &mut Take, used: &[Used]) {
        let begun = take.begun.saturating_sub(take.settled);
        take.settled = take.begun;
        self.next_avail = self.next_avail.wrapping_add(begun as u16);
        if self.epoch == epoch {
            self.in_flight = self.in_flight.saturating_sub(used.len() as u32);
        }
    }

    /// The heads of `take` that were not begun are the ring's again.
    #[inline]
    pub(super) fn return_rest(&mut self, epoch: u64, take: &Take) {
        if self.epoch == epoch {
            self.in_flight = self.in_flight.saturating_sub(take.count.saturating_sub(take.begun) as u32);
        }
    }

    /// One request of `epoch` was completed elsewhere.
    pub(super) fn settle_late(&mut self, epoch: u64) {
        if self.epoch == epoch {
            self.in_flight = self.in_flight.saturating_sub(1);
        }
    }

    /// Reads the heads on offer into `take`, which is empty. When there are none, `dry` says what follows.
    #[inline]
    pub(super) fn take_heads(&mut self, split: &SplitRing<'_>, take: &mut Take, dry: Dry) -> Result<(), Broken> {
        let lost = |_: Unreachable| Broken::Lost;
        let size = self.layout.size;
        let mut ahead = split.avail_index().map_err(lost)?.wrapping_sub(self.next_avail);
        if ahead == 0 {
            if dry == Dry::StayAwake {
                return Ok(());
            }
            split.want_kicks(self.next_avail, self.events).map_err(lost)?;
            self.kicks_refused = false;
            ahead = split.avail_index().map_err(lost)?.wrapping_sub(self.next_avail);
            if ahead == 0 {
                return Ok(());
            }
        }
        if ahead > size {
            return Err(Broken::TooFarAhead { ahead, size });
        }
        let room = u32::from(size).saturating_sub(self.in_flight);
        if room == 0 {
            return Err(Broken::TooMany);
        }
        if !self.kicks_refused {
            split.refuse_kicks(self.events).map_err(lost)?;
            self.kicks_refused = true;
        }
        let wanted = usize::from(ahead).min(room as usize);
        for (ordinal, place) in take.heads.iter_mut().take(wanted).enumerate() {
            let head = split.head(self.next_avail.wrapping_add(ordinal as u16)).map_err(lost)?;
            if head >= size && ordinal == 0 {
                return Err(Broken::Head(head));
            }
            if head >= size {
                // Those before it are served first; it is found again at the next look.
                break;
            }
            *place = head;
            take.count = ordinal.saturating_add(1);
        }
        // Counted from here on: a late completion may come before the batch ends.
        self.in_flight = self.in_flight.saturating_add(take.count as u32);
        Ok(())
    }

    /// Adds used entries and shows them to the driver. Whether it wants an interrupt is decided later.
    #[inline]
    pub(super) fn add_used(&mut self, map: &GuestMap, used: &[Used]) -> Option<()> {
        if used.is_empty() {
            return None;
        }
        let split = self.layout.open(map)?;
        let mut index = self.next_used;
        for used in used {
            split.put_used(index, used.head, used.len).ok()?;
            index = index.wrapping_add(1);
        }
        split.publish_used(index).ok()?;
        self.next_used = index;
        self.undecided = true;
        Some(())
    }

    /// Adds used entries and decides on one interrupt for all since the last decision: whom to call.
    #[inline]
    pub(super) fn publish(&mut self, map: &GuestMap, used: &[Used]) -> Option<Arc<File>> {
        let _ = self.add_used(map, used);
        if !std::mem::take(&mut self.undecided) {
            return None;
        }
        let split = self.layout.open(map)?;
        let old = self.signalled.replace(self.next_used);
        if !split.wants_interrupt(old, self.next_used, self.events) {
            return None;
        }
        self.call.clone()
    }
}
