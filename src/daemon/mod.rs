//! The composition root: configuration in, wired objects, serving, and an ordered end.
//!
//! The only place that knows all rooms. It decides nothing that another room could: it turns settings into arguments,
//! and refuses in one line what is configured and not built. Order of the start: signals blocked, log, configuration,
//! file limit (all by the caller of [`run`]), image, backend, store, socket, serving. The end takes them apart in the
//! opposite order, within [`crate::limits::SHUTDOWN`] whatever is under way.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Duration;

use tracing::debug;
use tracing::info;

use crate::config::Config;
use crate::device;
use crate::device::Stop;
use crate::metrics::Metrics;
use crate::storage::pool::Pool;
use crate::sys::machine::boot_id;

mod assembly;
mod backends;
pub mod bootstrap;
mod error;
pub mod logging;
pub mod open_files;
pub mod signals;
pub mod socket;
#[cfg(all(test, feature = "testing"))]
mod tests;

pub use crate::device::AfterDisconnect;
pub use crate::vfs::ZeroMessageOpen;
pub use assembly::Parts;
pub use assembly::Served;
pub use assembly::assemble;
use backends::Backends;
pub use backends::place_of;
pub use bootstrap::BootstrapError;
pub use error::DaemonError;
use signals::Signals;
use socket::Socket;

/// What a daemon serves, and where.
#[derive(Debug)]
pub struct Options {
    /// Where the VMM connects.
    pub endpoint: Endpoint,
    /// What follows when it has gone.
    pub after_disconnect: AfterDisconnect,
    /// Request queues offered.
    pub request_queues: u16,
    /// How long the worker of a dry ring stays awake at most.
    pub awake: Duration,
    /// Mount tag in the device's configuration space.
    pub tag: Option<String>,
    /// Whether guests open files without a message.
    pub zero_message_open: ZeroMessageOpen,
    /// The image's metadata, an absolute path.
    pub bootstrap: PathBuf,
    /// Where its blobs come from, and how it is served.
    pub config: Config,
}

/// Where the VMM connects.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket that is made at this path.
    Path(PathBuf),
    /// A listening socket that was there before us.
    Inherited(Socket),
}

/// Runs a daemon until a signal, or the end of its only connection, ends it.
///
/// # Errors
/// [`DaemonError`], each in one line with its causes.
pub fn run(options: Options, signals: Signals) -> Result<(), DaemonError> {
    let machine = |what| move |source| DaemonError::Machine { what, source };
    let stop = Stop::new().map_err(machine("make an event"))?;
    // One more than the request queues: hiprio.
    let metrics = Arc::new(Metrics::new(usize::from(options.request_queues) + 1));
    let socket_file = Arc::new(OnceLock::new());
    let targets =
        signals::Targets { stop: stop.clone(), metrics: Arc::clone(&metrics), socket: Arc::clone(&socket_file) };
    signals.serve(targets).map_err(machine("start the thread for signals"))?;

    let served = open(&options, &metrics)?;
    let socket = match options.endpoint {
        Endpoint::Path(path) => Socket::bind(&path)?,
        Endpoint::Inherited(socket) => socket,
    };
    if let Some(file) = socket.file() {
        // Set once, here.
        let _ = socket_file.set(file);
    }
    let listener = socket.listener().map_err(machine("listen"))?;
    let device = device::Options {
        request_queues: options.request_queues,
        tag: options.tag,
        after_disconnect: options.after_disconnect,
        awake: options.awake,
    };
    let outcome = device::serve(served.server(), listener, &device, &stop, Arc::clone(&metrics));
    if let Some(file) = socket_file.get() {
        file.remove();
    }
    drop(served);
    debug!("counters: {}", metrics.to_json());
    Ok(outcome?)
}

/// The image and all that is below it.
fn open(options: &Options, metrics: &Arc<Metrics>) -> Result<Served, DaemonError> {
    let config = &options.config;
    assembly::refuse_unbuilt(config)?;
    if let Some(backend) = &config.backend {
        info!("backend config: {}", backend.common_config());
    }
    let image = Arc::new(assembly::open_image(&options.bootstrap, config)?);
    let machine = |what| move |source| DaemonError::Machine { what, source };
    let pool = Pool::with_processors().map_err(machine("start the threads of storage"))?;
    let backends = Backends::open(config, image.blobs(), &options.bootstrap, &pool)?;
    let parts = Parts {
        bootstrap: &options.bootstrap,
        config,
        backend: backends.joined(),
        pool,
        boot_id: boot_id().map_err(machine("read the boot id of this machine"))?,
        zero_message_open: options.zero_message_open,
        metrics: Arc::clone(metrics),
    };
    let served = assembly::serve_image(image, parts)?;
    backends.check_blobs(&served)?;
    Ok(served)
}
