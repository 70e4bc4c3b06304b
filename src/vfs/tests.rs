//! A device with one image at its root, asked as a guest asks: by the bytes of requests.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use sha2::Digest as _;

use super::*;
use crate::fs::image::Xattrs;
use crate::fuse::recording::Ending;
use crate::fuse::recording::Record;
use crate::fuse::recording::RecordingSlot;
use crate::fuse::server::Server;
use crate::metrics::Metrics;
use crate::rafs::image::Image;
use crate::rafs::image::OpenOptions;
use crate::storage::backend::Backend;
use crate::storage::backend::BackendError;
use crate::storage::backend::localfs::LocalFs;
use crate::storage::backend::localfs::Place;
use crate::storage::pool::Pool;
use crate::storage::store::CacheForm;
use crate::storage::store::Index;
use crate::storage::store::LazyChunks;
use crate::storage::store::Store;
use crate::storage::store::StoreOptions;
use crate::sys::view::View;
use crate::testing::fault::Fault;
use crate::testing::fault::FaultBackend;
use crate::testing::fault::Order;
use crate::testing::fuse_client::Attributes;
use crate::testing::fuse_client::DirectoryEntry;
use crate::testing::fuse_client::EntryReply;
use crate::testing::fuse_client::Listing;
use crate::testing::fuse_client::Request as Ask;
use crate::testing::fuse_client::directory_entries;
use crate::testing::fuse_client::init_flag;
use crate::testing::fuse_client::opcode;
use crate::testing::fuse_client::opened;
use crate::testing::manifest;

const FOREVER_SECONDS: u64 = 1 << 32;

/// Every reference image whose bootstrap is a file of its own.
fn plain_images() -> Vec<&'static str> {
    manifest::REFERENCES.into_iter().filter(|name| !name.contains("inline")).collect()
}

pub(super) const SAFE: Policy = Policy { zero_message_open: ZeroMessageOpen::WhereSafe, mounts: Mounts::Fixed };

/// A guest in a session with a device.
pub(super) struct Guest {
    server: Server<Vfs>,
    metrics: Arc<Metrics>,
    pub(super) backend: Arc<FaultBackend>,
    _work_dir: tempfile::TempDir,
}

impl Guest {
    /// Offers what Linux 6.12 does, less opening without a message.
    fn of(folder: &Path, xattrs: Xattrs) -> Self {
        let guest = Self::before_init(folder, xattrs, SAFE);
        let offer = init_flag::LINUX_6_12 & !(init_flag::NO_OPEN_SUPPORT | init_flag::NO_OPENDIR_SUPPORT);
        guest.body(&Ask::init(41, offer));
        guest
    }

    fn before_init(folder: &Path, xattrs: Xattrs, policy: Policy) -> Self {
        let file = std::fs::File::open(folder.join("bootstrap")).unwrap();
        let view = View::map_file(file.as_fd(), file.metadata().unwrap().len()).unwrap();
        Self::over(Image::open(view, &OpenOptions { placeholder_id: None }).unwrap(), folder, xattrs, policy)
    }

    /// A device with `image`, whose blobs lie in `folder`.
    pub(super) fn over(image: Image, folder: &Path, xattrs: Xattrs, policy: Policy) -> Self {
        let image = Arc::new(image);
        let metrics = Arc::new(Metrics::new(0));
        let work_dir = tempfile::tempdir().unwrap();
        let pool = Pool::new(2).unwrap();
        let files = LocalFs::new(Place::Directories(vec![folder.join("blobs")]), Arc::clone(&pool));
        let backend = FaultBackend::new(Arc::new(files), Arc::clone(&pool));
        let options = StoreOptions {
            work_dir: Some(work_dir.path().to_owned()),
            form: CacheForm::Plain,
            index: Index::Map,
            boot_id: [7; 16],
            amplify_bytes: 0,
            validate: false,
            demand_deadline: None,
            pool,
            bootstrap: None,
        };
        let blobs = image.blobs().to_vec();
        let indexed = Arc::clone(&image);
        let chunks = Arc::new(LazyChunks::new(move || indexed.chunk_index()));
        let asked: Arc<dyn Backend> = Arc::<FaultBackend>::clone(&backend);
        let store = Store::open(options, blobs, chunks, asked, Arc::clone(&metrics)).unwrap();
        let fs = ImageFs::new(image, Arc::new(store), xattrs);
        let server = Server::new(Vfs::new(fs, policy), Arc::clone(&metrics));
        Self { server, metrics, backend, _work_dir: work_dir }
    }

