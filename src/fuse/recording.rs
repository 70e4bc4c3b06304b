//! A slot for tests that records how it was completed, and fails the test that completes it wrongly.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;
use zerocopy::FromBytes;

use super::slot::OUT_HEADER_BYTES;
use super::slot::ReplySlot;
use super::wire;
use crate::sys::sink::MemorySink;
use crate::sys::sink::Sink;

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    /// No reply.
    Nothing,
    /// A reply: error number (0 or positive) and body.
    Reply { unique: u64, errno: i32, body: Vec<u8> },
    /// The slot was dropped.
    Dropped,
}

impl Ending {
    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Reply { errno, .. } if *errno != 0 => Some(Errno::from_raw_os_error(*errno)),
            _ => None,
        }
    }

    /// The body of a successful reply.
    pub(crate) fn body(self) -> Vec<u8> {
        match self {
            Self::Reply { errno: 0, body, .. } => body,
            other => panic!("no success: {other:?}"),
        }
    }
}

/// Where the slot puts its ending.
#[derive(Debug, Clone, Default)]
pub(crate) struct Record(Arc<Mutex<Vec<Ending>>>);

impl Record {
    /// The one ending so far.
    pub(crate) fn only(&self) -> Ending {
        let endings = self.0.lock().unwrap();
        assert_eq!(endings.len(), 1, "exactly one completion: {endings:?}");
        endings[0].clone()
    }

    /// The one ending, once it has come.
    pub(crate) fn wait(&self) -> Ending {
        let started = Instant::now();
        while !self.is_complete() {
            assert!(started.elapsed() < Duration::from_secs(30), "no completion");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.only()
    }

    /// Whether there is an ending.
    pub(crate) fn is_complete(&self) -> bool {
        !self.0.lock().unwrap().is_empty()
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct RecordingSlot {
    capacity: usize,
    record: Record,
    open: bool,
}

impl RecordingSlot {
    pub(crate) fn new(capacity: usize) -> (Self, Record) {
        let record = Record::default();
        (Self { capacity, record: record.clone(), open: true }, record)
    }

    fn end(&mut self, ending: Ending) {
        self.open = false;
        self.record.0.lock().unwrap().push(ending);
    }

    fn end_with_bytes(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.capacity, "{} bytes into {}", bytes.len(), self.capacity);
        let (header, body) = wire::OutHeader::read_from_prefix(bytes).expect("a header in front");
        assert_eq!(header.len as usize, bytes.len(), "length field and bytes agree");
        assert!((-4095..=0).contains(&header.error), "error {}", header.error);
        assert!(header.error == 0 || body.is_empty(), "an error has no body");
        self.end(Ending::Reply { unique: header.unique, errno: -header.error, body: body.to_vec() });
    }
}

impl Drop for RecordingSlot {
    fn drop(&mut self) {
        if self.open {
            self.end(Ending::Dropped);
        }
    }
}

impl ReplySlot for RecordingSlot {
    fn capacity(&self) -> usize {
        self.capacity
    }

    fn send(mut self, parts: &[&[u8]]) {
        assert_eq!(parts[0].len(), OUT_HEADER_BYTES);
        self.end_with_bytes(&parts.concat());
    }

    fn send_data<F>(mut self, unique: u64, fill: F)
    where
        F: FnOnce(&mut dyn Sink) -> Result<usize, Errno> + Send + 'static,
    {
        let mut sink = MemorySink::new(self.capacity - OUT_HEADER_BYTES);
        match fill(&mut sink) {
            Ok(len) => {
                let body = sink.into_bytes();
                assert_eq!(body.len(), len, "the number returned is what was put");
                self.end(Ending::Reply { unique, errno: 0, body });
            }
            Err(errno) => self.end(Ending::Reply { unique, errno: errno.raw_os_error(), body: Vec::new() }),
        }
    }

    fn send_nothing(mut self) {
        self.end(Ending::Nothing);
    }
}
