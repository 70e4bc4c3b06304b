//! Any bytes as FUSE requests to the server of a real image: each is answered once, as its kernel can take it.

use std::sync::mpsc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use nydus_vm::fuse::FileSystem;
use nydus_vm::fuse::Server;
use nydus_vm::fuse::slot::OUT_HEADER_BYTES;
use nydus_vm::fuse::slot::ReplySlot;
use nydus_vm::sys::sink::MemorySink;
use nydus_vm::sys::sink::Sink;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::fuse_client::opcode;
use rustix::io::Errno;

use crate::input::Input;
use crate::seeds::Seed;
use crate::served::world;

/// No request of a warm image takes this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Requests of one input.
const REQUESTS: usize = 64;

/// Bits of [`Record::flags`].
mod flag {
    /// The length field of the request is made right.
    pub const RIGHT_LENGTH: u8 = 1;
    /// The room is that number times 64.
    pub const LARGE_ROOM: u8 = 2;
    /// More of the request lies in the requester's memory than was copied.
    pub const LONGER: u8 = 4;
}

/// A request as it stands in an input: flags, room (16 bits), length (16 bits), bytes.
#[derive(Debug, Clone)]
pub struct Record {
    flags: u8,
    room: u16,
    /// The request, header included.
    pub bytes: Vec<u8>,
}

impl Record {
    /// What the fake guest sends as its request number `unique`.
    pub fn of(request: &Request, unique: u64) -> Self {
        let bytes = [request.header(unique).as_slice(), &request.body].concat();
        let capacity = request.room.map_or(0, |room| room as usize + OUT_HEADER_BYTES);
        let room = u16::try_from(capacity.div_ceil(64)).expect("rooms of the fake guest are small");
        Self { flags: flag::RIGHT_LENGTH | flag::LARGE_ROOM, room, bytes }
    }

    fn take(input: &mut Input<'_>) -> Self {
        let (flags, room, len) = (input.u8(), input.u16(), input.u16());
        let mut bytes = input.bytes(len.into()).to_vec();
        if flags & flag::RIGHT_LENGTH != 0 && bytes.len() >= 4 {
            let len = u32::try_from(bytes.len()).expect("it came from 16 bits");
            bytes[..4].copy_from_slice(&len.to_le_bytes());
        }
        Self { flags, room, bytes }
    }

    /// The record as input.
    pub fn to_bytes(&self) -> Vec<u8> {
        let len = u16::try_from(self.bytes.len()).expect("requests of the fake guest are short");
        [&[self.flags][..], &self.room.to_le_bytes(), &len.to_le_bytes(), &self.bytes].concat()
    }

    /// Bytes of the reply area.
    pub fn capacity(&self) -> usize {
        let unit = if self.flags & flag::LARGE_ROOM != 0 { 64 } else { 1 };
        usize::from(self.room) * unit
    }

    fn readable_bytes(&self) -> usize {
        let more = if self.flags & flag::LONGER != 0 { 1 << 17 } else { 0 };
        self.bytes.len() + more
    }
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// No reply.
    Nothing,
    /// A reply: its id, error number (0 or positive), and body.
    #[expect(missing_docs, reason = "named as in the protocol")]
    Reply { unique: u64, errno: i32, body: Vec<u8> },
    /// The slot was dropped, which a device answers with EIO.
    Dropped,
}

/// Sends one request and checks its ending.
pub fn ask<F: FileSystem>(server: &Server<F>, record: &Record) -> Ending {
    let (done, ended) = mpsc::sync_channel(4);
    let capacity = record.capacity();
    server.handle(&record.bytes, record.readable_bytes(), Slot { capacity, done: Some(done) });
    let ending = ended.recv_timeout(PATIENCE).expect("every request ends");
    assert!(ended.recv_timeout(Duration::ZERO).is_err(), "a request ends once");
    let word = |at: usize| record.bytes.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")));
    let (opcode, is_whole) = (word(4), record.bytes.len() >= 40);
    match &ending {
        Ending::Nothing => {
            let silent = [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT];
            assert!(
                capacity < OUT_HEADER_BYTES || silent.iter().any(|o| Some(*o) == opcode),
                "no answer to {record:?}"
            );
        }
        Ending::Reply { unique, .. } => {
            let expected =
                record.bytes.get(8..16).map_or(0, |b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
            assert!(*unique == expected || !is_whole, "the answer is to {unique}, not to {expected}");
        }
        Ending::Dropped => panic!("forgotten: {record:?}"),
    }
    ending
}

/// A place for one reply that checks what it gets.
struct Slot {
    capacity: usize,
    done: Option<SyncSender<Ending>>,
}

impl Slot {
    fn end(&mut self, ending: Ending) {
        // Nobody waits for it any more: that was a failure already.
        let _ = self.done.take().expect("a slot is consumed").send(ending);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.done.is_some() {
            self.end(Ending::Dropped);
        }
    }
}

impl ReplySlot for Slot {
    fn capacity(&self) -> usize {
        self.capacity
    }

    fn send(mut self, parts: &[&[u8]]) {
        let bytes = parts.concat();
        assert!(bytes.len() <= self.capacity, "{} bytes into {}", bytes.len(), self.capacity);
        let (header, body) = bytes.split_at(OUT_HEADER_BYTES);
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let unique = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        assert_eq!(word(0) as usize, bytes.len(), "length field and bytes agree");
        let errno = word(4).cast_signed().wrapping_neg();
        // Linux takes a reply with any other number for a broken device.
        assert!((0..=511).contains(&errno), "error {errno}");
        assert!(errno == 0 || body.is_empty(), "an error has no body");
        self.end(Ending::Reply { unique, errno, body: body.to_vec() });
    }

    fn send_data<F>(mut self, unique: u64, fill: F)
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send + 'static,
    {
        let mut sink = MemorySink::new(self.capacity - OUT_HEADER_BYTES);
        let ending = match fill(&mut sink) {
            Ok(len) => {
                let body = sink.into_bytes();
                assert_eq!(body.len(), len, "the number returned is what was put");
                Ending::Reply { unique, errno: 0, body }
            }
            Err(errno) => Ending::Reply { unique, errno: errno.raw_os_error(), body: Vec::new() },
        };
        self.end(ending);
    }

    fn send_nothing(mut self) {
        self.end(Ending::Nothing);
    }
}

/// Serves the requests in `data`, one after the other.
pub fn run(data: &[u8]) {
    let world = world();
    let server = world.server();
    let mut input = Input(data);
    // Whatever the input before this one did to the session.
    ask(&server, &world.traffic[0]);
    for _ in 0..REQUESTS {
        if input.is_empty() {
            break;
        }
        ask(&server, &Record::take(&mut input));
    }
}

/// The traffic of a guest that looks at everything, whole requests and series of them.
pub fn seeds() -> Vec<Seed> {
    let traffic: Vec<_> = world().traffic.iter().map(Record::to_bytes).collect();
    let series = traffic.chunks(8).map(<[_]>::concat).enumerate().map(|(i, bytes)| (format!("series-{i:03}"), bytes));
    let single = traffic.iter().enumerate().map(|(i, bytes)| (format!("single-{i:03}"), bytes.clone()));
    single.chain(series).collect()
}