    pub(super) fn start(&self, ask: &Ask) -> Record {
        let bytes = [&ask.header(77)[..], &ask.body].concat();
        let (slot, record) = RecordingSlot::new(ask.room.map_or(0, |room| room as usize + 16));
        self.server.handle(&bytes, bytes.len(), slot);
        record
    }

    fn ask(&self, ask: &Ask) -> Ending {
        self.start(ask).only()
    }

    fn body(&self, ask: &Ask) -> Vec<u8> {
        self.ask(ask).body()
    }

    fn errno(&self, ask: &Ask) -> Option<Errno> {
        self.ask(ask).errno()
    }

    fn lookup(&self, parent: u64, name: &[u8]) -> EntryReply {
        EntryReply::from_lookup(&self.body(&Ask::lookup(parent, name))).unwrap()
    }

    fn getattr(&self, node: u64) -> Attributes {
        let (attributes, valid) = Attributes::from_getattr(&self.body(&Ask::getattr(node))).unwrap();
        assert_eq!(valid, FOREVER_SECONDS);
        attributes
    }

    /// The bytes of a file from `offset`, at most `size` of them, once they have come.
    fn read(&self, node: u64, offset: u64, size: u32) -> Vec<u8> {
        self.start(&Ask::read(node, 0, offset, size)).wait().body()
    }

    /// A whole file, in reads of `size` bytes.
    fn content(&self, node: u64, size: u32) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let more = self.read(node, all.len() as u64, size);
            all.extend_from_slice(&more);
            if more.len() < size as usize {
                return all;
            }
        }
    }

    /// The node of a path, every component looked up.
    fn walk(&self, path: &[u8]) -> u64 {
        let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
        names.fold(1, |parent, name| {
            let entry = self.lookup(parent, name);
            assert_ne!(entry.node, 0, "{}", String::from_utf8_lossy(path));
            entry.node
        })
    }

    /// All entries of a directory, asked for in answers of `size` bytes.
    fn list(&self, node: u64, listing: Listing, size: u32) -> Vec<DirectoryEntry> {
        let mut all: Vec<DirectoryEntry> = Vec::new();
        loop {
            let from = all.last().map_or(0, |entry| entry.next);
            let ask = match listing {
                Listing::Plain => Ask::readdir(node, 0, from, size),
                Listing::Plus => Ask::readdirplus(node, 0, from, size),
            };
            let more = directory_entries(&self.body(&ask), listing).unwrap();
            if more.is_empty() {
                return all;
            }
            all.extend(more);
        }
    }
}

fn each_image(names: &[&str], check: impl Fn(&str, &Path)) {
    let Some(images) = manifest::reference_images() else { return };
    for name in names {
        check(name, &images.join(name));
    }
}

fn type_bits(kind: u8) -> u32 {
    match kind {
        b'f' => 0o100_000,
        b'd' => 0o040_000,
        b'l' => 0o120_000,
        b'c' => 0o020_000,
        b'b' => 0o060_000,
        b'p' => 0o010_000,
        b's' => 0o140_000,
        other => panic!("type {other}"),
    }
}

#[test]
fn metadata_of_every_path_matches_the_manifest() {
    each_image(&plain_images(), |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        for expected in manifest::read(folder) {
            let path = String::from_utf8_lossy(&expected.path).into_owned();
            let node = guest.walk(&expected.path);
            let found = guest.getattr(node);
            assert_eq!(found.mode, type_bits(expected.kind) | expected.mode, "{name} {path}");
            let owner = if name == "v6-repeatable" { own } else { (expected.uid, expected.gid) };
            assert_eq!((found.uid, found.gid), owner, "{name} {path}");
            assert_eq!(found.nlink, expected.nlink, "{name} {path}");
            if let Some(size) = expected.size {
                assert_eq!(found.size, size, "{name} {path}");
            }
            if let Some(rdev) = expected.rdev {
                assert_eq!(found.device(), rdev, "{name} {path}");
            }
            if let Some(time) = expected.mtime {
                assert_eq!((found.mtime, found.mtime_ns), time, "{name} {path}");
            }
            assert_eq!((found.atime, found.atime_ns), (found.mtime, found.mtime_ns), "{name} {path}");
            assert_eq!((found.ctime, found.ctime_ns), (found.mtime, found.mtime_ns), "{name} {path}");
            assert_eq!((found.blksize, found.flags), (4096, 0), "{name} {path}");
            match &expected.target {
                Some(target) => assert_eq!(&guest.body(&Ask::readlink(node)), target, "{name} {path}"),
                None => assert_eq!(guest.errno(&Ask::readlink(node)), Some(Errno::INVAL), "{name} {path}"),
            }
            check_xattrs(&guest, node, &expected.xattrs, &format!("{name} {path}"));
        }
    });
}

