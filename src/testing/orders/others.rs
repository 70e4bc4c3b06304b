//! cloud-hypervisor, openvmm, alioth and crosvm.

use std::os::fd::AsFd;

use super::Start;
use super::Vmm;
use super::event;
use crate::testing::error::HarnessError;
use crate::testing::vmm::Ack;
use crate::testing::vmm::feature;
use crate::testing::vmm::message;

/// Bytes of configuration space that openvmm asks for.
const OPENVMM_CONFIG_BYTES: u32 = 256;
/// Flag of GET_CONFIG that crosvm sets (VHOST_USER_CONFIG_FLAGS_WRITABLE).
const CROSVM_CONFIG_FLAGS: u32 = 1;
/// Bytes of a virtio-fs configuration space: the tag, and the number of request queues.
const CONFIG_BYTES: u32 = 40;

impl Vmm {
    pub(super) fn realize_cloud_hypervisor(&mut self) -> Result<(), HarnessError> {
        self.control.tell(message::SET_OWNER, &[], &[], Ack::No)?;
        self.ask_features()?;
        self.negotiate_protocol(feature::P_MQ | feature::P_CONFIGURE_MEM_SLOTS | feature::P_REPLY_ACK)?;
        self.ask_queue_num(2)
    }

    pub(super) fn start_cloud_hypervisor(
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

    pub(super) fn realize_openvmm(&mut self) -> Result<(), HarnessError> {
        self.ask_features()?;
        self.set_features(self.offered, Ack::No)?;
        let wanted = feature::P_MQ | feature::P_REPLY_ACK | feature::P_CONFIG | feature::P_RESET_DEVICE;
        self.negotiate_protocol(wanted)?;
        self.control.tell(message::SET_OWNER, &[], &[], Ack::No)?;
        self.ask_queue_num(1)?;
        if self.has(feature::P_CONFIG) {
            self.config = self.control.config(0, OPENVMM_CONFIG_BYTES, 0)?;
        }
        Ok(())
    }

    pub(super) fn start_openvmm(
        &mut self,
        features: u64,
        regions: &[usize],
        rings: &[Start<'_>],
    ) -> Result<(), HarnessError> {
        if self.known.is_empty() {
            self.set_table(regions, Ack::Wanted)?;
        }
        if !self.has_sent_features {
            self.set_features(features, Ack::Wanted)?;
            self.has_sent_features = true;
        }
        for ring in rings {
            let control = &self.control;
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::Wanted)?;
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::Wanted)?;
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), Ack::Wanted)?;
            control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), Ack::Wanted)?;
            self.enable([ring.index], Ack::Wanted)?;
        }
        Ok(())
    }

    pub(super) fn reset_openvmm(&mut self, rings: &[u16]) -> Result<(), HarnessError> {
        for ring in rings {
            self.stop(&[*ring])?;
        }
        self.reset_device()
    }

    pub(super) fn realize_alioth(&mut self) -> Result<(), HarnessError> {
        let needed = feature::P_MQ | feature::P_REPLY_ACK | feature::P_CONFIGURE_MEM_SLOTS;
        self.ask_features()?;
        // CONFIG where its command line has no tag; then it is needed, too.
        self.negotiate_protocol(needed | feature::P_CONFIG)?;
        if self.protocol & needed != needed {
            return Err(HarnessError::Violation("MQ, REPLY_ACK and CONFIGURE_MEM_SLOTS are not all offered".into()));
        }
        self.ask_queue_num(1)?;
        // It has as many rings as the device.
        for ring in 0..self.queue_num as u16 {
            let error = event()?;
            self.control.ring_event(message::SET_VRING_ERR, ring, error.as_fd(), Ack::Wanted)?;
            self.kept.push(error);
        }
        self.control.tell(message::SET_OWNER, &[], &[], Ack::Wanted)?;
        self.read_config(8, 0)
    }

    pub(super) fn start_alioth(
        &mut self,
        features: u64,
        regions: &[usize],
        rings: &[Start<'_>],
    ) -> Result<(), HarnessError> {
        self.add_missing(regions)?;
        self.set_features(features, Ack::Wanted)?;
        let control = &self.control;
        for ring in rings {
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), Ack::Wanted)?;
        }
        for ring in rings {
            control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::Wanted)?;
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::Wanted)?;
            self.enable([ring.index], Ack::Wanted)?;
        }
        Ok(())
    }

    pub(super) fn realize_crosvm(&mut self) -> Result<(), HarnessError> {
        self.control.tell(message::SET_OWNER, &[], &[], Ack::No)?;
        self.ask_features()?;
        self.set_features(feature::PROTOCOL_FEATURES, Ack::No)?;
        self.negotiate_protocol(feature::P_CONFIG | feature::P_MQ | feature::P_BACKEND_REQ)?;
        self.hand_back_channel()?;
        self.ask_queue_num(2)?;
        self.read_config(4, CROSVM_CONFIG_FLAGS)
    }

    pub(super) fn start_crosvm(
        &mut self,
        features: u64,
        regions: &[usize],
        rings: &[Start<'_>],
    ) -> Result<(), HarnessError> {
        self.set_features(features, Ack::No)?;
        self.set_table(regions, Ack::No)?;
        for ring in rings {
            let control = &self.control;
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::No)?;
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::No)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::No)?;
            control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), Ack::No)?;
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), Ack::No)?;
            self.enable([ring.index], Ack::No)?;
        }
        Ok(())
    }

    /// All rings that the device has, those that were never started too.
    pub(super) fn reset_crosvm(&mut self) -> Result<(), HarnessError> {
        (0..self.queue_num as u16).try_for_each(|ring| self.stop(&[ring]).map(drop))
    }

    /// Reads the configuration space as a guest does it through its VMM, so many bytes at once.
    fn read_config(&mut self, step: u32, flags: u32) -> Result<(), HarnessError> {
        if self.has(feature::P_CONFIG) {
            for offset in (0..CONFIG_BYTES).step_by(step as usize) {
                self.config.extend(self.control.config(offset, step, flags)?);
            }
        }
        Ok(())
    }
}
