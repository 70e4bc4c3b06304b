//! The reader against images made by upstream's tools, path by path.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use sha2::Digest as _;
use smallvec::SmallVec;

use super::RafsError;
use super::detect::Content;
use super::detect::detect;
use super::facts::ChunkFacts;
use super::facts::Coding;
use super::facts::Compressor;
use super::facts::Digester;
use super::facts::MetaHolder;
use super::facts::Piece;
use super::facts::feature;
use super::image::Image;
use super::image::OpenOptions;
use super::inode::InodeFacts;
use super::inode::Kind;
use super::meta;
use super::meta::BlobMeta;
use super::seek::Whence;
use super::version::Version;
use crate::sys::view::View;
use crate::testing::manifest;
use crate::testing::manifest::Entry;

fn map(path: &Path) -> View {
    let file = std::fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    View::map_file(file.as_fd(), file.metadata().unwrap().len()).unwrap()
}

/// The plain bootstrap of a reference image, and the id of the blob it was inlined in.
pub(super) fn bootstrap(folder: &Path) -> (View, Option<String>) {
    let plain = folder.join("bootstrap");
    if plain.exists() {
        let view = map(&plain);
        assert!(matches!(detect(&view).unwrap(), Content::Bootstrap(_)), "{}", folder.display());
        return (view, None);
    }
    // ZRan keeps the layer there too: the blob with the metadata is the one that has some.
    let blobs = std::fs::read_dir(folder.join("blobs")).unwrap().map(|blob| blob.unwrap());
    let found = blobs.filter_map(|blob| {
        let view = map(&blob.path());
        match detect(&view).unwrap() {
            Content::Inside(section) => Some((blob.file_name().into_string().unwrap(), view, section)),
            _ => None,
        }
    });
    let found: Vec<_> = found.collect();
    let [(id, view, section)] = found.as_slice() else { panic!("{}: no inlined metadata", folder.display()) };
    let stored = view.vec_at(section.offset, section.compressed_bytes).unwrap();
    let content = match section.compressor {
        Compressor::Zstd => zstd::bulk::decompress(&stored, section.uncompressed_bytes as usize).unwrap(),
        _ => stored,
    };
    assert_eq!(content.len() as u64, section.uncompressed_bytes);
    if let Some(expected) = section.sha256 {
        assert_eq!(<[u8; 32]>::from(sha2::Sha256::digest(&content)), expected);
    }
    (View::from_bytes(content), Some(id.clone()))
}

fn open(folder: &Path) -> Result<Image, RafsError> {
    let (view, placeholder_id) = bootstrap(folder);
    Image::open(view, &OpenOptions { placeholder_id })
}

/// Every path below `dir`, `dir` included, by listing.
fn list(image: &Image, path: &[u8], dir: &InodeFacts, parent: u32, found: &mut BTreeMap<Vec<u8>, u32>) {
    let mut entries = image.entries(dir, 0).unwrap();
    let mut rows: Vec<(Vec<u8>, u32, u8, u64)> = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.unwrap();
        assert_ne!(entry.next, 0);
        rows.push((entry.name.to_vec(), entry.ino, entry.kind, entry.next));
    }
    for (number, (name, ino, kind, next)) in rows.iter().enumerate() {
        let mut rest = image.entries(dir, *next).unwrap();
        match rows.get(number + 1) {
            Some(following) => {
                let entry = rest.next().unwrap().unwrap();
                assert_eq!(
                    (entry.name, entry.ino, entry.kind, entry.next),
                    (following.0.as_slice(), following.1, following.2, following.3)
                );
            }
            None => assert!(rest.next().is_none()),
        }
        assert_eq!(image.lookup(dir, name).unwrap(), Some(*ino), "{}", String::from_utf8_lossy(name));
        let mut longer = name.clone();
        longer.push(b'!');
        assert_eq!(image.lookup(dir, &longer).unwrap(), None);
        match name.as_slice() {
            b"." => assert_eq!((*ino, *kind), (dir.ino, 4)),
            b".." => assert_eq!((*ino, *kind), (parent, 4)),
            name => {
                let child = image.inode(*ino).unwrap();
                assert_eq!(child.kind.dirent_type(), *kind);
                let mut child_path = path.to_vec();
                child_path.push(b'/');
                child_path.extend_from_slice(name);
                found.insert(child_path.clone(), *ino);
                if child.kind == Kind::Directory {
                    list(image, &child_path, &child, dir.ino, found);
                }
            }
        }
    }
    for name in [&b"."[..], b".."] {
        assert_eq!(rows.iter().filter(|row| row.0 == name).count(), 1);
    }
    assert_eq!(image.lookup(dir, b"no such name").unwrap(), None);
    assert_eq!(image.lookup(dir, b"").unwrap(), None);
    assert_eq!(image.lookup(dir, &[0xff; 255]).unwrap(), None);
}

