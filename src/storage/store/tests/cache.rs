//! Cache files that are damaged, full, shared, truncated, removed, or left by a process that died.

use std::fs::File;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use super::*;
use crate::storage::cache::CacheError;
use crate::storage::cache::claims::Right;
use crate::storage::store::StoreError;
use crate::testing::fault::Order;

/// Inverts `len` bytes of a file.
fn damage(path: &Path, offset: u64, len: usize) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
    file.write_all_at(&bytes, offset).unwrap();
}

#[test]
fn reopened_cache_serves_everything_without_backend() {
    let rig = Rig::new(30);
    rig.read_right(&rig.open(), &rig.pieces(0..30));
    let requests = rig.backend.requests();
    rig.hang();
    rig.read_right(&rig.open(), &rig.pieces(0..30));
    rig.read_right(&rig.open_with(|options| options.validate = true), &rig.pieces(0..30));
    assert_eq!(rig.backend.requests(), requests);
    assert_eq!(rig.metrics.storage.hints_confirmed.get(), 0, "trusted in the same boot");
    let mode = |suffix| std::os::unix::fs::PermissionsExt::mode(&rig.file(suffix).metadata().unwrap().permissions());
    for suffix in [".blob.data", ".blob.data.chunk_map", ".nydus_state"] {
        assert_eq!(mode(suffix) & 0o7777, 0o600, "{suffix}");
    }
}

#[test]
fn other_boot_verifies_hints_and_fetches_damaged_ones_again() {
    let rig = Rig::new(30);
    {
        let store = rig.open();
        rig.read_right(&store, &rig.pieces(0..10));
        // Flushed at the clean end.
    }
    {
        let store = rig.open();
        rig.read_right(&store, &rig.pieces(10..20));
        // As after a power cut: no clean end.
        std::mem::forget(store);
    }
    let requests = rig.backend.requests();
    // Chunks 12 and 13 never reached the disk.
    damage(&rig.file(".blob.data"), rig.chunks[12].uncompressed_offset + 4000, 2000);
    let other = |options: &mut StoreOptions| options.boot_id = [2; 16];
    let store = rig.open_with(other);
    rig.read_right(&store, &rig.pieces(0..20));
    assert_eq!(rig.metrics.storage.hints_confirmed.get(), 8);
    assert_eq!(rig.metrics.storage.hints_refuted.get(), 2);
    assert_eq!(rig.backend.requests(), requests + 1, "12 and 13 in one request");
    drop(store);
    rig.hang();
    rig.read_right(&rig.open_with(other), &rig.pieces(0..20));
    assert_eq!(rig.metrics.storage.hints_confirmed.get(), 8, "verified once");
}

#[test]
fn damaged_side_file_makes_everything_a_hint() {
    let rig = Rig::new(10);
    rig.read_right(&rig.open(), &rig.pieces(0..10));
    rig.hang();
    damage(&rig.file(".nydus_state"), 0, 8);
    rig.read_right(&rig.open(), &rig.pieces(0..10));
    assert_eq!(rig.metrics.storage.hints_confirmed.get(), 10);
    File::create(rig.file(".nydus_state")).unwrap();
    rig.read_right(&rig.open(), &rig.pieces(0..10));
    assert_eq!(rig.metrics.storage.hints_confirmed.get(), 20);
}

#[test]
fn validate_finds_flipped_bits_of_trusted_chunks() {
    let rig = Rig::new(10);
    rig.read_right(&rig.open(), &rig.pieces(0..10));
    damage(&rig.file(".blob.data"), rig.chunks[4].uncompressed_offset, 1);
    let store = rig.open_with(|options| options.validate = true);
    rig.read_right(&store, &rig.pieces(0..10));
    assert_eq!(rig.metrics.storage.digest_mismatches.get(), 1);
    let requests = rig.backend.requests();
    rig.read_right(&store, &rig.pieces(0..10));
    assert_eq!(rig.backend.requests(), requests);
}

