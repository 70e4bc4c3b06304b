//! Memory of the fake guest, shared through memory files as a VMM shares it with a vhost-user daemon.
//!
//! The fake guest keeps all its regions mapped for as long as it lives; which of them the daemon knows is the VMM's
//! matter ([`super::vmm`]). So a test can take a region away from the daemon and still see whether anything is written
//! to it. Addresses are guest-physical unless they are called user addresses.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use rustix::fs::MemfdFlags;
use vm_memory::Bytes;
use vm_memory::FileOffset;
use vm_memory::MmapRegion;
use vm_memory::VolatileMemory;
use vm_memory::VolatileSlice;

use super::error::HarnessError;

/// What a user address is above its guest-physical address. Arbitrary: the daemon must translate by its table.
pub const USER_OFFSET: u64 = 0x7f00_0000_0000;

/// What a region is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A memfd of ordinary pages.
    Pages,
    /// A memfd of huge pages of 2 MiB. They are taken when they are touched, and whoever touches one that is not to be
    /// had gets SIGBUS, as with a VMM that does not set them aside beforehand.
    HugePages,
}

/// Bytes of a huge page of [`Backing::HugePages`].
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Huge pages of 2 MiB that nobody has taken; `None` where the machine has none of that size.
pub fn free_huge_pages() -> Option<u64> {
    let text = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").ok()?;
    text.trim().parse().ok()
}

/// One region of guest memory, a memfd of its own.
#[derive(Debug)]
pub struct Region {
    start: u64,
    map: MmapRegion<()>,
    next: AtomicU64,
}

impl Region {
    /// First guest-physical address.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.map.size() as u64
    }

    /// The address by which the VMM knows the region.
    pub fn user_start(&self) -> u64 {
        self.start + USER_OFFSET
    }

    /// The descriptor that the daemon maps, from offset 0.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.map.file_offset().expect("every region is made from a file").file().as_fd()
    }
}

/// The memory of one fake guest.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Memory with a region for each (start, size) of `layout`. Sizes are multiples of the page size.
    ///
    /// # Errors
    /// What making and mapping the memory files answers.
    pub fn new(layout: &[(u64, u64)]) -> Result<Self, HarnessError> {
        let backed: Vec<_> = layout.iter().map(|(start, size)| (*start, *size, Backing::Pages)).collect();
        Self::backed(&backed)
    }

    /// Memory with a region for each (start, size, backing) of `layout`.
    ///
    /// # Errors
    /// What making and mapping the memory files answers.
    pub fn backed(layout: &[(u64, u64, Backing)]) -> Result<Self, HarnessError> {
        let region = |&(start, size, backing): &(u64, u64, Backing)| {
            let flags = match backing {
                Backing::Pages => MemfdFlags::CLOEXEC,
                Backing::HugePages => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            };
            let fd = rustix::fs::memfd_create("guest", flags).map_err(|e| HarnessError::io("make guest memory", e))?;
            rustix::fs::ftruncate(&fd, size).map_err(|e| HarnessError::io("size guest memory", e))?;
            let bytes = usize::try_from(size).map_err(|_| HarnessError::Misuse(format!("region of {size} bytes")))?;
            let map = MmapRegion::from_file(FileOffset::new(File::from(fd), 0), bytes)
                .map_err(|e| HarnessError::io("map guest memory", std::io::Error::other(e)))?;
            Ok(Region { start, map, next: AtomicU64::new(0) })
        };
        Ok(Self { regions: layout.iter().map(region).collect::<Result<_, HarnessError>>()? })
    }

    /// The regions, in the order of the layout.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Sets aside `len` bytes of region `region`, aligned to `align` (a power of two), for as long as the memory lives.
    ///
    /// # Errors
    /// [`HarnessError::Misuse`] when the region is used up.
    pub fn allocate(&self, region: usize, len: u64, align: u64) -> Result<u64, HarnessError> {
        let owner = &self.regions[region];
        let place = |next: u64| {
            let start = next.next_multiple_of(align);
            (start + len <= owner.size()).then_some((start, start + len))
        };
        // Relaxed: the number itself is all that is shared.
        let taken = owner.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| place(next).map(|p| p.1));
        let next = taken.map_err(|_| HarnessError::Misuse(format!("region {region} has no {len} bytes left")))?;
        Ok(owner.start + place(next).expect("the same number was placed a moment ago").0)
    }

    /// The bytes of `len` from `address`.
    ///
    /// # Panics
    /// If the range is outside the guest's memory: the harness never makes such an access itself.
    pub fn slice(&self, address: u64, len: usize) -> VolatileSlice<'_, ()> {
        self.regions
            .iter()
            .find(|r| address >= r.start && address - r.start < r.size())
            .and_then(|r| r.map.get_slice((address - r.start) as usize, len).ok())
            .unwrap_or_else(|| panic!("guest memory has no {len} bytes at {address:#x}"))
    }

    /// Writes `bytes` to `address`.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.slice(address, bytes.len()).copy_from(bytes);
    }

    /// Reads into `bytes` from `address`.
    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        self.slice(address, bytes.len()).copy_to(bytes);
    }

    /// A copy of `len` bytes at `address`.
    pub fn read_vec(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(address, &mut bytes);
        bytes
    }

    /// Fills `len` bytes at `address` with `byte`.
    pub fn fill(&self, address: u64, len: usize, byte: u8) {
        self.write(address, &vec![byte; len]);
    }

    /// The number at `address`, read in one piece after everything the writer did before it.
    pub fn load_u16(&self, address: u64) -> u16 {
        u16::from_le(self.slice(address, 2).load(0, Ordering::Acquire).expect("ring fields are aligned"))
    }

    /// Stores the number at `address` in one piece, after everything done before.
    pub fn store_u16(&self, address: u64, value: u16) {
        self.slice(address, 2).store(value.to_le(), 0, Ordering::Release).expect("ring fields are aligned");
    }

    /// A digest of a region's content, to see that nobody wrote to it.
    pub fn digest(&self, region: usize) -> [u8; 32] {
        let owner = &self.regions[region];
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < owner.size() {
            let step = (owner.size() - at).min(buffer.len() as u64) as usize;
            self.read(owner.start + at, &mut buffer[..step]);
            hasher.update(&buffer[..step]);
            at += step as u64;
        }
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_two_regions_keeps_them_apart() {
        let memory = GuestMemory::new(&[(0, 8192), (1 << 32, 4096)]).unwrap();
        memory.write(4096, b"low");
        memory.write(1 << 32, b"high");
        assert_eq!(memory.read_vec(4096, 3), b"low");
        assert_eq!(memory.read_vec(1 << 32, 4), b"high");
        let before = memory.digest(0);
        memory.store_u16(8190, 7);
        assert_ne!(memory.digest(0), before);
        assert_eq!(memory.load_u16(8190), 7);
    }

    #[test]
    fn allocate_aligns_and_ends_with_the_region() {
        let memory = GuestMemory::new(&[(0x1000, 4096)]).unwrap();
        assert_eq!(memory.allocate(0, 1, 1).unwrap(), 0x1000);
        assert_eq!(memory.allocate(0, 100, 64).unwrap(), 0x1040);
        assert!(matches!(memory.allocate(0, 4096, 1), Err(HarnessError::Misuse(_))));
    }
}
