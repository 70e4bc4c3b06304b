//! From a command line to an exit code.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::io;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use tracing::info;
use tracing::warn;

use super::ConfigSource;
use super::Listen;
use super::OpenFiles;
use super::Refusal;
use super::Serve;
use super::parse;
use super::version;
use crate::cli::tell;
use crate::config::Config;
use crate::config::Secret;
use crate::daemon;
use crate::daemon::DaemonError;
use crate::daemon::logging;
use crate::daemon::open_files;
use crate::daemon::signals::Signals;
use crate::daemon::socket;
use crate::daemon::socket::Giver;
use crate::daemon::socket::Socket;

/// What the environment variable replaces: `auth` of a registry.
const PULL_AUTH: &str = "IMAGE_PULL_AUTH";

/// Runs `nydusd` with `arguments`, the program's name first, and returns its exit code: 0 clean, 1 an error (one line
/// on stderr), 2 usage. Call it before the first thread is made: it settles which thread receives signals.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let activated = || socket::activated(|name| env::var_os(name), std::process::id());
    let serve = match parse(arguments, activated) {
        Ok(serve) => serve,
        Err(Refusal::Failed(message)) => return fail(&message),
        Err(Refusal::Usage(error)) if error.kind() == ErrorKind::DisplayVersion => return print_version(),
        Err(Refusal::Usage(error)) => return tell("nydusd", &error),
    };
    match start(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&in_one_line(&*error)),
    }
}

fn start(serve: Serve) -> Result<(), Box<dyn Error>> {
    // First of all: the number may name a file of ours once we have opened some.
    let inherited = match &serve.listen {
        Listen::Descriptor(number) => Some(Socket::inherited(*number, Giver::Option)?),
        Listen::Activated(number) => Some(Socket::inherited(*number, Giver::Activation)?),
        Listen::Path(_) => None,
    };
    let signals = Signals::block().map_err(DaemonError::Signals)?;
    logging::install(&logging::Options {
        level: serve.log.level.into(),
        file: serve.log.file,
        rotate_bytes: serve.log.rotation_mib.saturating_mul(1 << 20),
    })
    .map_err(|source| DaemonError::Log { source })?;
    if let Some(id) = serve.id {
        info!(id, "daemon");
    }
    let directory = env::current_dir().map_err(DaemonError::Directory)?;
    let (config, warnings) = configure(serve.source, &directory)?;
    for warning in warnings {
        warn!("configuration: {warning}");
    }
    if !serve.ignored.is_empty() {
        warn!("without effect here: {}", serve.ignored.join(", "));
    }
    if let OpenFiles::Raise(limit) = serve.open_files {
        open_files::raise(limit)?;
    }
    let endpoint = match (inherited, serve.listen) {
        (Some(socket), _) => daemon::Endpoint::Inherited(socket),
        (None, Listen::Path(path)) => daemon::Endpoint::Path(path),
        (None, Listen::Descriptor(_) | Listen::Activated(_)) => unreachable!("an inherited socket was taken above"),
    };
    let options = daemon::Options {
        endpoint,
        after_disconnect: serve.after_disconnect,
        request_queues: serve.request_queues,
        awake: serve.awake,
        tag: serve.tag,
        zero_message_open: serve.zero_message_open,
        bootstrap: directory.join(serve.bootstrap),
        config,
    };
    Ok(daemon::run(options, signals)?)
}

fn configure(source: ConfigSource, directory: &Path) -> Result<(Config, Vec<String>), Box<dyn Error>> {
    match source {
        ConfigSource::LocalfsDir(path) => Ok((Config::localfs_dir(&directory.join(path)), Vec::new())),
        ConfigSource::File(path) => {
            let (mut config, warnings) = Config::load(&path, directory)?;
            if let Ok(auth) = env::var(PULL_AUTH) {
                config.set_pull_auth(Secret::new(auth));
            }
            Ok((config, warnings))
        }
    }
}

fn print_version() -> ExitCode {
    let mut out = io::stdout().lock();
    let printed = version::lines().iter().try_for_each(|(name, value)| writeln!(out, "{name}: {value}"));
    if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// An error and its causes, as one line.
fn in_one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line.replace('\n', " ")
}

fn fail(message: &str) -> ExitCode {
    if logging::is_in_file() {
        tracing::error!("{message}");
    }
    // Nobody listens: the exit code still tells.
    let _ = writeln!(io::stderr(), "Error: {message}");
    ExitCode::FAILURE
}
