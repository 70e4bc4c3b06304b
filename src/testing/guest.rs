//! The fake guest: a VMM, memory and queues put together, with a mounted FUSE session.

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use super::driver::Chains;
use super::driver::Notifications;
use super::driver::Queue;
use super::driver::QueueOptions;
use super::driver::wait_readable;
use super::error::HarnessError;
use super::fuse_client::InitReply;
use super::fuse_client::Request;
use super::fuse_client::init_flag;
use super::lane::Done;
use super::lane::Lane;
use super::lane::LaneOptions;
use super::lane::Mode;
use super::lane::Reply;
use super::memory::Backing;
use super::memory::GuestMemory;
use super::memory::HUGE_PAGE_BYTES;
use super::orders::Order;
use super::orders::Start;
use super::orders::Vmm;
use super::vmm::feature;

/// Region of guest memory with the rings and small requests.
pub const RINGS: usize = 0;
/// Region of guest memory with the slots of requests: a test can take it away from the daemon.
pub const SLOTS: usize = 1;
/// Region that the guest of [`GuestOptions::spare_bytes`] has beside: not told to the daemon, and used by tests only.
pub const SPARE: usize = 2;

/// What a fake guest is like.
#[derive(Debug, Clone, Copy)]
pub struct GuestOptions {
    /// The VMM it runs on.
    pub order: Order,
    /// Request queues beside hiprio.
    pub request_queues: u16,
    /// Entries of each ring.
    pub ring_size: u16,
    /// How chains lie in the ring.
    pub chains: Chains,
    /// How notifications are asked for.
    pub notifications: Notifications,
    /// How completions are noticed.
    pub mode: Mode,
    /// Requests in flight per queue.
    pub depth: usize,
    /// Bytes of the largest reply body.
    pub reply_bytes: u32,
    /// Bytes of a segment of the paged part of a reply.
    pub segment_bytes: u32,
    /// What its memory is made of.
    pub backing: Backing,
    /// Bytes of region [`SPARE`], a multiple of 2 MiB.
    pub spare_bytes: u64,
    /// What [`SPARE`] is made of.
    pub spare_backing: Backing,
}

impl GuestOptions {
    /// A QEMU guest with one request queue, indirect chains, EVENT_IDX and interrupts, 16 requests in flight.
    pub const LINUX: Self = Self {
        order: Order::Qemu,
        request_queues: 1,
        ring_size: 1024,
        chains: Chains::Indirect,
        notifications: Notifications::EventIdx,
        mode: Mode::Event,
        depth: 16,
        reply_bytes: 1 << 20,
        segment_bytes: 4096,
        backing: Backing::Pages,
        spare_bytes: 0,
        spare_backing: Backing::Pages,
    };

    /// Virtio features that the guest's driver takes.
    pub fn features(&self) -> u64 {
        let indirect = if self.chains == Chains::Indirect { feature::INDIRECT_DESC } else { 0 };
        let event_idx = if self.notifications == Notifications::EventIdx { feature::EVENT_IDX } else { 0 };
        feature::VERSION_1 | indirect | event_idx
    }
}

/// A guest connected to a daemon.
#[derive(Debug)]
pub struct Guest {
    options: GuestOptions,
    socket: PathBuf,
    memory: Arc<GuestMemory>,
    vmm: Vmm,
    lanes: Vec<Lane>,
}

impl Guest {
    /// Connects to `socket` and starts all rings; no FUSE session yet.
    ///
    /// # Errors
    /// What the daemon refuses or fails to do.
    pub fn start(socket: &Path, options: &GuestOptions) -> Result<Self, HarnessError> {
        let mut guest = Self::connect(socket, options)?;
        guest.start_rings(&[])?;
        Ok(guest)
    }

    /// Connects to `socket` and mounts.
    ///
    /// # Errors
    /// What the daemon refuses or fails to do.
    pub fn boot(socket: &Path, options: &GuestOptions) -> Result<Self, HarnessError> {
        let mut guest = Self::start(socket, options)?;
        guest.mount()?;
        Ok(guest)
    }

