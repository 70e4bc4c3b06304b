//! Locks, atomics, threads and the clock of this room: those of [`crate::sys::sync`], so that a model checker can stand
//! behind them.

pub use crate::sys::sync::Arc;
pub use crate::sys::sync::AtomicBool;
pub use crate::sys::sync::AtomicU64;
pub use crate::sys::sync::Condvar;
pub use crate::sys::sync::Mutex;
pub use crate::sys::sync::MutexGuard;
pub use crate::sys::sync::OnceLock;
pub use crate::sys::sync::Ordering;
pub use crate::sys::sync::PoisonError;
pub use crate::sys::sync::Weak;
pub use crate::sys::sync::join_until;
pub use crate::sys::sync::lock;
pub use crate::sys::sync::mpsc;
pub use crate::sys::sync::now;
pub use crate::sys::sync::thread;
pub use crate::sys::sync::wait_until;
