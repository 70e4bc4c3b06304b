//! QEMU, by age.

use std::os::fd::AsFd;

use super::Order;
use super::Start;
use super::Vmm;
use super::event;
use crate::testing::error::HarnessError;
use crate::testing::vmm::Ack;
use crate::testing::vmm::feature;
use crate::testing::vmm::message;

impl Vmm {
    pub(super) fn realize_qemu(&mut self, rings: u16) -> Result<(), HarnessError> {
        let mut wanted = feature::P_MQ | feature::P_REPLY_ACK | feature::P_BACKEND_REQ | feature::P_BACKEND_SEND_FD;
        wanted |= feature::P_RESET_DEVICE;
        if self.order != Order::Qemu {
            wanted |= feature::P_CONFIGURE_MEM_SLOTS;
        }
        self.ask_features()?;
        self.negotiate_protocol(wanted)?;
        self.ask_queue_num(1)?;
        if self.has(feature::P_CONFIGURE_MEM_SLOTS) {
            self.control.ask_u64(message::GET_MAX_MEM_SLOTS)?;
        }
        self.hand_back_channel()?;
        self.control.tell(message::SET_OWNER, &[], &[], Ack::No)?;
        self.ask_features()?;
        let ack = self.descriptors_acknowledged();
        for ring in 0..rings {
            let masked = event()?;
            self.control.ring_event(message::SET_VRING_CALL, ring, masked.as_fd(), ack)?;
            self.masked.push(masked);
            if self.order != Order::Qemu {
                let error = event()?;
                self.control.ring_event(message::SET_VRING_ERR, ring, error.as_fd(), ack)?;
                self.kept.push(error);
            }
        }
        // The machine and then its firmware reset all devices.
        self.reset_device_unacknowledged()?;
        self.reset_device_unacknowledged()
    }

    /// Whether a descriptor of a ring is waited for.
    fn descriptors_acknowledged(&self) -> Ack {
        if self.order == Order::Qemu11 { Ack::Wanted } else { Ack::No }
    }

    fn reset_device_unacknowledged(&self) -> Result<(), HarnessError> {
        match self.order {
            Order::Qemu8 | Order::Qemu11 if self.has(feature::P_RESET_DEVICE) => {
                self.control.tell(message::RESET_DEVICE, &[], &[], Ack::No)
            }
            _ => Ok(()),
        }
    }

    /// Gives each ring the descriptor of a masked interrupt.
    fn mask(&self) -> Result<(), HarnessError> {
        let ack = self.descriptors_acknowledged();
        (0u16..)
            .zip(&self.masked)
            .try_for_each(|(ring, masked)| self.control.ring_event(message::SET_VRING_CALL, ring, masked.as_fd(), ack))
    }

    pub(super) fn start_qemu(
        &mut self,
        features: u64,
        regions: &[usize],
        rings: &[Start<'_>],
    ) -> Result<(), HarnessError> {
        self.mask()?;
        self.set_features(features, Ack::No)?;
        match self.order {
            Order::Qemu => self.set_table(regions, Ack::Wanted)?,
            _ => self.add_missing(regions)?,
        }
        let ack = self.descriptors_acknowledged();
        for ring in rings {
            let control = &self.control;
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::No)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::No)?;
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::No)?;
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), ack)?;
            if self.order == Order::Qemu {
                // Not QEMU's, but tests of broken rings want to hear of them.
                control.ring_event(message::SET_VRING_ERR, ring.index, ring.queue.error_fd(), Ack::No)?;
            }
        }
        self.enable(rings.iter().map(|r| r.index), self.enabling_acknowledged())?;
        for ring in rings {
            self.control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), ack)?;
        }
        Ok(())
    }

    /// Whether ENABLE is waited for: since 8.2.
    fn enabling_acknowledged(&self) -> Ack {
        match self.order {
            Order::Qemu8 | Order::Qemu11 => Ack::Wanted,
            _ => Ack::No,
        }
    }

    pub(super) fn reset_qemu(&mut self, rings: &[u16]) -> Result<(), HarnessError> {
        let ack = self.enabling_acknowledged();
        for ring in rings {
            self.control.ring_number(message::SET_VRING_ENABLE, *ring, 0, ack)?;
        }
        self.bases(rings)?;
        self.mask()?;
        self.reset_device_unacknowledged()
    }
}
