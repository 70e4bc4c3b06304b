//! QEMU's monitor (QMP): commands with an answer, and events. Source: QEMU's `docs/interop/qmp-spec.rst`.

use std::io::BufRead;
use std::io::BufReader;
use std::io::ErrorKind;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use serde_json::Value;
use serde_json::json;

/// For an answer of QEMU itself; under load it takes its time.
const ANSWER: Duration = Duration::from_secs(30);
/// How often a wait looks at its deadline.
const TICK: Duration = Duration::from_millis(100);

/// A monitor connection.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects to the monitor at `path` and leaves its negotiation mode.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(TICK))?;
        let mut monitor = Self { stream: BufReader::new(stream), events: Vec::new() };
        let greeting = monitor.message(Instant::now() + ANSWER)?;
        ensure!(greeting.get("QMP").is_some(), "QEMU greets with {greeting}");
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command; fails with QEMU's words where it refuses.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let mut message = self.message(deadline)?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(error) = message.get("error") {
                bail!("{line}: {error}");
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Waits for an event that `is_wanted`; others before it are forgotten.
    pub fn event(&mut self, patience: Duration, is_wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + patience;
        loop {
            let next = match self.events.is_empty() {
                true => self.message(deadline)?,
                false => self.events.remove(0),
            };
            if is_wanted(&next) {
                return Ok(next);
            }
        }
    }

    fn message(&mut self, deadline: Instant) -> Result<Value> {
        let mut line = Vec::new();
        loop {
            match self.stream.read_until(b'\n', &mut line) {
                Ok(_) if line.ends_with(b"\n") => return Ok(serde_json::from_slice(&line)?),
                Ok(_) => bail!("QEMU's monitor is closed"),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
            ensure!(Instant::now() < deadline, "QEMU's monitor says nothing in time");
        }
    }
}
