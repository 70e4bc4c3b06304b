//! Files that are damaged, cut, removed or replaced: before a daemon opens them, and while it has them mapped and a guest
//! reads. Right bytes or EIO; what is in the cache mends itself, and nobody has to clean up.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::manifest::Entry;
use nydus_vm::testing::room::Place;
use nydus_vm::testing::room::Room;
use nydus_vm::testing::tree::Tree;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;

use crate::cached;
use crate::cached::DATA;
use crate::cached::Files;
use crate::cached::HEADER;
use crate::cached::Known;
use crate::cached::MAP;
use crate::cached::META;
use crate::cached::SIDE;
use crate::support::SMALL;
use crate::support::counters;
use crate::support::nydusd;
use crate::support::nydusd_with;

const WALK: WalkOptions = WalkOptions { in_flight: 16, read_bytes: 8 << 10, ..WalkOptions::USUAL };
const GUEST: GuestOptions = GuestOptions { depth: 16, reply_bytes: 64 << 10, ..SMALL };
/// Walks until a cache has mended itself.
const HEALING_WALKS: usize = 10;

/// An image, and a cache directory that was filled from it.
struct Filled {
    image: TestImage,
    manifest: Vec<Entry>,
    known: Known,
    files: Files,
    home: tempfile::TempDir,
}

impl Filled {
    /// In a home of its own: `cache` is where `nydusd` looks for it.
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let (image, manifest) = cached::small_image(home.path(), 10, 9000);
        Self::with(home, image, manifest)
    }

    fn with(home: tempfile::TempDir, image: TestImage, manifest: Vec<Entry>) -> Self {
        let cache = home.path().join("cache");
        let room = serve(&image, home.path());
        expect_whole(&room.socket, &manifest, "the first walk");
        drop(room);
        let known = Known::new(&image, &cache);
        let files = Files::new(&cache, &known.blob);
        Self { image, manifest, known, files, home }
    }
}

fn serve(image: &TestImage, home: &Path) -> Room {
    let place =
        Place { image: image.clone(), cache: home.join("cache"), socket: home.join("room.sock"), boot_id: [3; 16] };
    Room::at(place).unwrap()
}

fn look(socket: &Path) -> Tree {
    walk(&mut Guest::boot(socket, &GUEST).unwrap(), &WALK).unwrap()
}

#[track_caller]
fn expect_whole(socket: &Path, manifest: &[Entry], what: &str) {
    let differences = look(socket).differences(manifest);
    assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
}

#[track_caller]
fn expect_no_lies(tree: &Tree, manifest: &[Entry], what: &str) {
    let lies = tree.lies(manifest);
    assert!(lies.is_empty(), "{what}:\n{}", lies.join("\n"));
}

/// A byte of a file, and some of its bits.
struct Flip {
    suffix: &'static str,
    offset: u64,
    mask: u8,
}

