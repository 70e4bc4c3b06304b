//! Files that lie in a cache directory before we come: data, chunk map and side file of any content are refused, made
//! anew, or believed for what they say.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use nydus_vm::rafs::facts::BlobFacts;
use nydus_vm::rafs::facts::ChunkFacts;
use nydus_vm::rafs::facts::Coding;
use nydus_vm::storage::cache::Directory;
use nydus_vm::storage::cache::Generation;
use nydus_vm::storage::cache::Index;
use nydus_vm::storage::cache::Keeping;
use nydus_vm::storage::cache::PageKeys;
use nydus_vm::storage::cache::Setup;
use nydus_vm::storage::cache::claims::Right;
use nydus_vm::storage::cache::generation::Kept;
use nydus_vm::storage::cache::generation::Presence;
use nydus_vm::storage::cache::keeping::Content;

use crate::input::Input;
use crate::seeds::Seed;
use crate::served::world;

const ID: &str = "blob";
const CHUNK_BYTES: u32 = 4096;
/// Where the records of a side file begin.
const RECORDS: u64 = 4096;
const MAP: &str = "blob.blob.data.chunk_map";

/// Bits of the flags of an input.
mod flag {
    /// The chunk map is the input's, else one of ours.
    pub const MAP: u8 = 1;
    /// The whole side file is the input's, else only the records in one of ours.
    pub const SIDE: u8 = 2;
    /// The data file has another length.
    pub const DATA: u8 = 4;
    /// The machine was started anew.
    pub const BOOT: u8 = 8;
    /// There is no chunk map.
    pub const NO_INDEX: u8 = 16;
}

/// Opens the cache of a blob over the files in `data`: chunks (16 bits), flags, how chunks are kept, length of the data
/// file in chunks (16 bits), length of the map (16 bits), map, side file or records. Works with it, closes it, and opens
/// it again.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let chunks = u32::from(input.u16()) % 2000 + 1;
    let (flags, keeping, data_chunks, map_bytes) = (input.u8(), keeping(input.u8()), input.u16() % 2001, input.u16());
    let map = input.bytes(map_bytes.into());
    let side = input.0;
    for file in home().read_dir().expect("it was made") {
        let _ = std::fs::remove_file(file.expect("it was made").path());
    }
    let index = if flags & flag::NO_INDEX == 0 { Index::Map } else { Index::None };
    let mut setup = Setup { boot_id: [7; 16], keeping, index };
    let directory = Directory::open(home()).expect("it was made");
    let blob = facts(chunks);
    // Its header has a checksum, and knows the data file: no input would have the like.
    drop(Generation::open_as(&directory, &blob, &setup).expect("an empty directory can be used"));
    let write = |name: &str, bytes: &[u8]| std::fs::write(home().join(name), bytes).expect("it can be written");
    let open = |name: &str| std::fs::File::options().write(true).open(home().join(name)).expect("it is there");
    if flags & flag::MAP != 0 {
        write(MAP, map);
    }
    let side_name = if setup.keeping.is_stored() { "blob.raw.nydus_state" } else { "blob.nydus_state" };
    match flags & flag::SIDE {
        0 => {
            let file = open(side_name);
            let room = file.metadata().expect("it is there").len().saturating_sub(RECORDS) as usize;
            file.write_all_at(&side[..side.len().min(room)], RECORDS).expect("it can be written");
        }
        _ => write(side_name, side),
    }
    if flags & flag::DATA != 0 {
        let len = u64::from(data_chunks) * u64::from(CHUNK_BYTES);
        open(&setup.keeping.data_name(ID)).set_len(len).expect("it can be written");
    }
    if flags & flag::BOOT != 0 {
        setup.boot_id = [8; 16];
    }
    use_it(&directory, &blob, &setup);
}

fn keeping(number: u8) -> Keeping {
    match number % 4 {
        0 => Keeping::Plain,
        1 => Keeping::Stored,
        2 => Keeping::Encrypted(PageKeys::digests()),
        _ => Keeping::Encrypted(PageKeys::without_digests()),
    }
}

