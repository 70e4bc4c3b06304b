//! Damaged metadata of v5 (format, section 3).

use super::Case;
use super::Corpus;
use super::Specimen;

/// Every case.
pub fn cases() -> Vec<Case> {
    let mut corpus = Corpus::new(Specimen::v5());
    superblock(&mut corpus);
    tables(&mut corpus);
    records(&mut corpus);
    trees(&mut corpus);
    chunks(&mut corpus);
    cuts(&mut corpus);
    for case in &mut corpus.cases {
        case.name.insert_str(0, "v5: ");
    }
    corpus.cases
}

fn superblock(corpus: &mut Corpus) {
    corpus.add("magic", 0, &[0], &["wrong magic number"], "");
    corpus.add("version", 4, &[0, 6], &["RAFS version 0x600"], "");
    corpus.add("superblock size", 8, &[1], &["superblock size"], "");
    for bytes in [0u32, 1, 4095, 1 << 25, u32::MAX] {
        corpus.add(&format!("chunk size {bytes}"), 12, &bytes.to_le_bytes(), &["chunk size"], "");
    }
    corpus.add("unknown flag", 21, &[1], &["superblock flags"], "");
    corpus.add("two compressors", 16, &[0xb7], &["superblock flags"], "");
    corpus.add("no inodes", 24, &[0; 8], &["inode count"], "");
    corpus.add("too many inodes", 24, &[0xff; 8], &["inode count"], "");
}

fn tables(corpus: &mut Corpus) {
    let len = corpus.good.bootstrap.len() as u64;
    let blob_table = corpus.good.u64_at(48);
    let tables =
        &["inode table", "blob table", "extended blob table", "prefetch table", "inode table entry", "superblock"];
    for (name, field) in [("inode table", 32), ("blob table", 48), ("extended blob table", 72)] {
        for at in [0u64, 8193, 4096, len, len - 8, u64::MAX - 7, u64::MAX] {
            corpus.add(&format!("{name} at {at:#x}"), field, &at.to_le_bytes(), tables, "");
        }
    }
    corpus.add("inode table over the blob table", 32, &blob_table.to_le_bytes(), tables, "");
    for entries in [0u32, 1, u32::MAX] {
        let fields = &["inode count", "inode table", "blob table", "inode parent", "inode child index"];
        corpus.add(&format!("{entries} inode table entries"), 56, &entries.to_le_bytes(), fields, "");
    }
    for (at, entries) in [(0u64, 4u32), (len, 1), (8192, 1), (blob_table, u32::MAX)] {
        let specimen = corpus.good.patched(40, &u64::to_le_bytes(at)).patched(60, &entries.to_le_bytes());
        let fields = &["prefetch table", "superblock", "inode table", "blob table"];
        corpus.add_specimen(&format!("{entries} prefetch entries at {at:#x}"), specimen, fields, "");
    }
    for bytes in [u32::MAX, 1 << 20] {
        corpus.add(
            &format!("{bytes} bytes of blob table"),
            64,
            &bytes.to_le_bytes(),
            &["blob table", "blob table size"],
            "",
        );
    }
    for entries in [2u32, u32::MAX] {
        let fields = &["extended blob table", "inode"];
        corpus.add(&format!("{entries} extended entries"), 68, &entries.to_le_bytes(), fields, "");
    }
    let at = blob_table as usize;
    corpus.add("blob prefetch offset", at, &[1], &["blob prefetch offset"], "");
    for id in ["../", ".a", "a/b", "a b"] {
        corpus.add(&format!("blob id {id:?}"), at + 8, id.as_bytes(), &["blob id"], "");
    }
    let at = corpus.good.u64_at(72) as usize;
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 7] = [
        ("no chunks", 0, &[0; 4], &["chunk index"]),
        ("too many chunks", 0, &[0xff; 4], &["blob chunk count"]),
        ("batches", 4, &[0x80], &["blob features 0x80 (BATCH)"]),
        ("no bytes", 8, &[0; 8], &["chunk uncompressed offset"]),
        ("too large", 8, &[0xff; 8], &["blob uncompressed size"]),
        ("file too large", 16, &[0xff; 8], &["blob compressed size"]),
        ("no file", 16, &[0; 8], &["chunk compressed offset"]),
    ];
    for (name, offset, bytes, fields) in rows {
        let specimen = corpus.good.patched(at + offset, bytes);
        corpus.add_specimen(&format!("blob: {name}"), specimen, fields, "");
    }
}

