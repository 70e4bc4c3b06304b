//! A writer of `newc` cpio archives, as much as an initramfs needs
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;

/// Kernels take several archives one after the other; each starts on a multiple of this.
const ALIGN: usize = 512;

/// An archive under construction: regular files, and the directories above them.
pub struct Writer {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    serial: u32,
}

impl Writer {
    pub fn new() -> Self {
        Self { bytes: Vec::new(), directories: BTreeSet::new(), serial: 0 }
    }

    /// Adds a file under `path` (without a leading slash).
    pub fn file(&mut self, path: &str, content: &[u8], mode: u32) {
        let parents = path.match_indices('/').map(|(end, _)| &path[..end]);
        for parent in parents {
            if self.directories.insert(parent.to_owned()) {
                self.record(parent, &[], 0o040_755);
            }
        }
        self.record(path, content, 0o100_000 | mode);
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.record("TRAILER!!!", &[], 0);
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        self.bytes
    }

    fn record(&mut self, name: &str, content: &[u8], mode: u32) {
        self.serial += 1;
        let size = u32::try_from(content.len()).expect("files of an initramfs are below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.serial, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
