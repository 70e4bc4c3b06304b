//! Streams of requests: each place in flight is a stream of its own, and asks the next question when it has its answer.

use anyhow::Result;
use anyhow::ensure;
use clap::ValueEnum;
use nydus_vm::testing::fuse_client::EntryReply;
use nydus_vm::testing::fuse_client::Listing;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::fuse_client::directory_entries;
use nydus_vm::testing::fuse_client::opened;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::lane::Done;
use nydus_vm::testing::lane::Lane;

use crate::material::FILES_PER_DIRECTORY;
use crate::material::SMALL_FILE_BYTES;
use crate::material::Size;

const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;
/// Bytes of a listing request, as kernels before 6.16 send it.
const LIST_BYTES: u32 = 4096;

/// Whether the daemon has seen the data before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Temperature {
    /// It has.
    Warm,
    /// Its cache is empty; each byte is asked for once.
    Cold,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// READ of 4 KiB anywhere in a large file.
    Random4k,
    /// READ of 128 KiB, one after the other.
    Sequential128k,
    /// READ of 1 MiB, one after the other.
    Sequential1m,
    /// GETATTR and LOOKUP in turns, over all small files.
    Stat,
    /// LOOKUP of names that do not exist.
    Negative,
    /// READDIRPLUS through a large directory, 4 KiB each.
    Readdirplus,
    /// LOOKUP and READ of small files, with OPEN and RELEASE where the daemon wants them.
    SmallFiles,
    /// READ of 4 KiB at places whose chunks are not cached.
    ColdRandom4k,
    /// READ of 128 KiB, one after the other, not cached.
    ColdSequential128k,
}

impl Workload {
    /// Whether the cache is warm.
    pub fn temperature(self) -> Temperature {
        match self {
            Self::ColdRandom4k | Self::ColdSequential128k => Temperature::Cold,
            _ => Temperature::Warm,
        }
    }

    /// Bytes of one READ of the large file; `None` for what reads something else.
    pub fn read_bytes(self) -> Option<usize> {
        match self {
            Self::Random4k | Self::ColdRandom4k => Some(4096),
            Self::Sequential128k | Self::ColdSequential128k => Some(128 << 10),
            Self::Sequential1m => Some(1 << 20),
            _ => None,
        }
    }

    /// Whether places are random.
    pub fn is_random(self) -> bool {
        matches!(self, Self::Random4k | Self::ColdRandom4k)
    }
}

/// A small, fast, repeatable source of numbers (xorshift64*).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The same numbers for the same `seed`, which must not be 0.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) * limit) >> 32
    }
}

/// A file or directory, opened if the daemon wants that.
#[derive(Debug, Clone, Copy)]
struct Handle {
    node: u64,
    fh: u64,
}

/// Where a stream stands.
#[derive(Debug, Clone, Copy)]
enum Step {
    Start,
    /// READDIRPLUS goes on at an offset of this handle.
    List(Handle),
    /// SmallFiles: the file was looked up.
    Found,
    /// SmallFiles: the file is open.
    Opened(Handle),
    /// SmallFiles: the file is read.
    Read(Handle),
}

/// What all streams of one measurement share.
#[derive(Debug)]
pub struct Plan {
    workload: Workload,
    size: Size,
    random: Random,
    big: Handle,
    directories: Vec<u64>,
    files: Vec<u64>,
    /// Counts questions: places of sequential reads, turns of other things.
    turn: u64,
    steps: Vec<Step>,
    opens: bool,
    /// Entries listed so far.
    pub entries: u64,
}

/// Looks `name` up in the directory `parent`.
pub fn entry(guest: &mut Guest, parent: u64, name: &str) -> Result<u64> {
    let reply = guest.call(&Request::lookup(parent, name.as_bytes()))?;
    let entry = EntryReply::from_lookup(&reply.body()?)?;
    ensure!(entry.node != 0, "the daemon does not know {name}");
    Ok(entry.node)
}

