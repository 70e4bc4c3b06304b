//! Tests that boot a real guest: Linux in QEMU mounts what our daemon serves.
//!
//! One guest runs at a time, since each one takes a processor or two where there is no KVM. A test that cannot run
//! here (no QEMU, no guest kernel, no reference images) is shown as ignored, with the reason on stderr;
//! `scripts/setup` provides all of it. The same executable is copied into the guests, where `walk DIR` prints a tree.

mod cpio;
mod daemon;
mod documented;
mod guest;
mod image;
mod kernels;
mod lifecycle;
mod manifest;
mod memory;
mod overlay;
mod peer;
mod qmp;
mod relay;
mod rootfs;
mod tree;
mod user_mode;
mod vm;
mod walk;

use std::process::ExitCode;

use libtest_mimic::Arguments;
use libtest_mimic::Trial;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == "walk") {
        return walk::main(words.next().unwrap_or_default().as_ref());
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(kernels::trials());
    trials.extend(documented::trials());
    trials.extend(lifecycle::trials());
    trials.extend(rootfs::trials());
    trials.extend(overlay::trials());
    trials.extend(memory::trials());
    trials.extend(user_mode::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}
