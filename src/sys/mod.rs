//! The only home of `unsafe`: memory maps with their SIGBUS guard, copies into guest memory, raw system calls.
//!
//! Knows nothing of images, FUSE or virtio rings. Everything here is either a safe type over an unsafe thing, or a
//! fact about the machine. No reference into a file map leaves this room: [`view::View`] copies out.

pub mod bitmap;
pub mod copy;
pub mod faults;
pub mod guard;
pub mod guest;
pub mod handover;
pub mod heap;
pub mod inherited;
pub mod lock;
pub mod machine;
pub mod signals;
pub mod sink;
pub mod sync;
pub mod view;
