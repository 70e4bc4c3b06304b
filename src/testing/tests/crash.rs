//! Kill -9 at many points of a cold walk, and files that are cut while they are served.

use std::fs;
use std::fs::File;
use std::path::Path;

use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::tree::Tree;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;

use crate::support::Demo;
use crate::support::find;
use crate::support::nydusd;

const EIO: i32 = 5;
const MANY: WalkOptions = WalkOptions { in_flight: 64, read_bytes: 32 << 10, ..WalkOptions::USUAL };
const DEEP: GuestOptions = GuestOptions { request_queues: 2, depth: 40, ..GuestOptions::LINUX };

fn expect_whole(image: &TestImage, guest: &mut Guest, what: &str) {
    let differences = walk(guest, &MANY).unwrap().differences(&image.manifest());
    assert!(differences.is_empty(), "{}, {what}:\n{}", image.name, differences.join("\n"));
}

#[test]
fn daemon_killed_during_a_cold_walk_serves_every_byte_right_afterwards() {
    for name in ["v5-zstd-sha256-4k", "v6-zstd-4k", "v6-lz4-blake3"] {
        let Some(image) = TestImage::named(name) else { return };
        // Each kill on a fresh cache, and each on what the ones before have left.
        let worn = tempfile::tempdir().unwrap();
        for end_after in [1, 30, 100, 200, 250, 300, 350, 400, 450, 500, 600, 700, 800, 900, 1000, 1200] {
            let fresh = tempfile::tempdir().unwrap();
            for home in [fresh.path(), worn.path()] {
                let mut daemon = nydusd(&image, home, &[]);
                let mut guest = Guest::boot(daemon.socket(), &DEEP).unwrap();
                walk(&mut guest, &WalkOptions { end_after: Some(end_after), ..MANY }).unwrap();
                daemon.kill();
            }
            let daemon = nydusd(&image, fresh.path(), &[]);
            let mut guest = Guest::boot(daemon.socket(), &DEEP).unwrap();
            expect_whole(&image, &mut guest, &format!("killed after {end_after} replies"));
        }
        let daemon = nydusd(&image, worn.path(), &[]);
        let mut guest = Guest::boot(daemon.socket(), &DEEP).unwrap();
        expect_whole(&image, &mut guest, "killed again and again");
    }
}

/// Every fact that was answered is right; what failed, failed with EIO.
#[track_caller]
fn expect_right_or_eio(tree: &Tree, image: &TestImage, what: &str) {
    let lies = tree.lies(&image.manifest());
    assert!(lies.is_empty(), "{}, {what}:\n{}", image.name, lies.join("\n"));
}

/// A copy of `image` whose bootstrap may be damaged.
fn copied(image: &TestImage, home: &Path) -> TestImage {
    let bootstrap = home.join("bootstrap");
    fs::write(&bootstrap, fs::read(&image.bootstrap).unwrap()).unwrap();
    TestImage { bootstrap, ..image.clone() }
}

#[test]
fn bootstrap_cut_during_a_walk_gives_eio_or_right_bytes() {
    for name in ["v5-lz4-blake3", "v6-lz4-blake3"] {
        let Some(image) = TestImage::named(name) else { return };
        for keep in [0, 4096, 20_000] {
            let home = tempfile::tempdir().unwrap();
            let image = copied(&image, home.path());
            let mut daemon = nydusd(&image, home.path(), &[]);
            let mut guest = Guest::boot(daemon.socket(), &DEEP).unwrap();
            walk(&mut guest, &WalkOptions { end_after: Some(300), ..MANY }).unwrap();
            File::options().write(true).open(&image.bootstrap).unwrap().set_len(keep).unwrap();
            guest.reboot().unwrap();
            guest.mount().unwrap();
            let tree = walk(&mut guest, &MANY).unwrap();
            expect_right_or_eio(&tree, &image, &format!("bootstrap cut to {keep}"));
            assert!(daemon.is_running().unwrap(), "{name}: the daemon died");
        }
    }
}

#[test]
fn cache_cut_during_a_walk_gives_eio_or_right_bytes() {
    for name in ["v5-zstd-sha256-4k", "v6-zstd-4k", "v6-big"] {
        let Some(image) = TestImage::named(name) else { return };
        for keep in [0, 4096, 50_000] {
            let home = tempfile::tempdir().unwrap();
            let mut daemon = nydusd(&image, home.path(), &[]);
            let mut guest = Guest::boot(daemon.socket(), &DEEP).unwrap();
            expect_whole(&image, &mut guest, "before the cut");
            for entry in fs::read_dir(home.path().join("cache")).unwrap() {
                let path = entry.unwrap().path();
                let data = path.to_string_lossy().ends_with(".blob.data");
                let old = fs::metadata(&path).unwrap().len();
                if data {
                    File::options().write(true).open(&path).unwrap().set_len(keep.min(old)).unwrap();
                }
            }
            let tree = walk(&mut guest, &MANY).unwrap();
            expect_right_or_eio(&tree, &image, &format!("cache cut to {keep}"));
            assert!(daemon.is_running().unwrap(), "{name}: the daemon died");
        }
    }
}

#[test]
fn blob_that_vanishes_gives_eio_and_metadata_goes_on() {
    let demo = Demo::new();
    let mut daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &DEEP).unwrap();
    let warm = find(&mut guest, "/warm");
    for blob in fs::read_dir(&demo.image.blobs).unwrap() {
        let path = blob.unwrap().path();
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        fs::remove_file(path).unwrap();
    }
    let reply = guest.call(&Request::read(warm.node, 0, 0, 4096)).unwrap();
    assert!(reply.errno == EIO || reply.body == Demo::warm()[..4096], "errno {}", reply.errno);
    assert_eq!(guest.call(&Request::getattr(warm.node)).unwrap().errno, 0);
    assert!(daemon.is_running().unwrap());
}
