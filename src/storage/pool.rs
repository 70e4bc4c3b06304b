//! The bounded pool: about one thread per processor for decoding, verifying, completing and slow host I/O, and the
//! timers of storage.
//!
//! The only place where storage spawns threads. A job may use the disk, but never waits for another job, a lock that
//! is held over I/O, or a backend. Jobs for which a reader waits go before the others, which still get on: a later
//! reader may join what they do. A job that panics ends alone.
//!
//! Timers live in the waiting of the workers: no thread of their own, late by at most one job.
//!
//! Buffers that a thread keeps from job to job are given back to the system when it had nothing to do for a while
//! ([`when_idle`]): a daemon whose image is fetched uses no more memory than one that fetched nothing.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::VecDeque;
use std::io;
use std::panic::AssertUnwindSafe;
use std::time::Duration;
use std::time::Instant;

use super::sync::Arc;
use super::sync::Condvar;
use super::sync::Mutex;
use super::sync::PoisonError;
use super::sync::join_until;
use super::sync::lock;
use super::sync::now;
use super::sync::thread;
use super::sync::thread::JoinHandle;
use super::sync::wait_until;
use crate::limits::MIN_POOL_THREADS;
use crate::limits::POOL_REST;
use crate::limits::URGENT_JOBS_IN_A_ROW;

/// Who waits for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// A reader.
    Demand,
    /// Nobody.
    Background,
}

type Job = Box<dyn FnOnce() + Send>;

struct Timer {
    at: Instant,
    /// Keeps timers of one instant in order, and makes the order total.
    serial: u64,
    job: Job,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.serial) == (other.at, other.serial)
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}

#[derive(Default)]
struct Queues {
    demand: VecDeque<Job>,
    background: VecDeque<Job>,
    timers: BinaryHeap<Reverse<Timer>>,
    serial: u64,
    /// Urgent jobs taken in a row while others waited.
    urgent_in_a_row: u32,
    closed: bool,
}

impl Queues {
    /// The job to do now, and when the next timer is due.
    fn take(&mut self, now: Instant) -> Result<Job, Option<Instant>> {
        let due = self.timers.peek().map(|Reverse(timer)| timer.at);
        if due.is_some_and(|at| at <= now)
            && let Some(Reverse(timer)) = self.timers.pop()
        {
            return Ok(timer.job);
        }
        if self.urgent_in_a_row >= URGENT_JOBS_IN_A_ROW
            && let Some(job) = self.background.pop_front()
        {
            self.urgent_in_a_row = 0;
            return Ok(job);
        }
        if let Some(job) = self.demand.pop_front() {
            let others_wait = u32::from(!self.background.is_empty());
            self.urgent_in_a_row = self.urgent_in_a_row.saturating_add(others_wait);
            return Ok(job);
        }
        self.urgent_in_a_row = 0;
        self.background.pop_front().ok_or(due)
    }

    fn has_jobs(&self) -> bool {
        !self.demand.is_empty() || !self.background.is_empty()
    }
}

#[derive(Default)]
struct Shared {
    queues: Mutex<Queues>,
    wake: Condvar,
}

/// A fixed number of threads that work on jobs.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &lock(&self.threads).len()).finish()
    }
}

