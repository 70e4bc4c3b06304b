//! The command line of the bench.

use std::path::PathBuf;

use clap::Parser;
use clap::ValueEnum;

use crate::workload::Workload;

/// Measures vhost-user-fs daemons without a VM: a driver that plays VMM and guest sends requests over real vrings.
///
/// The daemon runs on one processor, the driver on another. Each figure is the median of the rounds; in each round all
/// daemons take turns (A B A B). "limit" is a plain copy of the same bytes from a mapped file by one thread, measured in
/// the same run. Without options all workloads run with our own daemon.
///
/// Studies: `workloads` (requests per second, latency, CPU per request; what runs if none is named), `compare` (the same
/// with the peers of this machine), `fill` (cost of filling a cache, share of codec and digest), `first-byte` (a cold
/// read beyond the time of its backend), `hang` (warm reads while cold ones get no answer), `drain` (how soon a ring is
/// quiet), `processes` (50 daemons on one cache directory), `zran` (an unchanged gzip layer, sequential and random).
#[derive(Debug, Parser)]
#[command(name = "scripts/bench", after_help = AFTER)]
pub struct Arguments {
    /// What to measure.
    #[arg(value_name = "STUDY")]
    pub studies: Vec<Study>,
    /// Daemon to measure, besides ours: NAME=COMMAND, where COMMAND is for the shell and may use {sock}, {dir} (the
    /// plain tree), {bootstrap}, {blobs}, {cache} and {config} (nydusd's, with {blobs} and {cache}). May be repeated.
    #[arg(long = "daemon", value_name = "NAME=COMMAND")]
    pub daemons: Vec<String>,
    /// Add the peers found on this machine: Debian's C virtiofsd, and the crate's virtiofsd if it is in PATH.
    #[arg(long)]
    pub with_peers: bool,
    /// Leave our own daemon out.
    #[arg(long)]
    pub without_ours: bool,
    /// Workloads; all, if not given.
    #[arg(long, value_delimiter = ',')]
    pub workload: Vec<Workload>,
    /// Requests in flight per queue.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 32])]
    pub depth: Vec<usize>,
    /// Request queues driven.
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    pub queues: Vec<u16>,
    /// How the driver learns of completions.
    #[arg(long, value_delimiter = ',', default_values_t = [Notice::Poll])]
    pub mode: Vec<Notice>,
    /// How descriptor chains lie in the ring.
    #[arg(long, value_delimiter = ',', default_values_t = [Layout::Indirect])]
    pub chains: Vec<Layout>,
    /// Rounds of A B A B.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 1.5)]
    pub seconds: f64,
    /// A short look: one round of 0.3 seconds on a small tree, depths 1 and 32.
    #[arg(long)]
    pub quick: bool,
    /// Processors of the daemon.
    #[arg(long, value_delimiter = ',', default_values_t = [0])]
    pub daemon_cpu: Vec<usize>,
    /// Processor of the driver.
    #[arg(long, default_value_t = 1)]
    pub driver_cpu: usize,
    /// Where the tree, the image and the cache are made, and kept; otherwise a temporary directory.
    #[arg(long)]
    pub work_dir: Option<PathBuf>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    pub bench: bool,
}

const AFTER: &str = "\
Examples:
  scripts/bench --quick
  scripts/bench compare --depth 32
  scripts/bench fill first-byte hang drain processes zran
  scripts/bench --workload random4k,stat --queues 1,2 --mode poll,event --daemon-cpu 0
  scripts/bench --daemon 'upstream=nydusd virtiofs --config {config} --bootstrap {bootstrap} --sock {sock} --rlimit-nofile 0'

The crate virtiofsd: apt-get install libcap-ng-dev libseccomp-dev, then cargo install virtiofsd.
Upstream's nydusd publishes a used length of 0, which our driver does not accept.";

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Study {
    /// Requests of all kinds, one kind after the other.
    Workloads,
    /// The same with `--with-peers`.
    Compare,
    /// The cost of filling a cache.
    Fill,
    /// A cold read beyond the time that its backend takes.
    FirstByte,
    /// Warm reads while cold ones get no answer.
    Hang,
    /// From a message of the VMM to a quiet ring.
    Drain,
    /// Many daemons on one cache directory.
    Processes,
    /// Reads of an unchanged gzip layer.
    Zran,
}

/// How the driver learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Notice {
    /// It looks at the ring.
    Poll,
    /// It sleeps until it is interrupted.
    Event,
}

/// How descriptor chains lie in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// In tables of their own.
    Indirect,
    /// In the ring.
    Direct,
}

impl std::fmt::Display for Notice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Poll => "poll",
            Self::Event => "event",
        })
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Indirect => "indirect",
            Self::Direct => "direct",
        })
    }
}

impl Arguments {
    /// The command line of this process.
    pub fn parse() -> Self {
        let mut arguments = <Self as Parser>::parse();
        if arguments.quick {
            (arguments.rounds, arguments.seconds) = (1, 0.3);
            arguments.depth.retain(|depth| *depth != 4);
        }
        if arguments.studies.is_empty() {
            arguments.studies.push(Study::Workloads);
        }
        arguments.with_peers |= arguments.studies.contains(&Study::Compare);
        if arguments.workload.is_empty() {
            arguments.workload = Workload::value_variants().to_vec();
        }
        arguments
    }
}
