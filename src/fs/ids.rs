//! Node ids of the wire: which mount, and which inode of it.

use std::num::NonZeroU32;

use crate::fuse::filesystem::NodeId;
use crate::fuse::filesystem::ROOT_NODE;

/// Translates between the inodes of the mount at the root of the device and node ids.
///
/// Node id = serial << 32 | inode. A serial names one mounting of one file system and is never used again, so that
/// nothing a guest has cached of an old mount can meet a new one. The mount's own root is node 1, always and
/// everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeIds {
    serial: NonZeroU32,
    root: u32,
}

impl NodeIds {
    /// The ids of the mount `serial`, whose root directory is the inode `root`.
    pub fn new(serial: NonZeroU32, root: u32) -> Self {
        Self { serial, root }
    }

    /// The node id of an inode.
    #[inline]
    pub fn to_node(self, inode: u32) -> NodeId {
        if inode == self.root { ROOT_NODE } else { u64::from(self.serial.get()) << 32 | u64::from(inode) }
    }

    /// The inode of a node id; `None` for an id of another mount, or none at all. The inode need not exist.
    #[inline]
    pub fn to_inode(self, node: NodeId) -> Option<u32> {
        if node == ROOT_NODE {
            return Some(self.root);
        }
        let [serial, inode] = [node >> 32, node & u64::from(u32::MAX)].map(|half| u32::try_from(half).unwrap_or(0));
        (serial == self.serial.get() && inode != self.root).then_some(inode)
    }

    /// The inode of the root directory.
    pub fn root(self) -> u32 {
        self.root
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn root_is_node_one_and_has_no_other_id() {
        let ids = NodeIds::new(NonZeroU32::new(7).unwrap(), 36);
        assert_eq!((ids.to_node(36), ids.to_inode(1)), (1, Some(36)));
        assert_eq!(ids.to_node(37), 7 << 32 | 37);
        for stranger in [0, 2, 37, 36 | 7 << 32, 37 | 6 << 32, u64::MAX] {
            assert_eq!(ids.to_inode(stranger), None, "{stranger:#x}");
        }
    }

    proptest! {
        #[test]
        fn every_inode_comes_back(serial in 1u32.., root: u32, inode: u32) {
            let ids = NodeIds::new(NonZeroU32::new(serial).unwrap(), root);
            prop_assert_eq!(ids.to_inode(ids.to_node(inode)), Some(inode));
        }
    }
}
