//! FUSE requests as a guest kernel builds them, and its reading of the replies.
//!
//! Written from `include/uapi/linux/fuse.h` (protocol 7.45) without a look at the daemon's own structures, so that the
//! two check each other. Pure: bytes in, bytes out.

use smallvec::SmallVec;

use super::error::HarnessError;

/// Bytes of `fuse_in_header`.
pub const IN_HEADER_BYTES: usize = 40;
/// Bytes of `fuse_out_header`.
pub const OUT_HEADER_BYTES: usize = 16;

/// Numbers of operations.
#[expect(missing_docs, reason = "named as in the kernel, less FUSE_")]
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const READLINK: u32 = 5;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const READDIRPLUS: u32 = 44;
    pub const LSEEK: u32 = 46;
    pub const STATX: u32 = 52;
}

/// Flags of INIT, 64 bits, the upper half in `flags2`.
#[expect(missing_docs, reason = "named as in the kernel, less FUSE_")]
pub mod init_flag {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const INIT_EXT: u64 = 1 << 30;

    /// What a Linux 6.12 guest offers over virtiofs when no DAX window is there (`fuse_send_init`).
    pub const LINUX_6_12: u64 = 0x01dd_7bff_fffb;
}

/// One request: everything but its unique number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Number of the operation.
    pub opcode: u32,
    /// The inode it is about.
    pub node: u64,
    /// What follows the header.
    pub body: SmallVec<[u8; 128]>,
    /// Bytes of reply body that the guest leaves room for; `None` when there is no reply area at all.
    pub room: Option<u32>,
    /// How many of them are a structure of fixed size; the rest lies in pages, as for READ.
    pub fixed_room: u32,
}

impl Request {
    /// Any operation with any body, and `room` bytes for the reply's body.
    pub fn new(opcode: u32, node: u64, body: &[u8], room: u32) -> Self {
        Self { opcode, node, body: SmallVec::from_slice(body), room: Some(room), fixed_room: room }
    }

    fn paged(opcode: u32, node: u64, body: &[u8], room: u32) -> Self {
        Self { opcode, node, body: SmallVec::from_slice(body), room: Some(room), fixed_room: 0 }
    }

    /// INIT as kernels since 5.17 send it: 64 bytes.
    pub fn init(minor: u32, flags: u64) -> Self {
        let mut body = words(&[7, minor, 1 << 20, flags as u32, (flags >> 32) as u32]);
        body.resize(64, 0);
        Self::new(opcode::INIT, 0, &body, 64)
    }

    /// INIT as kernels before 5.17 send it: 16 bytes.
    pub fn init_short(minor: u32, flags: u32) -> Self {
        Self::new(opcode::INIT, 0, &words(&[7, minor, 128 << 10, flags]), 64)
    }

    /// LOOKUP of `name` in `parent`.
    pub fn lookup(parent: u64, name: &[u8]) -> Self {
        Self::new(opcode::LOOKUP, parent, &terminated(&[], name), 128)
    }

    /// FORGET of `lookups`; no reply.
    pub fn forget(node: u64, lookups: u64) -> Self {
        Self { room: None, ..Self::new(opcode::FORGET, node, &lookups.to_le_bytes(), 0) }
    }

    /// BATCH_FORGET of (node, lookups); no reply.
    pub fn batch_forget(entries: &[(u64, u64)]) -> Self {
        let mut body = words(&[entries.len() as u32, 0]);
        entries.iter().for_each(|(node, lookups)| {
            body.extend_from_slice(&node.to_le_bytes());
            body.extend_from_slice(&lookups.to_le_bytes());
        });
        Self { room: None, ..Self::new(opcode::BATCH_FORGET, 0, &body, 0) }
    }

    /// GETATTR without a handle.
    pub fn getattr(node: u64) -> Self {
        Self::new(opcode::GETATTR, node, &[0; 16], 104)
    }

    /// STATX of the basic fields.
    pub fn statx(node: u64) -> Self {
        Self::new(opcode::STATX, node, &words(&[0, 0, 0, 0, 0, 0x7ff]), 288)
    }

    /// READ of `size` bytes at `offset`.
    pub fn read(node: u64, fh: u64, offset: u64, size: u32) -> Self {
        Self::paged(opcode::READ, node, &read_body(fh, offset, size), size)
    }

