//! Every option, with its unit and default in the help text.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;

use crate::cli::LogLevel;
use crate::daemon::ZeroMessageOpen;
use crate::limits;

/// Serve RAFS images to virtual machines.
///
/// Without a subcommand, --sock (or --fd) serves a VM as `virtiofs` does, and --mountpoint mounts on this host as
/// `fuse` does.
#[derive(Debug, Parser)]
#[command(name = "nydusd", version, propagate_version = true, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub(super) command: Option<Command>,
    #[command(flatten)]
    pub(super) bare: BareArgs,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Serve a VM over vhost-user-fs.
    Virtiofs(Box<VirtiofsCommand>),
    /// Mount on this host through /dev/fuse (not built yet).
    Fuse(Box<FuseCommand>),
    /// Serve the kernel's fscache (not built).
    Singleton(Rest),
    /// Export an image as a network block device (not built).
    Nbd(Rest),
    /// Serve page faults of a block image (not built).
    Uffd(Rest),
}

/// Arguments of a command that is recognised only.
#[derive(Debug, Args)]
pub(super) struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct BareArgs {
    #[command(flatten)]
    pub(super) common: CommonArgs,
    #[command(flatten)]
    pub(super) image: ImageArgs,
    #[command(flatten)]
    pub(super) virtiofs: VirtiofsArgs,
    #[command(flatten)]
    pub(super) fuse: FuseArgs,
}

#[derive(Debug, Args)]
pub(super) struct VirtiofsCommand {
    #[command(flatten)]
    pub(super) common: CommonArgs,
    #[command(flatten)]
    pub(super) image: ImageArgs,
    #[command(flatten)]
    pub(super) virtiofs: VirtiofsArgs,
}

#[derive(Debug, Args)]
pub(super) struct FuseCommand {
    #[command(flatten)]
    pub(super) common: CommonArgs,
    #[command(flatten)]
    pub(super) image: ImageArgs,
    #[command(flatten)]
    _fuse: FuseArgs,
}

/// Options of every mode.
#[derive(Debug, Args)]
#[command(next_help_heading = "Daemon")]
pub(super) struct CommonArgs {
    /// Configuration file, JSON or TOML, at most 1 MiB.
    #[arg(short = 'C', long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Socket of the management API (not built yet).
    #[arg(short = 'A', long, value_name = "PATH")]
    apisock: Option<PathBuf>,
    /// Name of this daemon in what it reports.
    #[arg(long)]
    pub(super) id: Option<String>,
    /// Socket of the keeper of this daemon's state (not built yet).
    #[arg(long, value_name = "PATH")]
    supervisor: Option<PathBuf>,
    /// Wait for the state of a predecessor (not built yet).
    #[arg(long)]
    upgrade: bool,
    /// What to log. The variable RUST_LOG, where set, says it in more detail.
    #[arg(short = 'l', long, value_enum, default_value = "info", value_name = "LEVEL", ignore_case = true)]
    pub(super) log_level: LogLevel,
    /// Append the log to this file instead of stderr; ".log" is added when the name has no extension.
    #[arg(short = 'L', long, value_name = "FILE")]
    pub(super) log_file: Option<PathBuf>,
    /// Put the log file aside at this size in MiB, compressed, the last 10 are kept; 0: never.
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub(super) log_rotation_size: u64,
    /// Open files allowed, at most fs.file-max less 16384; 0: leave the limit as it is.
    #[arg(long, value_name = "N", default_value_t = limits::DEFAULT_OPEN_FILES)]
    pub(super) rlimit_nofile: u64,
    /// Chunk deduplication database (not built).
    #[arg(long, value_name = "FILE")]
    dedup_db: Option<PathBuf>,
    #[arg(long, hide = true)]
    backend_source: Option<String>,
    #[arg(long, hide = true)]
    syslog: bool,
}

