//! FUSE requests over one queue, many in flight, every completion checked.
//!
//! A lane owns a [`Queue`] and as many slots of guest memory as requests may be in flight. The oracle sits in
//! [`Lane::complete`]: the used length equals the reply's own length (0 where there is no reply), the unique number
//! comes back, the error is one a kernel takes, and each request is completed once.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use super::driver::Queue;
use super::driver::Segment;
use super::error::HarnessError;
use super::fuse_client::IN_HEADER_BYTES;
use super::fuse_client::OUT_HEADER_BYTES;
use super::fuse_client::Request;
use super::fuse_client::opcode;
use super::memory::GuestMemory;
use super::vmm::PATIENCE;

/// How a lane learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It looks at the ring and asks for no interrupt.
    Poll,
    /// It sleeps until it is interrupted.
    Event,
}

/// What a lane's slots are like.
#[derive(Debug, Clone, Copy)]
pub struct LaneOptions {
    /// Requests in flight at most.
    pub depth: usize,
    /// Bytes of the largest request.
    pub request_bytes: u32,
    /// Bytes of the largest reply body.
    pub reply_bytes: u32,
    /// Bytes of a segment of the paged part of a reply: 4096 as Linux does it.
    pub segment_bytes: u32,
    /// How completions are noticed.
    pub mode: Mode,
}

#[derive(Debug)]
struct Slot {
    request: u64,
    reply: u64,
    flight: Option<InFlight>,
}

#[derive(Debug, Clone, Copy)]
struct InFlight {
    unique: u64,
    opcode: u32,
    node: u64,
    capacity: u32,
}

/// A checked completion. The reply lies in the slot until it is given back.
#[derive(Debug)]
#[must_use = "a completion holds a slot until it is released"]
pub struct Done {
    slot: usize,
    /// Number of the request.
    pub unique: u64,
    /// Its operation.
    pub opcode: u32,
    /// Its inode.
    pub node: u64,
    /// 0 or an errno, positive.
    pub errno: i32,
    /// Bytes of the reply's body.
    pub body_bytes: u32,
}

impl Done {
    /// Number of the slot, below the lane's depth. The slot released last is the next to be used.
    pub fn slot(&self) -> usize {
        self.slot
    }
}

/// A reply taken out of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// 0 or an errno, positive.
    pub errno: i32,
    /// What follows the header.
    pub body: Vec<u8>,
}

impl Reply {
    /// The body of a success.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] naming the errno.
    pub fn body(self) -> Result<Vec<u8>, HarnessError> {
        match self.errno {
            0 => Ok(self.body),
            errno => Err(HarnessError::Violation(format!("answered errno {errno}"))),
        }
    }
}

