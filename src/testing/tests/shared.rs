//! Processes that share a cache directory, one of them killed, and what is left for the next boot.
//!
//! The boot and the backend of a daemon can be chosen within a process only, and only a process can be killed: so this
//! test binary runs itself as a child ([`child_serves_when_told`]).

use std::fs;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use nydus_vm::rafs::facts::BlobFacts;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::image::OpenOptions;
use nydus_vm::rafs::meta::BlobMeta;
use nydus_vm::storage::cache::Directory;
use nydus_vm::storage::cache::Generation;
use nydus_vm::sys::view::View;
use nydus_vm::testing::fault::Fault;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::room::Place;
use nydus_vm::testing::room::Room;
use nydus_vm::testing::tree::Tree;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;
use nydus_vm::testing::vmm::PATIENCE;

use crate::support::CHUNK_BYTES;
use crate::support::Demo;
use crate::support::SMALL_FILES;
use crate::support::counters;
use crate::support::eventually;
use crate::support::find;
use crate::support::nydusd_with;
use crate::support::socket;

const MANY: WalkOptions = WalkOptions { in_flight: 64, read_bytes: 32 << 10, ..WalkOptions::USUAL };
const DEEP: GuestOptions = GuestOptions { request_queues: 2, depth: 40, ..GuestOptions::LINUX };

/// Reads that a child is killed with.
pub const READS: usize = 64;

/// Everything in the demo image is what was put into it.
#[track_caller]
pub fn expect_demo(tree: &Tree, what: &str) {
    assert!(tree.failures.is_empty(), "{what}: {:?}", tree.failures);
    assert!(tree.contradictions.is_empty(), "{what}: {:?}", tree.contradictions);
    let content = |path: &str| {
        let found = tree.found.iter().find(|found| found.path == path.as_bytes());
        &found.unwrap_or_else(|| panic!("{what}: {path} was not found")).content
    };
    assert!(*content("/warm") == Demo::warm() && *content("/cold") == Demo::cold(), "{what}: wrong bytes");
    for n in 0..SMALL_FILES {
        let expected = nydus_vm::testing::make::noise(&n.to_string(), 100 + n);
        assert!(*content(&format!("/dir/{n}")) == expected, "{what}: wrong bytes in {n}");
    }
}

/// The only blob of an image.
pub fn blob_of(image: &TestImage) -> BlobFacts {
    let bootstrap = File::open(&image.bootstrap).unwrap();
    let view = View::map_file(bootstrap.as_fd(), bootstrap.metadata().unwrap().len()).unwrap();
    let image = Image::open(view, &OpenOptions { placeholder_id: None }).unwrap();
    assert_eq!(image.blobs().len(), 1);
    image.blobs()[0].clone()
}

/// Bits of the chunk map that are set.
fn ready_chunks(cache: &Path, blob: &BlobFacts) -> u32 {
    let map = fs::read(cache.join(format!("{}.blob.data.chunk_map", blob.id))).unwrap();
    map[4096..].iter().map(|byte| byte.count_ones()).sum()
}

#[test]
fn two_daemons_walking_at_once_fetch_each_chunk_once() {
    for round in 0..3 {
        let demo = Demo::new();
        let cache = demo.path().join("cache");
        fs::create_dir(&cache).unwrap();
        let config = demo.image.config(&cache);
        let homes = [demo.path().join("one"), demo.path().join("two")];
        let daemons = homes.each_ref().map(|home| {
            fs::create_dir(home).unwrap();
            nydusd_with(&demo.image, &config, home, &[])
        });
        std::thread::scope(|scope| {
            let walks = daemons.each_ref().map(|daemon| {
                scope.spawn(|| {
                    let mut guest = Guest::boot(daemon.socket(), &DEEP).unwrap();
                    walk(&mut guest, &MANY).unwrap()
                })
            });
            for walk in walks {
                expect_demo(&walk.join().unwrap(), &format!("round {round}"));
            }
        });
        let blob = blob_of(&demo.image);
        eventually("what was taken along has landed", || ready_chunks(&cache, &blob) == blob.chunk_count);
        let fetched = || daemons.iter().map(|daemon| counters(daemon)["chunks_fetched"].as_u64().unwrap()).sum::<u64>();
        // Counted after the bit is set.
        eventually("the last one is counted", || fetched() >= u64::from(blob.chunk_count));
        assert_eq!(fetched(), u64::from(blob.chunk_count), "each chunk by one of them");
        let bytes = daemons.iter().map(|daemon| counters(daemon)["backend_bytes"].as_u64().unwrap()).sum::<u64>();
        let table = blob.meta.unwrap().compressed_bytes + 4096;
        // Both load the table; amplification reads through small gaps.
        assert!(bytes < blob.data_bytes * 103 / 100 + 2 * table, "{bytes} bytes for a blob of {}", blob.data_bytes);
    }
}

