//! Every counter of the daemon, defined once; one JSON line is a view of them.
//!
//! Counting happens where the fact is known. Counters are monotonic, relaxed, and sharded by queue where a request
//! of a guest touches them, so that two queues do not share a cache line.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use serde_json::json;

/// Operations counted one by one: FUSE opcodes below this number, the rest in the last place.
pub const OPCODES: usize = 64;

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

/// Counters of FUSE requests by opcode.
#[derive(Debug)]
pub struct OpCounters {
    hits: [Counter; OPCODES],
    errors: [Counter; OPCODES],
}

impl Default for OpCounters {
    fn default() -> Self {
        Self { hits: std::array::from_fn(|_| Counter::default()), errors: std::array::from_fn(|_| Counter::default()) }
    }
}

impl OpCounters {
    /// A request with `opcode` arrived.
    #[inline]
    pub fn hit(&self, opcode: u32) {
        self.hits[Self::place(opcode)].add(1);
    }

    /// A request with `opcode` was answered with an error.
    #[inline]
    pub fn error(&self, opcode: u32) {
        self.errors[Self::place(opcode)].add(1);
    }

    /// Requests with `opcode` so far.
    pub fn hits_of(&self, opcode: u32) -> u64 {
        self.hits[Self::place(opcode)].get()
    }

    /// Requests of every kind so far.
    pub fn total(&self) -> u64 {
        self.hits.iter().map(Counter::get).sum()
    }

    #[inline]
    fn place(opcode: u32) -> usize {
        (opcode as usize).min(OPCODES - 1)
    }
}

/// Counters of storage: cache and backends of all blobs.
#[derive(Debug, Default)]
pub struct StorageCounters {
    /// Reads answered from ready chunks at once.
    pub warm_reads: Counter,
    /// Reads that had to wait for a fetch.
    pub parked_reads: Counter,
    /// Chunks fetched, verified and ready.
    pub chunks_fetched: Counter,
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
        let by_opcode = |counters: &[Counter; OPCODES]| -> serde_json::Map<String, serde_json::Value> {
            let seen = counters.iter().enumerate().filter(|(_, c)| c.get() > 0);
            seen.map(|(opcode, c)| (opcode.to_string(), json!(c.get()))).collect()
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
            "ops": by_opcode(&self.ops.hits),
            "errors": by_opcode(&self.ops.errors),
            "queues": self.queues.iter().map(queue).collect::<Vec<_>>(),
            "storage": {
                "warm_reads": s.warm_reads.get(), "parked_reads": s.parked_reads.get(),
                "chunks_fetched": s.chunks_fetched.get(), "backend_requests": s.backend_requests.get(),
                "backend_bytes": s.backend_bytes.get(), "backend_errors": s.backend_errors.get(),
                "digest_mismatches": s.digest_mismatches.get(), "cache_write_errors": s.cache_write_errors.get(),
                "hints_confirmed": s.hints_confirmed.get(), "hints_refuted": s.hints_refuted.get(),
            },
        })
    }
}