fn kind_of(letter: u8) -> Kind {
    match letter {
        b'f' => Kind::Regular,
        b'd' => Kind::Directory,
        b'l' => Kind::Symlink,
        b'c' => Kind::CharDevice,
        b'b' => Kind::BlockDevice,
        b'p' => Kind::Fifo,
        b's' => Kind::Socket,
        other => panic!("kind {other}"),
    }
}

fn compare(image: &Image, ino: u32, entry: &Entry, name: &str) {
    let name = format!("{name}: {}", String::from_utf8_lossy(&entry.path));
    let facts = image.inode(ino).unwrap();
    assert_eq!(facts.ino, ino, "{name}");
    assert_eq!(facts.kind, kind_of(entry.kind), "{name}");
    assert_eq!(facts.mode & 0o7777, entry.mode, "{name}");
    assert_eq!((facts.uid, facts.gid, facts.nlink), (entry.uid, entry.gid, entry.nlink), "{name}");
    if let Some(size) = entry.size {
        assert_eq!(facts.size, size, "{name}");
    }
    if let Some(mtime) = entry.mtime {
        assert_eq!((facts.mtime, facts.mtime_ns), mtime, "{name}");
    }
    let rdev = entry.rdev.map_or(0, |(major, minor)| minor & 0xff | major << 8 | (minor & !0xff) << 12);
    assert_eq!(facts.rdev, rdev, "{name}");
    match &entry.target {
        Some(target) => assert_eq!(image.symlink(&facts).unwrap(), *target, "{name}"),
        None => assert!(matches!(image.symlink(&facts), Err(RafsError::NotSymlink)), "{name}"),
    }
    let mut names: Vec<Vec<u8>> = Vec::new();
    for xattr in image.xattr_names(&facts).unwrap().split_inclusive(|&byte| byte == 0) {
        names.push(xattr[..xattr.len() - 1].to_vec());
    }
    names.sort();
    assert_eq!(names, entry.xattrs.keys().cloned().collect::<Vec<_>>(), "{name}");
    for (xattr, value) in &entry.xattrs {
        assert_eq!(image.xattr(&facts, xattr).unwrap().as_ref(), Some(value), "{name}");
    }
    assert_eq!(image.xattr(&facts, b"user.none").unwrap(), None, "{name}");
    match facts.kind {
        Kind::Regular => compare_plan(image, &facts, &name),
        _ => {
            let outcome = image.plan(&facts, 0..1, &mut SmallVec::new());
            assert!(matches!(outcome, Err(RafsError::NotRegular)), "{name}");
        }
    }
}

