//! Each VMM's order of messages with reads parked: what they come to when the guest resets the device, and when it goes.

use nydus_vm::testing::driver::Chains;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::guest::SLOTS;
use nydus_vm::testing::memory::GuestMemory;
use nydus_vm::testing::orders::Order;
use nydus_vm::testing::vmm::Ack;
use nydus_vm::testing::vmm::Control;
use nydus_vm::testing::vmm::feature;
use nydus_vm::testing::vmm::message;

use crate::parked::GUEST;
use crate::parked::Parked;
use crate::support::Demo;
use crate::support::SMALL;
use crate::support::find;
use crate::support::read_file;

#[test]
fn guest_that_resets_with_reads_parked_starts_anew_in_each_order() {
    for order in Order::ALL {
        eprintln!("{order:?}");
        let mut parked = Parked::new(&GuestOptions { order, ..GUEST });
        parked.expect_service();
        // Twice: the second time the rings lie where they lay before, and stand elsewhere.
        parked.guest.reboot().unwrap();
        parked.guest.mount().unwrap();
        parked.expect_service();
        parked.guest.reboot().unwrap();
        parked.guest.mount().unwrap();
        parked.expect_service();
        parked.expect_dropped();
    }
}

#[test]
fn vmm_that_goes_with_reads_parked_may_come_back_in_each_order() {
    for order in Order::ALL {
        eprintln!("{order:?}");
        let mut parked = Parked::new(&GuestOptions { order, ..GUEST });
        parked.expect_service();
        let left = std::sync::Arc::clone(parked.guest.memory());
        let socket = parked.room.socket.clone();
        // The second VMM is in the backlog until the first has gone, so it is started from another thread.
        let next = std::thread::spawn(move || Guest::boot(&socket, &GuestOptions { order, ..GUEST }).unwrap());
        let mut parked = parked.followed_by(|| next.join().unwrap());
        let before = left.digest(SLOTS);
        parked.expect_service();
        parked.expect_dropped();
        assert_eq!(left.digest(SLOTS), before, "{order:?}: memory of a guest that has gone was written to");
    }
}

#[test]
fn broken_ring_that_is_only_disabled_and_set_up_again_is_served() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&["--tag", "nydus"]);
    for order in [Order::Alioth, Order::UserMode] {
        let options = GuestOptions { order, chains: Chains::Direct, request_queues: 2, ..SMALL };
        let mut guest = Guest::boot(daemon.socket(), &options).unwrap();
        guest.lane(1).queue().force_available_index(5000).unwrap();
        guest.lane(1).publish().unwrap();
        assert_eq!(guest.lane(2).call(&Request::getattr(1)).unwrap().errno, 0, "{order:?}: the other ring");
        guest.reboot().unwrap();
        guest.mount().unwrap();
        let warm = find(&mut guest, "/warm");
        assert_eq!(read_file(&mut guest, &warm, 16 << 10), Demo::warm(), "{order:?}");
    }
}

#[test]
fn tag_is_read_right_by_each_vmm_that_takes_it_from_the_device() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&["--tag", "nydus", "--queues", "3"]);
    for order in [Order::OpenVmm, Order::Alioth, Order::Crosvm, Order::UserMode] {
        let mut guest = Guest::connect(daemon.socket(), &GuestOptions { order, ..SMALL }).unwrap();
        let config = guest.vmm().config();
        let (tag, rest) = config.split_at(5);
        assert_eq!((tag, &rest[..31]), (b"nydus".as_slice(), [0; 31].as_slice()), "{order:?}");
        assert_eq!(config[36..40], 3u32.to_le_bytes(), "{order:?}");
    }
}

/// What User-Mode Linux sends without a relay: room for two regions, of which one is there.
#[test]
fn memory_table_of_another_size_than_its_regions_ends_that_connection_only() {
    let demo = Demo::new();
    let daemon = demo.nydusd(&["--tag", "nydus"]);
    let mut control = Control::connect(daemon.socket()).unwrap();
    control.ask_u64(message::GET_FEATURES).unwrap();
    control.set_protocol_features(feature::P_REPLY_ACK | feature::P_CONFIG, Ack::No).unwrap();
    let memory = GuestMemory::new(&[(0, 2 << 20)]).unwrap();
    let region = &memory.regions()[0];
    let numbers = [1, region.start(), region.size(), region.user_start(), 0, 0, 0, 0, 0];
    let payload: Vec<u8> = numbers.iter().flat_map(|n: &u64| n.to_le_bytes()).collect();
    assert!(control.tell(message::SET_MEM_TABLE, &payload, &[region.fd()], Ack::Wanted).is_err());
    drop(control);
    let mut guest = Guest::boot(daemon.socket(), &SMALL).unwrap();
    assert_eq!(guest.call(&Request::getattr(1)).unwrap().errno, 0);
}
