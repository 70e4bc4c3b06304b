//! One measurement: a daemon, a guest, a workload for some time.

use std::fmt;
use std::fs;
use std::fs::File;
use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;
use nydus_vm::testing::driver::Chains;
use nydus_vm::testing::driver::Notifications;
use nydus_vm::testing::fuse_client::opcode;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::guest::SLOTS;
use nydus_vm::testing::lane::Mode;
use nydus_vm::testing::process;
use nydus_vm::testing::vmm::PATIENCE;

use crate::arguments::Arguments;
use crate::arguments::Layout;
use crate::arguments::Notice;
use crate::daemons::Daemon;
use crate::material::Material;
use crate::workload::Plan;
use crate::workload::Temperature;
use crate::workload::Workload;

/// Entries of a ring, QEMU's largest.
const RING_SIZE: u16 = 1024;

/// One line of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// What is asked for.
    pub workload: Workload,
    /// Requests in flight per queue.
    pub depth: usize,
    /// Request queues driven.
    pub queues: u16,
    /// How completions are noticed.
    pub mode: Notice,
    /// How chains lie in the ring.
    pub chains: Layout,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workload, depth, queues, mode, chains } = self;
        write!(f, "{workload:?} depth {depth} queues {queues} {mode} {chains}")
    }
}

impl Case {
    /// Everything that the command line asks for.
    pub fn all(arguments: &Arguments) -> Vec<Self> {
        let mut cases = Vec::new();
        for &workload in &arguments.workload {
            for &chains in &arguments.chains {
                for &mode in &arguments.mode {
                    for &queues in &arguments.queues {
                        for &depth in &arguments.depth {
                            cases.push(Self { workload, depth, queues, mode, chains });
                        }
                    }
                }
            }
        }
        cases
    }

    fn guest(&self) -> GuestOptions {
        let reply_bytes = self.workload.read_bytes().unwrap_or(4096).max(64 << 10) as u32;
        let (chains, descriptors) = match self.chains {
            Layout::Indirect => (Chains::Indirect, u32::MAX),
            // What is there for the pages of one request, when all are in the ring.
            Layout::Direct => (Chains::Direct, (u32::from(RING_SIZE) / self.depth as u32).saturating_sub(4).max(1)),
        };
        GuestOptions {
            request_queues: self.queues,
            ring_size: RING_SIZE,
            chains,
            notifications: Notifications::EventIdx,
            mode: match self.mode {
                Notice::Poll => Mode::Poll,
                Notice::Event => Mode::Event,
            },
            depth: self.depth,
            reply_bytes,
            segment_bytes: reply_bytes.div_ceil(descriptors).next_multiple_of(4096),
            ..GuestOptions::LINUX
        }
    }
}

/// What one measurement gives.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Requests per second.
    pub requests: f64,
    /// Bytes of file data per second.
    pub bytes: f64,
    /// Directory entries per second.
    pub entries: f64,
    /// Latencies in microseconds: median, 99 % and 99.9 %.
    pub latency_us: [f64; 3],
    /// Processor time of the daemon per request, in microseconds.
    pub cpu_us: f64,
    /// Kicks per request.
    pub kicks: f64,
    /// Interrupts per request.
    pub calls: f64,
    /// Private memory of the daemon at the end, in bytes.
    pub private: f64,
}

/// Measures `case` with a fresh `daemon`.
pub fn measure(case: &Case, daemon: &Daemon, material: &Material, arguments: &Arguments) -> Result<Figures> {
    let cold = case.workload.temperature() == Temperature::Cold;
    let cache = material.home().join(if cold { "cold".into() } else { format!("cache-{}", daemon.name) });
    if cold {
        let _ = fs::remove_dir_all(&cache);
    }
    fs::create_dir_all(&cache)?;
    let process = daemon.start(material, &cache, &arguments.daemon_cpu)?;
    process::pin(None, &[arguments.driver_cpu])?;
    let mut guest = Guest::boot(process.socket(), &case.guest())?;
    let streams = case.depth * usize::from(case.queues);
    let mut plan = Plan::new(case.workload, material.size(), &mut guest, streams)?;
    plan.warm_up(&mut guest)?;
    let mut until = Until::time(arguments.seconds);
    if let Some(questions) = plan.questions() {
        until = Until::Questions(questions);
    } else {
        drive(&mut guest, &mut plan, case, Until::time(arguments.seconds / 5.0))?;
    }
    plan.entries = 0;
    let before = (process.cpu_us(), events(&mut guest));
    let sample = drive(&mut guest, &mut plan, case, until)?;
    let after = (process.cpu_us(), events(&mut guest));
    // Pages of a mapped cache file that wait to be written back would count as private.
    rustix::fs::syncfs(File::open(&cache)?)?;
    // So would guest memory that only the daemon has touched.
    guest.memory().digest(SLOTS);
    let count = sample.latencies.len() as f64;
    let seconds = sample.elapsed.as_secs_f64();
    Ok(Figures {
        requests: count / seconds,
        bytes: sample.bytes as f64 / seconds,
        entries: plan.entries as f64 / seconds,
        latency_us: sample.quantiles(),
        cpu_us: (after.0 - before.0) as f64 / count,
        kicks: (after.1.0 - before.1.0) as f64 / count,
        calls: (after.1.1 - before.1.1) as f64 / count,
        private: process.private_bytes() as f64,
    })
}