/// The pieces of a file cover it without gaps, and agree with what the index says of their chunks.
fn compare_plan(image: &Image, facts: &InodeFacts, name: &str) {
    let mut whole: SmallVec<[Piece; 8]> = SmallVec::new();
    image.plan(facts, 0..u64::MAX, &mut whole).unwrap();
    assert_eq!(whole.iter().map(|piece| u64::from(piece.len)).sum::<u64>(), facts.size, "{name}");
    let index = image.chunk_index().unwrap();
    for piece in &whole {
        let digest = index.digest(piece.blob, piece.chunk).unwrap();
        let is_tar = image.blobs()[piece.blob as usize].features & feature::TARFS != 0;
        assert_eq!(digest.is_some(), !is_tar, "{name}: digest of blob {} chunk {}", piece.blob, piece.chunk);
        let chunk = index.chunk(piece.blob, piece.chunk).unwrap();
        assert_eq!(chunk.is_some(), is_tar || image.version() == Version::V5);
        if let (Some(chunk), true) = (chunk, is_tar) {
            let end = chunk.uncompressed_offset + u64::from(chunk.uncompressed_bytes);
            assert!(chunk.uncompressed_offset <= piece.offset && piece.offset + u64::from(piece.len) <= end, "{name}");
            assert_eq!(index.seal(piece.blob, piece.chunk).unwrap(), None, "{name}");
            continue;
        }
        if let Some(chunk) = chunk {
            assert_eq!((chunk.uncompressed_offset, chunk.uncompressed_bytes), (piece.offset, piece.len), "{name}");
            assert_eq!(chunk.digest, digest);
        }
    }
    let middle = facts.size / 2;
    let mut part: SmallVec<[Piece; 8]> = SmallVec::new();
    image.plan(facts, middle..facts.size + 7, &mut part).unwrap();
    assert_eq!(part.iter().map(|piece| u64::from(piece.len)).sum::<u64>(), facts.size - middle, "{name}");
    let mut none: SmallVec<[Piece; 8]> = SmallVec::new();
    image.plan(facts, facts.size..facts.size + 1, &mut none).unwrap();
    assert!(none.is_empty(), "{name}");
    assert_eq!(image.seek(facts, facts.size, Whence::Data).unwrap(), None, "{name}");
}

