//! The vhost-user control connection as a VMM drives it: every message in any order, polite or not.
//!
//! [`Control`] speaks single messages, so that a test can replay the exact order of a VMM, or break it; the orders
//! themselves are in [`super::orders`]. We do not use the `vhost` crate's frontend: it waits without a bound, refuses to
//! send what it thinks wrong, and shares its message code with the daemon under test.
//!
//! Source: QEMU's `docs/interop/vhost-user.rst` (11.0).

use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;

use super::error::HarnessError;
use super::memory::Region;

/// Bound of every wait for the daemon: "it happens", not "it is fast".
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Message numbers.
#[expect(missing_docs, reason = "named as in the specification, less VHOST_USER_")]
pub mod message {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Virtio and vhost-user feature bits.
#[expect(missing_docs, reason = "named as in the specifications")]
pub mod feature {
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;

    pub const P_MQ: u64 = 1 << 0;
    pub const P_REPLY_ACK: u64 = 1 << 3;
    pub const P_BACKEND_REQ: u64 = 1 << 5;
    pub const P_CONFIG: u64 = 1 << 9;
    pub const P_BACKEND_SEND_FD: u64 = 1 << 10;
    pub const P_INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const P_RESET_DEVICE: u64 = 1 << 13;
    pub const P_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const P_STATUS: u64 = 1 << 16;
}

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;
const LARGEST_PAYLOAD: usize = 4096;

/// Whether a message asks for an acknowledgement (NEED_REPLY).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// It does, and the answer is waited for.
    Wanted,
    /// It does not.
    No,
}

/// A control connection to a vhost-user daemon.
#[derive(Debug)]
pub struct Control {
    stream: UnixStream,
    acks: bool,
}

