//! What the builder makes, read back.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::*;
use crate::builder;
use crate::builder::BuildError;
use crate::builder::ChunkBytes;
use crate::builder::Options;
use crate::builder::Progress;
use crate::builder::Target;
use crate::testing::make;
use crate::testing::make::MadeImage;
use crate::testing::snapshot;

fn assert_shows(image: &MadeImage, source: &Path) {
    let readback = Readback::open(&image.bootstrap, &image.blobs).unwrap();
    let found = readback.entries().unwrap();
    let expected = snapshot::of_tree(source).unwrap();
    if let Some(difference) = snapshot::difference(&expected, &found) {
        panic!("{difference}");
    }
    assert_eq!(readback.image().totals().inodes, expected.len() as u64);
    assert_eq!(readback.image().has_xattrs(), expected.iter().any(|entry| !entry.xattrs.is_empty()));
}

fn options(out: &Path) -> Options {
    Options {
        compressor: Compressor::Zstd,
        digester: Digester::Blake3,
        chunk_bytes: ChunkBytes::DEFAULT,
        bootstrap: Target::File(out.join("bootstrap")),
        blob: Target::Directory(out.to_path_buf()),
    }
}

/// Names in a directory, hidden ones too.
fn names(directory: &Path) -> Vec<String> {
    let names = directory.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn odd_tree_is_read_back_equal_with_every_algorithm_and_chunk_size() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    std::fs::create_dir(&source).unwrap();
    make::odd_tree(&source).unwrap();
    for compressor in [Compressor::None, Compressor::Lz4Block, Compressor::Zstd] {
        for digester in [Digester::Blake3, Digester::Sha256] {
            for chunk_bytes in [4096, 16384, 1 << 20, 16 << 20] {
                let out = scratch.path().join(format!("{compressor:?}-{digester:?}-{chunk_bytes}"));
                assert_shows(&make::image(&source, &out, compressor, digester, chunk_bytes), &source);
            }
        }
    }
}

#[test]
fn same_tree_built_twice_gives_the_same_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    std::fs::create_dir(&source).unwrap();
    make::odd_tree(&source).unwrap();
    let [a, b] = ["a", "b"].map(|name| {
        let out = scratch.path().join(name);
        make::image(&source, &out, Compressor::Zstd, Digester::Blake3, 4096)
    });
    assert_eq!(a.blob_id, b.blob_id);
    assert_eq!(std::fs::read(a.bootstrap).unwrap(), std::fs::read(b.bootstrap).unwrap());
}

#[test]
fn directory_of_100_k_entries_is_read_back_equal() {
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    make::big_directory(&source, 100_000).unwrap();
    let image = make::image(&source, &scratch.path().join("out"), Compressor::Lz4Block, Digester::Blake3, 1 << 20);
    assert_shows(&image, &source);
}

#[test]
fn tree_without_data_gives_an_image_without_blob() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    std::fs::create_dir_all(source.join("empty")).unwrap();
    std::fs::write(source.join("empty-file"), b"").unwrap();
    let image = make::image(&source, &out, Compressor::Zstd, Digester::Blake3, 1 << 20);
    assert_eq!(image.blob_id, None);
    assert_eq!(names(&out.join("blobs")), [""; 0]);
    assert_shows(&image, &source);
    assert!(std::fs::metadata(image.bootstrap).unwrap().len().is_multiple_of(4096));
}

#[test]
fn chunks_of_a_merged_file_are_merged_for_the_kernel_only() {
    // 300 kB of noise in 4 KiB chunks: one piece to the kernel, many chunks to us.
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("noise"), make::noise("n", 300_000)).unwrap();
    let image = make::image(&source, &scratch.path().join("out"), Compressor::Zstd, Digester::Blake3, 4096);
    assert_shows(&image, &source);
    let readback = Readback::open(&image.bootstrap, &image.blobs).unwrap();
    assert_eq!(readback.image().blobs()[0].chunk_count, 74);
}