fn check_xattrs(guest: &Guest, node: u64, expected: &BTreeMap<Vec<u8>, Vec<u8>>, what: &str) {
    let size_of = |ask: &Ask| match guest.ask(ask) {
        Ending::Reply { errno: 0, body, .. } => u32::from_ne_bytes(body[..4].try_into().unwrap()),
        other => panic!("{what}: {other:?}"),
    };
    if guest.errno(&Ask::listxattr(node, 0)) == Some(Errno::NOSYS) {
        assert!(expected.is_empty(), "{what}: an image that says it has none");
        return;
    }
    let size = size_of(&Ask::listxattr(node, 0));
    let names = if size == 0 { Vec::new() } else { guest.body(&Ask::listxattr(node, size)) };
    assert_eq!(names.len(), size as usize, "{what}");
    let mut found: Vec<&[u8]> = names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    found.sort_unstable();
    assert_eq!(found, expected.keys().map(Vec::as_slice).collect::<Vec<_>>(), "{what}");
    for (name, value) in expected {
        assert_eq!(size_of(&Ask::getxattr(node, name, 0)) as usize, value.len(), "{what}");
        assert_eq!(&guest.body(&Ask::getxattr(node, name, 65536)), value, "{what}");
        if value.len() > 1 {
            let short = Ask::getxattr(node, name, value.len() as u32 - 1);
            assert_eq!(guest.errno(&short), Some(Errno::RANGE), "{what}");
        }
    }
    assert_eq!(guest.errno(&Ask::getxattr(node, b"user.not.there", 64)), Some(Errno::NODATA), "{what}");
}

#[test]
fn directories_list_each_name_once_whatever_the_buffer() {
    each_image(&["v5-lz4-blake3", "v5-two-layers", "v6-lz4-blake3", "v6-merged"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let entries = manifest::read(folder);
        for dir in entries.iter().filter(|entry| entry.kind == b'd') {
            let node = guest.walk(&dir.path);
            let prefix = if dir.path == b"/" { b"/".to_vec() } else { [&dir.path[..], b"/"].concat() };
            let below = |path: &'_ [u8]| path.strip_prefix(&prefix[..]).map(<[u8]>::to_vec);
            let names = entries.iter().filter_map(|entry| below(&entry.path));
            let mut expected: Vec<Vec<u8>> = names.filter(|name| !name.is_empty() && !name.contains(&b'/')).collect();
            expected.extend([b".".to_vec(), b"..".to_vec()]);
            expected.sort();
            // The smallest holds one entry with the longest name, so each cursor is used.
            for (listing, size) in
                [(Listing::Plain, 280), (Listing::Plain, 1 << 20), (Listing::Plus, 408), (Listing::Plus, 1 << 20)]
            {
                let found = guest.list(node, listing, size);
                let mut names: Vec<_> = found.iter().map(|entry| entry.name.clone()).collect();
                names.sort();
                assert_eq!(names, expected, "{name} {:?} {listing:?} {size}", String::from_utf8_lossy(&dir.path));
                found.iter().for_each(|entry| check_listed(&guest, node, entry));
            }
        }
    });
}

/// What a listing says of an entry is what LOOKUP says.
fn check_listed(guest: &Guest, dir: u64, listed: &DirectoryEntry) {
    let looked_up = guest.lookup(dir, &listed.name);
    assert_eq!(listed.ino, looked_up.attributes.ino, "{listed:?}");
    assert_eq!(listed.kind, looked_up.attributes.mode >> 12, "{listed:?}");
    if let Some(entry) = listed.entry {
        match listed.name.as_slice() {
            b"." | b".." => assert_eq!((entry.node, entry.entry_valid), (0, 0)),
            _ => assert_eq!(entry, looked_up),
        }
    }
    assert_eq!((looked_up.entry_valid, looked_up.attr_valid), (FOREVER_SECONDS, FOREVER_SECONDS));
    assert_eq!(looked_up.generation, 0);
    assert_eq!(guest.getattr(looked_up.node), looked_up.attributes);
}

