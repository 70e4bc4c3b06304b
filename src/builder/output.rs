//! Files that appear under their name only when they are complete.

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Seek;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;

use sha2::Digest as _;
use sha2::Sha256;

use super::BuildError;
use super::Target;

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
        for attempt in 0u32.. {
            let path = directory.join(format!(".nydus-image.{}.{attempt}.tmp", std::process::id()));
            match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => return Ok(Self { file, temporary: Temporary { path }, target: target.clone() }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
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