#[test]
fn outputs_are_named_as_asked_and_nothing_else_is_left() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), b"content").unwrap();

    // Both into the directory, each under its SHA-256.
    std::fs::create_dir(&out).unwrap();
    let both = Options { bootstrap: Target::Directory(out.clone()), ..options(&out) };
    let built = builder::create(&source, &both, &mut |_| {}).unwrap();
    let blob = built.blob.unwrap();
    let sha256 = |path: &Path| hex::encode(Sha256::digest(std::fs::read(path).unwrap()));
    assert_eq!(blob.path, out.join(sha256(&blob.path)));
    assert_eq!(built.bootstrap, out.join(sha256(&built.bootstrap)));
    let mut expected = [blob.id.clone(), sha256(&built.bootstrap)];
    expected.sort();
    assert_eq!(names(&out), expected);

    // Both as named files, replacing what is there.
    let named = Options { blob: Target::File(out.join("the-blob")), ..options(&out) };
    std::fs::write(out.join("the-blob"), b"old").unwrap();
    let again = builder::create(&source, &named, &mut |_| {}).unwrap();
    assert_eq!(again.bootstrap, out.join("bootstrap"));
    assert_eq!(std::fs::read(out.join("the-blob")).unwrap(), std::fs::read(blob.path).unwrap());
    assert_eq!(names(&out).len(), 4);
}

#[test]
fn failures_name_the_path_and_leave_no_output() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    std::fs::create_dir_all(source.join("sub")).unwrap();
    std::fs::create_dir(&out).unwrap();
    let changing = source.join("sub/changing");
    let check = |change: &dyn Fn()| {
        std::fs::write(&changing, make::noise("c", 3 << 20)).unwrap();
        std::fs::write(source.join("first"), make::noise("f", 100)).unwrap();
        let mut is_changed = false;
        let error = builder::create(&source, &options(&out), &mut |progress| {
            if matches!(progress, Progress::Stored { .. }) && !std::mem::replace(&mut is_changed, true) {
                change();
            }
        });
        let error = error.unwrap_err();
        assert!(matches!(&error, BuildError::Changed(path) if *path == changing), "{error:?}");
        assert!(error.to_string().contains("sub/changing"), "{error}");
        assert_eq!(names(&out), [""; 0]);
        let _ = std::fs::remove_file(&changing);
    };
    // The first chunk stored is that of the file before it, in the directory above.
    let file = || std::fs::File::options().write(true).open(&changing).unwrap();
    check(&|| file().set_len(1000).unwrap());
    check(&|| file().set_len(4 << 20).unwrap());
    check(&|| file().write_all_at(b"other", 0).unwrap());
    check(&|| std::fs::remove_file(&changing).unwrap());
    check(&|| {
        std::fs::remove_file(&changing).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &changing).unwrap();
    });
    check(&|| {
        std::fs::remove_file(&changing).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &changing, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    });
}

#[test]
fn file_cut_between_two_chunks_is_reported() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    std::fs::create_dir(&out).unwrap();
    let file = source.join("file");
    std::fs::write(&file, make::noise("c", 3 << 20)).unwrap();
    let error = builder::create(&source, &options(&out), &mut |progress| {
        if matches!(progress, Progress::Stored { .. }) {
            std::fs::File::options().write(true).open(&file).unwrap().set_len((1 << 20) + 5).unwrap();
        }
    });
    assert!(matches!(error, Err(BuildError::Changed(path)) if path == file));
    assert_eq!(names(&out), [""; 0]);
}

