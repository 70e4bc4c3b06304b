//! Makers of source trees and of images of them. All contents, names and times follow from the arguments.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::Timespec;
use rustix::fs::Timestamps;
use rustix::fs::XattrFlags;

use crate::builder;
use crate::builder::ChunkBytes;
use crate::builder::Options;
use crate::builder::Target;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::Digester;

/// `len` bytes that do not compress, another sequence for every `seed`.
pub fn noise(seed: &str, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new_derive_key("nydus-vm test data").update(seed.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// `len` bytes that compress well, another text for every `seed`.
pub fn text(seed: &str, len: usize) -> Vec<u8> {
    (0..).flat_map(|line| format!("{seed}, line {line}: nothing new under the sun\n").into_bytes()).take(len).collect()
}

/// A directory with `count` small files, every 50 of them different, and nothing else.
///
/// # Errors
/// What the file system answers.
pub fn big_directory(directory: &Path, count: usize) -> io::Result<()> {
    std::fs::create_dir(directory)?;
    (0..count).try_for_each(|i| std::fs::write(directory.join(format!("entry-{i:07}")), format!("{}", i % 50)))
}

/// Whether device nodes, owners and `trusted.` attributes can be made.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Fills the empty directory `root` with everything that an image must be able to show: sizes around every border, holes, equal
/// files, long, odd and non-UTF-8 names, deep and empty directories, hard links across directories, symbolic links of
/// all lengths, fifo and socket, mode bits, `user.` attributes, times with nanoseconds and before 1970. As root also
/// device nodes, owners, capabilities, ACLs, and attributes of links.
///
/// # Errors
/// What the file system answers.
pub fn odd_tree(root: &Path) -> io::Result<()> {
    let tree = Maker { root };
    tree.sizes()?;
    tree.names()?;
    tree.links()?;
    tree.modes_and_specials()?;
    tree.xattrs()?;
    if is_root() {
        tree.what_needs_root()?;
    }
    set_times(root)
}

struct Maker<'a> {
    root: &'a Path,
}

impl Maker<'_> {
    fn at(&self, path: impl AsRef<[u8]>) -> PathBuf {
        self.root.join(std::ffi::OsStr::from_bytes(path.as_ref()))
    }

    fn directory(&self, path: impl AsRef<[u8]>) -> io::Result<()> {
        std::fs::create_dir_all(self.at(path))
    }

    fn file(&self, path: impl AsRef<[u8]>, content: &[u8]) -> io::Result<()> {
        std::fs::write(self.at(path), content)
    }

    fn symlink(&self, target: &str, path: &str) -> io::Result<()> {
        std::os::unix::fs::symlink(target, self.at(path))
    }

    fn hard_link(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::hard_link(self.at(from), self.at(to))
    }

    fn node(&self, path: &str, kind: FileType, mode: u32, device: u64) -> io::Result<()> {
        Ok(rustix::fs::mknodat(CWD, self.at(path), kind, Mode::from_raw_mode(mode), device)?)
    }

    fn mode(&self, path: &str, mode: u32) -> io::Result<()> {
        std::fs::set_permissions(self.at(path), std::fs::Permissions::from_mode(mode))
    }

    fn xattr(&self, path: &str, name: &str, value: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::lsetxattr(self.at(path), name, value, XattrFlags::empty())?)
    }

    fn sizes(&self) -> io::Result<()> {
        self.directory("sizes")?;
        for len in [0, 1, 2, 511, 512, 4095, 4096, 4097, 8192, 16384, 20000, 70000] {
            self.file(format!("sizes/text-{len}"), &text(&len.to_string(), len))?;
            self.file(format!("sizes/noise-{len}"), &noise(&len.to_string(), len))?;
        }
        self.file("sizes/equal-a", &noise("equal", 9000))?;
        self.file("sizes/equal-b", &noise("equal", 9000))?;
        self.file("sizes/zeros", &[0; 12288])?;
        let sparse = std::fs::File::create(self.at("sizes/sparse"))?;
        sparse.set_len(300_000)?;
        sparse.write_all_at(b"in the middle", 150_001)
    }

    fn names(&self) -> io::Result<()> {
        self.directory("names")?;
        let longest = "z".repeat(255);
        let names: [&[u8]; 13] = [
            b"!sorts-before-dot",
            b"-dash",
            b".hidden",
            b"..two",
            b"...",
            b"sp ace",
            b"tab\there",
            b"new\nline",
            b"quo'\"te",
            "\u{e4}\u{65e5}\u{672c}".as_bytes(),
            b"\xff\xfe-not-utf8",
            b"\x01",
            longest.as_bytes(),
        ];
        names.iter().try_for_each(|name| self.file([b"names/", *name].concat(), name))?;
        self.directory(format!("names/{}/deep/er", "D".repeat(255)))?;

        // More than one block of entries, the first of them full to the last byte.
        self.directory("blocks")?;
        (0..40).try_for_each(|i| self.file(format!("blocks/{i:03}-{}", "x".repeat(240)), b""))?;
        self.directory("exact")?;
        // With "." and ".." (27 bytes) these 16 names fill 4096 bytes.
        (0..15).try_for_each(|i| self.file(format!("exact/{i:02}{}", "y".repeat(242)), b""))?;
        self.file(format!("exact/99{}", "y".repeat(4096 - 27 - 15 * 256 - 14)), b"")?;
        self.directory("many")?;
        (0..200).try_for_each(|i| self.file(format!("many/file-{i:05}"), i.to_string().as_bytes()))?;
        self.directory("nest/a/b/c/d/e/f/g")?;
        self.directory("nest/empty")
    }

    fn links(&self) -> io::Result<()> {
        self.directory("links")?;
        self.file("links/target", &text("target", 5000))?;
        self.hard_link("links/target", "links/hard")?;
        self.hard_link("links/target", "nest/hard-outside")?;
        self.hard_link("links/target", "0-hard-before-all")?;
        for len in [1, 6, 254, 1500, 4031, 4032, 4033, 4095] {
            self.symlink(&"t".repeat(len), &format!("links/symlink-{len:04}"))?;
        }
        self.symlink("/no/such/file", "links/dangling")?;
        self.hard_link("links/dangling", "links/dangling-again")
    }

    fn modes_and_specials(&self) -> io::Result<()> {
        self.directory("special")?;
        self.node("special/fifo", FileType::Fifo, 0o620, 0)?;
        self.hard_link("special/fifo", "special/fifo-again")?;
        self.node("special/socket", FileType::Socket, 0o755, 0)?;
        self.directory("modes/sticky")?;
        self.mode("modes/sticky", 0o1777)?;
        self.directory("modes/set-gid-directory")?;
        self.mode("modes/set-gid-directory", 0o2775)?;
        for mode in [0o4755, 0o2755, 0o600, 0o777] {
            let path = format!("modes/file-{mode:04o}");
            self.file(&path, b"#!/bin/sh\n")?;
            self.mode(&path, mode)?;
        }
        Ok(())
    }

    fn xattrs(&self) -> io::Result<()> {
        self.directory("xattr")?;
        self.xattr("xattr", "user.directory", b"on a directory")?;
        self.file("xattr/user", b"x")?;
        self.xattr("xattr/user", "user.z", b"last")?;
        self.xattr("xattr/user", "user.a", b"first")?;
        self.xattr("xattr/user", "user.empty", b"")?;
        self.xattr("xattr/user", "user.binary", &(0..=255).collect::<Vec<u8>>())?;
        self.xattr("xattr/user", &format!("user.{}", "k".repeat(200)), &[b'v'; 300])?;
        self.file("xattr/with-data", &noise("xattr", 5000))?;
        self.xattr("xattr/with-data", "user.one", b"1")
    }

    fn what_needs_root(&self) -> io::Result<()> {
        let device = rustix::fs::makedev;
        self.node("special/char", FileType::CharacterDevice, 0o600, device(10, 229))?;
        self.node("special/char-large-numbers", FileType::CharacterDevice, 0o600, device(511, 70000))?;
        self.node("special/block", FileType::BlockDevice, 0o660, device(253, 17))?;

        self.directory("owners")?;
        for (uid, gid) in [(1, 2), (65535, 65534), (70000, 4_000_000_000)] {
            let path = format!("owners/{uid}-{gid}");
            self.file(&path, b"owned")?;
            std::os::unix::fs::lchown(self.at(&path), Some(uid), Some(gid))?;
        }
        self.file("modes/file-0000", b"nobody may read this")?;
        self.mode("modes/file-0000", 0)?;

        self.xattr("xattr/user", "trusted.t", b"for root only")?;
        self.symlink("user", "xattr/link")?;
        self.xattr("xattr/link", "trusted.on-link", b"yes")?;
        self.node("xattr/device", FileType::CharacterDevice, 0o600, device(1, 3))?;
        self.xattr("xattr/device", "security.label", b"on a device")?;
        // cap_net_bind_service, effective and permitted.
        let capability = [0x0200_0001_u32, 1 << 10, 0, 0, 0].map(u32::to_le_bytes).concat();
        self.file("xattr/capability", b"x")?;
        self.xattr("xattr/capability", "security.capability", &capability)?;
        self.file("xattr/acl", b"x")?;
        self.xattr("xattr/acl", "system.posix_acl_access", &acl())?;
        self.directory("xattr/default-acl")?;
        self.xattr("xattr/default-acl", "system.posix_acl_default", &acl())
    }
}

