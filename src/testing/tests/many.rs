//! Eight daemons on one cache directory: each chunk is fetched once, and the death of one of them holds up nobody.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;
use std::time::Instant;

use nydus_vm::storage::cache::Directory;
use nydus_vm::storage::cache::Generation;
use nydus_vm::sys::machine::boot_id;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;
use nydus_vm::testing::vmm::PATIENCE;
use rustix::process::Signal;

use crate::shared::READS;
use crate::shared::blob_of;
use crate::shared::child;
use crate::shared::expect_demo;
use crate::shared::locked_chunks;
use crate::shared::submit_cold;
use crate::support::Demo;
use crate::support::counters;
use crate::support::eventually;
use crate::support::find;
use crate::support::nydusd_with;

const MANY: WalkOptions = WalkOptions { in_flight: 32, read_bytes: 32 << 10, ..WalkOptions::USUAL };
const GUEST: GuestOptions = GuestOptions { depth: READS + 8, reply_bytes: 64 << 10, ..GuestOptions::LINUX };
const DAEMONS: usize = 8;

/// Daemons on the cache directory of `demo`.
fn daemons(demo: &Demo, count: usize) -> Vec<DaemonProcess> {
    let cache = demo.path().join("cache");
    fs::create_dir_all(&cache).unwrap();
    let mut config = demo.image.config(&cache);
    // Nothing is taken along, so that each fetch is somebody's.
    config["amplify_io"] = 0.into();
    let start = |n: usize| {
        let home = demo.path().join(format!("daemon-{n}"));
        fs::create_dir(&home).unwrap();
        nydusd_with(&demo.image, &config, &home, &[])
    };
    (0..count).map(start).collect()
}

fn sum(daemons: &[DaemonProcess], counter: &str) -> u64 {
    daemons.iter().map(|daemon| counters(daemon)[counter].as_u64().unwrap()).sum()
}

#[test]
fn eight_daemons_walking_at_once_fetch_each_chunk_once() {
    let demo = Demo::new();
    let daemons = daemons(&demo, DAEMONS);
    std::thread::scope(|scope| {
        let walk = |daemon: &DaemonProcess| walk(&mut Guest::boot(daemon.socket(), &GUEST).unwrap(), &MANY).unwrap();
        let walks: Vec<_> = daemons.iter().map(|daemon| scope.spawn(move || walk(daemon))).collect();
        for (n, walk) in walks.into_iter().enumerate() {
            expect_demo(&walk.join().unwrap(), &format!("daemon {n}"));
        }
    });
    let blob = blob_of(&demo.image);
    // Counted after the bit is set.
    eventually("the last one is counted", || sum(&daemons, "chunks_fetched") >= u64::from(blob.chunk_count));
    assert_eq!(sum(&daemons, "chunks_fetched"), u64::from(blob.chunk_count));
    for counter in ["digest_mismatches", "cache_write_errors", "backend_errors"] {
        assert_eq!(sum(&daemons, counter), 0, "{counter}");
    }
    for mut daemon in daemons {
        daemon.signal(Signal::TERM).unwrap();
        let status = daemon.wait(PATIENCE).unwrap();
        assert_eq!((status.code(), status.signal()), (Some(0), None));
    }
}

#[test]
fn death_of_one_in_mid_flight_holds_up_none_of_the_others() {
    let demo = Demo::new();
    let cache = demo.path().join("cache");
    let blob = blob_of(&demo.image);
    // The table is answered, the chunks are not.
    let mut victim = child(&demo.image, &cache, &demo.path().join("victim"), 0, Some(1));
    let mut guest = Guest::boot(victim.socket(), &GUEST).unwrap();
    submit_cold(&mut guest);
    let probe = Generation::open(&Directory::open(&cache).unwrap(), &blob, boot_id().unwrap()).unwrap();
    eventually("locks of the victim", || locked_chunks(&probe, &blob) == READS);

    let others = daemons(&demo, DAEMONS - 1);
    let mut guests: Vec<_> = others.iter().map(|daemon| Guest::boot(daemon.socket(), &GUEST).unwrap()).collect();
    let reads: Vec<_> = guests.iter_mut().map(submit_cold).collect();
    eventually("parked reads", || sum(&others, "parked_reads") == (READS * others.len()) as u64);
    // What is warm or free goes on meanwhile.
    for guest in &mut guests {
        let file = find(guest, "/dir/7");
        assert_eq!(guest.call(&Request::read(file.node, 0, 0, 4096)).unwrap().body().unwrap().len(), 107);
    }
    let before = sum(&others, "chunks_fetched");
    assert_eq!(before, 1, "the others wait for what the victim has");
    victim.kill();
    let begin = Instant::now();
    for (guest, reads) in guests.iter_mut().zip(reads) {
        for (unique, offset) in reads {
            let done = guest.lane(1).wait_for(unique, PATIENCE).unwrap();
            assert_eq!(guest.lane(1).reply(done).body().unwrap(), Demo::cold()[offset..offset + 4096]);
        }
    }
    // Not the patience with one that lives and does not get on, but its locks, which went with it.
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?} after the kill", begin.elapsed());
    assert_eq!(sum(&others, "chunks_fetched") - before, READS as u64, "once each");
    for (n, guest) in guests.iter_mut().enumerate() {
        expect_demo(&walk(guest, &MANY).unwrap(), &format!("daemon {n}, after the kill"));
    }
    assert_eq!(sum(&others, "chunks_fetched"), u64::from(blob.chunk_count));
}
