//! The trait that file systems implement.

use super::operation::Operation;
use super::reply::Reply;
use super::slot::ReplySlot;

/// Id of an inode on the wire. 1 is the root of the device.
pub type NodeId = u64;

/// Node id of the root of a device (`FUSE_ROOT_ID`).
pub const ROOT_NODE: NodeId = 1;

/// One decoded request.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The kernel's id of the request.
    pub unique: u64,
    /// The inode it is about.
    pub node: NodeId,
    /// User of the calling process, as the guest says.
    pub uid: u32,
    /// Group of the calling process, as the guest says.
    pub gid: u32,
    /// The calling process, as the guest says.
    pub pid: u32,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// What a file system wants negotiated at FUSE_INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitPolicy {
    /// Answer OPEN, OPENDIR and FLUSH with ENOSYS once, if the guest offers NO_OPEN_SUPPORT and NO_OPENDIR_SUPPORT:
    /// it then opens without a message and caches files and directories for ever.
    pub zero_message_open: bool,
    /// Answer LOOKUP of `.` and `..` (EXPORT_SUPPORT).
    pub export_support: bool,
}

/// What INIT settled, told to the file system at the start of each session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// Protocol minor in force.
    pub minor: u32,
    /// OPEN and FLUSH are answered ENOSYS.
    pub no_open: bool,
    /// OPENDIR is answered ENOSYS.
    pub no_opendir: bool,
}

/// A file system, or a tree of them.
///
/// `call` never blocks on a network or on another request. It completes `reply` before it returns, or moves it into
/// whatever completes it later. It is called by many threads at once.
pub trait FileSystem: Send + Sync + 'static {
    /// What to negotiate. Asked at every INIT.
    fn init_policy(&self) -> InitPolicy;

    /// A new session has begun: the guest holds no lookup and no handle any more. Called before INIT is answered.
    fn begin_session(&self, session: &Session);

    /// Serves one request.
    fn call<S: ReplySlot>(&self, request: &Request<'_>, reply: Reply<S>);
}