/// Where the record with the name `name` is.
fn record(corpus: &Corpus, name: &str) -> usize {
    let mut padded = name.as_bytes().to_vec();
    padded.resize(name.len().next_multiple_of(8), 0);
    let bytes = &corpus.good.bootstrap;
    let is_record = |at: &usize| at.is_multiple_of(8) && bytes[at - 28..at - 26] == (name.len() as u16).to_le_bytes();
    let found = (8192 + 128..bytes.len() - padded.len()).find(|at| bytes[*at..].starts_with(&padded) && is_record(at));
    found.unwrap_or_else(|| panic!("no record of {name}")) - 128
}

fn records(corpus: &mut Corpus) {
    let (c, link) = (record(corpus, "c"), record(corpus, "link"));
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 16] = [
        ("parent", 32, &[1], &["inode parent"]),
        ("parent 0", 32, &[0; 8], &["inode parent"]),
        ("parent outside", 32, &[0xff; 8], &["inode parent"]),
        ("number", 40, &[0xff; 8], &["inode number"]),
        ("number 0", 40, &[0; 8], &["inode number", "inode index"]),
        ("no type", 60, &[0; 4], &["inode mode"]),
        ("mode of 32 bits", 62, &[1], &["inode mode"]),
        ("size of the maximum", 64, &[0xff; 8], &["inode child count"]),
        ("4 GiB", 68, &[1], &["inode child count"]),
        ("no links", 88, &[0; 4], &["inode nlink or mtime"]),
        ("too many links", 88, &[0xff; 4], &["inode nlink"]),
        ("chunks without end", 96, &[0xff; 4], &["inode child count"]),
        ("no name", 100, &[0, 0], &["inode name size"]),
        ("long name", 100, &[0, 1], &["inode name size"]),
        ("nanoseconds", 108, &[0xff; 4], &["inode nlink or mtime"]),
        ("xattrs where none are", 80, &[4], &["xattr table size", "xattr pair length", "xattr name", "metadata"]),
    ];
    for (name, offset, bytes, fields) in rows {
        corpus.add(&format!("record: {name}"), c + offset, bytes, fields, "/dir");
    }
    for (size, bytes) in [(0u64, 0u16), (4096, 4096), (65535, 65535)] {
        let specimen = corpus.good.patched(link + 64, &size.to_le_bytes()).patched(link + 102, &bytes.to_le_bytes());
        let name = format!("symlink of {size} bytes");
        corpus.cases.push(Case { name, specimen, fields: &["symlink size"], path: "/link", spared: &["/big"] });
    }
    corpus.add("symlink of 4 GiB", link + 68, &[1], &["symlink size"], "/link");
    corpus.add("NUL in a symlink", link + 136 + 3, &[0], &["symlink target"], "/link");
    let xattrs = record(corpus, "xattr") + 128 + 8;
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 6] = [
        ("table of the maximum", 0, &[0xff; 8], &["xattr table size"]),
        ("table of 4 GiB", 4, &[1], &["xattr table size"]),
        ("pair without end", 8, &[0xff; 4], &["xattr pair length"]),
        ("pair of nothing", 8, &[0; 4], &["xattr name"]),
        ("prefix", 12, b"U", &["xattr name"]),
        ("name without end", 12 + 7, b"x", &["xattr name"]),
    ];
    for (name, offset, bytes, fields) in rows {
        corpus.add(&format!("xattr {name}"), xattrs + offset, bytes, fields, "/xattr");
    }
}

