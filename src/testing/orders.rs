//! The orders in which VMMs set a vhost-user-fs device up, start it, reset it and go.
//!
//! Each order is written down as seen on the wire (QEMU 7.2 and 11.1, User-Mode Linux 6.1), or as read in that VMM's
//! source (QEMU before 5.1 and 8.2: `hw/virtio/vhost-user.c`; cloud-hypervisor: `virtio-devices/src/vhost_user`;
//! openvmm: `vhost_user_frontend`; alioth: `virtio/vu/frontend.rs`; crosvm: `vhost_user_frontend`; all of August 2026).
//!
//! What they would send and our request handler (vhost-user-backend) does not take, and what comes of it:
//!
//! | who | what | so |
//! |---|---|---|
//! | User-Mode Linux | SET_MEM_TABLE with room for two regions, whatever their count: the handler wants the exact size | the connection ends; a relay that cuts the message off makes it work |
//! | nobody we know | SET_MEM_TABLE with regions not in the order of their guest addresses | refused; the old table stays |
//! | User-Mode Linux, crosvm, alioth without `tag=` | GET_CONFIG | works with `--tag` only, see `config_space_is_offered_with_a_tag_only` |
//! | cloud-hypervisor | GET/SET_INFLIGHT_FD | not offered: what was in flight when a daemon died is lost |
//! | QEMU 8.2, cloud-hypervisor | SET_LOG_BASE, SET_DEVICE_STATE_FD | not offered: no live migration |
//! | alioth, QEMU 10 | SET_STATUS | not offered; all do without |
//! | alioth with `dax_window=`, crosvm | shared memory regions | not offered: alioth refuses the daemon, crosvm does without |
//! | crosvm | its own SLEEP, WAKE, SNAPSHOT and RESTORE | unknown messages: the connection ends |
//! | User-Mode Linux with time travel | INBAND_NOTIFICATIONS | not offered: it refuses the daemon |
//! | QEMU before 6.0 | guest features that were not offered | SET_FEATURES fails; with INDIRECT_DESC and EVENT_IDX offered it does not come to that |

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use rustix::event::EventfdFlags;

use super::driver::Queue;
use super::error::HarnessError;
use super::memory::GuestMemory;
use super::vmm::Ack;
use super::vmm::Control;
use super::vmm::feature;
use super::vmm::message;

mod others;
mod qemu;
mod user_mode;

/// Whose order of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// QEMU before 5.1: memory by SET_MEM_TABLE, CALL after ENABLE.
    Qemu,
    /// QEMU 7.2: memory by ADD_MEM_REG.
    QemuSlots,
    /// QEMU 8.2: waits for ENABLE, and sends RESET_DEVICE.
    Qemu8,
    /// QEMU 11.1: waits for each descriptor of a ring as well.
    Qemu11,
    /// cloud-hypervisor: every message acknowledged.
    CloudHypervisor,
    /// openvmm: one memory table per connection, queues one by one, RESET_DEVICE.
    OpenVmm,
    /// alioth: KICK before everything else of a ring, and never GET_VRING_BASE.
    Alioth,
    /// crosvm: nothing is acknowledged; it has as many rings as there are.
    Crosvm,
    /// User-Mode Linux: the kernel's own driver; nothing is ever stopped but by ENABLE 0.
    UserMode,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Qemu,
        Self::QemuSlots,
        Self::Qemu8,
        Self::Qemu11,
        Self::CloudHypervisor,
        Self::OpenVmm,
        Self::Alioth,
        Self::Crosvm,
        Self::UserMode,
    ];
}

/// A ring to be started.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    /// Index of the ring in the device; 0 is hiprio.
    pub index: u16,
    /// The ring.
    pub queue: &'a Queue,
    /// Number of the first available entry the device shall look at.
    pub base: u16,
}

