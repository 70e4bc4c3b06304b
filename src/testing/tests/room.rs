//! The daemon within the test's own process, as `daemon` wires it, over a backend that misbehaves on command.

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

use nydus_vm::config::Config;
use nydus_vm::daemon::Parts;
use nydus_vm::daemon::Served;
use nydus_vm::daemon::assemble;
use nydus_vm::device;
use nydus_vm::device::AfterDisconnect;
use nydus_vm::device::DeviceError;
use nydus_vm::device::Stop;
use nydus_vm::limits::DEFAULT_AWAKE;
use nydus_vm::metrics::Metrics;
use nydus_vm::storage::backend::localfs;
use nydus_vm::storage::backend::localfs::LocalFs;
use nydus_vm::storage::pool::Pool;
use nydus_vm::testing::fault::Fault;
use nydus_vm::testing::fault::FaultBackend;
use nydus_vm::testing::image::TestImage;
use nydus_vm::vfs::ZeroMessageOpen;

use crate::support::Demo;
use crate::support::socket;

/// One at a time, so that a test may count the daemon's threads.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const REQUEST_QUEUES: u16 = 2;

/// A daemon in this process.
pub struct Room {
    /// What the backend does.
    pub faults: Arc<FaultBackend>,
    /// What the daemon counts.
    pub metrics: Arc<Metrics>,
    pub socket: PathBuf,
    stop: Stop,
    ended: mpsc::Receiver<Result<(), DeviceError>>,
    thread: Option<JoinHandle<()>>,
    _served: Served,
    _alone: MutexGuard<'static, ()>,
}

/// What a [`Room`] serves, and where.
pub struct Place {
    pub image: TestImage,
    /// Directory of cache files.
    pub cache: PathBuf,
    pub socket: PathBuf,
    /// Which boot of the machine it believes in.
    pub boot_id: [u8; 16],
}

impl Room {
    /// Serves the image of `demo`, with a new cache.
    pub fn new(demo: &Demo) -> Self {
        let (image, cache) = (demo.image.clone(), demo.path().join("room-cache"));
        Self::at(Place { image, cache, socket: socket(demo.path()), boot_id: [7; 16] })
    }

    /// Serves an image.
    pub fn at(place: Place) -> Self {
        Self::silent_after(place, None)
    }

    /// Serves an image; the backend answers only so many requests, and then no more.
    pub fn silent_after(place: Place, answers: Option<usize>) -> Self {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = Arc::new(Metrics::new(usize::from(REQUEST_QUEUES) + 1));
        let pool = Pool::new(2).unwrap();
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
        let (config, warnings) = Config::parse(&config.to_string(), &place.cache).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let parts = Parts {
            bootstrap: &place.image.bootstrap,
            config: &config,
            backend: faults.clone(),
            pool,
            boot_id: place.boot_id,
            zero_message_open: ZeroMessageOpen::WhereSafe,
            metrics: Arc::clone(&metrics),
        };
        let served = assemble(parts).unwrap();
        let server = served.server();

        let socket = place.socket;
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let stop = Stop::new().unwrap();
        let (told, ended) = mpsc::channel();
        let thread = std::thread::spawn({
            let (stop, metrics) = (stop.clone(), Arc::clone(&metrics));
            let after_disconnect = AfterDisconnect::ListenAgain;
            let options =
                device::Options { request_queues: REQUEST_QUEUES, tag: None, after_disconnect, awake: DEFAULT_AWAKE };
            move || {
                // Nobody listens when the test has failed already.
                let _ = told.send(device::serve(server, listener, &options, &stop, metrics));
            }
        });
        let thread = Some(thread);
        Self { faults, metrics, socket, stop, ended, thread, _served: served, _alone: alone }
    }

    /// Ends the device; whether it was done within `patience`.
    pub fn end(&mut self, patience: Duration) -> bool {
        self.stop.trigger();
        let ended = self.ended.recv_timeout(patience);
        if let Ok(result) = ended {
            result.unwrap();
            self.thread.take().unwrap().join().unwrap();
            return true;
        }
        false
    }

    /// Threads of the daemon, by their names.
    pub fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
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
            assert!(self.end(Duration::from_secs(10)), "the device does not end");
        }
    }
}
