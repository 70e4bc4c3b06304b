//! Guest memory that comes and goes under load, and guest memory of huge pages.

use std::fs;
use std::path::Path;

use nydus_vm::testing::driver::Segment;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::guest::RINGS;
use nydus_vm::testing::guest::SLOTS;
use nydus_vm::testing::guest::SPARE;
use nydus_vm::testing::memory::Backing;
use nydus_vm::testing::memory::HUGE_PAGE_BYTES;
use nydus_vm::testing::memory::free_huge_pages;
use nydus_vm::testing::orders::Order;
use nydus_vm::testing::vmm::Ack;
use nydus_vm::testing::vmm::PATIENCE;

use crate::parked::GUEST;
use crate::parked::Parked;
use crate::support::CHUNK_BYTES;
use crate::support::COLD_BYTES;
use crate::support::Demo;
use crate::support::SMALL;
use crate::support::find;
use crate::support::read_file;

/// Bytes of the region that comes and goes.
const SPARE_BYTES: u64 = 4 << 20;
/// Reads into it that are in flight at once, and the bytes of each.
const READS: u64 = 24;
const READ_BYTES: u32 = 64 << 10;
/// What it is filled with while it is not the daemon's.
const POISON: u8 = 0x5a;
const HEADER_BYTES: u64 = 16;

/// A guest whose second request queue reads into [`SPARE`].
struct Hot {
    guest: Guest,
    cold: u64,
    content: Vec<u8>,
    requests: u64,
    spare: u64,
}

impl Hot {
    fn boot(socket: &Path, options: &GuestOptions) -> Self {
        let mut guest = Guest::boot(socket, options).unwrap();
        let cold = find(&mut guest, "/cold").node;
        let requests = guest.scratch(READS * 128).unwrap();
        let spare = guest.memory().regions()[SPARE].start();
        Self { guest, cold, content: Demo::cold(), requests, spare }
    }

    /// Where reply `n` lies, its header first.
    fn reply(&self, n: u64) -> u64 {
        self.spare + n * (128 << 10)
    }

    /// Sends READs whose replies go to the spare region as a whole.
    fn send_into_spare(&mut self, turn: u64) {
        for n in 0..READS {
            let request = Request::read(self.cold, 0, self.offset(turn, n), READ_BYTES);
            let bytes = [request.header(2 * n).as_slice(), &request.body].concat();
            let at = self.requests + n * 128;
            self.guest.memory().write(at, &bytes);
            let reply = Segment { address: self.reply(n), len: READ_BYTES + HEADER_BYTES as u32 };
            let readable = Segment { address: at, len: bytes.len() as u32 };
            self.guest.lane(2).queue().add(&[readable], &[reply], n).unwrap();
        }
        self.guest.lane(2).publish().unwrap();
    }

    fn offset(&self, turn: u64, n: u64) -> u64 {
        (turn * 31 + n * 7) * CHUNK_BYTES as u64 % (COLD_BYTES as u64 - u64::from(READ_BYTES))
    }

    /// Waits for all of them: (read, used length).
    fn used(&mut self) -> Vec<(u64, u32)> {
        let queue = self.guest.lane(2).queue();
        let mut used = Vec::new();
        while used.len() < READS as usize {
            match queue.take().unwrap() {
                Some(one) => used.push((one.token, one.len)),
                None => assert!(queue.wait(PATIENCE).unwrap(), "{} of {READS} are used", used.len()),
            }
        }
        used
    }

    /// Checks the reply of read `n`, which is in the spare region.
    fn expect_reply(&self, turn: u64, n: u64, len: u32) {
        assert_eq!(len, READ_BYTES + HEADER_BYTES as u32, "turn {turn}, read {n}");
        let body = self.guest.memory().read_vec(self.reply(n) + HEADER_BYTES, READ_BYTES as usize);
        let offset = self.offset(turn, n) as usize;
        assert!(body == self.content[offset..offset + READ_BYTES as usize], "turn {turn}, read {n}");
    }