#[test]
fn dot_names_lead_to_the_directory_and_above_it_and_the_root_is_its_own_parent() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        for dots in [&b"."[..], b".."] {
            assert_eq!(guest.lookup(1, dots).node, 1, "{name}");
        }
        let entries = manifest::read(folder);
        for entry in entries.iter().filter(|entry| entry.path != b"/") {
            let node = guest.walk(&entry.path);
            assert_eq!(guest.lookup(node, b".").node, node, "{name}");
            if entry.kind == b'd' {
                let end = entry.path.iter().rposition(|byte| *byte == b'/').unwrap();
                assert_eq!(guest.lookup(node, b"..").node, guest.walk(&entry.path[..end]), "{name}");
            } else {
                assert_eq!(guest.errno(&Ask::lookup(node, b"..")), Some(Errno::NOTDIR), "{name}");
            }
        }
    });
}

#[test]
fn missing_names_are_believed_for_ever_and_strange_nodes_are_stale() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let missing = guest.lookup(1, b"no such name");
        assert_eq!((missing.node, missing.entry_valid), (0, FOREVER_SECONDS), "{name}");
        for node in [0, 2, 7 << 32 | 3, u64::MAX] {
            for ask in [Ask::getattr(node), Ask::lookup(node, b"x"), Ask::readdir(node, 0, 0, 4096)] {
                assert_eq!(guest.errno(&ask), Some(Errno::STALE), "{name} {node}");
            }
        }
        // An inode that the image does not have: some error, no panic.
        let beyond = 1u64 << 32 | u64::from(u32::MAX);
        assert!(guest.errno(&Ask::getattr(beyond)).is_some(), "{name}");
        assert_eq!(guest.ask(&Ask::forget(beyond, u64::MAX)), Ending::Nothing);
        // Cursors that no listing gave are harmless.
        for from in [1, 7, 1 << 31, u64::MAX] {
            let _ = guest.ask(&Ask::readdirplus(1, 0, from, 4096));
        }
    });
}

#[test]
fn opening_keeps_caches_and_refuses_writing() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let entries = manifest::read(folder);
        let file = guest.walk(&entries.iter().find(|entry| entry.kind == b'f').unwrap().path);
        assert_eq!(opened(&guest.body(&Ask::open(file, 0x8000))).unwrap(), (0, 1 << 1 | 1 << 5), "{name}");
        assert_eq!(opened(&guest.body(&Ask::opendir(1))).unwrap(), (0, 1 << 1 | 1 << 3), "{name}");
        for flags in [1, 2, 0x8001, 0x8200] {
            assert_eq!(guest.errno(&Ask::open(file, flags)), Some(Errno::ROFS), "{name} {flags:#x}");
        }
        assert_eq!(guest.errno(&Ask::open(1, 0)), Some(Errno::ISDIR), "{name}");
        assert_eq!(guest.errno(&Ask::opendir(file)), Some(Errno::NOTDIR), "{name}");
        assert_eq!(guest.errno(&Ask::readdir(file, 0, 0, 4096)), Some(Errno::NOTDIR), "{name}");
        assert_eq!(guest.errno(&Ask::read(1, 0, 0, 4096)), Some(Errno::ISDIR), "{name}");
        for ask in [Ask::release(file, 0), Ask::flush(file, 0), Ask::releasedir(1, 0)] {
            assert_eq!(guest.errno(&ask), None, "{name}");
        }
        let mkdir = Ask::new(9, 1, &[&[0; 8][..], b"new\0"].concat(), 128);
        assert_eq!(guest.errno(&mkdir), Some(Errno::ROFS), "{name}");
        assert_eq!(guest.errno(&Ask::statx(file)), Some(Errno::NOSYS), "{name}");
    });
}

