//! The fake guest against a daemon that is not ours: shows that the harness itself plays by the rules.

use std::fs;
use std::path::Path;
use std::process::Command;

use nydus_vm::testing::driver::Chains;
use nydus_vm::testing::driver::Notifications;
use nydus_vm::testing::fuse_client::Attributes;
use nydus_vm::testing::fuse_client::EntryReply;
use nydus_vm::testing::fuse_client::Listing;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::fuse_client::directory_entries;
use nydus_vm::testing::fuse_client::opened;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::lane::Mode;
use nydus_vm::testing::manifest;
use nydus_vm::testing::orders::Order;
use nydus_vm::testing::process::DaemonProcess;
use nydus_vm::testing::tree::WalkOptions;
use nydus_vm::testing::tree::walk;
use nydus_vm::testing::vmm::PATIENCE;
use nydus_vm::testing::vmm::message;

const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Debian's virtiofsd on `tree`; `None`, with a word, where it cannot run.
fn virtiofsd(tree: &Path, home: &Path) -> Option<DaemonProcess> {
    if !Path::new(VIRTIOFSD).exists() || !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: {VIRTIOFSD} is not installed, or we are not root");
        return None;
    }
    let socket = home.join("virtiofsd.sock");
    let mut command = Command::new(VIRTIOFSD);
    command.arg(format!("--socket-path={}", socket.display()));
    command.args([
        "-o",
        &format!("source={}", tree.display()),
        "-o",
        "cache=always",
        "-o",
        "sandbox=chroot",
        "-o",
        "xattr",
        "-f",
    ]);
    command.args(["--rlimit-nofile=0", "-o", "modcaps=+sys_admin"]);
    Some(DaemonProcess::start(command, &socket, &home.join("log")).expect("virtiofsd starts"))
}

fn options(order: Order, chains: Chains, notifications: Notifications, mode: Mode) -> GuestOptions {
    GuestOptions { order, chains, notifications, mode, ..GuestOptions::LINUX }
}

#[test]
fn harness_drives_virtiofsd_in_every_way() {
    let home = tempfile::tempdir().unwrap();
    let tree = home.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    fs::write(tree.join("file"), &content).unwrap();
    let ways = [
        options(Order::Qemu, Chains::Indirect, Notifications::EventIdx, Mode::Event),
        options(Order::Qemu, Chains::Direct, Notifications::Flags, Mode::Event),
        options(Order::CloudHypervisor, Chains::Indirect, Notifications::Flags, Mode::Poll),
        options(Order::CloudHypervisor, Chains::Direct, Notifications::EventIdx, Mode::Poll),
        options(Order::OpenVmm, Chains::Indirect, Notifications::EventIdx, Mode::Event),
    ];
    for way in ways {
        // It ends with its client.
        let Some(daemon) = virtiofsd(&tree, home.path()) else { return };
        let mut guest = Guest::boot(daemon.socket(), &way).unwrap();
        let body = guest.call(&Request::lookup(1, b"file")).unwrap().body().unwrap();
        let entry = EntryReply::from_lookup(&body).unwrap();
        assert_eq!(entry.attributes.size, content.len() as u64);
        assert_eq!(guest.call(&Request::lookup(1, b"missing")).unwrap().errno, 2);
        let (attributes, _) =
            Attributes::from_getattr(&guest.call(&Request::getattr(entry.node)).unwrap().body().unwrap()).unwrap();
        assert_eq!(attributes.mode & 0o170_000, 0o100_000);
        let (fh, _) = opened(&guest.call(&Request::open(entry.node, 0)).unwrap().body().unwrap()).unwrap();
        read_all(&mut guest, entry.node, fh, &content);
        let (dir, _) = opened(&guest.call(&Request::opendir(1)).unwrap().body().unwrap()).unwrap();
        let listing = guest.call(&Request::readdirplus(1, dir, 0, 4096)).unwrap().body().unwrap();
        let names: Vec<_> = directory_entries(&listing, Listing::Plus).unwrap().into_iter().map(|e| e.name).collect();
        assert!(names.contains(&b"file".to_vec()), "{names:?}");
        guest.lane(0).forget(entry.node, 1).unwrap();
        let bases = guest.stop().unwrap();
        guest.continue_rings(&bases).unwrap();
        // CALL comes after ENABLE, and virtiofsd does not signal it at once: without this question, whose answer says
        // that CALL was seen, an interrupt would be lost now and then.
        guest.vmm().control().ask_u64(message::GET_FEATURES).unwrap();
        assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0, "after stop and cont");
    }
}

/// Reads with as many requests in flight as the lane has room for, in pieces of odd sizes.
fn read_all(guest: &mut Guest, node: u64, fh: u64, content: &[u8]) {
    let lane = guest.lane(1);
    let mut offset = 0;
    let mut in_flight = Vec::new();
    let mut seen = 0;
    while seen < content.len() {
        while lane.room() > 0 && offset < content.len() {
            let size = [4096, 100_000, 1 << 20][in_flight.len() % 3];
            let unique = lane.submit(&Request::read(node, fh, offset as u64, size)).unwrap();
            in_flight.push((unique, offset, size as usize));
            offset += size as usize;
        }
        lane.publish().unwrap();
        let done = lane.wait(PATIENCE).unwrap();
        let (_, at, size) = in_flight.iter().find(|f| f.0 == done.unique).copied().unwrap();
        let reply = lane.reply(done).body().unwrap();
        assert_eq!(reply, content[at..(at + size).min(content.len())], "at {at}");
        seen += reply.len();
    }
}

/// Debian's virtiofsd serves the unpacked tree of a reference image; the walk must find what the manifest says. Owners,
/// devices and xattrs included, so it needs root.
#[test]
fn walk_of_virtiofsd_finds_the_reference_tree() {
    let Some(images) = manifest::reference_images() else { return };
    let home = tempfile::tempdir().unwrap();
    let tree = home.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let folder = images.join("v6-lz4-blake3");
    let Some(daemon) = virtiofsd(&tree, home.path()) else { return };
    let unpacked = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "-xpf"])
        .arg(folder.join("source.tar"))
        .arg("-C")
        .arg(&tree)
        .status()
        .unwrap();
    assert!(unpacked.success());
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions { depth: 40, ..GuestOptions::LINUX }).unwrap();
    let walked = walk(&mut guest, &WalkOptions::USUAL).unwrap();
    // A tar holds no sockets; a directory's time and size are the host's own.
    let wanted: Vec<_> = manifest::read(&folder).into_iter().filter(|entry| entry.kind != b's').collect();
    let differences = walked.differences(&wanted);
    assert!(walked.found.len() >= wanted.len());
    assert_eq!(differences, Vec::<String>::new());
}
