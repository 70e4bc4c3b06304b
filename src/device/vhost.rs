//! Everything of vhost-user-backend 0.24: its traits over our rings, and one connection from accept to the last thread.
//!
//! The library's daemon, control thread and epoll loops serve us. Its own rings do not: [`Vring`] keeps one of them as
//! a *mirror*, which holds the kick descriptor and the two flags that the library looks at, and passes everything to
//! our [`Ring`]. The library never touches guest memory. No error of a guest leaves `handle_event` or `read_kick`: it
//! would end the worker for good.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use rustix::event::EventfdFlags;
use vhost::vhost_user::Backend as BackChannel;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost_user_backend::VhostUserBackend;
use vhost_user_backend::VhostUserDaemon;
use vhost_user_backend::VringEpollHandler;
use vhost_user_backend::VringMutex;
use vhost_user_backend::VringStateGuard;
use vhost_user_backend::VringStateMutGuard;
use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::Error as QueueError;
use vm_memory::GuestAddressSpace;
use vm_memory::GuestMemoryAtomic;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::EventConsumer;
use vmm_sys_util::event::EventNotifier;

use super::DeviceError;
use super::Options;
use super::ring::Ring;
use super::ring::Shared;
use super::ring::Wake;
use super::split::Events;
use super::worker::Requests;
use super::worker::Worker;
use crate::limits::MAX_RING_SIZE;
use crate::limits::MAX_TAG_BYTES;
use crate::metrics::Metrics;
use crate::sys::guest::GuestMap;
use crate::sys::handover::ForgottenFd;
use crate::sys::handover::exit_event;

/// Guest memory as the library holds it. No dirty bitmap: LOG_ALL is not offered.
type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

