//! The transport's side of a reply.

use rustix::io::Errno;

use crate::sys::sink::Sink;

/// Bytes of `fuse_out_header` (`include/uapi/linux/fuse.h`).
pub const OUT_HEADER_BYTES: usize = 16;

/// A place for exactly one reply: the writable part of a descriptor chain, or `/dev/fuse`.
///
/// Whoever holds it completes it by one of the consuming methods. Dropping it without completing answers EIO, so no
/// request is ever lost. The transport may keep what it is given and publish it later (a paused ring); that is why a
/// data reply's closure owns what it copies.
pub trait ReplySlot: Sized + Send + 'static {
    /// Bytes the requester left for the whole reply, its header included; less than [`OUT_HEADER_BYTES`] when no reply
    /// can be given.
    fn capacity(&self) -> usize;

    /// Completes with `parts`, in order; the first 16 bytes are the `fuse_out_header`. The caller has made sure that
    /// the parts fit.
    fn send(self, parts: &[&[u8]]);

    /// Completes with bytes that `fill` puts behind the header, straight into the requester's memory. `fill` returns
    /// how many bytes it put; on an error the reply is that error, without a body.
    fn send_data<F>(self, unique: u64, fill: F)
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send + 'static;

    /// Completes a request that gets no reply (FORGET): used length 0.
    fn send_nothing(self);
}
