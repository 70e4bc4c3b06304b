//! The place of one reply in a ring, and the way of its bytes into guest memory.
//!
//! A [`Slot`] owns head, epoch and the guest addresses of its reply area, copied once when the request was popped. It
//! holds no map: addresses are resolved in the map of the moment of completion, so nothing is written through a table
//! that the VMM has replaced. Body first, header last; the used length is exactly the length in the header.
//!
//! Completions made on the ring's worker inside its batch are collected in the thread's [`Batch`] and published
//! together; all others take a pass and publish themselves.

use std::cell::RefCell;
use std::sync::Arc;

use rustix::io::Errno;

use super::chain::Span;
use super::chain::Spans;
use super::ring::Admitted;
use super::ring::Ring;
use super::state::Used;
use crate::fuse::slot::OUT_HEADER_BYTES;
use crate::fuse::slot::ReplySlot;
use crate::sys::copy::Means;
use crate::sys::guest::GuestMap;
use crate::sys::guest::Window;
use crate::sys::sink::Sink;
use crate::sys::sink::SinkError;
use crate::sys::view::View;

/// The place of one reply. Dropped without an answer, the guest gets EIO.
#[derive(Debug)]
pub(super) struct Slot {
    /// `None` once the answer is given.
    place: Option<Place>,
}

/// What a reply needs to find its way.
#[derive(Debug)]
struct Place {
    ring: Arc<Ring>,
    epoch: u64,
    unique: u64,
    /// Bytes of `spans`.
    capacity: usize,
    spans: Spans,
    head: u16,
}

/// An answer that waits until its ring may be written to again.
pub(super) struct Held {
    slot: Slot,
    answer: Answer,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").field("slot", &self.slot).finish_non_exhaustive()
    }
}

/// Puts the body of a data reply.
type Fill = Box<dyn FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send>;

enum Answer {
    Bytes(Vec<u8>),
    Data(u64, Fill),
    Nothing,
    Error(Errno),
}

impl Held {
    /// Bytes the answer may have.
    pub(super) fn reply_bytes(&self) -> usize {
        self.slot.capacity()
    }

    /// Gives the answer now.
    pub(super) fn release(self) {
        let Self { slot, answer } = self;
        match answer {
            Answer::Bytes(bytes) => slot.send(&[&bytes]),
            Answer::Data(unique, fill) => slot.send_data(unique, fill),
            Answer::Nothing => slot.send_nothing(),
            Answer::Error(errno) => slot.fail(errno),
        }
    }
}

/// Completions of the batch that this thread works on.
#[derive(Debug)]
pub(super) struct Batch {
    /// Address of the ring, 0 outside a batch. Only compared: the worker holds the ring.
    ring: usize,
    epoch: u64,
    /// Taken out while a reply is being written.
    map: Option<Arc<GuestMap>>,
    used: Vec<Used>,
    body_bytes: u64,
    /// What the last slot that was completed here held of its ring, for the next: a count of references shared with other
    /// threads costs more than a move.
    spare: Option<Arc<Ring>>,
}

thread_local! {
    static BATCH: RefCell<Batch> =
        const { RefCell::new(Batch::NONE) };
}

impl Batch {
    const NONE: Self = Self { ring: 0, epoch: 0, map: None, used: Vec::new(), body_bytes: 0, spare: None };

    /// From now on completions for `ring` on this thread are collected; `used` is an empty buffer.
    pub(super) fn open(ring: &Arc<Ring>, epoch: u64, map: &Arc<GuestMap>, used: Vec<Used>) {
        let map = Some(Arc::clone(map));
        let ring = Arc::as_ptr(ring) as usize;
        BATCH.with_borrow_mut(|place| *place = Self { ring, epoch, map, used, ..Self::NONE });
    }

    /// How many completions were collected.
    #[inline]
    pub(super) fn collected() -> usize {
        BATCH.with_borrow(|batch| batch.used.len())
    }

    /// Moves the completions collected so far to `used`, which is empty.
    pub(super) fn collect(used: &mut Vec<Used>) {
        BATCH.with_borrow_mut(|batch| std::mem::swap(&mut batch.used, used));
    }

