//! Every bound of the program, each with its reason.
//!
//! Sizes are bytes unless the name says otherwise. A number that guards against hostile input, or that
//! trades memory for speed, lives here and nowhere else, so that one page tells what the program may use.

use std::time::Duration;

/// Largest reply body of a READ, and `max_write` of FUSE_INIT: 256 pages of 4 KiB, the kernel's own
/// default ceiling (`fs.fuse.max_pages_limit`).
pub const MAX_IO_BYTES: u32 = 1 << 20;

/// `max_pages` answered in FUSE_INIT; see [`MAX_IO_BYTES`].
pub const MAX_IO_PAGES: u16 = 256;

/// Bytes of a request that are copied out of guest memory: header, arguments, names, an xattr value of
/// 64 KiB, a BATCH_FORGET list. Bulk data of WRITE is not part of it.
pub const REQUEST_HEAD_BYTES: usize = 128 << 10;

/// Request queues offered when `--queues` is not given.
pub const DEFAULT_REQUEST_QUEUES: u16 = 8;

/// Most request queues: vhost-user-backend maps rings to threads with 64-bit masks, one bit is hiprio's.
pub const MAX_REQUEST_QUEUES: u16 = 63;

/// Largest ring: the limit of the virtio specification (2.7, split virtqueues).
pub const MAX_RING_SIZE: u16 = 32768;

/// Heads popped under the ring lock before they are worked on, so that one busy ring cannot hold its lock,
/// and a fence has little to wait for.
pub const BATCH_HEADS: usize = 64;

/// Reply bytes one batch may ask for before it is worked on; with [`BATCH_HEADS`] it bounds what a fence
/// waits for to a copy of this size (some 10 ms).
pub const BATCH_REPLY_BYTES: usize = 8 << 20;

/// Descriptors of one chain. A 1 MiB request needs 258; a driver may use one segment per page and some more.
pub const MAX_CHAIN_DESCRIPTORS: usize = 1024;

/// Bytes of one chain, both directions: the largest reply, the largest request, and room for headers.
pub const MAX_CHAIN_BYTES: u64 = 64 << 20;

/// Guest memory regions of one connection: what CONFIGURE_MEM_SLOTS of vhost-user allows at most.
pub const MAX_MEMORY_REGIONS: usize = 509;

/// How long a fence waits for copies under way before it says so in the log; it goes on waiting, since
/// writing into a stopped guest is worse than being late.
pub const FENCE_WARN: Duration = Duration::from_millis(50);

/// Maps the SIGBUS guard can watch at once: cache data, blob meta and chunk map of some thousand blobs, and
/// the regions of guest memory.
pub const GUARDED_MAPS: usize = 16384;

/// Largest bootstrap: the 2 GiB that a v5 inode table can address is also beyond every v6 image seen.
pub const MAX_BOOTSTRAP_BYTES: u64 = 2 << 30;

/// Smallest and largest chunk (format, section 1.2).
pub const MIN_CHUNK_BYTES: u32 = 4096;
/// See [`MIN_CHUNK_BYTES`].
pub const MAX_CHUNK_BYTES: u32 = 16 << 20;

/// Chunks of one blob: a 24-bit index.
pub const MAX_CHUNKS_PER_BLOB: u32 = (1 << 24) - 1;

/// Longest symlink target that Linux accepts (`PATH_MAX` less its NUL).
pub const MAX_SYMLINK_BYTES: u64 = 4095;

/// Deepest directory tree that `nydus-image check` and the start-up validation follow.
pub const MAX_TREE_DEPTH: usize = 4096;

/// Longest file name of Linux.
pub const MAX_NAME_BYTES: usize = 255;

/// Longest xattr value of Linux (`XATTR_SIZE_MAX`).
pub const MAX_XATTR_VALUE_BYTES: u32 = 65536;

/// Longest list of xattr names of Linux (`XATTR_LIST_MAX`).
pub const MAX_XATTR_LIST_BYTES: u32 = 65536;

/// Time a guest may believe a name or attribute that can never change: 2^32 seconds, upstream's value, which
/// every kernel converts without overflow.
pub const FOREVER: Duration = Duration::from_secs(1 << 32);

