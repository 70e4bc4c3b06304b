//! Another daemon in place of ours.
//!
//! With `NYDUS_TEST_PEER=/usr/lib/qemu/virtiofsd` that daemon serves the unpacked tree: what fails then as well is a
//! fault of the guests or of the tests. Counters of a peer are not known.

use std::ffi::OsStr;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use libtest_mimic::Trial;

/// Whether the tests run against another daemon than ours.
pub fn peer() -> Option<PathBuf> {
    std::env::var_os("NYDUS_TEST_PEER").map(PathBuf::from)
}

/// The command line by which the peer `program` serves the tree `source` at `socket`.
pub fn command(program: &OsStr, source: &Path, socket: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg(format!("--socket-path={}", socket.display()));
    command.arg(format!("-osource={},cache=always,xattr,modcaps=+sys_admin", source.display()));
    command
}

/// A test of what peers do not do, or do not tell.
pub fn ours_only(trial: Trial) -> Trial {
    if peer().is_some() { trial.with_ignored_flag(true) } else { trial }
}
