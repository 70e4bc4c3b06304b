//! Damaged metadata of v6 (format, section 4).

use super::Case;
use super::Corpus;
use super::Specimen;
use super::resolve;

pub(super) const SUPERBLOCK: usize = 1024;
pub(super) const EXTENDED: usize = 1152;
pub(super) const DEVICES: usize = 1408;
/// What the builder's inodes have before their xattrs.
const INODE_BYTES: usize = 64;

const ANY_TABLE: &[&str] = &["device table", "blob table", "blob table size", "superblock and device table"];

/// Every case.
pub fn cases() -> Vec<Case> {
    let mut corpus = Corpus::new(Specimen::v6());
    superblock(&mut corpus);
    tables(&mut corpus);
    blob_table(&mut corpus);
    inodes(&mut corpus);
    links_and_attributes(&mut corpus);
    directories(&mut corpus);
    trees(&mut corpus);
    chunks(&mut corpus);
    cuts(&mut corpus);
    for case in &mut corpus.cases {
        case.name.insert_str(0, "v6: ");
    }
    corpus.cases
}

pub(super) fn blob_table_at(good: &Specimen) -> usize {
    good.u64_at(EXTENDED + 8) as usize
}

fn superblock(corpus: &mut Corpus) {
    let sb = SUPERBLOCK;
    corpus.add("magic", sb, &[0], &["wrong magic number"], "");
    corpus.add("checksum", sb + 4, &[1], &["checksum"], "");
    corpus.add("not RAFS", sb + 11, &[0], &["wrong magic number"], "");
    corpus.add("compatible features", sb + 8, &[1], &["feature_compat"], "");
    corpus.add("block size", sb + 12, &[13], &["block size bits"], "");
    corpus.add("extension slots", sb + 13, &[1], &["extension slots"], "");
    corpus.add("root is nid 0", sb + 14, &[0, 0], &["nid"], "");
    corpus.add("root is outside", sb + 14, &[0xff, 0xff], &["metadata", "inode mode", "inode format"], "");
    corpus.add("no inodes", sb + 16, &[0; 8], &["inode count"], "");
    corpus.add("too many inodes", sb + 16, &[0xff; 8], &["inode count"], "");
    corpus.add("inodes outside", sb + 40, &[0xff; 4], &["metadata"], "");
    corpus.add("inodes in the superblock", sb + 40, &[0; 4], &["metadata", "inode mode", "inode format"], "");
    corpus.add("shared xattrs", sb + 44, &[1], &["xattr_blkaddr"], "");
    corpus.add("incompatible feature", sb + 83, &[0x80], &["feature_incompat"], "");
    corpus.add("union", sb + 84, &[1], &["union"], "");
    for devices in [0u16, 2, 254, 255, u16::MAX] {
        corpus.add(&format!("{devices} devices"), sb + 86, &devices.to_le_bytes(), ANY_TABLE, "");
    }
    corpus.add("device table slot", sb + 88, &[12], &["device table slot"], "");
    let flags = corpus.good.u64_at(EXTENDED);
    corpus.add("unknown flag", EXTENDED, &(flags | 1 << 40).to_le_bytes(), &["superblock flags"], "");
    corpus.add("two compressors", EXTENDED, &(flags | 3).to_le_bytes(), &["superblock flags"], "");
    corpus.add("two digests", EXTENDED, &(flags | 12).to_le_bytes(), &["superblock flags"], "");
}