/// Flips in every region of map, side file and table: each byte of their headers, and bytes all over their arrays.
fn flips(files: &Files, known: &Known) -> Vec<Flip> {
    let size = |suffix: &str| fs::metadata(files.at(suffix)).unwrap().len();
    let mut places: Vec<(&'static str, u64)> = Vec::new();
    places.extend((0..16).chain([17, 100, 4095]).map(|at| (MAP, at)));
    places.extend((HEADER as u64..size(MAP)).map(|at| (MAP, at)));
    places.extend((0..112).chain([120, 4095]).map(|at| (SIDE, at)));
    places.extend((HEADER as u64..size(SIDE)).map(|at| (SIDE, at)));
    // The array: two whole entries and one byte in each of the others; what is behind it; the header at the end.
    let header = size(META) - 4096;
    let array = known.blob.meta.as_ref().unwrap().uncompressed_bytes;
    let entry = array / u64::from(known.blob.chunk_count);
    places.extend((0..2 * entry).chain((2..array / entry).map(|n| n * entry + n % entry)).map(|at| (META, at)));
    places.extend((array..header).step_by(512).map(|at| (META, at)));
    places.extend((0..64).chain([100, 4092, 4095]).map(|at| (META, header + at)));
    // Another bit each time.
    places.into_iter().zip(0..).map(|((suffix, offset), n)| Flip { suffix, offset, mask: 1 << (n % 8) }).collect()
}

#[test]
fn flipped_bit_in_map_side_file_or_table_shows_right_bytes_and_mends_itself() {
    let filled = Filled::new();
    let flips = flips(&filled.files, &filled.known);
    assert!(flips.len() > 200);
    for Flip { suffix, offset, mask } in flips {
        filled.files.flip(suffix, offset, mask);
        let room = serve(&filled.image, filled.home.path());
        expect_whole(&room.socket, &filled.manifest, &format!("bits {mask:#x} of byte {offset} of {suffix}"));
    }
}

#[test]
fn whole_regions_of_noise_show_right_bytes_and_mend_themselves() {
    let filled = Filled::new();
    for suffix in [MAP, SIDE, META] {
        let len = fs::metadata(filled.files.at(suffix)).unwrap().len() as usize;
        for (start, end) in [(0, len), (0, HEADER.min(len)), (HEADER.min(len), len), (len / 2, len)] {
            // Bits of both set would be a chunk that was written and trusted: that is data, not damage.
            let noise = nydus_vm::testing::make::noise(suffix, end - start);
            filled.files.write(suffix, start as u64, &noise);
            let room = serve(&filled.image, filled.home.path());
            expect_whole(&room.socket, &filled.manifest, &format!("noise in {start}..{end} of {suffix}"));
        }
    }
}

#[test]
fn bits_that_speak_of_missing_chunks_are_not_believed() {
    for suffix in [MAP, SIDE] {
        let home = tempfile::tempdir().unwrap();
        let (image, manifest) = cached::small_image(home.path(), 10, 9000);
        let room = serve(&image, home.path());
        let mut guest = Guest::boot(&room.socket, &GUEST).unwrap();
        walk(&mut guest, &WalkOptions { end_after: Some(60), ..WALK }).unwrap();
        drop((guest, room));
        let blob = cached::opened(&image).blobs()[0].clone();
        let files = Files::new(&home.path().join("cache"), &blob);
        let there = files.published().len();
        assert!((1..blob.chunk_count as usize).contains(&there), "{there} chunks of {}", blob.chunk_count);
        files.write(suffix, HEADER as u64, &vec![0xff; blob.chunk_count.div_ceil(8) as usize]);
        let room = serve(&image, home.path());
        expect_whole(&room.socket, &manifest, suffix);
    }
}

#[test]
fn flipped_bit_in_a_table_in_use_shows_right_bytes_or_eio() {
    let filled = Filled::new();
    let flips = flips(&filled.files, &filled.known);
    for Flip { suffix, offset, mask } in flips.into_iter().filter(|flip| flip.suffix == META).step_by(5) {
        let what = format!("bits {mask:#x} of byte {offset} of {suffix}, in use");
        // Nothing is cached but the table, so that each chunk asks it.
        fs::remove_file(filled.files.at(DATA)).unwrap();
        let room = serve(&filled.image, filled.home.path());
        let mut guest = Guest::boot(&room.socket, &GUEST).unwrap();
        walk(&mut guest, &WalkOptions { end_after: Some(30), ..WALK }).unwrap();
        filled.files.flip(suffix, offset, mask);
        drop(guest);
        expect_no_lies(&look(&room.socket), &filled.manifest, &what);
        drop(room);
        let room = serve(&filled.image, filled.home.path());
        expect_whole(&room.socket, &filled.manifest, &format!("{what}, and opened again"));
    }
}

#[test]
fn flipped_bit_in_the_data_is_found_where_it_is_validated_and_under_a_hint() {
    for name in ["made", "v5-lz4-blake3"] {
        let filled = match name {
            "made" => Filled::new(),
            name => {
                let Some(image) = TestImage::named(name) else { continue };
                let manifest = image.manifest();
                Filled::with(tempfile::tempdir().unwrap(), image, manifest)
            }
        };
        // The first, a middle and the last byte, of every third chunk.
        let damage = || {
            for (n, facts) in filled.known.chunks.iter().enumerate().step_by(3) {
                let last = u64::from(facts.uncompressed_bytes) - 1;
                filled.files.flip(DATA, facts.uncompressed_offset + [0, last / 2, last][n % 3], 1 << (n % 8));
            }
            filled.known.chunks.len().div_ceil(3) as u64
        };
        let mut validating = filled.image.config(&filled.home.path().join("cache"));
        validating["digest_validate"] = true.into();
        let damaged = damage();
        let daemon = nydusd_with(&filled.image, &validating, filled.home.path(), &[]);
        expect_whole(daemon.socket(), &filled.manifest, &format!("{name}, validated"));
        assert_eq!(counters(&daemon)["digest_mismatches"], damaged, "{name}");
        drop(daemon);

        let damaged = damage();
        fs::remove_file(filled.files.at(SIDE)).unwrap();
        let daemon = nydusd(&filled.image, filled.home.path(), &[]);
        expect_whole(daemon.socket(), &filled.manifest, &format!("{name}, hints"));
        assert_eq!(counters(&daemon)["hints_refuted"], damaged, "{name}");
        drop(daemon);
        // And what was found wrong is right now.
        let wrong = (0..filled.known.blob.chunk_count).filter(|chunk| !filled.files.is_right(&filled.known, *chunk));
        assert_eq!(wrong.count(), 0, "{name}");
    }
}

/// What happens to a file in use.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Cut(u64),
    Removed,
    /// Another file of the same length has its name.
    Replaced,
}

