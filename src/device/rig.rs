//! A VMM and a guest driver for the device's own tests: real messages on a real socket, real rings in a shared memfd.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use vhost::VhostBackend;
use vhost::VhostUserMemoryRegionInfo;
use vhost::VringConfigData;
use vhost::vhost_user::Frontend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vm_memory::Bytes;
use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::AfterDisconnect;
use super::DeviceError;
use super::Options;
use super::Stop;
use super::serve_requests;
use super::slot::Slot;
use super::worker::Requests;
use crate::fuse::slot::ReplySlot;
use crate::limits::DEFAULT_AWAKE;
use crate::metrics::Metrics;

/// Bytes of guest memory, at guest address 0.
pub(super) const MEMORY: u64 = 64 << 20;
/// The VMM's own addresses of guest memory begin here.
const USER: u64 = 1 << 52;
/// Guest memory for each ring's areas.
const RING_AREA: u64 = 1 << 20;
/// From here on the test's buffers lie.
pub(super) const BUFFERS: u64 = 32 << 20;

pub(super) const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
pub(super) const PROTOCOL: u64 = 1 << 30;
pub(super) const EVENT_IDX: u64 = 1 << 29;

/// Opcodes of the double; INIT is FUSE's.
pub(super) const ECHO: u32 = 1000;
pub(super) const DATA: u32 = 1001;
pub(super) const PARK: u32 = 1002;
pub(super) const DROP: u32 = 1003;
pub(super) const PANIC: u32 = 1004;
/// Answered by another thread before the worker goes on.
pub(super) const LATE: u32 = 1005;
/// Answered once [`Double::hold`] is free.
pub(super) const HOLD: u32 = 1006;
pub(super) const FORGET: u32 = 2;
pub(super) const INIT: u32 = 26;

/// Answers as the opcode says, and parks what it is told to park.
#[derive(Default)]
pub(super) struct Double {
    pub(super) parked: Mutex<Vec<(u64, Slot)>>,
    pub(super) sessions: Mutex<u32>,
    pub(super) hold: Mutex<()>,
}

impl Double {
    /// Completes all that is parked with eight bytes of data, from this thread.
    pub(super) fn complete_all(&self) {
        let parked = std::mem::take(&mut *self.parked.lock().unwrap());
        for (unique, slot) in parked {
            slot.send_data(unique, |sink| sink.put_bytes(b"complete").map(|()| 8).map_err(|_| Errno::IO));
        }
    }

    pub(super) fn wait_for_parked(&self, count: usize) {
        until("requests are parked", || self.parked.lock().unwrap().len() == count);
    }
}

impl Requests for Double {
    fn is_init(&self, head: &[u8]) -> bool {
        opcode(head) == INIT
    }

    fn handle(&self, head: &[u8], readable_bytes: usize, slot: Slot) {
        let unique = head.get(8..16).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap()));
        match opcode(head) {
            FORGET => slot.send_nothing(),
            PARK => self.parked.lock().unwrap().push((unique, slot)),
            DROP => drop(slot),
            HOLD => {
                let _free = self.hold.lock().unwrap();
                slot.fail(Errno::IO);
            }
            LATE => std::thread::spawn(move || drop(slot)).join().unwrap(),
            PANIC => panic!("a request that panics, as the test wants it"),
            DATA => {
                let want = slot.capacity() - 16;
                slot.send_data(unique, move |sink| {
                    let bytes: Vec<u8> = (0..want).map(|i| (i % 251) as u8).collect();
                    sink.put_bytes(&bytes).map(|()| want).map_err(|_| Errno::IO)
                });
            }
            op => {
                if op == INIT {
                    *self.sessions.lock().unwrap() += 1;
                }
                let body = (readable_bytes as u64).to_le_bytes();
                if slot.capacity() < 24 {
                    return slot.fail(Errno::RANGE);
                }
                let header = [&24u32.to_le_bytes()[..], &[0; 4], &unique.to_le_bytes()].concat();
                slot.send(&[&header, &body]);
            }
        }
    }
}

fn opcode(head: &[u8]) -> u32 {
    head.get(4..8).map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap()))
}

/// Waits, at most ten seconds.
pub(super) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(10), "waited too long until {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What the device's thread logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A device that is being served.
pub(super) struct Device {
    pub(super) double: Arc<Double>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stop: Stop,
    log: Log,
    path: PathBuf,
    _dir: tempfile::TempDir,
    thread: Option<JoinHandle<Result<(), DeviceError>>>,
}

impl Device {
    pub(super) const OPTIONS: Options =
        Options { request_queues: 2, tag: None, after_disconnect: AfterDisconnect::ListenAgain, awake: DEFAULT_AWAKE };

    pub(super) fn start() -> Self {
        Self::with(Self::OPTIONS)
    }

