//! Tests of [`super::server`]: every operation's decoding, INIT in all its forms, and whatever else a guest may send.

use std::sync::Arc;
use std::sync::Mutex;

use proptest::prelude::*;
use rustix::io::Errno;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use super::filesystem::FileSystem;
use super::filesystem::InitPolicy;
use super::filesystem::Request;
use super::filesystem::Session;
use super::name::Name;
use super::opcode;
use super::operation::Change;
use super::operation::Operation;
use super::recording::Ending;
use super::recording::RecordingSlot;
use super::reply::Reply;
use super::server::Server;
use super::server::is_init;
use super::slot::ReplySlot;
use super::wire;
use crate::metrics::Metrics;

const HEADER: usize = 40;
const OFFERED_BY_LINUX_6_1: u32 = 0x73ff_fffb;

/// Writes down what it is asked (as text, since requests borrow) and answers `empty`.
#[derive(Default)]
struct Scribe {
    policy: Option<InitPolicy>,
    calls: Mutex<Vec<String>>,
    sessions: Mutex<Vec<Session>>,
}

impl FileSystem for Scribe {
    fn init_policy(&self) -> InitPolicy {
        self.policy.unwrap_or(InitPolicy { zero_message_open: false, export_support: true })
    }

    fn begin_session(&self, session: &Session) {
        self.sessions.lock().unwrap().push(*session);
    }

    fn call<S: ReplySlot>(&self, request: &Request<'_>, reply: Reply<S>) {
        self.calls.lock().unwrap().push(format!("{} {:?}", request.node, request.operation));
        reply.empty();
    }
}

struct Bench {
    server: Server<Scribe>,
    metrics: Arc<Metrics>,
}

impl Bench {
    fn before_init(policy: Option<InitPolicy>) -> Self {
        let metrics = Arc::new(Metrics::new(0));
        let server = Server::new(Scribe { policy, ..Scribe::default() }, Arc::clone(&metrics));
        Self { server, metrics }
    }

    fn new() -> Self {
        let bench = Self::before_init(None);
        bench.init(45, OFFERED_BY_LINUX_6_1);
        bench
    }

    fn init(&self, minor: u32, flags: u32) -> Ending {
        self.send(opcode::INIT, &init_args(7, minor, flags, 0, 64))
    }

    fn send(&self, number: u32, args: &[u8]) -> Ending {
        self.send_raw(&message(number, args), 4096)
    }

    fn send_raw(&self, bytes: &[u8], capacity: usize) -> Ending {
        let (slot, record) = RecordingSlot::new(capacity);
        self.server.handle(bytes, bytes.len(), slot);
        record.only()
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.server.fs().calls.lock().unwrap())
    }
}

fn message(number: u32, args: &[u8]) -> Vec<u8> {
    let header = wire::InHeader {
        len: (HEADER + args.len()) as u32,
        opcode: number,
        unique: 77,
        nodeid: 5,
        uid: 1000,
        gid: 1001,
        pid: 1002,
        total_extlen: 0,
        padding: 0,
    };
    [header.as_bytes(), args].concat()
}

fn init_args(major: u32, minor: u32, flags: u32, flags2: u32, payload: usize) -> Vec<u8> {
    let mut args: Vec<u8> = [major, minor, 131_072, flags, flags2].iter().flat_map(|word| word.to_ne_bytes()).collect();
    args.resize(64, 0);
    args.truncate(payload);
    args
}

fn reply_errno(errno: Errno) -> Ending {
    Ending::Reply { unique: 77, errno: errno.raw_os_error(), body: Vec::new() }
}

/// A structure of `len` bytes, zero but for the (offset, value) pairs.
fn fields(len: usize, values: &[(usize, u64, usize)]) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (offset, value, width) in values {
        bytes[*offset..offset + width].copy_from_slice(&value.to_le_bytes()[..*width]);
    }
    bytes
}

