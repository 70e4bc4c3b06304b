//! Faults in made images, and what a survey says of them.

use super::*;
use crate::rafs::image::OpenOptions;
use crate::rafs::test_images;
use crate::rafs::test_images::Content;
use crate::rafs::test_images::Node;
use crate::rafs::test_images::node;
use crate::sys::view::View;

fn open(bytes: Vec<u8>) -> Image {
    Image::open(View::from_bytes(bytes), &OpenOptions { placeholder_id: None }).unwrap()
}

/// Where the inode of `path` is in the v6 image `bytes`, and what follows it there.
fn inode(bytes: &[u8], path: &str) -> (usize, usize) {
    let image = open(bytes.to_vec());
    let nid = path
        .split('/')
        .filter(|name| !name.is_empty())
        .fold(image.root(), |dir, name| image.lookup(&image.inode(dir).unwrap(), name.as_bytes()).unwrap().unwrap());
    let at = 8192 + nid as usize * 32;
    (at, at + if bytes[at] & 1 == 1 { 64 } else { 32 })
}

/// What a survey of `bytes` finds: path and field.
fn survey_of(bytes: Vec<u8>) -> Vec<(String, String)> {
    let report = survey(&open(bytes), &Blobs::default());
    let shown = |finding: &Finding| (finding.shown_path().unwrap_or_default(), finding.field().to_owned());
    report.findings.iter().map(shown).collect()
}

fn file(name: &str) -> Node {
    node(name, Content::File(vec![0, 1, 3], 3 * test_images::CHUNK))
}

fn assert_found(found: &[(String, String)], expected: &[(&str, &str)]) {
    for (path, field) in expected {
        assert!(found.iter().any(|row| row.0 == *path && row.1 == *field), "{field} of {path} is not in {found:?}");
    }
}

#[test]
fn survey_goes_on_behind_faults_and_names_each_path() {
    let mut bytes = test_images::v6(&test_images::sample());
    let (link, _) = inode(&bytes, "link");
    let (_, chunks) = inode(&bytes, "sparse");
    let (_, xattrs) = inode(&bytes, "attributed");
    bytes[link + 8] = 0;
    bytes[chunks + 2] = 9;
    bytes[chunks + 3 * 8 + 3] = 1;
    bytes[xattrs + 13] = 5;
    let expected = [
        ("/attributed", "xattr prefix"),
        ("/link", "symlink size"),
        ("/sparse", "chunk device number"),
        ("/sparse", "chunk index"),
    ];
    let found = survey_of(bytes);
    assert_found(&found, &expected);
    assert_eq!(found.len(), 4, "{found:?}");
}

#[test]
fn broken_directory_block_hides_its_own_names_only() {
    let mut bytes = test_images::v6(&test_images::sample());
    let (many, _) = inode(&bytes, "many");
    let data = u32::from_le_bytes(bytes[many + 16..many + 20].try_into().unwrap()) as usize * 4096;
    let good = survey(&open(bytes.clone()), &Blobs::default());
    // The offset of the first name of the second block, and the last entry's type in the first.
    bytes[data + 4096 + 8] = 13;
    bytes[data + 10 * 12 + 10] = 99;
    let report = survey(&open(bytes.clone()), &Blobs::default());
    let found = survey_of(bytes);
    assert_found(&found, &[("/many", "dirent name offset"), ("/many", "dirent type")]);
    assert_eq!(found.iter().filter(|row| row.1 == "dirent name offset").count(), 1, "{found:?}");
    let lost = good.seen.paths - report.seen.paths;
    assert!((2..300).contains(&lost), "{lost} names of the other blocks are missing");
}

#[test]
fn directory_with_two_names_and_a_wrong_link_count_are_found() {
    let tree = [node("a", Content::Dir(vec![file("f")])), node("b", Content::Dir(vec![])), file("c")];
    let mut bytes = test_images::v6(&tree);
    let (root, entries) = inode(&bytes, "/");
    let first = u16::from_le_bytes(bytes[entries + 8..entries + 10].try_into().unwrap()) as usize / 12;
    assert_eq!(first, 5, "., .., a, b, c");
    let nid: [u8; 8] = bytes[entries + 2 * 12..][..8].try_into().unwrap();
    bytes[entries + 3 * 12..][..8].copy_from_slice(&nid);
    let links = root + if bytes[root] & 1 == 1 { 44 } else { 6 };
    bytes[links] = 7;
    assert_found(&survey_of(bytes), &[("/b", "directory"), ("/", "inode nlink")]);
}