    pub(super) fn with(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (double, stop) = (Arc::new(Double::default()), Stop::new().unwrap());
        let metrics = Arc::new(Metrics::new(usize::from(options.request_queues) + 1));
        let log = Log::default();
        let thread = std::thread::spawn({
            let (double, stop, metrics, log) = (Arc::clone(&double), stop.clone(), Arc::clone(&metrics), log.clone());
            move || {
                let writer = tracing_subscriber::fmt().with_ansi(false).with_writer(move || log.clone());
                tracing::subscriber::with_default(writer.finish(), || {
                    serve_requests(&double, &listener, &options, &stop, &metrics)
                })
            }
        });
        Self { double, metrics, stop, log, path, _dir: dir, thread: Some(thread) }
    }

    pub(super) fn connect(&self) -> Vmm {
        Vmm::new(UnixStream::connect(&self.path).unwrap())
    }

    /// Lines of the log so far that contain `text`.
    pub(super) fn logged(&self, text: &str) -> usize {
        let log = self.log.0.lock().unwrap();
        String::from_utf8_lossy(&log).lines().filter(|line| line.contains(text)).count()
    }

    /// Triggers the stop; how long the device took to end.
    pub(super) fn end(&mut self) -> Duration {
        let began = Instant::now();
        self.stop.trigger();
        self.join();
        began.elapsed()
    }

    pub(super) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end();
        }
    }
}

/// A VMM with its guest.
pub(super) struct Vmm {
    pub(super) frontend: Frontend,
    pub(super) memory: Arc<GuestMemoryMmap<()>>,
    file: File,
    pub(super) features: u64,
}

impl Vmm {
    fn new(stream: UnixStream) -> Self {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY as usize, Some(offset))]);
        let frontend = Frontend::from_stream(stream, 64);
        Self { frontend, memory: Arc::new(memory.unwrap()), file, features: FEATURES }
    }

    /// What a VMM does before the driver is there.
    pub(super) fn negotiate(&mut self, features: u64) {
        self.features = features;
        let offered = self.frontend.get_features().unwrap();
        assert_eq!(offered & features, features);
        let protocol = self.frontend.get_protocol_features().unwrap();
        self.frontend.set_protocol_features(protocol).unwrap();
        self.frontend.set_owner().unwrap();
        self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.frontend.set_features(features).unwrap();
    }

    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The pages of guest memory are gone; touching them is SIGBUS.
    pub(super) fn truncate_memory(&self) {
        self.file.set_len(0).unwrap();
    }

    pub(super) fn share_memory(&self) {
        self.frontend.set_mem_table(&[self.region()]).unwrap();
    }

    /// Features, memory and the rings `indexes`, each started and enabled.
    pub(super) fn boot(&mut self, indexes: &[usize]) -> Vec<Driver> {
        self.negotiate(FEATURES);
        self.share_memory();
        indexes.iter().map(|index| self.start_ring(*index, 64)).collect()
    }

    /// A fresh driver for a ring of `size`, with its areas zeroed.
    pub(super) fn driver(&self, index: usize, size: u16) -> Driver {
        Driver::new(index, size, Arc::clone(&self.memory), self.features & EVENT_IDX != 0)
    }

    pub(super) fn start_ring(&mut self, index: usize, size: u16) -> Driver {
        let driver = self.driver(index, size);
        self.set_up(&driver, 0);
        self.enable(&driver, true);
        driver
    }

    /// The messages of QEMU for one ring, without ENABLE and CALL.
    pub(super) fn set_up(&self, driver: &Driver, base: u16) {
        let index = driver.index;
        self.frontend.set_vring_num(index, driver.size).unwrap();
        self.frontend.set_vring_base(index, base).unwrap();
        self.frontend.set_vring_addr(index, &driver.addresses()).unwrap();
        self.frontend.set_vring_err(index, &driver.err).unwrap();
        self.frontend.set_vring_kick(index, &driver.kick).unwrap();
    }

    pub(super) fn enable(&mut self, driver: &Driver, enabled: bool) {
        self.frontend.set_vring_enable(driver.index, enabled).unwrap();
        if enabled {
            self.frontend.set_vring_call(driver.index, &driver.call).unwrap();
        }
    }
}

/// A guest's driver of one ring.
pub(super) struct Driver {
    pub(super) index: usize,
    pub(super) size: u16,
    memory: Arc<GuestMemoryMmap<()>>,
    event_idx: bool,
    next_descriptor: u16,
    pub(super) avail: u16,
    pub(super) seen: u16,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    pub(super) err: EventFd,
}