#[test]
fn impossible_outputs_and_sources_are_refused_with_their_names() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), b"x").unwrap();
    std::fs::create_dir(&out).unwrap();
    let fails = |source: &Path, options: &Options, named: &Path| {
        let error = format!("{:#}", anyhow::Error::new(builder::create(source, options, &mut |_| {}).unwrap_err()));
        assert!(error.contains(&format!("{named:?}")) && !error.contains('\n'), "{error}");
    };
    let missing = scratch.path().join("missing");
    fails(&missing, &options(&out), &missing);
    fails(&source.join("file"), &options(&out), &source.join("file"));
    fails(&source, &options(&missing), &missing);
    let directory = Options { bootstrap: Target::File(source.clone()), ..options(&out) };
    fails(&source, &directory, &source);
}

/// A small tree: each element makes one path.
#[derive(Debug, Clone)]
enum Element {
    Directory,
    File { seed: u8, len: usize },
    Symlink(usize),
    Fifo,
    HardLink,
    Xattr { name: String, value: Vec<u8> },
}

fn element() -> impl Strategy<Value = Element> {
    let len = prop_oneof![0..20usize, 4090..4100usize, 0..70_000usize];
    prop_oneof![
        Just(Element::Directory),
        (0..4u8, len).prop_map(|(seed, len)| Element::File { seed, len }),
        (1..4095usize).prop_map(Element::Symlink),
        Just(Element::Fifo),
        Just(Element::HardLink),
        ("[a-z]{1,200}", prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(name, value)| Element::Xattr { name, value }),
    ]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    // Every byte but NUL and the separator. Not by a filter: in thousands of cases it would refuse more than is allowed.
    let byte = (1..=254u8).prop_map(|byte| if byte < b'/' { byte } else { byte + 1 });
    let len = prop_oneof![1..10usize, 200..255usize];
    len.prop_flat_map(move |len| prop::collection::vec(byte.clone(), len))
        .prop_filter("names of the system", |name| name != b"." && name != b"..")
}

/// Makes `elements` below `root`, each in one of the directories made before; what exists already is left out.
fn grow(root: &Path, elements: &[(Element, Vec<u8>, prop::sample::Index)]) {
    let mut directories = vec![root.to_path_buf()];
    let mut others: Vec<std::path::PathBuf> = Vec::new();
    for (element, name, place) in elements {
        let path = place.get(&directories).join(std::ffi::OsStr::from_bytes(name));
        if path.symlink_metadata().is_ok() {
            continue;
        }
        match element {
            Element::Directory => {
                std::fs::create_dir(&path).unwrap();
                directories.push(path);
                continue;
            }
            Element::File { seed, len } => std::fs::write(&path, make::noise(&seed.to_string(), *len)).unwrap(),
            Element::Symlink(len) => std::os::unix::fs::symlink("s".repeat(*len), &path).unwrap(),
            Element::Fifo => {
                let mode = rustix::fs::Mode::from_raw_mode(0o640);
                rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
            }
            Element::HardLink if others.is_empty() => continue,
            Element::HardLink => std::fs::hard_link(place.get(&others), &path).unwrap(),
            Element::Xattr { name, value } => {
                let attribute = format!("user.{name}");
                let on = place.get(&directories);
                // A file system may hold less in one inode than this tree asks for.
                let _ = rustix::fs::setxattr(on, attribute, value, rustix::fs::XattrFlags::empty());
                continue;
            }
        }
        assert_eq!(path.symlink_metadata().unwrap().nlink() > 1, matches!(element, Element::HardLink));
        others.push(path);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_small_tree_is_read_back_equal(
        elements in prop::collection::vec((element(), name(), any::<prop::sample::Index>()), 0..60),
        chunk_shift in 12..17u32,
        compressor in prop::sample::select(vec![Compressor::None, Compressor::Lz4Block, Compressor::Zstd]),
    ) {
        let scratch = tempfile::tempdir().unwrap();
        let source = scratch.path().join("source");
        std::fs::create_dir(&source).unwrap();
        grow(&source, &elements);
        let out = scratch.path().join("out");
        let image = make::image(&source, &out, compressor, Digester::Blake3, 1 << chunk_shift);
        assert_shows(&image, &source);
    }
}
