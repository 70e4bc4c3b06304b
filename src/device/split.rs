//! The three areas of a split virtqueue in guest memory (virtio 1.2, section 2.7).
//!
//! Knows the layout and the memory ordering, and nothing of the ring's life. All numbers read are the guest's word:
//! the caller checks them.

use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use crate::sys::guest::GuestMap;
use crate::sys::guest::Unreachable;
use crate::sys::guest::Window;

/// Bytes of `struct virtq_desc`.
pub(super) const DESCRIPTOR_BYTES: usize = 16;
/// Bytes of flags and index, in front of both rings.
const RING_HEADER_BYTES: usize = 4;
/// Bytes of an entry of the available ring.
const AVAIL_ENTRY_BYTES: usize = 2;
/// Bytes of `struct virtq_used_elem`.
const USED_ENTRY_BYTES: usize = 8;
/// Bytes of `used_event` and `avail_event`, behind the rings.
const EVENT_BYTES: usize = 2;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFY: u16 = 1;

/// One descriptor, copied out of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    /// `VIRTQ_DESC_F_NEXT`.
    pub(super) const NEXT: u16 = 1;
    /// `VIRTQ_DESC_F_WRITE`.
    pub(super) const WRITE: u16 = 2;
    /// `VIRTQ_DESC_F_INDIRECT`.
    pub(super) const INDIRECT: u16 = 4;

    /// Decodes the wire form.
    #[inline]
    pub(super) fn from_bytes(bytes: [u8; DESCRIPTOR_BYTES]) -> Self {
        let word = u128::from_le_bytes(bytes);
        Self { address: word as u64, len: (word >> 64) as u32, flags: (word >> 96) as u16, next: (word >> 112) as u16 }
    }

    /// Whether the device may write there.
    #[inline]
    pub(super) fn is_writable(self) -> bool {
        self.flags & Self::WRITE != 0
    }
}

/// Where a ring lies in guest memory, and its size in descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Layout {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

impl Layout {
    /// Whether size and alignment are as virtio demands: a power of two; 16, 2 and 4 bytes.
    pub(super) fn is_legal(&self) -> bool {
        self.size.is_power_of_two() && self.descriptors & 15 == 0 && self.avail & 1 == 0 && self.used & 3 == 0
    }

    /// The areas as they lie in `map`, `None` when one is not mapped as a whole.
    #[inline]
    pub(super) fn open<'a>(&self, map: &'a GuestMap) -> Option<SplitRing<'a>> {
        let size = usize::from(self.size);
        let meta = RING_HEADER_BYTES.wrapping_add(EVENT_BYTES);
        Some(SplitRing {
            size: self.size,
            descriptors: map.whole(self.descriptors, size.wrapping_mul(DESCRIPTOR_BYTES))?,
            avail: map.whole(self.avail, size.wrapping_mul(AVAIL_ENTRY_BYTES).wrapping_add(meta))?,
            used: map.whole(self.used, size.wrapping_mul(USED_ENTRY_BYTES).wrapping_add(meta))?,
        })
    }

    /// The used index as it stands in guest memory.
    pub(super) fn used_index(&self, map: &GuestMap) -> Result<u16, Unreachable> {
        let header = map.whole(self.used, RING_HEADER_BYTES).ok_or(Unreachable)?;
        header.load_u16(2, Ordering::Acquire)
    }
}

/// A ring opened in a map.
#[derive(Debug)]
pub(super) struct SplitRing<'a> {
    size: u16,
    descriptors: Window<'a>,
    avail: Window<'a>,
    used: Window<'a>,
}

impl SplitRing<'_> {
    /// The table of descriptors.
    #[inline]
    pub(super) fn descriptors(&self) -> &Window<'_> {
        &self.descriptors
    }

    /// Whether a page of a region that holds the ring was lost.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        self.avail.is_lost() || self.used.is_lost() || self.descriptors.is_lost()
    }

    /// The driver's index: entries before it may be read after this call.
    #[inline]
    pub(super) fn avail_index(&self) -> Result<u16, Unreachable> {
        // Acquire: pairs with the driver's write barrier between the entry and the index.
        self.avail.load_u16(2, Ordering::Acquire)
    }

    /// The head at `position` of the available ring.
    #[inline]
    pub(super) fn head(&self, position: u16) -> Result<u16, Unreachable> {
        self.avail.load_u16(self.entry(position, AVAIL_ENTRY_BYTES), Ordering::Relaxed)
    }

    /// Writes the used entry at `position`; [`Self::publish_used`] shows it to the driver.
    #[inline]
    pub(super) fn put_used(&self, position: u16, head: u16, len: u32) -> Result<(), Unreachable> {
        let entry = u64::from(head) | u64::from(len) << 32;
        self.used.write(self.entry(position, USED_ENTRY_BYTES), &entry.to_le_bytes())
    }

    /// Shows the driver all entries before `index`.
    #[inline]
    pub(super) fn publish_used(&self, index: u16) -> Result<(), Unreachable> {
        // Release: entries and replies are visible before the index.
        self.used.store_u16(2, index, Ordering::Release)
    }

    /// Whether the driver wants to be interrupted for what was published since index `old`. `None` stands for "always".
    #[inline]
    pub(super) fn wants_interrupt(&self, old: Option<u16>, new: u16, events: Events) -> bool {
        // The index must be visible before the driver's wish is read (virtio 2.7.7.2, store then load).
        fence(Ordering::SeqCst);
        match events {
            Events::Flags => self.avail.load_u16(0, Ordering::Relaxed).is_ok_and(|flags| flags & NO_INTERRUPT == 0),
            Events::Index => {
                let wanted = self.avail.load_u16(self.behind(AVAIL_ENTRY_BYTES), Ordering::Relaxed);
                match (wanted, old) {
                    (Ok(event), Some(old)) => new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old),
                    _ => true,
                }
            }
        }
    }

    /// Asks the driver for kicks. It may have added entries just before: look at the index once more afterwards.
    #[inline]
    pub(super) fn want_kicks(&self, next_avail: u16, events: Events) -> Result<(), Unreachable> {
        match events {
            Events::Flags => self.used.store_u16(0, 0, Ordering::Relaxed)?,
            Events::Index => self.used.store_u16(self.behind(USED_ENTRY_BYTES), next_avail, Ordering::Relaxed)?,
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Asks the driver not to kick. With an event index that is so by itself, once the index is passed.
    #[inline]
    pub(super) fn refuse_kicks(&self, events: Events) -> Result<(), Unreachable> {
        match events {
            Events::Flags => self.used.store_u16(0, NO_NOTIFY, Ordering::Relaxed),
            Events::Index => Ok(()),
        }
    }

    /// Offset of the entry at `position`; the size is a power of two ([`Layout::is_legal`]).
    #[inline]
    fn entry(&self, position: u16, entry_bytes: usize) -> usize {
        let slot = usize::from(position & self.size.wrapping_sub(1));
        slot.wrapping_mul(entry_bytes).wrapping_add(RING_HEADER_BYTES)
    }

    /// Offset of the event index behind the entries.
    #[inline]
    fn behind(&self, entry_bytes: usize) -> usize {
        usize::from(self.size).wrapping_mul(entry_bytes).wrapping_add(RING_HEADER_BYTES)
    }
}

/// How the two sides tell each other what notifications they want.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Events {
    /// By the flags of the rings.
    #[default]
    Flags,
    /// By index (`VIRTIO_F_EVENT_IDX`).
    Index,
}