#[test]
fn access_goes_by_owner_and_mode() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let entries = manifest::read(folder);
        for entry in entries.iter().filter(|entry| entry.kind == b'f') {
            let node = guest.walk(&entry.path);
            let check = |uid: u32, mask: u32| {
                let mut bytes = [&Ask::new(opcode::ACCESS, node, &[0; 8], 0).header(7)[..], &[0; 8]].concat();
                bytes[24..28].copy_from_slice(&uid.to_ne_bytes());
                bytes[28..32].copy_from_slice(&u32::MAX.to_ne_bytes());
                bytes[40..44].copy_from_slice(&mask.to_ne_bytes());
                let (slot, record) = RecordingSlot::new(16);
                guest.server.handle(&bytes, bytes.len(), slot);
                record.only().errno()
            };
            let denied_unless = |granted: bool| (!granted).then_some(Errno::ACCESS);
            assert_eq!(check(0, 4), None, "{name}");
            assert_eq!(check(0, 1), denied_unless(entry.mode & 0o111 != 0), "{name}");
            assert_eq!(check(entry.uid.wrapping_add(1).max(1), 4), denied_unless(entry.mode & 4 != 0), "{name}");
            if entry.uid != 0 {
                assert_eq!(check(entry.uid, 4), denied_unless(entry.mode & 0o400 != 0), "{name}");
            }
            assert_eq!((check(0, 2), check(0, 8)), (Some(Errno::ROFS), Some(Errno::INVAL)), "{name}");
        }
    });
}

#[test]
fn seeking_finds_data_and_ends_in_a_hole() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        for entry in manifest::read(folder).iter().filter(|entry| entry.kind == b'f') {
            let (node, size) = (guest.walk(&entry.path), entry.size.unwrap());
            let seek = |offset: u64, whence: u32| guest.ask(&Ask::lseek(node, 0, offset, whence));
            assert_eq!(seek(size, 3).errno(), Some(Errno::NXIO), "{name}");
            assert_eq!(seek(size, 4).errno(), Some(Errno::NXIO), "{name}");
            assert_eq!(seek(0, 0).errno(), Some(Errno::INVAL), "{name}");
            if size > 0 {
                let hole = u64::from_ne_bytes(seek(0, 4).body().try_into().unwrap());
                assert!(hole <= size, "{name}");
            }
        }
        assert!(guest.errno(&Ask::lseek(1, 0, 0, 3)).is_some());
    });
}

#[test]
fn statfs_tells_data_size_and_inodes_and_nothing_free() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let body = Guest::of(folder, Xattrs::Served).body(&Ask::statfs(1));
        let word = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().unwrap());
        let half = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
        let paths: std::collections::BTreeSet<_> = manifest::read(folder).into_iter().map(|entry| entry.path).collect();
        assert!(word(0) > 0, "{name}: blocks");
        assert_eq!((word(8), word(16), word(32)), (0, 0, 0), "{name}: free");
        assert!(word(24) > 0 && word(24) <= paths.len() as u64, "{name}: files");
        assert_eq!((half(40), half(44), half(48)), (4096, 255, 4096), "{name}");
    });
}

#[test]
fn xattrs_that_cannot_be_are_switched_off_for_the_device() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Hidden);
        assert_eq!(guest.errno(&Ask::getxattr(1, b"user.a", 64)), Some(Errno::NOSYS), "{name}");
        assert_eq!(guest.errno(&Ask::listxattr(1, 64)), Some(Errno::NOSYS), "{name}");
    });
}

#[test]
fn zero_message_open_is_for_devices_that_stay_as_they_are() {
    let Some(images) = manifest::reference_images() else { return };
    let folder = images.join("v6-lz4-blake3");
    for (zero_message_open, mounts, allowed) in [
        (ZeroMessageOpen::WhereSafe, Mounts::Fixed, true),
        (ZeroMessageOpen::WhereSafe, Mounts::Changeable, false),
        (ZeroMessageOpen::Always, Mounts::Changeable, true),
        (ZeroMessageOpen::Never, Mounts::Fixed, false),
    ] {
        let guest = Guest::before_init(&folder, Xattrs::Served, Policy { zero_message_open, mounts });
        guest.body(&Ask::init(41, init_flag::LINUX_6_12));
        let opendir = guest.errno(&Ask::opendir(1));
        assert_eq!(opendir, allowed.then_some(Errno::NOSYS), "{zero_message_open:?} {mounts:?}");
    }
}

