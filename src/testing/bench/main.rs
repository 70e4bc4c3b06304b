//! What a daemon costs: requests over real vrings, per workload, beside peers and beside a plain copy of the same pages.
//!
//! `scripts/bench` is the front door. Every figure comes from a daemon started for it, bound to one processor, with the
//! driver on another; several daemons take turns, so that a machine that changes its speed changes it for all.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

mod arguments;
mod daemons;
mod material;
mod measure;
mod report;
mod studies;
mod workload;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use anyhow::Result;
use rustix::process::Resource;
use rustix::process::Rlimit;

use arguments::Arguments;
use arguments::Study;
use daemons::Daemon;
use material::Material;
use measure::Case;
use measure::Figures;
use report::Report;
use workload::Temperature;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Open files for peers that keep one per inode.
const OPEN_FILES: u64 = 1 << 20;

fn run(arguments: &Arguments) -> Result<()> {
    raise_open_files();
    for study in &arguments.studies {
        match study {
            Study::Workloads | Study::Compare => workloads(arguments)?,
            Study::Fill => studies::fill::run(arguments)?,
            Study::FirstByte => studies::first_byte::run(arguments)?,
            Study::Hang => studies::hang::run(arguments)?,
            Study::Drain => studies::drain::run(arguments)?,
            Study::Processes => studies::processes::run(arguments)?,
            Study::Zran => studies::zran::run(arguments)?,
        }
    }
    Ok(())
}

/// Root may raise the hard limit too; others go as far as theirs. A daemon that needs more says so.
fn raise_open_files() {
    let limits = rustix::process::getrlimit(Resource::Nofile);
    for maximum in [Some(OPEN_FILES), limits.maximum] {
        let wanted = Rlimit { current: maximum, maximum };
        if rustix::process::setrlimit(Resource::Nofile, wanted).is_ok() {
            return;
        }
    }
}

fn workloads(arguments: &Arguments) -> Result<()> {
    let daemons = Daemon::all(arguments)?;
    eprintln!("bench: making a tree and its image");
    let material = Material::make(arguments)?;
    let cases = Case::all(arguments);
    let mut report = Report::new(arguments, &daemons);
    for (number, case) in cases.iter().enumerate() {
        let mut rows: Vec<Vec<Figures>> = daemons.iter().map(|_| Vec::new()).collect();
        for round in 0..arguments.rounds {
            for (daemon, figures) in daemons.iter().zip(&mut rows) {
                if case.workload.temperature() == Temperature::Cold && !daemon.has_cache() {
                    continue;
                }
                progress(number, cases.len(), case, daemon, round);
                let measured = measure::measure(case, daemon, &material, arguments);
                match measured.with_context(|| format!("{} with {}", case, daemon.name)) {
                    Ok(measured) => figures.push(measured),
                    Err(error) if daemon.is_ours() => return Err(error),
                    // What a peer cannot do is a finding, and the others go on.
                    Err(error) => {
                        clear_line();
                        eprintln!("bench: {error:#}");
                    }
                }
            }
        }
        report.add(case, &rows, material.limit(case)?);
    }
    clear_line();
    report.finish();
    Ok(())
}

fn progress(number: usize, of: usize, case: &Case, daemon: &Daemon, round: usize) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K[{}/{of}] {case}: {}, round {}", number + 1, daemon.name, round + 1);
    }
}

fn clear_line() {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}
