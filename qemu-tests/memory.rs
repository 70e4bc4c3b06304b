//! Guest memory that is not one plain file: modules that come and go under two devices, and huge pages.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::guest::Kernel;
use crate::guest::trial;
use crate::image::Image;
use crate::kernels::MOUNT;
use crate::tree;
use crate::vm::Memory;
use crate::vm::Second;
use crate::vm::Setup;
use crate::vm::Vm;

/// Bytes of a memory module.
const MODULE_BYTES: u64 = 512 << 20;
/// For a guest to see a new module, and for readers to go round: TCG under load is slow.
const PATIENCE: Duration = Duration::from_secs(120);
const TICK: Duration = Duration::from_millis(200);

/// Reads all files of `$1` over and over, past the page cache, and compares their sums.
const READER: &str = r#"
read_on() {
    (cd $1 && find . -type f -exec md5sum {} +) >/tmp/$2.sums
    turns=0
    while [ ! -e /tmp/stop ]; do
        echo 1 >/proc/sys/vm/drop_caches
        (cd $1 && md5sum -c /tmp/$2.sums) >/tmp/$2.seen 2>&1 || cat /tmp/$2.seen >>/tmp/$2.bad
        turns=$((turns + 1))
        echo $turns >/tmp/$2.turns
    done
    echo ended >/tmp/$2.ended
}
"#;

pub fn trials() -> Vec<Trial> {
    let plugged = trial("memory_comes_and_goes_under_two_devices", Kernel::V7, memory_comes_and_goes);
    let mut trials = vec![plugged];
    let huge = trial("guest_of_huge_pages_reads_right", Kernel::V6_1, huge_pages);
    let missing = HugePages::missing();
    if let Some(reason) = &missing {
        eprintln!("SKIPPED {}: {reason}", huge.name());
    }
    trials.push(if missing.is_some() { huge.with_ignored_flag(true) } else { huge });
    trials
}

/// Files of 2 MiB, twelve of them, none like another.
fn large(root: &Path) -> Result<()> {
    for number in 0..12_u64 {
        let mut word = number + 1;
        let mut next = || {
            // xorshift: cannot be compressed, and is the same in every run.
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            word.to_le_bytes()
        };
        let content: Vec<u8> = (0..(2 << 20) / 8).flat_map(|_| next()).collect();
        std::fs::write(root.join(format!("file-{number}")), content)?;
    }
    Ok(())
}

fn memory_comes_and_goes(kernel: Kernel) -> Result<()> {
    let [first, second] = [Image::made(tree::system)?, Image::made(large)?];
    let [daemon, other] = [Daemon::start(&first)?, Daemon::start(&second)?];
    let beside = Some(Second { tag: "second", socket: other.socket() });
    let setup = Setup { memory: Memory::HotPlug, second: beside, processors: 2, ..Setup::lean(kernel) };
    let mut vm = Vm::boot(&setup, &daemon.socket())?;
    vm.run(&format!("{MOUNT} && mkdir -p /tmp/second && mount -t virtiofs second /tmp/second"))?;
    let check = |vm: &mut Vm| {
        first.expected().compare(&vm.walk("/mnt")?).context("the first device")?;
        second.expected().compare(&vm.walk("/tmp/second")?).context("the second device")
    };
    check(&mut vm)?;
    let begin = "(read_on /mnt one) & (read_on /tmp/second two) & true";
    vm.run(&format!("{READER}\n({begin}) >/dev/null 2>&1 </dev/null"))?;
    go_round(&mut vm)?;
    for module in ["module0", "module1"] {
        let before = kibibytes(&mut vm)?;
        vm.plug(module, MODULE_BYTES)?;
        until("the guest sees its new memory", || Ok(kibibytes(&mut vm)? > before + (MODULE_BYTES >> 11)))?;
        go_round(&mut vm)?;
        let taken = vm.run(MOVABLE_PAGES_TAKEN)?;
        ensure!(taken.trim().parse::<u64>().is_ok_and(|pages| pages > 256), "{taken:?} pages of the module are used");
        vm.unplug(module)?;
        ensure!(kibibytes(&mut vm)? == before, "memory after {module} has gone");
        go_round(&mut vm)?;
    }
    vm.run("touch /tmp/stop")?;
    until("the readers end", || Ok(vm.run("cat /tmp/*.ended | wc -l")?.trim() == "2"))?;
    let bad = vm.run("cat /tmp/*.bad 2>/dev/null | head -n 20; true")?;
    ensure!(bad.is_empty(), "read wrong:\n{bad}");
    check(&mut vm)?;
    vm.power_off()?;
    daemon.stop()?;
    other.stop()
}