fn tables(corpus: &mut Corpus) {
    let len = corpus.good.bootstrap.len() as u64;
    let blob_table = blob_table_at(&corpus.good) as u64;
    let end = u64::MAX - 255;
    for (name, at) in
        [("zero", 0), ("the device table", 1408), ("the end", len), ("the last byte", len - 1), ("the maximum", end)]
    {
        corpus.add(&format!("blob table at {name}"), EXTENDED + 8, &u64::to_le_bytes(at), ANY_TABLE, "");
    }
    for bytes in [0u32, 255, 512, 0xffff_ff00] {
        corpus.add(&format!("{bytes} bytes of blob table"), EXTENDED + 16, &bytes.to_le_bytes(), ANY_TABLE, "");
    }
    for bytes in [0u32, 4095, 2048, 1 << 25, u32::MAX] {
        corpus.add(&format!("chunk size {bytes}"), EXTENDED + 20, &bytes.to_le_bytes(), &["chunk size"], "");
    }
    corpus.add("another chunk size", EXTENDED + 20, &8192u32.to_le_bytes(), &["blob chunk size"], "");
    let chunk_tables = &["chunk table", "blob table"];
    for at in [blob_table, len, u64::MAX] {
        corpus.add(&format!("chunk table at {at:#x}"), EXTENDED + 24, &at.to_le_bytes(), chunk_tables, "");
    }
    for bytes in [79u64, 80 << 40, u64::MAX - 15] {
        corpus.add(&format!("{bytes} bytes of chunk table"), EXTENDED + 32, &bytes.to_le_bytes(), &["chunk table"], "");
    }
    for (at, bytes) in [(blob_table, 4u32), (len, 4), (u64::MAX, 4), (2048, u32::MAX - 3), (2048, 4), (2048, 3)] {
        let row = [&at.to_le_bytes()[..], &bytes.to_le_bytes()].concat();
        let fields = &["prefetch table", "blob table"];
        corpus.add(&format!("{bytes} bytes of prefetch table at {at:#x}"), EXTENDED + 40, &row, fields, "");
    }
    corpus.add("another device id", DEVICES, b"!", &["device id"], "");
    for blocks in [0u32, 1, u32::MAX] {
        corpus.add(&format!("{blocks} device blocks"), DEVICES + 64, &blocks.to_le_bytes(), &["device blocks"], "");
    }
}

fn blob_table(corpus: &mut Corpus) {
    let at = blob_table_at(&corpus.good);
    for id in ["", "../../etc/passwd", "a/b", ".hidden", "a b", "a\u{1b}[2J"] {
        let mut bytes = [0; 64];
        bytes[..id.len()].copy_from_slice(id.as_bytes());
        let specimen = corpus.good.patched(at, &bytes).patched(DEVICES, &bytes);
        corpus.add_specimen(&format!("blob id {id:?}"), specimen, &["blob id"], "");
    }
    let placeholder = corpus.good.patched(at, &[b'x'; 64]).patched(DEVICES, &[b'x'; 64]);
    corpus.add_specimen("placeholder id", placeholder, &["blob file"], "");
    let features = corpus.good.u32_at(at + 84);
    let ci_bytes = corpus.good.u64_at(at + 128);
    let rows: [(&str, usize, u64, usize, &'static [&'static str]); 19] = [
        ("index", 64, 7, 4, &["blob index"]),
        ("chunk size", 68, 8192, 4, &["blob chunk size"]),
        ("no chunks", 72, 0, 4, &["CI uncompressed size"]),
        ("most chunks", 72, (1 << 24) - 1, 4, &["CI uncompressed size"]),
        ("too many chunks", 72, 1 << 24, 4, &["blob chunk count", "CI uncompressed size"]),
        ("compressor", 76, 9, 4, &["blob compression"]),
        ("digester", 80, 9, 4, &["blob digest algorithm"]),
        ("unknown feature", 84, u64::from(features | 0x2000), 4, &["blob features"]),
        ("not aligned", 84, u64::from(features & !1), 4, &["blob features"]),
        ("batches without their entries", 84, u64::from(features | 0x80), 4, &["blob features"]),
        ("file too large", 88, 1 << 41, 8, &["blob compressed size"]),
        ("blob too large", 96, (1 << 44) + 4096, 8, &["blob uncompressed size"]),
        ("blob of odd size", 96, 4097, 8, &["blob features", "device blocks", "blob uncompressed size"]),
        ("blob of another size", 96, 4096, 8, &["device blocks"]),
        ("CI compressor", 108, 9, 4, &["CI compression"]),
        ("CI outside", 112, 1 << 41, 8, &["CI offset"]),
        ("CI at the maximum", 112, u64::MAX, 8, &["CI offset"]),
        ("CI grows", 120, ci_bytes + 1, 8, &["CI compressed size"]),
        ("CI of another size", 128, ci_bytes + 16, 8, &["CI uncompressed size"]),
    ];
    for (name, offset, value, bytes, fields) in rows {
        corpus.add(&format!("blob: {name}"), at + offset, &value.to_le_bytes()[..bytes], fields, "");
    }
}

