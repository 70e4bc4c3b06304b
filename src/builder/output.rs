//! Files that appear under their name only when they are complete.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Seek;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use rustix::fs::flock;
use sha2::Digest as _;
use sha2::Sha256;

use super::BuildError;
use super::Target;
use crate::limits::LEFTOVER_AGE;

/// Names of files under way.
const PREFIX: &str = ".nydus-image.";
const SUFFIX: &str = ".tmp";

/// An output under way: a hidden file beside its place, removed again unless it is [`Output::finish`]ed.
#[derive(Debug)]
pub struct Output {
    file: File,
    temporary: Temporary,
    target: Target,
}

impl Output {
    /// Opens a hidden file beside where the output belongs.
    pub fn create(target: &Target) -> Result<Self, BuildError> {
        let directory = match target {
            Target::Directory(path) => path.as_path(),
            Target::File(path) => {
                if path.symlink_metadata().is_ok_and(|metadata| !metadata.is_file()) {
                    return Err(BuildError::NotReplaceable(path.clone()));
                }
                match path.parent() {
                    Some(parent) if parent != Path::new("") => parent,
                    _ => Path::new("."),
                }
            }
        };
        remove_leftovers(directory);
        for attempt in 0u32.. {
            let path = directory.join(format!("{PREFIX}{}.{attempt}{SUFFIX}", std::process::id()));
            match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => {
                    // Ends with this process, however that ends: what nobody holds any more is left over. Where locks
                    // do not work leftovers stay.
                    let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
                    return Ok(Self { file, temporary: Temporary { path }, target: target.clone() });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(BuildError::NoDirectory(directory.to_owned()));
                }
                Err(error) => return Err(BuildError::io("create a file in", directory)(error)),
            }
        }
        unreachable!("some of 2^32 names is free")
    }

    /// The file, to be written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it lies meanwhile, for messages.
    pub fn path(&self) -> &Path {
        &self.temporary.path
    }

    /// Writes `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), BuildError> {
        self.file.write_all_at(bytes, offset).map_err(BuildError::io("write", self.path()))
    }

    /// Gives the file its name, and returns it. `sha256` is needed for outputs named by their content; `None` has it
    /// computed by reading the file once more.
    pub fn finish(mut self, sha256: Option<[u8; 32]>) -> Result<PathBuf, BuildError> {
        let path = match &self.target {
            Target::File(path) => path.clone(),
            Target::Directory(directory) => {
                let sha256 = match sha256 {
                    Some(sha256) => sha256,
                    None => sha256_of(&mut self.file).map_err(BuildError::io("read", self.path()))?,
                };
                directory.join(hex::encode(sha256))
            }
        };
        std::fs::rename(self.path(), &path).map_err(BuildError::io("write", &path))?;
        self.temporary.path = PathBuf::new();
        Ok(path)
    }
}

/// A file that is removed when this is dropped; none if the path is empty.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = ?self.path, %error, "cannot remove a temporary file");
        }
    }
}

/// Removes what builds that were killed have left in `directory`: files under way that nobody has locked. A young one
/// may be one whose owner is just about to lock it.
fn remove_leftovers(directory: &Path) {
    let leftovers = std::fs::read_dir(directory).into_iter().flatten().flatten().filter(|entry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX))
    });
    for entry in leftovers {
        let age =
            entry.metadata().and_then(|about| about.modified()).map(|modified| modified.elapsed().unwrap_or_default());
        if age.is_ok_and(|age| age >= LEFTOVER_AGE)
            && entry.file_type().is_ok_and(|kind| kind.is_file())
            && let Ok(file) = File::open(entry.path())
            && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let removed = std::fs::remove_file(entry.path());
            tracing::info!(path = ?entry.path(), ?removed, "removed what a build that was killed has left");
        }
    }
}

fn sha256_of(file: &mut File) -> io::Result<[u8; 32]> {
    file.rewind()?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match io::Read::read(file, &mut buffer)? {
            0 => return Ok(hasher.finalize().into()),
            len => hasher.update(&buffer[..len]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn create_removes_old_leftovers_that_nobody_holds() {
        let directory = tempfile::tempdir().unwrap();
        let target = Target::Directory(directory.path().to_owned());
        let under_way = Output::create(&target).unwrap();
        let old = SystemTime::now() - LEFTOVER_AGE * 2;
        let make = |name: &str, time: SystemTime| {
            let file = File::create(directory.path().join(name)).unwrap();
            file.set_modified(time).unwrap();
        };
        make(".nydus-image.1.0.tmp", old);
        make(".nydus-image.2.0.tmp", SystemTime::now());
        make("other.tmp", old);
        under_way.file().set_modified(old).unwrap();
        let second = Output::create(&target).unwrap();
        let mut left: Vec<_> = directory
            .path()
            .read_dir()
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let mut expected = [under_way.path(), second.path()]
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .to_vec();
        expected.extend([".nydus-image.2.0.tmp".to_owned(), "other.tmp".to_owned()]);
        expected.sort();
        assert_eq!(left, expected);
    }

    #[test]
    fn create_in_a_missing_directory_says_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let error = Output::create(&Target::Directory(directory.path().join("blobs"))).unwrap_err();
        assert!(error.to_string().contains("does not exist, make it first"), "{error}");
    }
}