/// A daemon in a process of its own, with this boot (0: the machine's), whose backend falls silent after `answers` requests.
pub fn child(image: &TestImage, cache: &Path, home: &Path, boot: u8, answers: Option<usize>) -> DaemonProcess {
    fs::create_dir_all(home).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "shared::child_serves_when_told", "--nocapture", "--test-threads=1"]);
    command.env("NYDUS_CHILD_BOOTSTRAP", &image.bootstrap).env("NYDUS_CHILD_BLOBS", &image.blobs);
    command.env("NYDUS_CHILD_CACHE", cache).env("NYDUS_CHILD_HOME", home).env("NYDUS_CHILD_BOOT", boot.to_string());
    if let Some(answers) = answers {
        command.env("NYDUS_CHILD_ANSWERS", answers.to_string());
    }
    DaemonProcess::start(command, &socket(home), &home.join("log")).unwrap()
}

/// Not a test unless [`child`] started this process.
#[test]
fn child_serves_when_told() {
    let Some(home) = std::env::var_os("NYDUS_CHILD_HOME") else { return };
    let var = |name: &str| std::env::var_os(format!("NYDUS_CHILD_{name}")).unwrap();
    let folder = Path::new(&home).to_path_buf();
    let boot: u8 = var("BOOT").into_string().unwrap().parse().unwrap();
    let image =
        TestImage { name: "child's".into(), bootstrap: var("BOOTSTRAP").into(), blobs: var("BLOBS").into(), folder };
    let boot_id = if boot == 0 { nydus_vm::sys::machine::boot_id().unwrap() } else { [boot; 16] };
    let place = Place { image, cache: var("CACHE").into(), socket: socket(Path::new(&home)), boot_id };
    let room =
        Room::silent_after(place, std::env::var("NYDUS_CHILD_ANSWERS").ok().map(|n| n.parse().unwrap())).unwrap();
    // Killed by the parent; ends alone if that one is gone.
    std::thread::sleep(PATIENCE * 4);
    drop(room);
}

#[test]
fn daemon_killed_in_mid_flight_leaves_its_chunks_to_the_others() {
    let demo = Demo::new();
    let cache = demo.path().join("cache");
    // The table is answered, the chunks are not.
    let mut victim = child(&demo.image, &cache, &demo.path().join("victim"), 7, Some(1));
    let mut guest = Guest::boot(victim.socket(), &GuestOptions { depth: READS, ..DEEP }).unwrap();
    submit_cold(&mut guest);
    let blob = blob_of(&demo.image);
    let probe = Generation::open(&Directory::open(&cache).unwrap(), &blob, [7; 16]).unwrap();
    eventually("locks of the victim", || locked_chunks(&probe, &blob) == READS);

    let place = Place { image: demo.image.clone(), cache, socket: socket(demo.path()), boot_id: [7; 16] };
    let room = Room::at(place).unwrap();
    let mut other = Guest::boot(&room.socket, &GuestOptions { depth: READS, ..DEEP }).unwrap();
    let reads = submit_cold(&mut other);
    eventually("parked reads", || room.metrics.storage.parked_reads.get() == READS as u64);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(room.metrics.storage.chunks_fetched.get(), 0, "they are left to the victim");
    victim.kill();
    let begin = Instant::now();
    for (unique, offset) in reads {
        let done = other.lane(1).wait_for(unique, PATIENCE).unwrap();
        assert_eq!(other.lane(1).reply(done).body().unwrap(), Demo::cold()[offset..offset + 4096]);
    }
    // Looked at every 20 ms; the rest is for fetching on a busy machine.
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?} after the kill", begin.elapsed());
    expect_demo(&walk(&mut other, &MANY).unwrap(), "after the kill");
}

/// Chunks that some process holds a lock on.
pub fn locked_chunks(probe: &Generation, blob: &BlobFacts) -> usize {
    let is_held = |chunk: &u32| {
        let is_free = probe.locks().try_lock_chunks(*chunk..*chunk + 1).unwrap();
        if is_free {
            probe.locks().unlock_chunks(*chunk..*chunk + 1);
        }
        !is_free
    };
    (0..blob.chunk_count).filter(is_held).count()
}