thread_local! {
    /// The rings that the library's constructor is about to ask for, and the wrappers it got. It calls
    /// [`VringT::new`] once for each ring, in order, on the thread that makes the daemon, and gives it nothing else
    /// to know them by.
    static CRADLE: RefCell<(Vec<Arc<Ring>>, Vec<Vring>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

type Unwatch = Box<dyn Fn(RawFd) + Send + Sync>;

/// A ring as vhost-user-backend wants it.
#[derive(Clone)]
struct Vring {
    ring: Arc<Ring>,
    mirror: VringMutex<Memory>,
    /// Wakes the worker when the ring must be looked at without a kick.
    doorbell: Arc<OwnedFd>,
    /// Takes a descriptor out of what the worker watches.
    unwatch: Arc<OnceLock<Unwatch>>,
}

impl Vring {
    fn wake(&self, wake: Wake) {
        if wake == Wake::Worker {
            self.ring_doorbell();
        }
    }

    fn ring_doorbell(&self) {
        // A full counter says the same.
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
    }

    /// RESET_DEVICE: the kick goes too, so that the next one starts the ring. The descriptors for calls and errors
    /// stay: a VMM may send them once for a connection.
    fn reset(&self) {
        self.ring.reset();
        self.mirror.set_queue_ready(false);
        self.mirror.set_kick(None);
    }
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = <VringMutex<Memory> as VringStateGuard<'a, Memory>>::G;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = <VringMutex<Memory> as VringStateMutGuard<'a, Memory>>::G;
}

impl VringT<Memory> for Vring {
    fn new(memory: Memory, _: u16) -> Result<Self, QueueError> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let doorbell = rustix::event::eventfd(0, flags).map_err(|_| QueueError::QueueNotReady)?;
        CRADLE.with_borrow_mut(|(waiting, made)| {
            let ring = waiting.get(made.len()).map(Arc::clone).ok_or(QueueError::QueueNotReady)?;
            // The mirror's own queue is never used: any size will do.
            let mirror = VringMutex::new(memory, 1)?;
            let vring = Self { ring, mirror, doorbell: Arc::new(doorbell), unwatch: Arc::default() };
            made.push(vring.clone());
            Ok(vring)
        })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.mirror.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.mirror.get_mut()
    }

    /// Rings of ours publish by themselves; nobody calls this.
    fn add_used(&self, _: u16, _: u32) -> Result<(), QueueError> {
        Err(QueueError::QueueNotReady)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        Ok(false)
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        Ok(())
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        Ok(false)
    }

    fn set_enabled(&self, enabled: bool) {
        self.mirror.set_enabled(enabled);
        if enabled {
            let wake = self.ring.enable();
            self.wake(wake);
        } else {
            self.ring.disable();
        }
    }

    fn set_queue_info(&self, descriptors: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        // Alignment is the guest's matter and looked at when the ring starts: an error here would cost the connection.
        self.ring.set_addresses(descriptors, avail, used);
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        let wake = self.ring.set_next_avail(base);
        self.wake(wake);
    }

    fn set_queue_next_used(&self, index: u16) {
        let wake = self.ring.set_next_used(index);
        self.wake(wake);
    }

    /// An index that cannot be read (not aligned) is 0: such a ring does not start anyway.
    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        Ok(self.ring.used_index().unwrap_or(0))
    }

    fn set_queue_size(&self, size: u16) {
        let wake = self.ring.set_size(size);
        self.wake(wake);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.ring.set_events(if enabled { Events::Index } else { Events::Flags });
    }

    fn set_queue_ready(&self, ready: bool) {
        self.mirror.set_queue_ready(ready);
        if ready {
            let wake = self.ring.make_ready();
            self.wake(wake);
        } else {
            self.ring.stop();
        }
    }

    fn set_kick(&self, file: Option<File>) {
        if let Some(file) = &file {
            // A kick may be gone when it is read (another descriptor took its place); waiting for the next one would
            // block the worker. Every VMM makes its events non-blocking anyway.
            let _ = rustix::io::ioctl_fionbio(file, true);
        }
        let replaced = self.mirror.get_ref().get_kick().as_ref().map(AsRawFd::as_raw_fd);
        if let (Some(old), Some(_)) = (replaced, &file) {
            // The VMM still has the old event open, so it would stay watched, unread and ready for ever. Not ready
            // makes the library watch the new one.
            if let Some(unwatch) = self.unwatch.get() {
                unwatch(old);
            }
            self.mirror.set_queue_ready(false);
        }
        self.mirror.set_kick(file);
    }

    fn read_kick(&self) -> io::Result<bool> {
        if self.mirror.read_kick().is_ok()
            && let Some(counters) = self.ring.counters()
        {
            counters.kicks.add(1);
        }
        Ok(self.ring.is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        self.ring.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.ring.set_err(file);
    }
}

/// The device as vhost-user-backend sees it, for one connection.
struct Backend<R: Requests> {
    requests: Arc<R>,
    shared: Arc<Shared>,
    rings: Vec<Arc<Ring>>,
    vrings: OnceLock<Vec<Vring>>,
    workers: Vec<Mutex<Worker>>,
    tag: Option<[u8; MAX_TAG_BYTES]>,
    /// Exit events that the library forgets to close.
    forgotten: Mutex<Vec<ForgottenFd>>,
    /// Kept open while the connection lasts: QEMU takes its end for an error.
    back_channel: Mutex<Option<BackChannel>>,
    /// The driver set its features: a VMM with shared memory has told about it, or is about to.
    driver_came: AtomicBool,
    memory_came: AtomicBool,
}

impl<R: Requests> Backend<R> {
    fn new(requests: Arc<R>, options: &Options, metrics: Arc<Metrics>) -> Self {
        let shared = Arc::new(Shared::new(metrics));
        let count = usize::from(options.request_queues).saturating_add(1);
        let rings: Vec<_> = (0..count).map(|index| Arc::new(Ring::new(index, Arc::clone(&shared)))).collect();
        let workers = rings.iter().map(|ring| Mutex::new(Worker::new(Arc::clone(ring), options.awake))).collect();
        Self {
            requests,
            shared,
            rings,
            vrings: OnceLock::new(),
            workers,
            tag: options.tag_bytes(),
            forgotten: Mutex::default(),
            back_channel: Mutex::default(),
            driver_came: AtomicBool::new(false),
            memory_came: AtomicBool::new(false),
        }
    }

    /// Ends all work for this connection: parked requests are dropped, guest memory and descriptors are let go.
    fn disconnect(&self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        for ring in &self.rings {
            ring.disconnect();
        }
        self.shared.map.store(Arc::default());
        self.back_channel.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn close_forgotten(&self) {
        let mut forgotten = self.forgotten.lock().unwrap_or_else(PoisonError::into_inner);
        forgotten.drain(..).for_each(ForgottenFd::close);
    }

    /// Whether the connection ended because the VMM has not shared the guest's memory: the driver is there, and memory
    /// is not, or a ring lies outside of it.
    fn lacks_shared_memory(&self, error: &str) -> bool {
        let none = self.driver_came.load(Ordering::Relaxed) && !self.memory_came.load(Ordering::Relaxed);
        none || error.contains("Missing memory mapping")
    }
}

impl<R: Requests> VhostUserBackend for Backend<R> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.rings.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_RING_SIZE)
    }

    fn features(&self) -> u64 {
        let bits = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX];
        let virtio = bits.iter().fold(0, |all, bit| all | 1u64.checked_shl(*bit).unwrap_or(0));
        virtio | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        tracing::debug!(features = format_args!("{features:#x}"), "features are set");
        self.driver_came.store(true, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let always = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::RESET_DEVICE;
        match self.tag {
            // QEMU 7.1 to 8.0 crash when a file system device offers its configuration.
            None => always,
            Some(_) => always | VhostUserProtocolFeatures::CONFIG,
        }
    }

    fn reset_device(&self) {
        tracing::debug!("device reset");
        for vring in self.vrings.get().into_iter().flatten() {
            vring.reset();
        }
    }

    /// Told to each ring, see [`VringT::set_queue_event_idx`].
    fn set_event_idx(&self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let request_queues = u32::try_from(self.rings.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let mut config = self.tag.unwrap_or([0; MAX_TAG_BYTES]).to_vec();
        config.extend_from_slice(&request_queues.to_le_bytes());
        // What lies behind (`notify_buf_size`) belongs to a feature that is not offered, and reads as zeros.
        config.resize(config.len().max((offset as usize).saturating_add(size as usize).min(256)), 0);
        let from = (offset as usize).min(config.len());
        let to = from.saturating_add(size as usize).min(config.len());
        config.get(from..to).unwrap_or_default().to_vec()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        let map = GuestMap::new(&memory.memory(), &self.shared.map.load()).map_err(io::Error::other)?;
        self.shared.map.store(Arc::new(map));
        for ring in &self.rings {
            ring.fence();
        }
        self.memory_came.store(true, Ordering::Relaxed);
        // A ring may lie in a region that was not there before.
        for vring in self.vrings.get().into_iter().flatten().filter(|vring| vring.ring.is_live()) {
            vring.ring_doorbell();
        }
        Ok(())
    }

    fn set_backend_req_fd(&self, channel: BackChannel) {
        *self.back_channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
    }

    /// A thread for each ring.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.rings.len()).map(|index| 1u64.checked_shl(index as u32).unwrap_or(0)).collect()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        match exit_event() {
            Ok((consumer, notifier, forgotten)) => {
                self.forgotten.lock().unwrap_or_else(PoisonError::into_inner).push(forgotten);
                Some((consumer, notifier))
            }
            Err(error) => {
                tracing::error!(%error, "no event to end a worker with");
                None
            }
        }
    }

    fn handle_event(&self, event: u16, _: EventSet, _: &[Vring], thread: usize) -> io::Result<()> {
        if usize::from(event) > self.rings.len()
            && let Some(vring) = self.vrings.get().and_then(|vrings| vrings.get(thread))
        {
            let _ = rustix::io::read(&vring.doorbell, &mut [0; 8]);
        }
        if let Some(worker) = self.workers.get(thread) {
            worker.lock().unwrap_or_else(PoisonError::into_inner).run(&*self.requests, &self.rings);
        }
        Ok(())
    }
}

