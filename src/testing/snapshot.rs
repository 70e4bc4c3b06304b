//! What a tree on disk shows, in the words of a manifest: to compare a source with a mount of its image.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

use sha2::Digest;
use sha2::Sha256;

use super::manifest::Entry;

/// Everything below `root`, and itself as `/`, sorted by path. Reads every file. A directory's size and the root's time
/// are left out: they are not the image's to keep.
///
/// # Errors
/// What the file system answers.
pub fn of_tree(root: &Path) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = if relative.as_os_str().is_empty() { root.to_path_buf() } else { root.join(&relative) };
        let entry = entry(&path, &relative)?;
        if entry.kind == b'd' {
            for child in path.read_dir()? {
                pending.push(relative.join(child?.file_name()));
            }
        }
        entries.push(entry);
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

/// The first difference of two sorted lists, in words; `None` if there is none.
pub fn difference(expected: &[Entry], found: &[Entry]) -> Option<String> {
    let by_path = |entries: &[Entry]| -> BTreeMap<Vec<u8>, Entry> {
        entries.iter().map(|entry| (entry.path.clone(), entry.clone())).collect()
    };
    let (expected, found) = (by_path(expected), by_path(found));
    for (path, entry) in &expected {
        let name = path.escape_ascii();
        match found.get(path) {
            None => return Some(format!("{name} is missing")),
            Some(other) if other != entry => return Some(format!("{name}: expected {entry:?}, found {other:?}")),
            Some(_) => {}
        }
    }
    let extra = found.keys().find(|path| !expected.contains_key(*path))?;
    Some(format!("{} should not be there", extra.escape_ascii()))
}

fn entry(path: &Path, relative: &Path) -> io::Result<Entry> {
    let metadata = path.symlink_metadata()?;
    let kind = match metadata.mode() & libc::S_IFMT {
        libc::S_IFREG => b'f',
        libc::S_IFDIR => b'd',
        libc::S_IFLNK => b'l',
        libc::S_IFCHR => b'c',
        libc::S_IFBLK => b'b',
        libc::S_IFIFO => b'p',
        _ => b's',
    };
    let is_root = relative.as_os_str().is_empty();
    let rdev = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    Ok(Entry {
        path: [b"/", relative.as_os_str().as_bytes()].concat(),
        kind,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        size: (kind != b'd').then_some(metadata.size()),
        nlink: metadata.nlink() as u32, // far fewer than 2^32
        rdev: matches!(kind, b'b' | b'c').then_some(rdev),
        mtime: (!is_root).then_some((metadata.mtime(), metadata.mtime_nsec() as u32)), // below 10^9
        sha256: if kind == b'f' { Some(sha256(path)?) } else { None },
        target: if kind == b'l' { Some(path.read_link()?.into_os_string().into_vec()) } else { None },
        xattrs: xattrs(path)?,
    })
}

fn sha256(path: &Path) -> io::Result<[u8; 32]> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match io::Read::read(&mut file, &mut buffer)? {
            0 => return Ok(hasher.finalize().into()),
            len => hasher.update(&buffer[..len]),
        }
    }
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut list = vec![0; 64 << 10];
    let listed = match rustix::fs::llistxattr(path, &mut list[..]) {
        Err(rustix::io::Errno::NOTSUP) => 0,
        listed => listed?,
    };
    let mut xattrs = BTreeMap::new();
    for name in list[..listed].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        xattrs.insert(name.to_vec(), value[..len].to_vec());
    }
    Ok(xattrs)
}
