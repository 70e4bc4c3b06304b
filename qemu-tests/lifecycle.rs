//! Guests and VMMs come, go and die; the daemon serves the next one.

use std::time::Duration;

use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;

use crate::daemon::Daemon;
use crate::guest::Kernel;
use crate::guest::trial;
use crate::image::Image;
use crate::kernels::MOUNT;
use crate::peer::ours_only;
use crate::tree;
use crate::vm::Reset;
use crate::vm::Setup;
use crate::vm::Vm;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for kernel in Kernel::ALL {
        trials.push(trial("guest_reboots_on_the_same_daemon", kernel, reboot));
        trials.push(trial("driver_is_unbound_and_bound", kernel, unbind_and_bind));
        trials.push(trial("file_system_is_unmounted_and_mounted", kernel, umount_and_mount));
        // Peers end with their first connection.
        trials.push(ours_only(trial("daemon_outlives_killed_vmms", kernel, killed_vmm)));
    }
    trials
}

fn reboot(kernel: Kernel) -> Result<()> {
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start(&image)?;
    let mut vm = Vm::boot(&Setup { reset: Reset::Restarts, ..Setup::lean(kernel) }, &daemon.socket())?;
    for _ in 0..2 {
        vm.run(MOUNT)?;
        image.expected().compare(&vm.walk("/mnt")?)?;
        // Still mounted: the daemon hears no DESTROY.
        vm.reboot()?;
    }
    vm.run(MOUNT)?;
    image.expected().compare(&vm.walk("/mnt")?)?;
    vm.power_off()?;
    daemon.stop()
}

fn unbind_and_bind(kernel: Kernel) -> Result<()> {
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start(&image)?;
    let mut vm = Vm::boot(&Setup::lean(kernel), &daemon.socket())?;
    vm.run(MOUNT)?;
    image.expected().compare(&vm.walk("/mnt")?)?;
    let unbind = "cd /sys/bus/virtio/drivers/virtiofs; device=$(echo virtio*); echo $device >unbind; echo $device";
    let bind = |device: &str| format!("echo {device} >/sys/bus/virtio/drivers/virtiofs/bind");

    // As an orderly guest does it, and then with the file system still mounted.
    vm.run("umount /mnt")?;
    for unmount in ["true", "umount -l /mnt"] {
        let device = vm.run(unbind)?;
        vm.run(&bind(device.trim()))?;
        vm.run(unmount)?;
        vm.run(MOUNT)?;
        image.expected().compare(&vm.walk("/mnt")?)?;
    }
    vm.power_off()?;
    daemon.stop()
}

fn umount_and_mount(kernel: Kernel) -> Result<()> {
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start(&image)?;
    let mut vm = Vm::boot(&Setup::lean(kernel), &daemon.socket())?;
    vm.run(&format!(
        "n=0; while [ $n -lt 50 ]; do {MOUNT} && cat /mnt/etc/greeting && umount /mnt || exit 1; n=$((n + 1)); done"
    ))?;
    vm.run(MOUNT)?;
    image.expected().compare(&vm.walk("/mnt")?)?;
    // A mount that is busy lets go when its last user ends.
    vm.run("(cd /mnt; sleep 1) & umount -l /mnt; wait")?;
    vm.run(MOUNT)?;
    image.expected().compare(&vm.walk("/mnt")?)?;
    vm.power_off()?;
    daemon.stop()
}

fn killed_vmm(kernel: Kernel) -> Result<()> {
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start(&image)?;
    for _ in 0..3 {
        let mut vm = Vm::boot(&Setup::lean(kernel), &daemon.socket())?;
        vm.run(MOUNT)?;
        let reading = "while true; do echo 3 >/proc/sys/vm/drop_caches; cat /mnt/usr/share/many/* >/dev/null; done";
        vm.run(&format!("({reading}) >/dev/null 2>&1 </dev/null & true"))?;
        std::thread::sleep(Duration::from_millis(300));
        vm.kill()?;
    }
    let mut vm = Vm::boot(&Setup::lean(kernel), &daemon.socket())?;
    vm.run(MOUNT)?;
    ensure!(vm.run("cat /mnt/etc/greeting")? == "hello from the image\n", "another greeting");
    image.expected().compare(&vm.walk("/mnt")?)?;
    vm.power_off()?;
    daemon.stop()
}