    /// READDIR from `offset` into `size` bytes.
    pub fn readdir(node: u64, fh: u64, offset: u64, size: u32) -> Self {
        Self::paged(opcode::READDIR, node, &read_body(fh, offset, size), size)
    }

    /// READDIRPLUS from `offset` into `size` bytes.
    pub fn readdirplus(node: u64, fh: u64, offset: u64, size: u32) -> Self {
        Self::paged(opcode::READDIRPLUS, node, &read_body(fh, offset, size), size)
    }

    /// READLINK.
    pub fn readlink(node: u64) -> Self {
        Self::paged(opcode::READLINK, node, &[], 4095)
    }

    /// OPEN with flags of open(2).
    pub fn open(node: u64, flags: u32) -> Self {
        Self::new(opcode::OPEN, node, &words(&[flags, 0]), 16)
    }

    /// OPENDIR.
    pub fn opendir(node: u64) -> Self {
        Self::new(opcode::OPENDIR, node, &words(&[0o200_000, 0]), 16)
    }

    /// RELEASE of a handle.
    pub fn release(node: u64, fh: u64) -> Self {
        Self::new(opcode::RELEASE, node, &handle_body(fh, 24), 0)
    }

    /// RELEASEDIR of a handle.
    pub fn releasedir(node: u64, fh: u64) -> Self {
        Self::new(opcode::RELEASEDIR, node, &handle_body(fh, 24), 0)
    }

    /// FLUSH of a handle.
    pub fn flush(node: u64, fh: u64) -> Self {
        Self::new(opcode::FLUSH, node, &handle_body(fh, 24), 0)
    }

    /// STATFS.
    pub fn statfs(node: u64) -> Self {
        Self::new(opcode::STATFS, node, &[], 80)
    }

    /// GETXATTR; `size` 0 asks for the length.
    pub fn getxattr(node: u64, name: &[u8], size: u32) -> Self {
        let body = terminated(&words(&[size, 0]), name);
        if size == 0 {
            Self::new(opcode::GETXATTR, node, &body, 8)
        } else {
            Self::paged(opcode::GETXATTR, node, &body, size)
        }
    }

    /// LISTXATTR; `size` 0 asks for the length.
    pub fn listxattr(node: u64, size: u32) -> Self {
        let body = words(&[size, 0]);
        if size == 0 {
            Self::new(opcode::LISTXATTR, node, &body, 8)
        } else {
            Self::paged(opcode::LISTXATTR, node, &body, size)
        }
    }

    /// LSEEK.
    pub fn lseek(node: u64, fh: u64, offset: u64, whence: u32) -> Self {
        let mut body = handle_body(fh, 8);
        body.extend_from_slice(&offset.to_le_bytes());
        body.extend_from_slice(&words(&[whence, 0]));
        Self::new(opcode::LSEEK, node, &body, 8)
    }

    /// DESTROY.
    pub fn destroy() -> Self {
        Self::new(opcode::DESTROY, 0, &[], 0)
    }

    /// Bytes of the whole request.
    pub fn len(&self) -> usize {
        IN_HEADER_BYTES + self.body.len()
    }

    /// Never: a request has a header.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The header, for request number `unique`.
    pub fn header(&self, unique: u64) -> [u8; IN_HEADER_BYTES] {
        let mut header = [0; IN_HEADER_BYTES];
        header[..4].copy_from_slice(&(self.len() as u32).to_le_bytes());
        header[4..8].copy_from_slice(&self.opcode.to_le_bytes());
        header[8..16].copy_from_slice(&unique.to_le_bytes());
        header[16..24].copy_from_slice(&self.node.to_le_bytes());
        header
    }
}

fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn terminated(before: &[u8], name: &[u8]) -> Vec<u8> {
    [before, name, &[0]].concat()
}

fn handle_body(fh: u64, len: usize) -> Vec<u8> {
    let mut body = fh.to_le_bytes().to_vec();
    body.resize(len, 0);
    body
}

fn read_body(fh: u64, offset: u64, size: u32) -> [u8; 40] {
    let mut body = [0; 40];
    body[..8].copy_from_slice(&fh.to_le_bytes());
    body[8..16].copy_from_slice(&offset.to_le_bytes());
    body[16..20].copy_from_slice(&size.to_le_bytes());
    body
}

