//! The reader against images made in the test, whole and damaged.

mod v5_blobs;

use proptest::prelude::*;
use smallvec::SmallVec;

use super::RafsError;
use super::check;
use super::detect;
use super::detect::Content as Holds;
use super::facts::Piece;
use super::image::Image;
use super::image::OpenOptions;
use super::seek::Whence;
use super::tar;
use super::test_images;
use super::test_images::CHUNK;
use super::test_images::Content;
use super::test_images::LAST_CHUNK;
use super::test_images::V6_BLOB_TABLE;
use super::test_images::node;
use super::toc::Section;
use super::version::Version;
use crate::sys::view::View;

const OPTIONS: OpenOptions = OpenOptions { placeholder_id: None };

fn open(bytes: &[u8]) -> Result<Image, RafsError> {
    Image::open(View::from_bytes(bytes.to_vec()), &OPTIONS)
}

fn samples() -> [Vec<u8>; 2] {
    [test_images::v5(&test_images::sample()), test_images::v6(&test_images::sample())]
}

fn resolve(image: &Image, path: &str) -> u32 {
    path.split('/').filter(|name| !name.is_empty()).fold(image.root(), |dir, name| {
        let dir = image.inode(dir).unwrap();
        image.lookup(&dir, name.as_bytes()).unwrap().unwrap_or_else(|| panic!("{path}: no {name}"))
    })
}

