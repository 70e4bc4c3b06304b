//! The allocator's own memory.

#![expect(unsafe_code, reason = "the C library's allocator has no other door")]

use rustix::mm::Advice;

/// Pages of every machine we run on are multiples of this.
const PAGE_BYTES: usize = 4096;

/// Gives what the allocator keeps for later back to the system, but for what lies at the end of a thread's arena. Takes
/// some microseconds per megabyte, under the allocator's locks.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and may be called at any time from any thread.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Frees a large buffer and its pages: freed alone, they stay with the arena of the thread ([`trim`]).
pub fn discard(mut buffer: Vec<u8>) {
    let start = (buffer.as_mut_ptr() as usize).next_multiple_of(PAGE_BYTES);
    let end = (buffer.as_ptr() as usize + buffer.capacity()) & !(PAGE_BYTES - 1);
    if start < end {
        buffer.clear();
        let skip = start - buffer.as_ptr() as usize;
        // SAFETY: the pages lie inside the buffer, which is ours alone, anonymous memory, and about to be freed: that they
        // read as zeros from now on changes nothing for anybody. A refusal (locked pages) leaves them as they are.
        let _ =
            unsafe { rustix::mm::madvise(buffer.as_mut_ptr().add(skip).cast(), end - start, Advice::LinuxDontNeed) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_buffers_leave_their_neighbours_alone() {
        for bytes in [0, 1, 4095, 4096, 8191, 12288, 100_000, 3 << 20] {
            let (before, buffer, behind) = (vec![1u8; bytes], vec![2u8; bytes], vec![3u8; bytes]);
            discard(buffer);
            assert!(before.iter().all(|byte| *byte == 1) && behind.iter().all(|byte| *byte == 3), "{bytes}");
        }
    }
}
