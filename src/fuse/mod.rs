//! The FUSE protocol: wire structs, decode, dispatch, encode, and the trait [`FileSystem`].
//!
//! Knows no device and no file system. A transport hands [`server::Server`] the bytes of a request and a
//! [`ReplySlot`]; the server decodes, and the file system completes the owned [`Reply`] now or later.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects, clippy::indexing_slicing))]

mod counted;
mod decode;
mod directory;
pub mod filesystem;
mod init;
pub(crate) mod limiter;
pub mod name;
pub mod opcode;
pub mod operation;
#[cfg(test)]
pub(crate) mod recording;
pub mod reply;
pub mod server;
#[cfg(test)]
mod server_tests;
pub mod slot;
pub mod wire;

pub use filesystem::FileSystem;
pub use filesystem::Request;
pub use name::Name;
pub use operation::Operation;
pub use reply::Reply;
pub use server::Server;
pub use slot::ReplySlot;