#[test]
fn replaced_or_missing_data_file_is_not_believed() {
    let rig = Rig::new(10);
    let fill = || rig.read_right(&rig.open(), &rig.pieces(0..10));
    type Replace = fn(&Path);
    let replacements: [(&str, Replace); 3] = [
        ("removed", |path| std::fs::remove_file(path).unwrap()),
        ("emptied", |path| drop(File::create(path).unwrap())),
        ("replaced", |path| {
            let len = path.metadata().unwrap().len();
            let new = path.with_extension("new");
            File::create(&new).unwrap().set_len(len).unwrap();
            std::fs::rename(new, path).unwrap();
        }),
    ];
    for (name, replace) in replacements {
        fill();
        replace(&rig.file(".blob.data"));
        let requests = rig.backend.requests();
        fill();
        assert!(rig.backend.requests() > requests, "{name}");
    }
}

#[test]
fn unusable_files_are_refused_with_their_name() {
    let rig = Rig::new(10);
    let open = || {
        let chunks = Arc::new(Chunks(rig.chunks.clone()));
        let backend = Arc::clone(&rig.backend) as Arc<dyn Backend>;
        Store::open(rig.options.clone(), vec![rig.facts.clone()], chunks, backend, Arc::clone(&rig.metrics))
    };
    std::fs::create_dir(rig.cache_dir()).unwrap();
    std::fs::write(rig.file(".blob.data"), vec![0; rig.plain.len() + 1]).unwrap();
    let error = open().unwrap_err();
    let StoreError::Cache(error @ CacheError::TooLong { .. }) = error else { panic!("{error:?}") };
    let said = error.to_string();
    assert!(said.contains(&rig.file(".blob.data").display().to_string()) && said.contains("50001"), "{said}");
    std::fs::remove_file(rig.file(".blob.data")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", rig.file(".blob.data")).unwrap();
    assert!(matches!(open(), Err(StoreError::Cache(CacheError::NotRegular { .. }))));
    std::fs::remove_file(rig.file(".blob.data")).unwrap();
    std::fs::write(rig.file(".blob.data.chunk_map"), [0; 5000]).unwrap();
    assert!(matches!(open(), Err(StoreError::Cache(CacheError::MapSize { actual: 5000, .. }))));
}

#[test]
fn two_stores_on_one_directory_fetch_each_chunk_once() {
    let rig = Rig::new(20);
    let (one, two) = (rig.open(), rig.open());
    rig.hang();
    let first = read(&one, &[rig.piece(3)]);
    until("request", || rig.backend.kept() == 1);
    let second = read(&two, &[rig.piece(3), rig.piece(4)]);
    until("request for 4", || rig.backend.kept() == 2);
    std::thread::sleep(Duration::from_millis(100));
    assert!(is_waiting(&second));
    rig.backend.release(Order::FirstFirst);
    assert!(wait(&first).is_ok());
    assert!(wait(&second).unwrap() == rig.expected(&[rig.piece(3), rig.piece(4)]));
    assert_eq!(rig.backend.requests(), 2);
    rig.read_right(&one, &[rig.piece(4)]);
    assert_eq!(rig.backend.requests(), 2);
}

#[test]
fn two_stores_walking_at_once_share_the_work() {
    let rig = Rig::new(200);
    let (one, two) = (rig.open(), rig.open_with(|options| options.amplify_bytes = 20_000));
    rig.backend.set(Fault::Delay(Duration::from_millis(3)));
    std::thread::scope(|scope| {
        for store in [&one, &two] {
            scope.spawn(|| (0..200).for_each(|chunk| rig.read_right(store, &[rig.piece(chunk)])));
        }
    });
    until("everything landed", || rig.metrics.storage.chunks_fetched.get() >= 200);
    assert_eq!(rig.metrics.storage.chunks_fetched.get(), 200);
}

#[test]
fn lock_of_a_dead_process_is_taken_over() {
    let rig = Rig::new(20);
    let two = rig.open();
    rig.hang();
    let one = rig.open();
    let first = read(&one, &[rig.piece(3)]);
    until("request", || rig.backend.kept() == 1);
    let second = read(&two, &[rig.piece(3)]);
    std::thread::sleep(Duration::from_millis(30));
    rig.backend.set(Fault::None);
    // Its descriptors close; the backend still holds its question.
    drop(one);
    assert!(matches!(wait(&first), Err(ReadError::Shutdown)));
    assert!(wait(&second).unwrap() == rig.expected(&[rig.piece(3)]));
}

#[test]
fn store_dropped_in_mid_flight_leaves_a_cache_that_serves_right_bytes() {
    let rig = Rig::new(100);
    for round in 0..10 {
        let store = rig.open_with(|options| options.amplify_bytes = 30_000);
        rig.backend.set(Fault::Delay(Duration::from_millis(round % 3)));
        let answers: Vec<_> = (0..10).map(|n| read(&store, &[rig.piece((round as u32 * 13 + n * 7) % 100)])).collect();
        std::thread::sleep(Duration::from_millis(round / 2));
        drop(store);
        for answer in answers {
            let _ = wait(&answer);
        }
    }
    rig.read_right(&rig.open(), &rig.pieces(0..100));
    rig.read_right(&rig.open_with(|options| options.boot_id = [9; 16]), &rig.pieces(0..100));
}

#[test]
fn truncation_under_the_map_gives_errors_or_right_bytes_and_heals() {
    // Page aligned and not: the page in which the file ends reads as zeros without a signal.
    for keep in [0u64, 1, 4096, 9000, 40_000, 49_000] {
        let rig = Rig::new(10);
        let (store, other) = (rig.open(), rig.open());
        rig.read_right(&store, &rig.pieces(0..10));
        rig.read_right(&other, &rig.pieces(0..10));
        OpenOptions::new().write(true).open(rig.file(".blob.data")).unwrap().set_len(keep).unwrap();
        for store in [&store, &other] {
            for round in 0..4 {
                for chunk in 0..9 {
                    let pieces = [rig.piece(chunk)];
                    match wait(&read(store, &pieces)) {
                        Ok(bytes) => assert!(bytes == rig.expected(&pieces), "{keep} {round} {chunk}"),
                        Err(ReadError::Lost(_)) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
            }
            rig.read_right(store, &rig.pieces(0..9));
        }
    }
}

#[test]
fn truncated_map_and_side_file_cost_only_fetches() {
    for suffix in [".blob.data.chunk_map", ".nydus_state"] {
        let rig = Rig::new(10);
        let store = rig.open();
        rig.read_right(&store, &rig.pieces(0..5));
        File::create(rig.file(suffix)).unwrap();
        rig.read_right(&store, &rig.pieces(0..10));
        rig.read_right(&store, &rig.pieces(0..10));
        drop(store);
        rig.read_right(&rig.open(), &rig.pieces(0..10));
    }
}

#[test]
fn removed_files_are_served_on_and_made_anew_by_others() {
    let rig = Rig::new(10);
    let store = rig.open();
    rig.read_right(&store, &rig.pieces(0..5));
    std::fs::remove_dir_all(rig.cache_dir()).unwrap();
    rig.read_right(&store, &rig.pieces(0..10));
    let other = rig.open();
    rig.read_right(&other, &rig.pieces(0..10));
    rig.read_right(&store, &rig.pieces(0..10));
}

#[test]
fn data_file_removed_alone_is_not_mixed_up_between_stores() {
    let rig = Rig::new(10);
    let store = rig.open();
    rig.read_right(&store, &rig.pieces(0..5));
    std::fs::remove_file(rig.file(".blob.data")).unwrap();
    let other = rig.open();
    // What the first writes now goes into the file that has no name any more.
    rig.read_right(&store, &rig.pieces(5..10));
    rig.read_right(&other, &rig.pieces(0..10));
}

/// A file system of a few pages, which goes with it.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    /// `None`, with a word, where it cannot be mounted.
    fn new(rig: &Rig, size: &str, test: &str) -> Option<Self> {
        let disk = Self(rig.dir.path().join("small"));
        std::fs::create_dir(&disk.0).unwrap();
        let is_mounted = disk.mount("", size);
        if !is_mounted {
            eprintln!("SKIPPED {test}: cannot mount a tmpfs here (it needs root)");
        }
        is_mounted.then_some(disk)
    }

    fn mount(&self, option: &str, size: &str) -> bool {
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("{option}size={size}"), "tmpfs"]).arg(&self.0);
        command.stderr(std::process::Stdio::null()).status().is_ok_and(|status| status.success())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let mut command = std::process::Command::new("umount");
        let _ = command.arg("-l").arg(&self.0).stderr(std::process::Stdio::null()).status();
    }
}

