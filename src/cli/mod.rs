//! Command lines: what users type, parsed with clap and checked, and what comes back to them: one line and an exit code.

use std::io;
use std::io::Write;
use std::process::ExitCode;

use clap::ValueEnum;
use tracing::level_filters::LevelFilter;

pub mod image;
pub mod nydusd;

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum LogLevel {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Trace => Self::TRACE,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Info => Self::INFO,
            LogLevel::Warn => Self::WARN,
            LogLevel::Error => Self::ERROR,
        }
    }
}

/// Tells what clap has to say: help and version on stdout with code 0, an error on stderr with code 2.
fn tell(program: &str, error: &clap::Error) -> ExitCode {
    // Nobody listens: there is nothing left to tell it to.
    if error.use_stderr() && error.kind() != clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = writeln!(io::stderr(), "{}; see {program} --help", in_one_line(&error.render().to_string()));
    } else {
        let _ = error.print();
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// An error as clap writes it, without the summary of the usage that follows it.
fn in_one_line(rendered: &str) -> String {
    let ends = ["\nUsage:", "\nFor more information"];
    let end = ends.iter().filter_map(|end| rendered.find(end)).min().unwrap_or(rendered.len());
    rendered[..end].split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_of_usage_becomes_one_line_with_its_advice() {
        let check = |arguments: &[&str], expected: &str| {
            let Err(nydusd::Refusal::Usage(error)) = nydusd::parse(arguments, || Ok(None)) else {
                panic!("{arguments:?}")
            };
            assert_eq!(in_one_line(&error.render().to_string()), expected);
        };
        check(
            &["nydusd", "--sock", "S", "-l", "loud"],
            "error: invalid value 'loud' for '--log-level <LEVEL>' [possible values: trace, debug, info, warn, error]",
        );
        check(
            &["nydusd", "--sock", "S", "--bootstrp", "B"],
            "error: unexpected argument '--bootstrp' found tip: a similar argument exists: '--bootstrap'",
        );
        check(&["nydusd", "virtiofs"], "error: --sock PATH or --fd N is required");
    }
}