fn use_it(directory: &Directory, blob: &BlobFacts, setup: &Setup) {
    let Ok(generation) = Generation::open_as(directory, blob, setup) else { return };
    let last = blob.chunk_count - 1;
    for chunk in (0..blob.chunk_count).chain([blob.chunk_count, blob.chunk_count + 7, u32::MAX]) {
        let presence = generation.presence(chunk, &chunk_facts(chunk));
        assert!(chunk <= last || presence != Presence::Trusted, "no chunk of the blob");
    }
    let _ = generation.is_full(blob);
    assert!(!generation.is_lost());
    let plain = vec![0x5a; CHUNK_BYTES as usize];
    let content = Content { stored: Some(&plain), plain: &plain };
    let mut kept = Vec::new();
    for chunk in [last, last / 2, 0] {
        let facts = chunk_facts(chunk);
        let outcome = generation.store(chunk, &facts, content, Right::Locked).expect("it can be written");
        assert_ne!(outcome, Kept::Lacking);
        if outcome == Kept::InFile && !kept.contains(&chunk) {
            kept.push(chunk);
        }
    }
    if let Some(wrong) = kept.iter().position(|chunk| *chunk == 0).filter(|_| last > 1) {
        generation.refute(0, &chunk_facts(0));
        assert_ne!(generation.presence(0, &chunk_facts(0)), Presence::Trusted);
        kept.remove(wrong);
    }
    check(&generation, &kept, &plain);
    drop(generation);
    // Whatever the files were: now they are good ones, and say the same in the same boot.
    let again = Generation::open_as(directory, blob, setup).expect("we made these files");
    check(&again, &kept, &plain);
}

/// What was kept is believed, and is what was kept.
fn check(generation: &Generation, kept: &[u32], plain: &[u8]) {
    for chunk in kept {
        let facts = chunk_facts(*chunk);
        if !generation.is_doubtful() {
            assert_eq!(generation.presence(*chunk, &facts), Presence::Trusted, "chunk {chunk}");
        }
        let loaded = generation.load(&facts).expect("it was written");
        let found = generation.open_chunk(&facts, &loaded).unwrap_or(loaded);
        assert!(found == plain, "chunk {chunk} is not what was kept");
    }
}

/// Where the files are.
fn home() -> &'static PathBuf {
    static HOME: OnceLock<PathBuf> = OnceLock::new();
    // libFuzzer ends the process without unwinding, so whoever runs us removes TMPDIR.
    HOME.get_or_init(|| tempfile::tempdir().expect("a directory can be made").keep())
}

fn facts(chunks: u32) -> BlobFacts {
    let bytes = u64::from(chunks) * u64::from(CHUNK_BYTES);
    BlobFacts {
        id: ID.to_owned(),
        chunk_count: chunks,
        chunk_bytes: CHUNK_BYTES,
        uncompressed_bytes: bytes,
        compressed_bytes: bytes,
        data_bytes: bytes,
        ..world().blob().clone()
    }
}

/// Chunks one behind the other.
fn chunk_facts(chunk: u32) -> ChunkFacts {
    let offset = u64::from(chunk) * u64::from(CHUNK_BYTES);
    ChunkFacts {
        compressed_offset: offset,
        compressed_bytes: CHUNK_BYTES,
        uncompressed_offset: offset,
        uncompressed_bytes: CHUNK_BYTES,
        coding: Coding::Plain,
        digest: Some(std::array::from_fn(|i| chunk as u8 ^ i as u8)),
        crc32c: None,
    }
}

/// Files of our own as they are when some chunks are kept, and maps of upstream's daemon where there are reference images.
pub fn seeds() -> Vec<Seed> {
    let mut found = Vec::new();
    for chunks in [1u16, 20, 1999] {
        for kind in 0..4 {
            let input = |flags, map: &[u8], side: &[u8]| joined(chunks, flags, kind, map, side);
            run(&input(0, &[], &[]));
            let name = if kind == 1 { "blob.raw.nydus_state" } else { "blob.nydus_state" };
            let read = |name: &str| std::fs::read(home().join(name)).expect("it was made");
            let (map, side) = (read(MAP), read(name));
            let records = &side[RECORDS as usize..];
            found.push((format!("ours-{chunks}-{kind}"), input(flag::MAP, &map, records)));
            found.push((format!("boot-{chunks}-{kind}"), input(flag::MAP | flag::BOOT, &map, records)));
            found.push((format!("moved-{chunks}-{kind}"), input(flag::SIDE | flag::DATA, &map, &side)));
            found.push((format!("none-{chunks}-{kind}"), input(flag::NO_INDEX, &[], records)));
        }
    }
    for (name, map) in crate::seeds::references(|name| name.ends_with("chunk_map")) {
        let chunks = (map.len().saturating_sub(4096) * 8) as u16;
        found.push((name, joined(chunks, flag::MAP, 0, &map, &[])));
    }
    found
}

fn joined(chunks: u16, flags: u8, keeping: u8, map: &[u8], side: &[u8]) -> Vec<u8> {
    let mut head = (chunks - 1).to_le_bytes().to_vec();
    head.extend([flags, keeping]);
    head.extend(chunks.to_le_bytes());
    head.extend((map.len() as u16).to_le_bytes());
    [&head, map, side].concat()
}