fn with(structure: usize, tail: &[u8]) -> Vec<u8> {
    [&vec![0; structure][..], tail].concat()
}

/// One well-formed request of every operation that reaches a file system, and what it decodes to.
fn valid() -> Vec<(u32, Vec<u8>, Operation<'static>)> {
    let name = |bytes| Name::new(bytes).unwrap();
    let handle_and = |len, rest: &[(usize, u64, usize)]| fields(len, &[&[(0, 9, 8)], rest].concat());
    let read = || handle_and(40, &[(8, 4096, 8), (16, 512, 4), (32, 0x8000, 4)]);
    let change = |number, args, change| (number, args, Operation::Change(change));
    let mut all = vec![
        (opcode::LOOKUP, b"file\0".to_vec(), Operation::Lookup { name: name(b"file") }),
        (opcode::LOOKUP, b"..\0".to_vec(), Operation::Lookup { name: name(b"..") }),
        (opcode::GETATTR, fields(16, &[(8, 9, 8)]), Operation::Getattr { fh: None }),
        (opcode::GETATTR, fields(16, &[(0, 1, 4), (8, 9, 8)]), Operation::Getattr { fh: Some(9) }),
        (opcode::STATX, fields(24, &[(16, 3, 4), (20, 0xfff, 4)]), Operation::Statx { flags: 3, mask: 0xfff }),
        (opcode::READLINK, vec![], Operation::Readlink),
        (opcode::OPEN, fields(8, &[(0, 0x8000, 4)]), Operation::Open { flags: 0x8000 }),
        (opcode::READ, read(), Operation::Read { fh: 9, offset: 4096, size: 512, flags: 0x8000 }),
        (opcode::RELEASE, handle_and(24, &[]), Operation::Release { fh: 9 }),
        (opcode::FLUSH, handle_and(24, &[]), Operation::Flush { fh: 9 }),
        (opcode::FSYNC, handle_and(16, &[(8, 1, 4)]), Operation::Fsync { fh: 9, datasync: true }),
        (opcode::STATFS, vec![], Operation::Statfs),
        (opcode::SYNCFS, vec![0; 8], Operation::Syncfs),
        (
            opcode::GETXATTR,
            [&fields(8, &[(0, 64, 4)])[..], b"user.a\0"].concat(),
            Operation::Getxattr { name: b"user.a", size: 64 },
        ),
        (opcode::LISTXATTR, fields(8, &[(0, 64, 4)]), Operation::Listxattr { size: 64 }),
        (opcode::OPENDIR, fields(8, &[(0, 0x10000, 4)]), Operation::Opendir { flags: 0x10000 }),
        (opcode::READDIR, read(), Operation::Readdir { fh: 9, offset: 4096, size: 512 }),
        (opcode::READDIRPLUS, read(), Operation::Readdirplus { fh: 9, offset: 4096, size: 512 }),
        (opcode::RELEASEDIR, handle_and(24, &[]), Operation::Releasedir { fh: 9 }),
        (opcode::FSYNCDIR, handle_and(16, &[]), Operation::Fsyncdir { fh: 9, datasync: false }),
        (opcode::ACCESS, fields(8, &[(0, 4, 4)]), Operation::Access { mask: 4 }),
        (opcode::LSEEK, handle_and(24, &[(8, 100, 8), (16, 3, 4)]), Operation::Lseek { fh: 9, offset: 100, whence: 3 }),
        change(opcode::SETATTR, vec![0; 88], Change::Setattr),
        change(opcode::SYMLINK, b"link\0a/b/../c\0".to_vec(), Change::Symlink),
        change(opcode::MKNOD, with(16, b"node\0"), Change::Mknod),
        change(opcode::MKDIR, with(8, b"dir\0"), Change::Mkdir),
        change(opcode::UNLINK, b"file\0".to_vec(), Change::Unlink),
        change(opcode::RMDIR, b"dir\0".to_vec(), Change::Rmdir),
        change(opcode::RENAME, with(8, b"a\0b\0"), Change::Rename),
        change(opcode::RENAME2, with(16, b"a\0b\0"), Change::Rename),
        change(opcode::LINK, with(8, b"new\0"), Change::Link),
        change(opcode::WRITE, [&fields(40, &[(16, 4, 4)])[..], b"data"].concat(), Change::Write),
        change(opcode::SETXATTR, [&fields(8, &[(0, 3, 4)])[..], b"user.a\0xyz"].concat(), Change::Setxattr),
        change(opcode::REMOVEXATTR, b"user.a\0".to_vec(), Change::Removexattr),
        change(opcode::CREATE, with(16, b"file\0"), Change::Create),
        change(opcode::TMPFILE, with(16, b"/\0"), Change::Tmpfile),
        change(opcode::FALLOCATE, vec![0; 32], Change::Fallocate),
        change(opcode::COPY_FILE_RANGE, vec![0; 56], Change::CopyFileRange),
        change(opcode::COPY_FILE_RANGE_64, vec![0; 56], Change::CopyFileRange),
    ];
    for number in [31, 32, 33, 37, 39, 40, 41, 48, 49] {
        all.push((number, vec![], Operation::Other { opcode: number }));
    }
    all
}