/// Largest configuration file, as upstream.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// `amplify_io` may be at most this (256 MiB), as upstream.
pub const MAX_AMPLIFY_BYTES: u64 = 0x1000_0000;

/// Longest path of a unix socket (`sun_path` less its NUL).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// A daemon has ended within this time after SIGTERM, whatever it was doing.
pub const SHUTDOWN: Duration = Duration::from_secs(1);

/// How long reads wait for a backend before EIO, unless `demand_deadline` says otherwise.
pub const DEMAND_DEADLINE: Duration = Duration::from_secs(60);

/// Bytes of compressed and decoded data that fetches may hold at once; more wait for their turn.
pub const IN_FLIGHT_BYTES: usize = 256 << 20;

/// Longest wait for storage threads at the end; one that hangs in the kernel (a dead disk) is left behind.
pub const POOL_PATIENCE: Duration = Duration::from_millis(200);

/// Longest wait for the data of all caches to reach the disk at a clean end. What is late is only verified again by the
/// next boot, so it must not endanger [`SHUTDOWN`].
pub const SYNC_PATIENCE: Duration = Duration::from_millis(300);

/// How often new cache data is flushed in the background, so that it is trusted after a power cut; and how often open
/// cache files are compared with their paths.
pub const SYNC_INTERVAL: Duration = Duration::from_secs(30);

/// How often deadlines of parked reads are looked at: a tenth of the shortest deadline that can be configured (1 s).
pub const SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// First and longest pause before a chunk that another process fetches is looked at again.
pub const FOREIGN_PAUSE: std::ops::Range<Duration> = Duration::from_millis(1)..Duration::from_millis(20);

/// First and longest pause between attempts at a backend that fails for the moment; doubled each time, with jitter.
pub const RETRY_PAUSE: std::ops::Range<Duration> = Duration::from_millis(50)..Duration::from_secs(5);

/// Immediate extra attempts at a chunk whose bytes were wrong: a torn transfer is repaired, a wrong blob is not asked
/// for again and again.
pub const DAMAGE_RETRIES: u32 = 1;

/// Longest wait for another process that opens the same cache files; opening takes it some milliseconds.
pub const CACHE_OPEN_PATIENCE: Duration = Duration::from_secs(5);

/// One warning per blob in this time when its cache cannot be written or its reads fail.
pub const STORAGE_WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Stored bytes of one merged request when amplification is smaller: what one guest request can ask for.
pub const MERGED_FETCH_BYTES: u64 = 1 << 20;

/// A gap between wanted chunks is read through when it is at most the request's bytes shifted by this, as upstream.
pub const GAP_SHIFT: u32 = 7;

/// A ready chunk up to this size is probed for being in the page cache on the caller's thread (some 50 us of copying);
/// larger ones go to the pool.
pub const PROBE_BYTES: u32 = 1 << 20;

/// Bytes of the buffer for probing and touching cache files, one per thread.
pub const TOUCH_BUFFER_BYTES: usize = 64 << 10;

/// Largest chunk information array that is fetched: 2^24 entries of 24 bytes (format, section 14, rule 21). With ZRan the
/// dictionaries count too, some 32 KiB for each 512 KiB of the gzip file: enough for one of 6 GiB.
pub const MAX_META_BYTES: u64 = (1 << 24) * 24;

/// Largest uncompressed blob whose chunks are not aligned: chunk positions are packed into 38 bits.
pub const MAX_UNALIGNED_BLOB_BYTES: u64 = 1 << 38;
/// Blobs of one image: v6 has 8-bit device numbers, the v5 builder stops at 256.
pub const MAX_BLOBS: usize = 256;
/// Blobs of one v5 image: where its builder stops.
pub const MAX_V5_BLOBS: usize = 256;

/// Longest blob id: it is a file name (64 characters in v6 by its field).
pub const MAX_BLOB_ID_BYTES: usize = 255;

/// Largest uncompressed v6 blob (format, section 1.2).
pub const MAX_BLOB_BYTES: u64 = 1 << 44;

/// Largest v6 blob file: 40-bit offsets (format, section 1.2).
pub const MAX_BLOB_FILE_BYTES: u64 = 1 << 40;