/// One connection of a VMM, from accept to the last of its threads.
pub(super) struct Connection<R: Requests> {
    backend: Arc<Backend<R>>,
    daemon: Option<VhostUserDaemon<Arc<Backend<R>>>>,
}

impl<R: Requests> Connection<R> {
    /// Takes the next connection of `listener`, which has one, and starts the threads that serve it.
    ///
    /// # Errors
    /// [`DeviceError`]: no descriptor or thread to be had, or the connection could not be taken.
    pub(super) fn accept(
        requests: Arc<R>,
        options: &Options,
        metrics: Arc<Metrics>,
        listener: &UnixListener,
    ) -> Result<Self, DeviceError> {
        let backend = Arc::new(Backend::new(requests, options, metrics));
        // From here on `Drop` cleans up.
        let mut connection = Self { backend: Arc::clone(&backend), daemon: None };
        CRADLE.replace((backend.rings.clone(), Vec::new()));
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let made = VhostUserDaemon::new("vhost_user".to_owned(), Arc::clone(&backend), memory);
        let (_, vrings) = CRADLE.take();
        let daemon = connection.daemon.insert(made.map_err(|error| DeviceError::Start(error.to_string()))?);
        watch_doorbells(&daemon.get_epoll_handlers(), &vrings).map_err(DeviceError::Event)?;
        assert!(backend.vrings.set(vrings).is_ok(), "they are set here only");
        let mut listener = Listener::from(listener.try_clone().map_err(DeviceError::Accept)?);
        daemon.start(&mut listener).map_err(|error| DeviceError::Start(error.to_string()))?;
        Ok(connection)
    }

