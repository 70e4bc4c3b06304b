//! Second pass: file contents, one chunk at a time, into the blob.

use std::fs::File;
use std::io;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::BuildError;
use super::Options;
use super::Progress;
use super::blob::Blob;
use super::blob::BlobWriter;
use super::tree::Body;
use super::tree::Identity;
use super::tree::NodeIndex;
use super::tree::Tree;

/// Stores the content of every regular file of `tree`, in the order of its nodes, and notes the chunks in it.
pub fn store(
    source: &Path,
    tree: &mut Tree,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Option<Blob>, BuildError> {
    if tree.data_bytes() == 0 {
        return Ok(None);
    }
    let mut writer = BlobWriter::create(options)?;
    let mut buffer = vec![0; options.chunk_bytes.get() as usize];
    for index in 0..tree.nodes.len() {
        let path = tree.path(source, index as NodeIndex);
        let Body::Regular { identity, chunks } = &mut tree.nodes[index].body else { continue };
        if identity.bytes == 0 {
            continue;
        }
        let mut reading = Reading::open(&path, *identity)?;
        while let Some((plain, offset)) = reading.next_chunk(&mut buffer)? {
            chunks.push(writer.store(plain, &path, offset)?);
            progress(Progress::Stored { data_bytes: plain.len() as u64 });
        }
        chunks.shrink_to_fit();
    }
    writer.finish()
}

/// A file of the source under way.
struct Reading<'a> {
    path: &'a Path,
    file: File,
    scanned: Identity,
    offset: u64,
}

impl<'a> Reading<'a> {
    /// Opens `path`, which must still be what was scanned.
    fn open(path: &'a Path, scanned: Identity) -> Result<Self, BuildError> {
        // Neither follow a link nor wait for a fifo's writer, should the file have been replaced by one.
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = match options.open(path) {
            Ok(file) => file,
            // ELOOP: it is a link now.
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ELOOP) => {
                return Err(BuildError::Changed(path.to_path_buf()));
            }
            Err(error) => return Err(BuildError::io("open", path)(error)),
        };
        let reading = Self { path, file, scanned, offset: 0 };
        reading.check_unchanged()?;
        Ok(reading)
    }

    /// The next chunk and its offset in the file; `None` at the end, when the file is still what was scanned.
    fn next_chunk<'b>(&mut self, buffer: &'b mut [u8]) -> Result<Option<(&'b [u8], u64)>, BuildError> {
        let offset = self.offset;
        let left = self.scanned.bytes - offset;
        if left == 0 {
            self.check_unchanged()?;
            return Ok(None);
        }
        let len = left.min(buffer.len() as u64) as usize;
        let chunk = &mut buffer[..len];
        match self.file.read_exact(chunk) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(BuildError::Changed(self.path.to_path_buf()));
            }
            Err(error) => return Err(BuildError::io("read", self.path)(error)),
        }
        self.offset += len as u64;
        Ok(Some((chunk, offset)))
    }

    fn check_unchanged(&self) -> Result<(), BuildError> {
        let now = self.file.metadata().map_err(BuildError::io("look at", self.path))?;
        if Identity::of(&now) != self.scanned {
            return Err(BuildError::Changed(self.path.to_path_buf()));
        }
        Ok(())
    }
}
