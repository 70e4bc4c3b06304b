//! Rings without a VMM and without threads: for fuzzing, where an input is guest memory and each costs microseconds.
//!
//! What is tested is what serves real guests: ring, chains, slots and the copies into guest memory. Only the messages
//! and the waiting for kicks are left out.

use std::sync::Arc;

use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::ring::Ring;
use super::ring::Shared;
use super::split::Events;
use super::worker::Worker;
use crate::fuse::FileSystem;
use crate::fuse::server::Server;
use crate::metrics::Metrics;
use crate::sys::guest::GuestMap;

/// Where a ring lies in guest memory, and what was negotiated for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingPlace {
    /// Descriptors.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Whether EVENT_IDX was negotiated.
    pub events: EventIdx,
}

/// Whether EVENT_IDX was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventIdx {
    /// Notifications by index.
    Negotiated,
    /// Notifications by flags.
    Absent,
}

/// What became of a ring that was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It offers nothing more, and so many requests of it wait for their data.
    Idle {
        /// Requests that were begun and not completed yet.
        in_flight: u32,
    },
    /// It said what cannot be, and is not looked at any more.
    Broken,
}

/// Guest memory and a server, as a device has them.
pub struct Direct<F: FileSystem> {
    server: Arc<Server<F>>,
    memory: GuestMemoryMmap<()>,
    shared: Arc<Shared>,
}

/// A ring that was begun. Dropping it is a reset: whatever is still in flight is not answered.
#[derive(Debug)]
pub struct DirectRing(Arc<Ring>);

impl<F: FileSystem> Direct<F> {
    /// A device for `server` in a guest with the memory `regions`: guest address and bytes, in order.
    ///
    /// # Panics
    /// When the memory cannot be had.
    pub fn new(server: Arc<Server<F>>, regions: &[(u64, usize)], metrics: Arc<Metrics>) -> Self {
        let regions: Vec<_> = regions.iter().map(|&(start, bytes)| (GuestAddress(start), bytes)).collect();
        let memory = GuestMemoryMmap::from_ranges(&regions).expect("memory for a small guest");
        let shared = Arc::new(Shared::new(metrics));
        let map = GuestMap::new(&memory, &GuestMap::default()).expect("a place for a small guest's memory");
        shared.map.store(Arc::new(map));
        Self { server, memory, shared }
    }

    /// Writes guest memory.
    ///
    /// # Panics
    /// When there is none at `address`.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("the caller writes inside the regions");
    }

    /// Reads guest memory.
    ///
    /// # Panics
    /// When there is none at `address`.
    pub fn read(&self, address: u64, out: &mut [u8]) {
        self.memory.read_slice(out, GuestAddress(address)).expect("the caller reads inside the regions");
    }

    /// Starts a ring, both of its indexes at 0, and serves all that it offers on this thread.
    pub fn serve(&self, place: &RingPlace) -> DirectRing {
        let ring = Arc::new(Ring::new(0, Arc::clone(&self.shared)));
        ring.set_addresses(place.descriptors, place.avail, place.used);
        ring.set_events(match place.events {
            EventIdx::Negotiated => Events::Index,
            EventIdx::Absent => Events::Flags,
        });
        // Whether the worker is to be woken does not matter: it runs below.
        let _ = (ring.set_size(place.size), ring.set_next_used(0), ring.set_next_avail(0));
        let _ = (ring.make_ready(), ring.enable());
        Worker::new(Arc::clone(&ring), std::time::Duration::ZERO).run(&*self.server, &[Arc::clone(&ring)]);
        DirectRing(ring)
    }
}

impl DirectRing {
    /// How the ring stands now.
    pub fn outcome(&self) -> Outcome {
        match self.0.in_flight() {
            Some(in_flight) => Outcome::Idle { in_flight },
            None => Outcome::Broken,
        }
    }
}

impl Drop for DirectRing {
    fn drop(&mut self) {
        self.0.reset();
    }
}