#[test]
fn every_operation_decodes_and_is_answered() {
    let bench = Bench::new();
    for (number, args, operation) in valid() {
        let ending = bench.send(number, &args);
        assert_eq!(ending, Ending::Reply { unique: 77, errno: 0, body: vec![] }, "{number}");
        assert_eq!(bench.calls(), [format!("5 {operation:?}")], "{number}");
    }
}

#[test]
fn arguments_cut_anywhere_are_refused_and_appended_bytes_are_ignored() {
    let bench = Bench::new();
    let ends_in_bytes = [
        opcode::LOOKUP,
        opcode::SYMLINK,
        opcode::MKNOD,
        opcode::MKDIR,
        opcode::UNLINK,
        opcode::RMDIR,
        opcode::RENAME,
        opcode::RENAME2,
        opcode::LINK,
        opcode::SETXATTR,
        opcode::REMOVEXATTR,
        opcode::CREATE,
        opcode::GETXATTR,
    ];
    for (number, args, operation) in valid() {
        // What comes behind these is not looked at, and neither are the arguments themselves.
        let needed = match operation {
            Operation::Readlink | Operation::Statfs | Operation::Syncfs | Operation::Other { .. } => 0,
            Operation::Change(Change::Tmpfile) => 16,
            _ => args.len(),
        };
        for cut in 0..needed {
            assert_eq!(bench.send(number, &args[..cut]), reply_errno(Errno::INVAL), "{number} cut to {cut}");
        }
        let longer = bench.send(number, &[&args[..], &[7; 8]].concat());
        let refused = ends_in_bytes.contains(&number);
        assert_eq!(longer.errno(), refused.then_some(Errno::INVAL), "{number} with more bytes");
        bench.calls();
    }
}

