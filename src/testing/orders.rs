//! The orders in which VMMs set a vhost-user-fs device up, start it and stop it.
//!
//! Each order is written down as read in that VMM's source: QEMU 7.2 (`hw/virtio/vhost-user.c`, `vhost-user-fs.c`),
//! cloud-hypervisor of August 2026 (`virtio-devices/src/vhost_user`), openvmm and alioth of August 2026.

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

/// Whose order of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// QEMU 7.2: memory by SET_MEM_TABLE, CALL after ENABLE.
    Qemu,
    /// QEMU with CONFIGURE_MEM_SLOTS: memory by ADD_MEM_REG.
    QemuSlots,
    /// cloud-hypervisor: every message acknowledged.
    CloudHypervisor,
    /// openvmm: one memory table per connection, queues one by one, RESET_DEVICE.
    OpenVmm,
    /// alioth: KICK before everything else of a ring.
    Alioth,
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
    /// Descriptors that a VMM hands over at realize and keeps: masked notifiers, the back channel.
    kept: Vec<OwnedFd>,
}

impl Vmm {
    /// Connects to `socket` and does what the VMM does before its guest runs, for a device of `rings` rings.
    ///
    /// # Errors
    /// What the device refuses or fails to do; [`HarnessError::Violation`] when it offers fewer rings.
    pub fn connect(socket: &Path, order: Order, memory: Arc<GuestMemory>, rings: u16) -> Result<Self, HarnessError> {
        let control = Control::connect(socket)?;
        let kept = Vec::new();
        let mut vmm = Self { control, order, memory, known: Vec::new(), offered: 0, protocol: 0, queue_num: 0, kept };
        match order {
            Order::Qemu | Order::QemuSlots => vmm.realize_qemu(rings)?,
            Order::CloudHypervisor => vmm.realize_cloud_hypervisor()?,
            Order::OpenVmm => vmm.realize_openvmm()?,
            Order::Alioth => vmm.realize_alioth(rings)?,
        }
        if vmm.queue_num < u64::from(rings) {
            return Err(HarnessError::Violation(format!("{} rings offered, {rings} wanted", vmm.queue_num)));
        }
        Ok(vmm)
    }

    fn negotiate_protocol(&mut self, wanted: u64) -> Result<(), HarnessError> {
        self.offered = self.control.ask_u64(message::GET_FEATURES)?;
        if self.offered & feature::PROTOCOL_FEATURES == 0 {
            return Err(HarnessError::Violation("no protocol features offered".into()));
        }
        self.protocol = self.control.ask_u64(message::GET_PROTOCOL_FEATURES)? & wanted;
        self.control.set_protocol_features(self.protocol)
    }

    fn realize_qemu(&mut self, rings: u16) -> Result<(), HarnessError> {
        let mut wanted = feature::P_MQ | feature::P_REPLY_ACK | feature::P_BACKEND_REQ | feature::P_BACKEND_SEND_FD;
        wanted |= feature::P_RESET_DEVICE;
        if self.order == Order::QemuSlots {
            wanted |= feature::P_CONFIGURE_MEM_SLOTS;
        }
        self.negotiate_protocol(wanted)?;
        self.ask_queue_num(1)?;
        if self.protocol & feature::P_CONFIGURE_MEM_SLOTS != 0 {
            self.control.ask_u64(message::GET_MAX_MEM_SLOTS)?;
        }
        self.hand_back_channel()?;
        self.control.tell(message::SET_OWNER, &[], &[], Ack::No)?;
        self.offered = self.control.ask_u64(message::GET_FEATURES)?;
        for ring in 0..rings {
            let masked = event()?;
            self.control.ring_event(message::SET_VRING_CALL, ring, masked.as_fd(), Ack::No)?;
            self.kept.push(masked);
        }
        Ok(())
    }

    fn realize_cloud_hypervisor(&mut self) -> Result<(), HarnessError> {
        self.control.tell(message::SET_OWNER, &[], &[], Ack::No)?;
        let wanted = feature::P_MQ | feature::P_CONFIGURE_MEM_SLOTS | feature::P_REPLY_ACK;
        self.negotiate_protocol(wanted)?;
        self.ask_queue_num(2)
    }

    fn realize_openvmm(&mut self) -> Result<(), HarnessError> {
        self.negotiate_protocol(feature::P_MQ | feature::P_REPLY_ACK | feature::P_RESET_DEVICE)?;
        self.control.tell(message::SET_OWNER, &[], &[], Ack::Wanted)?;
        self.ask_queue_num(1)
    }

