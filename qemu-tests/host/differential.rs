//! Our reader against others: the kernel's EROFS, `dump.erofs` and `fsck.erofs`, which know nothing of us.
//!
//! They are asked about every v6 reference image and about images that our builder makes of random trees. The kernel reads
//! uncompressed blobs; such a device is made of any blob that [`Readback`] decodes. Of the others it is a hole, and only
//! metadata is compared: fsck then judges superblock, inodes, directories, xattrs and chunk indexes, not the data.

mod dump;
mod subject;
mod tree;

use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use libtest_mimic::Trial;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use nydus_vm::testing::manifest::Entry;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::snapshot;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;

use crate::mounted::Mounted;
use crate::mounted::needs_command;
use crate::mounted::needs_erofs;
use crate::trial;
use subject::Data;
use subject::Subject;

/// Random trees of a usual run.
const TREES: u64 = 6;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for name in nydus_vm::testing::manifest::REFERENCES.into_iter().filter(|name| name.starts_with("v6-")) {
        let known = || match std::env::var_os("NYDUS_REFERENCE_DIR") {
            Some(_) => Ok(()),
            None => Err("NYDUS_REFERENCE_DIR is not set".to_owned()),
        };
        let test = move |check: fn(&Subject, &Path) -> Result<()>| {
            move || {
                let scratch = tempfile::tempdir()?;
                let image = TestImage::named(name).context("there are reference images")?;
                check(&Subject::of(image, scratch.path())?, scratch.path())
            }
        };
        let [kernel, dump, fsck] = [needs_erofs(), needs_command("dump.erofs"), needs_command("fsck.erofs")];
        let of = |what: &str| format!("{what}_{}", name.replace('-', "_"));
        trials.push(trial(&of("kernel_agrees_with_reader_on"), known().and(kernel), test(kernel_agrees)));
        trials.push(trial(&of("dump_agrees_with_reader_on"), known().and(dump), test(|it, _| dump::agrees(it))));
        trials.push(trial(&of("fsck_accepts"), known().and(fsck), test(|it, _| it.is_accepted())));
    }
    for seed in 0..trees() {
        let missing = needs_erofs().and(needs_command("dump.erofs")).and(needs_command("fsck.erofs"));
        let name = format!("kernel_dump_fsck_and_reader_agree_on_random_tree_{seed}");
        trials.push(trial(&name, missing, move || random_tree(seed)));
    }
    trials
}

/// A thousandth of `PROPTEST_CASES`, which is set for long runs, and never less than usual.
fn trees() -> u64 {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse::<u64>().ok());
    cases.map_or(TREES, |cases| (cases / 1000).max(TREES))
}

/// An image of a random tree shows that tree, to everybody.
fn random_tree(seed: u64) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (source, folder) = (scratch.path().join("source"), scratch.path().join("image"));
    tree::make(&source, seed)?;
    let compressor = [Compressor::None, Compressor::Lz4Block, Compressor::Zstd][seed as usize % 3];
    let digester = if seed.is_multiple_of(2) { Digester::Blake3 } else { Digester::Sha256 };
    let chunk_bytes = [4096, 16 << 10, 1 << 20][seed as usize / 3 % 3];
    let made = make::image(&source, &folder, compressor, digester, chunk_bytes);
    let subject = Subject::of(TestImage::made("random", made, &folder), scratch.path())?;
    ensure!(subject.data == Data::Real, "what our builder makes can be read back");
    let expected = snapshot::of_tree(&source)?;
    same("our reader, without daemon", &expected, subject.entries.as_deref().context("it can be read back")?)?;
    kernel_agrees(&subject, scratch.path())?;
    dump::agrees(&subject)?;
    subject.is_accepted()
}

/// Mounts the image by the kernel, and walks it as a guest of our daemon.
fn kernel_agrees(subject: &Subject, scratch: &Path) -> Result<()> {
    let at = scratch.join("mounted");
    let devices: Vec<_> = subject.devices.iter().map(|device| device.as_path()).collect();
    let mut kernels = {
        let _mounted = Mounted::erofs(&subject.bootstrap, &devices, &at)?;
        snapshot::of_tree(&at)?
    };
    if let Some(entries) = &subject.entries {
        same("our reader, without daemon", &kernels, entries)?;
    }
    let daemon = start(&subject.image, scratch)?;
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions::LINUX)?;
    let tree = walk(&mut guest, &WalkOptions::USUAL)?;
    if subject.data == Data::Holes {
        for entry in &mut kernels {
            let found = tree.found.iter().find(|found| found.path == entry.path);
            entry.sha256 = found.and_then(|found| found.as_manifest().sha256);
        }
    }
    let differences = tree.differences(&kernels);
    ensure!(differences.is_empty(), "a guest of our daemon and the kernel:\n{}", differences.join("\n"));
    Ok(())
}

fn same(who: &str, expected: &[Entry], found: &[Entry]) -> Result<()> {
    match snapshot::difference(expected, found) {
        Some(difference) => bail!("{who}: {difference}"),
        None => Ok(()),
    }
}

/// Our daemon on `image`.
fn start(image: &TestImage, home: &Path) -> Result<DaemonProcess> {
    let (config, socket, cache) = (home.join("config.json"), home.join("vhost.sock"), home.join("cache"));
    std::fs::create_dir_all(&cache)?;
    std::fs::write(&config, image.config(&cache).to_string())?;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_nydusd"));
    command.arg("--config").arg(config).arg("--sock").arg(&socket).arg("--bootstrap").arg(&image.bootstrap);
    command.args(["--rlimit-nofile", "0"]);
    Ok(DaemonProcess::start(command, &socket, &home.join("log"))?)
}