#[test]
fn names_that_are_none_are_refused_in_every_operation() {
    let bench = Bench::new();
    let long = [&[b'x'; 256][..], b"\0"].concat();
    let cases: [(&[u8], Errno); 5] = [
        (b"\0", Errno::INVAL),
        (b"a/b\0", Errno::INVAL),
        (b"no end", Errno::INVAL),
        (b"two\0ends\0", Errno::INVAL),
        (&long, Errno::NAMETOOLONG),
    ];
    let operations = [
        (opcode::LOOKUP, 0),
        (opcode::MKNOD, 16),
        (opcode::MKDIR, 8),
        (opcode::UNLINK, 0),
        (opcode::RMDIR, 0),
        (opcode::LINK, 8),
        (opcode::CREATE, 16),
    ];
    for (number, structure) in operations {
        for (name, errno) in cases {
            assert_eq!(bench.send(number, &with(structure, name)), reply_errno(errno), "{number} {name:?}");
        }
        let dots = bench.send(number, &with(structure, b"..\0"));
        assert_eq!(dots.errno(), (number != opcode::LOOKUP).then_some(Errno::INVAL), "{number} ..");
    }
    for (names, errno) in [
        (&b"a\0..\0"[..], Errno::INVAL),
        (b"\0b\0", Errno::INVAL),
        (b"a\0", Errno::INVAL),
        (b"a\0b/c\0", Errno::INVAL),
        (&[b"a\0", &long[..]].concat(), Errno::NAMETOOLONG),
    ] {
        for (number, structure) in [(opcode::RENAME, 8), (opcode::RENAME2, 16)] {
            assert_eq!(bench.send(number, &with(structure, names)), reply_errno(errno), "{number} {names:?}");
        }
    }
    for (number, structure) in [(opcode::GETXATTR, 8), (opcode::REMOVEXATTR, 0)] {
        assert_eq!(bench.send(number, &with(structure, b"\0")), reply_errno(Errno::RANGE), "{number} empty");
        assert_eq!(bench.send(number, &with(structure, &long)), reply_errno(Errno::RANGE), "{number} long");
    }
    let symlinks: [(Vec<u8>, Errno); 3] = [
        (b"../up\0target\0".to_vec(), Errno::INVAL),
        (b"name\0\0".to_vec(), Errno::NOENT),
        ([b"name\0", &[b'x'; 4096][..], b"\0"].concat(), Errno::NAMETOOLONG),
    ];
    for (args, errno) in symlinks {
        assert_eq!(bench.send(opcode::SYMLINK, &args), reply_errno(errno));
    }
}

#[test]
fn lying_sizes_are_refused() {
    let bench = Bench::new();
    let value = |size: u64, value: &[u8]| [&fields(8, &[(0, size, 4)])[..], b"user.a\0", value].concat();
    assert_eq!(bench.send(opcode::SETXATTR, &value(4, b"xyz")), reply_errno(Errno::INVAL));
    assert_eq!(bench.send(opcode::SETXATTR, &value(u32::MAX.into(), b"xyz")), reply_errno(Errno::TOOBIG));
    assert_eq!(bench.send(opcode::WRITE, &fields(40, &[(16, 1, 4)])), reply_errno(Errno::INVAL));

    // Of a WRITE only the fixed part is copied.
    let mut write = message(opcode::WRITE, &fields(40, &[(16, 1 << 20, 4)]));
    write[..4].copy_from_slice(&(80u32 + (1 << 20)).to_le_bytes());
    let (slot, record) = RecordingSlot::new(24);
    bench.server.handle(&write, 80 + (1 << 20), slot);
    assert_eq!(record.only().errno(), None);
}