    /// READs of a megabyte on the first queue, which go on whatever becomes of the spare region.
    fn begin_load(&mut self, turn: u64) -> Vec<(u64, usize)> {
        let lane = self.guest.lane(1);
        let mut flying = Vec::new();
        while lane.room() > 0 {
            let offset = (flying.len() + turn as usize * 7) * CHUNK_BYTES % (COLD_BYTES - (1 << 20));
            flying.push((lane.submit(&Request::read(self.cold, 0, offset as u64, 1 << 20)).unwrap(), offset));
        }
        lane.publish().unwrap();
        flying
    }

    fn end_load(&mut self, turn: u64, flying: Vec<(u64, usize)>) {
        for (unique, offset) in flying {
            let done = self.guest.lane(1).wait_for(unique, PATIENCE).unwrap();
            let body = self.guest.lane(1).reply(done).body().unwrap();
            assert!(body == self.content[offset..offset + (1 << 20)], "turn {turn}, offset {offset}");
        }
    }

    fn poison(&self) {
        self.guest.memory().fill(self.spare, SPARE_BYTES as usize, POISON);
    }

    fn expect_poison(&self, turn: u64) {
        let bytes = self.guest.memory().read_vec(self.spare, SPARE_BYTES as usize);
        assert!(bytes.iter().all(|byte| *byte == POISON), "turn {turn}: written to after it was removed");
    }
}

const HOT: GuestOptions =
    GuestOptions { request_queues: 2, depth: 24, spare_bytes: SPARE_BYTES, ..GuestOptions::LINUX };

#[test]
fn regions_come_and_go_under_load_and_nothing_is_written_to_those_that_went() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    for order in [Order::QemuSlots, Order::Qemu11, Order::CloudHypervisor] {
        let mut hot = Hot::boot(daemon.socket(), &GuestOptions { order, ..HOT });
        for turn in 0..8 {
            let load = hot.begin_load(turn);
            // Plugged while reads run; what is read into it is right.
            hot.guest.vmm().add_region(SPARE).unwrap();
            hot.send_into_spare(turn);
            for (n, len) in hot.used() {
                hot.expect_reply(turn, n, len);
            }
            // Unplugged while reads into it run: each of them has come before, or comes to nothing.
            hot.send_into_spare(turn + 1000);
            hot.guest.vmm().remove_region(SPARE).unwrap();
            hot.poison();
            for (n, len) in hot.used() {
                assert!(len == 0 || len == READ_BYTES + HEADER_BYTES as u32, "read {n}: used length {len}");
            }
            hot.end_load(turn, load);
            hot.expect_poison(turn);
        }
        let warm = find(&mut hot.guest, "/warm");
        assert_eq!(read_file(&mut hot.guest, &warm, 64 << 10), Demo::warm(), "{order:?}");
    }
}

#[test]
fn memory_tables_with_and_without_a_region_alternate_while_rings_run() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    let mut hot = Hot::boot(daemon.socket(), &HOT);
    for turn in 0..8 {
        let load = hot.begin_load(turn);
        hot.guest.vmm().set_table(&[RINGS, SLOTS, SPARE], Ack::Wanted).unwrap();
        hot.send_into_spare(turn);
        for (n, len) in hot.used() {
            hot.expect_reply(turn, n, len);
        }
        hot.send_into_spare(turn + 1000);
        hot.guest.vmm().set_table(&[RINGS, SLOTS], Ack::Wanted).unwrap();
        hot.poison();
        hot.used();
        hot.end_load(turn, load);
        hot.expect_poison(turn);
    }
}

#[test]
fn parked_reads_complete_into_regions_that_were_plugged_meanwhile() {
    let mut parked = Parked::new(&GuestOptions { order: Order::Qemu11, spare_bytes: SPARE_BYTES, ..GUEST });
    for _ in 0..20 {
        parked.guest.vmm().add_region(SPARE).unwrap();
        parked.expect_service();
        parked.guest.vmm().remove_region(SPARE).unwrap();
    }
    parked.guest.vmm().add_region(SPARE).unwrap();
    parked.release();
    parked.expect_all();
}

