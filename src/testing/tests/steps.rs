//! Kill -9 at every step of a fill.
//!
//! A child of this test binary walks an image on a cache directory and kills itself at the N-th step
//! ([`nydus_vm::storage::steps`]); for every N, until there is no N-th step any more. What it leaves is looked at from outside,
//! then served: right bytes, nothing repaired by hand, nothing fetched again that was published.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::ExitStatus;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nydus_vm::storage::steps;
use nydus_vm::storage::steps::Step;
use nydus_vm::testing::fault::Fault;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::manifest::Entry;
use nydus_vm::testing::room::Place;
use nydus_vm::testing::room::Room;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;
use nydus_vm::testing::vmm::PATIENCE;
use rustix::process::Signal;

use crate::cached;
use crate::cached::DATA;
use crate::cached::Files;
use crate::cached::Known;
use crate::cached::META;
use crate::soak::Dice;
use crate::support::SMALL;
use crate::support::socket;

/// One request after the other, so that the N-th step is the same in each run.
const ONE_BY_ONE: WalkOptions = WalkOptions { in_flight: 1, read_bytes: 8 << 10, ..WalkOptions::USUAL };
const GUEST: GuestOptions = GuestOptions { reply_bytes: 64 << 10, ..SMALL };

/// What a child finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// No directory.
    Nothing,
    /// A copy of a whole directory, as somebody restores it from a backup: hints, and one of the chunks is wrong.
    Copied,
    /// Half a fill of the last boot, which ended cleanly.
    LastBoot,
    /// A data file that was cut, beside a map and a side file that speak of all of it.
    Cut,
}

/// An image to be filled, and what is known of it.
struct Subject {
    image: TestImage,
    manifest: Vec<Entry>,
    /// Replies after which a walk has met enough chunks.
    enough: Option<usize>,
    known: Known,
    home: tempfile::TempDir,
}

impl Subject {
    fn new(home: tempfile::TempDir, image: TestImage, manifest: Vec<Entry>, enough: Option<usize>) -> Self {
        let whole = home.path().join("whole");
        let room = serve(&image, &whole, home.path(), 1);
        expect_whole(&room, &manifest, "the first walk");
        drop(room);
        let known = Known::new(&image, &whole);
        assert_eq!(Files::new(&whole, &known.blob).published().len(), known.chunks.len(), "everything was read");
        Self { image, manifest, enough, known, home }
    }

    /// A v6 image of a few chunks.
    fn made() -> Self {
        let home = tempfile::tempdir().unwrap();
        let (image, manifest) = cached::small_image(home.path(), 2, 6000);
        Self::new(home, image, manifest, None)
    }

    fn whole(&self) -> PathBuf {
        self.home.path().join("whole")
    }

    /// Makes the directory that the child finds; the boot in which it lives.
    fn prepare(&self, before: Before, cache: &Path) -> u8 {
        let _ = fs::remove_dir_all(cache);
        let files = Files::new(cache, &self.known.blob);
        match before {
            Before::Nothing => {}
            Before::Copied => {
                cached::copy(&self.whole(), cache);
                files.flip(DATA, self.known.chunks[1].uncompressed_offset + 7, 0x10);
            }
            Before::LastBoot => {
                let room = serve(&self.image, cache, self.home.path(), 1);
                let mut guest = Guest::boot(&room.socket, &GUEST).unwrap();
                let half = self.enough.map_or(20, |enough| enough / 2);
                walk(&mut guest, &WalkOptions { end_after: Some(half), ..ONE_BY_ONE }).unwrap();
                drop((guest, room));
                assert!(!files.published().is_empty() && files.published().len() < self.known.chunks.len());
            }
            Before::Cut => {
                drop(serve(&self.image, cache, self.home.path(), 2));
                for (chunk, facts) in (0..).zip(&self.known.chunks) {
                    files.write(DATA, facts.uncompressed_offset, self.known.bytes(chunk));
                }
                // As if all had been fetched in this boot.
                files.write(cached::MAP, cached::HEADER as u64, &vec![0xff; self.known.chunks.len() / 8]);
                files.write(cached::SIDE, cached::HEADER as u64, &vec![0xff; self.known.chunks.len() / 8]);
                files.cut(DATA, self.known.plain.len() as u64 / 2);
            }
        }
        2
    }

