//! The daemon driven by the fake guest: everything between a vhost-user socket and the bytes of an image.

#![expect(clippy::unwrap_used, reason = "a test may fail at any step")]

mod bad_requests;
mod bad_rings;
mod cache_modes;
mod cached;
mod crash;
mod damage;
mod frontends;
mod hostile;
mod init;
mod many;
mod memory;
mod mounts;
mod orders;
mod parked;
mod peer;
mod random;
mod rogue;
mod shared;
mod soak;
mod steps;
mod support;
mod trees;