impl Control {
    /// Connects to the socket at `path`, trying again until [`PATIENCE`] is over.
    ///
    /// # Errors
    /// [`HarnessError::Timeout`] when nobody listens in time.
    pub fn connect(path: &Path) -> Result<Self, HarnessError> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self::from_stream(stream),
                Err(_) if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(HarnessError::io(format!("connect to {}", path.display()), error)),
            }
        }
    }

    /// Uses a connected socket.
    ///
    /// # Errors
    /// What setting its time limits answers.
    pub fn from_stream(stream: UnixStream) -> Result<Self, HarnessError> {
        stream
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            .map_err(|e| HarnessError::io("set the time limit of the connection", e))?;
        Ok(Self { stream, acks: false })
    }

    /// Sends one message as it is: any number, flags, payload, descriptors.
    ///
    /// # Errors
    /// [`HarnessError::Closed`] and [`HarnessError::Io`].
    pub fn send(&self, number: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), HarnessError> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(payload);
        self.send_raw(&bytes, fds).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => {
                HarnessError::Closed { message: number }
            }
            _ => HarnessError::io(format!("send message {number}"), error),
        })
    }

    /// Sends bytes that need not be a message.
    ///
    /// # Errors
    /// What the socket answers.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(std::io::Error::other("more descriptors than one message may carry"));
        }
        let sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        if sent != bytes.len() {
            return Err(std::io::Error::other("the socket took a part of the message only"));
        }
        Ok(())
    }

    /// Receives the answer to message `number`: payload and descriptors.
    ///
    /// # Errors
    /// [`HarnessError::Timeout`], [`HarnessError::Closed`], and [`HarnessError::Violation`] for a header that QEMU
    /// would not accept (flags exactly 0x5, the same number).
    pub fn receive(&self, number: u32) -> Result<(Vec<u8>, Vec<OwnedFd>), HarnessError> {
        let mut header = [0; HEADER_BYTES];
        let fds = self.receive_exactly(number, &mut header)?;
        let word = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let (answered, flags, len) = (word(0), word(4), word(8) as usize);
        if answered != number || flags != (VERSION | REPLY) || len > LARGEST_PAYLOAD {
            let what = format!("answer {answered}, flags {flags:#x}, {len} bytes, to message {number}");
            return Err(HarnessError::Violation(what));
        }
        let mut payload = vec![0; len];
        self.receive_exactly(number, &mut payload)?;
        Ok((payload, fds))
    }

    fn receive_exactly(&self, number: u32, bytes: &mut [u8]) -> Result<Vec<OwnedFd>, HarnessError> {
        let mut fds = Vec::new();
        let mut done = 0;
        while done < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes[done..])];
            match rustix::net::recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) if got.bytes == 0 => return Err(HarnessError::Closed { message: number }),
                Ok(got) => done += got.bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    let what = format!("an answer to message {number}");
                    return Err(HarnessError::Timeout { what, waited: PATIENCE });
                }
                Err(rustix::io::Errno::CONNRESET) => return Err(HarnessError::Closed { message: number }),
                Err(error) => return Err(HarnessError::io(format!("receive the answer to {number}"), error)),
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
        }
        Ok(fds)
    }

    /// Sends a message that has an answer of its own and receives it.
    ///
    /// # Errors
    /// As [`Control::send`] and [`Control::receive`].
    pub fn ask(&self, number: u32, payload: &[u8]) -> Result<Vec<u8>, HarnessError> {
        self.send(number, VERSION, payload, &[])?;
        Ok(self.receive(number)?.0)
    }

    /// Sends a message without an answer of its own; with [`Ack::Wanted`], and REPLY_ACK in force, waits for its
    /// acknowledgement.
    ///
    /// # Errors
    /// [`HarnessError::Refused`], and as [`Control::send`] and [`Control::receive`].
    pub fn tell(&self, number: u32, payload: &[u8], fds: &[BorrowedFd<'_>], ack: Ack) -> Result<(), HarnessError> {
        if ack == Ack::No || !self.acks {
            return self.send(number, VERSION, payload, fds);
        }
        self.send(number, VERSION | NEED_REPLY, payload, fds)?;
        match u64_of(&self.receive(number)?.0)? {
            0 => Ok(()),
            code => Err(HarnessError::Refused { message: number, code }),
        }
    }

    /// Asks for a number: GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_MAX_MEM_SLOTS.
    ///
    /// # Errors
    /// As [`Control::ask`].
    pub fn ask_u64(&self, number: u32) -> Result<u64, HarnessError> {
        u64_of(&self.ask(number, &[])?)
    }

    /// SET_PROTOCOL_FEATURES; acknowledgements are possible from then on if `features` has REPLY_ACK, and already for
    /// this message with [`Ack::Wanted`].
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn set_protocol_features(&mut self, features: u64, ack: Ack) -> Result<(), HarnessError> {
        self.acks = features & feature::P_REPLY_ACK != 0;
        self.tell(message::SET_PROTOCOL_FEATURES, &features.to_le_bytes(), &[], ack)
    }

    /// SET_MEM_TABLE with `regions`.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn set_mem_table(&self, regions: &[&Region], ack: Ack) -> Result<(), HarnessError> {
        let mut payload = Vec::new();
        payload.extend_from_slice(&(regions.len() as u32).to_le_bytes());
        payload.extend_from_slice(&[0; 4]);
        regions.iter().for_each(|region| payload.extend_from_slice(&region_bytes(region)));
        let fds: Vec<_> = regions.iter().map(|r| r.fd()).collect();
        self.tell(message::SET_MEM_TABLE, &payload, &fds, ack)
    }

    /// ADD_MEM_REG.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn add_region(&self, region: &Region, ack: Ack) -> Result<(), HarnessError> {
        let payload = [[0; 8].as_slice(), &region_bytes(region)].concat();
        self.tell(message::ADD_MEM_REG, &payload, &[region.fd()], ack)
    }

    /// REM_MEM_REG.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn remove_region(&self, region: &Region, ack: Ack) -> Result<(), HarnessError> {
        let payload = [[0; 8].as_slice(), &region_bytes(region)].concat();
        self.tell(message::REM_MEM_REG, &payload, &[], ack)
    }

    /// A message about one ring that carries a number: SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn ring_number(&self, number: u32, ring: u16, value: u32, ack: Ack) -> Result<(), HarnessError> {
        self.tell(number, &ring_state(ring, value), &[], ack)
    }

    /// SET_VRING_ADDR with user addresses.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn ring_addresses(&self, ring: u16, at: &RingAddresses, ack: Ack) -> Result<(), HarnessError> {
        let mut payload = ring_state(ring, 0).to_vec();
        for address in [at.descriptors, at.used, at.available, 0] {
            payload.extend_from_slice(&address.to_le_bytes());
        }
        self.tell(message::SET_VRING_ADDR, &payload, &[], ack)
    }

    /// A message that hands over an event descriptor: SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn ring_event(&self, number: u32, ring: u16, fd: BorrowedFd<'_>, ack: Ack) -> Result<(), HarnessError> {
        self.tell(number, &u64::from(ring).to_le_bytes(), &[fd], ack)
    }

    /// GET_VRING_BASE: stops the ring; the number of the next available entry.
    ///
    /// # Errors
    /// As [`Control::ask`].
    pub fn stop_ring(&self, ring: u16) -> Result<u16, HarnessError> {
        let answer = self.ask(message::GET_VRING_BASE, &ring_state(ring, 0))?;
        match answer.as_slice() {
            [index @ .., a, b, 0, 0] if index == u32::from(ring).to_le_bytes() => Ok(u16::from_le_bytes([*a, *b])),
            _ => Err(HarnessError::Violation(format!("GET_VRING_BASE answered {answer:?}"))),
        }
    }

    /// GET_CONFIG of `len` bytes from `offset`.
    ///
    /// # Errors
    /// As [`Control::ask`].
    pub fn config(&self, offset: u32, len: u32, flags: u32) -> Result<Vec<u8>, HarnessError> {
        let mut payload = [offset, len, flags].iter().flat_map(|n: &u32| n.to_le_bytes()).collect::<Vec<u8>>();
        payload.resize(payload.len() + len as usize, 0);
        let answer = self.ask(message::GET_CONFIG, &payload)?;
        match answer.get(12..) {
            Some(config) if config.len() == len as usize => Ok(config.to_vec()),
            _ => Err(HarnessError::Violation(format!("{} bytes answer GET_CONFIG of {len}", answer.len()))),
        }
    }

    /// Whether the daemon has closed the connection, or does so within [`PATIENCE`].
    pub fn is_closed(&self) -> bool {
        let mut byte = [0];
        let mut space = [];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut byte)];
        match rustix::net::recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::PEEK) {
            Ok(got) => got.bytes == 0,
            Err(error) => error == rustix::io::Errno::CONNRESET,
        }
    }
}

/// User addresses of the three parts of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

fn ring_state(ring: u16, value: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&u32::from(ring).to_le_bytes());
    bytes[4..].copy_from_slice(&value.to_le_bytes());
    bytes
}

fn region_bytes(region: &Region) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (place, number) in bytes.chunks_exact_mut(8).zip([region.start(), region.size(), region.user_start(), 0]) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

fn u64_of(payload: &[u8]) -> Result<u64, HarnessError> {
    let bytes = payload.try_into().map_err(|_| HarnessError::Violation(format!("a number of {payload:?}")))?;
    Ok(u64::from_le_bytes(bytes))
}
