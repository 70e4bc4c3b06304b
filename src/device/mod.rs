//! The vhost-user-fs device: negotiation, vrings, descriptor chains, completions, reconnect.
//!
//! A transport of the FUSE server, as `host` is another. Knows nothing of file systems, images and configuration. One
//! connection at a time; the server, and with it node ids and session, outlives it.
//!
//! | file | holds |
//! |---|---|
//! | `vhost` | all that is of vhost-user-backend: the backend, the ring wrapper, one connection |
//! | `patience` | whether a worker stays awake |
//! | `ring` | the life of a ring: epochs, passes, fences, publishing |
//! | `state` | what is known of a ring and what that allows, changed under the ring's lock |
//! | `split` | the layout of a split virtqueue in guest memory |
//! | `chain` | descriptor chains to spans of guest memory, with limits |
//! | `slot` | the place of one reply, and the sink into guest memory |
//! | `worker` | the thread of a ring: batches of heads become requests |
//! | `direct` | for fuzzing: rings without a VMM and without threads |
//!
//! Invariants: every request with a reply area is answered exactly once, unless its ring was reset; nothing is written
//! to guest memory after the answer to a message that fences; a guest breaks its own ring at most.
//!
//! Lock order: a worker's buffers, `Shared::fences`, the state of a ring. The lock of a ring is never held over a copy.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

mod chain;
#[cfg(feature = "testing")]
pub mod direct;
mod patience;
mod ring;
mod slot;
mod split;
mod state;
mod vhost;
mod worker;

#[cfg(test)]
mod chain_tests;
#[cfg(test)]
#[cfg(feature = "testing")]
mod hostile_tests;
#[cfg(test)]
#[cfg(feature = "testing")]
mod life_tests;
#[cfg(test)]
#[cfg(feature = "model")]
mod model_tests;
#[cfg(test)]
#[cfg(feature = "testing")]
mod rig;
#[cfg(test)]
#[cfg(feature = "testing")]
mod serve_tests;

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::fuse::FileSystem;
use crate::fuse::server::Server;
use crate::limits::MAX_TAG_BYTES;
use crate::metrics::Metrics;
use vhost::Connection;
use worker::Requests;

/// How the device shows itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Request queues offered, 1 to [`crate::limits::MAX_REQUEST_QUEUES`]; the hiprio queue comes on top.
    pub request_queues: u16,
    /// The tag in the device's configuration space, 1 to 36 bytes, for a VMM that does not have its own.
    pub tag: Option<String>,
    /// What follows the end of a connection.
    pub after_disconnect: AfterDisconnect,
    /// How long the worker of a ring that ran dry stays awake at most, where that pays; zero: it always sleeps at once.
    pub awake: Duration,
}

impl Options {
    /// The tag as it stands in the configuration space.
    fn tag_bytes(&self) -> Option<[u8; MAX_TAG_BYTES]> {
        let tag = self.tag.as_ref()?;
        let mut bytes = [0; MAX_TAG_BYTES];
        for (place, byte) in bytes.iter_mut().zip(tag.bytes()) {
            *place = byte;
        }
        Some(bytes)
    }
}

/// What follows the end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterDisconnect {
    /// Wait for the next VMM.
    ListenAgain,
    /// [`serve`] returns.
    End,
}

/// Why the device cannot be served. Nothing a guest or a VMM does is among it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Waiting for a connection failed.
    #[error("cannot wait for a vhost-user connection")]
    Accept(#[source] io::Error),
    /// An event could not be made or watched.
    #[error("cannot watch an event")]
    Event(#[source] io::Error),
    /// The threads of a connection could not be started.
    #[error("cannot start serving a vhost-user connection: {0}")]
    Start(String),
    /// No watcher thread could be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// Ends [`serve`], from any thread, in every state. Cloned handles are one.
#[derive(Debug, Clone)]
pub struct Stop {
    event: Arc<OwnedFd>,
}

impl Stop {
    /// A handle that was not triggered.
    ///
    /// # Errors
    /// What `eventfd` answers.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: Arc::new(event()?) })
    }

    /// Makes [`serve`] return, now or as soon as it is called. Never blocks.
    pub fn trigger(&self) {
        notify(&self.event);
    }
}

fn event() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)
}

fn notify(event: &OwnedFd) {
    // A full counter says the same.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Serves `server` to one VMM after the other on `listener`, until `stop` is triggered, or the connection ended and
/// [`AfterDisconnect::End`] was asked for. Blocks.
///
/// # Errors
/// [`DeviceError`]: this machine has no descriptors or threads for another connection.
pub fn serve<F: FileSystem>(
    server: Arc<Server<F>>,
    listener: UnixListener,
    options: &Options,
    stop: &Stop,
    metrics: Arc<Metrics>,
) -> Result<(), DeviceError> {
    serve_requests(&server, &listener, options, stop, &metrics)
}

fn serve_requests<R: Requests>(
    requests: &Arc<R>,
    listener: &UnixListener,
    options: &Options,
    stop: &Stop,
    metrics: &Arc<Metrics>,
) -> Result<(), DeviceError> {
    // A passed listener may be non-blocking; accept follows a poll, and must not spin if somebody else was faster.
    listener.set_nonblocking(false).map_err(DeviceError::Accept)?;
    loop {
        tracing::info!("Waiting for vhost-user socket connection...");
        if wait_for_either(listener, &stop.event)? == First::Stop {
            return Ok(());
        }
        let connection = Connection::accept(Arc::clone(requests), options, Arc::clone(metrics), listener)?;
        tracing::info!("Client connected, servicing requests");
        see_through(connection, stop)?;
        tracing::info!("Client disconnected");
        if options.after_disconnect == AfterDisconnect::End {
            return Ok(());
        }
    }
}

/// Waits for the end of `connection`, which `stop` brings about if nothing else does.
fn see_through<R: Requests>(mut connection: Connection<R>, stop: &Stop) -> Result<(), DeviceError> {
    let over = event().map_err(DeviceError::Event)?;
    let hang_up = connection.hang_up();
    std::thread::scope(|scope| {
        let watcher = std::thread::Builder::new().name("vhost_stop".to_owned());
        let watch = || {
            // An error of poll ends the connection: better than one that cannot be stopped.
            if wait_for_either(&over, &stop.event).is_ok_and(|first| first == First::Other) {
                return;
            }
            hang_up();
        };
        watcher.spawn_scoped(scope, watch).map_err(DeviceError::Thread)?;
        connection.wait();
        notify(&over);
        Ok(())
    })
}

/// What woke [`wait_for_either`]; the stop if both did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    Other,
    Stop,
}

fn wait_for_either(other: &impl AsFd, stop: &OwnedFd) -> Result<First, DeviceError> {
    let mut fds = [PollFd::new(stop, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(DeviceError::Accept(error.into())),
        }
        let [stop, other] = &fds;
        if !stop.revents().is_empty() {
            return Ok(First::Stop);
        }
        if !other.revents().is_empty() {
            return Ok(First::Other);
        }
    }
}