/// Largest xattr table of one v5 inode. All names fit 64 KiB (`XATTR_LIST_MAX`), and a lookup walks the whole table.
pub const MAX_XATTR_TABLE_BYTES: u64 = 1 << 20;

/// Largest table of contents at the end of a blob (format, section 14, rule 22).
pub const MAX_TOC_BYTES: u64 = 64 << 10;

/// Members of an OCI bootstrap layer that are looked at for `image/image.boot`: the snapshotter writes one blob meta
/// for each blob, and some more.
pub const MAX_LAYER_MEMBERS: usize = 1024;

/// Digests of zeros of odd lengths that are remembered for `SEEK_HOLE`, so that asking again does not hash again.
pub const ZERO_DIGESTS: usize = 64;
/// `max_background` answered in FUSE_INIT, the most its field holds: the rings bound what is under way, so the guest's own
/// throttle need not.
pub const MAX_BACKGROUND: u16 = u16::MAX;

/// What a guest can trigger at will (malformed requests, new sessions) is logged once per this time and kind.
pub const GUEST_LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Paths that the builder takes: each needs an inode of 64 bytes, so no more fit into [`MAX_BOOTSTRAP_BYTES`].
pub const MAX_PATHS: u32 = 1 << 25;

/// Stored data of one v6 blob: compressed offsets have 40 bits.
pub const MAX_BLOB_COMPRESSED_BYTES: u64 = 1 << 40;

/// Data of one v6 blob when uncompressed: its offsets have 32 bits in units of 4096 bytes.
pub const MAX_BLOB_UNCOMPRESSED_BYTES: u64 = 1 << 44;

/// Warm reads of a thread between two looks at its count of major page faults, a system call of some 150 ns.
pub const FAULT_SAMPLE_READS: u32 = 64;

/// Shortest time between two doubts about the page cache; each makes every chunk be probed once more.
pub const DOUBT_INTERVAL: Duration = Duration::from_secs(1);
/// Open files wished for when `--rlimit-nofile` is not given, as upstream.
pub const DEFAULT_OPEN_FILES: u64 = 1_000_000;

/// Open files left to the rest of the machine: never more than `fs.file-max` less this, as upstream.
pub const SPARED_OPEN_FILES: u64 = 16384;

/// Bytes of a mount tag: the field of the device's configuration space (virtio 1.3, 5.11.4).
pub const MAX_TAG_BYTES: usize = 36;

/// Lines of one call site in the log per [`LOG_WINDOW`]: what a guest or a server can trigger without end must not
/// fill the disk of the host.
pub const LOG_BURST: u32 = 50;

/// See [`LOG_BURST`].
pub const LOG_WINDOW: Duration = Duration::from_secs(60);

/// Log files that are kept beside the current one, as upstream.
pub const KEPT_LOG_FILES: usize = 10;

/// How long an ordered shutdown may take before the process ends anyway; the rest of [`SHUTDOWN`] is for the kernel
/// to take it apart.
pub const ORDERED_SHUTDOWN: Duration = Duration::from_millis(700);

/// Blobs of one v6 image: device numbers have 8 bits, 0 is the bootstrap, and 255 stays unused (format, section 1.2).
pub const MAX_V6_DEVICES: u16 = 254;

/// How often a read begins when cache files or chunk tables change under it: files may be removed once more while it begins
/// anew, but not for ever.
pub const READ_ATTEMPTS: u32 = 3;

/// How long a chunk is left to another process that holds its lock: a process that died holds none, one that is stopped
/// or hangs on its disk does. After this (or half the demand deadline, if that is sooner) both fetch it.
pub const FOREIGN_PATIENCE: Duration = Duration::from_secs(10);

/// Urgent jobs in a row of the storage pool while others wait: those others are what a later read may wait for.
pub const URGENT_JOBS_IN_A_ROW: u32 = 16;

/// Threads of the storage pool at least: one may be waiting for a disk.
pub const MIN_POOL_THREADS: usize = 2;

/// A storage thread without a job for this long gives its buffers back: longer than the pauses of a guest that starts,
/// short for a daemon that runs for days.
pub const POOL_REST: Duration = Duration::from_secs(1);

/// Broken rules that `nydus-image check` tells before it gives up: more help nobody, and a hostile image must not keep it
/// busy.
pub const MAX_FINDINGS: usize = 1000;

