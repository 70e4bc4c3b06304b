//! The one door to `std::sync`, to threads and to the clock, for rooms whose state machines are model checked.
//!
//! With the feature `model` a model checker (shuttle) stands behind it: the same state machines run, and the checker decides at
//! each lock, atomic and wait who goes on. There, a clock moves only when somebody waits for it.

pub use std::sync::Arc;
pub use std::sync::OnceLock;
pub use std::sync::PoisonError;
pub use std::sync::Weak;
pub use std::sync::atomic::Ordering;

#[cfg(feature = "model")]
pub use self::model::*;
#[cfg(not(feature = "model"))]
pub use self::system::*;

/// Locks `mutex`. A panic of another holder is not ours: every critical section here leaves its data consistent at
/// each step, so a poisoned lock is used on.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the operating system has.
#[cfg(not(feature = "model"))]
mod system {
    pub use std::sync::Condvar;
    pub use std::sync::Mutex;
    pub use std::sync::MutexGuard;
    pub use std::sync::atomic::AtomicBool;
    pub use std::sync::atomic::AtomicU64;
    pub use std::sync::mpsc;
    pub use std::thread;
    use std::time::Duration;
    use std::time::Instant;

    use super::PoisonError;

    /// The time.
    pub fn now() -> Instant {
        Instant::now()
    }

    /// Waits for `wake` until `at`, or for no reason. `guard` is that of `mutex`, and free meanwhile.
    pub fn wait_until<'a, T>(
        wake: &Condvar,
        _mutex: &'a Mutex<T>,
        guard: MutexGuard<'a, T>,
        at: Instant,
    ) -> MutexGuard<'a, T> {
        let waited = wake.wait_timeout(guard, at.saturating_duration_since(now()));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits for the end of `thread` until `at`; one that does not end is left behind.
    pub fn join_until(thread: thread::JoinHandle<()>, at: Instant) {
        while !thread.is_finished() && now() < at {
            thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            // What it panicked with was logged where it happened.
            let _ = thread.join();
        }
    }
}

/// What the model checker has.
#[cfg(feature = "model")]
mod model {
    use std::cell::Cell;
    use std::time::Duration;
    use std::time::Instant;

    use shuttle::rand::Rng;
    pub use shuttle::sync::Condvar;
    pub use shuttle::sync::Mutex;
    pub use shuttle::sync::MutexGuard;
    pub use shuttle::sync::atomic::AtomicBool;
    pub use shuttle::sync::atomic::AtomicU64;
    pub use shuttle::sync::mpsc;
    pub use shuttle::thread;

    use super::lock;

    std::thread_local! {
        /// How far the clock was put forward: all threads of a model are one thread of the system.
        static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// The time.
    pub fn now() -> Instant {
        Instant::now() + AHEAD.get()
    }

    /// Somebody waits, or, as the checker likes it, the time has come.
    pub fn wait_until<'a, T>(
        _wake: &Condvar,
        mutex: &'a Mutex<T>,
        guard: MutexGuard<'a, T>,
        at: Instant,
    ) -> MutexGuard<'a, T> {
        drop(guard);
        if shuttle::rand::thread_rng().gen_bool(0.25) {
            AHEAD.set(AHEAD.get() + at.saturating_duration_since(now()));
        }
        thread::yield_now();
        lock(mutex)
    }

    /// Waits for the end of `thread`.
    pub fn join_until(thread: thread::JoinHandle<()>, _at: Instant) {
        let _ = thread.join();
    }
}
