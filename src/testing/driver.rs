//! A split-ring driver of our own: the guest's side of one queue.
//!
//! Direct and indirect chains, EVENT_IDX or flags, interrupts or polling, rings up to 32768 entries. It keeps its own
//! account of every head, so a completion of a head that is not in flight, or a second one, is a
//! [`HarnessError::Violation`]. Hostile tests write descriptors and ring indices themselves.
//!
//! Source: virtio 1.3, section 2.7.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::atomic::fence;
use std::time::Duration;
use std::time::Instant;

use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;

use super::error::HarnessError;
use super::memory::GuestMemory;
use super::memory::USER_OFFSET;
use super::vmm::RingAddresses;

/// How chains lie in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chains {
    /// Every descriptor takes a place in the ring.
    Direct,
    /// One place in the ring per chain, the descriptors in a table of its own (INDIRECT_DESC).
    Indirect,
}

/// How both sides say whether they want to be notified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notifications {
    /// By index (EVENT_IDX).
    EventIdx,
    /// By the flags of the rings.
    Flags,
}

/// What a queue is like.
#[derive(Debug, Clone, Copy)]
pub struct QueueOptions {
    /// Entries, a power of two up to 32768.
    pub size: u16,
    /// How chains lie in the ring.
    pub chains: Chains,
    /// How notifications are asked for.
    pub notifications: Notifications,
    /// Most descriptors of one indirect chain.
    pub table_entries: u16,
}

/// Descriptor flag: another descriptor follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes to it.
pub const WRITE: u16 = 2;
/// Descriptor flag: the descriptor is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// One descriptor as it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

/// Bytes of a [`Descriptor`].
pub const DESCRIPTOR_BYTES: usize = 16;

impl Descriptor {
    /// The descriptor as it lies in memory.
    pub fn bytes(self) -> [u8; DESCRIPTOR_BYTES] {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A range of guest memory in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// A completed chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u16,
    /// What the chain was added with.
    pub token: u64,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    token: u64,
    /// Places of the ring that go back to the free list.
    places: u16,
}

/// The guest's side of one split ring.
#[derive(Debug)]
pub struct Queue {
    memory: Arc<GuestMemory>,
    options: QueueOptions,
    descriptors: u64,
    available: u64,
    used: u64,
    tables: u64,
    free: Vec<u16>,
    /// Places of each chain behind its head; our own copy, the device cannot change it.
    links: Vec<u16>,
    flights: Vec<Option<Flight>>,
    in_flight: usize,
    next_available: u16,
    published: u16,
    next_used: u16,
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
    scratch: Vec<u8>,
    kicks: u64,
    calls: u64,
}

impl Queue {
    /// A queue whose rings lie in region `region` of `memory`.
    ///
    /// # Errors
    /// [`HarnessError::Misuse`] when the region is used up; what making the event descriptors answers.
    pub fn new(memory: Arc<GuestMemory>, region: usize, options: QueueOptions) -> Result<Self, HarnessError> {
        let size = u64::from(options.size);
        let table_bytes = u64::from(options.table_entries) * DESCRIPTOR_BYTES as u64;
        let tables = match options.chains {
            Chains::Direct => 0,
            Chains::Indirect => memory.allocate(region, size * table_bytes, 16)?,
        };
        let event = || {
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|e| HarnessError::io("make an event descriptor", e))
        };
        Ok(Self {
            descriptors: memory.allocate(region, size * DESCRIPTOR_BYTES as u64, 4096)?,
            available: memory.allocate(region, 6 + 2 * size, 4096)?,
            used: memory.allocate(region, 6 + 8 * size, 4096)?,
            tables,
            memory,
            options,
            free: (0..options.size).rev().collect(),
            links: vec![0; usize::from(options.size)],
            flights: vec![None; usize::from(options.size)],
            in_flight: 0,
            next_available: 0,
            published: 0,
            next_used: 0,
            kick: event()?,
            call: event()?,
            error: event()?,
            scratch: Vec::new(),
            kicks: 0,
            calls: 0,
        })
    }

    /// User addresses of the rings.
    pub fn addresses(&self) -> RingAddresses {
        RingAddresses {
            descriptors: self.descriptors + USER_OFFSET,
            available: self.available + USER_OFFSET,
            used: self.used + USER_OFFSET,
        }
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.options.size
    }