    /// Whether the child ran to its end: there is no `at`-th step.
    fn fill(&self, at: u64, cache: &Path, boot: u8) -> Option<Step> {
        let child = self.home.path().join("child");
        let _ = fs::remove_dir_all(&child);
        fs::create_dir(&child).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "steps::child_fills_until_told", "--nocapture", "--test-threads=1"]);
        command.env("NYDUS_FILL_BOOTSTRAP", &self.image.bootstrap).env("NYDUS_FILL_BLOBS", &self.image.blobs);
        command.env("NYDUS_FILL_CACHE", cache).env("NYDUS_FILL_HOME", &child).env("NYDUS_FILL_BOOT", boot.to_string());
        command.env("NYDUS_FILL_END_AT", at.to_string());
        if let Some(enough) = self.enough {
            command.env("NYDUS_FILL_REPLIES", enough.to_string());
        }
        let status = bounded(&mut command);
        let killed = fs::read_to_string(child.join("killed-at")).ok();
        match killed {
            Some(name) => Some(Step::ALL.iter().copied().find(|step| format!("{step:?}") == name).unwrap()),
            None => {
                assert!(status.success(), "{}: the child ended with {status}", self.image.name);
                None
            }
        }
    }

    /// What is left in `cache` is served as it should be.
    fn expect_served(&self, cache: &Path, boot: u8, what: &str) {
        let files = Files::new(cache, &self.known.blob);
        let (published, trusted) = (files.published(), files.trusted());
        let (right, wrong): (Vec<u32>, Vec<u32>) =
            published.iter().partition(|chunk| files.is_right(&self.known, **chunk));
        let is_whole = fs::metadata(files.at(DATA)).is_ok_and(|data| data.len() == self.known.plain.len() as u64);
        if is_whole {
            let believed: Vec<_> = wrong.iter().filter(|chunk| trusted.contains(chunk)).collect();
            assert!(believed.is_empty(), "{what}: {believed:?} are trusted and wrong");
            // A kill in the middle of a write leaves anything.
            for chunk in (0..self.known.blob.chunk_count).filter(|chunk| !published.contains(chunk)) {
                let facts = &self.known.chunks[chunk as usize];
                files.write(DATA, facts.uncompressed_offset, &vec![0xA5; facts.uncompressed_bytes as usize]);
            }
        }
        let has_table = files.at(META).exists();

        let room = serve(&self.image, cache, self.home.path(), boot);
        expect_whole(&room, &self.manifest, what);
        for (_, range) in room.faults.log() {
            let asked = self.known.asked_for(&range);
            let again: Vec<_> = asked.iter().filter(|chunk| is_whole && right.contains(chunk)).collect();
            assert!(again.is_empty(), "{what}: {again:?} were there and are fetched again");
            assert!(!asked.is_empty() || !has_table, "{what}: the table was there and is fetched again");
        }
        drop(room);
        let room = serve(&self.image, cache, self.home.path(), boot);
        room.faults.set(Fault::Hang);
        expect_whole(&room, &self.manifest, &format!("{what}, and then without a backend"));
        drop(room);
        let left: Vec<_> = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        let is_temporary = |name: &OsString| name.to_string_lossy().ends_with(".tmp");
        assert!(!left.iter().any(is_temporary), "{what}: {left:?}");
    }
}

/// The daemon in this process.
fn serve(image: &TestImage, cache: &Path, home: &Path, boot: u8) -> Room {
    let place = Place { image: image.clone(), cache: cache.to_path_buf(), socket: socket(home), boot_id: [boot; 16] };
    Room::at(place).unwrap()
}

