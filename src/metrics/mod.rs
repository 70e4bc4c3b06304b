//! Every counter of the daemon, defined once; one JSON line is a view of them.
//!
//! Counting happens where the fact is known. Counters are monotonic, relaxed, and sharded by queue where a request
//! of a guest touches them, so that two queues do not share a cache line.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use serde_json::json;

/// Operations counted one by one: FUSE opcodes below this number, the rest in the last place.
pub const OPCODES: usize = 64;

/// Shards of [`OpCounters`]: threads beyond this number share.
const OP_SHARDS: usize = 16;

thread_local! {
    static OP_SHARD: usize = {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        // Relaxed: any spread of threads will do.
        THREADS.fetch_add(1, Ordering::Relaxed) % OP_SHARDS
    };
}

thread_local! {
    /// The share that the last request of this thread left.
    static SPARE: Cell<Option<Arc<OpShard>>> = const { Cell::new(None) };
}

/// A counter that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        // Relaxed: a statistic, it orders nothing.
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// What it counts so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A [`Counter`] that many threads add to: each in a cache line of its own.
#[derive(Debug, Default)]
pub struct SpreadCounter([Spread; OP_SHARDS]);

#[derive(Debug, Default)]
#[repr(align(128))]
struct Spread(Counter);

impl SpreadCounter {
    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0[OP_SHARD.with(|shard| *shard)].0.add(n);
    }

    /// What it counts so far.
    pub fn get(&self) -> u64 {
        self.0.iter().map(|part| part.0.get()).sum()
    }
}

/// Counters of one queue of the device. Aligned so that queues do not share cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueCounters {
    /// Kicks received from the guest.
    pub kicks: Counter,
    /// Interrupts sent to the guest.
    pub calls: Counter,
    /// Requests taken from the ring.
    pub requests: Counter,
    /// Chains that could not be read as a request.
    pub malformed: Counter,
    /// Times the ring itself was broken and the queue stopped.
    pub broken: Counter,
    /// Replies completed on another thread than the queue's worker.
    pub late: Counter,
    /// Bytes of reply bodies written to the guest.
    pub bytes: Counter,
}

/// Counters of FUSE requests by opcode. Each thread counts in a shard of its own, so that two queues do not pass a cache
/// line back and forth.
#[derive(Debug)]
pub struct OpCounters {
    shards: [Arc<OpShard>; OP_SHARDS],
}

/// The part of [`OpCounters`] that one thread (and those that share its number) counts in.
#[derive(Debug)]
#[repr(align(128))]
pub struct OpShard {
    hits: [Counter; OPCODES],
    errors: [Counter; OPCODES],
}

impl Default for OpCounters {
    fn default() -> Self {
        let zeros = || std::array::from_fn(|_| Counter::default());
        Self { shards: std::array::from_fn(|_| Arc::new(OpShard { hits: zeros(), errors: zeros() })) }
    }
}

impl OpShard {
    /// A request with `opcode` arrived.
    #[inline]
    pub fn hit(&self, opcode: u32) {
        self.hits[place(opcode)].add(1);
    }

    /// A request with `opcode` was answered with an error.
    #[inline]
    pub fn error(&self, opcode: u32) {
        self.errors[place(opcode)].add(1);
    }
}

/// A share of an [`OpShard`]. Most requests end on the thread they began on: it keeps one share for the next of them,
/// so that counting references costs nothing.
#[derive(Debug)]
pub struct OpTally(Option<Arc<OpShard>>);

impl OpTally {
    /// A request with `opcode` arrived.
    #[inline]
    pub fn hit(&self, opcode: u32) {
        self.0.iter().for_each(|shard| shard.hit(opcode));
    }

    /// A request with `opcode` was answered with an error.
    #[inline]
    pub fn error(&self, opcode: u32) {
        self.0.iter().for_each(|shard| shard.error(opcode));
    }
}

impl Drop for OpTally {
    #[inline]
    fn drop(&mut self) {
        let share = self.0.take();
        // A thread that ends keeps nothing.
        let _ = SPARE.try_with(|spare| spare.set(share));
    }
}

impl OpCounters {
    /// This thread's shard, for a request that is counted now and once more when it ends, maybe on another thread.
    #[inline]
    pub fn shard(&self) -> OpTally {
        let ours = &self.shards[OP_SHARD.with(|shard| *shard)];
        match SPARE.try_with(Cell::take) {
            Ok(Some(spare)) if Arc::ptr_eq(&spare, ours) => OpTally(Some(spare)),
            _ => OpTally(Some(Arc::clone(ours))),
        }
    }

    /// A request with `opcode` arrived.
    #[inline]
    pub fn hit(&self, opcode: u32) {
        self.shards[OP_SHARD.with(|shard| *shard)].hit(opcode);
    }