    /// Ends the batch: what was completed, and the bytes of the bodies.
    pub(super) fn close() -> (Vec<Used>, u64) {
        let batch = BATCH.replace(Self::NONE);
        (batch.used, batch.body_bytes)
    }

    /// The map to write to, if a completion for this ring and epoch belongs to the batch.
    #[inline]
    fn enter(ring: &Arc<Ring>, epoch: u64) -> Option<Arc<GuestMap>> {
        BATCH.with_borrow_mut(|batch| {
            let ours = batch.ring == Arc::as_ptr(ring) as usize && batch.epoch == epoch;
            if ours { batch.map.take() } else { None }
        })
    }

    /// A share of `ring`, whose batch is open.
    #[inline]
    fn share(ring: &Arc<Ring>) -> Arc<Ring> {
        BATCH.with_borrow_mut(|batch| batch.spare.take()).unwrap_or_else(|| Arc::clone(ring))
    }

    /// `ring` is the slot's share, which [`Self::enter`] found to be that of the batch.
    #[inline]
    fn leave(map: Arc<GuestMap>, used: Used, ring: Arc<Ring>) {
        BATCH.with_borrow_mut(|batch| {
            batch.map = Some(map);
            batch.spare.get_or_insert(ring);
            batch.used.push(used);
            batch.body_bytes = batch.body_bytes.saturating_add(body_bytes(used));
        });
    }
}

fn body_bytes(used: Used) -> u64 {
    u64::from(used.len).saturating_sub(OUT_HEADER_BYTES as u64)
}

impl Slot {
    /// The place of the reply to the request that was popped with `head`; `capacity` is the sum of `spans`.
    #[inline]
    pub(super) fn new(ring: &Arc<Ring>, epoch: u64, head: u16, spans: Spans, capacity: u64) -> Self {
        let capacity = usize::try_from(capacity).unwrap_or(usize::MAX);
        Self { place: Some(Place { ring: Batch::share(ring), epoch, unique: 0, capacity, spans, head }) }
    }

    /// Remembers the id of the request, for an error that the transport has to answer.
    #[inline]
    pub(super) fn set_unique(&mut self, unique: u64) {
        if let Some(place) = self.place.as_mut() {
            place.unique = unique;
        }
    }

    /// Answers an error.
    pub(super) fn fail(self, errno: Errno) {
        self.complete(errno, Answer::Error, |errno, place, map| place.put_error(map, place.unique, errno));
    }

    /// Completes by `write`, which puts the reply and returns its length, if the ring may be written to now. If it may
    /// later, what `keep` makes of `source` is kept until then. If the ring does not know the request any more, nothing
    /// happens.
    ///
    /// Should `write` panic, the place is still there, and dropping it answers EIO.
    #[inline]
    fn complete<S, K, W>(mut self, source: S, keep: K, write: W)
    where
        K: FnOnce(S) -> Answer,
        W: FnOnce(S, &Place, &GuestMap) -> u32,
    {
        let Some(place) = self.place.as_ref() else { return };
        let Some(map) = Batch::enter(&place.ring, place.epoch) else {
            return self.complete_late(source, keep, write);
        };
        let len = write(source, place, &map);
        if let Some(Place { head, ring, .. }) = self.place.take() {
            Batch::leave(map, Used { head, len }, ring);
        }
    }

    /// [`Self::complete`] away from the worker's batch.
    fn complete_late<S, K, W>(self, source: S, keep: K, write: W)
    where
        K: FnOnce(S) -> Answer,
        W: FnOnce(S, &Place, &GuestMap) -> u32,
    {
        let Some(place) = self.place.as_ref() else { return };
        let (ring, epoch) = (Arc::clone(&place.ring), place.epoch);
        let mut mine = Some((self, source));
        let admitted = ring.admit(epoch, || {
            let (slot, source) = mine.take().expect("it is taken here only, and this runs once");
            Held { slot, answer: keep(source) }
        });
        let Some((mut slot, source)) = mine else { return };
        if let (Admitted::Pass(pass), Some(place)) = (admitted, slot.place.as_ref()) {
            let used = Used { head: place.head, len: write(source, place, &pass.map) };
            if let Some(counters) = ring.counters() {
                counters.late.add(1);
                counters.bytes.add(body_bytes(used));
            }
            pass.end(used);
        }
        slot.place = None;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.place.is_some() {
            Self { place: self.place.take() }.fail(Errno::IO);
        }
    }
}

