//! Shows how far a build or a verification is: a bar on a terminal, now and then a line elsewhere.

use std::io::IsTerminal;
use std::time::Duration;
use std::time::Instant;

use indicatif::ProgressBar;
use indicatif::ProgressStyle;

use crate::builder::Progress;

/// Between two lines where stderr is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows progress on stderr; nothing is left of a bar when this is dropped.
pub struct Display {
    view: View,
    total_bytes: u64,
    done_bytes: u64,
}

enum View {
    Bar(ProgressBar),
    Lines { last: Instant },
}

impl Display {
    /// A display for what stderr is.
    pub fn new() -> Self {
        let view = match std::io::stderr().is_terminal() {
            true => View::Bar(ProgressBar::new_spinner().with_style(spinner())),
            false => View::Lines { last: Instant::now() },
        };
        Self { view, total_bytes: 0, done_bytes: 0 }
    }

    /// Shows `progress`.
    pub fn show(&mut self, progress: Progress) {
        match progress {
            Progress::Scanned { data_bytes, .. } => self.total_bytes = data_bytes,
            Progress::Stored { data_bytes } => self.done_bytes += data_bytes,
            Progress::Scanning { .. } | Progress::Metadata => {}
        }
        match &mut self.view {
            View::Bar(bar) => show_bar(bar, progress),
            View::Lines { last } => {
                if let Some(line) = line(progress, self.done_bytes, self.total_bytes, last.elapsed()) {
                    tracing::info!("{line}");
                    *last = Instant::now();
                }
            }
        }
    }
}

impl Default for Display {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let View::Bar(bar) = &self.view {
            bar.finish_and_clear();
        }
    }
}

/// Shows how far the verification of data is; nothing is left of a bar when this is dropped.
pub struct Verified {
    view: View,
    total_bytes: u64,
    done_bytes: u64,
}

impl Verified {
    /// A display for `total_bytes` of chunks.
    pub fn new(total_bytes: u64) -> Self {
        let view = match std::io::stderr().is_terminal() {
            true => View::Bar(ProgressBar::new(total_bytes).with_style(bytes_bar()).with_message("verifying")),
            false => View::Lines { last: Instant::now() },
        };
        Self { view, total_bytes, done_bytes: 0 }
    }

    /// Shows that `bytes` more were verified.
    pub fn add(&mut self, bytes: u64) {
        self.done_bytes += bytes;
        match &mut self.view {
            View::Bar(bar) => bar.inc(bytes),
            View::Lines { last } if last.elapsed() >= LINE_INTERVAL => {
                tracing::info!("verified {} of at most {}", mib(self.done_bytes), mib(self.total_bytes));
                *last = Instant::now();
            }
            View::Lines { .. } => {}
        }
    }
}

impl Drop for Verified {
    fn drop(&mut self) {
        if let View::Bar(bar) = &self.view {
            bar.finish_and_clear();
        }
    }
}

fn show_bar(bar: &ProgressBar, progress: Progress) {
    match progress {
        Progress::Scanning { paths } => {
            bar.set_message(format!("{paths} paths"));
            bar.tick();
        }
        Progress::Scanned { paths, data_bytes } => {
            bar.set_length(data_bytes);
            bar.set_style(bytes_bar());
            bar.set_message(format!("{paths} paths"));
        }
        Progress::Stored { data_bytes } => bar.inc(data_bytes),
        Progress::Metadata => bar.set_message("writing metadata"),
    }
}

/// What is worth a line: each step once, and what takes long every [`LINE_INTERVAL`].
fn line(progress: Progress, done_bytes: u64, total_bytes: u64, silent_for: Duration) -> Option<String> {
    match progress {
        Progress::Scanning { paths } => {
            (silent_for >= LINE_INTERVAL).then(|| format!("reading the source: {paths} paths so far"))
        }
        Progress::Scanned { paths, data_bytes } => Some(format!("{paths} paths, {} to store", mib(data_bytes))),
        Progress::Stored { .. } => (silent_for >= LINE_INTERVAL).then(|| {
            let percent = u128::from(done_bytes) * 100 / u128::from(total_bytes.max(1));
            format!("stored {} of {} ({percent} %)", mib(done_bytes), mib(total_bytes))
        }),
        Progress::Metadata => Some(format!("stored {}, writing metadata", mib(done_bytes))),
    }
}

pub(super) fn mib(bytes: u64) -> String {
    let tenths = (u128::from(bytes) * 10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} reading the source: {msg}").expect("a constant template that is valid")
}

fn bytes_bar() -> ProgressStyle {
    let template = "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    ProgressStyle::with_template(template).expect("a constant template that is valid").progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_given_for_steps_and_after_silence() {
        let check = |progress, silent_s, expected: Option<&str>| {
            let line = line(progress, 1 << 20, 3 << 20, Duration::from_secs(silent_s));
            assert_eq!(line.as_deref(), expected);
        };
        check(Progress::Scanning { paths: 7 }, 0, None);
        check(Progress::Scanning { paths: 7 }, 5, Some("reading the source: 7 paths so far"));
        check(Progress::Scanned { paths: 7, data_bytes: 3 << 20 }, 0, Some("7 paths, 3.0 MiB to store"));
        check(Progress::Stored { data_bytes: 9 }, 1, None);
        check(Progress::Stored { data_bytes: 9 }, 6, Some("stored 1.0 MiB of 3.0 MiB (33 %)"));
        check(Progress::Metadata, 0, Some("stored 1.0 MiB, writing metadata"));
    }
}
