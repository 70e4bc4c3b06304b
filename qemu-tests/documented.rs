//! The published QEMU command line, used literally but for accelerator, processor, memory size and paths, with an
//! initrd and a partitioned disk; and once more with the device's defaults.

use std::path::Path;
use std::path::PathBuf;

use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;

use crate::daemon::Daemon;
use crate::guest::Kernel;
use crate::guest::trial;
use crate::image::Image;
use crate::kernels::MOUNT;
use crate::tree;
use crate::vm::Line;
use crate::vm::Setup;
use crate::vm::Vm;

/// What the guest finds at the start of the disk's first partition.
const MARK: &str = "the first partition";

pub fn trials() -> Vec<Trial> {
    Kernel::ALL
        .into_iter()
        .flat_map(|kernel| {
            [
                trial("documented_command_line_works", kernel, |kernel| {
                    works(kernel, |disk| Line::Documented { disk })
                }),
                trial("documented_command_line_with_defaults_works", kernel, |kernel| {
                    works(kernel, |disk| Line::DocumentedDefaults { disk })
                }),
            ]
        })
        .collect()
}

fn works(kernel: Kernel, line: impl FnOnce(PathBuf) -> Line) -> Result<()> {
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start(&image)?;
    let scratch = tempfile::tempdir()?;
    let setup = Setup { line: line(partitioned_disk(scratch.path())?), processors: 2, ..Setup::lean(kernel) };
    let mut vm = Vm::boot(&setup, &daemon.socket())?;
    vm.run(MOUNT)?;
    image.expected().compare(&vm.walk("/mnt")?)?;
    let seen = vm.run(&format!("dd if=/dev/vda1 bs={} count=1 2>/dev/null", MARK.len()))?;
    ensure!(seen == MARK, "the disk's first partition begins with {seen:?}");
    vm.power_off()?;
    daemon.stop()
}

/// A disk with a DOS partition table of one partition.
fn partitioned_disk(directory: &Path) -> Result<PathBuf> {
    const SECTOR: usize = 512;
    const START: u32 = 2048;
    const SECTORS: u32 = 2048;
    const ENTRY: usize = 446;
    const LINUX: u8 = 0x83;
    let mut disk = vec![0; (START + SECTORS) as usize * SECTOR];
    disk[ENTRY + 4] = LINUX;
    disk[ENTRY + 8..ENTRY + 12].copy_from_slice(&START.to_le_bytes());
    disk[ENTRY + 12..ENTRY + 16].copy_from_slice(&SECTORS.to_le_bytes());
    disk[SECTOR - 2..SECTOR].copy_from_slice(&[0x55, 0xaa]);
    let partition = START as usize * SECTOR;
    disk[partition..partition + MARK.len()].copy_from_slice(MARK.as_bytes());
    let path = directory.join("disk.img");
    std::fs::write(&path, disk)?;
    Ok(path)
}
