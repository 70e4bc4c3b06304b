//! Each kernel with each format: the whole tree, many readers at once, and what a guest asks a second time.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;

use crate::daemon::Daemon;
use crate::guest::Kernel;
use crate::guest::trial;
use crate::image::Image;
use crate::image::reference_directory;
use crate::peer::ours_only;
use crate::tree;
use crate::vm::Setup;
use crate::vm::Vm;

pub const MOUNT: &str = "mount -t virtiofs nydus /mnt";

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for kernel in Kernel::ALL {
        for name in ["v5-lz4-blake3", "v5-big", "v6-lz4-blake3", "v6-big"] {
            let test = trial(&format!("reference_{}_is_read_right", name.replace('-', "_")), kernel, |kernel| {
                whole_tree(kernel, &Image::reference(name)?)
            });
            if reference_directory().is_none() {
                eprintln!("SKIPPED {}: NYDUS_REFERENCE_DIR is not set", test.name());
                trials.push(test.with_ignored_flag(true));
            } else {
                trials.push(test);
            }
        }
        trials.push(trial("own_image_is_read_right", kernel, |kernel| whole_tree(kernel, &Image::made(tree::system)?)));
        trials.push(ours_only(trial("known_and_missing_paths_cost_no_request", kernel, stats_are_cached)));
    }
    trials.push(ours_only(trial("several_queues_are_used", Kernel::V7, several_queues)));
    trials
}

/// Compares the tree cold, warm, and as seen by many processes at once without the guest's cache.
fn whole_tree(kernel: Kernel, image: &Image) -> Result<()> {
    let daemon = Daemon::start(image)?;
    let mut vm = Vm::boot(&Setup { processors: 2, ..Setup::lean(kernel) }, &daemon.socket())?;
    vm.run(MOUNT)?;
    image.expected().compare(&vm.walk("/mnt")?).context("first walk")?;
    image.expected().compare(&vm.walk("/mnt")?).context("second walk")?;
    vm.run("echo 3 >/proc/sys/vm/drop_caches")?;
    vm.run(concat!(
        "for n in 1 2 3 4 5 6 7 8; do /bin/qemu-tests walk /mnt >/tmp/walk.$n & done; wait\n",
        "for n in 2 3 4 5 6 7 8; do cmp /tmp/walk.1 /tmp/walk.$n || exit 1; done",
    ))?;
    image
        .expected()
        .compare(&crate::manifest::Manifest::parse(&vm.run("cat /tmp/walk.1")?)?)
        .context("eight walks at once")?;
    vm.run("umount /mnt")?;
    vm.power_off()?;
    daemon.stop()
}

/// What a guest knows it does not ask again: neither that a path is there nor that it is not.
fn stats_are_cached(kernel: Kernel) -> Result<()> {
    let image = Image::made(tree::system)?;
    let mut daemon = Daemon::start(&image)?;
    let mut vm = Vm::boot(&Setup::lean(kernel), &daemon.socket())?;
    vm.run(MOUNT)?;
    for (path, test) in [("/mnt/usr/share/many/0017", "-e"), ("/mnt/usr/share/many/missing", "! -e")] {
        vm.run(&format!("[ {test} {path} ]"))?;
        let before = daemon.counters()?.requests()?;
        vm.run(&format!("n=0; while [ $n -lt 1000 ]; do [ {test} {path} ] || exit 1; n=$((n + 1)); done"))?;
        let cost = daemon.counters()?.requests()? - before;
        ensure!(cost == 0, "1,000 stats of {path} cost {cost} requests");
    }
    vm.power_off()?;
    daemon.stop()
}

/// Two processors on two request queues: both queues carry requests, and every byte is right.
fn several_queues(kernel: Kernel) -> Result<()> {
    let image = Image::made(tree::system)?;
    let mut daemon = Daemon::start(&image)?;
    let setup = Setup { processors: 2, request_queues: 2, ..Setup::lean(kernel) };
    let mut vm = Vm::boot(&setup, &daemon.socket())?;
    vm.run(MOUNT)?;
    for processor in ["1", "2"] {
        vm.run("echo 3 >/proc/sys/vm/drop_caches")?;
        let listing = vm.run(&format!("taskset {processor} /bin/qemu-tests walk /mnt"))?;
        image.expected().compare(&crate::manifest::Manifest::parse(&listing)?)?;
    }
    let queues = daemon.counters()?.requests_by_queue()?;
    ensure!(queues.len() >= 3 && queues[1] > 0 && queues[2] > 0, "requests by queue: {queues:?}");
    vm.power_off()?;
    daemon.stop()
}
