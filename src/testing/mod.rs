//! Above all other rooms, for tests and benches only: the fake guest and VMM over real vrings, fault injection, trees.
//!
//! The fake guest is put together from the bottom up: [`memory`] (shared guest memory), [`driver`] (one split ring),
//! [`lane`] (FUSE requests over a ring, every completion checked), [`fuse_client`] (the bytes of requests and replies),
//! [`vmm`] (vhost-user messages), [`orders`] (in which order each VMM sends them), [`guest`] (all of it), [`tree`] (a
//! whole mount compared with a [`manifest`]). It knows a daemon by its socket, or as a [`process`], only; so it drives
//! any vhost-user-fs daemon, ours or a peer's. [`room`] is ours in this very process, over a [`fault`] backend.

pub mod deflate;
pub mod driver;
pub mod error;
pub mod fault;
pub mod fuse_client;
pub mod guest;
pub mod hostile;
#[cfg(test)]
mod house;
pub mod image;
pub mod lane;
pub mod make;
pub mod manifest;
pub mod memory;
pub mod orders;
pub mod process;
pub mod readback;
pub mod reference_layer;
pub mod room;
pub mod snapshot;
pub mod tree;
pub mod v5;
pub mod vmm;
