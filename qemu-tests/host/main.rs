//! Tests that need root, loop devices, or tools that a distribution installs.
//!
//! A test that cannot run here is shown as ignored, with the reason on stderr.

mod command;
mod differential;
mod disks;
mod erofs;
mod mounted;
mod power;
mod served;
mod upstream;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use libtest_mimic::Failed;
use libtest_mimic::Trial;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    trials.extend(command::trials());
    trials.extend(disks::trials());
    trials.extend(differential::trials());
    trials.extend(erofs::trials());
    trials.extend(power::trials());
    trials.extend(upstream::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A test, ignored if something is `missing`.
pub fn trial(
    name: &str,
    missing: Result<(), String>,
    test: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    let trial = Trial::test(name, move || test().map_err(|error| Failed::from(format!("{error:#}"))));
    match missing {
        Ok(()) => trial,
        Err(reason) => {
            eprintln!("SKIPPED {name}: {reason}");
            trial.with_ignored_flag(true)
        }
    }
}
