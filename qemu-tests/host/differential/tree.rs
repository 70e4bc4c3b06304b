//! Random trees: all kinds of files, in numbers and sizes that follow from a seed.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use nydus_vm::testing::make;
use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::Timespec;
use rustix::fs::Timestamps;
use rustix::fs::XattrFlags;

/// Entries of a tree, besides its root.
const ENTRIES: usize = 120;

/// Numbers that follow from a seed.
struct Random {
    seed: u64,
    calls: u64,
}

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.calls += 1;
        let bytes = make::noise(&format!("random tree {} {}", self.seed, self.calls), 8);
        let number = u64::from_le_bytes(bytes.try_into().expect("eight bytes were asked for"));
        (number % end as u64) as usize
    }
}

/// Makes the directory `root` and fills it.
pub fn make(root: &Path, seed: u64) -> io::Result<()> {
    let mut random = Random { seed, calls: 0 };
    std::fs::create_dir(root)?;
    let mut directories = vec![root.to_path_buf()];
    let mut files: Vec<PathBuf> = Vec::new();
    let mut all = Vec::new();
    for number in 0..ENTRIES {
        let parent = &directories[random.below(directories.len())];
        let path = parent.join(name(number, &mut random));
        match random.below(20) {
            0..3 => {
                std::fs::create_dir(&path)?;
                directories.push(path.clone());
            }
            3..6 => std::os::unix::fs::symlink("t".repeat(1 + random.below(4095)), &path)?,
            6..8 if !files.is_empty() => std::fs::hard_link(&files[random.below(files.len())], &path)?,
            8 => node(&path, FileType::Fifo, 0)?,
            9 => node(&path, FileType::Socket, 0)?,
            10 => node(
                &path,
                FileType::CharacterDevice,
                rustix::fs::makedev(random.below(4096) as u32, random.below(1 << 20) as u32),
            )?,
            _ => {
                file(&path, &mut random)?;
                files.push(path.clone());
            }
        }
        all.push(path);
    }
    all.iter().rev().try_for_each(|path| dress(path, &mut random))
}

/// A name that is new by its number; of all lengths.
fn name(number: usize, random: &mut Random) -> String {
    let first = ["a", "Z", ".", "-", "\u{e4}", "~", " ", "\n"][random.below(8)];
    let longest = if random.below(4) == 0 { 240 } else { 12 };
    format!("{first}{number}{}", "n".repeat(random.below(longest)))
}

fn node(path: &Path, kind: FileType, device: u64) -> io::Result<()> {
    Ok(rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), device)?)
}

/// Sizes at the borders of chunks and blocks, in their middle, and none; half of the files are equal to others.
fn file(path: &Path, random: &mut Random) -> io::Result<()> {
    let around = [0, 4096, 8192, 16 << 10, 32 << 10, 1 << 20][random.below(6)];
    let len = match random.below(4) {
        0 => around,
        1 => around + 1,
        2 => usize::saturating_sub(around, 1),
        _ => random.below(100_000),
    };
    let (tree, one_of_ten) = (random.seed, random.below(10));
    let seed = format!("{tree} {one_of_ten}");
    let content = if random.below(3) == 0 { make::text(&seed, len) } else { make::noise(&seed, len) };
    std::fs::write(path, content)
}

/// Owner, mode, attributes and time.
fn dress(path: &Path, random: &mut Random) -> io::Result<()> {
    let metadata = path.symlink_metadata()?;
    let id = |random: &mut Random| [0, 1, 65_535, 65_536, u32::MAX - 1][random.below(5)];
    std::os::unix::fs::lchown(path, Some(id(random)), Some(id(random)))?;
    if !metadata.is_symlink() {
        let extra = [0, 0, 0o1000, 0o2000, 0o4000][random.below(5)];
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(random.below(0o1000) as u32 | extra))?;
    }
    if metadata.is_file() || metadata.is_dir() {
        for attribute in 0..random.below(8).saturating_sub(4) {
            let name = format!(
                "{}.{}{attribute}",
                ["user", "trusted", "security"][random.below(3)],
                "k".repeat(random.below(60))
            );
            let value = vec![b'v'; random.below(300)];
            rustix::fs::lsetxattr(path, &*name, &value, XattrFlags::empty())?;
        }
    }
    let seconds = [-1, 0, 1, 1_600_000_000, 4_294_967_296][random.below(5)];
    let time = Timespec { tv_sec: seconds, tv_nsec: random.below(1_000_000_000) as i64 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}