#[test]
fn malformed_requests_of_the_interface_table_are_answered() {
    let bench = Bench::new();
    let getattr = message(opcode::GETATTR, &[0; 16]);
    let read = |size: u64| message(opcode::READ, &fields(40, &[(16, size, 4)]));
    let mut too_long = getattr.clone();
    too_long[0] = 57;
    let mut too_short = getattr.clone();
    too_short[0] = 39;
    let cases = [
        ("shorter than a header", getattr[..20].to_vec(), 4096, reply_errno(Errno::IO)),
        ("reply area of 8 bytes", getattr.clone(), 8, Ending::Nothing),
        ("no reply area", getattr, 0, Ending::Nothing),
        ("READ without a body", message(opcode::READ, &[]), 4096, reply_errno(Errno::INVAL)),
        ("LOOKUP without NUL", message(opcode::LOOKUP, b"name"), 4096, reply_errno(Errno::INVAL)),
        ("name with a slash", message(opcode::LOOKUP, b"a/b\0"), 4096, reply_errno(Errno::INVAL)),
        ("1 MiB into 4 KiB", read(1 << 20), 4096, reply_errno(Errno::IO)),
        ("unknown operation", message(9999, &[]), 4096, reply_errno(Errno::NOSYS)),
        ("operation 0", message(0, &[]), 4096, reply_errno(Errno::NOSYS)),
        ("operation 7", message(7, &[]), 4096, reply_errno(Errno::NOSYS)),
        ("operation 19", message(19, &[]), 4096, reply_errno(Errno::NOSYS)),
        ("length beyond the request", too_long, 4096, reply_errno(Errno::INVAL)),
        ("length below a header", too_short, 4096, reply_errno(Errno::INVAL)),
    ];
    for (what, bytes, capacity, ending) in cases {
        assert_eq!(bench.send_raw(&bytes, capacity), ending, "{what}");
    }
    let empty = Ending::Reply { unique: 0, errno: Errno::IO.raw_os_error(), body: vec![] };
    assert_eq!(bench.send_raw(&[], 4096), empty);
    assert_eq!(bench.send(opcode::STATFS, &[]).errno(), None, "the next request is served");
}

#[test]
fn forgets_reach_the_file_system_and_are_never_answered() {
    let bench = Bench::new();
    let record = |node: u64, lookups: u64| [node.to_le_bytes(), lookups.to_le_bytes()].concat();
    let batch = |count: u32| [&fields(8, &[(0, count.into(), 4)])[..], &record(8, 2), &record(9, u64::MAX)].concat();
    let both: &[&str] = &["8 Forget { lookups: 2 }", "9 Forget { lookups: 18446744073709551615 }"];
    let cases: [(u32, Vec<u8>, &[&str]); 8] = [
        (opcode::FORGET, fields(8, &[(0, 3, 8)]), &["5 Forget { lookups: 3 }"]),
        (opcode::FORGET, vec![0; 7], &[]),
        (opcode::BATCH_FORGET, batch(2), both),
        (opcode::BATCH_FORGET, batch(1), &both[..1]),
        (opcode::BATCH_FORGET, batch(0), &[]),
        (opcode::BATCH_FORGET, batch(1 << 31), both),
        (opcode::BATCH_FORGET, vec![0; 7], &[]),
        (opcode::INTERRUPT, vec![1; 8], &[]),
    ];
    for (number, args, calls) in cases {
        for capacity in [0, 4096] {
            assert_eq!(bench.send_raw(&message(number, &args), capacity), Ending::Nothing, "{number} {args:?}");
            assert_eq!(bench.calls(), calls, "{number} {args:?}");
        }
    }
    let mut lying = message(opcode::FORGET, &[0; 8]);
    lying[0] = 255;
    assert_eq!(bench.send_raw(&lying, 0), Ending::Nothing);
}

#[test]
fn init_answers_what_the_version_knows_for_every_payload() {
    for (minor, bytes) in [(0, 8), (4, 8), (5, 24), (22, 24), (23, 64), (31, 64), (38, 64), (45, 64), (46, 64)] {
        for payload in [8, 16, 20, 64] {
            let bench = Bench::before_init(None);
            let args = init_args(7, minor, OFFERED_BY_LINUX_6_1, 0xffff_ffff, payload);
            let mut body = bench.send(opcode::INIT, &args).body();
            assert_eq!(body.len(), bytes, "minor {minor}");
            body.resize(64, 0);
            let answer = wire::InitOut::read_from_bytes(&body).unwrap();
            assert_eq!((answer.major, answer.minor), (7, minor.min(45)));
            assert_eq!(answer.flags2, 0);
            if bytes == 64 && payload >= 16 {
                assert_eq!(answer.flags, 0x52c4_e031);
                assert_eq!((answer.max_readahead, answer.max_write, answer.max_pages), (131_072, 1 << 20, 256));
                assert_eq!((answer.max_background, answer.congestion_threshold), (65535, 49149));
                assert_eq!((answer.time_gran, answer.map_alignment), (1, 0));
            } else if bytes == 64 {
                assert_eq!((answer.flags, answer.max_pages, answer.max_readahead), (0, 0, 0));
            }
            assert_eq!(bench.server.fs().sessions.lock().unwrap().len(), 1);
        }
    }
}