/// A descriptor as a test writes it down.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Driver {
    fn new(index: usize, size: u16, memory: Arc<GuestMemoryMmap<()>>, event_idx: bool) -> Self {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (kick, call, err) = (event(), event(), event());
        let driver = Self { index, size, memory, event_idx, next_descriptor: 0, avail: 0, seen: 0, kick, call, err };
        driver.memory.write_slice(&vec![0; RING_AREA as usize], GuestAddress(driver.base())).unwrap();
        driver
    }

    fn base(&self) -> u64 {
        RING_AREA * (self.index as u64 + 1)
    }

    fn avail_ring(&self) -> u64 {
        self.base() + (600 << 10)
    }

    pub(super) fn used_ring(&self) -> u64 {
        self.base() + (700 << 10)
    }

    pub(super) fn addresses(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER + self.base(),
            used_ring_addr: USER + self.used_ring(),
            avail_ring_addr: USER + self.avail_ring(),
            log_addr: None,
        }
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(super) fn write_descriptor(&self, table: u64, index: u16, raw: Raw) {
        let word = u128::from(raw.address)
            | u128::from(raw.len) << 64
            | u128::from(raw.flags) << 96
            | u128::from(raw.next) << 112;
        self.write(table + 16 * u64::from(index), &word.to_le_bytes());
    }

    pub(super) fn put(&self, index: u16, raw: Raw) {
        self.write_descriptor(self.base(), index, raw);
    }

    /// Makes `head` available, without a kick.
    pub(super) fn offer(&mut self, head: u16) {
        self.place(head);
        self.show(self.avail);
    }

    /// Puts `head` into the available ring, without showing it.
    fn place(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.write(self.avail_ring() + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
    }

    pub(super) fn show(&self, index: u16) {
        let address = GuestAddress(self.avail_ring() + 2);
        self.memory.store(index, address, std::sync::atomic::Ordering::SeqCst).unwrap();
    }

    /// Interrupts for every completion, or for none.
    pub(super) fn want_interrupts(&self, wanted: bool) {
        let flags: u16 = if wanted { 0 } else { 1 };
        self.write(self.avail_ring(), &flags.to_le_bytes());
    }

    pub(super) fn set_used_event(&self, event: u16) {
        assert!(self.event_idx);
        self.write(self.avail_ring() + 4 + 2 * u64::from(self.size), &event.to_le_bytes());
    }

    pub(super) fn used_index(&self) -> u16 {
        self.memory.load(GuestAddress(self.used_ring() + 2), std::sync::atomic::Ordering::SeqCst).unwrap()
    }

    /// The kick flag or event of the device.
    pub(super) fn kick_event(&self) -> u16 {
        let offset = if self.event_idx { 4 + 8 * u64::from(self.size) } else { 0 };
        self.memory.read_obj(GuestAddress(self.used_ring() + offset)).unwrap()
    }

    pub(super) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The used entries that are new.
    pub(super) fn poll(&mut self) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        while self.seen != self.used_index() {
            let slot = u64::from(self.seen % self.size);
            let entry = self.read(self.used_ring() + 4 + 8 * slot, 8);
            let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
            entries.push((number(&entry[..4]), number(&entry[4..])));
            self.seen = self.seen.wrapping_add(1);
        }
        entries
    }

    pub(super) fn wait(&mut self, count: usize) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        until("the device completed", || {
            entries.extend(self.poll());
            entries.len() >= count
        });
        entries
    }

    /// Offers a request of `opcode` with a reply area of `reply_bytes` behind its own buffer; returns its head.
    pub(super) fn submit(&mut self, opcode: u32, unique: u64, reply_bytes: u32) -> u16 {
        let head = self.prepare(opcode, unique, reply_bytes);
        self.show(self.avail);
        head
    }

    /// [`Self::submit`] without showing it yet: `show(avail)` shows all at once.
    pub(super) fn prepare(&mut self, opcode: u32, unique: u64, reply_bytes: u32) -> u16 {
        let head = self.next_descriptor;
        self.next_descriptor = (head + 2) % self.size;
        let buffer = self.buffer(head);
        self.write(buffer, &request(opcode, unique, &[]));
        let next = (head + 1) % self.size;
        self.put(head, Raw { address: buffer, len: 40, flags: 1, next });
        self.put(next, Raw { address: buffer + 4096, len: reply_bytes, flags: 2, next: 0 });
        self.write(buffer + 4096, &[0xee; 64]);
        self.place(head);
        head
    }

    pub(super) fn buffer(&self, head: u16) -> u64 {
        BUFFERS + (self.index as u64) * (8 << 20) + u64::from(head) * (64 << 10) % (8 << 20)
    }

    /// The reply of the request at `head`: (len, error, unique).
    pub(super) fn reply(&self, head: u16) -> (u32, i32, u64) {
        parse(&self.read(self.buffer(head) + 4096, 16))
    }

    /// One request from offer to reply.
    pub(super) fn call(&mut self, opcode: u32, unique: u64, reply_bytes: u32) -> (u32, (u32, i32, u64)) {
        let head = self.submit(opcode, unique, reply_bytes);
        self.kick();
        let used = self.wait(1);
        assert_eq!(used[0].0, u32::from(head));
        (used[0].1, self.reply(head))
    }
}

pub(super) fn parse(bytes: &[u8]) -> (u32, i32, u64) {
    (
        u32::from_le_bytes(bytes[..4].try_into().unwrap()),
        i32::from_le_bytes(bytes[4..8].try_into().unwrap()),
        u64::from_le_bytes(bytes[8..16].try_into().unwrap()),
    )
}

/// A request: `struct fuse_in_header` and what follows.
pub(super) fn request(opcode: u32, unique: u64, arguments: &[u8]) -> Vec<u8> {
    let len = 40 + arguments.len() as u32;
    let mut bytes = [&len.to_le_bytes()[..], &opcode.to_le_bytes(), &unique.to_le_bytes(), &[0; 24]].concat();
    bytes.extend_from_slice(arguments);
    bytes
}
