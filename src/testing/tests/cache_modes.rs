//! Images served through each way to keep chunks: cold, by the next daemon, and by one whose backend has nothing.

use std::fs;
use std::path::Path;

use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;
use serde_json::Value;
use serde_json::json;

use crate::support::counters;
use crate::support::nydusd_with;

const ODD: WalkOptions = WalkOptions { in_flight: 64, read_bytes: 5000, list_bytes: 700, end_after: None };
const LARGE: WalkOptions = WalkOptions { in_flight: 16, read_bytes: 1 << 20, ..WalkOptions::USUAL };
const TWO_QUEUES: GuestOptions = GuestOptions { request_queues: 2, depth: 80, ..GuestOptions::LINUX };

const IMAGES: [&str; 8] = [
    "v5-lz4-blake3",
    "v5-none-aligned",
    "v6-lz4-blake3",
    "v6-zstd-4k",
    "v6-two-layers",
    "v6-batch",
    "v6-encrypted",
    "v6-zran",
];

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// A way to keep chunks.
struct Mode {
    name: &'static str,
    /// What it changes in the configuration.
    change: fn(&mut Value),
    /// Whether it can be had for an image.
    fits: fn(&str) -> bool,
    /// Suffix of the data file; `None`: there is none.
    data: Option<&'static str>,
}

const MODES: [Mode; 5] = [
    Mode {
        name: "compressed",
        change: |config| config["device"]["cache"]["compressed"] = true.into(),
        fits: |_| true,
        data: Some(".blob.raw"),
    },
    Mode {
        name: "dummycache",
        change: |config| config["device"]["cache"] = json!({ "type": "dummycache" }),
        fits: |_| true,
        data: None,
    },
    Mode {
        name: "encrypted",
        change: |config| {
            config["device"]["cache"]["config"]["enable_encryption"] = true.into();
            config["device"]["cache"]["config"]["encryption_key"] = KEY.into();
        },
        fits: |image| image.starts_with("v6") || image == "v5-none-aligned",
        data: Some(".blob.data"),
    },
    Mode {
        name: "convergent",
        change: |config| config["device"]["cache"]["config"]["enable_convergent_encryption"] = true.into(),
        fits: |image| image.starts_with("v6") || image == "v5-none-aligned",
        data: Some(".blob.data"),
    },
    Mode {
        name: "disable_indexed_map",
        change: |config| config["device"]["cache"]["config"]["disable_indexed_map"] = true.into(),
        fits: |image| image.starts_with("v5"),
        data: Some(".blob.data"),
    },
];

fn expect_whole(image: &TestImage, config: &Value, home: &Path, what: &str) -> Value {
    let daemon = nydusd_with(image, config, home, &[]);
    let mut guest = Guest::boot(daemon.socket(), &TWO_QUEUES).unwrap();
    for options in [ODD, LARGE] {
        let tree = walk(&mut guest, &options).unwrap_or_else(|error| panic!("{}, {what}: {error}", image.name));
        let differences = tree.differences(&image.manifest());
        assert!(differences.is_empty(), "{}, {what}:\n{}", image.name, differences.join("\n"));
        guest.reboot().unwrap();
        guest.mount().unwrap();
    }
    counters(&daemon)
}

fn check(mode: &Mode) {
    for image in IMAGES.into_iter().filter(|image| (mode.fits)(image)) {
        let Some(image) = TestImage::named(image) else { return };
        for validate in [false, true] {
            let home = tempfile::tempdir().unwrap();
            let cache = home.path().join("cache");
            fs::create_dir(&cache).unwrap();
            let mut config = image.config(&cache);
            config["digest_validate"] = validate.into();
            (mode.change)(&mut config);
            let what = |when: &str| format!("{}, validate {validate}, {when}", mode.name);
            expect_whole(&image, &config, home.path(), &what("cold"));
            let again = expect_whole(&image, &config, home.path(), &what("by the next daemon"));
            let entries = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let names: Vec<_> = entries.collect();
            match mode.data {
                None => assert!(names.is_empty(), "{names:?}"),
                Some(suffix) => {
                    assert!(names.iter().any(|name| name.ends_with(suffix)), "{names:?}");
                    assert_eq!(again["chunks_fetched"], 0, "{}: {}", image.name, what("everything is kept"));
                    assert_eq!(again["digest_mismatches"], 0, "{}", image.name);
                }
            }
        }
    }
}

#[test]
fn images_are_right_with_a_compressed_cache() {
    check(&MODES[0]);
}

#[test]
fn images_are_right_without_a_cache() {
    check(&MODES[1]);
}

#[test]
fn images_are_right_with_an_encrypted_cache() {
    check(&MODES[2]);
    check(&MODES[3]);
}

#[test]
fn images_are_right_without_a_chunk_map() {
    check(&MODES[4]);
}

#[test]
fn image_is_right_without_a_cache_section() {
    let Some(image) = TestImage::named("v6-lz4-blake3") else { return };
    let home = tempfile::tempdir().unwrap();
    let mut config = image.config(home.path());
    config["device"].as_object_mut().unwrap().remove("cache");
    expect_whole(&image, &config, home.path(), "no cache section");
}

#[test]
fn tar_in_the_cache_directory_serves_its_image_without_a_backend() {
    let Some(image) = TestImage::named("v6-tarfs") else { return };
    let home = tempfile::tempdir().unwrap();
    let (cache, nothing) = (home.path().join("cache"), home.path().join("nothing"));
    fs::create_dir(&cache).unwrap();
    fs::create_dir(&nothing).unwrap();
    for blob in fs::read_dir(&image.blobs).unwrap().map(|entry| entry.unwrap()) {
        fs::copy(blob.path(), cache.join(blob.file_name())).unwrap();
    }
    let image = TestImage { blobs: nothing, ..image };
    let counted = expect_whole(&image, &image.config(&cache), home.path(), "in place");
    assert_eq!(counted["backend_requests"], 0);
    let unchanged = fs::read_dir(&cache).unwrap().count();
    assert_eq!(unchanged, 1, "nothing is written beside it");
}