#[test]
fn directory_that_contains_itself_ends_the_walk() {
    let mut bytes = test_images::v6(&[node("a", Content::Dir(vec![node("b", Content::Dir(vec![]))]))]);
    let (_, entries) = inode(&bytes, "a");
    let (top, _) = inode(&bytes, "/");
    let nid = ((top - 8192) as u64 / 32).to_le_bytes();
    bytes[entries + 2 * 12..][..8].copy_from_slice(&nid);
    assert_found(&survey_of(bytes), &[("/a/b", "directory")]);
}

#[test]
fn parts_that_overlap_are_found() {
    let mut bytes = test_images::v6(&[file("a"), file("b")]);
    let (a, _) = inode(&bytes, "a");
    // 40 chunks instead of three reach into the inode behind.
    bytes[a + 8..a + 12].copy_from_slice(&(40 * test_images::CHUNK as u32).to_le_bytes());
    let found = survey_of(bytes);
    assert_found(&found, &[("/b", "inode")]);
}

#[test]
fn later_hard_link_of_v5_must_repeat_the_first_record() {
    let mut bytes = test_images::v5(&[file("one"), file("two")]);
    let record = |name: &[u8]| bytes.windows(name.len()).position(|window| window == name).unwrap() - 128;
    let (one, two) = (record(b"one\0\0\0\0\0"), record(b"two\0\0\0\0\0"));
    bytes[two + 40] = 2;
    (bytes[one + 88], bytes[two + 88]) = (2, 2);
    bytes[24] = 2;
    assert_eq!(survey_of(bytes.clone()), []);
    let mut other = bytes.clone();
    other[two + 136 + 80 + 32 + 44] ^= 1;
    assert_found(&survey_of(other), &[("/two", "chunk record")]);
    let mut other = bytes.clone();
    other[two + 88] = 3;
    assert_found(&survey_of(other), &[("/two", "inode nlink")]);
    bytes[24] = 3;
    assert_found(&survey_of(bytes), &[("", "inode count")]);
}

#[test]
fn survey_gives_up_after_its_limit() {
    let many = (0..2000).map(|number| file(&format!("{number:05}"))).collect();
    let mut bytes = test_images::v6(&[node("many", Content::Dir(many))]);
    // Every blob index in the chunk records of the files: device number 9.
    let (first, _) = inode(&bytes, "many/00000");
    for at in (first..bytes.len() - 3).step_by(8) {
        if bytes[at + 2] == 1 && bytes[at + 1] == 0 && bytes[at + 3] == 0 {
            bytes[at + 2] = 9;
        }
    }
    let report = survey(&open(bytes), &Blobs::default());
    assert_eq!((report.findings.len(), report.gave_up), (limits::MAX_FINDINGS, true));
}

/// Whatever is flipped in superblocks and tables, and in a sample of the rest: no panic, and an end.
#[test]
fn every_flipped_byte_of_the_tables_is_borne() {
    let mut tree = test_images::sample();
    for node in &mut tree {
        if let Content::Dir(children) = &mut node.content {
            children.truncate(3);
        }
    }
    for good in [test_images::v5(&tree), test_images::v6(&tree)] {
        let used = (0..good.len()).filter(|&at| good[at] != 0 || at < 1536 || at.is_multiple_of(97));
        for at in used {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                let Ok(image) = Image::open(View::from_bytes(bytes), &OpenOptions { placeholder_id: None }) else {
                    continue;
                };
                let report = survey(&image, &Blobs::default());
                assert!(report.seen.paths <= 200, "{at}: {:?}", report.seen);
                let _ = image.verify_tree();
            }
        }
    }
}