/// One queue of the fake guest.
#[derive(Debug)]
pub struct Lane {
    queue: Queue,
    memory: Arc<GuestMemory>,
    options: LaneOptions,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Completions that somebody waiting for another one has seen.
    early: Vec<Done>,
    next_unique: u64,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Lane {
    /// A lane over `queue`, its slots in region `region` of `memory`. Unique numbers start at `first_unique`, an even
    /// number, as the kernel's do.
    ///
    /// # Errors
    /// [`HarnessError::Misuse`] when the region is used up.
    pub fn new(
        queue: Queue,
        memory: Arc<GuestMemory>,
        region: usize,
        options: LaneOptions,
        first_unique: u64,
    ) -> Result<Self, HarnessError> {
        let reply_bytes = 4096 + u64::from(options.reply_bytes);
        let slot = |_| {
            Ok(Slot {
                request: memory.allocate(region, options.request_bytes.into(), 64)?,
                // The body of a paged reply begins on a page.
                reply: memory.allocate(region, reply_bytes, 4096)? + 4096 - OUT_HEADER_BYTES as u64,
                flight: None,
            })
        };
        let slots = (0..options.depth).map(slot).collect::<Result<Vec<_>, HarnessError>>()?;
        let free = (0..options.depth).rev().collect();
        let (readable, writable) = (Vec::new(), Vec::new());
        let early = Vec::new();
        Ok(Self { queue, memory, options, slots, free, early, next_unique: first_unique, readable, writable })
    }

    /// The ring below.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// The ring below, to look at.
    pub fn ring(&self) -> &Queue {
        &self.queue
    }

    /// Requests that can still be submitted before one completes and is released.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// How completions are noticed.
    pub fn mode(&self) -> Mode {
        self.options.mode
    }

    /// Forgets everything in flight and makes the rings new, as a guest does after a reset.
    pub fn reset(&mut self) {
        self.queue.reset();
        self.slots.iter_mut().for_each(|slot| slot.flight = None);
        self.free = (0..self.slots.len()).rev().collect();
        self.early.clear();
    }

    /// Puts a request into the ring, not yet shown to the device; its unique number.
    ///
    /// # Errors
    /// [`HarnessError::Misuse`] when all slots or places of the ring are taken, or the request is too large.
    pub fn submit(&mut self, request: &Request) -> Result<u64, HarnessError> {
        let room = request.room.unwrap_or(0);
        if request.len() > self.options.request_bytes as usize || room > self.options.reply_bytes {
            return Err(HarnessError::Misuse(format!("request of {} bytes, {room} of reply", request.len())));
        }
        let slot = *self.free.last().ok_or_else(|| HarnessError::Misuse("all slots are in flight".into()))?;
        let unique = self.next_unique;
        self.lay_out(slot, request, unique);
        self.queue.add(&self.readable, &self.writable, slot as u64)?;
        self.free.pop();
        self.next_unique += 2;
        let capacity = match request.opcode {
            // Never answered, whatever room there is.
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => 0,
            _ => request.room.map_or(0, |room| room + OUT_HEADER_BYTES as u32),
        };
        self.slots[slot].flight = Some(InFlight { unique, opcode: request.opcode, node: request.node, capacity });
        Ok(unique)
    }

    /// Header and arguments in two readable segments; reply header, structure and pages in writable ones.
    fn lay_out(&mut self, slot: usize, request: &Request, unique: u64) {
        let Slot { request: at, reply, .. } = self.slots[slot];
        let header_bytes = IN_HEADER_BYTES as u64;
        self.memory.write(at, &request.header(unique));
        self.memory.write(at + header_bytes, &request.body);
        self.readable.clear();
        self.readable.push(Segment { address: at, len: IN_HEADER_BYTES as u32 });
        if !request.body.is_empty() {
            self.readable.push(Segment { address: at + header_bytes, len: request.body.len() as u32 });
        }
        self.writable.clear();
        let Some(room) = request.room else { return };
        // A reply that is not there must not look like the one before.
        self.memory.write(reply, &[0xa5; OUT_HEADER_BYTES]);
        self.writable.push(Segment { address: reply, len: OUT_HEADER_BYTES as u32 });
        let body = reply + OUT_HEADER_BYTES as u64;
        if request.fixed_room > 0 {
            self.writable.push(Segment { address: body, len: request.fixed_room });
        }
        let mut at = request.fixed_room;
        while at < room {
            let len = (room - at).min(self.options.segment_bytes);
            self.writable.push(Segment { address: body + u64::from(at), len });
            at += len;
        }
    }

    /// Shows the device what was submitted.
    ///
    /// # Errors
    /// What kicking answers.
    pub fn publish(&mut self) -> Result<(), HarnessError> {
        self.queue.publish()
    }

    /// Takes the next completion, if there is one, and checks it.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] when the daemon broke a rule.
    pub fn complete(&mut self) -> Result<Option<Done>, HarnessError> {
        let Some(used) = self.queue.take()? else { return Ok(None) };
        let slot = used.token as usize;
        let flight = self.slots.get_mut(slot).and_then(|s| s.flight.take());
        let flight = flight.ok_or_else(|| HarnessError::Violation(format!("slot {slot} completed twice")))?;
        let InFlight { unique, opcode, node, capacity } = flight;
        let mut done = Done { slot, unique, opcode, node, errno: 0, body_bytes: 0 };
        let broken = |what: String| HarnessError::Violation(format!("{what} (request {unique}, operation {opcode})"));
        if capacity < OUT_HEADER_BYTES as u32 {
            return match used.len {
                0 => Ok(Some(done)),
                len => Err(broken(format!("used length {len} without a reply"))),
            };
        }
        let mut header = [0; OUT_HEADER_BYTES];
        self.memory.read(self.slots[slot].reply, &mut header);
        let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let error = i32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let echoed = u64::from_le_bytes(header[8..].try_into().expect("eight bytes are left"));
        if used.len != len || len < OUT_HEADER_BYTES as u32 || len > capacity {
            return Err(broken(format!("used length {}, reply length {len}, room {capacity}", used.len)));
        }
        if echoed != unique {
            return Err(broken(format!("unique {echoed} came back")));
        }
        // What the kernel's fuse_dev_do_write takes.
        if !(-511..=0).contains(&error) || (error != 0 && len != OUT_HEADER_BYTES as u32) {
            return Err(broken(format!("error {error} with {len} bytes")));
        }
        done.errno = -error;
        done.body_bytes = len - OUT_HEADER_BYTES as u32;
        Ok(Some(done))
    }

    /// Waits for the next completion.
    ///
    /// # Errors
    /// [`HarnessError::Timeout`] after `patience`, and as [`Lane::complete`].
    pub fn wait(&mut self, patience: Duration) -> Result<Done, HarnessError> {
        let start = Instant::now();
        loop {
            if let Some(done) = self.complete()? {
                return Ok(done);
            }
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                let what = format!("a completion ({} in flight)", self.queue.in_flight());
                return Err(HarnessError::Timeout { what, waited: patience });
            }
            match self.options.mode {
                Mode::Poll => std::thread::yield_now(),
                Mode::Event => {
                    self.queue.wait(left)?;
                }
            }
        }
    }