fn patched(image: &[u8], patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = image.to_vec();
    for (at, bytes) in patches {
        image[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    image
}

#[test]
fn walk_of_a_made_image_sees_everything() {
    for bytes in samples() {
        let image = open(&bytes).unwrap();
        let seen = check::walk(&image).unwrap();
        let expected = check::Seen {
            paths: 511,
            inodes: 511,
            directories: 5,
            files: 503,
            file_bytes: LAST_CHUNK + 6 * CHUNK + 2 * CHUNK + LAST_CHUNK,
            chunks: 10,
        };
        assert_eq!(seen, expected, "{:?}", image.version());
        image.verify_tree().unwrap();
        let index = image.chunk_index().unwrap();
        for chunk in [0, 1, 2, 3, 4, 5, 15] {
            assert!(index.digest(0, chunk).unwrap().is_some(), "{:?} {chunk}", image.version());
        }
        for (blob, chunk) in [(0, 16), (0, u32::MAX), (1, 0), (u32::MAX, 0)] {
            assert_eq!(index.digest(blob, chunk).unwrap(), None);
        }
    }
}

#[test]
fn attributes_of_a_made_image_are_read() {
    for bytes in samples() {
        let image = open(&bytes).unwrap();
        let link = image.inode(resolve(&image, "dir/sub/x")).unwrap();
        assert_eq!(image.symlink(&link).unwrap(), b"../y");
        assert_eq!(image.inode(resolve(&image, "chr")).unwrap().rdev, 0x1234);
        let attributed = image.inode(resolve(&image, "attributed")).unwrap();
        assert_eq!(image.xattr_names(&attributed).unwrap(), b"user.a\0trusted.longer.name\0security.x\0");
        assert_eq!(image.xattr(&attributed, b"trusted.longer.name").unwrap(), Some(vec![]));
        assert_eq!(image.xattr(&attributed, b"security.x").unwrap(), Some(b"yz".to_vec()));
        assert_eq!(image.xattr(&attributed, b"user.").unwrap(), None);
        let sub = image.inode(resolve(&image, "dir/sub")).unwrap();
        assert_eq!(image.lookup(&sub, b"..").unwrap(), Some(resolve(&image, "dir")));
        assert_eq!(image.lookup(&sub, b".").unwrap(), Some(sub.ino));
        assert!(matches!(image.lookup(&link, b"x"), Err(RafsError::NotDirectory)));
        assert!(matches!(image.entries(&link, 0), Err(RafsError::NotDirectory)));
    }
}

#[test]
fn plan_cuts_at_chunk_borders_and_clips_to_the_size() {
    for bytes in samples() {
        let image = open(&bytes).unwrap();
        let facts = image.inode(resolve(&image, "tail")).unwrap();
        let piece = |chunk, skip: u64, len: u64| Piece {
            blob: 0,
            chunk,
            offset: u64::from(chunk) * CHUNK + skip,
            len: len as u32,
        };
        let whole = [piece(0, 0, CHUNK), piece(2, 0, CHUNK), piece(15, 0, LAST_CHUNK)];
        let rows: [(std::ops::Range<u64>, &[Piece]); 7] = [
            (0..u64::MAX, &whole),
            (0..1, &[piece(0, 0, 1)]),
            (4095..4097, &[piece(0, 4095, 1), piece(2, 0, 1)]),
            (8192 + 99..1 << 40, &[piece(15, 99, 1)]),
            (8192 + 100..1 << 40, &[]),
            (5..5, &[]),
            (u64::MAX..u64::MAX, &[]),
        ];
        for (range, expected) in rows {
            let mut pieces: SmallVec<[Piece; 8]> = SmallVec::new();
            image.plan(&facts, range.clone(), &mut pieces).unwrap();
            assert_eq!(pieces.as_slice(), expected, "{:?} {range:?}", image.version());
        }
    }
}

#[test]
fn seek_finds_chunks_of_zeros() {
    for bytes in samples() {
        let image = open(&bytes).unwrap();
        // Chunks: data, data, hole, hole, data, hole.
        let facts = image.inode(resolve(&image, "sparse")).unwrap();
        let rows = [
            (0, Some(0), Some(2 * CHUNK)),
            (2 * CHUNK - 1, Some(2 * CHUNK - 1), Some(2 * CHUNK)),
            (2 * CHUNK + 5, Some(4 * CHUNK), Some(2 * CHUNK + 5)),
            (4 * CHUNK, Some(4 * CHUNK), Some(5 * CHUNK)),
            (5 * CHUNK, None, Some(5 * CHUNK)),
            (6 * CHUNK - 1, None, Some(6 * CHUNK - 1)),
            (6 * CHUNK, None, None),
            (u64::MAX, None, None),
        ];
        for (offset, data, hole) in rows {
            assert_eq!(image.seek(&facts, offset, Whence::Data).unwrap(), data, "data from {offset}");
            assert_eq!(image.seek(&facts, offset, Whence::Hole).unwrap(), hole, "hole from {offset}");
        }
        let full = image.inode(resolve(&image, "tail")).unwrap();
        assert_eq!(image.seek(&full, 10, Whence::Hole).unwrap(), Some(full.size));
    }
}

#[test]
fn listing_of_a_large_directory_resumes_anywhere_and_agrees_with_lookup() {
    let children: Vec<_> = (0..20_000).map(|number| node(&format!("n{number:06}"), Content::Device(number))).collect();
    for bytes in [test_images::v5(&children), test_images::v6(&children)] {
        let image = open(&bytes).unwrap();
        let root = image.inode(image.root()).unwrap();
        let mut from = 0;
        let mut names = 0;
        loop {
            // Seven at a time, as a small READDIR buffer would have it.
            let mut entries = image.entries(&root, from).unwrap();
            let before = names;
            for _ in 0..7 {
                let Some(entry) = entries.next() else { break };
                let entry = entry.unwrap();
                from = entry.next;
                names += 1;
                if names % 501 == 0 {
                    assert_eq!(image.lookup(&root, entry.name).unwrap(), Some(entry.ino));
                }
            }
            if names == before {
                break;
            }
        }
        assert_eq!(names, 20_002, "{:?}", image.version());
        assert_eq!(image.lookup(&root, b"n0000000").unwrap(), None);
        assert_eq!(image.lookup(&root, b"zzz").unwrap(), None);
        assert_eq!(image.lookup(&root, b"").unwrap(), None);
        for from in [0xffff, 1 << 16 | 0xffff, 1 << 40, u64::MAX] {
            let mut entries = image.entries(&root, from).unwrap();
            while let Some(entry) = entries.next() {
                entry.unwrap();
            }
        }
    }
}

#[test]
fn v5_superblock_and_tables_that_break_a_rule_are_refused() {
    let [good, _] = samples();
    let u32_at = |at: usize| u32::from_le_bytes(good[at..at + 4].try_into().unwrap());
    let (blob_table, extended) = (u32_at(48) as usize, u32_at(72) as usize);
    let rows: &[(&str, usize, &[u8])] = &[
        ("superblock size", 8, &[1]),
        ("chunk size", 12, &[0, 0x20, 1]),
        ("superblock flags", 16, &[0x3b]),
        ("superblock flags", 18, &[1]),
        ("inode count", 24, &[0xff; 4]),
        ("inode count", 24, &[0; 8]),
        ("inode table", 32, &[4]),
        ("inode table", 32, &[0xff; 8]),
        ("inode table", 56, &[0xff; 4]),
        ("blob table", 48, &[0, 0x20]),
        ("blob table", 64, &[0, 0, 0x80]),
        ("prefetch table", 60, &[1]),
        ("extended blob table", 72, &[0xf8, 0xff, 0xff, 0xff]),
        ("blob prefetch offset", blob_table, &[1]),
        ("blob id", blob_table + 8, b"a/"),
        ("blob id", blob_table + 8, b".."),
        ("blob chunk count", extended + 3, &[1]),
        ("blob uncompressed size", extended + 15, &[1]),
        ("blob compressed size", extended + 23, &[1]),
    ];
    for (field, at, bytes) in rows {
        match open(&patched(&good, &[(*at, bytes)])).err() {
            Some(RafsError::Malformed { field: found, .. }) => assert_eq!(found, *field, "{at}"),
            Some(RafsError::Unknown { what, .. }) => assert!(what.starts_with(field), "{what} at {at}"),
            other => panic!("{field} at {at}: {other:?}"),
        }
    }
    let outcome = open(&good[..good.len() - 4]).err();
    assert!(matches!(outcome, Some(RafsError::Malformed { field: "bootstrap size", .. })), "{outcome:?}");
    assert!(matches!(open(b"RAFS"), Err(RafsError::Malformed { field: "superblock magic", .. })));
    for (version, readers) in [(4, "tools older than nydus v2 only"), (6, "tools newer than nydus v2.4.4 only")] {
        let error = open(&patched(&good, &[(5, &[version])])).unwrap_err().to_string();
        assert_eq!(error, format!("RAFS version 0x{version}00 of the image can be read by {readers}"));
    }
}

#[test]
fn v6_superblock_and_tables_that_break_a_rule_are_refused() {
    let [_, good] = samples();
    let rows: &[(&str, usize, &[u8])] = &[
        ("checksum", 1028, &[1]),
        ("feature_compat", 1032, &[1]),
        ("block size bits", 1036, &[13]),
        ("block size bits", 1036, &[9]),
        ("block size bits", 1153, &[2]),
        ("extension slots", 1037, &[1]),
        ("nid", 1038, &[0, 0]),
        ("inode count", 1040, &[0; 8]),
        ("xattr_blkaddr", 1068, &[1]),
        ("feature_incompat", 1104, &[0xd]),
        ("union", 1108, &[1]),
        ("blob table size", 1110, &[0]),
        ("blob table size", 1110, &[2]),
        ("device table slot", 1112, &[12]),
        ("superblock flags", 1153, &[4]),
        ("blob table", 1160, &[0, 5]),
        ("blob table", 1168, &[1]),
        ("chunk size", 1172, &[0, 8]),
        ("chunk table", 1176, &[0xff; 8]),
        ("chunk table", 1184, &[1]),
        ("prefetch table", 1200, &[6]),
        ("blob id", 1408, b"c"),
        ("device blocks", 1472, &[1]),
        ("blob index", V6_BLOB_TABLE + 64, &[1]),
        ("blob chunk size", V6_BLOB_TABLE + 68, &[0, 0x20]),
        ("blob chunk count", V6_BLOB_TABLE + 75, &[1]),
        ("blob compression", V6_BLOB_TABLE + 76, &[4]),
        ("blob digest algorithm", V6_BLOB_TABLE + 80, &[2]),
        ("blob features", V6_BLOB_TABLE + 84, &[0]),
        ("blob features", V6_BLOB_TABLE + 85, &[0x10]),
        ("blob compressed size", V6_BLOB_TABLE + 93, &[2]),
        ("CI compression", V6_BLOB_TABLE + 108, &[9]),
        ("CI offset", V6_BLOB_TABLE + 118, &[1]),
        ("CI compressed size", V6_BLOB_TABLE + 121, &[8]),
        ("CI uncompressed size", V6_BLOB_TABLE + 128, &[1]),
    ];
    for (field, at, bytes) in rows {
        match open(&patched(&good, &[(*at, bytes)])).err() {
            // A changed device id differs from the one in the blob table.
            Some(RafsError::Malformed { field: "device id", .. }) if *field == "blob id" => {}
            Some(RafsError::Malformed { field: found, .. }) => assert_eq!(found, *field, "{at}"),
            Some(RafsError::Unknown { what, .. }) => assert!(what.starts_with(field), "{what} at {at}"),
            other => panic!("{field} at {at}: {other:?}"),
        }
    }
}

#[test]
fn v6_algorithms_that_are_not_known_name_themselves_and_the_blob() {
    let [_, good] = samples();
    let newer = "tools newer than nydus v2.4.4 only";
    let none = "no tools of nydus up to v2.4.4";
    let rows: &[(usize, u8, &str, &str)] = &[
        (76, 4, "blob compression 4", newer),
        (80, 2, "blob digest algorithm 2", newer),
        (85, 0x10, "blob features 0x1000", newer),
        (108, 9, "CI compression 9", newer),
        (216, 2, "blob cipher 2 (AES-256-XTS)", none),
        (216, 3, "blob cipher 3 (AES-256-GCM)", none),
        (216, 4, "blob cipher 4", newer),
    ];
    for (at, byte, what, readers) in rows {
        let error = open(&patched(&good, &[(V6_BLOB_TABLE + at, &[*byte])])).unwrap_err().to_string();
        assert_eq!(error, format!("{what} of blob blob can be read by {readers}"));
    }
}

#[test]
fn verify_tree_notices_changed_content() {
    let [good, _] = samples();
    let find = |needle: &[u8]| good.windows(needle.len()).position(|window| window == needle).unwrap();
    let target = find(b"/some/where");
    // The digest of the file `sparse` covers that of its first chunk, 152 bytes behind its record.
    let sparse = find(b"sparse\0\0");
    for at in [target, sparse + 8, sparse - 128] {
        let image = open(&patched(&good, &[(at, &[good[at] ^ 1])])).unwrap();
        let outcome = image.verify_tree();
        assert!(matches!(outcome, Err(RafsError::Malformed { field: "inode digest", .. })), "{at}: {outcome:?}");
    }
}

#[test]
fn chunk_described_in_two_ways_is_refused() {
    let [v5, v6] = samples();
    // In v5 two files have chunk 15; in v6 the last record is that of the second chunk of zeros, made chunk 3 here.
    let digest = test_images::chunk_digest(15);
    let in_v5 = v5.windows(32).rposition(|window| window == digest).unwrap();
    let digest = test_images::chunk_digest(4);
    let in_v6 = v6.windows(32).rposition(|window| window == digest).unwrap() + 72;
    open(&v6).unwrap().chunk_index().unwrap();
    let outcome = open(&patched(&v6, &[(in_v6, &[3])])).unwrap().chunk_index().err();
    assert!(matches!(outcome, Some(RafsError::Malformed { field: "chunk record", .. })), "{outcome:?}");
    // In v5 the others can be read.
    let good = open(&v5).unwrap().chunk_index().unwrap();
    assert!(good.faults().is_empty() && good.chunk(0, 15).unwrap().is_some());
    let index = open(&patched(&v5, &[(in_v5, &test_images::chunk_digest(4)[..1])])).unwrap().chunk_index().unwrap();
    assert!(matches!(index.faults(), [RafsError::Malformed { field: "chunk record", .. }]), "{:?}", index.faults());
    assert_eq!((index.chunk(0, 15).unwrap(), index.len()), (None, good.len() - 1));
    assert_eq!(index.chunk(0, 2).unwrap(), good.chunk(0, 2).unwrap());
}

#[test]
fn v5_xattrs_of_the_format_description_are_read() {
    let text = "2b00000000000000 13000000 747275737465642e74 00 726f6f74206f6e6c79 \
                10000000 73656375726974792e666f6f 00 626172 0000000000";
    let mut file = node("a", Content::File(vec![], 0));
    // A table of the same size, to be overwritten.
    file.xattrs = vec![("user.aaa", "aaaaaaaaaa"), ("user.bbb", "bbbbbbb")];
    let mut bytes = test_images::v5(&[file]);
    let at = bytes.windows(8).position(|window| window == b"user.aaa").unwrap() - 12;
    assert_eq!(bytes[at], 0x2b, "the made table");
    bytes.truncate(at);
    bytes.extend_from_slice(&hex::decode(text.replace(' ', "")).unwrap());
    let image = open(&bytes).unwrap();
    let facts = image.inode(resolve(&image, "a")).unwrap();
    assert_eq!(image.xattr_names(&facts).unwrap(), b"trusted.t\0security.foo\0");
    assert_eq!(image.xattr(&facts, b"trusted.t").unwrap(), Some(b"root only".to_vec()));
    assert_eq!(image.xattr(&facts, b"security.foo").unwrap(), Some(b"bar".to_vec()));
}

#[test]
fn hard_links_of_v5_lead_to_the_first_record() {
    let file = |name| node(name, Content::File(vec![15], LAST_CHUNK));
    let dir = node("dir", Content::Dir(vec![]));
    let good = test_images::v5(&[dir, file("one"), file("two")]);
    let record = |name: &[u8]| good.windows(name.len()).position(|window| window == name).unwrap() - 128;
    let (one, two) = (record(b"one\0\0\0\0\0"), record(b"two\0\0\0\0\0"));
    let linked = patched(&good, &[(24, &[3]), (two + 40, &[3]), (one + 88, &[2]), (two + 88, &[2])]);
    let image = open(&linked).unwrap();
    assert_eq!((resolve(&image, "one"), resolve(&image, "two")), (3, 3));
    let seen = check::walk(&image).unwrap();
    assert_eq!((seen.paths, seen.inodes, seen.chunks), (4, 3, 1));
    image.verify_tree().unwrap();
    assert!(image.inode(4).is_err(), "the later record is no inode of the mount");

    // A link to a directory, and one whose content differs from the first.
    let outcome = open(&patched(&linked, &[(two + 40, &[2])])).and_then(|image| check::walk(&image));
    assert!(matches!(outcome, Err(RafsError::Malformed { field: "inode number", .. })), "{outcome:?}");
    let other =
        test_images::v5(&[node("dir", Content::Dir(vec![])), file("one"), node("two", Content::File(vec![0], CHUNK))]);
    let image = open(&patched(&other, &[(two + 40, &[3])])).unwrap();
    assert!(matches!(image.verify_tree(), Err(RafsError::Malformed { field: "inode digest", .. })));
}

#[test]
fn image_without_blobs_opens() {
    let [_, good] = samples();
    let image = open(&patched(&good, &[(1110, &[0]), (1168, &[0; 4]), (1169, &[0]), (1184, &[0; 4])])).unwrap();
    assert_eq!((image.blobs().len(), image.totals().data_bytes), (0, 0));
    assert!(image.chunk_index().unwrap().is_empty());
    let facts = image.inode(resolve(&image, "many/file-00499")).unwrap();
    image.plan(&facts, 0..1, &mut SmallVec::new()).unwrap();
    let facts = image.inode(resolve(&image, "tail")).unwrap();
    assert!(image.plan(&facts, 0..1, &mut SmallVec::new()).is_err());
}

#[test]
fn detect_tells_what_a_file_holds() {
    let [v5, v6] = samples();
    let detect = |bytes: &[u8]| detect::detect(&View::from_bytes(bytes.to_vec())).unwrap();
    assert_eq!(detect(&v5), Holds::Bootstrap(Version::V5));
    assert_eq!(detect(&v6), Holds::Bootstrap(Version::V6));
    assert_eq!(detect(&[0x1f, 0x8b, 8, 0]), Holds::Gzip);
    for other in [&b""[..], b"x", &[0; 4096]] {
        assert_eq!(detect(other), Holds::Other);
    }
    // A plain EROFS image is none of ours.
    assert_eq!(detect(&patched(&v6, &[(1032, &[0; 4])])), Holds::Other);

    // An inlined blob without chunks starts with a superblock: the tail decides.
    let mut inlined = v6.clone();
    inlined.extend_from_slice(&tar::header("image.boot", v6.len() as u64));
    assert_eq!(detect(&inlined), Holds::Inside(Section::plain(0, v6.len() as u64)));

    let mut layer = tar::header("image/", 0).to_vec();
    layer.extend_from_slice(&tar::header("image/other", 700));
    layer.resize(512 + 512 + 1024, 1);
    layer.extend_from_slice(&tar::header("./image/image.boot", v6.len() as u64));
    layer.extend_from_slice(&v6);
    layer.resize(layer.len().next_multiple_of(512) + 1024, 0);
    assert_eq!(detect(&layer), Holds::Inside(Section::plain(2560, v6.len() as u64)));
}

/// The error of walking `good` with `bytes` at `at`.
fn fault(good: &[u8], at: usize, bytes: &[u8]) -> (&'static str, String) {
    match open(&patched(good, &[(at, bytes)])).and_then(|image| check::walk(&image)) {
        Err(RafsError::Malformed { field, reason, .. }) => (field, reason),
        other => ("another outcome", format!("{other:?}")),
    }
}

fn check_faults(good: &[u8], rows: &[(&str, usize, &[u8])]) {
    let wrong = rows.iter().filter_map(|(field, at, bytes)| {
        let (found, reason) = fault(good, *at, bytes);
        (found != *field).then(|| format!("{field} at {at}: {found}: {reason}"))
    });
    assert_eq!(wrong.collect::<Vec<_>>(), Vec::<String>::new());
}

#[test]
fn v5_records_that_break_a_rule_are_refused() {
    let [good, _] = samples();
    let record = |name: &[u8]| good.windows(name.len()).position(|window| window == name).unwrap() - 128;
    let (root, many, first) = (record(b"/\0\0\0\0\0\0\0"), record(b"many\0\0\0\0"), record(b"file-00000\0"));
    let (link, sparse, attributed) = (record(b"link\0\0\0\0"), record(b"sparse\0\0"), record(b"attributed\0"));
    let rows: &[(&str, usize, &[u8])] = &[
        ("inode table entry", 8192, &[0; 4]),
        ("inode table entry", 8192, &[0xff; 4]),
        ("inode number", root + 40, &[2]),
        ("inode number", first + 40, &[0xff; 8]),
        ("inode number", many + 40, &[1]),
        ("inode parent", first + 32, &[1]),
        ("inode parent", first + 32, &[0; 8]),
        ("inode mode", first + 60, &[0; 4]),
        ("inode mode", first + 62, &[1]),
        ("inode nlink or mtime", first + 88, &[0; 4]),
        ("inode nlink or mtime", first + 111, &[0xff]),
        ("inode child index", many + 92, &[1, 0]),
        ("inode child index", many + 96, &[0xff; 4]),
        ("inode child count", sparse + 96, &[5]),
        ("inode child count", sparse + 71, &[0xff]),
        ("inode name size", first + 100, &[0, 0]),
        ("inode name size", first + 100, &[0, 1]),
        ("inode name", first + 128, b"a/"),
        ("inode name", first + 130, b"\0"),
        ("name", first + 128, b"g"),
        ("symlink size", link + 102, &[0, 0]),
        ("symlink size", link + 64, &[9]),
        ("symlink target", link + 136, &[0]),
        ("xattr table size", attributed + 128 + 16 + 2, &[0xff]),
        ("xattr pair length", attributed + 128 + 16 + 8, &[0xff]),
        ("xattr name", attributed + 128 + 16 + 12, b"U"),
        ("chunk blob index", sparse + 136 + 32, &[1]),
        ("chunk index", sparse + 136 + 72, &[16]),
        ("chunk compressed size", sparse + 136 + 40, &[1]),
        ("chunk uncompressed size", sparse + 136 + 44, &[1]),
        ("chunk compressed offset", sparse + 136 + 51, &[0xff]),
        ("chunk uncompressed offset", sparse + 136 + 63, &[0xff]),
    ];
    check_faults(&good, rows);
}

#[test]
fn v6_inodes_and_directories_that_break_a_rule_are_refused() {
    let [_, good] = samples();
    let image = open(&good).unwrap();
    let at = |path: &str| 8192 + resolve(&image, path) as usize * 32;
    let place = |path: &str| {
        let at = at(path);
        (at, at + if good[at] & 1 == 1 { 64 } else { 32 })
    };
    let (root, entries) = place("/");
    let ((link, _), (many, _)) = (place("link"), place("many"));
    let ((sparse, chunks), (attributed, xattrs)) = (place("sparse"), place("attributed"));
    let many_data = u32::from_le_bytes(good[many + 16..many + 20].try_into().unwrap()) as usize * 4096;
    let rows: &[(&str, usize, &[u8])] = &[
        ("inode format", link, &[0x10]),
        ("inode format", link + 1, &[1]),
        ("inode format", sparse, &[good[sparse] & 1]),
        ("inode mode", link + 4, &[0, 0]),
        ("inode format", link + 5, &[0x81]),
        ("symlink size", link + 8, &[0; 4]),
        ("symlink size", link + 8, &[0xff; 4]),
        ("inode data", many + 16, &[0xff; 4]),
        ("inode data", many + 10, &[0xff]),
        ("chunk format", sparse + 16, &[0]),
        ("chunk format", sparse + 17, &[1]),
        ("inode size", sparse + 11, &[0xff]),
        ("chunk device number", chunks + 2, &[0]),
        ("chunk device number", chunks + 2, &[2]),
        ("chunk index", chunks, &[16]),
        ("chunk index", chunks + 3, &[1]),
        ("chunk address", chunks + 7, &[0xff]),
        ("xattr shared count", xattrs + 4, &[1]),
        ("xattr entry", xattrs + 12, &[0]),
        ("xattr entry", xattrs + 12, &[0xff]),
        ("xattr prefix", xattrs + 13, &[5]),
        ("xattr entry", xattrs + 14, &[0xff, 0xff]),
        ("xattr name", xattrs + 16, &[0]),
        ("dirent name offset", entries + 8, &[0, 0]),
        ("dirent name offset", entries + 8, &[13]),
        ("dirent name offset", entries + 8, &[0xf0, 0xff]),
        ("dirent name offset", entries + 12 + 8, &[0, 0]),
        ("dirent nid", entries + 4, &[1]),
        ("dirent nid", entries, &[0xff; 8]),
        ("dirent type", entries + 10, &[8]),
        ("dirent type", entries + 2 * 12 + 10, &[7]),
        ("dirent nid", entries + 10, &[1]),
        ("dirent nid", many_data + 10, &[1]),
        ("inode nlink or mtime", attributed + if xattrs - attributed == 64 { 44 } else { 6 }, &[0, 0]),
        ("dirent name offset", many_data + 4096 + 8, &[0xff, 0xff]),
        ("inline data", root + 8, &[0xf8, 0x0f]),
    ];
    check_faults(&good, rows);
}

/// Reads everything of an image that may be damaged; it may fail anywhere, but not panic or go on for ever.
fn read_everything(bytes: Vec<u8>) {
    let view = View::from_bytes(bytes);
    let _ = detect::detect(&view);
    let Ok(image) = Image::open(view.clone(), &OpenOptions { placeholder_id: Some("real".to_owned()) }) else {
        return;
    };
    let _ = check::walk(&image);
    let _ = image.verify_tree();
    let _ = image.chunk_index();
    let _ = image.prefetch();
    // Inodes that no path leads to, and all that hangs on them.
    for ino in 0..u32::try_from(view.len() / 32).unwrap().min(3000) {
        let Ok(facts) = image.inode(ino) else { continue };
        let mut pieces = SmallVec::new();
        let _ = image.plan(&facts, 0..1 << 20, &mut pieces);
        // Those of a tar may be cut in two.
        assert!(pieces.len() <= 2 * (1 << 20) / 4096 + 1);
        let _ = image.seek(&facts, 0, Whence::Data);
        let _ = image.symlink(&facts);
        let _ = image.xattr_names(&facts);
        let _ = image.lookup(&facts, b"file-00123");
        if let Ok(mut entries) = image.entries(&facts, 0) {
            let mut left = view.len();
            // An entry takes 12 bytes at least: a listing that goes on longer does not end.
            while let Some(entry) = entries.next() {
                let Ok(entry) = entry else { break };
                assert!((1..=255).contains(&entry.name.len()));
                left = left.checked_sub(12).expect("the listing does not end");
            }
        }
    }
}

/// The images that get damaged: reference images where they are, made ones else and too.
fn victims() -> Vec<Vec<u8>> {
    let mut victims = samples().to_vec();
    #[cfg(feature = "testing")]
    if let Some(images) = crate::testing::manifest::reference_images() {
        for name in crate::testing::manifest::REFERENCES {
            let (view, _) = super::reference_tests::bootstrap(&images.join(name));
            victims.push(view.vec_at(0, view.len()).unwrap());
        }
    }
    victims
}

#[test]
fn damaged_images_never_panic_or_hang() {
    let victims = victims();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let flips = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40);
    let strategy = (any::<prop::sample::Index>(), flips, any::<Option<prop::sample::Index>>(), any::<bool>());
    proptest!(config, |((victim, flips, cut, spares_tables) in strategy)| {
        let mut bytes = victim.get(&victims).clone();
        // Most faults in superblocks and tables end at once; half of the cases aim behind them.
        let from = if spares_tables { 8192 } else { 0 };
        for (place, value) in &flips {
            let at = from + place.index(bytes.len() - from);
            bytes[at] = *value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()) & !7);
        }
        read_everything(bytes);
    });
}