/// Kicks and interrupts of all queues so far.
fn events(guest: &mut Guest) -> (u64, u64) {
    guest.lanes().iter_mut().fold((0, 0), |sum, lane| (sum.0 + lane.queue().kicks(), sum.1 + lane.queue().calls()))
}

/// When a drive ends.
#[derive(Debug, Clone, Copy)]
enum Until {
    Time(Duration),
    Questions(u64),
}

impl Until {
    fn time(seconds: f64) -> Self {
        Self::Time(Duration::from_secs_f64(seconds))
    }

    fn is_over(self, start: Instant, asked: u64) -> bool {
        match self {
            Self::Time(time) => start.elapsed() >= time,
            Self::Questions(questions) => asked >= questions,
        }
    }
}

#[derive(Debug, Default)]
struct Sample {
    /// Nanoseconds.
    latencies: Vec<u32>,
    bytes: u64,
    elapsed: Duration,
}

impl Sample {
    fn quantiles(&self) -> [f64; 3] {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        [0.5, 0.99, 0.999].map(|q| {
            let place = ((sorted.len() as f64 * q) as usize).min(sorted.len().saturating_sub(1));
            sorted.get(place).map_or(0.0, |ns| f64::from(*ns) / 1000.0)
        })
    }
}

/// Keeps all streams busy until `until`, then waits for what is in flight.
fn drive(guest: &mut Guest, plan: &mut Plan, case: &Case, until: Until) -> Result<Sample> {
    let mut sample = Sample { latencies: Vec::with_capacity(4 << 20), ..Sample::default() };
    let start = Instant::now();
    let mut sent = vec![start; case.depth * usize::from(case.queues)];
    let mut asked = 0;
    for queue in 1..=usize::from(case.queues) {
        for slot in 0..case.depth {
            if until.is_over(start, asked) {
                break;
            }
            let stream = (queue - 1) * case.depth + slot;
            let request = plan.next(stream, guest.lane(queue), None)?;
            sent[stream] = Instant::now();
            guest.lane(queue).submit(&request)?;
            asked += 1;
        }
        guest.lane(queue).publish()?;
    }
    let mut last = start;
    while (sample.latencies.len() as u64) < asked {
        let mut seen = 0;
        for queue in 1..=usize::from(case.queues) {
            let lane = guest.lane(queue);
            while let Some(done) = lane.complete()? {
                let stream = (queue - 1) * case.depth + done.slot();
                last = Instant::now();
                sample.latencies.push(u32::try_from((last - sent[stream]).as_nanos()).unwrap_or(u32::MAX));
                sample.bytes += if done.opcode == opcode::READ { u64::from(done.body_bytes) } else { 0 };
                seen += 1;
                if until.is_over(start, asked) {
                    lane.release(done);
                    continue;
                }
                let request = plan.next(stream, lane, Some(&done))?;
                lane.release(done);
                sent[stream] = Instant::now();
                lane.submit(&request)?;
                asked += 1;
            }
            lane.publish()?;
        }
        if seen == 0 {
            ensure!(last.elapsed() < PATIENCE, "no completion for {PATIENCE:?}");
            match case.mode {
                Notice::Poll => std::hint::spin_loop(),
                Notice::Event => guest.sleep(PATIENCE)?,
            }
        }
    }
    sample.elapsed = last - start;
    Ok(sample)
}
