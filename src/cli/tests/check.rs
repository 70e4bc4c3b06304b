//! `nydus-image check` from outside: exit codes, what is said, and the JSON.

use std::fs;
use std::process::Command;
use std::process::Output;

use crate::place::Place;

/// Runs `nydus-image check` in the place.
fn check(place: &Place, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nydus-image"))
        .args(["check", "--log-level", "error"])
        .args(arguments)
        .current_dir(place.path("."))
        .output()
        .unwrap()
}

/// What stderr says of a check that must find something: lines for each, and the last one.
fn wrong(place: &Place, arguments: &[&str], expected: &[&str]) {
    let output = check(place, arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
    assert!(text.lines().last().unwrap().starts_with("Error: "), "{text}");
    for part in expected {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

fn flip(place: &Place, file: &std::path::Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 0xff;
    fs::write(place.path("bad"), bytes).unwrap();
}

#[test]
fn good_image_is_told_and_exits_with_0() {
    let place = Place::new();
    for (arguments, parts) in [
        (&["boot"][..], &["2 paths: 1 directories, 1 files of 13 bytes in 1 chunks"][..]),
        (&["-B", "boot", "-D", "blobs", "--data"], &["1 chunks of the blobs verified"]),
        (&["boot", "-C", "config.json", "-v"], &["chunk table read", "RAFS filesystem metadata is valid"]),
        (&["boot", "-b", place.blob().to_str().unwrap(), "--data"], &["1 chunks of the blobs verified"]),
    ] {
        let output = check(&place, arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{arguments:?} {text}");
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }
}

#[test]
fn damaged_metadata_is_told_with_field_offset_and_path() {
    let place = Place::new();
    let bytes = fs::read(place.path("boot")).unwrap();
    // Nid 128 is the root; its entries name the only file.
    flip(&place, &place.path("boot"), 1028);
    wrong(&place, &["bad"], &["bad: checksum at offset 0x404: 0xff instead of 0x0", "1 thing is wrong"]);
    let name = bytes.windows(8).position(|window| window == b"greeting").unwrap();
    let mut slash = bytes.clone();
    slash[name + 3] = b'/';
    fs::write(place.path("bad"), slash).unwrap();
    wrong(&place, &["bad"], &["dirent name at offset", " of /: entry 2: no legal name"]);
    fs::write(place.path("bad"), &bytes[..bytes.len() / 2]).unwrap();
    wrong(&place, &["bad"], &[" at offset 0x"]);
    fs::write(place.path("bad"), b"").unwrap();
    wrong(&place, &["bad"], &["wrong magic number at offset 0x0"]);
    wrong(&place, &["missing"], &["\"missing\"", "No such file"]);
}

#[test]
fn damaged_blob_is_told_with_the_path_of_the_file() {
    let place = Place::new();
    flip(&place, &place.blob(), 3);
    wrong(&place, &["boot", "-b", "bad", "--data"], &["chunk digest at offset 0x0 of /greeting: chunk 0: the digest"]);
    let output = check(&place, &["boot", "-b", "bad"]);
    assert_eq!(output.status.code(), Some(0), "without --data no chunk is read");
    let bytes = fs::read(place.blob()).unwrap();
    // The header of the chunk table is the last page.
    flip(&place, &place.blob(), bytes.len() - 4096 + 12);
    wrong(&place, &["boot", "-b", "bad"], &["chunk table of blob", "blob meta header entries at offset 0xc"]);
    fs::write(place.path("bad"), &bytes[..5]).unwrap();
    wrong(&place, &["boot", "-b", "bad"], &["blob file size at offset 0x5", "bad has 5 bytes"]);
    wrong(&place, &["boot", "-D", "tree"], &["blob file at offset 0x0", "No such file"]);
}

#[test]
fn outcome_is_written_as_json() {
    let place = Place::new();
    let read = || -> serde_json::Value { serde_json::from_slice(&fs::read(place.path("out")).unwrap()).unwrap() };
    check(&place, &["boot", "-J", "out"]);
    let good = read();
    assert_eq!((&good["valid"], &good["seen"]["paths"], &good["fs_version"]), (&true.into(), &2.into(), &"6".into()));
    flip(&place, &place.blob(), 3);
    check(&place, &["boot", "-b", "bad", "--data", "-J", "out"]);
    let bad = read();
    let finding = &bad["findings"][0];
    assert_eq!(
        (&bad["valid"], &finding["part"], &finding["path"]),
        (&false.into(), &"blob".into(), &"/greeting".into())
    );
    assert_eq!((&finding["field"], &finding["offset"]), (&"chunk digest".into(), &0.into()));
}

#[test]
fn build_into_a_missing_directory_says_what_to_do() {
    let place = Place::new();
    let output = Command::new(env!("CARGO_BIN_EXE_nydus-image"))
        .args(["create", "-B", "new", "-D", "none/blobs", "tree"])
        .current_dir(place.path("."))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("the directory \"none/blobs\" does not exist, make it first"), "{text}");
}