/// A VMM connected to a device.
#[derive(Debug)]
pub struct Vmm {
    control: Control,
    order: Order,
    memory: Arc<GuestMemory>,
    /// Regions that the device knows, by index.
    known: Vec<usize>,
    offered: u64,
    protocol: u64,
    queue_num: u64,
    /// The configuration space as the VMM has read it; empty where it has its own.
    config: Vec<u8>,
    /// openvmm sends the guest's features once after each reset.
    has_sent_features: bool,
    /// Descriptors that a VMM hands over at realize and keeps: the back channel, errors.
    kept: Vec<OwnedFd>,
    /// What QEMU gives a ring in place of the guest's interrupt while that is masked.
    masked: Vec<OwnedFd>,
}

impl Vmm {
    /// Connects to `socket` and does what the VMM does before its guest runs, for a device of `rings` rings.
    ///
    /// # Errors
    /// What the device refuses or fails to do; [`HarnessError::Violation`] when it offers fewer rings.
    pub fn connect(socket: &Path, order: Order, memory: Arc<GuestMemory>, rings: u16) -> Result<Self, HarnessError> {
        let mut vmm = Self {
            control: Control::connect(socket)?,
            order,
            memory,
            known: Vec::new(),
            offered: 0,
            protocol: 0,
            queue_num: 0,
            config: Vec::new(),
            has_sent_features: false,
            kept: Vec::new(),
            masked: Vec::new(),
        };
        match order {
            Order::Qemu | Order::QemuSlots | Order::Qemu8 | Order::Qemu11 => vmm.realize_qemu(rings)?,
            Order::CloudHypervisor => vmm.realize_cloud_hypervisor()?,
            Order::OpenVmm => vmm.realize_openvmm()?,
            Order::Alioth => vmm.realize_alioth()?,
            Order::Crosvm => vmm.realize_crosvm()?,
            Order::UserMode => vmm.realize_user_mode()?,
        }
        if vmm.queue_num < u64::from(rings) {
            return Err(HarnessError::Violation(format!("{} rings offered, {rings} wanted", vmm.queue_num)));
        }
        Ok(vmm)
    }

    fn ask_features(&mut self) -> Result<(), HarnessError> {
        self.offered = self.control.ask_u64(message::GET_FEATURES)?;
        match self.offered & feature::PROTOCOL_FEATURES {
            0 => Err(HarnessError::Violation("no protocol features offered".into())),
            _ => Ok(()),
        }
    }

    fn negotiate_protocol(&mut self, wanted: u64) -> Result<(), HarnessError> {
        self.protocol = self.control.ask_u64(message::GET_PROTOCOL_FEATURES)? & wanted;
        self.control.set_protocol_features(self.protocol, Ack::No)
    }

    fn ask_queue_num(&mut self, without: u64) -> Result<(), HarnessError> {
        self.queue_num = match self.has(feature::P_MQ) {
            false => without,
            true => self.control.ask_u64(message::GET_QUEUE_NUM)?,
        };
        Ok(())
    }

    fn has(&self, protocol: u64) -> bool {
        self.protocol & protocol != 0
    }

