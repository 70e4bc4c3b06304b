//! A guest of the daemon in this process, over a backend that can be held back.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::testing::fault::Fault;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::guest::Guest;
use nydus_vm::testing::guest::GuestOptions;
use nydus_vm::testing::image::TestImage;
use nydus_vm::testing::make;
use nydus_vm::testing::process;
use nydus_vm::testing::room::Place;
use nydus_vm::testing::room::Room;
use nydus_vm::testing::vmm::PATIENCE;
use tempfile::TempDir;

use crate::arguments::Arguments;
use crate::workload::entry;

/// Bytes of `/warm`.
pub const WARM_BYTES: u64 = 64 << 20;
/// Chunks of `/cold`.
pub const COLD_CHUNKS: u64 = 512;

/// The guest, the daemon, and what the guest has looked up.
pub struct Held {
    pub guest: Guest,
    pub room: Room,
    /// Node id of a file that is cached.
    pub warm: u64,
    /// Node id of a file of which nothing is.
    pub cold: u64,
    /// Bytes of a chunk.
    pub chunk_bytes: u64,
    _home: TempDir,
}

/// What is served.
#[derive(Debug, Clone, Copy)]
pub struct Make {
    /// How chunks are compressed.
    pub compressor: Compressor,
    /// Bytes of a chunk.
    pub chunk_bytes: u32,
}

impl Held {
    /// Boots a guest of `options`. The daemon's threads are bound as the command line says, and so is this one.
    pub fn new(arguments: &Arguments, make: Make, options: &GuestOptions) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let (tree, folder) = (home.path().join("tree"), home.path().join("image"));
        std::fs::create_dir_all(&tree)?;
        std::fs::write(tree.join("warm"), super::half_text("warm", WARM_BYTES as usize))?;
        std::fs::write(tree.join("cold"), super::half_text("cold", COLD_CHUNKS as usize * make.chunk_bytes as usize))?;
        let made = make::image(&tree, &folder, make.compressor, Digester::Blake3, make.chunk_bytes);
        let image = TestImage::made("bench", made, &folder);
        process::pin(None, &arguments.daemon_cpu)?;
        let (cache, socket) = (home.path().join("cache"), home.path().join("sock"));
        let room = Room::at(Place { image, cache, socket, boot_id: [7; 16] })?;
        // The threads of a connection come with it.
        let mut guest = Guest::boot(&room.socket, options)?;
        process::pin(None, &[arguments.driver_cpu])?;
        let (warm, cold) = (entry(&mut guest, 1, "warm")?, entry(&mut guest, 1, "cold")?);
        let step = u64::from(options.reply_bytes);
        for offset in (0..WARM_BYTES).step_by(step as usize) {
            ensure!(guest.call(&Request::read(warm, 0, offset, step as u32))?.errno == 0, "cannot read the warm file");
        }
        Ok(Self { guest, room, warm, cold, chunk_bytes: make.chunk_bytes.into(), _home: home })
    }

    /// Parks `reads` reads of 4 KiB, each of another chunk, on a backend that answers no more.
    pub fn park(&mut self, reads: u64) -> Result<()> {
        self.room.faults.set(Fault::Hang);
        let before = self.room.metrics.storage.parked_reads.get();
        let lane = self.guest.lane(1);
        for n in 0..reads {
            lane.submit(&Request::read(self.cold, 0, n * self.chunk_bytes, 4096))?;
        }
        lane.publish()?;
        let start = std::time::Instant::now();
        while self.room.metrics.storage.parked_reads.get() < before + reads {
            ensure!(start.elapsed() < PATIENCE, "reads are not parked");
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Takes the guest through a reboot: whatever was in flight is forgotten.
    pub fn begin_anew(&mut self) -> Result<()> {
        self.guest.reboot()?;
        self.guest.mount().context("mount again")?;
        Ok(())
    }
}
