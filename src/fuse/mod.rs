//! The FUSE protocol: wire structs, decode, dispatch, encode, and the trait [`FileSystem`].
//!
//! Knows no device and no file system. A transport hands [`server::Server`] the bytes of a request and a
//! [`ReplySlot`]; the server decodes, and the file system completes the owned [`Reply`] now or later.

pub mod filesystem;
pub mod name;
pub mod operation;
pub mod reply;
pub mod slot;

pub use filesystem::FileSystem;
pub use filesystem::Request;
pub use name::Name;
pub use operation::Operation;
pub use reply::Reply;
pub use slot::ReplySlot;
