//! `nydus-image`: makes RAFS images.

use std::process::ExitCode;

fn main() -> ExitCode {
    nydus_vm::cli::image::run(std::env::args_os())
}
