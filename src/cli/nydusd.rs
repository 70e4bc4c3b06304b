//! The command line of `nydusd`: the shapes of upstream 2.4.4, the documented form without a subcommand, and ours.
//!
//! What changes what is served and is not built yet is refused with one line. A harmless option of another daemon
//! (virtiofsd's, which Kata and libvirt add by themselves) is one warning.

mod options;
mod run;
mod version;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::CommandFactory;
use clap::FromArgMatches;
use clap::error::ErrorKind;

pub use options::Cli;
pub use run::run;

use crate::cli::LogLevel;
use crate::daemon::AfterDisconnect;
use crate::daemon::ZeroMessageOpen;
use crate::daemon::socket::SocketError;
use options::Command;
use options::CommonArgs;
use options::ImageArgs;
use options::VirtiofsArgs;

/// Why a command line leads nowhere.
#[derive(Debug)]
pub enum Refusal {
    /// Not a command line of ours: exit code 2. Help and version come this way too, with code 0.
    Usage(clap::Error),
    /// Understood, and not built or not possible: exit code 1.
    Failed(String),
}

/// A command line that can be served.
#[derive(Debug, PartialEq, Eq)]
pub struct Serve {
    /// Name of this daemon.
    pub id: Option<String>,
    /// What is logged, and where.
    pub log: Log,
    /// Limit of open files wished for; `None`: left alone.
    pub open_files: OpenFiles,
    /// Where the VMM connects.
    pub listen: Listen,
    /// What follows when the VMM has gone.
    pub after_disconnect: AfterDisconnect,
    /// Request queues offered.
    pub request_queues: u16,
    /// How long the worker of a dry ring stays awake at most.
    pub awake: Duration,
    /// Mount tag in the device's configuration space.
    pub tag: Option<String>,
    /// Whether guests open files without a message.
    pub zero_message_open: ZeroMessageOpen,
    /// The image's metadata.
    pub bootstrap: PathBuf,
    /// Where its blobs come from.
    pub source: ConfigSource,
    /// Options that had no effect.
    pub ignored: Vec<&'static str>,
}

/// The limit of open files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenFiles {
    /// Left as it is.
    LeaveAlone,
    /// Raised to this.
    Raise(u64),
}

/// What is logged, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct Log {
    /// The least important level that is logged.
    pub level: LogLevel,
    /// The file; `None`: stderr.
    pub file: Option<PathBuf>,
    /// Size at which the file is put aside; 0: never.
    pub rotation_mib: u64,
}

/// Where the VMM connects.
#[derive(Debug, PartialEq, Eq)]
pub enum Listen {
    /// A unix socket that we make.
    Path(PathBuf),
    /// A listening socket that was passed by number.
    Descriptor(i32),
    /// A listening socket that systemd passed, by this number.
    Activated(i32),
}

/// Where the configuration comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum ConfigSource {
    /// A file.
    File(PathBuf),
    /// A directory of blobs and cache files.
    LocalfsDir(PathBuf),
}

/// Reads a command line, the program's name first. `activated` says which socket systemd passed; it is asked where the
/// command line names none.
///
/// # Errors
/// [`Refusal`].
pub fn parse<I, T, A>(arguments: I, activated: A) -> Result<Serve, Refusal>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
    A: FnOnce() -> Result<Option<i32>, SocketError>,
{
    let matches = Cli::command().try_get_matches_from(arguments).map_err(Refusal::Usage)?;
    let cli = Cli::from_arg_matches(&matches).map_err(Refusal::Usage)?;
    let bare = match cli.command {
        None => cli.bare,
        Some(Command::Virtiofs(arguments)) => {
            let listen = listen(&arguments.virtiofs, activated)?;
            return serve(arguments.common, arguments.image, arguments.virtiofs, listen);
        }
        Some(Command::Fuse(arguments)) => return Err(refuse_fuse(&arguments.common, &arguments.image)),
        Some(Command::Singleton(_)) => return Err(not_built("`singleton` (fscache)")),
        Some(Command::Nbd(_)) => return Err(not_built("`nbd`")),
        Some(Command::Uffd(_)) => return Err(not_built("`uffd`")),
    };
    match (bare.virtiofs.is_asked_for(), bare.fuse.mountpoint.is_some()) {
        (true, true) => {
            return Err(usage(ErrorKind::ArgumentConflict, "--mountpoint and --sock cannot be used together"));
        }
        (false, true) => return Err(refuse_fuse(&bare.common, &bare.image)),
        (_, false) => {}
    }
    let Some(listen) = listen(&bare.virtiofs, activated)? else {
        return Err(usage(
            ErrorKind::MissingRequiredArgument,
            "give --sock PATH (or --fd N) to serve a VM, or --mountpoint DIR to mount on this host",
        ));
    };
    if bare.fuse.writable {
        return Err(not_built("`--writable`"));
    }
    let mut serve = serve(bare.common, bare.image, bare.virtiofs, Some(listen))?;
    serve.ignored.extend(bare.fuse.ignored());
    Ok(serve)
}

