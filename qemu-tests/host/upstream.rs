//! The builder against images that upstream's tool made of the same trees: the same bytes, but for the order of xattrs.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use libtest_mimic::Trial;
use nydus_vm::testing::make;
use nydus_vm::testing::manifest;
use nydus_vm::testing::manifest::Entry;
use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::Timespec;
use rustix::fs::Timestamps;

use crate::mounted::needs_command;
use crate::mounted::run;
use crate::trial;

/// Folder of the tree, metadata made of it, and upstream's options.
const REFERENCES: [(&str, &str, &str); 5] = [
    ("v6-lz4-blake3", "v6-lz4-blake3/bootstrap", "--compressor lz4_block"),
    ("v6-none-sha256", "v6-none-sha256/bootstrap", "--compressor none --digester sha256 --chunk-size 0x4000"),
    ("v6-zstd-4k", "v6-zstd-4k/bootstrap", "--compressor zstd --chunk-size 0x1000"),
    ("v6-big", "v6-big/bootstrap", "--compressor zstd"),
    ("v6-lz4-blake3", "v6-chunkdict/dict.bootstrap", ""),
];

pub fn trials() -> Vec<Trial> {
    REFERENCES
        .iter()
        .map(|(tree, bootstrap, options)| {
            let name = format!("build_gives_the_bytes_of_{}", bootstrap.replace(['-', '/', '.'], "_"));
            let missing = match (manifest::reference_images(), make::is_root()) {
                (None, _) => Err("NYDUS_REFERENCE_DIR is not set".to_owned()),
                (_, false) => Err("unpacking the tree needs root".to_owned()),
                (Some(_), true) => needs_command("tar"),
            };
            trial(&name, missing, move || gives_the_same_bytes(tree, bootstrap, options))
        })
        .collect()
}

fn gives_the_same_bytes(tree: &str, bootstrap: &str, options: &str) -> Result<()> {
    let images = manifest::reference_images().context("NYDUS_REFERENCE_DIR is not set")?;
    let scratch = tempfile::tempdir()?;
    let [source, blobs, built] = ["source", "blobs", "bootstrap"].map(|name| scratch.path().join(name));
    std::fs::create_dir(&blobs)?;
    unpack(&images.join(tree), &source)?;
    let mut build = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    build.args(["create", "-v", "6"]).args(options.split_whitespace()).arg("-B").arg(&built).arg("-D").arg(&blobs);
    run(build.arg(&source))?;

    let reference = images.join(bootstrap);
    let upstream_blobs = reference.parent().context("a file has a folder")?.join("blobs");
    for blob in blobs.read_dir()? {
        let name = blob?.file_name();
        let (ours, upstreams) = (std::fs::read(blobs.join(&name))?, std::fs::read(upstream_blobs.join(&name)));
        ensure!(ours == upstreams.with_context(|| format!("upstream made no blob {name:?}"))?, "blob {name:?} differs");
    }
    let [mut ours, mut upstreams] = [&built, &reference].map(std::fs::read);
    let (ours, upstreams) = (ours.as_mut().map_err(take)?, upstreams.as_mut().map_err(take)?);
    sort_xattrs(ours)?;
    sort_xattrs(upstreams)?;
    ensure!(ours.len() == upstreams.len(), "{} bytes instead of {}", ours.len(), upstreams.len());
    let difference = ours.iter().zip(upstreams.iter()).position(|(a, b)| a != b);
    ensure!(difference.is_none(), "bootstraps differ at {difference:x?}");
    Ok(())
}

fn take(error: &mut std::io::Error) -> std::io::Error {
    std::mem::replace(error, std::io::ErrorKind::Other.into())
}

/// Unpacks the tree of a reference folder, and makes the sockets that a tar cannot hold.
fn unpack(folder: &Path, source: &Path) -> Result<()> {
    std::fs::create_dir(source)?;
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "-xpf"]).arg(folder.join("source.tar"));
    run(tar.arg("-C").arg(source))?;

    let entries = manifest::read(folder);
    let below = |entry: &Entry| source.join(std::ffi::OsStr::from_bytes(&entry.path[1..]));
    for socket in entries.iter().filter(|entry| entry.kind == b's') {
        let path = below(socket);
        drop(UnixListener::bind(&path).with_context(|| format!("{path:?}"))?);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(socket.mode))?;
        std::os::unix::fs::lchown(&path, Some(socket.uid), Some(socket.gid))?;
        set_time(&path, socket)?;
        let parent = entries.iter().find(|entry| below(entry) == path.parent().unwrap_or(source));
        let parent: &Entry = parent.context("the manifest lists the directory of a socket")?;
        set_time(&below(parent), parent)?;
    }
    Ok(())
}

fn set_time(path: &PathBuf, entry: &Entry) -> Result<()> {
    let (tv_sec, ns) = entry.mtime.context("the manifest has a time")?;
    let time = Timespec { tv_sec, tv_nsec: ns.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Sorts the xattrs of every inode, which upstream writes in the order of a hash table.
///
/// Inodes are found by what they look like at every slot of the meta area; a slot that only looks like one with xattrs
/// is sorted the same way in both files.
fn sort_xattrs(bootstrap: &mut [u8]) -> Result<()> {
    const META: usize = 8192;
    let word = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let chunk_table = u64::from_le_bytes(bootstrap[1176..1184].try_into()?) as usize;
    for inode in (META..chunk_table).step_by(32) {
        let (format, count) = (word(bootstrap, inode), usize::from(word(bootstrap, inode + 2)));
        let (start, end) = (inode + 64 + 12, inode + 64 + 12 + (count.max(1) - 1) * 4);
        if !matches!(format, 1 | 5 | 9) || count == 0 || end > chunk_table {
            continue;
        }
        let mut entries = Vec::new();
        let mut rest = &bootstrap[start..end];
        while rest.len() >= 4 {
            let len = 4 + usize::from(rest[0]) + usize::from(word(rest, 2));
            let Some((entry, behind)) = rest.split_at_checked(len.next_multiple_of(4)) else { break };
            entries.push(entry.to_vec());
            rest = behind;
        }
        if rest.is_empty() {
            entries.sort();
            bootstrap[start..end].copy_from_slice(&entries.concat());
        }
    }
    Ok(())
}
