//! nydusd for virtual machines: RAFS images served lazily over vhost-user-fs.
//!
//! The rooms, from the street inwards; imports run downward in this list only (`ARCHITECTURE.md` says why):
//! [`cli`], [`daemon`], [`config`], [`device`], [`vfs`], [`fs`], [`fuse`], [`builder`], [`storage`], [`rafs`],
//! [`metrics`], [`sys`], [`limits`]. `testing` stands above all of them and ships in no release.

pub mod builder;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod device;
pub mod fs;
pub mod fuse;
pub mod limits;
pub mod metrics;
pub mod rafs;
pub mod storage;
pub mod sys;
#[cfg(feature = "testing")]
pub mod testing;
pub mod vfs;
