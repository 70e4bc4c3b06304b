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
mod workload;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use anyhow::Result;

use arguments::Arguments;
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

fn run(arguments: &Arguments) -> Result<()> {
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
                figures.push(measured.with_context(|| format!("{} with {}", case, daemon.name))?);
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
