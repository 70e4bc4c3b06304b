//! The file systems that a device serves.
//!
//! A file system knows its own inodes only. The node ids of the wire come from [`ids::NodeIds`], which whoever mounts
//! it hands in with each request.

pub mod ids;
pub mod image;
