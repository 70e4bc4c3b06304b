//! The allocator's own memory.

#![expect(unsafe_code, reason = "the C library's allocator has no other door")]

/// Gives what the allocator keeps for later back to the system. Takes some microseconds per megabyte, under the
/// allocator's locks.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and may be called at any time from any thread.
    let _ = unsafe { libc::malloc_trim(0) };
}