/// More huge pages for as long as it lives, where we may ask for them.
struct HugePages {
    before: Option<String>,
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// `None`, with a word, where `pages` are not to be had.
    fn reserve(pages: u64) -> Option<Self> {
        let free = free_huge_pages()?;
        if free >= pages {
            return Some(Self { before: None });
        }
        let before = fs::read_to_string(HUGE_PAGES).ok()?.trim().to_owned();
        let wanted = before.parse::<u64>().ok()? + pages - free;
        let asked = fs::write(HUGE_PAGES, wanted.to_string());
        let reserved = Self { before: Some(before) };
        if asked.is_err() || free_huge_pages()? < pages {
            eprintln!("SKIPPED: {pages} huge pages are not to be had ({HUGE_PAGES}; needs root)");
            return None;
        }
        Some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // It was possible a moment ago; a test that fails here would hide why it failed before.
            let _ = fs::write(HUGE_PAGES, before);
        }
    }
}

/// One test for both, since the number of huge pages is the machine's: without any, then with enough.
#[test]
fn huge_pages_serve_a_guest_and_missing_ones_cost_a_reply_only() {
    missing_huge_pages();
    let options = GuestOptions { backing: Backing::HugePages, order: Order::Qemu11, ..SMALL };
    // Rings and slots of this guest take less than 16 pages each.
    let Some(_pages) = HugePages::reserve(32) else { return };
    let demo = Demo::new();
    let daemon = demo.nydusd(&[]);
    for _ in 0..3 {
        let mut guest = Guest::boot(daemon.socket(), &options).unwrap();
        for path in ["/warm", "/cold"] {
            let entry = find(&mut guest, path);
            let content = read_file(&mut guest, &entry, 16 << 10);
            assert!(content == if path == "/warm" { Demo::warm() } else { Demo::cold() }, "{path}");
        }
        guest.reboot().unwrap();
        guest.mount().unwrap();
    }
}

fn missing_huge_pages() {
    match free_huge_pages() {
        Some(0) => {}
        free => return eprintln!("SKIPPED the part without huge pages: free huge pages: {free:?}"),
    }
    let demo = Demo::new();
    let mut daemon = demo.nydusd(&[]);
    let spare = GuestOptions { spare_bytes: 2 * HUGE_PAGE_BYTES, spare_backing: Backing::HugePages, ..HOT };
    let mut guest = Guest::boot(daemon.socket(), &GuestOptions { order: Order::Qemu11, ..spare }).unwrap();
    let warm = find(&mut guest, "/warm");
    let spare = guest.memory().regions()[SPARE].start();
    let request = Request::read(warm.node, 0, 0, READ_BYTES);
    let bytes = [request.header(2).as_slice(), &request.body].concat();
    let at = guest.scratch(4096).unwrap();
    guest.memory().write(at, &bytes);
    let readable = Segment { address: at, len: bytes.len() as u32 };
    for _ in 0..2 {
        guest.vmm().add_region(SPARE).unwrap();
        // The header lies in good memory, the body does not.
        let header = Segment { address: at + 1024, len: HEADER_BYTES as u32 };
        let body = Segment { address: spare, len: READ_BYTES };
        guest.lane(2).queue().add(&[readable], &[header, body], 0).unwrap();
        // Nothing of the reply has a place; and a request that cannot be read has no reply but an error.
        guest.lane(2).queue().add(&[readable], &[Segment { address: spare, len: READ_BYTES }], 1).unwrap();
        let request = Segment { address: spare + HUGE_PAGE_BYTES, len: bytes.len() as u32 };
        let header = Segment { address: at + 2048, len: HEADER_BYTES as u32 };
        guest.lane(2).queue().add(&[request], &[header], 2).unwrap();
        guest.lane(2).publish().unwrap();
        let mut used = Vec::new();
        while used.len() < 3 {
            let queue = guest.lane(2).queue();
            match queue.take().unwrap() {
                Some(one) => used.push((one.token, one.len)),
                None => assert!(queue.wait(PATIENCE).unwrap(), "used: {used:?}"),
            }
        }
        used.sort_unstable();
        assert_eq!(used, [(0, 16), (1, 0), (2, 16)]);
        for header in [at + 1024, at + 2048] {
            let error = i32::from_le_bytes(guest.memory().read_vec(header + 4, 4).try_into().unwrap());
            assert_eq!(error, -libc::EIO);
        }
        assert_eq!(read_file(&mut guest, &warm, 64 << 10), Demo::warm(), "all else goes on");
        guest.vmm().remove_region(SPARE).unwrap();
    }
    assert!(daemon.is_running().unwrap());
}