    /// Something that ends the connection from another thread.
    pub(super) fn hang_up(&self) -> impl Fn() + Send + 'static {
        let handle = self.daemon.as_ref().and_then(VhostUserDaemon::shutdown_handle);
        move || {
            if let Some(handle) = &handle {
                handle.shutdown();
            }
        }
    }

    /// Waits until the VMM or [`Self::hang_up`] ends the connection, and says why if that was an error.
    pub(super) fn wait(&mut self) {
        let Some(daemon) = self.daemon.as_mut() else { return };
        let Err(error) = daemon.wait() else { return };
        use vhost::vhost_user::Error as Protocol;
        use vhost_user_backend::Error::HandleRequest;
        if matches!(error, HandleRequest(Protocol::Disconnected | Protocol::PartialMessage)) {
            return;
        }
        let error = error.to_string();
        if self.backend.lacks_shared_memory(&error) {
            tracing::error!(
                "guest memory is not shared with this device ({error}); QEMU: -object memory-backend-memfd,id=mem,\
                 size=SIZE,share=on -numa node,memdev=mem; cloud-hypervisor: --memory size=SIZE,shared=on"
            );
        } else {
            tracing::warn!(error, "the connection ended");
        }
    }
}

impl<R: Requests> Drop for Connection<R> {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon.as_mut() {
            // The control thread has ended by now, unless setting up the rest of the connection failed.
            daemon.request_shutdown();
            let _ = daemon.wait();
        }
        self.backend.disconnect();
        // Joins the workers, which return at once: the rings are closed.
        drop(self.daemon.take());
        self.backend.close_forgotten();
    }
}

/// Makes each worker listen to the doorbell of its ring, and each ring able to take a kick out of its worker's watch.
fn watch_doorbells<R: Requests>(
    handlers: &[Arc<VringEpollHandler<Arc<Backend<R>>>>],
    vrings: &[Vring],
) -> io::Result<()> {
    // The first number behind the rings and the library's own.
    let data = vrings.len().saturating_add(1) as u64;
    for (handler, vring) in handlers.iter().zip(vrings) {
        handler.register_listener(vring.doorbell.as_raw_fd(), EventSet::IN, data)?;
        // Weak: the handler holds the ring.
        let handler: Weak<_> = Arc::downgrade(handler);
        let unwatch: Unwatch = Box::new(move |fd| {
            if let Some(handler) = handler.upgrade() {
                // Not watched is fine too.
                let _ = handler.unregister_listener(fd, EventSet::IN, data);
            }
        });
        assert!(vring.unwatch.set(unwatch).is_ok(), "it is set here only");
    }
    Ok(())
}
