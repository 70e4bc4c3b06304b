//! The source as a flat list of inodes, in the order in which the image numbers them.
//!
//! The root is first. Each directory's children, sorted by name bytes, stand next to each other, in the order in which
//! a depth-first walk enters the directories; so a node's position plus one is its build-order inode number.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::path::PathBuf;

/// Position of a node in [`Tree::nodes`].
pub type NodeIndex = u32;

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Device and inode number.
    pub file: (u64, u64),
    /// Length.
    pub bytes: u64,
    /// Modification time, seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Change time, seconds and nanoseconds.
    pub ctime: (i64, i64),
}

/// What an inode holds besides its attributes.
#[derive(Debug)]
pub enum Body {
    /// A directory and the run of its children.
    Directory(Range<NodeIndex>),
    /// A regular file: what it looked like when it was found, and, once stored, its chunks by index in the blob.
    Regular {
        /// The file as it was scanned.
        identity: Identity,
        /// One index per chunk.
        chunks: Vec<u32>,
    },
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// A character or block device and its number, as in the low 32 bits of `st_rdev`.
    Device(u32),
    /// A fifo or a socket.
    Special,
    /// One more name of an inode that stands earlier in the list.
    Link(NodeIndex),
}

/// One path of the source.
#[derive(Debug)]
pub struct Node {
    /// The directory it is in; the root is its own.
    pub parent: NodeIndex,
    /// Its name; empty for the root.
    pub name: Box<[u8]>,
    /// `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names of the inode in this tree; for a directory 2 and one for each child directory.
    pub nlink: u32,
    /// Modification time in seconds.
    pub mtime: i64,
    /// And nanoseconds.
    pub mtime_ns: u32,
    /// Extended attributes, encoded as they follow the inode; empty if there are none.
    pub xattrs: Box<[u8]>,
    /// What it holds.
    pub body: Body,
}

impl Node {
    /// The type in directory entries (format, section 4.7).
    pub fn file_type(&self) -> u8 {
        match u32::from(self.mode) & libc::S_IFMT {
            libc::S_IFREG => 1,
            libc::S_IFDIR => 2,
            libc::S_IFCHR => 3,
            libc::S_IFBLK => 4,
            libc::S_IFIFO => 5,
            libc::S_IFSOCK => 6,
            _ => 7,
        }
    }

    /// Length of a regular file; 0 for anything else.
    pub fn file_bytes(&self) -> u64 {
        match &self.body {
            Body::Regular { identity, .. } => identity.bytes,
            _ => 0,
        }
    }
}

/// All paths of the source.
#[derive(Debug)]
pub struct Tree {
    /// Every path, see the module's documentation for the order.
    pub nodes: Vec<Node>,
    /// The directories in the order in which a depth-first walk enters them.
    pub directories: Vec<NodeIndex>,
}

impl Tree {
    /// The node at `index`.
    pub fn node(&self, index: NodeIndex) -> &Node {
        &self.nodes[index as usize]
    }

    /// The node that holds the inode of the path at `index`: the first of several hard links.
    pub fn inode(&self, index: NodeIndex) -> NodeIndex {
        match self.node(index).body {
            Body::Link(first) => first,
            _ => index,
        }
    }

    /// Children of a directory; empty for anything else.
    pub fn children(&self, index: NodeIndex) -> Range<NodeIndex> {
        match &self.node(index).body {
            Body::Directory(children) => children.clone(),
            _ => 0..0,
        }
    }

    /// Where the node is found, below `source`.
    pub fn path(&self, source: &Path, index: NodeIndex) -> PathBuf {
        let mut names = Vec::new();
        let mut at = index;
        while at != 0 {
            let node = self.node(at);
            names.push(std::ffi::OsStr::from_bytes(&node.name));
            at = node.parent;
        }
        let mut path = source.to_path_buf();
        path.extend(names.iter().rev());
        path
    }

    /// Bytes of all regular files, each inode once.
    pub fn data_bytes(&self) -> u64 {
        self.nodes.iter().map(Node::file_bytes).sum()
    }

    /// Whether any inode has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.nodes.iter().any(|node| !node.xattrs.is_empty())
    }
}