/// Opens `node`; the handle is 0 where the daemon wants no OPEN.
fn open(guest: &mut Guest, request: &Request) -> Result<(u64, bool)> {
    let reply = guest.call(request)?;
    if reply.errno == ENOSYS {
        return Ok((0, false));
    }
    Ok((opened(&reply.body()?)?.0, true))
}

impl Plan {
    /// Looks up and opens what `workload` needs; `streams` questions will be in flight.
    pub fn new(workload: Workload, size: Size, guest: &mut Guest, streams: usize) -> Result<Self> {
        let node = entry(guest, 1, "big")?;
        let (fh, opens) = open(guest, &Request::open(node, 0o100_000))?;
        let big = Handle { node, fh };
        let mut steps = vec![Step::Start; streams];
        let (mut directories, mut files) = (Vec::new(), Vec::new());
        match workload {
            Workload::Stat | Workload::Negative | Workload::SmallFiles => {
                let parent = entry(guest, 1, "files")?;
                for directory in 0..size.directories {
                    directories.push(entry(guest, parent, &directory.to_string())?);
                }
            }
            Workload::Readdirplus => {
                let node = entry(guest, 1, "many")?;
                for step in &mut steps {
                    let (fh, _) = open(guest, &Request::opendir(node))?;
                    *step = Step::List(Handle { node, fh });
                }
            }
            _ => {}
        }
        if workload == Workload::Stat {
            for directory in &directories {
                for file in 0..FILES_PER_DIRECTORY {
                    files.push(entry(guest, *directory, &file.to_string())?);
                }
            }
        }
        let random = Random::new(0x9e37_79b9_7f4a_7c15);
        Ok(Self { workload, size, random, big, directories, files, turn: 0, steps, opens, entries: 0 })
    }

