//! FUSE_INIT of old, new and strange guests, and what old guests ask for afterwards.

use nydus_vm::testing::fuse_client::Attributes;
use nydus_vm::testing::fuse_client::EntryReply;
use nydus_vm::testing::fuse_client::InitReply;
use nydus_vm::testing::fuse_client::Listing;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::fuse_client::directory_entries;
use nydus_vm::testing::fuse_client::init_flag;
use nydus_vm::testing::fuse_client::opcode;
use nydus_vm::testing::fuse_client::opened;
use nydus_vm::testing::guest::Guest;

use crate::support::Demo;
use crate::support::SMALL;
use crate::support::WARM_BYTES;
use crate::support::find;

const ENOENT: i32 = 2;
const EIO: i32 = 5;
const EROFS: i32 = 30;
const ENOSYS: i32 = 38;

/// What the virtio-fs patches before Linux 5.4 sent (protocol 7.31 and older): no MAX_PAGES, no zero-message open.
const OLD_FLAGS: u32 = 0x0003_ffff & !(init_flag::NO_OPEN_SUPPORT as u32);

#[test]
fn init_is_answered_in_the_size_and_minor_of_the_guest() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::start(daemon.socket(), &SMALL).unwrap();
    let ours = InitReply::parse(&guest.call(&Request::init(99, init_flag::LINUX_6_12)).unwrap().body().unwrap(), 99);
    let ours = ours.unwrap().minor;
    assert!(ours >= 38, "protocol 7.{ours}");
    for minor in [27, 28, 29, 30, 31, 33, 34, 36, 38, 39, 40, 41, 44] {
        for request in [Request::init_short(minor, OLD_FLAGS), Request::init(minor, init_flag::LINUX_6_12)] {
            let body = guest.call(&request).unwrap().body().unwrap();
            let reply = InitReply::parse(&body, minor).unwrap();
            assert_eq!((reply.major, reply.minor), (7, minor.min(ours)));
            assert!(reply.max_write >= 4096);
            let offered = match request.body.len() {
                16 => u64::from(OLD_FLAGS),
                _ => init_flag::LINUX_6_12,
            };
            assert_eq!(reply.flags & !offered, 0, "minor {minor}: flags that were not offered");
        }
    }
}

#[test]
fn init_of_another_major_gets_ours_and_a_second_init_settles_it() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::start(daemon.socket(), &SMALL).unwrap();
    let mut newer = Request::init(0, init_flag::LINUX_6_12);
    newer.body[..4].copy_from_slice(&8u32.to_le_bytes());
    let reply = guest.call(&newer).unwrap();
    assert_eq!((reply.errno, &reply.body[..4]), (0, 7u32.to_le_bytes().as_slice()));
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, EIO, "no session yet");
    guest.mount().unwrap();
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
    let mut older = Request::init(0, 0);
    older.body[..4].copy_from_slice(&6u32.to_le_bytes());
    assert_ne!(guest.call(&older).unwrap().errno, 0);
}

#[test]
fn init_of_eight_bytes_is_answered() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::start(daemon.socket(), &SMALL).unwrap();
    let mut request = Request::init(31, 0);
    request.body.truncate(8);
    // A kernel that old cannot mount us; the daemon must not care.
    guest.call(&request).unwrap();
    guest.mount().unwrap();
}

#[test]
fn requests_before_init_are_answered_eio() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::start(daemon.socket(), &SMALL).unwrap();
    for request in [Request::getattr(1), Request::lookup(1, b"warm"), Request::read(1, 0, 0, 4096), Request::statfs(1)]
    {
        assert_eq!(guest.call(&request).unwrap().errno, EIO, "operation {}", request.opcode);
    }
    guest.lane(0).forget(1, 1).unwrap();
    guest.mount().unwrap();
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
}

#[test]
fn requests_after_destroy_wait_for_a_new_session() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &SMALL).unwrap();
    assert_eq!(guest.call(&Request::destroy()).unwrap().errno, 0);
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, EIO);
    guest.mount().unwrap();
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
}