    /// What the driver signals.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// What the device signals when it has used chains.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// What the device signals when the ring is broken.
    pub fn error_fd(&self) -> BorrowedFd<'_> {
        self.error.as_fd()
    }

    /// Chains in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Kicks sent so far.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Interrupts received so far; looks at the descriptor.
    pub fn calls(&mut self) -> u64 {
        self.calls += take_events(&self.call);
        self.calls
    }

    /// Whether VRING_ERR was signalled since the last question.
    pub fn failed(&self) -> bool {
        take_events(&self.error) > 0
    }

    /// Makes the rings new, as a driver does after a reset: indices 0, nothing in flight.
    pub fn reset(&mut self) {
        let size = usize::from(self.options.size);
        self.memory.fill(self.descriptors, size * DESCRIPTOR_BYTES, 0);
        self.memory.fill(self.available, 6 + 2 * size, 0);
        self.memory.fill(self.used, 6 + 8 * size, 0);
        self.free = (0..self.options.size).rev().collect();
        self.flights.fill(None);
        (self.in_flight, self.next_available, self.published, self.next_used) = (0, 0, 0, 0);
        take_events(&self.call);
        take_events(&self.kick);
    }

    /// Puts a chain into the ring, not yet visible to the device; its head.
    ///
    /// # Errors
    /// [`HarnessError::Misuse`] when the ring is full, or the chain too long or empty.
    pub fn add(&mut self, readable: &[Segment], writable: &[Segment], token: u64) -> Result<u16, HarnessError> {
        let count = readable.len() + writable.len();
        let places = match self.options.chains {
            Chains::Direct => count,
            Chains::Indirect => 1,
        };
        if count == 0 || self.free.len() < places {
            return Err(HarnessError::Misuse(format!("no room for {count} descriptors")));
        }
        let head = match self.options.chains {
            Chains::Direct => self.link_direct(readable, writable),
            Chains::Indirect => self.link_indirect(readable, writable)?,
        };
        self.flights[usize::from(head)] = Some(Flight { token, places: places as u16 });
        self.in_flight += 1;
        self.push_available(head);
        Ok(head)
    }

    fn link_direct(&mut self, readable: &[Segment], writable: &[Segment]) -> u16 {
        let count = readable.len() + writable.len();
        let from = self.free.len() - count;
        let segments = readable.iter().map(|s| (s, 0)).chain(writable.iter().map(|s| (s, WRITE)));
        for (n, (segment, write)) in segments.enumerate() {
            let place = self.free[from + count - 1 - n];
            let (next, more) = if n + 1 < count { (self.free[from + count - 2 - n], NEXT) } else { (0, 0) };
            self.links[usize::from(place)] = next;
            let descriptor = Descriptor { address: segment.address, len: segment.len, flags: write | more, next };
            self.write_descriptor(place, descriptor);
        }
        let head = self.free[from + count - 1];
        self.free.truncate(from);
        head
    }

    fn link_indirect(&mut self, readable: &[Segment], writable: &[Segment]) -> Result<u16, HarnessError> {
        let count = readable.len() + writable.len();
        if count > usize::from(self.options.table_entries) {
            return Err(HarnessError::Misuse(format!("a table has no {count} entries")));
        }
        let head = self.free.pop().expect("the caller has seen a free place");
        let segments = readable.iter().map(|s| (s, 0)).chain(writable.iter().map(|s| (s, WRITE)));
        self.scratch.clear();
        for (n, (segment, write)) in segments.enumerate() {
            let (next, more) = if n + 1 < count { (n as u16 + 1, NEXT) } else { (0, 0) };
            let descriptor = Descriptor { address: segment.address, len: segment.len, flags: write | more, next };
            self.scratch.extend_from_slice(&descriptor.bytes());
        }
        let table = self.table(head);
        self.memory.write(table, &self.scratch);
        let len = self.scratch.len() as u32;
        self.write_descriptor(head, Descriptor { address: table, len, flags: INDIRECT, next: 0 });
        Ok(head)
    }

    /// Address of the table that indirect chains with head `head` use.
    pub fn table(&self, head: u16) -> u64 {
        self.tables + u64::from(head) * u64::from(self.options.table_entries) * DESCRIPTOR_BYTES as u64
    }

    fn push_available(&mut self, head: u16) {
        let place = self.next_available & (self.options.size - 1);
        self.memory.store_u16(self.available + 4 + 2 * u64::from(place), head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows the device all chains added since the last time, and kicks if it wants that.
    ///
    /// # Errors
    /// What signalling answers.
    pub fn publish(&mut self) -> Result<(), HarnessError> {
        if self.publish_silently() { self.kick() } else { Ok(()) }
    }

    /// Shows the device all chains added, without a kick; whether the device wants one.
    pub fn publish_silently(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        self.memory.store_u16(self.available + 2, new);
        self.published = new;
        // The index must be visible before we look whether the device sleeps; it does the same the other way round.
        fence(Ordering::SeqCst);
        match self.options.notifications {
            Notifications::EventIdx => {
                let event = self.memory.load_u16(self.used + 4 + 8 * u64::from(self.options.size));
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
            Notifications::Flags => self.memory.load_u16(self.used) & 1 == 0,
        }
    }

    /// Kicks the device, whether it wants that or not.
    ///
    /// # Errors
    /// What signalling answers.
    pub fn kick(&mut self) -> Result<(), HarnessError> {
        self.kicks += 1;
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).map_err(|e| HarnessError::io("kick", e))?;
        Ok(())
    }

    /// Asks not to be interrupted: the driver polls.
    pub fn suppress_calls(&mut self) {
        match self.options.notifications {
            // An event as far away as can be.
            Notifications::EventIdx => self.set_used_event(self.next_used.wrapping_sub(1)),
            Notifications::Flags => self.memory.store_u16(self.available, 1),
        }
    }

    /// Asks to be interrupted when the `after`-th chain from now is used (1 = the next; without EVENT_IDX at each);
    /// whether chains are used already, so that no interrupt may come.
    pub fn arm(&mut self, after: u16) -> bool {
        match self.options.notifications {
            Notifications::EventIdx => self.set_used_event(self.next_used.wrapping_add(after.max(1) - 1)),
            Notifications::Flags => self.memory.store_u16(self.available, 0),
        }
        fence(Ordering::SeqCst);
        self.has_used()
    }

    fn set_used_event(&self, index: u16) {
        self.memory.store_u16(self.available + 4 + 2 * u64::from(self.options.size), index);
    }

    /// Whether a used chain waits to be taken.
    pub fn has_used(&self) -> bool {
        self.memory.load_u16(self.used + 2) != self.next_used
    }

    /// The device's used index as it stands in memory.
    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(self.used + 2)
    }

    /// Takes the next used chain.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] for a head that is not in flight.
    pub fn take(&mut self) -> Result<Option<Used>, HarnessError> {
        if !self.has_used() {
            return Ok(None);
        }
        let place = u64::from(self.next_used & (self.options.size - 1));
        let mut entry = [0; 8];
        self.memory.read(self.used + 4 + 8 * place, &mut entry);
        self.next_used = self.next_used.wrapping_add(1);
        let id = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
        let len = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let flight = self.flights.get_mut(id as usize).and_then(Option::take);
        let flight = flight.ok_or_else(|| HarnessError::Violation(format!("used head {id} was not in flight")))?;
        self.in_flight -= 1;
        let mut place = id as u16;
        for _ in 0..flight.places {
            self.free.push(place);
            place = self.links[usize::from(place)];
        }
        Ok(Some(Used { head: id as u16, token: flight.token, len }))
    }

    /// Waits for an interrupt until a used chain can be taken; false when `patience` ended first.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] when a chain was used and no interrupt came; what waiting answers.
    pub fn wait(&mut self, patience: Duration) -> Result<bool, HarnessError> {
        let start = Instant::now();
        while !self.arm(1) {
            let left = patience.saturating_sub(start.elapsed());
            if !self.wait_call(left)? {
                return match self.has_used() {
                    true => Err(HarnessError::Violation("a chain was used without an interrupt".into())),
                    false => Ok(false),
                };
            }
        }
        Ok(true)
    }

    /// Waits for an interrupt and takes it; false when none came.
    ///
    /// # Errors
    /// What waiting answers.
    pub fn wait_call(&mut self, patience: Duration) -> Result<bool, HarnessError> {
        let came = wait_readable(&[self.call.as_fd()], patience)?;
        let _ = self.calls();
        Ok(came)
    }

    /// Writes descriptor `index` of the ring as it is.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.memory.write(self.descriptors + u64::from(index) * DESCRIPTOR_BYTES as u64, &descriptor.bytes());
    }

    /// Takes a place of the ring out of the free list, for descriptors the caller writes.
    ///
    /// # Errors
    /// [`HarnessError::Misuse`] when the ring is full.
    pub fn reserve(&mut self) -> Result<u16, HarnessError> {
        self.free.pop().ok_or_else(|| HarnessError::Misuse("ring full".into()))
    }

    /// Offers a head, in the ring or not, whose descriptors the caller has written. Its places, all reserved, are not
    /// given back when it is used.
    pub fn offer(&mut self, head: u16, token: u64) {
        if let Some(flight) = self.flights.get_mut(usize::from(head)) {
            self.in_flight += usize::from(flight.is_none());
            *flight = Some(Flight { token, places: 0 });
        }
        self.push_available(head);
    }

    /// Writes the available index as it is, and kicks.
    ///
    /// # Errors
    /// What signalling answers.
    pub fn force_available_index(&mut self, index: u16) -> Result<(), HarnessError> {
        self.memory.store_u16(self.available + 2, index);
        self.kick()
    }

    /// The number of the next available entry the driver will write: what a device that took everything reports as base.
    pub fn available_index(&self) -> u16 {
        self.published
    }
}

/// Waits until one of `fds` is readable; false when `patience` ended first.
///
/// # Errors
/// What `poll` answers.
pub fn wait_readable(fds: &[BorrowedFd<'_>], patience: Duration) -> Result<bool, HarnessError> {
    let start = Instant::now();
    loop {
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let left = patience.saturating_sub(start.elapsed());
        let limit = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut polled, Some(&limit)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(HarnessError::io("wait for an event", error)),
        }
    }
}

fn take_events(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}