    /// Waits for the completion of request `unique`; others that come meanwhile are kept for their waiters.
    ///
    /// # Errors
    /// As [`Lane::wait`].
    pub fn wait_for(&mut self, unique: u64, patience: Duration) -> Result<Done, HarnessError> {
        let start = Instant::now();
        loop {
            if let Some(place) = self.early.iter().position(|done| done.unique == unique) {
                return Ok(self.early.swap_remove(place));
            }
            let done = self.wait(patience.saturating_sub(start.elapsed()))?;
            self.early.push(done);
        }
    }

    /// Takes what a waiter for another request has put aside, or the next completion.
    ///
    /// # Errors
    /// As [`Lane::wait`].
    pub fn next(&mut self, patience: Duration) -> Result<Done, HarnessError> {
        match self.early.pop() {
            Some(done) => Ok(done),
            None => self.wait(patience),
        }
    }

    /// Completions that are there but not taken.
    ///
    /// # Errors
    /// As [`Lane::complete`].
    pub fn ready(&mut self) -> Result<usize, HarnessError> {
        while let Some(done) = self.complete()? {
            self.early.push(done);
        }
        Ok(self.early.len())
    }

    /// Copies the reply's body out, up to the length of `bytes`.
    pub fn read_body(&self, done: &Done, bytes: &mut [u8]) {
        let len = bytes.len().min(done.body_bytes as usize);
        self.memory.read(self.slots[done.slot].reply + OUT_HEADER_BYTES as u64, &mut bytes[..len]);
    }

    /// Gives the slot back without looking at the reply.
    pub fn release(&mut self, done: Done) {
        self.free.push(done.slot);
    }

    /// Takes the reply out of guest memory and gives the slot back.
    pub fn reply(&mut self, done: Done) -> Reply {
        let mut body = vec![0; done.body_bytes as usize];
        self.read_body(&done, &mut body);
        let errno = done.errno;
        self.release(done);
        Reply { errno, body }
    }

    /// Sends one request and waits for its reply.
    ///
    /// # Errors
    /// As [`Lane::submit`], [`Lane::wait`].
    pub fn call(&mut self, request: &Request) -> Result<Reply, HarnessError> {
        let unique = self.submit(request)?;
        self.publish()?;
        let done = self.wait_for(unique, PATIENCE)?;
        Ok(self.reply(done))
    }

