//! User-Mode Linux, whose kernel is the VMM (`arch/um/drivers/virtio_uml.c`, 6.1).

use super::Start;
use super::Vmm;
use crate::testing::error::HarnessError;
use crate::testing::vmm::Ack;
use crate::testing::vmm::feature;
use crate::testing::vmm::message;

/// Where the tag ends in the configuration space, and the number of request queues begins.
const TAG_BYTES: u32 = 36;

impl Vmm {
    pub(super) fn realize_user_mode(&mut self) -> Result<(), HarnessError> {
        self.control.tell(message::SET_OWNER, &[], &[], Ack::No)?;
        self.ask_features()?;
        let wanted = feature::P_REPLY_ACK | feature::P_BACKEND_REQ | feature::P_CONFIG;
        self.protocol = self.control.ask_u64(message::GET_PROTOCOL_FEATURES)? & wanted;
        // It asks for an acknowledgement in the very message that negotiates them.
        self.control.set_protocol_features(self.protocol, Ack::Wanted)?;
        self.hand_back_channel()?;
        if !self.has(feature::P_CONFIG) {
            return Err(HarnessError::Violation("no configuration space is offered: there is no tag".into()));
        }
        // Always from the beginning: the tag byte by byte, each time with all before it.
        for len in 1..=TAG_BYTES {
            self.control.config(0, len, 0)?;
        }
        self.config = self.control.config(0, TAG_BYTES + 4, 0)?;
        let queues = self.config[TAG_BYTES as usize..].try_into().expect("four bytes were asked for");
        self.queue_num = u64::from(u32::from_le_bytes(queues)) + 1;
        Ok(())
    }

    pub(super) fn start_user_mode(
        &mut self,
        features: u64,
        regions: &[usize],
        rings: &[Start<'_>],
    ) -> Result<(), HarnessError> {
        self.set_features(features, Ack::Wanted)?;
        // Cut to its regions, as our relay does it: see the table in `super`.
        self.set_table(regions, Ack::Wanted)?;
        let control = &self.control;
        for ring in rings {
            control.ring_event(message::SET_VRING_CALL, ring.index, ring.queue.call_fd(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_NUM, ring.index, ring.queue.size().into(), Ack::Wanted)?;
            control.ring_number(message::SET_VRING_BASE, ring.index, ring.base.into(), Ack::Wanted)?;
            control.ring_addresses(ring.index, &ring.queue.addresses(), Ack::Wanted)?;
        }
        for ring in rings {
            control.ring_event(message::SET_VRING_KICK, ring.index, ring.queue.kick_fd(), Ack::Wanted)?;
            self.enable([ring.index], Ack::Wanted)?;
        }
        Ok(())
    }

    pub(super) fn reset_user_mode(&mut self, rings: &[u16]) -> Result<(), HarnessError> {
        for ring in rings.iter().rev() {
            self.pause(&[*ring])?;
        }
        self.control.ask_u64(message::GET_FEATURES).map(drop)
    }
}