fn trees(corpus: &mut Corpus) {
    let (aa, bb, c, dir) = (record(corpus, "aa"), record(corpus, "bb"), record(corpus, "c"), record(corpus, "dir"));
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 10] = [
        ("name with a slash", aa + 129, b"/", &["inode name"]),
        ("name with NUL", aa + 129, b"\0", &["inode name"]),
        ("name ..", aa + 128, b"..", &["inode name"]),
        ("name .", c + 128, b".", &["inode name"]),
        ("name twice", bb + 128, b"aa", &["name"]),
        ("names out of order", aa + 128, b"zz", &["name"]),
        ("children of itself", dir + 92, &[1, 0, 0, 0], &["inode child index"]),
        ("children outside", dir + 92, &[0xff; 4], &["inode child index"]),
        ("children without end", dir + 96, &[0xff; 4], &["inode child index"]),
        ("more children", dir + 96, &[20], &["inode parent", "inode nlink"]),
    ];
    for (name, at, bytes, fields) in rows {
        corpus.add(&format!("directory: {name}"), at, bytes, fields, "/dir");
    }
    let table = |index: usize| 8192 + (index - 1) * 4;
    for (name, entry) in [("0", 0u32), ("in the superblock", 1000), ("outside", (1 << 29) - 1), ("of 30 bits", 1 << 29)]
    {
        let fields = &["inode table entry", "metadata"];
        let specimen = corpus.good.patched(table(2), &entry.to_le_bytes());
        corpus.add_specimen(&format!("inode table entry {name}"), specimen, fields, "");
    }
    let first = corpus.good.u32_at(table(2)).to_le_bytes();
    let twice = corpus.good.patched(table(3), &first);
    corpus.add_specimen("one record for two inodes", twice, &["name"], "/");
    let same = record(corpus, "same");
    let number = corpus.good.u64_at(dir + 40).to_le_bytes();
    // The record of `/same` comes before that of its other name.
    let fields = &["inode number", "inode digest", "inode nlink", "name"];
    corpus.add("hard link to a directory", same + 40, &number, fields, "/");
    let inner = record(corpus, "inner");
    let fields = &["chunk record", "inode digest"];
    corpus.add("hard link with another content", inner + 136 + 40, &[0xee], fields, "/dir/inner");
    corpus.add("hard link of another size", inner + 64, &[1], &["inode size", "inode child count"], "/dir");
    corpus.add("digest of a directory", dir, &[0; 8], &["inode digest"], "");
}

fn chunks(corpus: &mut Corpus) {
    let at = record(corpus, "c") + 128 + 8;
    let rows: [(&str, usize, &[u8], &'static [&'static str]); 10] = [
        ("of no blob", 32, &[9], &["chunk blob index"]),
        ("that is a hole", 36, &[2], &["chunk flags 0x2"]),
        ("that is compressed from nothing", 36, &[1, 0, 0, 0, 0, 0, 0, 0], &["chunk compressed size"]),
        ("stored in another size", 40, &[9], &["chunk compressed size"]),
        ("of no bytes", 44, &[0; 4], &["chunk uncompressed size"]),
        ("of 4 GiB", 44, &[0xff; 4], &["chunk uncompressed size"]),
        ("stored outside", 48, &[0xff; 8], &["chunk compressed offset"]),
        ("outside", 56, &[0xff; 8], &["chunk uncompressed offset"]),
        ("in the place of another", 56, &[0; 8], &["chunk uncompressed offset", "chunk record"]),
        ("index", 72, &[0xff; 4], &["chunk index"]),
    ];
    for (name, offset, bytes, fields) in rows {
        let specimen = corpus.good.patched(at + offset, bytes);
        corpus.add_specimen(&format!("chunk {name}"), specimen, fields, "");
    }
}

fn cuts(corpus: &mut Corpus) {
    let len = corpus.good.bootstrap.len();
    let blob_table = corpus.good.u64_at(48) as usize;
    for at in [0, 4, 8, 80, 4096, 8192, 8200, blob_table, blob_table + 8, len / 2 & !7, len - 80, len - 8, len - 1] {
        corpus.cut(at);
    }
}
