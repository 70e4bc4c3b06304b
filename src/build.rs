//! Records what `nydusd --version` prints: commit, time, profile and compiler.
//!
//! Commit and time are recorded in release builds only: looking at the repository again after every commit would build
//! the whole crate again for one line of text.

use std::env;
use std::process::Command;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

fn main() {
    let profile = env::var("PROFILE").unwrap_or_default();
    println!("cargo::rerun-if-changed=src/build.rs");
    println!("cargo::rerun-if-env-changed=SOURCE_DATE_EPOCH");
    let (mut commit, mut time) = ("unknown".to_owned(), "unknown".to_owned());
    if profile == "release" {
        println!("cargo::rerun-if-changed=.git/HEAD");
        println!("cargo::rerun-if-changed=.git/logs/HEAD");
        commit = output("git", &["rev-parse", "HEAD"]).unwrap_or(commit);
        let epoch = env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let seconds = format!("@{}", epoch.unwrap_or_else(now));
        time = output("date", &["-u", "-d", &seconds, "+%Y-%m-%dT%H:%M:%SZ"]).unwrap_or(time);
    }
    let rustc = env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let rustc = output(&rustc, &["--version"]).unwrap_or_else(|| "unknown".to_owned());
    for (name, value) in [("GIT_COMMIT", &commit), ("BUILD_TIME", &time), ("PROFILE", &profile), ("RUSTC", &rustc)] {
        println!("cargo::rustc-env=NYDUS_{name}={value}");
    }
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    Some(text).filter(|text| !text.is_empty())
}
