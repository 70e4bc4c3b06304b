//! Where the parts of an inode are: what facts of an inode carry for the reader of its version, which alone knows what the
//! offsets mean.

/// Where an inode's parts are, by format version.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    V5(V5Place),
    V6(V6Place),
}

/// Where the parts of an inode record are.
#[derive(Debug, Clone, Copy)]
pub(super) struct V5Place {
    /// Offset of the record.
    pub(super) record: u64,
    /// Offset of the symlink target.
    pub(super) target: u64,
    /// Offset behind name and target: xattr table, then chunk array.
    pub(super) tail: u64,
    /// Inode of the parent directory; the root's is itself.
    pub(super) parent: u32,
    pub(super) child_index: u32,
    /// Children of a directory, chunks of a file.
    pub(super) child_count: u32,
    /// Bytes of each chunk of a file but the last.
    pub(super) chunk_bytes: u32,
    pub(super) has_xattrs: bool,
}

/// Where the data of an inode are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Nothing, or all of it at a block.
    Flat,
    /// Full blocks at a block, the tail behind the inode.
    FlatInline,
    /// Chunk indexes behind the inode.
    Chunks,
}

/// Where the parts of an inode are.
#[derive(Debug, Clone, Copy)]
pub(super) struct V6Place {
    /// Offset of the inode.
    pub(super) at: u64,
    /// Offset behind the inode itself, where its xattrs start.
    pub(super) xattrs: u64,
    /// Offset behind the xattrs; equal to `xattrs` without any.
    pub(super) xattrs_end: u64,
    /// Offset of what follows: inline tail or, aligned to 8, chunk indexes.
    pub(super) body: u64,
    pub(super) layout: Layout,
    /// First block of the data, where the layout has one.
    pub(super) block: u32,
}