    /// Makes the daemon see everything once that the questions will be about, unless they are to find it cold.
    pub fn warm_up(&self, guest: &mut Guest) -> Result<()> {
        match self.workload {
            Workload::Random4k | Workload::Sequential128k | Workload::Sequential1m => {
                let step = self.workload.read_bytes().unwrap_or(4096).max(64 << 10);
                for offset in (0..self.size.big_bytes).step_by(step) {
                    let request = Request::read(self.big.node, self.big.fh, offset as u64, step as u32);
                    ensure!(guest.call(&request)?.errno == 0, "cannot read the large file");
                }
            }
            Workload::SmallFiles => {
                for directory in &self.directories {
                    for file in 0..FILES_PER_DIRECTORY {
                        let node = entry(guest, *directory, &file.to_string())?;
                        let (fh, opens) = open(guest, &Request::open(node, 0o100_000))?;
                        ensure!(guest.call(&Request::read(node, fh, 0, 4096))?.errno == 0, "cannot read a small file");
                        if opens {
                            guest.call(&Request::release(node, fh))?;
                        }
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Questions until a cold pass is over; `None` for a warm one, which goes on for a time.
    pub fn questions(&self) -> Option<u64> {
        match self.workload {
            // One place in each chunk of 1 MiB.
            Workload::ColdRandom4k => Some((self.size.big_bytes >> 20) as u64),
            Workload::ColdSequential128k => Some((self.size.big_bytes >> 17) as u64),
            _ => None,
        }
    }

    /// The next question of `stream`, whose last answer is `done`.
    pub fn next(&mut self, stream: usize, lane: &Lane, done: Option<&Done>) -> Result<Request> {
        if let Some(done) = done {
            let missing = self.workload == Workload::Negative && done.errno == ENOENT;
            ensure!(done.errno == 0 || missing, "operation {} answered errno {}", done.opcode, done.errno);
        }
        self.turn += 1;
        let turn = self.turn - 1;
        match self.workload {
            Workload::Random4k => {
                let place = self.random.below((self.size.big_bytes / 4096) as u64);
                Ok(Request::read(self.big.node, self.big.fh, place * 4096, 4096))
            }
            Workload::Sequential128k | Workload::ColdSequential128k => Ok(self.sequential(turn, 128 << 10)),
            Workload::Sequential1m => Ok(self.sequential(turn, 1 << 20)),
            // 611 is prime to the number of chunks, a power of two.
            Workload::ColdRandom4k => {
                let chunks = (self.size.big_bytes >> 20) as u64;
                Ok(Request::read(self.big.node, self.big.fh, (turn * 611 % chunks) << 20, 4096))
            }
            Workload::Stat => {
                let file = self.random.below(self.files.len() as u64) as usize;
                if turn.is_multiple_of(2) {
                    return Ok(Request::getattr(self.files[file]));
                }
                Ok(self.lookup(file, ""))
            }
            Workload::Negative => {
                let file = self.random.below((self.size.directories * FILES_PER_DIRECTORY) as u64) as usize;
                Ok(self.lookup(file, ".missing"))
            }
            Workload::Readdirplus => self.list(stream, lane, done),
            Workload::SmallFiles => self.small_file(stream, lane, done),
        }
    }

    fn sequential(&self, turn: u64, bytes: u64) -> Request {
        let offset = turn * bytes % self.size.big_bytes as u64;
        Request::read(self.big.node, self.big.fh, offset, bytes as u32)
    }

    fn lookup(&self, file: usize, suffix: &str) -> Request {
        let mut name = itoa(file % FILES_PER_DIRECTORY);
        name.extend_from_slice(suffix.as_bytes());
        Request::lookup(self.directories[file / FILES_PER_DIRECTORY], &name)
    }

    fn list(&mut self, stream: usize, lane: &Lane, done: Option<&Done>) -> Result<Request> {
        let Step::List(handle) = self.steps[stream] else { unreachable!("set when the plan was made") };
        let mut offset = 0;
        if let Some(done) = done {
            let mut body = vec![0; done.body_bytes as usize];
            lane.read_body(done, &mut body);
            let entries = directory_entries(&body, Listing::Plus)?;
            self.entries += entries.len() as u64;
            // At the end, from the start again.
            offset = entries.last().map_or(0, |last| last.next);
        }
        Ok(Request::readdirplus(handle.node, handle.fh, offset, LIST_BYTES))
    }

    fn small_file(&mut self, stream: usize, lane: &Lane, done: Option<&Done>) -> Result<Request> {
        let read = |handle: Handle| Request::read(handle.node, handle.fh, 0, 4096);
        let mut body = [0; 128];
        match done {
            Some(done) => lane.read_body(done, &mut body),
            None => self.steps[stream] = Step::Start,
        }
        let (request, step) = match self.steps[stream] {
            Step::Start => {
                let file = self.random.below((self.size.directories * FILES_PER_DIRECTORY) as u64) as usize;
                (self.lookup(file, ""), Step::Found)
            }
            Step::Found => {
                let node = EntryReply::from_lookup(&body)?.node;
                if self.opens {
                    (Request::open(node, 0o100_000), Step::Opened(Handle { node, fh: 0 }))
                } else {
                    let handle = Handle { node, fh: 0 };
                    (read(handle), Step::Read(handle))
                }
            }
            Step::Opened(handle) => {
                let handle = Handle { fh: opened(&body[..16])?.0, ..handle };
                (read(handle), Step::Read(handle))
            }
            Step::Read(handle) => {
                ensure!(done.is_some_and(|d| d.body_bytes as usize == SMALL_FILE_BYTES), "a small file is cut");
                if self.opens {
                    (Request::release(handle.node, handle.fh), Step::Start)
                } else {
                    return self.small_file(stream, lane, None);
                }
            }
            Step::List(_) => unreachable!("a stream of another workload"),
        };
        self.steps[stream] = step;
        Ok(request)
    }
}

fn itoa(mut number: usize) -> Vec<u8> {
    let mut digits = Vec::with_capacity(24);
    loop {
        digits.push(b'0' + (number % 10) as u8);
        number /= 10;
        if number == 0 {
            digits.reverse();
            return digits;
        }
    }
}
