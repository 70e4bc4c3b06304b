//! The table.

use std::time::Duration;

use crate::arguments::Arguments;
use crate::daemons::Daemon;
use crate::measure::Case;
use crate::measure::Figures;
use crate::workload::Workload;

/// Prints lines as they come.
pub struct Report {
    names: Vec<String>,
    has_header: bool,
    rounds: usize,
}

impl Report {
    /// A report on `daemons`.
    pub fn new(arguments: &Arguments, daemons: &[Daemon]) -> Self {
        let names = daemons.iter().map(|daemon| daemon.name.clone()).collect();
        Self { names, has_header: false, rounds: arguments.rounds }
    }

    /// Prints the lines of `case`: per daemon the medians of its rounds. `limit` is the time of a plain copy.
    pub fn add(&mut self, case: &Case, rounds: &[Vec<Figures>], limit: Option<Duration>) {
        if !self.has_header {
            self.has_header = true;
            println!(
                "{:<20} {:>5} {:>6} {:<5} {:<8} {:<12} {:>9} {:>7} {:>8} {:>8} {:>8} {:>7} {:>6} {:>6} {:>7} {:>8} {:>6} {:>6}",
                "workload",
                "depth",
                "queues",
                "mode",
                "chains",
                "daemon",
                "req/s",
                "MB/s",
                "p50 us",
                "p99 us",
                "p99.9 us",
                "CPU us",
                "kicks",
                "calls",
                "priv MB",
                "limit us",
                "limit%",
                "x peer"
            );
        }
        let medians: Vec<_> = rounds.iter().map(|figures| median(figures)).collect();
        let limit_us = limit.map(|limit| limit.as_secs_f64() * 1e6);
        for (place, (name, figures)) in self.names.iter().zip(&medians).enumerate() {
            let Some(figures) = figures else { continue };
            let peers = medians.iter().enumerate().filter(|(other, _)| *other != place);
            let best = peers.filter_map(|(_, peer)| Some(peer.as_ref()?.cpu_us)).min_by(f64::total_cmp);
            print!(
                "{:<20} {:>5} {:>6} {:<5} {:<8} {:<12} ",
                name_of(case.workload),
                case.depth,
                case.queues,
                case.mode.to_string(),
                case.chains.to_string(),
                name
            );
            print!(
                "{:>9.0} {:>7} ",
                figures.requests,
                or_dash((figures.bytes > 0.0).then_some(figures.bytes / 1e6), 0)
            );
            let [p50, p99, p999] = figures.latency_us;
            print!("{p50:>8.1} {p99:>8.1} {p999:>8.1} {:>7.2} ", figures.cpu_us);
            print!("{:>6.3} {:>6.3} {:>7.1} ", figures.kicks, figures.calls, figures.private / 1e6);
            let share = limit_us.map(|limit| 100.0 * limit / figures.cpu_us);
            print!("{:>8} {:>6} ", or_dash(limit_us, 2), or_dash(share, 0));
            println!("{:>6}", or_dash(best.map(|peer| peer / figures.cpu_us), 2));
            if case.workload == Workload::Readdirplus {
                println!("{:<53} {:>9.0} entries/s", "", figures.entries);
            }
        }
    }

    /// Says how to read it.
    pub fn finish(&self) {
        println!();
        println!(
            "Medians of {} round(s). CPU us: user and system time of the daemon per request, from /proc.",
            self.rounds
        );
        println!(
            "limit us: a plain copy of the same bytes from a mapped file by one thread; limit%: its share of CPU us."
        );
        println!("x peer: CPU us of the best other daemon, divided by this one's. MB are 10^6 bytes.");
    }
}

fn name_of(workload: Workload) -> String {
    clap::ValueEnum::to_possible_value(&workload).map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn or_dash(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

fn median(figures: &[Figures]) -> Option<Figures> {
    let of = |field: fn(&Figures) -> f64| {
        let mut values: Vec<_> = figures.iter().map(field).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    Some(Figures {
        requests: of(|f| f.requests)?,
        bytes: of(|f| f.bytes)?,
        entries: of(|f| f.entries)?,
        latency_us: [of(|f| f.latency_us[0])?, of(|f| f.latency_us[1])?, of(|f| f.latency_us[2])?],
        cpu_us: of(|f| f.cpu_us)?,
        kicks: of(|f| f.kicks)?,
        calls: of(|f| f.calls)?,
        private: of(|f| f.private)?,
    })
}
