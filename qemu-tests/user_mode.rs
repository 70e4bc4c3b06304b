//! User-Mode Linux: a kernel that is a process, and the vhost-user frontend itself. Not QEMU, but a real guest, and the
//! only one whose VMM never stops a ring properly.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;

use crate::daemon::Daemon;
use crate::guest::Kernel;
use crate::guest::trial;
use crate::image::Image;
use crate::manifest::Manifest;
use crate::peer::ours_only;
use crate::relay;
use crate::tree;

/// From its start to its end: 3 s where nothing else runs.
const PATIENCE: Duration = Duration::from_secs(120);
const TICK: Duration = Duration::from_millis(50);

/// Lists the tree, lets the driver go and takes it again, also while the file system is still mounted, and lists it
/// again.
const SCRIPT: &str = r#"
driver=/sys/bus/virtio/drivers/virtiofs
list() {
    mount -t virtiofs nydus /mnt && echo @begin && /bin/qemu-tests walk /mnt && echo @end
}
again() {
    device=$(cd $driver && echo virtio*)
    echo "$device" >$driver/unbind
    echo "$device" >$driver/bind
}
list && umount /mnt && again && list && again; umount -l /mnt; list && echo @done
"#;

pub fn trials() -> Vec<Trial> {
    // Peers need a tag from their command line, which Debian's has not.
    vec![ours_only(trial("user_mode_linux_mounts_and_rebinds", Kernel::UserMode, mounts_and_rebinds))]
}

fn mounts_and_rebinds(kernel: Kernel) -> Result<()> {
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start_with(&image, &["--tag", "nydus"])?;
    let console = run(kernel, SCRIPT, &daemon)?;
    let lists: Vec<_> = console.split("@begin\n").skip(1).filter_map(|part| part.split_once("@end\n")).collect();
    ensure!(lists.len() == 3 && console.contains("@done"), "{console}");
    for (list, _) in lists {
        image.expected().compare(&Manifest::parse(list)?).with_context(|| console.clone())?;
    }
    daemon.stop()
}

/// Boots it, runs `script` in it, and returns what it writes to its console, when it has ended.
fn run(kernel: Kernel, script: &str, daemon: &Daemon) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("relay.sock");
    relay::start(UnixListener::bind(&socket)?, &daemon.socket())?;
    let console = directory.path().join("console.log");
    let mut command = Command::new(kernel.linux_uml()?);
    command.args(["mem=256M", "con=null", "con0=null,fd:1", "quiet", "panic=-1", "rdinit=/init"]);
    command.arg("nydus.port=/dev/console");
    command.arg(format!("initrd={}", kernel.initramfs(directory.path(), Some(script))?.display()));
    command.arg(format!("virtio_uml.device={}:26:1", socket.display()));
    let output = File::create(&console)?;
    // Its memory is a file there.
    command.env("TMPDIR", "/dev/shm").stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let mut linux = command.spawn().with_context(|| format!("{command:?}"))?;
    let deadline = Instant::now() + PATIENCE;
    let read = || anyhow::Ok(String::from_utf8_lossy(&std::fs::read(&console)?).replace('\r', ""));
    while linux.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            linux.kill()?;
            linux.wait()?;
            anyhow::bail!("User-Mode Linux does not end:\n{}", read()?);
        }
        std::thread::sleep(TICK);
    }
    read()
}
