//! Requests that are wrong in memory, length or meaning, in well-formed chains: each is answered.

use nydus_vm::testing::driver::Chains;
use nydus_vm::testing::driver::Segment;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::fuse_client::opcode;

use crate::rogue::Case;
use crate::rogue::NOWHERE;
use crate::rogue::Outcome;
use crate::rogue::Rogue;
use crate::rogue::any;
use crate::rogue::no_reply;
use crate::rogue::not_stopped;
use crate::rogue::refused;
use crate::rogue::run;

const EINVAL: i32 = 22;
const ENOSYS: i32 = 38;

const CHAINS: &[Case] = &[
    (
        "reply at an unmapped address",
        |r| {
            let request = r.write(&Request::getattr(1));
            r.send(&[request], &[Segment { address: NOWHERE, len: 120 }])
        },
        no_reply,
    ),
    (
        "reply that begins mapped and goes on unmapped",
        |r| {
            let request = r.write(&Request::getattr(1));
            let room = r.room(16);
            r.send(&[request], &[room, Segment { address: NOWHERE, len: 104 }])
        },
        refused,
    ),
    (
        "reply that runs over the end of memory",
        |r| {
            let request = r.write(&Request::getattr(1));
            let end = r.guest.memory().regions()[1].start() + r.guest.memory().regions()[1].size();
            let room = r.room(16);
            r.send(&[request], &[room, Segment { address: end - 8, len: 104 }])
        },
        refused,
    ),
    (
        "address that overflows",
        |r| {
            let request = r.write(&Request::getattr(1));
            r.send(&[request], &[Segment { address: u64::MAX - 8, len: 120 }])
        },
        no_reply,
    ),
    (
        "request at an unmapped address",
        |r| {
            let room = r.room(120);
            r.send(&[Segment { address: NOWHERE, len: 56 }], &[room])
        },
        refused,
    ),
    (
        "request shorter than its header",
        |r| {
            let request = r.write(&Request::getattr(1));
            let room = r.room(120);
            r.send(&[Segment { len: 20, ..request }], &[room])
        },
        refused,
    ),
    (
        "no request at all",
        |r| {
            let room = r.room(120);
            r.send(&[], &[room])
        },
        refused,
    ),
    (
        "reply area shorter than its header",
        |r| {
            let request = r.write(&Request::getattr(1));
            let room = r.room(8);
            r.send(&[request], &[room])
        },
        no_reply,
    ),
    (
        "no reply area",
        |r| {
            let request = r.write(&Request::getattr(1));
            r.send(&[request], &[])
        },
        no_reply,
    ),
    (
        "READ without arguments",
        |r| {
            let request = r.write(&Request::new(opcode::READ, 1, &[], 0));
            let room = r.room(4096);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "LOOKUP of a name without its end",
        |r| {
            let request = r.write(&Request::new(opcode::LOOKUP, 1, b"warm", 0));
            let room = r.room(144);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "LOOKUP of nothing",
        |r| {
            let request = r.write(&Request::lookup(1, b""));
            let room = r.room(144);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "LOOKUP of a name of 64 KiB",
        |r| {
            let request = r.write(&Request::lookup(1, &[b'x'; 65536]));
            let room = r.room(144);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "LOOKUP with a slash",
        |r| {
            let request = r.write(&Request::lookup(1, b"dir/0"));
            let room = r.room(144);
            r.send(&[request], &[room])
        },
        |o| o == Outcome::Answered(EINVAL),
    ),
    (
        "BATCH_FORGET of 2^31 entries",
        |r| {
            let body = [0u8, 0, 0, 0x80, 0, 0, 0, 0];
            let request = r.write(&Request::new(opcode::BATCH_FORGET, 0, &body, 0));
            r.send(&[request], &[])
        },
        no_reply,
    ),
    (
        "FORGET of more than was looked up",
        |r| {
            let request = r.write(&Request::forget(1, u64::MAX));
            r.send(&[request], &[])
        },
        no_reply,
    ),
    (
        "FORGET of an inode nobody has",
        |r| {
            let request = r.write(&Request::forget(0xdead_beef, 1));
            r.send(&[request], &[])
        },
        no_reply,
    ),
    (
        "FORGET with a reply area",
        |r| {
            let request = r.write(&Request::forget(1, 1));
            let room = r.room(64);
            r.send(&[request], &[room])
        },
        no_reply,
    ),
    (
        "READ of a megabyte into a page",
        |r| {
            let request = r.write(&Request::read(2, 0, 0, 1 << 20));
            let room = r.room(4096);
            r.send(&[request], &[room])
        },
        not_stopped,
    ),
    (
        "READ at the end of all numbers",
        |r| {
            let request = r.write(&Request::read(2, 0, u64::MAX - 1, 4096));
            let room = r.room(4112);
            r.send(&[request], &[room])
        },
        not_stopped,
    ),
    (
        "READDIR of 4 GiB",
        |r| {
            let request = r.write(&Request::readdir(1, 0, 0, u32::MAX));
            let room = r.room(4096);
            r.send(&[request], &[room])
        },
        not_stopped,
    ),
    (
        "READDIRPLUS from a place that is none",
        |r| {
            let request = r.write(&Request::readdirplus(1, 0, u64::MAX, 4096));
            let room = r.room(4112);
            r.send(&[request], &[room])
        },
        not_stopped,
    ),
    (
        "LISTXATTR of 4 GiB",
        |r| {
            let request = r.write(&Request::listxattr(1, u32::MAX));
            let room = r.room(4096);
            r.send(&[request], &[room])
        },
        not_stopped,
    ),
    (
        "GETXATTR without a name",
        |r| {
            let request = r.write(&Request::new(opcode::GETXATTR, 1, &[0; 8], 0));
            let room = r.room(4096);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "GETATTR with room for half of it",
        |r| {
            let request = r.write(&Request::getattr(1));
            let room = r.room(60);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "header that claims more than there is",
        |r| {
            let mut bytes = [Request::getattr(1).header(0x4242).as_slice(), &[0; 16]].concat();
            bytes[..4].copy_from_slice(&4096u32.to_le_bytes());
            let request = r.write_bytes(&bytes);
            let room = r.room(120);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "header that claims less than a header",
        |r| {
            let mut bytes = [Request::getattr(1).header(0x4242).as_slice(), &[0; 16]].concat();
            bytes[..4].copy_from_slice(&8u32.to_le_bytes());
            let request = r.write_bytes(&bytes);
            let room = r.room(120);
            r.send(&[request], &[room])
        },
        refused,
    ),
    ("operation 0", |r| unknown(r, 0), |o| o == Outcome::Answered(ENOSYS)),
    ("operation 7", |r| unknown(r, 7), |o| o == Outcome::Answered(ENOSYS)),
    ("operation 19", |r| unknown(r, 19), |o| o == Outcome::Answered(ENOSYS)),
    ("operation 1000", |r| unknown(r, 1000), |o| o == Outcome::Answered(ENOSYS)),
    ("operation 2^32 - 1", |r| unknown(r, u32::MAX), |o| o == Outcome::Answered(ENOSYS)),
    (
        "inode nobody has",
        |r| {
            let request = r.write(&Request::getattr(0x00de_adbe_efff));
            let room = r.room(120);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "inode of another mount",
        |r| {
            let request = r.write(&Request::read(u64::MAX, 0, 0, 4096));
            let room = r.room(4112);
            r.send(&[request], &[room])
        },
        refused,
    ),
    (
        "reply area over the request",
        |r| {
            let request = r.write(&Request::read(2, 0, 0, 4096));
            let room = Segment { address: r.request, len: 8192 };
            r.send_to(&[request], &[room], r.request)
        },
        any,
    ),
    (
        "request of empty pieces",
        |r| {
            let request = r.write(&Request::getattr(1));
            let room = r.room(120);
            let nothing = Segment { address: r.request, len: 0 };
            r.send(&[nothing, request, nothing], &[room])
        },
        not_stopped,
    ),
    (
        "pieces that add up beyond 4 GiB",
        |r| {
            let request = r.write(&Request::read(2, 0, 0, 4096));
            let room = r.room(4096);
            let huge = Segment { address: r.reply, len: u32::MAX };
            r.send(&[request], &[room, huge, huge])
        },
        any,
    ),
];

fn unknown(rogue: &mut Rogue, opcode: u32) -> Outcome {
    let request = rogue.write(&Request::new(opcode, 1, &[0; 64], 0));
    let room = rogue.room(4096);
    rogue.send(&[request], &[room])
}

#[test]
fn bad_requests_in_indirect_chains_are_answered() {
    run(CHAINS, Chains::Indirect);
}

#[test]
fn bad_requests_in_direct_chains_are_answered() {
    run(CHAINS, Chains::Direct);
}