impl Pool {
    /// A pool of `threads` threads, at least one.
    ///
    /// # Errors
    /// What the system answers when no thread can be made.
    pub fn new(threads: usize) -> io::Result<Arc<Self>> {
        let pool = Self { shared: Arc::new(Shared::default()), threads: Mutex::new(Vec::new()) };
        for index in 0..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let thread = thread::Builder::new().name(format!("storage-{index}")).spawn(move || work(&shared))?;
            lock(&pool.threads).push(thread);
        }
        Ok(Arc::new(pool))
    }

    /// A pool with one thread per processor, and never only one: a flush may hold it for long.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn with_processors() -> io::Result<Arc<Self>> {
        Self::new(std::thread::available_parallelism().map_or(1, std::num::NonZero::get).max(MIN_POOL_THREADS))
    }

    /// Queues `job`. Never blocks. After [`Pool::shutdown`] the job is dropped.
    pub fn spawn(&self, urgency: Urgency, job: impl FnOnce() + Send + 'static) {
        let job: Job = Box::new(job);
        let refused = {
            let mut queues = lock(&self.shared.queues);
            match (queues.closed, urgency) {
                (true, _) => Some(job),
                (false, Urgency::Demand) => {
                    queues.demand.push_back(job);
                    None
                }
                (false, Urgency::Background) => {
                    queues.background.push_back(job);
                    None
                }
            }
        };
        // Outside the lock: dropping a job may complete reads.
        drop(refused);
        self.shared.wake.notify_one();
    }

    /// Runs `job` after `delay`. Never blocks. After [`Pool::shutdown`] the job is dropped.
    pub fn after(&self, delay: Duration, job: impl FnOnce() + Send + 'static) {
        let job: Job = Box::new(job);
        let refused = {
            let mut queues = lock(&self.shared.queues);
            if queues.closed {
                Some(job)
            } else {
                queues.serial = queues.serial.wrapping_add(1);
                let serial = queues.serial;
                queues.timers.push(Reverse(Timer { at: now() + delay, serial, job }));
                None
            }
        };
        drop(refused);
        self.shared.wake.notify_one();
    }

    /// Drops all queued jobs and timers and lets the threads end. Waits at most `patience` for jobs under way; a thread
    /// that hangs in the kernel is left behind.
    pub fn shutdown(&self, patience: Duration) {
        let dropped = {
            let mut queues = lock(&self.shared.queues);
            queues.closed = true;
            let Queues { demand, background, timers, .. } = &mut *queues;
            (std::mem::take(demand), std::mem::take(background), std::mem::take(timers))
        };
        // Outside the lock: dropping a job may complete reads.
        drop(dropped);
        self.shared.wake.notify_all();
        let until = now() + patience;
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            // The last owner of a pool may be one of its jobs: a thread cannot wait for itself.
            if thread.thread().id() == thread::current().id() {
                continue;
            }
            join_until(thread, until);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shutdown(crate::limits::POOL_PATIENCE);
    }
}

thread_local! {
    /// What this thread has to give back.
    static LITTER: RefCell<Vec<fn()>> = const { RefCell::new(Vec::new()) };
}

/// Calls `give_back` on this thread once it has had no job for `limits::POOL_REST`. For jobs that leave something in the
/// thread's memory for the next one; on a thread that is none of the pool's, nothing happens.
pub fn when_idle(give_back: fn()) {
    LITTER.with_borrow_mut(|litter| {
        if !litter.iter().any(|known| std::ptr::fn_addr_eq(*known, give_back)) {
            litter.push(give_back);
        }
    });
}

fn tidy() {
    LITTER.take().iter().for_each(|give_back| give_back());
    crate::sys::heap::trim();
}

fn work(shared: &Shared) {
    while let Some(job) = next(shared) {
        if std::panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("a storage job panicked; the reads that waited for it are answered with an error");
        }
    }
}

