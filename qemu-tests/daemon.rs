//! The daemon under test, as a process of its own.

use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use serde_json::Value;
use tempfile::TempDir;

use crate::image::Image;
use crate::peer;
use crate::peer::peer;

/// From the daemon's start to its listening socket, and from a signal to what it causes. The daemon needs
/// milliseconds; a machine under load does not.
const PATIENCE: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(10);

/// A running daemon that serves one image; dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    directory: TempDir,
}

impl Daemon {
    /// Starts it and waits until its socket listens.
    pub fn start(image: &Image) -> Result<Self> {
        Self::start_with(image, &[])
    }

    /// As [`Daemon::start`], with more options of ours.
    pub fn start_with(image: &Image, options: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("vhost-user-fs.sock");
        let mut command = match peer() {
            Some(peer) => peer::command(peer.as_os_str(), image.source()?, &socket),
            None => {
                let cache = directory.path().join("cache");
                std::fs::create_dir(&cache)?;
                let config = directory.path().join("config.json");
                std::fs::write(&config, configuration(image.blobs(), &cache))?;
                let mut command = Command::new(env!("CARGO_BIN_EXE_nydusd"));
                command.arg("--config").arg(config).arg("--sock").arg(&socket);
                command.arg("--bootstrap").arg(image.bootstrap()).args(["--log-level", "info"]).args(options);
                command
            }
        };
        let log = File::create(directory.path().join("daemon.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        let mut daemon = Self { child, directory };
        daemon.await_socket()?;
        Ok(daemon)
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("vhost-user-fs.sock")
    }

    fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the daemon ended with {status}\n{}", self.log()),
        }
    }

    /// The counters, written by the daemon as one JSON line at SIGUSR1.
    pub fn counters(&mut self) -> Result<Counters> {
        let lines = |text: &str| text.lines().filter(|line| line.contains(r#""requests":"#)).count();
        let before = lines(&self.log());
        self.signal(Signal::USR1)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let log = self.log();
            if lines(&log) > before && log.ends_with('\n') {
                let line = log.lines().rfind(|line| line.contains(r#""requests":"#)).expect("one was just counted");
                // A prefix with time and level may stand before the JSON.
                let start = line.find('{').with_context(|| format!("no JSON in {line:?}"))?;
                return Ok(Counters(serde_json::from_str(&line[start..]).with_context(|| line.to_owned())?));
            }
            self.check_alive()?;
            std::thread::sleep(TICK);
        }
        bail!("no counters after SIGUSR1\n{}", self.log())
    }

    /// SIGTERM; fails where the daemon has ended before, or does not end in time and with success.
    pub fn stop(mut self) -> Result<()> {
        if peer().is_some() {
            // Peers end with their connection, and killed by the signal.
            return Ok(());
        }
        self.check_alive()?;
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the daemon ended with {status}\n{}", self.log());
                return Ok(());
            }
            std::thread::sleep(TICK);
        }
        bail!("the daemon does not end after SIGTERM\n{}", self.log())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    fn log(&self) -> String {
        let bytes = std::fs::read(self.directory.path().join("daemon.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn await_socket(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if listens(&self.socket())? {
                return Ok(());
            }
            self.check_alive()?;
            std::thread::sleep(TICK);
        }
        bail!("the daemon does not listen\n{}", self.log())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Best effort: after `stop` it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the daemon counted.
#[derive(Debug)]
pub struct Counters(Value);

impl Counters {
    /// FUSE requests of all kinds.
    pub fn requests(&self) -> Result<u64> {
        self.0["requests"].as_u64().context("requests")
    }

    /// Requests taken from each ring, hiprio first.
    pub fn requests_by_queue(&self) -> Result<Vec<u64>> {
        let queues = self.0["queues"].as_array().context("queues")?;
        queues.iter().map(|queue| queue["requests"].as_u64().context("requests of a queue")).collect()
    }
}

fn configuration(blobs: &Path, cache: &Path) -> String {
    serde_json::json!({
        "device": {
            "backend": { "type": "localfs", "config": { "dir": blobs } },
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        },
        "mode": "direct",
        "digest_validate": false,
        "iostats_files": false,
        "enable_xattr": true,
    })
    .to_string()
}

/// Whether a unix socket at `path` listens: flag `__SO_ACCEPTCON` of /proc/net/unix. A connection to find out would
/// be taken for a VMM.
fn listens(path: &Path) -> Result<bool> {
    let name = path.display().to_string();
    let table = std::fs::read_to_string("/proc/net/unix")?;
    Ok(table.lines().any(|line| line.ends_with(&name) && line.split_whitespace().nth(3) == Some("00010000")))
}