/// Bytes of a path that are shown with a broken rule; a hostile tree is deeper than anybody reads.
pub const MAX_SHOWN_PATH_BYTES: usize = 4096;

/// How old a file under way must be before a build takes it for one that a killed build has left: its owner locks it
/// right after making it.
pub const LEFTOVER_AGE: Duration = Duration::from_secs(60);

/// Decoded chunk tables that `nydus-image check` holds at once, to compare them with the files: those of 32 million chunks.
/// Of further blobs the table is checked alone.
pub const MAX_TABLE_BYTES: u64 = 512 << 20;

/// Decoded chunks that a store keeps in memory where no data file can be mapped for readers (`dummycache`, `compressed`,
/// encryption of the cache): two of the largest chunks, or what a guest reads ahead for 64 files.
pub const DECODED_BYTES: usize = 32 << 20;

/// Decoded chunks go when nobody used them for this long, to twice as long.
pub const DECODED_REST: Duration = Duration::from_secs(5);

/// Chunks in memory that waiting reads may hold at once, where no data file can be mapped for readers: four reads of
/// the largest size over the largest chunks, or a hundred usual ones.
pub const HELD_BYTES: u64 = 128 << 20;

/// Chunks on each side of a wanted one that are claimed because they are stored in one piece with it. Chunks of a few
/// bytes could be a million in one batch; those beyond this are decoded again when somebody wants them.
pub const MAX_UNIT_COMPANIONS: usize = 4096;

/// Decoded bytes of chunks that nobody waits for, after which their work lets others go first: some 10 ms of inflating.
pub const LANDING_SLICE_BYTES: u64 = 1 << 20;

/// Decoded units that are kept where the cache does not hold their chunks: one of the largest with its stored bytes, some
/// ten usual ones.
pub const SHELF_BYTES: usize = 32 << 20;

/// How long such a unit is kept after its last use: longer than the pauses of a guest that reads on.
pub const SHELF_REST: Duration = Duration::from_secs(1);

/// Largest dictionary of a ZRan context: the window of deflate.
pub const MAX_ZRAN_DICTIONARY_BYTES: u32 = 32 << 10;
/// How long a ring's worker that just served stays awake when `--poll-us` is not given: more than a driver needs to answer a
/// reply with the next request, much less than a scheduler's time slice.
pub const DEFAULT_AWAKE: Duration = Duration::from_micros(50);

/// Longest time that `--poll-us` takes: what a worker does instead of sleeping is taken from others.
pub const MAX_AWAKE: Duration = Duration::from_millis(1);

/// A worker stays awake only if fewer requests came since its ring was dry the last time: a wake-up (some 5 us of both
/// sides) is then a noticeable part of each.
pub const AWAKE_BELOW_REQUESTS: usize = 16;

/// What a kick and the wake-up of a worker take at most on a machine with idle processors: so much longer a pause may have
/// been that staying awake would have bridged.
pub const WAKE_UP: Duration = Duration::from_micros(50);

/// Short pauses in a row, at most, before a worker that stayed awake in vain tries again: it then wastes less than 1 % of
/// the time.
pub const MAX_PAUSES_BEFORE_AWAKE: u32 = 256;

/// Looks at the ring between two looks at the clock, while a worker stays awake; each takes some 50 ns.
pub const LOOKS_PER_CLOCK: u32 = 8;

/// Replies of a batch that are shown to the guest together, at most; fewer in a small batch. A guest that looks goes on
/// while the rest is served; one that sleeps is interrupted at the end of the batch.
pub const SHOWN_TOGETHER: usize = 16;

/// Reply bytes after which replies are shown to the guest, whatever their number: some 20 us of copying.
pub const SHOWN_BYTES: u64 = 256 << 10;

/// Bytes of a reply from which they are copied past the caches: beyond a quarter of a processor's own cache they push
/// each other out before the guest reads them, and bring in lines that are only overwritten.
pub const STREAMED_BYTES: usize = 512 << 10;

/// Bytes of a read that are asked for while the request is still being prepared: a page. What is larger is found by the
/// processor itself.
pub const PREFETCHED_BYTES: usize = 4096;