/// Where the inode of `path` is.
fn inode(corpus: &Corpus, path: &str) -> usize {
    let nid = resolve(&corpus.image, path).ino as usize;
    corpus.good.u32_at(SUPERBLOCK + 40) as usize * 4096 + nid * 32
}

/// Where what follows the inode of `path` and its xattrs is.
fn body(corpus: &Corpus, path: &str) -> usize {
    let at = inode(corpus, path);
    let xattrs = u16::from_le_bytes([corpus.good.bootstrap[at + 2], corpus.good.bootstrap[at + 3]]) as usize;
    let xattr_bytes = if xattrs == 0 { 0 } else { 12 + (xattrs - 1) * 4 };
    (at + INODE_BYTES + xattr_bytes).next_multiple_of(if resolve(&corpus.image, path).mode & 0o170000 == 0o100000 {
        8
    } else {
        1
    })
}

fn inodes(corpus: &mut Corpus) {
    let at = inode(corpus, "/dir/c");
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 12] = [
        ("unknown layout", 0, &[7], &["inode format"]),
        ("unknown format bit", 0, &[0x19], &["inode format"]),
        ("file without chunks", 0, &[1], &["inode format"]),
        ("no type", 4, &[0, 0], &["inode mode"]),
        ("another type", 4, &[0, 0x41], &["inode format", "dirent type"]),
        ("size of the maximum", 8, &[0xff; 8], &["inode size"]),
        ("4 GiB", 8, &[0, 0, 0, 0, 1, 0, 0, 0], &["inode size"]),
        ("chunk format 0", 16, &[0], &["chunk format"]),
        ("unknown chunk format", 17, &[1], &["chunk format"]),
        ("nanoseconds", 40, &[0xff; 4], &["inode nlink or mtime"]),
        ("no links", 44, &[0; 4], &["inode nlink or mtime"]),
        ("too many links", 44, &[0xff; 4], &["inode nlink"]),
    ];
    for (name, offset, bytes, fields) in rows {
        corpus.add(&format!("file: {name}"), at + offset, bytes, fields, "/dir/c");
    }
    let at = body(corpus, "/dir/c");
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 6] = [
        ("in the bootstrap", 2, &[0], &["chunk device number"]),
        ("of no device", 2, &[2], &["chunk device number"]),
        ("of the last device", 2, &[0xff], &["chunk device number"]),
        ("index", 0, &[0xff, 0xff], &["chunk index"]),
        ("address outside", 4, &[0xff; 4], &["chunk address"]),
        ("address of another", 4, &[0, 0, 0, 0], &["chunk address"]),
    ];
    for (name, offset, bytes, fields) in rows {
        corpus.add(&format!("chunk {name}"), at + offset, bytes, fields, "/dir/c");
    }
}

fn links_and_attributes(corpus: &mut Corpus) {
    let (at, target) = (inode(corpus, "/link"), body(corpus, "/link"));
    let size = resolve(&corpus.image, "/link").size as usize;
    for bytes in [0u64, 4096, 1 << 32, u64::MAX] {
        corpus.add(&format!("symlink of {bytes} bytes"), at + 8, &bytes.to_le_bytes(), &["symlink size"], "/link");
    }
    corpus.add("NUL in a symlink", target + size / 2, &[0], &["symlink target"], "/link");
    corpus.add("symlink out of its block", at + 8, &4095u64.to_le_bytes(), &["inline data"], "/link");
    let at = inode(corpus, "/xattr") + INODE_BYTES;
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 6] = [
        ("shared", 4, &[1], &["xattr shared count"]),
        ("without a name", 12, &[0], &["xattr entry"]),
        ("with a long name", 12, &[0xff], &["xattr entry"]),
        ("of an unknown prefix", 13, &[5], &["xattr prefix"]),
        ("with a long value", 14, &[0xff, 0xff], &["xattr entry"]),
        ("with NUL in its name", 16, &[0], &["xattr name"]),
    ];
    for (name, offset, bytes, fields) in rows {
        corpus.add(&format!("xattr {name}"), at + offset, bytes, fields, "/xattr");
    }
    // Both names have two letters.
    let first = corpus.good.bootstrap[at + 16..at + 18].to_vec();
    let second = at + 12 + (4 + 2 + if first == b"aa" { 3 } else { 5usize }).next_multiple_of(4);
    corpus.add("xattr twice", second + 4, &first, &["xattr name"], "/xattr");
    let anything = &["xattr entry", "xattr prefix", "xattr name", "inode size", "metadata", "chunk device number"];
    corpus.add("most xattrs", at - INODE_BYTES + 2, &[0xff, 0xff], anything, "/xattr");
}

