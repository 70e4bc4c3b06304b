//! How many lines a call site may write.

use std::hash::DefaultHasher;
use std::hash::Hash;
use std::hash::Hasher;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Instant;

use tracing::callsite::Identifier;

use crate::limits::LOG_BURST;
use crate::limits::LOG_WINDOW;

/// Call sites share a place when they meet in this table: it is larger than the number of them in the program.
const PLACES: usize = 512;

/// What each call site has written in the current window.
pub(super) struct Budget {
    places: Vec<Mutex<Place>>,
}

#[derive(Clone, Copy)]
struct Place {
    since: Instant,
    written: u32,
    left_out: u64,
}

impl Budget {
    pub(super) fn new() -> Self {
        let place = Place { since: Instant::now(), written: 0, left_out: 0 };
        Self { places: (0..PLACES).map(|_| Mutex::new(place)).collect() }
    }

    /// Whether the call site may write one more line at `now`.
    pub(super) fn allows(&self, site: &Identifier, now: Instant) -> bool {
        let mut place = self.place(site).lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(place.since) >= LOG_WINDOW {
            place.since = now;
            place.written = 0;
        }
        let allowed = place.written < LOG_BURST;
        if allowed {
            place.written += 1;
        } else {
            place.left_out += 1;
        }
        allowed
    }

    /// Lines that were not written since this was asked last.
    pub(super) fn take_left_out(&self, site: &Identifier) -> u64 {
        let mut place = self.place(site).lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut place.left_out)
    }

    fn place(&self, site: &Identifier) -> &Mutex<Place> {
        let mut hasher = DefaultHasher::new();
        site.hash(&mut hasher);
        &self.places[hasher.finish() as usize % PLACES]
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;
    use crate::daemon::logging::line::Line;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn flood_of_one_call_site_is_cut_and_counted() {
        let memory = Memory::default();
        let written = memory.clone();
        let layer = tracing_subscriber::fmt::layer()
            .event_format(Line::new())
            .with_ansi(false)
            .with_writer(move || written.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            for n in 0..10_000 {
                tracing::warn!(n, "a guest did this");
            }
            tracing::info!(path = "x", "another call site");
        });
        let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), LOG_BURST as usize + 1, "{text}");
        assert!(lines[0].contains(" WARN [src/daemon/logging/budget.rs:"), "{}", lines[0]);
        assert!(lines[0].ends_with("] a guest did this n=0"), "{}", lines[0]);
        assert!(lines[LOG_BURST as usize].ends_with(" INFO another call site path=\"x\""), "{text}");
    }

    #[test]
    fn next_window_says_how_many_were_left_out() {
        let budget = Budget::new();
        let site = tracing::callsite::Identifier(
            tracing::callsite!(name: "x", kind: tracing::metadata::Kind::EVENT, fields: a),
        );
        let start = Instant::now();
        let allowed = (0..LOG_BURST + 7).filter(|_| budget.allows(&site, start)).count();
        assert_eq!(allowed, LOG_BURST as usize);
        assert!(budget.allows(&site, start + LOG_WINDOW));
        assert_eq!(budget.take_left_out(&site), 7);
        assert_eq!(budget.take_left_out(&site), 0);
    }
}