/// Reads little-endian fields one after another.
#[derive(Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The fields in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] when the reply is too short.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], HarnessError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(|| {
            HarnessError::Violation(format!("reply is short: {len} bytes wanted, {} left", self.0.len()))
        })?;
        self.0 = rest;
        Ok(taken)
    }

    /// The next number.
    ///
    /// # Errors
    /// As [`Fields::bytes`].
    pub fn u16(&mut self) -> Result<u16, HarnessError> {
        Ok(u16::from_le_bytes(self.bytes(2)?.try_into().expect("two bytes were taken")))
    }

    /// The next number.
    ///
    /// # Errors
    /// As [`Fields::bytes`].
    pub fn u32(&mut self) -> Result<u32, HarnessError> {
        Ok(u32::from_le_bytes(self.bytes(4)?.try_into().expect("four bytes were taken")))
    }

    /// The next number.
    ///
    /// # Errors
    /// As [`Fields::bytes`].
    pub fn u64(&mut self) -> Result<u64, HarnessError> {
        Ok(u64::from_le_bytes(self.bytes(8)?.try_into().expect("eight bytes were taken")))
    }

    /// Whether all is read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// `struct fuse_attr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "fields are those of the kernel")]
pub struct Attributes {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: i64,
    pub mtime: i64,
    pub ctime: i64,
    pub atime_ns: u32,
    pub mtime_ns: u32,
    pub ctime_ns: u32,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub blksize: u32,
    pub flags: u32,
}

impl Attributes {
    fn parse(fields: &mut Fields<'_>) -> Result<Self, HarnessError> {
        Ok(Self {
            ino: fields.u64()?,
            size: fields.u64()?,
            blocks: fields.u64()?,
            atime: fields.u64()? as i64,
            mtime: fields.u64()? as i64,
            ctime: fields.u64()? as i64,
            atime_ns: fields.u32()?,
            mtime_ns: fields.u32()?,
            ctime_ns: fields.u32()?,
            mode: fields.u32()?,
            nlink: fields.u32()?,
            uid: fields.u32()?,
            gid: fields.u32()?,
            rdev: fields.u32()?,
            blksize: fields.u32()?,
            flags: fields.u32()?,
        })
    }

    /// The answer of GETATTR; how long it may be believed, in seconds.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] when the size is not that of `fuse_attr_out`.
    pub fn from_getattr(body: &[u8]) -> Result<(Self, u64), HarnessError> {
        let mut fields = Fields::new(body);
        let valid = fields.u64()?;
        fields.u64()?;
        let attributes = Self::parse(&mut fields)?;
        complete(&fields, attributes).map(|attributes| (attributes, valid))
    }

    /// Major and minor of a device node: the kernel's `new_decode_dev`.
    pub fn device(&self) -> (u32, u32) {
        ((self.rdev & 0xfff00) >> 8, (self.rdev & 0xff) | ((self.rdev >> 12) & 0xfff00))
    }
}

/// `struct fuse_entry_out`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryReply {
    /// Node id, 0 for a name that does not exist.
    pub node: u64,
    /// Generation.
    pub generation: u64,
    /// Seconds that the name may be believed.
    pub entry_valid: u64,
    /// Seconds that the attributes may be believed.
    pub attr_valid: u64,
    /// The attributes.
    pub attributes: Attributes,
}

impl EntryReply {
    fn parse(fields: &mut Fields<'_>) -> Result<Self, HarnessError> {
        let (node, generation, entry_valid) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let attr_valid = fields.u64()?;
        fields.u64()?;
        let attributes = Attributes::parse(fields)?;
        Ok(Self { node, generation, entry_valid, attr_valid, attributes })
    }

    /// The answer of LOOKUP.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] when the size is not that of `fuse_entry_out`.
    pub fn from_lookup(body: &[u8]) -> Result<Self, HarnessError> {
        let mut fields = Fields::new(body);
        let entry = Self::parse(&mut fields)?;
        complete(&fields, entry)
    }
}

/// One entry of READDIR or READDIRPLUS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Inode number.
    pub ino: u64,
    /// Offset of the entry behind it.
    pub next: u64,
    /// `DT_*`.
    pub kind: u32,
    /// The name.
    pub name: Vec<u8>,
    /// What READDIRPLUS adds.
    pub entry: Option<EntryReply>,
}