#[test]
fn every_path_of_the_reference_images_matches_its_manifest() {
    let Some(images) = manifest::reference_images() else { return };
    for name in manifest::REFERENCES {
        let folder = images.join(name);
        let image = open(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(image.version(), if name.starts_with("v5") { Version::V5 } else { Version::V6 }, "{name}");
        assert_eq!(image.has_owner_ids(), name != "v6-repeatable", "{name}");
        let root = image.inode(image.root()).unwrap();
        let mut found = BTreeMap::from([(b"/".to_vec(), image.root())]);
        list(&image, b"", &root, image.root(), &mut found);
        let entries = manifest::read(&folder);
        let expected: Vec<&[u8]> = entries.iter().map(|entry| entry.path.as_slice()).collect();
        assert_eq!(found.keys().map(Vec::as_slice).collect::<Vec<_>>(), {
            let mut sorted = expected.clone();
            sorted.sort();
            sorted
        });
        let mut names_of: BTreeMap<u32, u32> = BTreeMap::new();
        for entry in &entries {
            compare(&image, found[&entry.path], entry, name);
            *names_of.entry(found[&entry.path]).or_default() += 1;
        }
        for entry in entries.iter().filter(|entry| entry.kind != b'd') {
            assert_eq!(names_of[&found[&entry.path]], entry.nlink, "{name}: names of {:?}", entry.path);
        }
        image.verify_tree().unwrap_or_else(|error| panic!("{name}: {error}"));
        let totals = image.totals();
        assert!(totals.inodes > 0 && totals.inodes <= entries.len() as u64, "{name}: {totals:?}");
    }
}

#[test]
fn files_of_a_tarfs_image_are_ranges_of_the_tar() {
    let Some(images) = manifest::reference_images() else { return };
    let folder = images.join("v6-tarfs");
    let image = open(&folder).unwrap();
    let blob = &image.blobs()[0];
    assert_eq!((blob.features & feature::TARFS, &blob.meta, blob.chunk_count), (feature::TARFS, &None, 1));
    assert_eq!((blob.data_bytes, blob.uncompressed_bytes), (522_240, 522_240));
    let tar = map(&folder.join("blobs").join(&blob.id));
    let mut files = 0;
    for entry in manifest::read(&folder) {
        let Some(expected) = entry.sha256 else { continue };
        let names = entry.path.split(|&byte| byte == b'/').filter(|name| !name.is_empty());
        let ino =
            names.fold(image.root(), |dir, name| image.lookup(&image.inode(dir).unwrap(), name).unwrap().unwrap());
        let facts = image.inode(ino).unwrap();
        let mut pieces: SmallVec<[Piece; 8]> = SmallVec::new();
        image.plan(&facts, 0..facts.size, &mut pieces).unwrap();
        let mut hasher = sha2::Sha256::new();
        for piece in pieces {
            hasher.update(tar.vec_at(piece.offset, piece.len.into()).unwrap());
        }
        assert_eq!(<[u8; 32]>::from(hasher.finalize()), expected, "{}", String::from_utf8_lossy(&entry.path));
        // Nothing tells of zeros without reading them.
        if facts.size > 0 {
            assert_eq!(image.seek(&facts, 0, Whence::Hole).unwrap(), Some(facts.size));
            files += 1;
        }
    }
    assert!(files > 100, "{files} files");
}

#[test]
fn inlined_metadata_without_the_blob_id_is_refused() {
    let Some(images) = manifest::reference_images() else { return };
    for name in ["v5-inline", "v6-inline", "v6-inline-toc"] {
        let (view, id) = bootstrap(&images.join(name));
        let outcome = Image::open(view.clone(), &OpenOptions { placeholder_id: None }).err();
        assert!(matches!(outcome, Some(RafsError::PlaceholderBlobId { index: 0 })), "{name}: {outcome:?}");
        let image = Image::open(view, &OpenOptions { placeholder_id: id.clone() }).unwrap();
        assert_eq!(image.blobs()[0].id, id.unwrap(), "{name}");
    }
}

#[test]
fn prefetch_tables_lead_to_the_paths_they_were_made_for() {
    let Some(images) = manifest::reference_images() else { return };
    for name in manifest::REFERENCES {
        let image = open(&images.join(name)).unwrap();
        let prefetch = image.prefetch().unwrap();
        assert_eq!(prefetch.len(), if name.ends_with("prefetch-fs") { 3 } else { 0 }, "{name}");
        for ino in prefetch {
            image.inode(ino).unwrap();
        }
        assert_eq!(image.blobs()[0].prefetch_bytes, if name == "v5-prefetch-blob" { 44198 } else { 0 }, "{name}");
    }
}

#[test]
fn blob_meta_left_by_upstream_agrees_with_the_bootstrap() {
    let Some(images) = manifest::reference_images() else { return };
    for (name, cache) in [("v6-lz4-blake3", "cache-partial"), ("v6-zstd-4k", "cache")] {
        let folder = images.join(name);
        let image = open(&folder).unwrap();
        let blob = &image.blobs()[0];
        let view = map(&folder.join(cache).join(format!("{}.blob.meta", blob.id)));
        assert_eq!(view.len(), meta::cache_bytes(blob).unwrap());
        let opened = BlobMeta::open(view.clone(), blob).unwrap();
        assert_eq!(opened.count(), blob.chunk_count);
        assert_eq!(blob.features & feature::CHUNK_INFO_V2, 0);

        // The header in the blob is the same, behind the compressed array.
        let stored = meta::stored_range(blob).unwrap();
        let blob_file = map(&folder.join("blobs").join(&blob.id));
        assert_eq!(blob_file.len(), stored.end);
        let header = blob_file.vec_at(stored.end - meta::META_HEADER_BYTES, meta::META_HEADER_BYTES).unwrap();
        meta::check_header(&header, blob).unwrap();

        // Each piece of each file lies where the array says, and the bytes there have the digest of the bootstrap.
        let data = map(&folder.join(cache).join(format!("{}.blob.data", blob.id)));
        let index = image.chunk_index().unwrap();
        assert!(!index.is_empty() && index.len() <= blob.chunk_count as usize);
        for chunk in 0..blob.chunk_count {
            let facts = opened.chunk(chunk).unwrap();
            let Some(digest) = index.digest(0, chunk).unwrap() else { continue };
            let bytes = data.vec_at(facts.uncompressed_offset, facts.uncompressed_bytes.into()).unwrap();
            if cache == "cache" {
                assert_eq!(*blake3::hash(&bytes).as_bytes(), digest, "{name} chunk {chunk}");
            }
        }
    }
}

/// The table of blob 0, decoded from the file that holds it; the blob must not be encrypted.
fn table(folder: &Path, image: &Image, holder: &str) -> BlobMeta {
    let blob = &image.blobs()[0];
    let location = blob.meta.as_ref().unwrap();
    let file = map(&folder.join("blobs").join(holder));
    let range = meta::stored_range(blob).unwrap();
    let stored = file.vec_at(range.start, location.compressed_bytes).unwrap();
    assert_eq!(location.compressor, Compressor::Zstd);
    let mut content = zstd::bulk::decompress(&stored, location.uncompressed_bytes as usize).unwrap();
    content.resize(content.len().next_multiple_of(4096), 0);
    content.extend(file.vec_at(range.start + location.compressed_bytes, meta::META_HEADER_BYTES).unwrap());
    BlobMeta::open(View::from_bytes(content), blob).unwrap()
}

/// Every chunk is where the bootstrap seals it, and has the digest sealed; `plain_of` decodes a unit of several chunks.
fn compare_chunks(image: &Image, table: &BlobMeta, mut plain_of: impl FnMut(&ChunkFacts) -> (Vec<u8>, u32)) {
    let blob = &image.blobs()[0];
    let index = image.chunk_index().unwrap();
    assert_eq!((index.len(), table.count()), (blob.chunk_count as usize, blob.chunk_count));
    for chunk in 0..blob.chunk_count {
        let facts = table.chunk(chunk).unwrap();
        let seal = index.seal(0, chunk).unwrap().unwrap();
        assert_eq!(
            (facts.uncompressed_offset, facts.uncompressed_bytes),
            (seal.uncompressed_offset, seal.uncompressed_bytes)
        );
        assert_eq!(index.chunk(0, chunk).unwrap(), None);
        let (unit, offset) = plain_of(&facts);
        let plain = &unit[offset as usize..][..facts.uncompressed_bytes as usize];
        let digest = match blob.digester {
            Digester::Blake3 => *blake3::hash(plain).as_bytes(),
            Digester::Sha256 => sha2::Sha256::digest(plain).into(),
        };
        assert_eq!(digest, seal.digest, "chunk {chunk}");
        if let Some(crc) = facts.crc32c {
            assert_eq!(crc32c::crc32c(plain), crc, "chunk {chunk}");
        }
    }
}

#[test]
fn batches_decode_to_their_chunks() {
    let Some(images) = manifest::reference_images() else { return };
    let folder = images.join("v6-batch");
    let image = open(&folder).unwrap();
    let blob = &image.blobs()[0];
    assert_eq!(blob.meta.as_ref().unwrap().holder, MetaHolder::Blob);
    let data = map(&folder.join("blobs").join(&blob.id));
    let mut batched = 0;
    compare_chunks(&image, &table(&folder, &image, &blob.id), |facts| {
        let stored = data.vec_at(facts.compressed_offset, facts.compressed_bytes.into()).unwrap();
        let inflate = |bytes: u32| zstd::bulk::decompress(&stored, bytes as usize).unwrap();
        match facts.coding {
            Coding::Plain => (stored, 0),
            Coding::Compressed => (inflate(facts.uncompressed_bytes), 0),
            Coding::Batch { plain_bytes, offset } => {
                batched += 1;
                (if facts.compressed_bytes == plain_bytes { stored } else { inflate(plain_bytes) }, offset)
            }
            Coding::Zran { .. } => panic!("{facts:?}"),
        }
    });
    assert!(batched > 50, "{batched} chunks are batched");
}

#[test]
fn zran_tables_are_found_and_their_chunks_lie_in_the_contexts() {
    let Some(images) = manifest::reference_images() else { return };
    let holder = "ce64920f98fabc66f5a727d2d2a00ea39d7f5ce86515915926a4dbcb441b637a";
    let inlined = "7a4717eaac73be65f2e3e3a5b6217c9383ae28e2e0c967197f0db80c3ead5507";
    for (name, holder, file) in [
        ("v6-zran", MetaHolder::Other(holder.to_owned()), holder),
        ("v6-zran-inline-toc", MetaHolder::Bootstrap, inlined),
    ] {
        let folder = images.join(name);
        let image = open(&folder).unwrap();
        let blob = &image.blobs()[0];
        assert_eq!(blob.meta.as_ref().unwrap().holder, holder, "{name}");
        assert_eq!((blob.compressed_bytes, blob.data_bytes, blob.chunk_count), (71_886, 71_886, 104), "{name}");
        let layer = map(&folder.join("blobs").join(&blob.id));
        let table = table(&folder, &image, file);
        let tar = {
            let mut tar = Vec::new();
            let mut gzip =
                flate2::bufread::MultiGzDecoder::new(std::io::Cursor::new(layer.vec_at(0, layer.len()).unwrap()));
            std::io::Read::read_to_end(&mut gzip, &mut tar).unwrap();
            tar
        };
        // The contexts follow one another, so the first of them tells where all of them are in the tar.
        let mut starts = BTreeMap::new();
        let mut start = 0;
        for number in 0..u32::MAX {
            let Ok(context) = table.zran(number) else { break };
            starts.insert(number, (start, context.plain_bytes));
            start += context.plain_bytes as usize;
        }
        assert!(!starts.is_empty(), "{name}");
        compare_chunks(&image, &table, |facts| match facts.coding {
            Coding::Zran { context, offset } => {
                let (start, bytes) = starts[&context];
                (tar[start..(start + bytes as usize).min(tar.len())].to_vec(), offset)
            }
            _ => panic!("{facts:?}"),
        });
    }
}

#[test]
fn v5_image_without_extended_blob_table_is_the_same_but_for_what_no_file_needs() {
    let Some(images) = manifest::reference_images() else { return };
    for name in ["v5-lz4-blake3", "v5-two-layers", "v5-zstd-sha256-4k"] {
        let folder = images.join(name);
        let whole = open(&folder).unwrap();
        let mut bytes = std::fs::read(folder.join("bootstrap")).unwrap();
        bytes[68..80].fill(0);
        let image = Image::open(View::from_bytes(bytes), &OpenOptions { placeholder_id: None }).unwrap();
        for (blob, stated) in image.blobs().iter().zip(whole.blobs()) {
            assert_eq!(blob.id, stated.id, "{name}");
            assert!(0 < blob.chunk_count && blob.chunk_count <= stated.chunk_count, "{name}: {blob:?}");
            assert!(0 < blob.data_bytes && blob.data_bytes <= stated.data_bytes, "{name}: {blob:?}");
            assert!(blob.uncompressed_bytes <= stated.uncompressed_bytes, "{name}: {blob:?}");
        }
        if name == "v5-lz4-blake3" {
            let (blob, stated) = (&image.blobs()[0], &whole.blobs()[0]);
            assert_eq!(
                (blob.chunk_count, blob.data_bytes, blob.uncompressed_bytes),
                (stated.chunk_count, stated.data_bytes, stated.uncompressed_bytes)
            );
        }
        let paths: Vec<_> = manifest::read(&folder);
        let root = image.inode(image.root()).unwrap();
        let mut found = BTreeMap::from([(b"/".to_vec(), image.root())]);
        list(&image, b"", &root, image.root(), &mut found);
        for entry in &paths {
            compare(&image, found[&entry.path], entry, name);
        }
        image.verify_tree().unwrap();
        super::check::walk(&image).unwrap();
        // Numbers may differ, what they stand for may not.
        let (index, stated) = (image.chunk_index().unwrap(), whole.chunk_index().unwrap());
        assert_eq!(index.len(), stated.len());
        for ino in found.into_values() {
            let facts = image.inode(ino).unwrap();
            if facts.kind != Kind::Regular {
                continue;
            }
            let (mut pieces, mut expected): (SmallVec<[Piece; 8]>, SmallVec<[Piece; 8]>) = Default::default();
            image.plan(&facts, 0..facts.size, &mut pieces).unwrap();
            whole.plan(&whole.inode(ino).unwrap(), 0..facts.size, &mut expected).unwrap();
            assert_eq!(pieces.len(), expected.len());
            for (piece, expected) in pieces.iter().zip(&expected) {
                assert_eq!((piece.blob, piece.offset, piece.len), (expected.blob, expected.offset, expected.len));
                assert_eq!(
                    index.chunk(piece.blob, piece.chunk).unwrap(),
                    stated.chunk(expected.blob, expected.chunk).unwrap()
                );
            }
        }
    }
}

#[test]
fn key_of_an_encrypted_blob_is_read_and_not_shown() {
    let Some(images) = manifest::reference_images() else { return };
    let folder = images.join("v6-encrypted");
    let image = open(&folder).unwrap();
    let cipher = image.blobs()[0].cipher.as_ref().unwrap();
    let bootstrap = std::fs::read(folder.join("bootstrap")).unwrap();
    assert_eq!((&bootstrap[4096 + 168..][..32], &bootstrap[4096 + 200..][..16]), (&cipher.key[..], &cipher.iv[..]));
    let shown = format!("{image:?}");
    assert!(!shown.contains(&format!("{:?}", &cipher.key[..4]).replace(['[', ']'], "")), "{shown}");
    assert!(!shown.contains(&hex::encode(cipher.key)));
}

#[test]
fn chunk_facts_of_v5_find_the_stored_bytes() {
    let Some(images) = manifest::reference_images() else { return };
    let folder = images.join("v5-none-aligned");
    let image = open(&folder).unwrap();
    let blob = &image.blobs()[0];
    let stored = map(&folder.join("blobs").join(&blob.id));
    assert_eq!(stored.len(), blob.data_bytes);
    let index = image.chunk_index().unwrap();
    assert_eq!(index.len(), blob.chunk_count as usize);
    for chunk in 0..blob.chunk_count {
        let facts = index.chunk(0, chunk).unwrap().unwrap();
        let bytes = stored.vec_at(facts.compressed_offset, facts.compressed_bytes.into()).unwrap();
        assert_eq!(Some(*blake3::hash(&bytes).as_bytes()), facts.digest, "chunk {chunk}");
        if let Some(crc) = facts.crc32c {
            assert_eq!(crc32c::crc32c(&bytes), crc, "chunk {chunk}");
        }
    }
}

#[test]
fn walk_finds_no_fault_in_the_reference_images() {
    let Some(images) = manifest::reference_images() else { return };
    for name in manifest::REFERENCES {
        let image = open(&images.join(name)).unwrap();
        let seen = super::check::walk(&image).unwrap_or_else(|error| panic!("{name}: {error}"));
        let entries = manifest::read(&images.join(name));
        assert_eq!(seen.paths, entries.len() as u64, "{name}");
    }
}
