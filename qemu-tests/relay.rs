//! A relay between User-Mode Linux and a vhost-user daemon.
//!
//! User-Mode Linux sends SET_MEM_TABLE with room for two regions, whatever the count in it says; the request handler of
//! our daemon takes tables of the exact size only. The relay cuts that message off behind its last region, and passes
//! everything else as it is, descriptors included.

use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;

/// Request, flags and size of the payload, four bytes each.
const HEADER_BYTES: usize = 12;
/// No message of either side is larger.
const LARGEST_PAYLOAD: usize = 4096;
/// Most descriptors of a message.
const MOST_DESCRIPTORS: usize = 8;
const SET_MEM_TABLE: u32 = 5;
const TABLE_HEADER_BYTES: usize = 8;
const REGION_BYTES: usize = 32;

/// Relays the next connection at `listener` to `daemon`, from threads that end with it.
pub fn start(listener: UnixListener, daemon: &Path) -> Result<()> {
    let daemon = UnixStream::connect(daemon).context("the relay's connection to the daemon")?;
    std::thread::spawn(move || {
        // Who waits for either side sees the other one's end; there is nobody else to tell.
        let Ok((guest, _)) = listener.accept() else { return };
        let (Ok(from_daemon), Ok(to_guest)) = (daemon.try_clone(), guest.try_clone()) else { return };
        std::thread::spawn(move || pass(&from_daemon, &to_guest));
        pass(&guest, &daemon);
    });
    Ok(())
}

/// Passes messages until one side ends, and then ends the other.
fn pass(from: &UnixStream, to: &UnixStream) {
    while let Ok(true) = pass_one(from, to) {}
    // Best effort: it may have ended by itself.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// Passes one message; `false` at the end.
fn pass_one(from: &UnixStream, to: &UnixStream) -> Result<bool> {
    let mut descriptors = Vec::new();
    let mut message = vec![0; HEADER_BYTES];
    if !receive(from, &mut message, &mut descriptors)? {
        return Ok(false);
    }
    let word = |message: &[u8], at: usize| u32::from_le_bytes(message[at..at + 4].try_into().expect("four bytes"));
    let (request, size) = (word(&message, 0), word(&message, 8) as usize);
    ensure!(size <= LARGEST_PAYLOAD, "message {request} of {size} bytes");
    message.resize(HEADER_BYTES + size, 0);
    ensure!(receive(from, &mut message[HEADER_BYTES..], &mut descriptors)?, "half a message");
    if request == SET_MEM_TABLE && size >= TABLE_HEADER_BYTES {
        let used = TABLE_HEADER_BYTES + word(&message, HEADER_BYTES) as usize * REGION_BYTES;
        message.truncate(HEADER_BYTES + used.min(size));
        let size = (message.len() - HEADER_BYTES) as u32;
        message[8..HEADER_BYTES].copy_from_slice(&size.to_le_bytes());
    }
    send(to, &message, &descriptors)?;
    Ok(true)
}

/// Fills `bytes`; `false` where the connection ends before the first of them.
fn receive(from: &UnixStream, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> Result<bool> {
    let mut done = 0;
    while done < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes[done..])];
        let got = rustix::net::recvmsg(from, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if got.bytes == 0 {
            ensure!(done == 0, "half a message");
            return Ok(false);
        }
        done += got.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
    }
    Ok(true)
}

fn send(to: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<()> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        ensure!(control.push(SendAncillaryMessage::ScmRights(&borrowed)), "{} descriptors", borrowed.len());
    }
    let sent = rustix::net::sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    ensure!(sent == bytes.len(), "the socket took a part of the message only");
    Ok(())
}