/// Where the entry `name` of the directory `path` is, which must be inline, and where its name is.
fn entry(corpus: &Corpus, path: &str, name: &str) -> (usize, usize) {
    let start = body(corpus, path);
    let bytes = &corpus.good.bootstrap;
    let offset =
        |slot: usize| u16::from_le_bytes([bytes[start + slot * 12 + 8], bytes[start + slot * 12 + 9]]) as usize;
    let count = offset(0) / 12;
    let named = |slot: &usize| bytes[start + offset(*slot)..].starts_with(name.as_bytes());
    let length = |slot: &usize| *slot + 1 == count || offset(*slot + 1) - offset(*slot) == name.len();
    let slot = (0..count).find(|slot| named(slot) && length(slot)).unwrap_or_else(|| panic!("no {name} in {path}"));
    (start + slot * 12, start + offset(slot))
}

fn directories(corpus: &mut Corpus) {
    let ((aa, aa_name), (_, c_name)) = (entry(corpus, "/dir", "aa"), entry(corpus, "/dir", "c"));
    let (bb, bb_name) = entry(corpus, "/dir", "bb");
    let (first, _) = entry(corpus, "/dir", ".");
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 18] = [
        ("name with a slash", aa_name + 1, b"/", &["dirent name"]),
        ("name with NUL", aa_name + 1, b"\0", &["dirent name"]),
        ("name ..", aa_name, b"..", &["dirent nid"]),
        ("name .", c_name, b".", &["dirent nid"]),
        ("name twice", bb_name, b"aa", &["name"]),
        ("names out of order", aa_name, b"zz", &["name"]),
        ("no name", aa + 8, &corpus.good.bootstrap[bb + 8..bb + 10].to_vec(), &["dirent name offset"]),
        ("name offset 0", aa + 8, &[0, 0], &["dirent name offset"]),
        ("name offset behind the block", aa + 8, &[0xff, 0xff], &["dirent name offset"]),
        ("no entries", first + 8, &[0, 0], &["dirent name offset"]),
        ("half an entry", first + 8, &[13, 0], &["dirent name offset"]),
        ("entries without end", first + 8, &[0xfc, 0xff], &["dirent name offset"]),
        ("nid 0", aa, &[0; 8], &["dirent nid"]),
        ("nid outside", aa, &[0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0], &["metadata"]),
        ("nid of 64 bits", aa, &[0xff; 8], &["dirent nid"]),
        ("unknown type", aa + 10, &[9], &["dirent type"]),
        ("another type", aa + 10, &[2], &["dirent type"]),
        (". of another", first, &[1], &["dirent nid"]),
    ];
    let rows = rows.map(|(name, at, bytes, fields)| (name, at, bytes.to_vec(), fields));
    for (name, at, bytes, fields) in rows {
        let specimen = corpus.good.patched(at, &bytes);
        let name = format!("directory: {name}");
        // Paths differ: of the directory, or of the name in it.
        corpus.cases.push(Case { name, specimen, fields, path: "/dir", spared: &["/big"] });
    }
    let many = inode(corpus, "/many");
    corpus.add("directory outside", many + 16, &[0xff; 4], &["inode data"], "/many");
    corpus.add("directory without end", many + 8, &[0xff; 8], &["inline data", "inode data"], "/many");
    corpus.add("directory of 2 GiB", many + 8, &(2u64 << 30).to_le_bytes(), &["inline data", "inode data"], "/many");
    corpus.add("directory in the superblock", many + 16, &[0; 4], &["dirent name offset", "inode"], "/many");
    let data = corpus.good.u32_at(many + 16) as usize * 4096;
    corpus.add("second block of a directory", data + 4096 + 8, &[0xff, 0xff], &["dirent name offset"], "/many");
}

