//! The daemon within this process, as `daemon` wires it, over a backend that misbehaves on command.
//!
//! For tests and benches that need to hold a backend back while the device goes on, and to look at counters meanwhile.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::config::Config;
use crate::daemon::Parts;
use crate::daemon::Served;
use crate::daemon::assemble;
use crate::device;
use crate::device::AfterDisconnect;
use crate::device::DeviceError;
use crate::device::Stop;
use crate::limits::DEFAULT_AWAKE;
use crate::metrics::Metrics;
use crate::storage::backend::localfs;
use crate::storage::backend::localfs::LocalFs;
use crate::storage::pool::Pool;
use crate::testing::fault::Fault;
use crate::testing::fault::FaultBackend;
use crate::testing::image::TestImage;
use crate::vfs::ZeroMessageOpen;

/// One at a time, so that a test may count the daemon's threads.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const REQUEST_QUEUES: u16 = 2;

/// A daemon in this process.
pub struct Room {
    /// What the backend does.
    pub faults: Arc<FaultBackend>,
    /// What the daemon counts.
    pub metrics: Arc<Metrics>,
    /// Where it listens.
    pub socket: PathBuf,
    stop: Stop,
    ended: mpsc::Receiver<Result<(), DeviceError>>,
    thread: Option<JoinHandle<()>>,
    _served: Served,
    _alone: MutexGuard<'static, ()>,
}

/// What a [`Room`] serves, and where.
#[derive(Debug, Clone)]
pub struct Place {
    /// The image.
    pub image: TestImage,
    /// Directory of cache files.
    pub cache: PathBuf,
    /// Where it listens.
    pub socket: PathBuf,
    /// Which boot of the machine it believes in.
    pub boot_id: [u8; 16],
}

impl std::fmt::Debug for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Room").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Room {
    /// Serves an image, in threads that are bound to the processors of the calling one.
    ///
    /// # Errors
    /// What the daemon would refuse to start with.
    pub fn at(place: Place) -> Result<Self> {
        Self::silent_after(place, None)
    }

    /// Serves an image; the backend answers only so many requests, and then no more.
    ///
    /// # Errors
    /// What the daemon would refuse to start with.
    pub fn silent_after(place: Place, answers: Option<usize>) -> Result<Self> {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = Arc::new(Metrics::new(usize::from(REQUEST_QUEUES) + 1));
        let pool = Pool::new(2)?;
        let blobs = localfs::Place::Directories(vec![place.image.blobs.clone()]);
        let faults = FaultBackend::new(Arc::new(LocalFs::new(blobs, Arc::clone(&pool))), Arc::clone(&pool));
        if let Some(answers) = answers {
            (0..answers).for_each(|_| faults.once(Fault::None));
            faults.set(Fault::Hang);
        }

        let mut config = place.image.config(&place.cache);
        config["amplify_io"] = 0.into();
        // The backend that never answers is waited for without end.
        config["device"]["backend"]["config"]["demand_deadline"] = 0.into();
        let (config, warnings) = Config::parse(&config.to_string(), &place.cache)?;
        ensure!(warnings.is_empty(), "{warnings:?}");
        let parts = Parts {
            bootstrap: &place.image.bootstrap,
            config: &config,
            backend: faults.clone(),
            pool,
            boot_id: place.boot_id,
            zero_message_open: ZeroMessageOpen::WhereSafe,
            metrics: Arc::clone(&metrics),
        };
        let served = assemble(parts)?;
        let server = served.server();

        let socket = place.socket;
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let stop = Stop::new()?;
        let (told, ended) = mpsc::channel();
        let thread = std::thread::spawn({
            let (stop, metrics) = (stop.clone(), Arc::clone(&metrics));
            let after_disconnect = AfterDisconnect::ListenAgain;
            let tag = Some("nydus".to_owned());
            let options =
                device::Options { request_queues: REQUEST_QUEUES, tag, after_disconnect, awake: DEFAULT_AWAKE };
            move || {
                // Nobody listens when the test has failed already.
                let _ = told.send(device::serve(server, listener, &options, &stop, metrics));
            }
        });
        let thread = Some(thread);
        Ok(Self { faults, metrics, socket, stop, ended, thread, _served: served, _alone: alone })
    }

    /// Ends the device.
    ///
    /// # Errors
    /// It was not done within `patience`, or failed before.
    pub fn end(&mut self, patience: Duration) -> Result<()> {
        self.stop.trigger();
        self.ended.recv_timeout(patience).context("the device does not end")??;
        if let Some(thread) = self.thread.take() {
            // What it had to say came over the channel.
            let _ = thread.join();
        }
        Ok(())
    }

    /// Threads of the daemon, by their names.
    pub fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        let mut names: Vec<_> =
            names.filter(|n| ["storage", "vring", "vhost"].iter().any(|p| n.starts_with(p))).collect();
        names.sort();
        names
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            self.end(Duration::from_secs(10)).expect("a device that is told to end does");
        }
    }
}
