//! Images that our `nydus-image` makes, as read by others: the kernel's EROFS, which reads uncompressed ones without a
//! daemon, and Debian's `fsck.erofs`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Failed;
use libtest_mimic::Trial;

use crate::daemon::Daemon;
use crate::daemon::peer;
use crate::guest::Kernel;
use crate::guest::trial;
use crate::image::Image;
use crate::kernels::MOUNT;
use crate::tree;
use crate::vm::Setup;
use crate::vm::Vm;

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> =
        Kernel::ALL.into_iter().map(|kernel| trial("kernel_erofs_reads_own_image", kernel, kernel_reads)).collect();
    trials.push(Trial::test("fsck_erofs_accepts_own_images", || {
        fsck_accepts().map_err(|error| Failed::from(format!("{error:?}")))
    }));
    // A peer serves plain trees and has no images.
    trials.into_iter().map(|trial| if peer().is_some() { trial.with_ignored_flag(true) } else { trial }).collect()
}

/// The same uncompressed image twice in one guest: from our daemon, and from two disks through the kernel's EROFS.
fn kernel_reads(kernel: Kernel) -> Result<()> {
    let image = Image::made_with(tree::system, "none")?;
    let daemon = Daemon::start(&image)?;
    let disks = [image.bootstrap().to_path_buf(), blob(&image)?];
    let mut vm = Vm::boot(&Setup { disks: &disks, ..Setup::lean(kernel) }, &daemon.socket())?;
    vm.run("mkdir /tmp/erofs && mount -t erofs -o ro,device=/dev/vdb /dev/vda /tmp/erofs")?;
    image.expected().compare(&vm.walk("/tmp/erofs")?).context("through EROFS")?;
    vm.run(MOUNT)?;
    image.expected().compare(&vm.walk("/mnt")?).context("through the daemon")?;
    vm.power_off()?;
    daemon.stop()
}

fn fsck_accepts() -> Result<()> {
    for compressor in ["none", "lz4_block", "zstd"] {
        let image = Image::made_with(tree::system, compressor)?;
        let mut fsck = Command::new("fsck.erofs");
        fsck.arg(format!("--device={}", blob(&image)?.display())).arg(image.bootstrap());
        let checked = match fsck.output() {
            Ok(checked) => checked,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("SKIPPED: fsck.erofs is missing; scripts/setup provides it");
                return Ok(());
            }
            Err(error) => return Err(error).context("fsck.erofs"),
        };
        let said = String::from_utf8_lossy(&checked.stderr);
        ensure!(checked.status.success(), "fsck.erofs refuses the {compressor} image: {said}");
    }
    Ok(())
}

/// The image's only blob.
fn blob(image: &Image) -> Result<PathBuf> {
    let mut blobs = image.blobs().read_dir()?;
    let blob = blobs.next().context("the image has no blob")??.path();
    ensure!(blobs.next().is_none(), "the image has several blobs");
    Ok(blob)
}
