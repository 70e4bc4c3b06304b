//! How often a thread had to wait for a page.

#![expect(unsafe_code, reason = "rustix has no getrusage")]

/// Major page faults of the calling thread so far: each one waited for a disk. One system call.
pub fn thread_major_faults() -> u64 {
    // SAFETY: `rusage` is a plain C struct of integers; all zeros is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is valid for writing and outlives the call; RUSAGE_THREAD is about the calling thread.
    let failed = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) } != 0;
    if failed { 0 } else { u64::try_from(usage.ru_majflt).unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn count_never_falls() {
        let before = super::thread_major_faults();
        assert!(super::thread_major_faults() >= before);
    }
}
