//! The one door to `std::sync`: a model checker's types can be put here without touching the state machines.

pub use std::sync::Arc;
pub use std::sync::Condvar;
pub use std::sync::Mutex;
pub use std::sync::MutexGuard;
pub use std::sync::OnceLock;
pub use std::sync::PoisonError;
pub use std::sync::Weak;
pub use std::sync::atomic::AtomicBool;
pub use std::sync::atomic::AtomicU64;
pub use std::sync::atomic::Ordering;

/// Locks `mutex`. A panic of another holder is not ours: every critical section here leaves its data consistent at
/// each step, so a poisoned lock is used on.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