/// `mount -t virtio_fs none /mnt -o tag=nydus,default_permissions,...` of kernels before 5.4, and what `ls -l` and `cat`
/// then send.
#[test]
fn old_guest_opens_lists_reads_and_leaves() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    for minor in [27, 31] {
        let mut guest = Guest::start(daemon.socket(), &SMALL).unwrap();
        let body = guest.call(&Request::init_short(minor, OLD_FLAGS)).unwrap().body().unwrap();
        let init = InitReply::parse(&body, minor).unwrap();
        assert_eq!(init.flags & (init_flag::NO_OPEN_SUPPORT | init_flag::MAX_PAGES | init_flag::INIT_EXT), 0);
        let body = guest.call(&Request::getattr(1)).unwrap().body().unwrap();
        assert_eq!(Attributes::from_getattr(&body).unwrap().0.mode & 0o170_000, 0o040_000);

        let (dir, _) = opened(&guest.call(&Request::opendir(1)).unwrap().body().unwrap()).unwrap();
        let body = guest.call(&Request::readdir(1, dir, 0, 4096)).unwrap().body().unwrap();
        let names: Vec<_> = directory_entries(&body, Listing::Plain).unwrap().into_iter().map(|e| e.name).collect();
        for name in [b".".as_slice(), b"..", b"warm", b"cold", b"dir", b"link"] {
            assert!(names.contains(&name.to_vec()), "{names:?}");
        }
        assert_eq!(guest.call(&Request::releasedir(1, dir)).unwrap().errno, 0);

        let warm = find(&mut guest, "/warm");
        let (fh, _) = opened(&guest.call(&Request::open(warm.node, 0o100_000)).unwrap().body().unwrap()).unwrap();
        let body = guest.call(&Request::read(warm.node, fh, 0, 16 << 10)).unwrap().body().unwrap();
        assert_eq!(body, Demo::warm()[..16 << 10]);
        let body = guest.call(&Request::read(warm.node, fh, WARM_BYTES as u64 - 10, 4096)).unwrap().body().unwrap();
        assert_eq!(body, Demo::warm()[WARM_BYTES - 10..]);
        let flushed = guest.call(&Request::flush(warm.node, fh)).unwrap().errno;
        assert!([0, ENOSYS].contains(&flushed), "{flushed}");
        assert_eq!(guest.call(&Request::release(warm.node, fh)).unwrap().errno, 0);

        let link = find(&mut guest, "/link");
        assert_eq!(guest.call(&Request::readlink(link.node)).unwrap().body().unwrap(), b"warm");
        assert_eq!(guest.call(&Request::statfs(1)).unwrap().body().unwrap().len(), 80);
        let missing = guest.call(&Request::lookup(1, b"missing")).unwrap();
        let negative = missing.errno == 0 && EntryReply::from_lookup(&missing.body).unwrap().node == 0;
        assert!(negative || missing.errno == ENOENT);
        guest.lane(0).forget(warm.node, 1).unwrap();
        assert_eq!(guest.call(&Request::destroy()).unwrap().errno, 0);
    }
}

#[test]
fn new_guest_opens_without_a_message_and_believes_names_for_ever() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::start(daemon.socket(), &SMALL).unwrap();
    let init = guest.mount().unwrap();
    let wanted = init_flag::NO_OPEN_SUPPORT
        | init_flag::NO_OPENDIR_SUPPORT
        | init_flag::CACHE_SYMLINKS
        | init_flag::PARALLEL_DIROPS
        | init_flag::DO_READDIRPLUS
        | init_flag::MAX_PAGES;
    assert_eq!(init.flags & wanted, wanted, "flags {:#x}", init.flags);
    assert_eq!((init.max_pages, init.max_write), (256, 1 << 20));
    let warm = find(&mut guest, "/warm");
    assert!(warm.entry_valid >= 1 << 31 && warm.attr_valid >= 1 << 31);
    let missing =
        EntryReply::from_lookup(&guest.call(&Request::lookup(1, b"missing")).unwrap().body().unwrap()).unwrap();
    assert!(missing.node == 0 && missing.entry_valid >= 1 << 31, "{missing:?}");
    assert_eq!(guest.call(&Request::open(warm.node, 0)).unwrap().errno, ENOSYS);
    assert_eq!(guest.call(&Request::opendir(1)).unwrap().errno, ENOSYS);
}

#[test]
fn changes_are_answered_read_only() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut guest = Guest::boot(daemon.socket(), &SMALL).unwrap();
    let warm = find(&mut guest, "/warm").node;
    let name = |body: &[u8]| [body, b"new\0"].concat();
    let write = Request::new(opcode::WRITE, warm, &[&[0; 16][..], &4u32.to_le_bytes(), &[0; 20], b"data"].concat(), 8);
    let requests = [
        write,
        Request::new(opcode::CREATE, 1, &name(&[0; 16]), 144),
        Request::new(opcode::SETXATTR, warm, &[&1u32.to_le_bytes()[..], &[0; 4], b"user.a\0x"].concat(), 0),
        Request::new(10, 1, b"warm\0", 0),
        Request::new(9, 1, &name(&[0; 8]), 128),
    ];
    for request in requests {
        assert_eq!(guest.call(&request).unwrap().errno, EROFS, "operation {}", request.opcode);
    }
}
