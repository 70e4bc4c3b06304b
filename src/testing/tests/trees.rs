//! Every reference image, whole, byte by byte: cold and warm, few and many requests in flight, on a cache of upstream's.

use std::fs;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use nydus_vm::testing::driver::Chains;
use nydus_vm::testing::driver::Notifications;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::lane::Mode;
use nydus_vm::testing::reference_layer;
use nydus_vm::testing::reference_layer::Layer;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;

use crate::support::nydusd;
use crate::support::nydusd_with;

const MANY: WalkOptions = WalkOptions { in_flight: 128, ..WalkOptions::USUAL };
const ONE: WalkOptions = WalkOptions { in_flight: 1, read_bytes: 1 << 20, list_bytes: 64 << 10, end_after: None };
/// Reads that begin and end anywhere in a chunk.
const ODD: WalkOptions = WalkOptions { in_flight: 64, read_bytes: 5000, list_bytes: 700, end_after: None };

const TWO_QUEUES: GuestOptions = GuestOptions { request_queues: 2, depth: 80, ..GuestOptions::LINUX };

#[track_caller]
fn check(image: &TestImage, guest: &mut Guest, options: &WalkOptions, what: &str) {
    let tree = walk(guest, options).unwrap_or_else(|error| panic!("{}, {what}: {error}", image.name));
    let differences = tree.differences(&image.manifest());
    assert!(differences.is_empty(), "{}, {what}:\n{}", image.name, differences.join("\n"));
}

fn each_reference(mut test: impl FnMut(&TestImage, &Path)) {
    for image in TestImage::references().into_iter().flatten() {
        let home = tempfile::tempdir().unwrap();
        test(&image, home.path());
    }
}

#[test]
fn tree_of_each_image_is_right_cold_and_warm() {
    each_reference(|image, home| {
        let daemon = nydusd(image, home, &[]);
        let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
        check(image, &mut guest, &MANY, "cold, many in flight");
        check(image, &mut guest, &ONE, "warm, one after the other");
        guest.reboot().unwrap();
        guest.mount().unwrap();
        check(image, &mut guest, &ODD, "warm, odd sizes, after a reboot of the guest");
        drop((guest, daemon));
        let daemon = nydusd(image, home, &[]);
        let direct = GuestOptions {
            chains: Chains::Direct,
            notifications: Notifications::Flags,
            mode: Mode::Poll,
            depth: 40,
            reply_bytes: 64 << 10,
            ..GuestOptions::LINUX
        };
        let mut guest = Guest::boot(daemon.socket(), &direct).unwrap();
        check(image, &mut guest, &WalkOptions { in_flight: 3, ..ODD }, "cached by the daemon before, direct chains");
    });
}

#[test]
fn tree_of_each_image_is_right_cold_with_odd_reads_and_all_checks_on() {
    each_reference(|image, home| {
        let cache = home.join("cache");
        fs::create_dir(&cache).unwrap();
        let mut config = image.config(&cache);
        config["mode"] = "cached".into();
        config["digest_validate"] = true.into();
        let daemon = nydusd_with(image, &config, home, &[]);
        let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
        check(image, &mut guest, &ODD, "cold, odd sizes, validated");
        drop((guest, daemon));
        let daemon = nydusd_with(image, &config, home, &[]);
        let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
        check(image, &mut guest, &MANY, "validated from the cache");
    });
}

#[test]
fn tree_on_a_cache_of_upstream_is_right_and_the_cache_is_used() {
    for (name, folder) in [("v5-lz4-blake3", "cache"), ("v6-zstd-4k", "cache"), ("v6-lz4-blake3", "cache-partial")] {
        let Some(image) = TestImage::named(name) else { return };
        let home = tempfile::tempdir().unwrap();
        let cache = copy_cache(&image, folder, home.path());
        let mut config = image.config(&cache);
        if folder == "cache" {
            // Everything is in the cache: no blob is needed.
            let hollow = home.path().join("hollow");
            fs::create_dir(&hollow).unwrap();
            config["device"]["backend"]["config"]["dir"] = hollow.to_str().unwrap().into();
        }
        let daemon = nydusd_with(&image, &config, home.path(), &[]);
        let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
        check(&image, &mut guest, &MANY, "on upstream's cache");
    }
}