#[test]
fn full_disk_serves_from_memory_and_recovers() {
    let rig = Rig::new(200);
    let Some(disk) = SmallDisk::new(&rig, "128k", "full_disk_serves_from_memory_and_recovers") else { return };
    let store = rig.open_with(|options| options.work_dir = Some(disk.0.clone()));
    for _ in 0..2 {
        for start in (0..200).step_by(20) {
            rig.read_right(&store, &rig.pieces(start..start + 20));
        }
    }
    assert!(rig.metrics.storage.cache_write_errors.get() > 0, "the disk was never full");
    assert!(disk.mount("remount,", "16m"));
    rig.read_right(&store, &rig.pieces(0..200));
    let requests = rig.backend.requests();
    rig.read_right(&store, &rig.pieces(0..200));
    assert_eq!(rig.backend.requests(), requests, "everything is cached once there is room");
    drop(store);
}

#[test]
fn disk_that_is_full_from_the_start_costs_the_cache_only() {
    // Room for nothing, for the side file, for the map too; the last size lets the store open.
    for pages in [1, 2, 3, 4, 5, 8] {
        let rig = Rig::new(20);
        let size = format!("{}k", pages * 4);
        let Some(disk) = SmallDisk::new(&rig, &size, "disk_that_is_full_from_the_start_costs_the_cache_only") else {
            return;
        };
        let store = rig.open_with(|options| options.work_dir = Some(disk.0.clone()));
        for _ in 0..2 {
            rig.read_right(&store, &rig.pieces(0..20));
        }
        drop(store);
        // Once there is room, the next daemon finds nothing that it could not use.
        assert!(disk.mount("remount,", "16m"));
        let store = rig.open_with(|options| options.work_dir = Some(disk.0.clone()));
        rig.read_right(&store, &rig.pieces(0..20));
        let requests = rig.backend.requests();
        rig.read_right(&store, &rig.pieces(0..20));
        assert_eq!(rig.backend.requests(), requests, "{size}");
        drop(store);
    }
}