/// `u::rw-,u:1000:r--,g::r--,m::r--,o::r--` as the kernel takes it.
fn acl() -> Vec<u8> {
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 4, u32::MAX)];
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

/// Sets the time of everything below `root` to one that follows from its place in name order; one of them is before
/// 1970.
fn set_times(root: &Path) -> io::Result<()> {
    let mut paths = vec![root.to_path_buf()];
    let mut next = 0;
    while let Some(path) = paths.get(next).cloned() {
        next += 1;
        if !path.symlink_metadata()?.is_dir() {
            continue;
        }
        let mut children = path.read_dir()?.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>()?;
        children.sort();
        paths.extend(children);
    }
    // Children first: setting theirs does not change the parent's, but the order makes that plain.
    for (i, path) in paths.iter().enumerate().rev() {
        let seconds = if i == 3 { -5 } else { 1_600_000_000 + i as i64 * 137 };
        let time = Timespec { tv_sec: seconds, tv_nsec: (i as i64 * 7919 + 1) * 1013 % 1_000_000_000 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// An image that was made of a tree.
#[derive(Debug, Clone)]
pub struct MadeImage {
    /// The metadata.
    pub bootstrap: PathBuf,
    /// The directory of blobs.
    pub blobs: PathBuf,
    /// The only blob; none if the tree holds no data.
    pub blob_id: Option<String>,
}

/// Builds an image of `source` in the directory `out`, which is made if need be: `bootstrap` and `blobs/`.
///
/// # Panics
/// When it cannot be built.
pub fn image(source: &Path, out: &Path, compressor: Compressor, digester: Digester, chunk_bytes: u32) -> MadeImage {
    let (bootstrap, blobs) = (out.join("bootstrap"), out.join("blobs"));
    std::fs::create_dir_all(&blobs).unwrap_or_else(|error| panic!("{blobs:?}: {error}"));
    let options = Options {
        compressor,
        digester,
        chunk_bytes: ChunkBytes::new(chunk_bytes).unwrap_or_else(|| panic!("chunk size {chunk_bytes}")),
        bootstrap: Target::File(bootstrap.clone()),
        blob: Target::Directory(blobs.clone()),
    };
    match builder::create(source, &options, &mut |_| {}) {
        Ok(built) => MadeImage { bootstrap, blobs, blob_id: built.blob.map(|blob| blob.id) },
        Err(error) => panic!("cannot build {source:?}: {:#}", anyhow::Error::new(error)),
    }
}