    /// A request with `opcode` was answered with an error.
    #[inline]
    pub fn error(&self, opcode: u32) {
        self.shards[OP_SHARD.with(|shard| *shard)].error(opcode);
    }

    /// Requests with `opcode` so far.
    pub fn hits_of(&self, opcode: u32) -> u64 {
        self.sum(|shard| &shard.hits)[place(opcode)]
    }

    /// Requests with `opcode` that were answered with an error so far.
    pub fn errors_of(&self, opcode: u32) -> u64 {
        self.sum(|shard| &shard.errors)[place(opcode)]
    }

    /// Requests of every kind so far.
    pub fn total(&self) -> u64 {
        self.sum(|shard| &shard.hits).iter().sum()
    }

    fn sum(&self, of: impl Fn(&OpShard) -> &[Counter; OPCODES]) -> [u64; OPCODES] {
        std::array::from_fn(|opcode| self.shards.iter().map(|shard| of(shard)[opcode].get()).sum())
    }
}

#[inline]
fn place(opcode: u32) -> usize {
    (opcode as usize).min(OPCODES - 1)
}

/// Counters of storage: cache and backends of all blobs.
#[derive(Debug, Default)]
pub struct StorageCounters {
    /// Reads answered from ready chunks at once.
    pub warm_reads: SpreadCounter,
    /// Reads that had to wait for a fetch.
    pub parked_reads: Counter,
    /// Chunks fetched, verified and ready.
    pub chunks_fetched: Counter,
    /// Batches and stretches of gzip files whose decoding began.
    pub units_decoded: Counter,
    /// Requests sent to a backend.
    pub backend_requests: Counter,
    /// Bytes received from a backend.
    pub backend_bytes: Counter,
    /// Requests to a backend that failed.
    pub backend_errors: Counter,
    /// Chunks whose bytes did not match their digest.
    pub digest_mismatches: Counter,
    /// Chunks that could not be kept in the cache (disk full or broken).
    pub cache_write_errors: Counter,
    /// Chunks of the map that were hints and proved right on first use.
    pub hints_confirmed: Counter,
    /// Chunks of the map that were hints and had to be fetched again.
    pub hints_refuted: Counter,
    /// Chunks that were read into memory because another image describes the same blob otherwise.
    pub disputed_chunks: Counter,
    /// Requests to a backend that had to wait until others had freed their memory.
    pub budget_waits: Counter,
    /// Reads answered with an error because the demand deadline passed.
    pub deadlines_missed: Counter,
    /// Times cache files were opened anew because they had been removed or truncated.
    pub cache_reopened: Counter,
}

/// Everything one daemon counts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// FUSE requests.
    pub ops: OpCounters,
    /// Queues of the device, hiprio first.
    pub queues: Vec<QueueCounters>,
    /// Cache and backends.
    pub storage: StorageCounters,
}

impl Metrics {
    /// Counters for a device of `queues` rings, hiprio included.
    pub fn new(queues: usize) -> Self {
        Self { queues: (0..queues).map(|_| QueueCounters::default()).collect(), ..Self::default() }
    }

    /// All counters, for the JSON line of SIGUSR1.
    pub fn to_json(&self) -> serde_json::Value {
        let by_opcode = |counts: [u64; OPCODES]| -> serde_json::Map<String, serde_json::Value> {
            let seen = counts.iter().enumerate().filter(|(_, count)| **count > 0);
            seen.map(|(opcode, count)| (opcode.to_string(), json!(count))).collect()
        };
        let queue = |q: &QueueCounters| {
            json!({
                "kicks": q.kicks.get(), "calls": q.calls.get(), "requests": q.requests.get(),
                "malformed": q.malformed.get(), "broken": q.broken.get(), "late": q.late.get(), "bytes": q.bytes.get(),
            })
        };
        let s = &self.storage;
        json!({
            "requests": self.ops.total(),
            "ops": by_opcode(self.ops.sum(|shard| &shard.hits)),
            "errors": by_opcode(self.ops.sum(|shard| &shard.errors)),
            "queues": self.queues.iter().map(queue).collect::<Vec<_>>(),
            "storage": {
                "warm_reads": s.warm_reads.get(), "parked_reads": s.parked_reads.get(),
                "chunks_fetched": s.chunks_fetched.get(), "units_decoded": s.units_decoded.get(),
                "backend_requests": s.backend_requests.get(), "backend_bytes": s.backend_bytes.get(), "backend_errors": s.backend_errors.get(),
                "digest_mismatches": s.digest_mismatches.get(), "cache_write_errors": s.cache_write_errors.get(),
                "hints_confirmed": s.hints_confirmed.get(), "hints_refuted": s.hints_refuted.get(),
                "disputed_chunks": s.disputed_chunks.get(),
                "budget_waits": s.budget_waits.get(), "deadlines_missed": s.deadlines_missed.get(),
                "cache_reopened": s.cache_reopened.get(),
            },
        })
    }
}