    fn realize_alioth(&mut self, rings: u16) -> Result<(), HarnessError> {
        let needed = feature::P_MQ | feature::P_REPLY_ACK | feature::P_CONFIGURE_MEM_SLOTS;
        self.negotiate_protocol(needed | feature::P_BACKEND_REQ)?;
        if self.protocol & needed != needed {
            return Err(HarnessError::Violation("MQ, REPLY_ACK and CONFIGURE_MEM_SLOTS are not all offered".into()));
        }
        self.ask_queue_num(1)?;
        self.hand_back_channel()?;
        for ring in 0..rings {
            let error = event()?;
            self.control.ring_event(message::SET_VRING_ERR, ring, error.as_fd(), Ack::Wanted)?;
            self.kept.push(error);
        }
        self.control.tell(message::SET_OWNER, &[], &[], Ack::Wanted)
    }

    fn ask_queue_num(&mut self, without: u64) -> Result<(), HarnessError> {
        self.queue_num = match self.protocol & feature::P_MQ {
            0 => without,
            _ => self.control.ask_u64(message::GET_QUEUE_NUM)?,
        };
        Ok(())
    }

    fn hand_back_channel(&mut self) -> Result<(), HarnessError> {
        if self.protocol & feature::P_BACKEND_REQ != 0 {
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
            Order::Qemu | Order::QemuSlots => self.start_qemu(features, regions, rings),
            Order::CloudHypervisor => self.start_cloud_hypervisor(features, regions, rings),
            Order::OpenVmm => self.start_openvmm(features, regions, rings),
            Order::Alioth => self.start_alioth(features, regions, rings),
        }
    }

    fn start_qemu(&mut self, features: u64, regions: &[usize], rings: &[Start<'_>]) -> Result<(), HarnessError> {
        self.set_features(features, Ack::No)?;
        if self.protocol & feature::P_CONFIGURE_MEM_SLOTS != 0 {
            self.add_missing(regions)?;
        } else {
            self.set_table(regions, Ack::Wanted)?;
        }
        for ring in rings {
            let control = &self.control;
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::No)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::No)?;
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::No)?;
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), Ack::No)?;
            control.ring_event(message::SET_VRING_ERR, ring.index, ring.queue.error_fd(), Ack::No)?;
        }
        self.enable(rings.iter().map(|r| r.index), Ack::Wanted)?;
        for ring in rings {
            self.control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), Ack::No)?;
        }
        Ok(())
    }

    fn start_cloud_hypervisor(
        &mut self,
        features: u64,
        regions: &[usize],
        rings: &[Start<'_>],
    ) -> Result<(), HarnessError> {
        self.set_features(features, Ack::Wanted)?;
        self.set_table(regions, Ack::Wanted)?;
        let control = &self.control;
        for ring in rings {
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::Wanted)?;
        }
        for ring in rings {
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::Wanted)?;
            control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), Ack::Wanted)?;
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), Ack::Wanted)?;
        }
        self.enable(rings.iter().map(|r| r.index), Ack::Wanted)
    }

    fn start_openvmm(&mut self, features: u64, regions: &[usize], rings: &[Start<'_>]) -> Result<(), HarnessError> {
        if self.known.is_empty() {
            self.set_table(regions, Ack::Wanted)?;
        }
        self.set_features(features, Ack::Wanted)?;
        for ring in rings {
            let control = &self.control;
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::Wanted)?;
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::Wanted)?;
            control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), Ack::Wanted)?;
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), Ack::Wanted)?;
            self.enable([ring.index], Ack::Wanted)?;
        }
        Ok(())
    }

    fn start_alioth(&mut self, features: u64, regions: &[usize], rings: &[Start<'_>]) -> Result<(), HarnessError> {
        self.add_missing(regions)?;
        self.set_features(features, Ack::Wanted)?;
        for ring in rings {
            let control = &self.control;
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::Wanted)?;
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::Wanted)?;
            control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), Ack::Wanted)?;
        }
        self.enable(rings.iter().map(|r| r.index), Ack::Wanted)
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
        rings.iter().map(|ring| self.control.stop_ring(*ring)).collect()
    }

    /// RESET_DEVICE, acknowledged.
    ///
    /// # Errors
    /// As [`Control::tell`].
    pub fn reset_device(&self) -> Result<(), HarnessError> {
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

    /// Rings that the device says it has.
    pub fn queue_num(&self) -> u64 {
        self.queue_num
    }
}

fn event() -> Result<OwnedFd, HarnessError> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| HarnessError::io("make an event descriptor", e))
}