/// Where the VMM connects, and what follows by default when it has gone; `None` where nothing says it.
fn listen(
    vm: &VirtiofsArgs,
    activated: impl FnOnce() -> Result<Option<i32>, SocketError>,
) -> Result<Option<(Listen, AfterDisconnect)>, Refusal> {
    Ok(match (&vm.sock, vm.fd) {
        (Some(_), Some(_)) => {
            return Err(usage(ErrorKind::ArgumentConflict, "--sock and --fd cannot be used together"));
        }
        (Some(path), None) => Some((Listen::Path(path.clone()), AfterDisconnect::ListenAgain)),
        (None, Some(fd)) => Some((Listen::Descriptor(fd), AfterDisconnect::End)),
        (None, None) => activated()
            .map_err(|error| Refusal::Failed(error.to_string()))?
            .map(|number| (Listen::Activated(number), AfterDisconnect::ListenAgain)),
    })
}

fn refuse_fuse(common: &CommonArgs, image: &ImageArgs) -> Refusal {
    let first = common.not_built().or_else(|| image.not_built());
    not_built(first.unwrap_or("mounting on this host (`fuse`, `--mountpoint`)"))
}

fn serve(
    common: CommonArgs,
    image: ImageArgs,
    vm: VirtiofsArgs,
    listen: Option<(Listen, AfterDisconnect)>,
) -> Result<Serve, Refusal> {
    let not_there = common.not_built().or_else(|| image.not_built()).or_else(|| vm.not_built());
    if let Some(what) = not_there {
        return Err(not_built(what));
    }
    let mut ignored = vm.ignored();
    ignored.extend(common.ignored());
    let Some((listen, after_disconnect)) = listen else {
        return Err(usage(ErrorKind::MissingRequiredArgument, "--sock PATH or --fd N is required"));
    };
    let after_disconnect = match (vm.exit_on_disconnect, vm.keep_listening) {
        (true, _) => AfterDisconnect::End,
        (_, true) => AfterDisconnect::ListenAgain,
        (false, false) => after_disconnect,
    };
    let Some(bootstrap) = image.bootstrap else {
        return Err(not_built("serving without `--bootstrap` (mounts by the management API)"));
    };
    let source = match (common.config, image.localfs_dir) {
        (Some(file), _) => ConfigSource::File(file),
        (None, Some(directory)) => ConfigSource::LocalfsDir(directory),
        (None, None) => {
            let text = "both --config and --localfs-dir are missing: with --bootstrap, give one of them";
            return Err(Refusal::Failed(text.to_owned()));
        }
    };
    Ok(Serve {
        id: common.id,
        log: Log { level: common.log_level, file: common.log_file, rotation_mib: common.log_rotation_size },
        open_files: match common.rlimit_nofile {
            0 => OpenFiles::LeaveAlone,
            limit => OpenFiles::Raise(limit),
        },
        listen,
        after_disconnect,
        request_queues: vm.queues,
        awake: Duration::from_micros(vm.poll_us),
        tag: vm.tag,
        zero_message_open: vm.zero_message_open.into(),
        bootstrap,
        source,
        ignored,
    })
}

fn not_built(what: &str) -> Refusal {
    Refusal::Failed(format!("{what} is not built yet, see nydusd --help for what is"))
}

fn usage(kind: ErrorKind, message: &str) -> Refusal {
    Refusal::Usage(Cli::command().error(kind, message))
}

#[cfg(test)]
mod tests;
