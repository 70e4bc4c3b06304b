//! What `dump.erofs` says of each inode and of each directory, and what our reader says.
//!
//! It prints neither devices nor link targets, and of xattrs only how much room they take.

use std::collections::BTreeSet;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use nydus_vm::rafs::image::Image;
use nydus_vm::rafs::inode::InodeFacts;
use nydus_vm::rafs::inode::Kind;

use super::subject::Refused;
use super::subject::Subject;

/// Inodes of one image that are asked for, one process each; larger images are sampled.
const INODES: usize = 250;

/// Asks for every inode; fails at the first that our reader shows otherwise.
pub fn agrees(subject: &Subject) -> Result<()> {
    let inodes = inodes(&subject.opened)?;
    for ino in inodes.iter().step_by(inodes.len().div_ceil(INODES).max(1)) {
        let facts = subject.opened.inode(*ino)?;
        let mut arguments = vec![format!("--nid={ino}")];
        if facts.kind == Kind::Directory {
            arguments.push("--ls".to_owned());
        }
        let output = match subject.ask("dump.erofs", &arguments) {
            Ok(output) => output,
            Err(Refused::Unsupported(why)) => {
                eprintln!("SKIPPED {}: dump.erofs of this machine: {why}", subject.image.name);
                return Ok(());
            }
            Err(Refused::Failed(why)) => bail!(why),
        };
        compare(&subject.opened, &facts, &output)
            .with_context(|| format!("inode {ino}: {}", output.escape_ascii().to_string().replace("\\n", "\n")))?;
    }
    Ok(())
}

/// Every inode that has a name.
fn inodes(image: &Image) -> Result<BTreeSet<u32>> {
    let (mut known, mut pending) = (BTreeSet::new(), vec![image.root()]);
    while let Some(ino) = pending.pop() {
        let facts = image.inode(ino)?;
        if !known.insert(ino) || facts.kind != Kind::Directory {
            continue;
        }
        let mut entries = image.entries(&facts, 0)?;
        while let Some(entry) = entries.next() {
            pending.push(entry?.ino);
        }
    }
    Ok(known)
}

fn compare(image: &Image, facts: &InodeFacts, output: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(output);
    // What follows the last space of the line, so that nothing in a name is taken for a field.
    let kind = match facts.kind {
        Kind::Regular => "regular file",
        Kind::Directory => "directory",
        Kind::Symlink => "symlink file",
        Kind::CharDevice => "char dev",
        Kind::BlockDevice => "block dev",
        Kind::Fifo => "FIFO file",
        Kind::Socket => "SOCK file",
    };
    let mode = facts.mode & 0o777;
    let (ino, nlink, uid, gid, size) = (facts.ino, facts.nlink, facts.uid, facts.gid, facts.size);
    let time = date(facts.mtime);
    for line in [
        format!("\nSize: {size}  On-disk size: {size}  {kind}\n"),
        format!("\nNID: {ino}   Links: {nlink}   Layout: "),
        format!("\nUid: {uid}   Gid: {gid}  Access: {mode:04o}/"),
        format!("\nTimestamp: {time}.{:09}\n", facts.mtime_ns),
    ] {
        ensure!(text.contains(&line), "no line {line:?}");
    }
    let has_xattrs = !image.xattr_names(facts)?.is_empty();
    ensure!(has_xattrs != text.contains("   Xattr size: 0\n"), "our reader shows xattrs: {has_xattrs}");
    if facts.kind == Kind::Directory {
        ensure!(output.ends_with(&listing(image, facts)?), "another listing than that of our reader");
    }
    Ok(())
}

/// The listing as `dump.erofs` prints it.
fn listing(image: &Image, facts: &InodeFacts) -> Result<Vec<u8>> {
    let mut lines = b"\n       NID TYPE  FILENAME\n".to_vec();
    let mut entries = image.entries(facts, 0)?;
    while let Some(entry) = entries.next() {
        let entry = entry?;
        // EROFS_FT_*, which is FT_* of the kernel.
        let kind = match entry.kind {
            8 => 1,
            4 => 2,
            2 => 3,
            6 => 4,
            1 => 5,
            12 => 6,
            10 => 7,
            other => bail!("type {other} of {:?}", entry.name.escape_ascii().to_string()),
        };
        lines.extend(format!("{:10}    {kind}  ", entry.ino).into_bytes());
        lines.extend(entry.name);
        lines.push(b'\n');
    }
    Ok(lines)
}

/// Seconds since 1970 as date and time, UTC; the proleptic Gregorian calendar.
fn date(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years begin in March, so that the day that is sometimes missing is the last one.
    let (era, day_of_era) = ((days + 719_468).div_euclid(146_097), (days + 719_468).rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year_of_era + carry;
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}
