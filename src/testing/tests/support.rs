//! Daemons and images that many tests need.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::testing::fuse_client::EntryReply;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use nydus_vm::testing::make::noise;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::room::Place;
use nydus_vm::testing::room::Room;
use nydus_vm::testing::vmm::PATIENCE;
use rustix::process::Signal;
use tempfile::TempDir;

/// A guest with little memory, for tests that start many.
pub const SMALL: GuestOptions = GuestOptions { ring_size: 128, depth: 8, reply_bytes: 16 << 10, ..GuestOptions::LINUX };

/// Bytes of `/warm` in the demo image.
pub const WARM_BYTES: usize = 256 << 10;
/// Bytes of `/cold` in the demo image: more than 256 chunks.
pub const COLD_BYTES: usize = 300 * CHUNK_BYTES;
/// Bytes of a chunk in the demo image.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Files in `/dir` of the demo image.
pub const SMALL_FILES: usize = 200;

/// A directory of its own with an image built in it.
pub struct Demo {
    pub home: TempDir,
    pub image: TestImage,
}

impl Demo {
    /// `/warm`, `/cold`, `/dir/0` to `/dir/199`, `/link`.
    pub fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let tree = home.path().join("tree");
        fs::create_dir_all(tree.join("dir")).unwrap();
        fs::write(tree.join("warm"), Self::warm()).unwrap();
        fs::write(tree.join("cold"), Self::cold()).unwrap();
        for n in 0..SMALL_FILES {
            fs::write(tree.join("dir").join(n.to_string()), noise(&n.to_string(), 100 + n)).unwrap();
        }
        std::os::unix::fs::symlink("warm", tree.join("link")).unwrap();
        let folder = home.path().join("image");
        let made = make::image(&tree, &folder, Compressor::Zstd, Digester::Blake3, CHUNK_BYTES as u32);
        let image = TestImage::made("demo", made, &folder);
        Self { home, image }
    }

    pub fn warm() -> Vec<u8> {
        noise("warm", WARM_BYTES)
    }

    pub fn cold() -> Vec<u8> {
        noise("cold", COLD_BYTES)
    }

    pub fn path(&self) -> &Path {
        self.home.path()
    }

    /// The daemon in this process on this image, with a new cache.
    pub fn room(&self) -> Room {
        let (image, cache) = (self.image.clone(), self.path().join("room-cache"));
        Room::at(Place { image, cache, socket: socket(self.path()), boot_id: [7; 16] }).unwrap()
    }

    /// `nydusd` on this image.
    pub fn nydusd(&self, extra: &[&str]) -> DaemonProcess {
        nydusd(&self.image, self.path(), extra)
    }
}

/// Starts the built `nydusd` on `image`, with socket, cache, configuration and log in `home`, as documented.
pub fn nydusd(image: &TestImage, home: &Path, extra: &[&str]) -> DaemonProcess {
    let cache = home.join("cache");
    fs::create_dir_all(&cache).unwrap();
    nydusd_with(image, &image.config(&cache), home, extra)
}

/// As [`nydusd`], with this configuration.
pub fn nydusd_with(image: &TestImage, config: &serde_json::Value, home: &Path, extra: &[&str]) -> DaemonProcess {
    let file = home.join("config.json");
    fs::write(&file, config.to_string()).unwrap();
    let socket = socket(home);
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydusd"));
    command.arg("--config").arg(file).arg("--sock").arg(&socket).arg("--bootstrap").arg(&image.bootstrap);
    command.args(["--log-level", "info", "--rlimit-nofile", "0"]).args(extra);
    DaemonProcess::start(command, &socket, &home.join("log")).unwrap()
}

/// Where the daemons of `home` listen.
pub fn socket(home: &Path) -> PathBuf {
    home.join("vhost.sock")
}

/// Looks up `path` from the root.
pub fn find(guest: &mut Guest, path: &str) -> EntryReply {
    let mut entry = None;
    let mut node = 1;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        let body = guest.call(&Request::lookup(node, name.as_bytes())).unwrap().body().unwrap();
        let found = EntryReply::from_lookup(&body).unwrap();
        assert_ne!(found.node, 0, "{path} exists");
        node = found.node;
        entry = Some(found);
    }
    entry.unwrap()
}

/// Reads a file to its end, request by request.
pub fn read_file(guest: &mut Guest, entry: &EntryReply, step: u32) -> Vec<u8> {
    let mut content = Vec::new();
    loop {
        let request = Request::read(entry.node, 0, content.len() as u64, step);
        let body = guest.call(&request).unwrap().body().unwrap();
        if body.is_empty() {
            return content;
        }
        content.extend_from_slice(&body);
    }
}

/// Waits until something has happened.
#[track_caller]
pub fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The newest counters of storage that a daemon wrote to its log; asks for them first.
pub fn counters(daemon: &DaemonProcess) -> serde_json::Value {
    let seen = daemon.log().matches("counters: ").count();
    daemon.signal(Signal::USR1).unwrap();
    eventually("counters in the log", || {
        let log = daemon.log();
        log.matches("counters: ").count() > seen && log.ends_with('\n')
    });
    let log = daemon.log();
    let line = log.rsplit("counters: ").next().unwrap().lines().next().unwrap();
    serde_json::from_str::<serde_json::Value>(line).unwrap()["storage"].clone()
}
