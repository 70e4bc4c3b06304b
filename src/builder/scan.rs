//! First pass: names, attributes, xattrs and link targets of everything below the source.
//!
//! Symbolic links are never followed and no file is opened. Recursion is a list, so depth costs no stack.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::BuildError;
use super::Progress;
use super::tree::Body;
use super::tree::Identity;
use super::tree::Node;
use super::tree::NodeIndex;
use super::tree::Tree;
use super::xattr::XattrReader;
use crate::limits::MAX_NAME_BYTES;
use crate::limits::MAX_PATHS;
use crate::limits::MAX_SYMLINK_BYTES;

impl Identity {
    /// The state that `metadata` shows.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            file: (metadata.dev(), metadata.ino()),
            bytes: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Reads the tree below `source`, an absolute path without symbolic links.
pub fn scan(source: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Tree, BuildError> {
    let metadata = source.symlink_metadata().map_err(BuildError::io("look at", source))?;
    if !metadata.is_dir() {
        return Err(BuildError::NotADirectory(source.to_path_buf()));
    }
    let mut scan = Scan {
        tree: Tree { nodes: Vec::new(), directories: Vec::new() },
        first_names: HashMap::new(),
        xattrs: XattrReader::new(),
    };
    let mut root = scan.node(source, Box::default(), 0, &metadata)?;
    // The root's time is the moment when somebody made a directory to build from; upstream drops it as well.
    root.mtime = 0;
    root.mtime_ns = 0;
    scan.tree.nodes.push(root);

    let mut pending = vec![0];
    while let Some(directory) = pending.pop() {
        let path = scan.tree.path(source, directory);
        let children = scan.children(&path, directory)?;
        let is_directory = |index: &NodeIndex| matches!(scan.tree.node(*index).body, Body::Directory(_));
        // In reverse: the list is taken from its end, and the walk wants the first name first.
        pending.extend(children.rev().filter(is_directory));
        progress(Progress::Scanning { paths: scan.tree.nodes.len() as u64 });
    }
    Ok(scan.tree)
}

struct Scan {
    tree: Tree,
    /// First path of each inode that has several names: (device, inode number) to node.
    first_names: HashMap<(u64, u64), NodeIndex>,
    xattrs: XattrReader,
}

impl Scan {
    /// Appends the children of `directory` to the tree, and says which they are.
    fn children(&mut self, path: &Path, directory: NodeIndex) -> Result<std::ops::Range<NodeIndex>, BuildError> {
        let mut names = Vec::new();
        for entry in path.read_dir().map_err(BuildError::io("read directory", path))? {
            let entry = entry.map_err(BuildError::io("read directory", path))?;
            names.push(entry.file_name().into_vec().into_boxed_slice());
        }
        names.sort_unstable();

        let first = self.tree.nodes.len() as NodeIndex;
        let mut directories = 0;
        for name in names {
            let child = path.join(std::ffi::OsStr::from_bytes(&name));
            if name.len() > MAX_NAME_BYTES {
                return Err(BuildError::format(&child, format!("a name of {} bytes", name.len()), "255"));
            }
            if self.tree.nodes.len() >= MAX_PATHS as usize {
                return Err(BuildError::format(&child, "too many paths", MAX_PATHS.to_string()));
            }
            let metadata = child.symlink_metadata().map_err(BuildError::io("look at", &child))?;
            let node = self.linked_or_new(&child, name, directory, &metadata)?;
            directories += u32::from(metadata.is_dir());
            self.tree.nodes.push(node);
        }
        let children = first..self.tree.nodes.len() as NodeIndex;
        let node = &mut self.tree.nodes[directory as usize];
        node.nlink = 2 + directories;
        node.body = Body::Directory(children.clone());
        self.tree.directories.push(directory);
        Ok(children)
    }

    fn linked_or_new(
        &mut self,
        path: &Path,
        name: Box<[u8]>,
        parent: NodeIndex,
        metadata: &Metadata,
    ) -> Result<Node, BuildError> {
        if metadata.is_dir() || metadata.nlink() < 2 {
            return self.node(path, name, parent, metadata);
        }
        let index = self.tree.nodes.len() as NodeIndex;
        let first = *self.first_names.entry((metadata.dev(), metadata.ino())).or_insert(index);
        if first == index {
            return self.node(path, name, parent, metadata);
        }
        let known = &mut self.tree.nodes[first as usize];
        known.nlink += 1;
        let (mode, uid, gid) = (known.mode, known.uid, known.gid);
        let (mtime, mtime_ns, nlink) = (known.mtime, known.mtime_ns, known.nlink);
        let xattrs = Box::default();
        Ok(Node { parent, name, mode, uid, gid, nlink, mtime, mtime_ns, xattrs, body: Body::Link(first) })
    }

    fn node(
        &mut self,
        path: &Path,
        name: Box<[u8]>,
        parent: NodeIndex,
        metadata: &Metadata,
    ) -> Result<Node, BuildError> {
        let mode = metadata.mode();
        let body = match mode & libc::S_IFMT {
            libc::S_IFDIR => Body::Directory(0..0),
            libc::S_IFREG => Body::Regular { identity: Identity::of(metadata), chunks: Vec::new() },
            libc::S_IFLNK => Body::Symlink(read_target(path)?),
            // Linux packs both numbers into the low half; the upper half is for numbers it does not hand out.
            libc::S_IFCHR | libc::S_IFBLK => Body::Device(metadata.rdev() as u32),
            libc::S_IFIFO | libc::S_IFSOCK => Body::Special,
            other => return Err(BuildError::format(path, format!("unknown file type {other:#o}"), "seven types")),
        };
        Ok(Node {
            parent,
            name,
            mode: mode as u16, // type and permissions are the low 16 bits
            uid: metadata.uid(),
            gid: metadata.gid(),
            nlink: 1,
            mtime: metadata.mtime(),
            mtime_ns: metadata.mtime_nsec() as u32, // below 10^9
            xattrs: self.xattrs.read_encoded(path)?,
            body,
        })
    }
}

fn read_target(path: &Path) -> Result<Box<[u8]>, BuildError> {
    let target = path.read_link().map_err(BuildError::io("read link", path))?.into_os_string().into_vec();
    if target.len() as u64 > MAX_SYMLINK_BYTES || target.is_empty() {
        return Err(BuildError::format(path, format!("a link target of {} bytes", target.len()), "1 to 4095"));
    }
    Ok(target.into_boxed_slice())
}
