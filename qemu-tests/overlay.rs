//! The guest kernel's overlayfs with the image as lower layer and a tmpfs above it, as Kata uses it.

use anyhow::Context;
use anyhow::Result;
use libtest_mimic::Trial;

use crate::daemon::Daemon;
use crate::guest::Kernel;
use crate::guest::trial;
use crate::image::Image;
use crate::kernels::MOUNT;
use crate::tree;
use crate::vm::Setup;
use crate::vm::Vm;

/// Mounts the overlay at /tmp/o/merged.
const OVERLAY: &str = "mkdir -p /tmp/o/upper /tmp/o/work /tmp/o/merged && mount -t overlay overlay \
    -o lowerdir=/mnt,upperdir=/tmp/o/upper,workdir=/tmp/o/work,index=off /tmp/o/merged";

/// Each step: what it shows, and a script that fails where that does not hold. They build on one another.
const STEPS: [(&str, &str); 9] = [
    ("create", "echo new >etc/new && [ \"$(cat etc/new)\" = new ] && [ ! -e /mnt/etc/new ]"),
    ("write to a lower file", "echo more >>etc/greeting && [ \"$(wc -l <etc/greeting)\" = 2 ]"),
    ("write elsewhere leaves the lower file", "[ \"$(wc -l </mnt/etc/greeting)\" = 1 ]"),
    (
        "delete leaves a whiteout",
        "rm usr/share/many/0007 && [ ! -e usr/share/many/0007 ] && [ -c /tmp/o/upper/usr/share/many/0007 ]",
    ),
    ("rename", "mv usr/share/many/0009 etc/nine && [ \"$(wc -l <etc/nine)\" = 9 ] && [ ! -e usr/share/many/0009 ]"),
    (
        "rename over a lower file",
        "mv usr/share/many/0010 usr/share/many/0011 && [ \"$(wc -l <usr/share/many/0011)\" = 10 ]",
    ),
    ("listing shows the changes", "[ \"$(ls usr/share/many | wc -l)\" = 297 ]"),
    ("exec", "chroot . /bin/greet | grep -q more"),
    (
        "a directory made again is empty",
        "rm -r usr/share/many && mkdir usr/share/many && [ -z \"$(ls -A usr/share/many)\" ]",
    ),
];

pub fn trials() -> Vec<Trial> {
    Kernel::ALL.into_iter().map(|kernel| trial("kernel_overlay_on_the_image_works", kernel, overlay)).collect()
}

fn overlay(kernel: Kernel) -> Result<()> {
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start(&image)?;
    let mut vm = Vm::boot(&Setup::lean(kernel), &daemon.socket())?;
    vm.run(MOUNT)?;
    vm.run(OVERLAY)?;
    for (name, script) in STEPS {
        vm.run(&format!("cd /tmp/o/merged && {script}")).context(name)?;
    }
    // Whiteouts and copies are found again by a new overlay on the same layers.
    vm.run("umount /tmp/o/merged")?;
    vm.run("echo 3 >/proc/sys/vm/drop_caches")?;
    vm.run(OVERLAY)?;
    vm.run(
        "cd /tmp/o/merged && [ -z \"$(ls -A usr/share/many)\" ] && [ \"$(wc -l <etc/nine)\" = 9 ] && [ -e etc/new ]",
    )?;
    image.expected().compare(&vm.walk("/mnt")?).context("the lower layer after all")?;
    vm.power_off()?;
    daemon.stop()
}
