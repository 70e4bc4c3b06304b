//! A daemon under test as a process of its own: started, watched through `/proc`, ended.

use std::fs;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use rustix::process::Pid;
use rustix::process::Signal;

use super::error::HarnessError;
use super::vmm::PATIENCE;
use crate::sys::machine;

/// A running daemon. Dropping it kills it and whatever it started.
#[derive(Debug)]
pub struct DaemonProcess {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl DaemonProcess {
    /// Starts `command` with its output in the file `log` (appended), and waits until somebody listens at `socket`.
    ///
    /// # Errors
    /// What starting answers; [`HarnessError::Timeout`] when nobody listens, with the end of the log.
    pub fn start(mut command: Command, socket: &Path, log: &Path) -> Result<Self, HarnessError> {
        let open = || File::options().create(true).append(true).open(log);
        let output = open().map_err(|e| HarnessError::io(format!("open {}", log.display()), e))?;
        let errors = output.try_clone().map_err(|e| HarnessError::io("share the log", e))?;
        // A group of its own: some daemons fork, and all of it must end with us.
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        let child = command.spawn().map_err(|e| HarnessError::io(format!("start {command:?}"), e))?;
        let mut daemon = Self { child, socket: socket.to_path_buf(), log: log.to_path_buf() };
        let start = Instant::now();
        while !is_listening(socket) {
            let ended = daemon.child.try_wait().map_err(|e| HarnessError::io("look at the daemon", e))?;
            if ended.is_some() || start.elapsed() > PATIENCE {
                let what = format!("listening at {} ({ended:?}), log: {}", socket.display(), daemon.log_tail());
                return Err(HarnessError::Timeout { what, waited: start.elapsed() });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(daemon)
    }

    /// The socket the daemon was to listen at.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Number of the process that was started.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the daemon has printed.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(8)..].join(" | ")
    }

    /// Sends a signal to the daemon.
    ///
    /// # Errors
    /// What `kill` answers.
    pub fn signal(&self, signal: Signal) -> Result<(), HarnessError> {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).map_err(|e| HarnessError::io(format!("signal {signal:?}"), e))
    }

    /// Whether the daemon still runs.
    ///
    /// # Errors
    /// What `waitpid` answers.
    pub fn is_running(&mut self) -> Result<bool, HarnessError> {
        Ok(self.child.try_wait().map_err(|e| HarnessError::io("look at the daemon", e))?.is_none())
    }

    /// Waits until the daemon has ended.
    ///
    /// # Errors
    /// [`HarnessError::Timeout`] after `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus, HarnessError> {
        let start = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if start.elapsed() > patience => {
                    return Err(HarnessError::Timeout { what: "the daemon's end".into(), waited: patience });
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(HarnessError::io("wait for the daemon", error)),
            }
        }
    }

    /// Kills the daemon and its children at once (SIGKILL) and takes its end.
    pub fn kill(&mut self) {
        // A group that is gone already is what we want.
        let _ = rustix::process::kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }

    /// The daemon and all its descendants.
    pub fn pids(&self) -> Vec<u32> {
        let mut all = vec![self.pid()];
        let mut next = 0;
        while next < all.len() {
            let tasks = fs::read_dir(format!("/proc/{}/task", all[next])).into_iter().flatten().flatten();
            for task in tasks {
                let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
            }
            next += 1;
        }
        all
    }

    /// Processor time used so far, user and system, in microseconds, by the threads that live.
    pub fn cpu_us(&self) -> u64 {
        self.pids().into_iter().map(|pid| cpu_us(pid).unwrap_or(0)).sum()
    }

    /// Private memory in bytes.
    pub fn private_bytes(&self) -> u64 {
        self.pids().into_iter().map(|pid| machine::private_bytes(pid).unwrap_or(0)).sum()
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        self.pids().into_iter().map(|pid| count(&format!("/proc/{pid}/fd"))).sum()
    }

    /// Threads.
    pub fn threads(&self) -> usize {
        self.pids().into_iter().map(|pid| count(&format!("/proc/{pid}/task"))).sum()
    }

    /// Binds all threads of the daemon, and those it makes later, to processors `cpus`.
    ///
    /// # Errors
    /// What `sched_setaffinity` answers.
    pub fn pin(&self, cpus: &[usize]) -> Result<(), HarnessError> {
        for pid in self.pids() {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for task in tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()) {
                pin(Pid::from_raw(task), cpus)?;
            }
        }
        Ok(())
    }
}

impl Drop for DaemonProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Binds a thread (`None`: the calling one) to processors `cpus`.
///
/// # Errors
/// What `sched_setaffinity` answers.
pub fn pin(thread: Option<Pid>, cpus: &[usize]) -> Result<(), HarnessError> {
    let mut set = rustix::thread::CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu));
    match rustix::thread::sched_setaffinity(thread, &set) {
        // A thread that has ended since it was listed.
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(HarnessError::io(format!("bind to processors {cpus:?}"), error)),
    }
}

fn count(directory: &str) -> usize {
    fs::read_dir(directory).map_or(0, Iterator::count)
}

/// Time on a processor of all threads that live, to the nanosecond where the kernel keeps it (`schedstat`). A tick of
/// `/proc/<pid>/stat` is 10 ms, too coarse for what ends soon.
fn cpu_us(pid: u32) -> io::Result<u64> {
    let mut total_ns = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let Ok(stat) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        total_ns += stat.split_whitespace().next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(total_ns / 1000)
}

/// Whether a listening socket exists at `path`, seen without connecting: a connection would count as a VMM.
fn is_listening(path: &Path) -> bool {
    // Flags 00010000 (SO_ACCEPTCON) mark listeners.
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.nth(3) == Some("00010000") && fields.nth(3).is_some_and(|at| Path::new(at) == path)
    })
}