impl ReplySlot for Slot {
    #[inline]
    fn capacity(&self) -> usize {
        self.place.as_ref().map_or(0, |place| place.capacity)
    }

    #[inline]
    fn send(self, parts: &[&[u8]]) {
        self.complete(parts, |parts| Answer::Bytes(parts.concat()), |parts, place, map| place.put_parts(map, parts));
    }

    #[inline]
    fn send_data<F>(self, unique: u64, fill: F)
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send + 'static,
    {
        self.complete(
            fill,
            |fill| Answer::Data(unique, Box::new(fill)),
            |fill, place, map| place.put_data(map, unique, fill),
        );
    }

    #[inline]
    fn send_nothing(self) {
        self.complete((), |()| Answer::Nothing, |(), _, _| 0);
    }
}

impl Place {
    /// Puts a whole reply and returns its length; an error instead of it when it cannot be put.
    fn put_parts(&self, map: &GuestMap, parts: &[&[u8]]) -> u32 {
        let mut header = [0; OUT_HEADER_BYTES];
        let mut of_header = 0usize;
        let mut sink = GuestSink::new(map, &self.spans, self.capacity);
        let mut put = sink.skip(OUT_HEADER_BYTES);
        for part in parts {
            let missing = OUT_HEADER_BYTES.saturating_sub(of_header).min(part.len());
            let (front, body) = part.split_at(missing);
            if let Some(place) = header.get_mut(of_header..of_header.saturating_add(missing)) {
                place.copy_from_slice(front);
            }
            of_header = of_header.saturating_add(missing);
            put = put.and_then(|()| sink.put_bytes(body));
        }
        let len = sink.put_so_far();
        match put {
            Ok(()) if of_header == OUT_HEADER_BYTES && self.put_header(map, header) => len,
            _ => self.put_error(map, unique_of(header), Errno::IO),
        }
    }

    /// Puts a reply whose body is what `fill` puts.
    #[inline]
    fn put_data<F>(&self, map: &GuestMap, unique: u64, fill: F) -> u32
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno>,
    {
        let mut sink = GuestSink::new(map, &self.spans, self.capacity);
        if sink.skip(OUT_HEADER_BYTES).is_err() {
            return 0;
        }
        match fill(&mut sink) {
            Ok(put) => {
                let whole = put.checked_add(OUT_HEADER_BYTES).and_then(|len| u32::try_from(len).ok());
                match whole.filter(|len| *len <= sink.put_so_far()) {
                    Some(len) if self.put_header(map, header(len, 0, unique)) => len,
                    _ => self.put_error(map, unique, Errno::IO),
                }
            }
            Err(errno) => self.put_error(map, unique, errno),
        }
    }

    /// Puts an error; returns the used length, 0 when not even that fits or is mapped.
    fn put_error(&self, map: &GuestMap, unique: u64, errno: Errno) -> u32 {
        const LEN: u32 = OUT_HEADER_BYTES as u32;
        let put = self.put_header(map, header(LEN, errno.raw_os_error().wrapping_neg(), unique));
        if put { LEN } else { 0 }
    }

    #[inline]
    fn put_header(&self, map: &GuestMap, header: [u8; OUT_HEADER_BYTES]) -> bool {
        GuestSink::new(map, &self.spans, self.capacity).put_bytes(&header).is_ok()
    }
}

/// `struct fuse_out_header`.
#[inline]
fn header(len: u32, error: i32, unique: u64) -> [u8; OUT_HEADER_BYTES] {
    let word = u128::from(len) | u128::from(error as u32) << 32 | u128::from(unique) << 64;
    word.to_le_bytes()
}

