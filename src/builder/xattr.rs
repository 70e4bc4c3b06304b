//! Extended attributes: read from the source, encoded as they follow a v6 inode (format, section 4.9).

use std::path::Path;

use rustix::io::Errno;

use super::BuildError;
use crate::limits::MAX_XATTR_LIST_BYTES;
use crate::limits::MAX_XATTR_VALUE_BYTES;

/// Bytes before the first entry.
const HEADER_BYTES: usize = 12;

/// Prefixes that the format has a number for, and their numbers. The names of the ACLs are nothing but prefix.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Most bytes of entries: the inode counts them in units of 4, less the header, in 16 bits.
const MAX_ENTRY_BYTES: usize = (u16::MAX as usize - 1) * 4;

/// Reads extended attributes, through buffers that it keeps.
pub struct XattrReader {
    list: Vec<u8>,
    value: Vec<u8>,
}

impl XattrReader {
    /// Buffers as large as the kernel's own limits.
    pub fn new() -> Self {
        Self { list: vec![0; MAX_XATTR_LIST_BYTES as usize], value: vec![0; MAX_XATTR_VALUE_BYTES as usize] }
    }

    /// The attributes of `path` itself (a link is not followed), sorted by name; empty if there are none, or if the
    /// file system has no such thing.
    pub fn read_encoded(&mut self, path: &Path) -> Result<Box<[u8]>, BuildError> {
        let listed = match rustix::fs::llistxattr(path, &mut self.list[..]) {
            Ok(listed) => listed,
            Err(Errno::NOTSUP) => 0,
            Err(errno) => return Err(BuildError::io("list extended attributes of", path)(errno.into())),
        };
        let mut names: Vec<&[u8]> = self.list[..listed].split(|byte| *byte == 0).filter(|n| !n.is_empty()).collect();
        names.sort_unstable();

        let mut encoded = Vec::new();
        for name in names {
            let Some((prefix, suffix)) = split(name) else {
                // Other names belong to the file system of the source (NFS ACLs, inode flags), not to the file.
                tracing::debug!(?path, name = %name.escape_ascii(), "extended attribute has no place in the format");
                continue;
            };
            let len = match rustix::fs::lgetxattr(path, name, &mut self.value[..]) {
                Ok(len) => len,
                Err(Errno::NODATA) => return Err(BuildError::Changed(path.to_path_buf())),
                Err(errno) => return Err(BuildError::io("read extended attributes of", path)(errno.into())),
            };
            let value = &self.value[..len];
            append(&mut encoded, prefix, suffix, value).ok_or_else(|| {
                let what = format!("extended attribute {} of {len} bytes", name.escape_ascii());
                BuildError::format(path, what, format!("65535 each, and {MAX_ENTRY_BYTES} together"))
            })?;
        }
        Ok(encoded.into_boxed_slice())
    }
}

/// The count that the inode states for an encoded list.
pub fn inode_count(encoded: &[u8]) -> u16 {
    match encoded.len() {
        0 => 0,
        len => ((len - HEADER_BYTES) / 4 + 1) as u16, // `append` bounds it
    }
}

/// The number of a name's prefix, and the rest of the name.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, number)| {
        let suffix = name.strip_prefix(*prefix)?;
        let is_whole = !prefix.ends_with(b".");
        (suffix.is_empty() == is_whole).then_some((*number, suffix))
    })
}

/// Appends one entry, and the header before the first; `None` if it does not fit.
fn append(encoded: &mut Vec<u8>, prefix: u8, suffix: &[u8], value: &[u8]) -> Option<()> {
    if encoded.is_empty() {
        encoded.resize(HEADER_BYTES, 0);
    }
    encoded.push(u8::try_from(suffix.len()).ok()?);
    encoded.push(prefix);
    encoded.extend_from_slice(&u16::try_from(value.len()).ok()?.to_le_bytes());
    encoded.extend_from_slice(suffix);
    encoded.extend_from_slice(value);
    encoded.resize(encoded.len().next_multiple_of(4), 0);
    (encoded.len() - HEADER_BYTES <= MAX_ENTRY_BYTES).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_knows_each_prefix_and_no_other() {
        let check = |name: &[u8], expected: Option<(u8, &[u8])>| assert_eq!(split(name), expected);
        check(b"user.a.b", Some((1, b"a.b")));
        check(b"system.posix_acl_access", Some((2, b"")));
        check(b"system.posix_acl_default", Some((3, b"")));
        check(b"trusted.t", Some((4, b"t")));
        check(b"security.capability", Some((6, b"capability")));
        check(b"system.posix_acl_access2", None);
        check(b"system.nfs4_acl", None);
        check(b"user.", None);
        check(b"users.a", None);
    }

    #[test]
    fn append_of_the_documented_pairs_gives_the_documented_bytes() {
        let mut encoded = Vec::new();
        append(&mut encoded, 4, b"t", b"root only").expect("fits");
        append(&mut encoded, 6, b"foo", b"bar").expect("fits");
        let expected = "000000000000000000000000\
                        0104090074726f6f74206f6e6c790000\
                        06030300";
        assert!(hex::encode(&encoded).starts_with(&expected[..24 + 32]));
        assert_eq!(inode_count(&encoded), 8);
        assert_eq!(encoded.len(), 40);
    }

    #[test]
    fn append_of_too_much_is_refused() {
        assert_eq!(append(&mut Vec::new(), 1, b"a", &[0; 65536]), None);
        assert_eq!(append(&mut Vec::new(), 1, &[b'a'; 256], b""), None);
        let mut encoded = Vec::new();
        let fitting = (0..10).take_while(|_| append(&mut encoded, 1, b"a", &[0; 65535]).is_some()).count();
        assert_eq!(fitting, 3);
    }
}