#[test]
fn node_ids_outlast_a_new_session() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let entries = manifest::read(folder);
        let nodes: Vec<u64> = entries.iter().map(|entry| guest.walk(&entry.path)).collect();
        guest.body(&Ask::init(41, init_flag::LINUX_6_12));
        let again: Vec<u64> = entries.iter().map(|entry| guest.walk(&entry.path)).collect();
        assert_eq!(nodes, again, "{name}");
    });
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    sha2::Sha256::digest(bytes).into()
}

#[test]
fn content_of_every_file_matches_the_manifest_cold_and_warm() {
    each_image(&plain_images(), |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let mut parked_when_cold = 0;
        for (size, state) in [(128 << 10, "cold"), (1 << 20, "warm")] {
            for entry in manifest::read(folder).iter().filter(|entry| entry.kind == b'f') {
                let content = guest.content(guest.walk(&entry.path), size);
                let path = String::from_utf8_lossy(&entry.path);
                assert_eq!(content.len() as u64, entry.size.unwrap(), "{name} {path} {state}");
                assert_eq!(Some(digest(&content)), entry.sha256, "{name} {path} {state}");
            }
            let parked = guest.metrics.storage.parked_reads.get();
            assert!(state == "cold" || parked == parked_when_cold, "{name}: warm reads were parked");
            parked_when_cold = parked;
        }
    });
}

#[test]
fn reads_at_any_offset_give_that_part_and_nothing_behind_the_end() {
    each_image(&["v5-lz4-blake3", "v5-zstd-sha256-4k", "v6-big", "v6-zstd-4k"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let entries = manifest::read(folder);
        let largest = entries.iter().filter(|entry| entry.kind == b'f').max_by_key(|entry| entry.size).unwrap();
        let node = guest.walk(&largest.path);
        let whole = guest.content(node, 1 << 20);
        let end = whole.len() as u64;
        for offset in [0, 1, 511, 4095, 4096, 4097, end / 2, end - 1, end, end + 1, u64::MAX] {
            for size in [0u32, 1, 4096, 70_001, 1 << 20] {
                let from = usize::try_from(offset).unwrap().min(whole.len());
                let to = from.saturating_add(size as usize).min(whole.len());
                assert!(guest.read(node, offset, size) == whole[from..to], "{name} {offset} {size}");
            }
        }
    });
}

#[test]
fn cold_read_leaves_its_thread_and_nothing_warm_waits_for_it() {
    each_image(&["v5-big", "v6-big"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let entries = manifest::read(folder);
        let files: Vec<_> = entries.iter().filter(|entry| entry.kind == b'f' && entry.size > Some(1 << 20)).collect();
        let (warm, cold) = (guest.walk(&files[0].path), guest.walk(&files[1].path));
        assert_eq!(Some(digest(&guest.content(warm, 1 << 20))), files[0].sha256);
        guest.backend.set(Fault::Hang);
        let parked: Vec<Record> = (0..64).map(|number| guest.start(&Ask::read(cold, 0, number * 4096, 4096))).collect();
        assert_eq!(guest.read(warm, 4096, 4096).len(), 4096, "{name}");
        assert_eq!(guest.getattr(cold).size, files[1].size.unwrap(), "{name}");
        assert!(!parked.iter().any(Record::is_complete), "{name}");
        // A new session does not disturb them here: dropping them is up to the device.
        guest.backend.set(Fault::None);
        guest.backend.release(Order::LastFirst);
        let pieces: Vec<u8> = parked.iter().flat_map(|record| record.wait().body()).collect();
        let whole = guest.content(cold, 1 << 20);
        assert!(pieces == whole[..64 * 4096], "{name}");
        assert_eq!(Some(digest(&whole)), files[1].sha256, "{name}");
    });
}

#[test]
fn read_that_fails_is_an_error_and_the_next_one_right() {
    each_image(&["v5-lz4-blake3", "v6-lz4-blake3"], |name, folder| {
        let guest = Guest::of(folder, Xattrs::Served);
        let entries = manifest::read(folder);
        let largest = entries.iter().filter(|entry| entry.kind == b'f').max_by_key(|entry| entry.size).unwrap();
        let node = guest.walk(&largest.path);
        guest.backend.set(Fault::Fail(BackendError::Lasting("as asked".into())));
        let ask = Ask::read(node, 0, 0, 4096);
        assert_eq!(guest.start(&ask).wait().errno(), Some(Errno::IO), "{name}");
        guest.backend.set(Fault::None);
        assert_eq!(Some(digest(&guest.content(node, 4096))), largest.sha256, "{name}");
    });
}
