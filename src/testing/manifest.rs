//! The `manifest.txt` of a reference image: what the image must show, path by path.
//!
//! The reference images are made by upstream's tools and lie outside of the repository; `NYDUS_REFERENCE_DIR` names the
//! folder that has them in `images/`.

use std::collections::BTreeMap;
use std::path::Path;
use std::path::PathBuf;

/// Every reference image, by its folder.
pub const REFERENCES: [&str; 25] = [
    "v5-big",
    "v5-inline",
    "v5-lz4-blake3",
    "v5-none-aligned",
    "v5-prefetch-blob",
    "v5-prefetch-fs",
    "v5-two-layers",
    "v5-zstd-sha256-4k",
    "v6-batch",
    "v6-big",
    "v6-chunkdict",
    "v6-encrypted",
    "v6-inline",
    "v6-inline-toc",
    "v6-lz4-blake3",
    "v6-merged",
    "v6-none-sha256",
    "v6-prefetch-fs",
    "v6-repeatable",
    "v6-tarfs",
    "v6-toc",
    "v6-two-layers",
    "v6-zran",
    "v6-zran-inline-toc",
    "v6-zstd-4k",
];

/// One path of a manifest. Hard links are listed under each of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Absolute path in the image, as bytes.
    pub path: Vec<u8>,
    /// One of `f d l c b p s`.
    pub kind: u8,
    /// Permission bits, with set-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes; `None` for directories.
    pub size: Option<u64>,
    /// Link count.
    pub nlink: u32,
    /// Major and minor number of a device.
    pub rdev: Option<(u32, u32)>,
    /// Seconds and nanoseconds; `None` for the root.
    pub mtime: Option<(i64, u32)>,
    /// SHA-256 of the content of a regular file.
    pub sha256: Option<[u8; 32]>,
    /// Target of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// Extended attributes by name with prefix.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The folder of the reference images; `None`, with a line on stderr, when `NYDUS_REFERENCE_DIR` is not set.
///
/// # Panics
/// When the variable is set, but names no folder with images.
pub fn reference_images() -> Option<PathBuf> {
    let Some(root) = std::env::var_os("NYDUS_REFERENCE_DIR") else {
        eprintln!("SKIPPED: NYDUS_REFERENCE_DIR is not set, no reference images to compare with");
        return None;
    };
    let images = Path::new(&root).join("images");
    assert!(images.is_dir(), "NYDUS_REFERENCE_DIR has no folder {}", images.display());
    Some(images)
}

/// Reads the manifest of the reference image in `folder`.
///
/// # Panics
/// When it cannot be read or parsed: a reference that is there must be complete.
pub fn read(folder: &Path) -> Vec<Entry> {
    let path = folder.join("manifest.txt");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => panic!("{}: {error}", path.display()),
    };
    match parse(&text) {
        Ok(entries) => entries,
        Err(line) => panic!("{}: cannot understand {line:?}", path.display()),
    }
}

/// Parses a manifest.
///
/// # Errors
/// The line that is not understood.
pub fn parse(text: &str) -> Result<Vec<Entry>, String> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| parse_line(line).ok_or_else(|| line.to_owned())).collect()
}

fn parse_line(line: &str) -> Option<Entry> {
    let mut fields = line.split('\t');
    let mut field = || fields.next().map(|text| (text != "-").then_some(text));
    let (path, kind, mode) = (field()??, field()??, field()??);
    let (uid, gid, size, nlink) = (field()??, field()??, field()?, field()??);
    let (rdev, mtime, sha256, target, xattrs) = (field()?, field()?, field()?, field()?, field()?);
    Some(Entry {
        path: unescape(path)?,
        kind: *kind.as_bytes().first()?,
        mode: u32::from_str_radix(mode, 8).ok()?,
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        size: optional(size, |text| text.parse().ok())?,
        nlink: nlink.parse().ok()?,
        rdev: optional(rdev, |text| {
            let (major, minor) = text.split_once(':')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        })?,
        mtime: optional(mtime, parse_time)?,
        sha256: optional(sha256, |text| hex::decode(text).ok()?.try_into().ok())?,
        target: optional(target, unescape)?,
        xattrs: match xattrs {
            Some(text) => text.split(';').map(parse_xattr).collect::<Option<_>>()?,
            None => BTreeMap::new(),
        },
    })
}

/// `parse` applied to what is there; the outer `None` is a field that is not understood.
fn optional<T>(field: Option<&str>, parse: impl Fn(&str) -> Option<T>) -> Option<Option<T>> {
    match field {
        Some(text) => parse(text).map(Some),
        None => Some(None),
    }
}

/// Seconds, with or without nine digits of nanoseconds. Times of tar sources have none.
fn parse_time(text: &str) -> Option<(i64, u32)> {
    match text.split_once('.') {
        Some((seconds, ns)) if ns.len() == 9 => Some((seconds.parse().ok()?, ns.parse().ok()?)),
        Some(_) => None,
        None => Some((text.parse().ok()?, 0)),
    }
}

fn parse_xattr(text: &str) -> Option<(Vec<u8>, Vec<u8>)> {
    let (name, value) = text.split_once('=')?;
    Some((unescape(name)?, hex::decode(value).ok()?))
}

/// Turns every `%XX` into its byte.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((plain, escaped)) = rest.split_once('%') {
        bytes.extend_from_slice(plain.as_bytes());
        bytes.push(u8::from_str_radix(escaped.get(..2)?, 16).ok()?);
        rest = escaped.get(2..)?;
    }
    bytes.extend_from_slice(rest.as_bytes());
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_understands_every_field() {
        let text = "# comment\n\
            /\td\t0755\t0\t0\t-\t13\t-\t-\t-\t-\t-\n\
            /a%0a%25\tc\t4755\t1\t4000000000\t7\t2\t10:229\t-5.000000012\t-\tt%20t\tuser.a=00ff;user.b=\n";
        let entries = parse(text).unwrap();
        assert_eq!((entries.len(), entries[0].nlink, entries[0].size, entries[0].mtime), (2, 13, None, None));
        let expected = Entry {
            path: b"/a\n%".to_vec(),
            kind: b'c',
            mode: 0o4755,
            uid: 1,
            gid: 4_000_000_000,
            size: Some(7),
            nlink: 2,
            rdev: Some((10, 229)),
            mtime: Some((-5, 12)),
            sha256: None,
            target: Some(b"t t".to_vec()),
            xattrs: BTreeMap::from([(b"user.a".to_vec(), vec![0, 255]), (b"user.b".to_vec(), vec![])]),
        };
        assert_eq!(entries[1], expected);
    }

    #[test]
    fn parse_names_the_line_it_does_not_understand() {
        assert_eq!(parse("/x\tf\t0644\n"), Err("/x\tf\t0644".to_owned()));
        assert!(parse("/%4\td\t0755\t0\t0\t-\t13\t-\t-\t-\t-\t-\n").is_err());
    }
}
