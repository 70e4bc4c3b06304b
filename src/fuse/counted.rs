//! A slot that counts its request: one hit when made, one error if it ends in one.

use rustix::io::Errno;
use zerocopy::FromBytes;

use super::slot::ReplySlot;
use super::wire;
use crate::metrics::Metrics;
use crate::metrics::OpTally;
use crate::sys::sink::Sink;

/// A slot and the counters of its request.
pub(super) struct Counted<S: ReplySlot> {
    slot: S,
    outcome: Outcome,
}

/// Counts an error unless told how the request ended: a slot that is dropped answers EIO.
struct Outcome {
    counters: OpTally,
    opcode: u32,
    settled: Settled,
}

#[derive(PartialEq)]
enum Settled {
    NotYet,
    Yes,
}

impl Outcome {
    fn well(&mut self) {
        self.settled = Settled::Yes;
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if self.settled == Settled::NotYet {
            self.counters.error(self.opcode);
        }
    }
}

impl<S: ReplySlot> Counted<S> {
    pub(super) fn new(slot: S, metrics: &Metrics, opcode: u32) -> Self {
        let counters = metrics.ops.shard();
        counters.hit(opcode);
        Self { slot, outcome: Outcome { counters, opcode, settled: Settled::NotYet } }
    }
}

impl<S: ReplySlot> ReplySlot for Counted<S> {
    #[inline]
    fn capacity(&self) -> usize {
        self.slot.capacity()
    }

    fn send(mut self, parts: &[&[u8]]) {
        let header = parts.first().and_then(|part| wire::OutHeader::read_from_prefix(part).ok());
        if header.is_some_and(|(header, _)| header.error == 0) {
            self.outcome.well();
        }
        self.slot.send(parts);
    }

    fn send_data<F>(mut self, unique: u64, fill: F)
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send + 'static,
    {
        // A transport that drops `fill` unused has lost its guest; that is no error of the request.
        self.outcome.well();
        let outcome = self.outcome;
        self.slot.send_data(unique, move |sink| {
            let filled = fill(sink);
            if filled.is_err() {
                outcome.counters.error(outcome.opcode);
            }
            filled
        });
    }

    fn send_nothing(mut self) {
        self.outcome.well();
        self.slot.send_nothing();
    }
}