/// A foreign chunk map is a hint only: what is damaged under it is fetched again.
#[test]
fn tree_on_a_damaged_cache_of_upstream_is_right() {
    for (name, folder) in [("v5-lz4-blake3", "cache"), ("v6-zstd-4k", "cache"), ("v6-lz4-blake3", "cache-partial")] {
        let Some(image) = TestImage::named(name) else { return };
        let home = tempfile::tempdir().unwrap();
        let cache = copy_cache(&image, folder, home.path());
        let mut damaged = 0;
        for entry in fs::read_dir(&cache).unwrap() {
            let path = entry.unwrap().path();
            if !path.to_string_lossy().ends_with(".blob.data") {
                continue;
            }
            let mut bytes = fs::read(&path).unwrap();
            bytes.iter_mut().step_by(1000).for_each(|byte| *byte ^= 0x55);
            fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
        assert!(damaged > 0, "{name}: no data file in the cache");
        let daemon = nydusd_with(&image, &image.config(&cache), home.path(), &[]);
        let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
        check(&image, &mut guest, &MANY, "on a damaged cache of upstream");
    }
}

/// What upstream's daemon would have left: our files without the one that is ours only.
#[test]
fn tree_of_each_kind_of_blob_is_right_on_a_foreign_cache_without_blobs() {
    for name in ["v6-batch", "v6-encrypted", "v6-zran", "v6-zran-inline-toc"] {
        let Some(image) = TestImage::named(name) else { return };
        let home = tempfile::tempdir().unwrap();
        let daemon = nydusd(&image, home.path(), &[]);
        let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
        check(&image, &mut guest, &MANY, "filling the cache");
        drop((guest, daemon));
        let cache = home.path().join("cache");
        for entry in fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap()) {
            if entry.file_name().to_string_lossy().ends_with(".nydus_state") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        let mut config = image.config(&cache);
        let hollow = home.path().join("hollow");
        fs::create_dir(&hollow).unwrap();
        config["device"]["backend"]["config"]["dir"] = hollow.to_str().unwrap().into();
        let daemon = nydusd_with(&image, &config, home.path(), &[]);
        let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
        check(&image, &mut guest, &ODD, "on a foreign cache");
    }
}

#[test]
fn tree_of_each_kind_of_blob_is_right_without_a_cache() {
    for name in ["v6-batch", "v6-encrypted", "v6-zran", "v6-zran-inline-toc", "v6-tarfs"] {
        let Some(image) = TestImage::named(name) else { return };
        without_a_cache(&image);
    }
}

fn without_a_cache(image: &TestImage) {
    let home = tempfile::tempdir().unwrap();
    let mut config = image.config(home.path());
    config["device"]["cache"] = serde_json::json!({ "type": "dummycache" });
    let daemon = nydusd_with(image, &config, home.path(), &[]);
    let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
    check(image, &mut guest, &ODD, "without a cache");
    guest.reboot().unwrap();
    guest.mount().unwrap();
    check(image, &mut guest, &MANY, "without a cache, once more");
}

/// Images of two layers over tar files and gzip files that stay as they are.
#[test]
fn tree_over_unchanged_layers_is_right() {
    for layer in [Layer::Tar, Layer::Gzip, Layer::Members] {
        let Some(stored) = TestImage::named("v6-two-layers") else { return };
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("layered");
        reference_layer::convert(&stored.bootstrap, &stored.blobs, &folder, layer);
        let image = TestImage {
            name: format!("{} over {layer:?}", stored.name),
            bootstrap: folder.join("bootstrap"),
            blobs: folder.join("blobs"),
            ..stored
        };
        let daemon = nydusd(&image, home.path(), &[]);
        let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
        check(&image, &mut guest, &ODD, "cold, odd sizes");
        check(&image, &mut guest, &MANY, "warm");
        drop((guest, daemon));
        without_a_cache(&image);
    }
}

/// One of the two blobs says that it is external, and lies where only its own backend looks.
#[test]
fn tree_with_an_external_blob_is_right() {
    let Some(stored) = TestImage::named("v6-two-layers") else { return };
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name);
    for directory in ["usual", "external", "cache"] {
        fs::create_dir(path(directory)).unwrap();
    }
    let mut bootstrap = fs::read(&stored.bootstrap).unwrap();
    let table = u64::from_le_bytes(bootstrap[1152 + 8..][..8].try_into().unwrap()) as usize;
    let id = |entry: usize| String::from_utf8(bootstrap[table + entry * 256..][..64].to_vec()).unwrap();
    let (usual, external) = (id(0), id(1));
    fs::copy(stored.blobs.join(&usual), path("usual").join(&usual)).unwrap();
    fs::copy(stored.blobs.join(&external), path("external").join(&external)).unwrap();
    // Bit 11 of the features.
    bootstrap[table + 256 + 85] |= 0x08;
    fs::write(path("bootstrap"), bootstrap).unwrap();
    let image = TestImage { bootstrap: path("bootstrap"), ..stored };
    let config = serde_json::json!({
        "version": 2,
        "backend": { "type": "localfs", "localfs": { "dir": path("usual") } },
        "external_backends": [
            { "type": "localfs", "patch": { "blob_id": external }, "config": { "dir": path("external") } },
        ],
        "cache": { "type": "blobcache", "filecache": { "work_dir": path("cache") } },
        "rafs": { "mode": "direct", "enable_xattr": true },
    });
    let daemon = nydusd_with(&image, &config, home.path(), &[]);
    let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
    check(&image, &mut guest, &MANY, "with an external blob");
}

fn copy_cache(image: &TestImage, folder: &str, home: &Path) -> PathBuf {
    let cache = home.join("cache");
    fs::create_dir(&cache).unwrap();
    for entry in fs::read_dir(image.folder.join(folder)).unwrap() {
        let entry = entry.unwrap();
        let copy = cache.join(entry.file_name());
        fs::copy(entry.path(), &copy).unwrap();
        // The references may be read-only.
        fs::set_permissions(&copy, Permissions::from_mode(0o600)).unwrap();
    }
    cache
}