#[track_caller]
fn expect_whole(room: &Room, manifest: &[Entry], what: &str) {
    let mut guest = Guest::boot(&room.socket, &GUEST).unwrap();
    let differences = walk(&mut guest, &WalkOptions { in_flight: 8, ..ONE_BY_ONE }).unwrap().differences(manifest);
    assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
}

/// Runs `command`; nothing here takes longer than the patience of a test.
fn bounded(command: &mut Command) -> ExitStatus {
    let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if begin.elapsed() > PATIENCE * 2 {
            let _ = child.kill();
            panic!("the child does not end");
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The step at which the child ends.
static END_AT: AtomicU64 = AtomicU64::new(u64::MAX);
static DONE: AtomicU64 = AtomicU64::new(0);

/// Ends this process at its step, as `kill -9` does.
fn end_in_time(step: Step) {
    if DONE.fetch_add(1, Ordering::SeqCst) != END_AT.load(Ordering::SeqCst) {
        return;
    }
    let home = std::env::var_os("NYDUS_FILL_HOME").unwrap();
    fs::write(Path::new(&home).join("killed-at"), format!("{step:?}")).unwrap();
    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
}

/// Not a test unless [`Subject::fill`] started this process.
#[test]
fn child_fills_until_told() {
    let Some(home) = std::env::var_os("NYDUS_FILL_HOME") else { return };
    let var = |name: &str| std::env::var_os(format!("NYDUS_FILL_{name}"));
    let number = |name: &str| var(name).map(|text| text.into_string().unwrap().parse::<u64>().unwrap());
    END_AT.store(number("END_AT").unwrap(), Ordering::SeqCst);
    steps::watch(end_in_time);
    let (bootstrap, blobs) = (var("BOOTSTRAP").unwrap().into(), var("BLOBS").unwrap().into());
    let image = TestImage { name: "child's".into(), bootstrap, blobs, folder: PathBuf::from(&home) };
    let cache = PathBuf::from(var("CACHE").unwrap());
    let room = serve(&image, &cache, Path::new(&home), number("BOOT").unwrap() as u8);
    let mut guest = Guest::boot(&room.socket, &GUEST).unwrap();
    let end_after = number("REPLIES").map(|replies| replies as usize);
    walk(&mut guest, &WalkOptions { end_after, ..ONE_BY_ONE }).unwrap();
    // With its flush.
    drop((guest, room));
}

/// Kills a child at every step of its fill; the kinds of steps that it was killed at.
fn kill_at_every_step(subject: &Subject, before: Before) -> BTreeSet<Step> {
    let cache = subject.home.path().join("cache");
    let mut seen = BTreeSet::new();
    for at in 0.. {
        let boot = subject.prepare(before, &cache);
        let killed_at = subject.fill(at, &cache, boot);
        let what = format!("{}, {before:?}, step {at}, killed at {killed_at:?}", subject.image.name);
        subject.expect_served(&cache, boot, &what);
        let Some(step) = killed_at else {
            eprintln!("{}, {before:?}: {at} steps", subject.image.name);
            return seen;
        };
        seen.insert(step);
    }
    seen
}

#[test]
fn daemon_killed_at_any_step_leaves_what_it_published_and_nothing_wrong() {
    let subject = Subject::made();
    let mut seen = BTreeSet::new();
    for before in [Before::Nothing, Before::Copied, Before::LastBoot, Before::Cut] {
        seen.extend(kill_at_every_step(&subject, before));
    }
    let missed: Vec<_> = Step::ALL.iter().filter(|step| !seen.contains(step)).collect();
    assert!(missed.is_empty(), "{missed:?} never happened");
}

#[test]
fn daemon_killed_at_any_step_of_a_v5_fill_leaves_what_it_published_and_nothing_wrong() {
    let Some(image) = TestImage::named("v5-lz4-blake3") else { return };
    let manifest = image.manifest();
    let subject = Subject::new(tempfile::tempdir().unwrap(), image, manifest, Some(90));
    kill_at_every_step(&subject, Before::Nothing);
}

/// The files of a directory as they were when all of it was on the disk.
struct Disk {
    cache: PathBuf,
    files: BTreeMap<OsString, Vec<u8>>,
}

/// What a disk writes as a whole.
const SECTOR: usize = 512;

impl Disk {
    fn new(cache: &Path) -> Self {
        let entries = fs::read_dir(cache).into_iter().flatten().map(Result::unwrap);
        let files = entries.map(|entry| (entry.file_name(), fs::read(entry.path()).unwrap())).collect();
        Self { cache: cache.to_path_buf(), files }
    }

    /// Takes the power away: of what was written since, any sectors are on the disk; of files that were made, any, cut or
    /// whole. `flushed` ends the name of a file that was flushed meanwhile.
    fn cut_the_power(&self, dice: &mut Dice, flushed: Option<&str>) {
        for entry in fs::read_dir(&self.cache).into_iter().flatten().map(Result::unwrap) {
            let name = entry.file_name();
            if flushed.is_some_and(|suffix| name.to_string_lossy().ends_with(suffix)) {
                continue;
            }
            let old = self.files.get(&name);
            match (old, dice.below(6)) {
                (None, 0) => fs::remove_file(entry.path()).unwrap(),
                (None, 1) => File::options().write(true).open(entry.path()).unwrap().set_len(0).unwrap(),
                _ => {
                    // In place: it is the same file after the next boot.
                    let mut bytes = fs::read(entry.path()).unwrap();
                    let old = old.map(Vec::as_slice).unwrap_or_default();
                    let survive = dice.below(4);
                    for (n, sector) in bytes.chunks_mut(SECTOR).enumerate().filter(|_| dice.below(3) >= survive) {
                        let old = old.get(n * SECTOR..).unwrap_or_default();
                        let kept = old.len().min(sector.len());
                        sector[..kept].copy_from_slice(&old[..kept]);
                        sector[kept..].fill(0);
                    }
                    File::options().write(true).open(entry.path()).unwrap().write_all_at(&bytes, 0).unwrap();
                }
            }
        }
    }
}

#[test]
fn power_cut_at_any_step_shows_no_byte_that_was_lost() {
    let subject = Subject::made();
    let cache = subject.home.path().join("cache");
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    for before in [Before::Nothing, Before::LastBoot] {
        for at in 0.. {
            let mut is_over = false;
            for cut in 0..2 {
                let boot = subject.prepare(before, &cache);
                let disk = Disk::new(&cache);
                let killed_at = subject.fill(at, &cache, boot);
                is_over = killed_at.is_none();
                // The end of the flush, and of the child, is the promise that the data stays.
                let flushed = matches!(killed_at, None | Some(Step::Flushed | Step::FlushNoted)).then_some(DATA);
                disk.cut_the_power(&mut dice, flushed);
                let what = format!("{before:?}, power cut {cut} after step {at}, {killed_at:?}");
                let room = serve(&subject.image, &cache, subject.home.path(), boot + 1);
                expect_whole(&room, &subject.manifest, &what);
                drop(room);
                let room = serve(&subject.image, &cache, subject.home.path(), boot + 2);
                room.faults.set(Fault::Hang);
                expect_whole(&room, &subject.manifest, &format!("{what}, and then without a backend"));
            }
            if is_over {
                break;
            }
        }
    }
}

#[test]
fn daemons_killed_one_after_the_other_at_each_step_get_on() {
    let subject = Subject::made();
    let cache = subject.home.path().join("worn");
    let mut before = 0;
    for at in 0.. {
        let killed_at = subject.fill(at, &cache, 2);
        let published = Files::new(&cache, &subject.known.blob).published().len();
        assert!(published >= before, "what was published stays");
        before = published;
        if killed_at.is_none() {
            break;
        }
    }
    subject.expect_served(&cache, 2, "worn");
}