/// One read of each of the first chunks of `/cold`; their unique numbers and offsets.
pub fn submit_cold(guest: &mut Guest) -> Vec<(u64, usize)> {
    let node = find(guest, "/cold").node;
    let lane = guest.lane(1);
    let read =
        |n: usize| (lane.submit(&Request::read(node, 0, (n * CHUNK_BYTES) as u64, 4096)).unwrap(), n * CHUNK_BYTES);
    let reads = (0..READS).map(read).collect();
    lane.publish().unwrap();
    reads
}

/// What a power cut may do: most chunks that are said to be there, and were not flushed, are something else now.
fn lose_what_was_not_flushed(cache: &Path, blob: &BlobFacts) -> u32 {
    let at = |suffix: &str| cache.join(format!("{}{suffix}", blob.id));
    let Ok(meta) = File::open(at(".blob.meta")) else { return 0 };
    let meta = View::map_file(meta.as_fd(), meta.metadata().unwrap().len()).unwrap();
    let meta = BlobMeta::open(meta, blob).unwrap();
    let (map, side) = (fs::read(at(".blob.data.chunk_map")).unwrap(), fs::read(at(".nydus_state")).unwrap());
    // The bit "on the disk" of its record (`storage::cache::claims`).
    let is_synced = |chunk: u32| side[4096 + 16 * chunk as usize + 8] & 2 != 0;
    let data = File::options().write(true).open(at(".blob.data")).unwrap();
    let mut lost = 0;
    for chunk in 0..blob.chunk_count {
        let (byte, bit) = (chunk as usize / 8, chunk % 8);
        let is_ready = map[4096 + byte] & 0x80 >> bit != 0;
        if is_ready && !is_synced(chunk) && chunk % 3 != 0 {
            let facts = meta.chunk(chunk).unwrap();
            let end = facts.uncompressed_offset + u64::from(facts.uncompressed_bytes);
            data.write_all_at(&[0xA5; 50], end - 50).unwrap();
            lost += 1;
        }
    }
    lost
}

#[test]
fn power_cut_during_a_cold_walk_shows_no_byte_that_was_lost() {
    let demo = Demo::new();
    let blob = blob_of(&demo.image);
    let worn = demo.path().join("worn");
    let (mut boot, mut lost) = (1, 0);
    let serve = |cache: &Path, boot: u8| {
        let place =
            Place { image: demo.image.clone(), cache: cache.into(), socket: socket(demo.path()), boot_id: [boot; 16] };
        Room::at(place).unwrap()
    };
    for end_after in [5, 60, 200, 400, 600, 800] {
        let fresh = demo.path().join(format!("cache-{end_after}"));
        for cache in [&fresh, &worn] {
            boot += 1;
            let mut victim = child(&demo.image, cache, &demo.path().join(format!("victim-{boot}")), boot, None);
            let mut guest = Guest::boot(victim.socket(), &DEEP).unwrap();
            walk(&mut guest, &WalkOptions { end_after: Some(end_after), ..MANY }).unwrap();
            victim.kill();
            lost += lose_what_was_not_flushed(cache, &blob);
        }
        boot += 1;
        let room = serve(&fresh, boot);
        let mut guest = Guest::boot(&room.socket, &DEEP).unwrap();
        expect_demo(&walk(&mut guest, &MANY).unwrap(), &format!("cut after {end_after} replies"));
        drop((guest, room));
        // That one ended cleanly: everything was flushed, and is believed after the next cut.
        assert_eq!(lose_what_was_not_flushed(&fresh, &blob), 0, "everything was flushed");
        let room = serve(&fresh, boot + 1);
        room.faults.set(Fault::Hang);
        let mut guest = Guest::boot(&room.socket, &DEEP).unwrap();
        expect_demo(&walk(&mut guest, &MANY).unwrap(), "flushed");
        assert_eq!(room.metrics.storage.hints_confirmed.get(), 0);
    }
    assert!(lost > 100, "only {lost} chunks were lost");
    let room = serve(&worn, boot + 1);
    let mut guest = Guest::boot(&room.socket, &DEEP).unwrap();
    expect_demo(&walk(&mut guest, &MANY).unwrap(), "cut again and again");
    assert!(room.metrics.storage.hints_refuted.get() > 0);
}