/// What is served.
#[derive(Debug, Args)]
#[command(next_help_heading = "Image")]
pub(super) struct ImageArgs {
    /// RAFS metadata file, or a blob that holds its metadata; needs --config or --localfs-dir.
    #[arg(short = 'B', long, value_name = "FILE", conflicts_with = "shared_dir")]
    pub(super) bootstrap: Option<PathBuf>,
    /// Directory of blobs and of cache files, instead of a configuration.
    #[arg(short = 'D', long, value_name = "DIR", conflicts_with = "config")]
    pub(super) localfs_dir: Option<PathBuf>,
    /// Directory of this host to pass through (not built yet).
    #[arg(short = 's', long, value_name = "DIR")]
    shared_dir: Option<PathBuf>,
    /// List of files to fetch first, one absolute path per line (not built yet).
    #[arg(long, value_name = "FILE", requires = "bootstrap")]
    prefetch_files: Option<PathBuf>,
    /// Where in the served tree the image stands; other places than "/" are not built yet.
    #[arg(short = 'm', long, value_name = "PATH", default_value = "/")]
    virtual_mountpoint: String,
}

/// How a VM is served.
#[derive(Debug, Args)]
#[command(next_help_heading = "Virtual machine")]
pub(super) struct VirtiofsArgs {
    /// Unix socket for the VMM, at most 107 bytes; made by this daemon, mode 0600, a stale one is replaced.
    #[arg(long, visible_alias = "socket-path", value_name = "PATH")]
    pub(super) sock: Option<PathBuf>,
    /// Number of an inherited listening unix socket. Without --sock and --fd, one that systemd passes (LISTEN_FDS) is
    /// taken; of several, the one named vhost-user-fs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..))]
    pub(super) fd: Option<i32>,
    /// End when the VMM disconnects (default with --fd).
    #[arg(long, conflicts_with = "keep_listening")]
    pub(super) exit_on_disconnect: bool,
    /// Wait for the next VMM after a disconnect (default with --sock).
    #[arg(long)]
    pub(super) keep_listening: bool,
    /// Request queues offered, 1 to 63; a VMM that wants more fails to start.
    #[arg(long, value_name = "N", default_value_t = limits::DEFAULT_REQUEST_QUEUES,
          value_parser = clap::value_parser!(u16).range(1..=limits::MAX_REQUEST_QUEUES as i64))]
    pub(super) queues: u16,
    /// Microseconds, 0 to 1000, for which a queue's thread that just served looks for the next request before it sleeps;
    /// only where requests come one by one and so soon that it pays. 0: it always sleeps at once.
    #[arg(long, value_name = "US", default_value_t = limits::DEFAULT_AWAKE.as_micros() as u64,
          value_parser = clap::value_parser!(u64).range(0..=limits::MAX_AWAKE.as_micros() as u64))]
    pub(super) poll_us: u64,
    /// Mount tag offered in configuration space, 1 to 36 bytes; only for VMMs that take it from the device.
    #[arg(long, value_name = "TAG", value_parser = tag)]
    pub(super) tag: Option<String>,
    /// Whether the guest opens files and directories without a message; auto: where nothing can change.
    #[arg(long, value_enum, default_value = "auto", value_name = "WHEN")]
    pub(super) zero_message_open: When,
    /// Accepted, changes nothing: hybrid devices are always served right.
    #[arg(long = "hybrid-mode")]
    _hybrid_mode: bool,
    #[command(flatten)]
    foreign: ForeignArgs,
}

/// Options of virtiofsd that clients add by themselves, and that change nothing of a read-only image.
#[derive(Debug, Args)]
struct ForeignArgs {
    #[arg(long, hide = true)]
    thread_pool_size: Option<String>,
    #[arg(long, hide = true)]
    announce_submounts: bool,
    #[arg(long, hide = true)]
    no_announce_submounts: bool,
    #[arg(short = 'o', hide = true, value_name = "KEY=VALUE")]
    option: Vec<String>,
    #[arg(long, hide = true)]
    cache: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "prefer")]
    inode_file_handles: Option<String>,
    #[arg(long, hide = true)]
    xattr: bool,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    posix_acl: Option<String>,
    #[arg(long, hide = true)]
    sandbox: Option<String>,
    #[arg(long, hide = true)]
    seccomp: Option<String>,
    #[arg(long, hide = true)]
    modcaps: Option<String>,
    #[arg(long, hide = true)]
    readonly: bool,
    #[arg(long, hide = true)]
    allow_direct_io: bool,
    #[arg(long, hide = true)]
    allow_mmap: bool,
    #[arg(long, hide = true)]
    killpriv_v2: bool,
    #[arg(long, hide = true)]
    no_killpriv_v2: bool,
    #[arg(long, hide = true)]
    no_readdirplus: bool,
    #[arg(long, hide = true)]
    writeback: bool,
}

