//! One small image, served in this process: what the targets that play a guest talk to, and the traffic of a guest that
//! looks at all of it.

use std::path::Path;
use std::sync::Arc;
use std::sync::OnceLock;

use nydus_vm::config::Config;
use nydus_vm::daemon::Parts;
use nydus_vm::daemon::Served;
use nydus_vm::daemon::ZeroMessageOpen;
use nydus_vm::daemon::assemble;
use nydus_vm::fuse::Server;
use nydus_vm::metrics::Metrics;
use nydus_vm::rafs::facts::BlobFacts;
use nydus_vm::rafs::facts::Compressor;
use nydus_vm::rafs::facts::Digester;
use nydus_vm::storage::backend::localfs::LocalFs;
use nydus_vm::storage::backend::localfs::Place;
use nydus_vm::storage::pool::Pool;
use nydus_vm::testing::fuse_client::EntryReply;
use nydus_vm::testing::fuse_client::Listing;
use nydus_vm::testing::fuse_client::Request;
use nydus_vm::testing::fuse_client::directory_entries;
use nydus_vm::testing::fuse_client::init_flag;
use nydus_vm::testing::fuse_client::opcode;
use nydus_vm::testing::make;
use nydus_vm::vfs::Vfs;

use crate::requests::Ending;
use crate::requests::Record;
use crate::requests::ask;
use crate::seeds;

/// Bytes of one READ and of a listing.
const READ_BYTES: u32 = 16 << 10;

/// The image, its server, and what a guest asked of it.
pub struct World {
    served: Served,
    /// What the server counts.
    pub metrics: Arc<Metrics>,
    /// Every request of a guest that mounted, and looked at everything, in order.
    pub traffic: Vec<Record>,
}

/// The one world of this process, made when it is first asked for. All data of its image is in the cache then, so that
/// every request is answered on the spot.
pub fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(World::new)
}

impl World {
    fn new() -> Self {
        // libFuzzer ends the process without unwinding, so whoever runs us removes TMPDIR.
        let home = tempfile::tempdir().expect("a directory can be made").keep();
        let source = home.join("source");
        seeds::small_tree(&source).expect("a small tree can be made");
        let image = make::image(&source, &home.join("image"), Compressor::Zstd, Digester::Blake3, 8192);
        let text = format!(
            r#"{{"device": {{"backend": {{"type": "localfs", "config": {{"dir": {:?}}}}},
                "cache": {{"type": "blobcache", "config": {{"work_dir": {:?}}}}}}}, "enable_xattr": true}}"#,
            image.blobs,
            home.join("cache")
        );
        let (config, _) = Config::parse(&text, Path::new("/")).expect("it is the documented configuration");
        let pool = Pool::new(2).expect("two threads can be started");
        let metrics = Arc::new(Metrics::new(1));
        let backend = LocalFs::new(Place::Directories(vec![image.blobs.clone()]), Arc::clone(&pool));
        let served = assemble(Parts {
            bootstrap: &image.bootstrap,
            config: &config,
            backend: Arc::new(backend),
            pool,
            boot_id: [1; 16],
            zero_message_open: ZeroMessageOpen::Never,
            metrics: Arc::clone(&metrics),
        })
        .expect("the image was made a moment ago");
        let mut world = Self { served, metrics, traffic: Vec::new() };
        world.look_at_everything();
        world
    }

    /// Its FUSE server.
    pub fn server(&self) -> Arc<Server<Vfs>> {
        self.served.server()
    }

    /// The facts of its only blob.
    pub fn blob(&self) -> &BlobFacts {
        &self.served.image().blobs()[0]
    }

    /// Asks, and notes the request; the body of the answer.
    fn tell(&mut self, request: &Request) -> Option<Vec<u8>> {
        let record = Record::of(request, 2 * (self.traffic.len() as u64 + 1));
        let ending = ask(&self.server(), &record);
        self.traffic.push(record);
        match ending {
            Ending::Reply { errno: 0, body, .. } => Some(body),
            _ => None,
        }
    }

    fn look_at_everything(&mut self) {
        self.tell(&Request::init(45, init_flag::LINUX_6_12 & !init_flag::NO_OPEN_SUPPORT)).expect("a session");
        self.tell(&Request::statfs(1));
        self.directory(1);
        self.tell(&Request::lookup(1, b"no such name"));
        self.tell(&Request::batch_forget(&[(2, 1), (3, 1)]));
        self.tell(&Request::new(opcode::ACCESS, 1, &[4, 0, 0, 0, 0, 0, 0, 0], 0));
        self.tell(&Request::new(opcode::CREATE, 1, &[0; 24], 200));
        self.tell(&Request::new(opcode::SETXATTR, 1, &[0; 24], 0));
        self.tell(&Request::new(opcode::WRITE, 1, &[0; 60], 24));
        self.tell(&Request::new(opcode::FSYNC, 1, &[0; 16], 0));
        self.tell(&Request::new(opcode::INTERRUPT, 0, &[0; 8], 0));
        self.tell(&Request::statx(1));
    }

    fn directory(&mut self, node: u64) {
        self.tell(&Request::getattr(node));
        self.tell(&Request::opendir(node));
        self.tell(&Request::readdir(node, 0, 0, READ_BYTES));
        let body = self.tell(&Request::readdirplus(node, 0, 0, READ_BYTES)).expect("a listing");
        self.tell(&Request::releasedir(node, 0));
        for listed in directory_entries(&body, Listing::Plus).expect("a good listing") {
            if listed.name == b"." || listed.name == b".." {
                continue;
            }
            let body = self.tell(&Request::lookup(node, &listed.name)).expect("a listed name");
            let entry = EntryReply::from_lookup(&body).expect("a good entry");
            match entry.attributes.mode & 0o170_000 {
                0o040_000 => self.directory(entry.node),
                0o120_000 => drop(self.tell(&Request::readlink(entry.node))),
                _ => self.file(entry.node, entry.attributes.size),
            }
        }
    }

    fn file(&mut self, node: u64, size: u64) {
        self.tell(&Request::open(node, 0));
        for at in (0..=size).step_by(READ_BYTES as usize) {
            self.tell(&Request::read(node, 0, at, READ_BYTES)).expect("all data can be read");
        }
        self.tell(&Request::lseek(node, 0, 0, 4));
        self.tell(&Request::listxattr(node, 256));
        self.tell(&Request::getxattr(node, b"user.one", 64));
        self.tell(&Request::flush(node, 0));
        self.tell(&Request::release(node, 0));
        self.tell(&Request::forget(node, 1));
    }
}
