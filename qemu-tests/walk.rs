//! Lists a tree with everything a guest can see of it, in the format of the reference images' manifests.
//!
//! Runs in guests, and on the host for trees that tests make.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::FileType;
use std::fs::Metadata;
use std::io::Read;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use anyhow::Result;
use sha2::Digest;
use sha2::Sha256;

/// `walk DIR`: the lines of the tree below `DIR` on stdout.
pub fn main(root: &Path) -> ExitCode {
    match lines(root) {
        Ok(lines) => {
            let mut text = lines.join("\n");
            text.push('\n');
            let written = std::io::stdout().write_all(text.as_bytes());
            if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("walk: {error:?}");
            ExitCode::FAILURE
        }
    }
}

/// One line for each path below `root`, itself included as `/`: path, type, mode, uid, gid, size, links, device,
/// mtime, sha256, target, xattrs, separated by tabs, in the order of paths.
pub fn lines(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut waiting = vec![root.to_path_buf()];
    while let Some(path) = waiting.pop() {
        let metadata = path.symlink_metadata().with_context(|| format!("stat {}", path.display()))?;
        let inside = path.strip_prefix(root).expect("every path was found below the root");
        found.push(line(&path, inside.as_os_str(), &metadata)?);
        if metadata.is_dir() {
            for entry in path.read_dir().with_context(|| format!("readdir {}", path.display()))? {
                let entry = entry.with_context(|| format!("readdir {}", path.display()))?;
                waiting.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

fn line(path: &Path, inside: &OsStr, metadata: &Metadata) -> Result<String> {
    let kind = metadata.file_type();
    let size = if kind.is_dir() { "-".to_owned() } else { metadata.size().to_string() };
    let device = if kind.is_block_device() || kind.is_char_device() {
        format!("{}:{}", rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()))
    } else {
        "-".to_owned()
    };
    let content = if kind.is_file() { hash(path)? } else { "-".to_owned() };
    let target = if kind.is_symlink() { escape(path.read_link()?.as_os_str().as_bytes()) } else { "-".to_owned() };
    Ok(format!(
        "/{}\t{}\t{:04o}\t{}\t{}\t{size}\t{}\t{device}\t{}.{:09}\t{content}\t{target}\t{}",
        escape(inside.as_bytes()),
        letter(kind),
        metadata.mode() & 0o7777,
        metadata.uid(),
        metadata.gid(),
        metadata.nlink(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        xattrs(path)?,
    ))
}

fn letter(kind: FileType) -> char {
    match kind {
        kind if kind.is_dir() => 'd',
        kind if kind.is_symlink() => 'l',
        kind if kind.is_char_device() => 'c',
        kind if kind.is_block_device() => 'b',
        kind if kind.is_fifo() => 'p',
        kind if kind.is_socket() => 's',
        _ => 'f',
    }
}

fn hash(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).with_context(|| format!("read {}", path.display()))?;
        if read == 0 {
            return Ok(hex::encode(hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

/// `name=hex;name=hex` in the order of names, `-` for none.
fn xattrs(path: &Path) -> Result<String> {
    let mut buffer = vec![0; 64 << 10];
    let listed = match rustix::fs::llistxattr(path, &mut buffer[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        listed => listed.with_context(|| format!("listxattr {}", path.display()))?,
    };
    let mut names: Vec<&[u8]> = buffer[..listed].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    let mut text = String::new();
    let mut value = vec![0; 64 << 10];
    for name in names {
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])
            .with_context(|| format!("getxattr {} {}", path.display(), String::from_utf8_lossy(name)))?;
        let separator = if text.is_empty() { "" } else { ";" };
        write!(text, "{separator}{}={}", escape(name), hex::encode(&value[..length]))?;
    }
    Ok(if text.is_empty() { "-".to_owned() } else { text })
}

/// Bytes outside 0x21..=0x7e and `%` become `%XX`.
fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'%' => text.push_str("%25"),
            0x21..=0x7e => text.push(char::from(*byte)),
            _ => write!(text, "%{byte:02X}").expect("a string takes every write"),
        }
    }
    text
}
