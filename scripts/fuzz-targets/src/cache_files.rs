//! Files that lie in a cache directory before we come: chunk map and side file of any content are refused, made anew, or
//! believed for what they say.

use std::path::PathBuf;
use std::sync::OnceLock;

use nydus_vm::rafs::facts::BlobFacts;
use nydus_vm::rafs::facts::ChunkFacts;
use nydus_vm::rafs::facts::Coding;
use nydus_vm::storage::cache::Directory;
use nydus_vm::storage::cache::Generation;
use nydus_vm::storage::cache::claims::Right;
use nydus_vm::storage::cache::generation::Kept;
use nydus_vm::storage::cache::generation::Presence;
use nydus_vm::storage::cache::keeping::Content;

use crate::input::Input;
use crate::seeds::Seed;
use crate::served::world;

const ID: &str = "blob";
const BOOT: [u8; 16] = [7; 16];
const CHUNK_BYTES: u64 = 4096;

/// Opens the cache of a blob over the files in `data`: chunks (16 bits), length of the data file in chunks (16 bits), flags,
/// length of the map (16 bits), map, side file. Then works with it, closes it, and opens it again.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let chunks = u32::from(input.u16()) % 2000 + 1;
    let (data_chunks, flags, map_bytes) = (input.u16() % 2001, input.u8(), input.u16());
    let map = input.bytes(map_bytes.into());
    let side = input.0;
    let path = home();
    let file = |suffix: &str| path.join(format!("{ID}{suffix}"));
    for (bit, suffix, content) in [(1, ".blob.data.chunk_map", map), (2, ".nydus_state", side)] {
        let _ = std::fs::remove_file(file(suffix));
        if flags & bit == 0 {
            std::fs::write(file(suffix), content).expect("the scratch directory can be written");
        }
    }
    let _ = std::fs::remove_file(file(".blob.data"));
    if flags & 4 == 0 {
        let data = std::fs::File::create(file(".blob.data")).expect("the scratch directory can be written");
        data.set_len(u64::from(data_chunks) * CHUNK_BYTES).expect("the scratch directory can be written");
    }
    let boot = if flags & 8 == 0 { BOOT } else { [8; 16] };
    use_it(chunks, boot);
}

fn use_it(chunks: u32, boot: [u8; 16]) {
    let directory = Directory::open(home()).expect("it was made");
    let blob = facts(chunks);
    let Ok(generation) = Generation::open(&directory, &blob, boot) else { return };
    let presence: Vec<_> = (0..chunks).map(|chunk| generation.presence(chunk, &described(chunk))).collect();
    assert_eq!(generation.is_full(&blob), presence.iter().all(|presence| *presence != Presence::Missing));
    for chunk in [chunks, chunks + 7, u32::MAX] {
        assert_eq!(generation.presence(chunk, &described(chunk)), Presence::Missing, "no chunk of the blob");
        generation.refute(chunk, &described(chunk));
    }
    assert!(generation.view.len() == blob.uncompressed_bytes && !generation.is_lost());
    let plain = vec![0x5a; CHUNK_BYTES as usize];
    let last = chunks - 1;
    let content = Content { stored: None, plain: &plain };
    let kept = generation.store(last, &described(last), content, Right::Locked);
    assert_eq!(kept.expect("the scratch directory can be written"), Kept::InFile);
    assert_eq!(generation.presence(last, &described(last)), Presence::Trusted);
    assert_eq!(generation.load(&described(last)).expect("it was written"), plain);
    // What another image says of it is neither believed nor written.
    let other = ChunkFacts { digest: Some([0xa5; 32]), ..described(last) };
    assert_eq!(generation.presence(last, &other), Presence::Disputed);
    assert_eq!(generation.store(last, &other, content, Right::Locked).expect("nothing is done"), Kept::Disputed);
    if chunks > 1 {
        generation.refute(0, &described(0));
        assert_ne!(generation.presence(0, &described(0)), Presence::Trusted);
    }
    drop(generation);

    // Whatever the files were: now they are good ones, and say the same in the same boot.
    let again = Generation::open(&directory, &blob, boot).expect("we made these files");
    assert_eq!(again.presence(last, &described(last)), Presence::Trusted);
    for (chunk, before) in (1..last).zip(presence.iter().skip(1)) {
        assert_eq!(again.presence(chunk, &described(chunk)), *before, "chunk {chunk}");
    }
}

/// Where the files are.
fn home() -> &'static PathBuf {
    static HOME: OnceLock<PathBuf> = OnceLock::new();
    // libFuzzer ends the process without unwinding, so whoever runs us removes TMPDIR.
    HOME.get_or_init(|| tempfile::tempdir().expect("a directory can be made").keep())
}

/// A chunk of the blob.
fn described(chunk: u32) -> ChunkFacts {
    let offset = u64::from(chunk) * CHUNK_BYTES;
    ChunkFacts {
        compressed_offset: offset,
        compressed_bytes: CHUNK_BYTES as u32,
        uncompressed_offset: offset,
        uncompressed_bytes: CHUNK_BYTES as u32,
        coding: Coding::Plain,
        digest: Some([0x5a; 32]),
        crc32c: None,
    }
}

fn facts(chunks: u32) -> BlobFacts {
    BlobFacts {
        id: ID.to_owned(),
        chunk_count: chunks,
        chunk_bytes: CHUNK_BYTES as u32,
        uncompressed_bytes: u64::from(chunks) * CHUNK_BYTES,
        ..world().blob().clone()
    }
}

/// Files of our own, and those of upstream's daemon where there are reference images.
pub fn seeds() -> Vec<Seed> {
    let mut found = Vec::new();
    for chunks in [1u16, 20, 1999] {
        for suffix in [".blob.data", ".blob.data.chunk_map", ".nydus_state"] {
            let _ = std::fs::remove_file(home().join(format!("{ID}{suffix}")));
        }
        use_it(chunks.into(), BOOT);
        let read = |suffix: &str| std::fs::read(home().join(format!("{ID}{suffix}"))).expect("it was made");
        found.push((format!("ours-{chunks}"), joined(chunks, &read(".blob.data.chunk_map"), &read(".nydus_state"))));
    }
    for (name, map) in crate::seeds::references(|name| name.ends_with("chunk_map")) {
        let chunks = (map.len().saturating_sub(4096) * 8) as u16;
        found.push((name, joined(chunks, &map, &[])));
    }
    found
}

fn joined(chunks: u16, map: &[u8], side: &[u8]) -> Vec<u8> {
    let head = [(chunks - 1).to_le_bytes(), chunks.to_le_bytes()].concat();
    [&head, &[0][..], &(map.len() as u16).to_le_bytes(), map, side].concat()
}