impl Loss {
    fn strike(self, path: &Path) {
        let open = || File::options().write(true).open(path).unwrap();
        let len = fs::metadata(path).unwrap().len();
        match self {
            Self::Cut(keep) => open().set_len(keep.min(len)).unwrap(),
            Self::Removed => fs::remove_file(path).unwrap(),
            Self::Replaced => {
                let other = path.with_extension("other");
                File::create(&other).unwrap().write_all_at(&vec![0x5A; len as usize], 0).unwrap();
                fs::rename(other, path).unwrap();
            }
        }
    }
}

#[test]
fn cache_file_lost_under_a_reading_guest_shows_right_bytes_or_eio_and_comes_back() {
    let losses = [Loss::Cut(0), Loss::Cut(100), Loss::Cut(4096), Loss::Cut(5000), Loss::Removed, Loss::Replaced];
    for suffix in [DATA, MAP, SIDE, META] {
        let filled = Filled::new();
        for loss in losses {
            let what = format!("{suffix}, {loss:?}");
            if !matches!(suffix, DATA) {
                // A fill under way, so that the file is looked at.
                fs::remove_file(filled.files.at(DATA)).unwrap();
            }
            let mut daemon = nydusd(&filled.image, filled.home.path(), &[]);
            let end_after = Some(if suffix == DATA { 1000 } else { 40 });
            let mut guest = Guest::boot(daemon.socket(), &GUEST).unwrap();
            walk(&mut guest, &WalkOptions { end_after, ..WALK }).unwrap();
            drop(guest);
            let mut guest = Guest::boot(daemon.socket(), &GUEST).unwrap();
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| [(); 3].map(|()| walk(&mut guest, &WALK).unwrap()));
                std::thread::sleep(Duration::from_millis(2));
                loss.strike(&filled.files.at(suffix));
                for tree in reader.join().unwrap() {
                    expect_no_lies(&tree, &filled.manifest, &what);
                }
            });
            drop(guest);
            let is_healed = (0..HEALING_WALKS).any(|_| {
                let tree = look(daemon.socket());
                expect_no_lies(&tree, &filled.manifest, &what);
                tree.differences(&filled.manifest).is_empty()
            });
            assert!(is_healed, "{what}: reads fail for ever");
            assert!(daemon.is_running().unwrap(), "{what}: the daemon died");
            drop(daemon);
            let daemon = nydusd(&filled.image, filled.home.path(), &[]);
            expect_whole(daemon.socket(), &filled.manifest, &format!("{what}, and opened again"));
        }
    }
}

#[test]
fn bootstrap_lost_under_a_reading_guest_shows_right_bytes_or_eio() {
    for name in ["v5-lz4-blake3", "v6-lz4-blake3"] {
        let Some(image) = TestImage::named(name) else { return };
        let manifest = image.manifest();
        for loss in [Loss::Cut(0), Loss::Cut(9000), Loss::Cut(30_000), Loss::Removed, Loss::Replaced] {
            let home = tempfile::tempdir().unwrap();
            let bootstrap = home.path().join("bootstrap");
            fs::copy(&image.bootstrap, &bootstrap).unwrap();
            let copy = TestImage { bootstrap: bootstrap.clone(), ..image.clone() };
            let mut daemon = nydusd(&copy, home.path(), &[]);
            let mut guest = Guest::boot(daemon.socket(), &GUEST).unwrap();
            let what = format!("{name}, bootstrap, {loss:?}");
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| [(); 3].map(|()| walk(&mut guest, &WALK).unwrap()));
                std::thread::sleep(Duration::from_millis(3));
                loss.strike(&bootstrap);
                for tree in reader.join().unwrap() {
                    expect_no_lies(&tree, &manifest, &what);
                }
            });
            if matches!(loss, Loss::Removed | Loss::Replaced) {
                drop(guest);
                expect_whole(daemon.socket(), &manifest, &format!("{what}: what is open is good"));
            }
            assert!(daemon.is_running().unwrap(), "{what}: the daemon died");
        }
    }
}