#[test]
fn init_grants_only_what_was_offered() {
    let bench = Bench::before_init(Some(InitPolicy { zero_message_open: true, export_support: false }));
    for bit in 0..32 {
        let body = bench.init(45, 1 << bit).body();
        let answer = wire::InitOut::read_from_bytes(&body).unwrap();
        let wanted = [0, 5, 13, 14, 15, 17, 18, 22, 23, 24, 25, 28, 30].contains(&bit);
        assert_eq!(answer.flags, if wanted { 1 << bit } else { 0 }, "bit {bit}");
        assert_eq!(answer.max_pages, if bit == 22 { 256 } else { 0 });
    }
}

#[test]
fn init_of_other_majors_or_without_room_begins_no_session() {
    let cases = [
        (init_args(6, 0, 0, 0, 64), 4096, Some(Errno::PROTO)),
        (init_args(0, 0, 0, 0, 64), 4096, Some(Errno::PROTO)),
        (init_args(7, 45, 0, 0, 7), 4096, Some(Errno::INVAL)),
        (init_args(7, 45, 0, 0, 0), 4096, Some(Errno::INVAL)),
        (init_args(7, 45, 0, 0, 64), 79, Some(Errno::IO)),
        (init_args(8, 1, 0, 0, 64), 4096, None),
    ];
    for (args, capacity, errno) in cases {
        let bench = Bench::before_init(None);
        let ending = bench.send_raw(&message(opcode::INIT, &args), capacity);
        assert_eq!(ending.errno(), errno, "{args:?}");
        if errno.is_none() {
            assert_eq!(wire::InitOut::read_from_bytes(&ending.body()).unwrap().major, 7);
        }
        assert_eq!(bench.send(opcode::STATFS, &[]), reply_errno(Errno::IO), "still no session");
        assert!(bench.server.fs().sessions.lock().unwrap().is_empty());
        assert_eq!(bench.init(45, 0).errno(), None);
        assert_eq!(bench.send(opcode::STATFS, &[]).errno(), None);
    }
}

#[test]
fn session_lasts_from_init_to_destroy_and_init_begins_another() {
    let bench = Bench::before_init(None);
    assert_eq!(bench.send(opcode::GETATTR, &[0; 16]), reply_errno(Errno::IO));
    assert_eq!(bench.send(opcode::FORGET, &[0; 8]), Ending::Nothing);
    assert!(bench.calls().is_empty());
    bench.init(31, OFFERED_BY_LINUX_6_1);
    assert_eq!(bench.send(opcode::GETATTR, &[0; 16]).errno(), None);
    bench.init(45, OFFERED_BY_LINUX_6_1);
    assert_eq!(bench.send(opcode::GETATTR, &[0; 16]).errno(), None);
    assert_eq!(bench.send(opcode::DESTROY, &[]), Ending::Reply { unique: 77, errno: 0, body: vec![] });
    assert_eq!(bench.send(opcode::GETATTR, &[0; 16]), reply_errno(Errno::IO));
    let minors: Vec<u32> = bench.server.fs().sessions.lock().unwrap().iter().map(|session| session.minor).collect();
    assert_eq!(minors, [31, 45]);
}

