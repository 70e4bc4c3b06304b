//! Signals that are waited for, not handled: blocked in every thread, taken by one.

#![expect(unsafe_code, reason = "signal sets have no safe wrapper")]

use std::io;
use std::mem::MaybeUninit;

/// A set of blocked signals. Whoever blocks them first thing in `main` blocks them in all threads made later.
#[derive(Clone, Copy)]
pub struct Blocked {
    set: libc::sigset_t,
}

impl Blocked {
    /// Blocks `signals` in the calling thread.
    ///
    /// # Errors
    /// `EINVAL` for a number that is no signal.
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset writes the whole set behind the pointer.
        let mut set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in signals {
            // SAFETY: `set` is a valid set; the number is checked by the call.
            if unsafe { libc::sigaddset(&mut set, *signal) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: `set` is valid, and no old mask is asked for.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
            0 => Ok(Self { set }),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Waits for one of the signals, for ever if none comes.
    ///
    /// # Errors
    /// What `sigwait` answers.
    pub fn wait(&self) -> io::Result<i32> {
        let mut signal = 0;
        // SAFETY: both pointers are valid for the call.
        match unsafe { libc::sigwait(&self.set, &mut signal) } {
            0 => Ok(signal),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocked_signal_is_waited_for() {
        // SIGURG does nothing where it is not blocked, so the other threads of the test do not mind.
        let blocked = Blocked::new(&[libc::SIGURG]).unwrap();
        let thread = rustix::thread::gettid();
        let sender = std::thread::spawn(move || {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::URG).unwrap();
            thread
        });
        // The process-directed signal may be taken by another thread of the test binary; this one is for us.
        sender.join().unwrap();
        // SAFETY: raise sends a signal to the calling thread, which blocks it.
        unsafe { libc::raise(libc::SIGURG) };
        assert_eq!(blocked.wait().unwrap(), libc::SIGURG);
        assert!(Blocked::new(&[-1]).is_err());
    }
}