    /// Connects to `socket`; no ring is started.
    ///
    /// # Errors
    /// What the daemon refuses or fails to do.
    pub fn connect(socket: &Path, options: &GuestOptions) -> Result<Self, HarnessError> {
        let rings = options.request_queues + 1;
        let memory = Arc::new(GuestMemory::backed(&Self::layout(options))?);
        let vmm = Vmm::connect(socket, options.order, Arc::clone(&memory), rings)?;
        let lane = |ring: u16| {
            let segments = options.reply_bytes.div_ceil(options.segment_bytes) as u16;
            let queue = QueueOptions {
                size: options.ring_size,
                chains: options.chains,
                notifications: options.notifications,
                table_entries: segments + 8,
            };
            let queue = Queue::new(Arc::clone(&memory), RINGS, queue)?;
            let slots = LaneOptions {
                depth: options.depth,
                request_bytes: REQUEST_BYTES,
                reply_bytes: if ring == 0 { 4096 } else { options.reply_bytes },
                segment_bytes: options.segment_bytes,
                mode: options.mode,
            };
            let mut lane = Lane::new(queue, Arc::clone(&memory), SLOTS, slots, 2 + (u64::from(ring) << 48))?;
            if options.mode == Mode::Poll {
                lane.queue().suppress_calls();
            }
            Ok(lane)
        };
        let lanes = (0..rings).map(lane).collect::<Result<Vec<_>, HarnessError>>()?;
        Ok(Self { options: *options, socket: socket.to_path_buf(), memory, vmm, lanes })
    }

    fn layout(options: &GuestOptions) -> Vec<(u64, u64, Backing)> {
        let rings = u64::from(options.request_queues) + 1;
        let entries = u64::from(options.reply_bytes.div_ceil(options.segment_bytes)) + 8;
        let ring_bytes = u64::from(options.ring_size) * (16 * entries + 16 + 16) + (64 << 10);
        let slot_bytes = u64::from(REQUEST_BYTES) + 8192 + u64::from(options.reply_bytes);
        let slots = rings * options.depth as u64 * slot_bytes + SCRATCH_BYTES;
        // Two regions with a hole between, as on a PC with memory above 4 GiB.
        let whole = |bytes: u64| bytes.next_multiple_of(HUGE_PAGE_BYTES);
        let mut layout =
            vec![(0, whole(rings * ring_bytes), options.backing), (1 << 32, whole(slots), options.backing)];
        if options.spare_bytes > 0 {
            layout.push((1 << 40, options.spare_bytes, options.spare_backing));
        }
        layout
    }

    /// Starts `rings` (all, if empty) as the VMM does at DRIVER_OK, from where the driver's indices stand.
    ///
    /// # Errors
    /// What the daemon refuses or fails to do.
    pub fn start_rings(&mut self, rings: &[u16]) -> Result<(), HarnessError> {
        let starts: Vec<_> = (0..self.lanes.len() as u16)
            .filter(|index| rings.is_empty() || rings.contains(index))
            .map(|index| {
                let queue = self.lanes[usize::from(index)].ring();
                Start { index, queue, base: queue.used_index() }
            })
            .collect();
        self.vmm.start(self.options.features(), &[RINGS, SLOTS], &starts)
    }

    /// Starts all rings again from `bases`, as QEMU does after `stop` at `cont`.
    ///
    /// # Errors
    /// What the daemon refuses or fails to do.
    pub fn continue_rings(&mut self, bases: &[u16]) -> Result<(), HarnessError> {
        let starts: Vec<_> = (0u16..)
            .zip(&self.lanes)
            .zip(bases)
            .map(|((index, lane), base)| Start { index, queue: lane.ring(), base: *base })
            .collect();
        self.vmm.start(self.options.features(), &[RINGS, SLOTS], &starts)
    }

    /// Stops all rings as QEMU does; their bases.
    ///
    /// # Errors
    /// What the daemon refuses or fails to do.
    pub fn stop(&mut self) -> Result<Vec<u16>, HarnessError> {
        self.vmm.stop(&self.rings())
    }

