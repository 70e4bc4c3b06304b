//! `nydusd`: serves RAFS images to virtual machines over vhost-user-fs.

use std::process::ExitCode;

fn main() -> ExitCode {
    nydus_vm::cli::nydusd::run(std::env::args_os())
}