/// The next job; `None` when the pool is closed.
fn next(shared: &Shared) -> Option<Job> {
    let rest_at = LITTER.with_borrow(|litter| !litter.is_empty()).then(|| now() + POOL_REST);
    let mut queues = lock(&shared.queues);
    loop {
        if queues.closed {
            return None;
        }
        let time = now();
        let due = match queues.take(time) {
            Ok(job) => {
                // Whoever was woken for one job may have found another that came due meanwhile.
                if queues.has_jobs() {
                    shared.wake.notify_one();
                }
                return Some(job);
            }
            Err(due) => due,
        };
        if rest_at.is_some_and(|at| at <= time) {
            return Some(Box::new(tidy));
        }
        queues = match due.into_iter().chain(rest_at).min() {
            Some(at) => wait_until(&shared.wake, &shared.queues, queues, at),
            None => shared.wake.wait(queues).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn demand_jobs_go_before_background_jobs() {
        let pool = Pool::new(1).unwrap();
        let (order, seen) = mpsc::channel();
        let (release, gate) = mpsc::channel::<()>();
        pool.spawn(Urgency::Demand, move || gate.recv_timeout(LONG).unwrap());
        for (urgency, name) in [(Urgency::Background, "b"), (Urgency::Demand, "d")] {
            let order = order.clone();
            pool.spawn(urgency, move || order.send(name).unwrap());
        }
        release.send(()).unwrap();
        assert_eq!([seen.recv_timeout(LONG).unwrap(), seen.recv_timeout(LONG).unwrap()], ["d", "b"]);
    }

    #[test]
    fn thread_without_jobs_gives_back_what_it_kept_once() {
        static GIVEN_BACK: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let given_back = || GIVEN_BACK.load(std::sync::atomic::Ordering::SeqCst);
        let pool = Pool::new(1).unwrap();
        for _ in 0..2 {
            pool.spawn(Urgency::Demand, || {
                when_idle(|| {
                    GIVEN_BACK.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                });
            });
        }
        let until = Instant::now() + LONG;
        while given_back() == 0 && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(POOL_REST / 2);
        assert_eq!(given_back(), 1);
    }

    #[test]
    fn timers_fire_in_order_and_not_early() {
        let pool = Pool::new(2).unwrap();
        let (order, seen) = mpsc::channel();
        let begin = Instant::now();
        for ms in [60u64, 20, 40] {
            let order = order.clone();
            pool.after(Duration::from_millis(ms), move || order.send((ms, begin.elapsed())).unwrap());
        }
        for ms in [20, 40, 60] {
            let (fired, at) = seen.recv_timeout(LONG).unwrap();
            assert_eq!(fired, ms);
            assert!(at >= Duration::from_millis(ms));
        }
    }

    #[test]
    fn job_is_not_left_behind_when_its_wake_up_finds_a_timer() {
        let pool = Pool::new(2).unwrap();
        // Both threads asleep, and one wake-up for a job at the moment at which a timer is due.
        thread::sleep(Duration::from_millis(50));
        let (release, gate) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        {
            let mut queues = lock(&pool.shared.queues);
            let long: Job = Box::new(move || assert!(gate.recv_timeout(LONG).is_err()));
            queues.timers.push(Reverse(Timer { at: Instant::now(), serial: 0, job: long }));
            queues.demand.push_back(Box::new(move || tell.send(()).unwrap()));
        }
        pool.shared.wake.notify_one();
        assert!(told.recv_timeout(LONG / 4).is_ok(), "a thread sleeps beside a job");
        drop(release);
    }

    #[test]
    fn background_jobs_get_on_while_demand_jobs_keep_coming() {
        let pool = Pool::new(1).unwrap();
        let (release, gate) = mpsc::channel::<()>();
        pool.spawn(Urgency::Demand, move || gate.recv_timeout(LONG).unwrap());
        let (tell, told) = mpsc::channel();
        for n in 0..100 {
            let tell = tell.clone();
            pool.spawn(Urgency::Demand, move || tell.send(Some(n)).unwrap());
        }
        pool.spawn(Urgency::Background, move || tell.send(None).unwrap());
        release.send(()).unwrap();
        let order: Vec<_> = (0..101).map(|_| told.recv_timeout(LONG).unwrap()).collect();
        let at = order.iter().position(Option::is_none).unwrap();
        assert!((1..=URGENT_JOBS_IN_A_ROW as usize).contains(&at), "after {at} demand jobs");
    }

    #[test]
    fn panic_in_a_job_leaves_the_thread_alive() {
        let pool = Pool::new(1).unwrap();
        pool.spawn(Urgency::Demand, || panic!("on purpose"));
        let (tell, told) = mpsc::channel();
        pool.spawn(Urgency::Demand, move || tell.send(()).unwrap());
        told.recv_timeout(LONG).unwrap();
    }

    #[test]
    fn shutdown_drops_what_waits_and_does_not_wait_for_what_hangs() {
        let pool = Pool::new(1).unwrap();
        let (_keep, gate) = mpsc::channel::<()>();
        pool.spawn(Urgency::Demand, move || {
            let _ = gate.recv_timeout(LONG);
        });
        let witness = Arc::new(());
        let (in_queue, in_timer, late) = (Arc::clone(&witness), Arc::clone(&witness), Arc::clone(&witness));
        pool.spawn(Urgency::Demand, move || drop(in_queue));
        pool.after(LONG, move || drop(in_timer));
        let begin = Instant::now();
        pool.shutdown(Duration::from_millis(50));
        assert!(begin.elapsed() < Duration::from_secs(5));
        pool.spawn(Urgency::Demand, move || drop(late));
        assert_eq!(Arc::strong_count(&witness), 1);
    }

    #[test]
    fn last_owner_on_a_pool_thread_does_not_deadlock() {
        let pool = Pool::new(1).unwrap();
        let (tell, told) = mpsc::channel();
        let own = Arc::clone(&pool);
        pool.after(Duration::from_millis(20), move || {
            drop(own);
            tell.send(()).unwrap();
        });
        drop(pool);
        told.recv_timeout(LONG).unwrap();
    }
}
