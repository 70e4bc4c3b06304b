//! What one device serves: node ids to file systems, and the answers that hold for the whole device.
//!
//! There is one file system, at the root. Answers that switch an operation off for good (ENOSYS) are given here and
//! nowhere below, since a guest remembers them for the device, whatever is mounted in it.

#[cfg(test)]
#[cfg(feature = "testing")]
mod hostile_tests;
#[cfg(test)]
#[cfg(feature = "testing")]
mod tests;

use std::num::NonZeroU32;

use rustix::io::Errno;

use crate::fs::ids::NodeIds;
use crate::fs::image::ImageFs;
use crate::fuse::filesystem::FileSystem;
use crate::fuse::filesystem::InitPolicy;
use crate::fuse::filesystem::Request;
use crate::fuse::filesystem::Session;
use crate::fuse::operation::Operation;
use crate::fuse::reply::Reply;
use crate::fuse::slot::ReplySlot;

/// Serial of the mount at the root. It outlasts connections and sessions, as the mount does.
const FIRST_SERIAL: NonZeroU32 = NonZeroU32::MIN;

/// Whether guests open files without a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMessageOpen {
    /// Where nothing can be mounted later that would need open handles.
    WhereSafe,
    /// Even if something could be.
    Always,
    /// Never.
    Never,
}

/// Whether file systems can come and go while a guest looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mounts {
    /// What was given at start is all there will ever be.
    Fixed,
    /// There is a management API.
    Changeable,
}

/// What a device promises its guests beyond what its file systems are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Opening without a message.
    pub zero_message_open: ZeroMessageOpen,
    /// Whether other file systems may come.
    pub mounts: Mounts,
}

/// The tree of one device.
#[derive(Debug)]
pub struct Vfs {
    root: ImageFs,
    ids: NodeIds,
    policy: Policy,
}

impl Vfs {
    /// A device whose root is `root`.
    pub fn new(root: ImageFs, policy: Policy) -> Self {
        let ids = NodeIds::new(FIRST_SERIAL, root.root());
        Self { root, ids, policy }
    }
}

impl FileSystem for Vfs {
    fn init_policy(&self) -> InitPolicy {
        let zero_message_open = match self.policy.zero_message_open {
            ZeroMessageOpen::WhereSafe => self.policy.mounts == Mounts::Fixed,
            ZeroMessageOpen::Always => true,
            ZeroMessageOpen::Never => false,
        };
        InitPolicy { zero_message_open, export_support: true }
    }

    fn begin_session(&self, _session: &Session) {
        // An image keeps no lookups and no handles.
    }

    #[inline]
    fn call<S: ReplySlot>(&self, request: &Request<'_>, reply: Reply<S>) {
        let switched_off = match request.operation {
            // There is no birth time to tell, and a guest that is not told so asks at every stat(2).
            Operation::Statx { .. } | Operation::Other { .. } => true,
            // The root is never replaced under a guest, and nothing is mounted below it.
            Operation::Getxattr { .. } | Operation::Listxattr { .. } => !self.root.has_xattrs(),
            _ => false,
        };
        if switched_off {
            return reply.error(Errno::NOSYS);
        }
        match self.ids.to_inode(request.node) {
            Some(inode) => self.root.call(self.ids, inode, request, reply),
            // SYNCFS and STATFS name the root. FORGET is not answered, whatever it names.
            None => reply.error(Errno::STALE),
        }
    }
}