    fn hand_back_channel(&mut self) -> Result<(), HarnessError> {
        if self.has(feature::P_BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair().map_err(|e| HarnessError::io("make the back channel", e))?;
            self.control.tell(message::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()], Ack::Wanted)?;
            self.kept.push(ours.into());
        }
        Ok(())
    }

    /// Does what the VMM does at DRIVER_OK: features, memory (regions not told yet), rings.
    ///
    /// # Errors
    /// What the device refuses or fails to do.
    pub fn start(&mut self, features: u64, regions: &[usize], rings: &[Start<'_>]) -> Result<(), HarnessError> {
        let features = (features | feature::PROTOCOL_FEATURES) & self.offered;
        match self.order {
            Order::Qemu | Order::QemuSlots | Order::Qemu8 | Order::Qemu11 => self.start_qemu(features, regions, rings),
            Order::CloudHypervisor => self.start_cloud_hypervisor(features, regions, rings),
            Order::OpenVmm => self.start_openvmm(features, regions, rings),
            Order::Alioth => self.start_alioth(features, regions, rings),
            Order::Crosvm => self.start_crosvm(features, regions, rings),
            Order::UserMode => self.start_user_mode(features, regions, rings),
        }
    }

    /// Does what the VMM does when the guest resets the device: a reboot, or a driver that lets go.
    ///
    /// # Errors
    /// What the device refuses or fails to do.
    pub fn reset(&mut self, rings: &[u16]) -> Result<(), HarnessError> {
        match self.order {
            Order::Qemu | Order::QemuSlots | Order::Qemu8 | Order::Qemu11 => self.reset_qemu(rings),
            Order::CloudHypervisor => self.stop(rings).map(drop),
            Order::OpenVmm => self.reset_openvmm(rings),
            Order::Alioth => self.pause(rings),
            Order::Crosvm => self.reset_crosvm(),
            Order::UserMode => self.reset_user_mode(rings),
        }
    }

    /// SET_FEATURES.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn set_features(&self, features: u64, ack: Ack) -> Result<(), HarnessError> {
        self.control.tell(message::SET_FEATURES, &features.to_le_bytes(), &[], ack)
    }

    fn enable(&self, rings: impl IntoIterator<Item = u16>, ack: Ack) -> Result<(), HarnessError> {
        let mut rings = rings.into_iter();
        rings.try_for_each(|ring| self.control.ring_number(message::SET_VRING_ENABLE, ring, 1, ack))
    }

    /// SET_MEM_TABLE with regions `regions` of the guest's memory, and no other.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn set_table(&mut self, regions: &[usize], ack: Ack) -> Result<(), HarnessError> {
        let all = self.memory.regions();
        let told: Vec<_> = regions.iter().map(|i| &all[*i]).collect();
        self.control.set_mem_table(&told, ack)?;
        self.known = regions.to_vec();
        Ok(())
    }

    fn add_missing(&mut self, regions: &[usize]) -> Result<(), HarnessError> {
        let missing: Vec<_> = regions.iter().filter(|r| !self.known.contains(r)).copied().collect();
        missing.into_iter().try_for_each(|region| self.add_region(region))
    }

    /// ADD_MEM_REG of region `region`, acknowledged.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn add_region(&mut self, region: usize) -> Result<(), HarnessError> {
        self.control.add_region(&self.memory.regions()[region], Ack::Wanted)?;
        self.known.push(region);
        Ok(())
    }

    /// REM_MEM_REG of region `region`, acknowledged.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn remove_region(&mut self, region: usize) -> Result<(), HarnessError> {
        self.control.remove_region(&self.memory.regions()[region], Ack::Wanted)?;
        self.known.retain(|known| *known != region);
        Ok(())
    }

    /// SET_VRING_ENABLE 0 on each of `rings`: cloud-hypervisor's pause.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn pause(&self, rings: &[u16]) -> Result<(), HarnessError> {
        rings.iter().try_for_each(|r| self.control.ring_number(message::SET_VRING_ENABLE, *r, 0, Ack::Wanted))
    }

    /// SET_VRING_ENABLE 1 on each of `rings`.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn resume(&self, rings: &[u16]) -> Result<(), HarnessError> {
        self.enable(rings.iter().copied(), Ack::Wanted)
    }

    /// Stops `rings` as QEMU does (ENABLE 0, then GET_VRING_BASE on each); their bases.
    ///
    /// # Errors
    /// What the device refuses or fails to do.
    pub fn stop(&self, rings: &[u16]) -> Result<Vec<u16>, HarnessError> {
        self.pause(rings)?;
        self.bases(rings)
    }

    fn bases(&self, rings: &[u16]) -> Result<Vec<u16>, HarnessError> {
        rings.iter().map(|ring| self.control.stop_ring(*ring)).collect()
    }

    /// RESET_DEVICE, acknowledged.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn reset_device(&mut self) -> Result<(), HarnessError> {
        self.has_sent_features = false;
        self.control.tell(message::RESET_DEVICE, &[], &[], Ack::Wanted)
    }

    /// The connection, for messages out of order.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Features that the device offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Protocol features in force.
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// The configuration space, as far as the VMM reads the device's.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Rings that the device says it has.
    pub fn queue_num(&self) -> u64 {
        self.queue_num
    }
}

fn event() -> Result<OwnedFd, HarnessError> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| HarnessError::io("make an event descriptor", e))
}