#[test]
fn zero_message_open_answers_enosys_only_for_what_was_offered_and_allowed() {
    let allowed = Some(InitPolicy { zero_message_open: true, export_support: true });
    let (open, opendir) = (1 << 17, 1 << 24);
    let cases = [
        (allowed, open | opendir, true, true),
        (allowed, open, true, false),
        (allowed, opendir, false, true),
        (allowed, 0, false, false),
        (None, open | opendir, false, false),
    ];
    for (policy, offered, no_open, no_opendir) in cases {
        let bench = Bench::before_init(policy);
        bench.init(45, offered);
        let session = bench.server.fs().sessions.lock().unwrap()[0];
        assert_eq!((session.no_open, session.no_opendir), (no_open, no_opendir));
        let answers = [(opcode::OPEN, no_open), (opcode::FLUSH, no_open), (opcode::OPENDIR, no_opendir)];
        for (number, off) in answers {
            assert_eq!(bench.send(number, &[0; 24]).errno(), off.then_some(Errno::NOSYS), "{number} {offered:#x}");
        }
        assert_eq!(bench.send(opcode::RELEASE, &[0; 24]).errno(), None);
    }
}

#[test]
fn requests_and_errors_are_counted_by_operation() {
    let bench = Bench::new();
    bench.send(opcode::LOOKUP, b"file\0");
    bench.send(opcode::LOOKUP, b"file");
    bench.send(opcode::FORGET, &[0; 8]);
    bench.send(9999, &[]);
    let ops = &bench.metrics.ops;
    assert_eq!((ops.hits_of(opcode::LOOKUP), ops.errors_of(opcode::LOOKUP)), (2, 1));
    assert_eq!((ops.hits_of(opcode::FORGET), ops.errors_of(opcode::FORGET)), (1, 0));
    assert_eq!((ops.hits_of(9999), ops.errors_of(9999)), (1, 1));
    assert_eq!(ops.hits_of(opcode::INIT), 1);
    assert_eq!(ops.total(), 5);
}

#[test]
fn is_init_looks_at_the_operation_only() {
    assert!(is_init(&message(opcode::INIT, &[])));
    assert!(!is_init(&message(opcode::LOOKUP, b"a\0")));
    assert!(!is_init(&message(opcode::INIT, &[])[..39]));
}

fn check_any(bytes: &[u8], readable_bytes: usize, capacity: usize) {
    let bench = Bench::new();
    let (slot, record) = RecordingSlot::new(capacity);
    bench.server.handle(bytes, readable_bytes, slot);
    let ending = record.only();
    let number = bytes.get(4..8).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()));
    let silent =
        bytes.len() >= HEADER && matches!(number, Some(opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT));
    match ending {
        Ending::Nothing => assert!(silent || capacity < 16, "a request with room was not answered"),
        Ending::Reply { unique, .. } => {
            assert!(!silent && capacity >= 16);
            if bytes.len() >= 16 {
                assert_eq!(unique, u64::from_le_bytes(bytes[8..16].try_into().unwrap()));
            }
        }
        Ending::Dropped => panic!("dropped"),
    }
}

proptest! {
    #[test]
    fn random_bytes_get_exactly_one_completion(
        bytes in proptest::collection::vec(any::<u8>(), 0..200), more in 0usize..100, capacity in 0usize..200,
    ) {
        check_any(&bytes, bytes.len() + more, capacity);
    }

    #[test]
    fn mutated_requests_get_exactly_one_completion(
        which in any::<proptest::sample::Index>(),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
        cut in 0usize..12,
        capacity in prop_oneof![Just(0usize), 8usize..20, Just(4096)],
    ) {
        let mut all: Vec<_> = valid().into_iter().map(|(number, args, _)| message(number, &args)).collect();
        all.push(message(opcode::INIT, &init_args(7, 45, u32::MAX, u32::MAX, 64)));
        all.push(message(opcode::BATCH_FORGET, &[1; 40]));
        all.push(message(opcode::FORGET, &[1; 8]));
        all.push(message(opcode::DESTROY, &[]));
        all.push(message(opcode::INTERRUPT, &[1; 8]));
        let mut bytes = which.get(&all).clone();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        check_any(&bytes, bytes.len(), capacity);
    }
}