    /// Indices of all rings.
    pub fn rings(&self) -> Vec<u16> {
        (0..self.lanes.len() as u16).collect()
    }

    /// Resets the guest without a word to the file system: rings stopped as the VMM does it, made new, started; no FUSE
    /// session.
    ///
    /// # Errors
    /// What the daemon refuses or fails to do.
    pub fn reboot(&mut self) -> Result<(), HarnessError> {
        let rings = self.rings();
        self.vmm.reset(&rings)?;
        self.forget_rings();
        self.start_rings(&[])
    }

    /// Makes all rings new on the guest's side only.
    pub fn forget_rings(&mut self) {
        for lane in &mut self.lanes {
            lane.reset();
            if self.options.mode == Mode::Poll {
                lane.queue().suppress_calls();
            }
        }
    }

    /// Sends the INIT of a Linux 6.12 guest.
    ///
    /// # Errors
    /// What the daemon refuses or fails to do.
    pub fn mount(&mut self) -> Result<InitReply, HarnessError> {
        let reply = self.call(&Request::init(41, init_flag::LINUX_6_12))?;
        InitReply::parse(&reply.body()?, 41)
    }

    /// Sends one request on the first request queue and waits for its reply.
    ///
    /// # Errors
    /// As [`Lane::call`].
    pub fn call(&mut self, request: &Request) -> Result<Reply, HarnessError> {
        self.lanes[1].call(request)
    }

    /// Waits for a completion on any queue; the queue's index and the completion.
    ///
    /// # Errors
    /// [`HarnessError::Timeout`] after `patience`, [`HarnessError::Violation`] when the daemon broke a rule.
    pub fn wait_any(&mut self, patience: Duration) -> Result<(usize, Done), HarnessError> {
        let start = Instant::now();
        loop {
            for (index, lane) in self.lanes.iter_mut().enumerate() {
                if let Some(done) = lane.complete()? {
                    return Ok((index, done));
                }
            }
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(HarnessError::Timeout { what: "a completion".into(), waited: patience });
            }
            match self.options.mode {
                Mode::Poll => std::thread::yield_now(),
                Mode::Event => self.sleep(left)?,
            }
        }
    }

    /// Sleeps until a queue interrupts, or has used a chain already; at most for `patience`.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] when a chain was used and no interrupt came; what waiting answers.
    pub fn sleep(&mut self, patience: Duration) -> Result<(), HarnessError> {
        let used = self.lanes.iter_mut().map(|lane| lane.queue().arm(1)).filter(|used| *used).count();
        if used == 0 {
            let calls: Vec<_> = self.lanes.iter().map(|lane| lane.ring().call_fd()).collect();
            let came = wait_readable(&calls, patience)?;
            if !came && self.lanes.iter().any(|lane| lane.ring().has_used()) {
                return Err(HarnessError::Violation("a chain was used without an interrupt".into()));
            }
        }
        for lane in &mut self.lanes {
            lane.queue().calls();
        }
        Ok(())
    }

    /// Queue `index`; 0 is hiprio.
    pub fn lane(&mut self, index: usize) -> &mut Lane {
        &mut self.lanes[index]
    }

    /// All queues.
    pub fn lanes(&mut self) -> &mut [Lane] {
        &mut self.lanes
    }

    /// The VMM.
    pub fn vmm(&mut self) -> &mut Vmm {
        &mut self.vmm
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// What the guest is like.
    pub fn options(&self) -> &GuestOptions {
        &self.options
    }

    /// The socket it is connected to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Guest memory for what a test builds itself, in the region of the slots.
    ///
    /// # Errors
    /// [`HarnessError::Misuse`] when no more is left.
    pub fn scratch(&self, len: u64) -> Result<u64, HarnessError> {
        self.memory.allocate(SLOTS, len, 64)
    }
}

/// Bytes of the largest request of a [`Guest`]: an xattr value of 64 KiB fits.
const REQUEST_BYTES: u32 = 72 << 10;
/// Bytes of guest memory set aside for [`Guest::scratch`].
const SCRATCH_BYTES: u64 = 16 << 20;