/// Which of the two listings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listing {
    /// READDIR.
    Plain,
    /// READDIRPLUS.
    Plus,
}

/// The entries of a READDIR or READDIRPLUS answer.
///
/// # Errors
/// [`HarnessError::Violation`] for what the kernel would refuse: an entry that is cut, an empty name, a slash in it.
pub fn directory_entries(body: &[u8], listing: Listing) -> Result<Vec<DirectoryEntry>, HarnessError> {
    let mut fields = Fields::new(body);
    let mut entries = Vec::new();
    while !fields.is_empty() {
        let entry = match listing {
            Listing::Plain => None,
            Listing::Plus => Some(EntryReply::parse(&mut fields)?),
        };
        let (ino, next) = (fields.u64()?, fields.u64()?);
        let (len, kind) = (fields.u32()? as usize, fields.u32()?);
        let name = fields.bytes(len)?.to_vec();
        fields.bytes(len.next_multiple_of(8) - len)?;
        if name.is_empty() || name.len() > 255 || name.contains(&b'/') {
            return Err(HarnessError::Violation(format!("directory entry named {name:?}")));
        }
        entries.push(DirectoryEntry { ino, next, kind, name, entry });
    }
    Ok(entries)
}

/// The answer of INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitReply {
    /// Protocol major.
    pub major: u32,
    /// Protocol minor.
    pub minor: u32,
    /// Largest read-ahead in bytes.
    pub max_readahead: u32,
    /// Flags, both halves.
    pub flags: u64,
    /// Largest write in bytes.
    pub max_write: u32,
    /// Largest request in pages, if MAX_PAGES is set.
    pub max_pages: u16,
}

impl InitReply {
    /// The answer of INIT to a guest of protocol minor `minor`.
    ///
    /// # Errors
    /// [`HarnessError::Violation`] when the size is not what a kernel of that minor takes.
    pub fn parse(body: &[u8], minor: u32) -> Result<Self, HarnessError> {
        let wanted = match minor {
            0..5 => 8,
            5..23 => 24,
            _ => 64,
        };
        if body.len() != wanted {
            return Err(HarnessError::Violation(format!("INIT of minor {minor} answered with {} bytes", body.len())));
        }
        let mut padded = body.to_vec();
        padded.resize(64, 0);
        let mut fields = Fields::new(&padded);
        let (major, minor, max_readahead, low) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
        fields.u32()?;
        let max_write = fields.u32()?;
        fields.u32()?;
        let max_pages = fields.u16()?;
        fields.u16()?;
        let high = if u64::from(low) & init_flag::INIT_EXT == 0 { 0 } else { fields.u32()? };
        let flags = u64::from(low) | u64::from(high) << 32;
        Ok(Self { major, minor, max_readahead, flags, max_write, max_pages })
    }
}

/// The handle and flags that OPEN and OPENDIR answer.
///
/// # Errors
/// [`HarnessError::Violation`] when the size is wrong.
pub fn opened(body: &[u8]) -> Result<(u64, u32), HarnessError> {
    let mut fields = Fields::new(body);
    let handle = (fields.u64()?, fields.u32()?);
    fields.u32()?;
    complete(&fields, handle)
}

fn complete<T>(fields: &Fields<'_>, value: T) -> Result<T, HarnessError> {
    if fields.is_empty() {
        Ok(value)
    } else {
        Err(HarnessError::Violation("reply is longer than its structure".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_header_names_its_whole_length() {
        let request = Request::lookup(1, b"name");
        let header = request.header(7);
        assert_eq!(header[..4], 45u32.to_le_bytes());
        assert_eq!(header[8..16], 7u64.to_le_bytes());
    }

    #[test]
    fn directory_entries_of_a_cut_answer_is_a_violation() {
        let mut body = vec![0; 24];
        body[16] = 3;
        body.extend_from_slice(b"abc\0\0\0\0\0");
        assert_eq!(directory_entries(&body, Listing::Plain).unwrap()[0].name, b"abc");
        assert!(directory_entries(&body[..28], Listing::Plain).is_err());
    }

    #[test]
    fn device_numbers_decode_as_in_the_kernel() {
        let attributes = Attributes { rdev: 0x0120_0567, ..Attributes::default() };
        assert_eq!(attributes.device(), (0x005, 0x01267));
    }
}