#[test]
fn parked_reads_end_with_their_store_though_the_backend_keeps_its_answer() {
    let rig = Rig::new(10);
    rig.hang();
    let store = rig.open();
    let answer = read(&store, &[rig.piece(1)]);
    until("request", || rig.backend.kept() == 1);
    drop(store);
    assert!(matches!(wait(&answer), Err(ReadError::Shutdown)));
    // The locks are free although the backend never let go.
    rig.backend.set(Fault::None);
    rig.read_right(&rig.open(), &[rig.piece(1)]);
    assert_eq!(rig.backend.fail_kept(&crate::storage::backend::BackendError::TimedOut), 1);
}

#[test]
fn chunk_that_another_process_fetches_is_waited_for_and_not_asked_for() {
    let rig = Rig::new(20);
    let store = rig.open();
    let directory = crate::storage::cache::Directory::open(rig.cache_dir()).unwrap();
    let other = crate::storage::cache::Generation::open(&directory, &rig.facts, BOOT).unwrap();
    assert!(other.locks().try_lock_chunks(3..5).unwrap());
    let answer = read(&store, &rig.pieces(2..6));
    until("request for 2 and 5", || rig.metrics.storage.chunks_fetched.get() == 2);
    std::thread::sleep(Duration::from_millis(50));
    assert!(is_waiting(&answer));
    for chunk in 3..5 {
        let (facts, plain) = (&rig.chunks[chunk as usize], rig.expected(&[rig.piece(chunk)]));
        other.store(chunk, facts, plain_only(&plain), Right::Locked).unwrap();
    }
    // Seen by the bit, while the lock is still held.
    assert!(wait(&answer).unwrap() == rig.expected(&rig.pieces(2..6)));
    assert_eq!(rig.backend.requests(), 2);
}

#[test]
fn files_removed_in_use_are_made_anew_by_the_regular_upkeep() {
    let rig = Rig::new(10);
    let store = rig.open();
    rig.read_right(&store, &rig.pieces(0..5));
    for suffix in [".blob.data", ".blob.data.chunk_map", ".nydus_state"] {
        std::fs::remove_file(rig.file(suffix)).unwrap();
    }
    rig.read_right(&store, &rig.pieces(0..5));
    assert_eq!(rig.metrics.storage.cache_reopened.get(), 0, "what is open is good");
    store.inner.blobs[0].renew(&store.inner);
    assert_eq!(rig.metrics.storage.cache_reopened.get(), 1);
    rig.read_right(&store, &rig.pieces(0..10));
    drop(store);
    let requests = rig.backend.requests();
    rig.read_right(&rig.open(), &rig.pieces(0..10));
    assert_eq!(rig.backend.requests(), requests);
}