/// How this host is served.
#[derive(Debug, Args)]
#[command(next_help_heading = "Host mount (not built yet)")]
pub(super) struct FuseArgs {
    /// Directory to mount on.
    #[arg(short = 'M', long, value_name = "DIR")]
    pub(super) mountpoint: Option<PathBuf>,
    /// Threads that read /dev/fuse, 1 to 1024.
    #[arg(long, alias = "thread-num", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    fuse_threads: Option<u16>,
    /// What becomes of requests in flight at a takeover.
    #[arg(long, value_name = "POLICY", value_parser = ["none", "resend", "flush"])]
    failover_policy: Option<String>,
    /// Mount for writing.
    #[arg(long)]
    pub(super) writable: bool,
}

/// When to do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum When {
    Auto,
    On,
    Off,
}

impl From<When> for ZeroMessageOpen {
    fn from(when: When) -> Self {
        match when {
            When::Auto => Self::WhereSafe,
            When::On => Self::Always,
            When::Off => Self::Never,
        }
    }
}

fn tag(text: &str) -> Result<String, String> {
    match text.len() {
        1..=limits::MAX_TAG_BYTES => Ok(text.to_owned()),
        len => Err(format!("a tag has 1 to {} bytes, not {len}", limits::MAX_TAG_BYTES)),
    }
}

/// Names of the options that were given.
fn given(options: &[(bool, &'static str)]) -> Vec<&'static str> {
    options.iter().filter(|(is_given, _)| *is_given).map(|(_, name)| *name).collect()
}

impl CommonArgs {
    pub(super) fn not_built(&self) -> Option<&'static str> {
        given(&[
            (self.apisock.is_some(), "`--apisock` (the management API)"),
            (self.supervisor.is_some(), "`--supervisor`"),
            (self.upgrade, "`--upgrade`"),
            (self.dedup_db.is_some(), "`--dedup-db`"),
        ])
        .into_iter()
        .next()
    }

    pub(super) fn ignored(&self) -> Vec<&'static str> {
        given(&[(self.backend_source.is_some(), "--backend-source"), (self.syslog, "--syslog")])
    }
}

impl ImageArgs {
    pub(super) fn not_built(&self) -> Option<&'static str> {
        given(&[
            (self.shared_dir.is_some(), "`--shared-dir` (passthrough)"),
            (self.prefetch_files.is_some(), "`--prefetch-files`"),
            (self.virtual_mountpoint != "/", "`--virtual-mountpoint` other than \"/\""),
        ])
        .into_iter()
        .next()
    }
}

impl VirtiofsArgs {
    pub(super) fn is_asked_for(&self) -> bool {
        self.sock.is_some() || self.fd.is_some()
    }

    pub(super) fn not_built(&self) -> Option<&'static str> {
        let shares = |option: &String| option.split(',').any(|part| part.starts_with("source="));
        self.foreign.option.iter().any(shares).then_some("`-o source=` (passthrough)")
    }

    pub(super) fn ignored(&self) -> Vec<&'static str> {
        let foreign = &self.foreign;
        given(&[
            (foreign.thread_pool_size.is_some(), "--thread-pool-size"),
            (foreign.announce_submounts, "--announce-submounts"),
            (foreign.no_announce_submounts, "--no-announce-submounts"),
            (!foreign.option.is_empty(), "-o"),
            (foreign.cache.is_some(), "--cache"),
            (foreign.inode_file_handles.is_some(), "--inode-file-handles"),
            (foreign.xattr, "--xattr"),
            (foreign.posix_acl.is_some(), "--posix-acl"),
            (foreign.sandbox.is_some(), "--sandbox"),
            (foreign.seccomp.is_some(), "--seccomp"),
            (foreign.modcaps.is_some(), "--modcaps"),
            (foreign.readonly, "--readonly"),
            (foreign.allow_direct_io, "--allow-direct-io"),
            (foreign.allow_mmap, "--allow-mmap"),
            (foreign.killpriv_v2, "--killpriv-v2"),
            (foreign.no_killpriv_v2, "--no-killpriv-v2"),
            (foreign.no_readdirplus, "--no-readdirplus"),
            (foreign.writeback, "--writeback"),
        ])
    }
}

impl FuseArgs {
    /// Options that mean nothing when a VM is served.
    pub(super) fn ignored(&self) -> Vec<&'static str> {
        given(&[(self.fuse_threads.is_some(), "--fuse-threads"), (self.failover_policy.is_some(), "--failover-policy")])
    }
}
