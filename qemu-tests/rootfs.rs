//! A guest whose root file system is the image: directly from the kernel's command line, and through an initramfs
//! where virtiofs is a module.

use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;

use crate::daemon::Daemon;
use crate::guest::Kernel;
use crate::guest::trial;
use crate::image::Image;
use crate::tree;
use crate::vm::Setup;
use crate::vm::Start;
use crate::vm::Vm;

/// Moves from the initramfs into the image. `guest-images/init` is the image's `/init` as well and makes its own mounts.
/// Without /proc the shell finds no applet any more, hence the path.
const SWITCH: &str = "exec 3>&-; mkdir /image; mount -t virtiofs -o ro nydus /image && \
                      umount /sys /tmp /run /proc && exec /bin/busybox switch_root /image /init";

pub fn trials() -> Vec<Trial> {
    vec![
        trial("root_file_system_without_initramfs_boots_to_a_shell", Kernel::V7, |kernel| {
            boots(&Setup { start: Start::RootOnVirtiofs, ..Setup::lean(kernel) })
        }),
        trial("root_file_system_after_switch_root_boots_to_a_shell", Kernel::V6_1, |kernel| {
            boots(&Setup { start: Start::Script(SWITCH), ..Setup::lean(kernel) })
        }),
    ]
}

fn boots(setup: &Setup<'_>) -> Result<()> {
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start(&image)?;
    let mut vm = Vm::boot(setup, &daemon.socket())?;
    let kind = vm.run("stat -f -c %T /; grep ' / virtiofs ' /proc/mounts")?;
    ensure!(kind.contains("virtiofs"), "the root file system is {kind:?}");
    ensure!(vm.run("/bin/greet")? == "hello from the image\n", "another greeting");
    for number in [1_usize, 42, 299] {
        let content = vm.run(&format!("cat /usr/share/many/{number:04}"))?;
        ensure!(content == format!("file {number}\n").repeat(number), "file {number} differs");
    }
    vm.power_off()?;
    daemon.stop()
}