    /// Sends FORGET of `lookups` and waits until it is used.
    ///
    /// # Errors
    /// As [`Lane::call`].
    pub fn forget(&mut self, node: u64, lookups: u64) -> Result<(), HarnessError> {
        self.call(&Request::forget(node, lookups)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::driver::Chains;
    use crate::testing::driver::Notifications;
    use crate::testing::driver::QueueOptions;
    use crate::testing::memory::USER_OFFSET;

    /// A lane with one GETATTR in flight, and the address of its used ring.
    fn waiting() -> (Lane, u64, u64) {
        let memory = Arc::new(GuestMemory::new(&[(0, 1 << 20)]).unwrap());
        let (chains, notifications) = (Chains::Direct, Notifications::Flags);
        let options = QueueOptions { size: 8, chains, notifications, table_entries: 4 };
        let queue = Queue::new(Arc::clone(&memory), 0, options).unwrap();
        let used = queue.addresses().used - USER_OFFSET;
        let options =
            LaneOptions { depth: 2, request_bytes: 4096, reply_bytes: 4096, segment_bytes: 4096, mode: Mode::Poll };
        let mut lane = Lane::new(queue, memory, 0, options, 2).unwrap();
        let unique = lane.submit(&Request::getattr(1)).unwrap();
        lane.publish().unwrap();
        (lane, used, unique)
    }

    /// What a device would write: a reply header, and a used entry.
    fn answer(lane: &Lane, used_ring: u64, used: (u32, u32), header: (u32, i32, u64)) {
        let mut reply = header.0.to_le_bytes().to_vec();
        reply.extend_from_slice(&header.1.to_le_bytes());
        reply.extend_from_slice(&header.2.to_le_bytes());
        lane.memory.write(lane.slots[0].reply, &reply);
        let index = lane.memory.load_u16(used_ring + 2);
        let entry = [used.0.to_le_bytes(), used.1.to_le_bytes()].concat();
        lane.memory.write(used_ring + 4 + 8 * u64::from(index), &entry);
        lane.memory.store_u16(used_ring + 2, index + 1);
    }

    #[test]
    fn complete_takes_what_a_kernel_takes_and_nothing_else() {
        // Head 0; used length; length, error and unique of the header; whether it is right.
        let cases = [
            (0, 120, (120, 0, 2), true),
            (0, 16, (16, -5, 2), true),
            (0, 0, (120, 0, 2), false),
            (0, 119, (120, 0, 2), false),
            (0, 4096, (4096, 0, 2), false),
            (0, 15, (15, 0, 2), false),
            (0, 120, (120, 0, 4), false),
            (0, 120, (120, -5, 2), false),
            (0, 16, (16, 5, 2), false),
            (0, 16, (16, -512, 2), false),
            (1, 120, (120, 0, 2), false),
            (70000, 120, (120, 0, 2), false),
        ];
        for (head, used, header, is_right) in cases {
            let (mut lane, ring, _) = waiting();
            answer(&lane, ring, (head, used), header);
            let seen = lane.complete();
            assert_eq!(seen.is_ok(), is_right, "head {head} used {used} {header:?}: {seen:?}");
        }
    }

    #[test]
    fn complete_of_the_same_head_twice_is_a_violation() {
        let (mut lane, ring, unique) = waiting();
        answer(&lane, ring, (0, 120), (120, 0, unique));
        let done = lane.complete().unwrap().unwrap();
        assert_eq!(lane.reply(done).body.len(), 104);
        answer(&lane, ring, (0, 120), (120, 0, unique));
        assert!(matches!(lane.complete(), Err(HarnessError::Violation(_))));
    }

    #[test]
    fn complete_of_a_forget_with_a_length_is_a_violation() {
        let (mut lane, ring, unique) = waiting();
        answer(&lane, ring, (0, 120), (120, 0, unique));
        let done = lane.complete().unwrap().unwrap();
        lane.release(done);
        lane.submit(&Request::forget(1, 1)).unwrap();
        answer(&lane, ring, (0, 16), (16, 0, 4));
        assert!(matches!(lane.complete(), Err(HarnessError::Violation(_))));
    }
}