fn trees(corpus: &mut Corpus) {
    let nid = |path: &str| u64::from(resolve(&corpus.image, path).ino).to_le_bytes();
    let (root, dir) = (nid("/"), nid("/dir"));
    let (sub, _) = entry(corpus, "/dir", "sub");
    let (parent, _) = entry(corpus, "/dir/sub", "..");
    let (void, _) = entry(corpus, "/", "void");
    let (same, _) = entry(corpus, "/", "same");
    corpus.add("directory in itself", sub, &dir, &["directory"], "/dir/sub");
    corpus.add("root in the tree", sub, &root, &["directory"], "/dir/sub");
    corpus.add("directory with two names", void, &dir, &["directory"], "/");
    corpus.add(".. leads elsewhere", parent, &root, &["inode of .."], "/dir/sub");
    corpus.add("hard link to a directory", same, &dir, &["dirent type"], "/same");
    let linked = inode(corpus, "/same");
    corpus.add("fewer links than names", linked + 44, &[1], &["inode nlink"], "/");
    let links = inode(corpus, "/dir");
    corpus.add("links of a directory", links + 44, &[9], &["inode nlink"], "/dir");
    let (aa, _) = entry(corpus, "/dir", "aa");
    let inside = (u64::from(resolve(&corpus.image, "/big").ino) + 1).to_le_bytes();
    let fields =
        &["inode mode", "inode format", "inode", "dirent type", "chunk format", "inode size", "inode nlink or mtime"];
    corpus.add("inode inside another", aa, &inside, fields, "/dir/aa");
}

fn chunks(corpus: &mut Corpus) {
    let table = corpus.good.u64_at(EXTENDED + 24) as usize;
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 6] = [
        ("of no blob", 32, &[9], &["chunk blob index"]),
        ("index", 72, &[0xff; 4], &["chunk index"]),
        ("of no bytes", 44, &[0; 4], &["chunk uncompressed size"]),
        ("larger than a chunk", 44, &4097u32.to_le_bytes(), &["chunk uncompressed size"]),
        ("outside", 56, &[0xff; 8], &["chunk uncompressed offset"]),
        ("of another place", 57, &[0xff], &["chunk uncompressed offset", "chunk record", "chunk address"]),
    ];
    for (name, offset, bytes, fields) in rows {
        let specimen = corpus.good.patched(table + offset, bytes);
        corpus.add_specimen(&format!("chunk record {name}"), specimen, fields, "");
    }
    let record: Vec<u8> = corpus.good.bootstrap[table + 80 + 72..][..4].to_vec();
    let twice = corpus.good.patched(table + 72, &record);
    corpus.add_specimen("chunk record twice", twice, &["chunk record", "chunk uncompressed offset"], "");
}

fn cuts(corpus: &mut Corpus) {
    let good = &corpus.good;
    let meta = good.u32_at(SUPERBLOCK + 40) as usize * 4096;
    let (blobs, chunks) = (blob_table_at(good), good.u64_at(EXTENDED + 24) as usize);
    let chunks_end = chunks + good.u64_at(EXTENDED + 32) as usize;
    let root = inode(corpus, "/");
    for at in [0, 1, 512, 1024, 1025, 1152, 1153, 1200, 1408, 1409, 1536, blobs, blobs + 1, blobs + 255, meta, root] {
        corpus.cut(at);
    }
    for at in [root + 32, root + 64, chunks, chunks + 1, chunks_end - 80, chunks_end - 1] {
        corpus.cut(at);
    }
}
