//! What a line looks like.

use std::fmt;
use std::time;

use tracing::Event;
use tracing::Level;
use tracing::Subscriber;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::FormatEvent;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::registry::LookupSpan;

use super::DEPENDENCY;
use super::Instant;
use super::budget::Budget;

/// Formats events as lines.
pub(super) struct Line {
    budget: Budget,
}

impl Line {
    pub(super) fn new() -> Self {
        Self { budget: Budget::new() }
    }
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        // Debug and trace lines of our own are asked for by an operator, and not limited. The limit stands here and
        // not in a filter: tracing-subscriber 0.3 loses its state when a filter of a layer refuses an event.
        let is_limited = *metadata.level() <= Level::INFO || metadata.target() == DEPENDENCY;
        if is_limited && !self.budget.allows(&metadata.callsite(), time::Instant::now()) {
            return Ok(());
        }
        let now = Instant::now();
        write!(
            out,
            "[{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:06} +00:00] ",
            now.year, now.month, now.day, now.hour, now.minute, now.second, now.micros
        )?;
        if out.has_ansi_escapes() {
            write!(out, "\x1b[{}m{}\x1b[0m ", colour(*metadata.level()), metadata.level())?;
        } else {
            write!(out, "{} ", metadata.level())?;
        }
        if let (true, Some(file), Some(line)) = (*metadata.level() != Level::INFO, metadata.file(), metadata.line()) {
            write!(out, "[{file}:{line}] ")?;
        }
        ctx.field_format().format_fields(out.by_ref(), event)?;
        match self.budget.take_left_out(&metadata.callsite()) {
            0 => writeln!(out),
            count => writeln!(out, " ({count} more like it were left out)"),
        }
    }
}

fn colour(level: Level) -> u8 {
    match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG => 34,
        Level::TRACE => 35,
    }
}