/// Pages of the movable zone that are not free.
const MOVABLE_PAGES_TAKEN: &str = r#"
awk '/zone +Movable/ { zone = 1 } zone && $1 == "pages" { free = $3 } zone && $1 == "present" { print $2 - free; exit }' \
    /proc/zoneinfo
"#;

/// Memory that the guest has, in KiB.
fn kibibytes(vm: &mut Vm) -> Result<u64> {
    let seen = vm.run("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")?;
    seen.trim().parse().with_context(|| format!("MemTotal is {seen:?}"))
}

/// Waits until each reader has begun and ended another turn.
fn go_round(vm: &mut Vm) -> Result<()> {
    let turns = |vm: &mut Vm| -> Result<Vec<u64>> {
        let seen = vm.run("cat /tmp/one.turns /tmp/two.turns 2>/dev/null; true")?;
        Ok(seen.lines().filter_map(|line| line.parse().ok()).collect())
    };
    let before = turns(vm)?;
    let before = |reader: usize| before.get(reader).copied().unwrap_or(0);
    until("the readers go round", || {
        let now = turns(vm)?;
        Ok(now.len() == 2 && (0..2).all(|reader| now[reader] >= before(reader) + 2))
    })
}

fn until(what: &str, mut happened: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !happened()? {
        ensure!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(TICK);
    }
    Ok(())
}

fn huge_pages(kernel: Kernel) -> Result<()> {
    let pages = HugePages::mount()?;
    let image = Image::made(tree::system)?;
    let daemon = Daemon::start(&image)?;
    let memory = Memory::HugePages(pages.path());
    let mut vm = Vm::boot(&Setup { memory, ..Setup::lean(kernel) }, &daemon.socket())?;
    vm.run(MOUNT)?;
    image.expected().compare(&vm.walk("/mnt")?)?;
    vm.run("echo 3 >/proc/sys/vm/drop_caches")?;
    image.expected().compare(&vm.walk("/mnt")?).context("second walk")?;
    ensure!(HugePages::free()? < pages.free, "the guest uses no huge page");
    vm.power_off()?;
    daemon.stop()
}

/// A hugetlbfs with room for a guest. Unmounted when it is dropped, and the machine's number of pages put back.
struct HugePages {
    directory: TempDir,
    before: String,
    free: u64,
}

const NUMBER: &str = "/proc/sys/vm/nr_hugepages";
/// 512 MiB of 2 MiB each.
const PAGES: u64 = 256;

impl HugePages {
    /// Why there can be none, if so.
    fn missing() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("only root may mount a hugetlbfs".to_owned());
        }
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let size = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        match (size("Hugepagesize:"), size("MemAvailable:")) {
            (Some(2048), Some(available)) if available > (2 << 20) => None,
            seen => Some(format!("no pages of 2 MiB, or less than 2 GiB of memory: {seen:?}")),
        }
    }

    fn free() -> Result<u64> {
        let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
        Ok(std::fs::read_to_string(path)?.trim().parse()?)
    }

    fn mount() -> Result<Self> {
        let before = std::fs::read_to_string(NUMBER)?.trim().to_owned();
        let mut pages = Self { directory: tempfile::tempdir()?, before, free: 0 };
        let missing = PAGES.saturating_sub(Self::free()?);
        std::fs::write(NUMBER, (pages.before.parse::<u64>()? + missing).to_string())?;
        pages.free = Self::free()?;
        ensure!(pages.free >= PAGES, "{} of {PAGES} huge pages are to be had", pages.free);
        let mut mount = Command::new("mount");
        mount.args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"]).arg(pages.path());
        ensure!(mount.status()?.success(), "{mount:?} failed");
        Ok(pages)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().to_path_buf()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Best effort: what a failed test leaves must not hide why it failed.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
        let _ = std::fs::write(NUMBER, &self.before);
    }
}
