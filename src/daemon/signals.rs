//! Signals of the daemon: SIGTERM and SIGINT end it, SIGUSR1 writes the counters to the log.
//!
//! SIGPIPE is ignored by the Rust runtime before `main`; SIGBUS belongs to `sys::guard`.

use std::io;
use std::process;
use std::sync::Arc;
use std::sync::OnceLock;
use std::thread;

use tracing::info;
use tracing::warn;

use super::socket::SocketFile;
use crate::device::Stop;
use crate::limits::ORDERED_SHUTDOWN;
use crate::metrics::Metrics;
use crate::sys::signals::Blocked;

/// The signals of the daemon, blocked in all threads that are made after it.
pub struct Signals(Blocked);

/// What the signals act on.
pub(super) struct Targets {
    pub(super) stop: Stop,
    pub(super) metrics: Arc<Metrics>,
    /// Set once there is one: removed also when the ordered end takes too long.
    pub(super) socket: Arc<OnceLock<Arc<SocketFile>>>,
}

impl Signals {
    /// Blocks the signals. To be called before the first thread is made.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn block() -> io::Result<Self> {
        Blocked::new(&[libc::SIGTERM, libc::SIGINT, libc::SIGUSR1]).map(Self)
    }

    /// Acts on the signals in a thread of its own, for as long as the process lives.
    ///
    /// # Errors
    /// No thread can be made.
    pub(super) fn serve(self, targets: Targets) -> io::Result<()> {
        thread::Builder::new().name("signals".to_owned()).spawn(move || self.run(&targets)).map(drop)
    }

    fn run(&self, targets: &Targets) {
        loop {
            match self.0.wait() {
                Ok(libc::SIGUSR1) => info!("counters: {}", targets.metrics.to_json()),
                Ok(signal) => end(targets, signal),
                Err(error) => warn!(%error, "cannot wait for signals"),
            }
        }
    }
}

/// Asks the daemon to end. Whatever keeps it from doing so (a disk that does not answer, above all), the process is
/// gone in time: the cache on disk is right at every moment, so nothing is lost by leaving.
fn end(targets: &Targets, signal: i32) {
    info!(signal, "ending");
    targets.stop.trigger();
    thread::sleep(ORDERED_SHUTDOWN);
    warn!("ending now, though work is still under way");
    if let Some(socket) = targets.socket.get() {
        socket.remove();
    }
    process::exit(0);
}
