//! The log: `[2026-11-23 15:49:45.239071 +00:00] INFO text field=value` on stderr or in a file that is put aside by size.
//!
//! Other levels than info name the place in the source, as upstream's do. Every call site has a budget
//! ([`crate::limits::LOG_BURST`]), because a guest can trigger some of them without end; what was left out is counted in
//! the next line that is written. Lines of other crates come through the `log` facade and share one budget per level.

mod budget;
mod file;
mod line;

use std::env;
use std::io;
use std::io::IsTerminal;
use std::io::Write;
use std::panic;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::SystemTime;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;

use file::LogFile;
use line::Line;

/// What is logged, and where.
#[derive(Debug)]
pub struct Options {
    /// The least important level; the variable `RUST_LOG`, where set, says it in more detail.
    pub level: LevelFilter,
    /// The file; `None`: stderr. ".log" is added when it has no extension.
    pub file: Option<PathBuf>,
    /// Size at which the file is put aside; 0: never.
    pub rotate_bytes: u64,
}

/// Where lines go.
#[derive(Debug)]
enum Output {
    Stderr,
    File(Mutex<LogFile>),
}

static OUTPUT: OnceLock<Output> = OnceLock::new();

/// Opens the log, for the whole process and once: a second call changes nothing. Panics of any thread are lines too.
///
/// # Errors
/// The file cannot be opened; the error names it.
pub fn install(options: &Options) -> io::Result<()> {
    let output = match &options.file {
        None => Output::Stderr,
        Some(path) => Output::File(Mutex::new(LogFile::open(path, options.rotate_bytes)?)),
    };
    let colour = matches!(output, Output::Stderr) && io::stderr().is_terminal();
    if OUTPUT.set(output).is_err() {
        return Ok(());
    }
    let lines = tracing_subscriber::fmt::layer().event_format(Line::new()).with_ansi(colour).with_writer(Lines);
    let detail = env::var("RUST_LOG").ok().and_then(|text| EnvFilter::try_new(text).ok());
    let installed = match detail {
        Some(filter) => tracing::subscriber::set_global_default(Registry::default().with(lines.with_filter(filter))),
        None => tracing::subscriber::set_global_default(Registry::default().with(lines.with_filter(options.level))),
    };
    if installed.is_ok() && log::set_logger(&Bridge).is_ok() {
        log::set_max_level(as_log_level(LevelFilter::current()));
    }
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        tracing::error!("thread {} panicked: {panic}", thread.name().unwrap_or("without name"));
        default(panic);
    }));
    Ok(())
}

/// Whether the log goes to a file, so that stderr does not show it.
pub fn is_in_file() -> bool {
    matches!(OUTPUT.get(), Some(Output::File(_)))
}

/// Makes writers for whole lines.
struct Lines;

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Box<dyn Write + 'a>;

    fn make_writer(&'a self) -> Self::Writer {
        match OUTPUT.get() {
            Some(Output::File(file)) => Box::new(Locked(file.lock().unwrap_or_else(PoisonError::into_inner))),
            Some(Output::Stderr) | None => Box::new(io::stderr()),
        }
    }
}

struct Locked<'a>(MutexGuard<'a, LogFile>);

impl Write for Locked<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write_line(line).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Target of lines that other crates write.
const DEPENDENCY: &str = "dependency";

/// Carries lines of the `log` facade, which rust-vmm's crates use, into ours.
struct Bridge;

impl log::Log for Bridge {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let (from, text) = (record.target(), record.args());
        match record.level() {
            log::Level::Error => tracing::error!(target: DEPENDENCY, from, "{text}"),
            log::Level::Warn => tracing::warn!(target: DEPENDENCY, from, "{text}"),
            log::Level::Info => tracing::info!(target: DEPENDENCY, from, "{text}"),
            log::Level::Debug => tracing::debug!(target: DEPENDENCY, from, "{text}"),
            log::Level::Trace => tracing::trace!(target: DEPENDENCY, from, "{text}"),
        }
    }

    fn flush(&self) {}
}

fn as_log_level(level: LevelFilter) -> log::LevelFilter {
    match level {
        LevelFilter::OFF => log::LevelFilter::Off,
        LevelFilter::ERROR => log::LevelFilter::Error,
        LevelFilter::WARN => log::LevelFilter::Warn,
        LevelFilter::INFO => log::LevelFilter::Info,
        LevelFilter::DEBUG => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    }
}

/// A point in time, UTC, for lines and for names of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instant {
    year: u64,
    month: u64,
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
    micros: u32,
}

impl Instant {
    fn now() -> Self {
        // A clock before 1970 is as wrong as any other answer.
        Self::since_epoch(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
    }

    /// The Gregorian calendar by eras of 400 years, years beginning in March so that the leap day is the last.
    fn since_epoch(time: Duration) -> Self {
        let (days, seconds) = (time.as_secs() / 86400, time.as_secs() % 86400);
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted_month + 2) / 5 + 1,
            hour: seconds / 3600,
            minute: seconds / 60 % 60,
            second: seconds % 60,
            micros: time.subsec_micros(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calendar_matches_known_days() {
        for (seconds, expected) in [
            (0, (1970, 1, 1, 0, 0, 0)),
            (951_782_399, (2000, 2, 28, 23, 59, 59)),
            (951_782_400, (2000, 2, 29, 0, 0, 0)),
            (951_868_800, (2000, 3, 1, 0, 0, 0)),
            (1_795_448_985, (2026, 11, 23, 15, 49, 45)),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0)),
        ] {
            let at = Instant::since_epoch(Duration::from_secs(seconds));
            assert_eq!((at.year, at.month, at.day, at.hour, at.minute, at.second), expected, "{seconds}");
        }
    }
}
