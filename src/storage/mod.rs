//! From a read plan to verified bytes: chunk states, cache files, codecs, backends.
//!
//! Knows blobs and chunks, not files, inodes or guests. Every byte that leaves was verified where the image carries
//! digests. Reads of ready chunks cost no lock and no system call; everything else is parked and costs no thread.
//!
//! - [`store`]: what the file systems use;
//! - [`cache`]: files in the cache directory, shared with other processes and in upstream's format;
//! - [`backend`]: where blobs come from; [`codec`]: stored bytes to plain ones;
//! - [`audit`]: whole blobs, for `nydus-image check`;
//! - [`pool`]: the only threads of this room; [`steps`]: where a fill can be cut short.

pub mod audit;
pub mod backend;
pub mod cache;
pub mod codec;
pub mod pool;
pub mod steps;
pub mod store;
pub mod sync;
