//! Forms of bootstraps, and an image put together with a backend of the test's.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use smallvec::SmallVec;

use super::*;
use crate::builder;
use crate::builder::ChunkBytes;
use crate::builder::Target;
use crate::config::Mode;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;
use crate::rafs::toc;
use crate::storage::store::ReadError;
use crate::sys::view::View;
use crate::testing::fault::Fault;
use crate::testing::fault::FaultBackend;
use crate::testing::fault::MemoryBackend;
use crate::testing::manifest::reference_images;

const PATIENCE: Duration = Duration::from_secs(20);

/// An image with one file `f`, in a directory of its own.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        let home = Self(tempfile::tempdir().unwrap());
        fs::create_dir(home.path("tree")).unwrap();
        fs::write(home.path("tree/f"), b"content").unwrap();
        fs::create_dir(home.path("blobs")).unwrap();
        let options = builder::Options {
            bootstrap: Target::File(home.path("boot")),
            blob: Target::Directory(home.path("blobs")),
            chunk_bytes: ChunkBytes::DEFAULT,
            compressor: Compressor::Lz4Block,
            digester: Digester::Sha256,
        };
        builder::create(&home.path("tree"), &options, &mut |_| ()).unwrap();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// A tar file with one member.
fn tar_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[148..156].copy_from_slice(b"        ");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar  \0");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn bootstrap_is_found_in_every_wrapping() {
    let home = Home::new();
    let plain = fs::read(home.path("boot")).unwrap();
    let tar = tar_of("image/image.boot", &plain);
    for (name, bytes) in
        [("plain", plain.clone()), ("plain.gz", gzip(&plain)), ("layer.tar", tar.clone()), ("layer.tar.gz", gzip(&tar))]
    {
        let path = home.path(name);
        fs::write(&path, bytes).unwrap();
        for mode in [Mode::Direct, Mode::Cached] {
            let image = bootstrap::open(&path, mode).unwrap_or_else(|error| panic!("{name}: {error}"));
            let root = image.inode(image.root()).unwrap();
            assert!(image.lookup(&root, b"f").unwrap().is_some(), "{name}");
        }
    }
}

#[test]
fn wrong_wrappings_are_refused() {
    let home = Home::new();
    let plain = fs::read(home.path("boot")).unwrap();
    let cut = gzip(&plain);
    for (name, bytes) in [
        ("other.tar", tar_of("image/other", &plain)),
        ("twice.gz", gzip(&gzip(&plain))),
        ("cut.gz", cut[..cut.len() / 2].to_vec()),
    ] {
        let path = home.path(name);
        fs::write(&path, bytes).unwrap();
        let outcome = bootstrap::open(&path, Mode::Direct).map(drop);
        assert!(matches!(outcome, Err(BootstrapError::Unknown | BootstrapError::Io(_))), "{name}: {outcome:?}");
    }
}

#[test]
fn reference_images_open_whatever_holds_their_metadata() {
    let Some(images) = reference_images() else { return };
    for name in ["v5-inline", "v6-inline", "v6-inline-toc", "v6-toc", "v5-zstd-sha256-4k", "v6-merged"] {
        let plain = images.join(name).join("bootstrap");
        let blobs = fs::read_dir(images.join(name).join("blobs")).unwrap().map(|entry| entry.unwrap().path());
        let path = if plain.exists() { plain } else { blobs.min().unwrap() };
        for mode in [Mode::Direct, Mode::Cached] {
            let image = bootstrap::open(&path, mode).unwrap_or_else(|error| panic!("{name}: {error}"));
            image.verify_tree().unwrap();
            assert!(image.totals().inodes > 100, "{name}: {:?}", image.totals());
            for blob in image.blobs() {
                assert!(images.join(name).join("blobs").join(&blob.id).exists(), "{name}: {}", blob.id);
            }
        }
    }
}

#[test]
fn damaged_inline_metadata_is_refused() {
    let Some(images) = reference_images() else { return };
    let folder = images.join("v6-inline-toc").join("blobs");
    let blob = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&blob).unwrap();
    let section = toc::find_bootstrap(&View::from_bytes(bytes.clone())).unwrap().unwrap();
    bytes[(section.offset + section.compressed_bytes / 2) as usize] ^= 1;
    let copy = tempfile::NamedTempFile::new().unwrap();
    fs::write(copy.path(), bytes).unwrap();
    for mode in [Mode::Direct, Mode::Cached] {
        let outcome = bootstrap::open(copy.path(), mode).map(drop);
        assert!(matches!(outcome, Err(BootstrapError::Section { .. })), "{outcome:?}");
    }
}

/// The image in `home`, served from a backend in memory that misbehaves on command.
fn assembled(home: &Home) -> (Served, std::sync::Arc<FaultBackend>) {
    let memory = MemoryBackend::default();
    let blob = fs::read_dir(home.path("blobs")).unwrap().next().unwrap().unwrap();
    memory.put(blob.file_name().to_str().unwrap(), fs::read(blob.path()).unwrap());
    let pool = Pool::new(2).unwrap();
    let faults = FaultBackend::new(Arc::new(memory), Arc::clone(&pool));
    let text = "{\"version\": 2, \"cache\": {\"type\": \"blobcache\", \"filecache\": {\"work_dir\": \"cache\"}}}";
    let (config, _) = Config::parse(text, home.0.path()).unwrap();
    let parts = Parts {
        bootstrap: &home.path("boot"),
        config: &config,
        backend: faults.clone(),
        pool,
        boot_id: [3; 16],
        zero_message_open: ZeroMessageOpen::WhereSafe,
        metrics: Arc::new(Metrics::new(2)),
    };
    (assemble(parts).unwrap(), faults)
}

/// Begins to read the file of the image; the outcome comes through the channel.
fn read(served: &Served) -> mpsc::Receiver<Result<u64, ReadError>> {
    let image = served.image();
    let root = image.inode(image.root()).unwrap();
    let file = image.inode(image.lookup(&root, b"f").unwrap().unwrap()).unwrap();
    let mut pieces = SmallVec::new();
    image.plan(&file, 0..file.size, &mut pieces).unwrap();
    let (done, outcome) = mpsc::channel();
    served.store().read(&pieces, move |read| {
        let _ = done.send(read.map(|ready| ready.len() as u64));
    });
    outcome
}

#[test]
fn assembled_image_reads_from_the_given_backend() {
    let home = Home::new();
    let (served, faults) = assembled(&home);
    assert_eq!(read(&served).recv_timeout(PATIENCE).unwrap().unwrap(), 7);
    assert!(faults.requests() > 0);
    assert!(Path::new(&home.path("cache")).is_dir());
}

#[test]
fn dropping_a_served_image_answers_what_is_parked() {
    let home = Home::new();
    let (served, faults) = assembled(&home);
    faults.set(Fault::Hang);
    let outcomes: Vec<_> = (0..256).map(|_| read(&served)).collect();
    let start = std::time::Instant::now();
    drop(served);
    assert!(start.elapsed() < crate::limits::ORDERED_SHUTDOWN, "{:?}", start.elapsed());
    for outcome in outcomes {
        outcome.recv_timeout(PATIENCE).unwrap().unwrap_err();
    }
}