fn unique_of(header: [u8; OUT_HEADER_BYTES]) -> u64 {
    (u128::from_le_bytes(header) >> 64) as u64
}

/// Writes into the reply area of one request, resolved in one map.
pub(super) struct GuestSink<'a> {
    map: &'a GuestMap,
    spans: &'a [Span],
    /// Bytes of the first span that are written.
    done: u32,
    room: usize,
    put: u32,
}

impl<'a> GuestSink<'a> {
    /// A sink that fills `spans`, which have `room` bytes.
    #[inline]
    pub(super) fn new(map: &'a GuestMap, spans: &'a [Span], room: usize) -> Self {
        Self { map, spans, done: 0, room, put: 0 }
    }

    /// Bytes put and skipped.
    pub(super) fn put_so_far(&self) -> u32 {
        self.put
    }

    /// Leaves out `len` bytes, without touching them.
    #[inline]
    fn skip(&mut self, len: usize) -> Result<(), SinkError> {
        let mut left = len;
        self.reserve(len)?;
        while let Some((span, _)) = self.spans.split_first().filter(|_| left > 0) {
            let step = left.min(span.len.saturating_sub(self.done) as usize);
            self.advance(step);
            left = left.saturating_sub(step);
        }
        Ok(())
    }

    #[inline]
    fn reserve(&self, wanted: usize) -> Result<(), SinkError> {
        if wanted > self.room { Err(SinkError::Full { room: self.room, wanted }) } else { Ok(()) }
    }

    /// Calls `copy` for each run of guest memory that the next `len` bytes go to, with the bytes done before it.
    #[inline]
    fn each(
        &mut self,
        len: usize,
        mut copy: impl FnMut(&Window<'_>, usize) -> Result<(), SinkError>,
    ) -> Result<(), SinkError> {
        self.reserve(len)?;
        let mut copied = 0usize;
        while copied < len {
            let (span, _) = self.spans.split_first().ok_or(SinkError::Unmapped)?;
            let step = len.saturating_sub(copied).min(span.len.saturating_sub(self.done) as usize);
            let address = span.address.checked_add(u64::from(self.done)).ok_or(SinkError::Unmapped)?;
            let window = self.map.window(address, step).ok_or(SinkError::Unmapped)?;
            copy(&window, copied)?;
            copied = copied.saturating_add(window.len());
            self.advance(window.len());
        }
        Ok(())
    }

    /// Moves on by `step` bytes, which do not go beyond the first span.
    #[inline]
    fn advance(&mut self, step: usize) {
        self.done = self.done.saturating_add(step as u32);
        self.put = self.put.saturating_add(step as u32);
        self.room = self.room.saturating_sub(step);
        if let Some((span, rest)) = self.spans.split_first()
            && self.done >= span.len
        {
            self.spans = rest;
            self.done = 0;
        }
    }
}

impl Sink for GuestSink<'_> {
    #[inline]
    fn room(&self) -> usize {
        self.room
    }

    #[inline]
    fn put_bytes(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.each(bytes.len(), |window, done| {
            let rest = bytes.get(done..).unwrap_or_default();
            let now = rest.get(..window.len()).unwrap_or_default();
            window.write(0, now).map_err(|_| SinkError::Unmapped)
        })
    }

    fn put_zeros(&mut self, len: usize) -> Result<(), SinkError> {
        static ZEROS: [u8; 4096] = [0; 4096];
        let mut left = len;
        self.reserve(len)?;
        while left > 0 {
            let step = left.min(ZEROS.len());
            self.put_bytes(ZEROS.get(..step).unwrap_or_default())?;
            left = left.saturating_sub(step);
        }
        Ok(())
    }

    #[inline]
    fn put_view(&mut self, view: &View, offset: u64, len: usize) -> Result<(), SinkError> {
        let means = Means::of(len);
        let put = self.each(len, |window, done| {
            let from = offset.saturating_add(done as u64);
            match window.write_view(view, from, window.len(), means) {
                Ok(copied) => copied.map_err(SinkError::Source),
                Err(_) => Err(SinkError::Unmapped),
            }
        });
        means.settle();
        put
    }
}
