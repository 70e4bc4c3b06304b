//! The SIGBUS guard: a map over a file that shrinks, or a guest page without memory, must not end the daemon.
//!
//! A lock-free table of our maps. The handler finds the map of the faulting address, marks it *poisoned*, lays an
//! anonymous page over the fault and returns; whoever copies, on whatever thread, looks at the mark afterwards
//! ([`Mark::is_poisoned`]) and throws the copy away. A poisoned map stays poisoned: the page that was laid over it would
//! read as zeros for ever.
//! Faults at foreign addresses go to the handler that was there before.

#![expect(unsafe_code, reason = "signal handlers and memory maps")]

use std::sync::Once;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use crate::limits::GUARDED_MAPS;

/// One watched range. `start == FREE` is a free slot, `start == CLAIMED` one that is being filled.
#[derive(Debug)]
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    poisoned: AtomicBool,
}

const FREE: usize = 0;
/// Never the address of a map: maps are page aligned.
const CLAIMED: usize = 1;

static TABLE: [Slot; GUARDED_MAPS] = [const {
    Slot {
        start: AtomicUsize::new(FREE),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
    }
}; GUARDED_MAPS];

/// One more than the highest slot ever used: what the handler has to look at.
static USED: AtomicUsize = AtomicUsize::new(0);

/// The table of watched maps is full (`limits::GUARDED_MAPS`).
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
#[error("more than {GUARDED_MAPS} memory maps")]
pub struct TableFull;

/// A range of addresses under guard. Dropping it ends the guard; drop it before the range is unmapped.
#[derive(Debug)]
pub struct Watch {
    slot: &'static Slot,
}

/// The mark of a [`Watch`], to be looked at without a way through it. Means nothing once that is dropped.
#[derive(Debug, Clone, Copy)]
pub struct Mark(&'static AtomicBool);

impl Mark {
    /// That of memory which cannot be lost.
    pub fn never() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Self(&NEVER)
    }

    /// Whether a page of the range was lost since the guard began. Look at it after each copy out of the range.
    #[inline]
    pub fn is_poisoned(self) -> bool {
        // The copy comes before the look: another thread may have met the fault, and what we copied may be its cover.
        // Pairs with the store in the handler, which comes before the cover.
        std::sync::atomic::fence(Ordering::Acquire);
        self.0.load(Ordering::Relaxed)
    }
}

impl Watch {
    /// Watches `len` bytes at address `start`, backed by pages of `page_bytes` (4096, or the size of huge pages).
    ///
    /// The first call installs the handler.
    ///
    /// # Errors
    /// [`TableFull`].
    pub fn new(start: usize, len: usize, page_bytes: usize) -> Result<Self, TableFull> {
        install();
        for (index, slot) in TABLE.iter().enumerate() {
            let taken = slot.start.compare_exchange(FREE, CLAIMED, Ordering::Acquire, Ordering::Relaxed);
            if taken.is_err() {
                continue;
            }
            slot.poisoned.store(false, Ordering::Relaxed);
            slot.page.store(page_bytes.max(4096), Ordering::Relaxed);
            // Release: whoever sees this end sees that the slot changed hands before.
            slot.end.store(start.saturating_add(len), Ordering::Release);
            USED.fetch_max(index + 1, Ordering::AcqRel);
            // Release: pairs with the Acquire load in `find`.
            slot.start.store(start, Ordering::Release);
            return Ok(Self { slot });
        }
        Err(TableFull)
    }

    /// The mark that tells whether a page was lost.
    #[inline]
    pub fn mark(&self) -> Mark {
        Mark(&self.slot.poisoned)
    }

    /// See [`Mark::is_poisoned`].
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.mark().is_poisoned()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.slot.end.store(0, Ordering::Release);
        self.slot.start.store(FREE, Ordering::Release);
    }
}

/// The slot whose range holds `address`. Async-signal-safe.
fn find(address: usize) -> Option<&'static Slot> {
    let used = USED.load(Ordering::Acquire).min(GUARDED_MAPS);
    TABLE[..used].iter().find(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        // Acquire, and the start once more: a slot that changes hands at this moment would show the start of one range
        // and the end of another, between which our range may lie.
        let is_within = start > CLAIMED && address >= start && address < slot.end.load(Ordering::Acquire);
        is_within && slot.start.load(Ordering::Relaxed) == start
    })
}

static INSTALLED: Once = Once::new();
static mut PREVIOUS: libc::sigaction = unsafe_zeroed();

const fn unsafe_zeroed() -> libc::sigaction {
    // SAFETY: `sigaction` is a plain C struct of integers, pointers and a mask; all zeros is SIG_DFL.
    unsafe { std::mem::zeroed() }
}

fn install() {
    INSTALLED.call_once(|| {
        let mut action = unsafe_zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: `action` is initialised, the handler is async-signal-safe and has the SA_SIGINFO signature;
        // PREVIOUS is written once, before the handler that reads it can run (`Once`).
        let failed = unsafe { libc::sigaction(libc::SIGBUS, &action, &raw mut PREVIOUS) } != 0;
        assert!(!failed, "sigaction(SIGBUS) refuses valid arguments");
    });
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for SA_SIGINFO handlers; `si_addr` is defined for SIGBUS.
    let address = unsafe { (*info).si_addr() } as usize;
    if let Some(slot) = find(address) {
        // Before the cover: another thread that reads the page may never fault, and must not take its zeros for data.
        slot.poisoned.store(true, Ordering::SeqCst);
        if cover(address, slot.page.load(Ordering::Relaxed)) {
            return;
        }
    }
    hand_on(signal, info, context);
}

/// Lays anonymous memory over the page of `address`. Async-signal-safe.
fn cover(address: usize, page: usize) -> bool {
    let start = address & !(page - 1);
    // SAFETY: the page lies inside a range of ours that is watched, so it is mapped and stays ours; mapping over it
    // replaces file pages that can no longer be read. errno is restored by the caller's libc on return from a handler
    // only for the interrupted code, which does not look at it between a load and its fault.
    let mapped = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            page,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// A fault that is not ours: to the handler before us, or to the default action when the load is tried again.
fn hand_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: PREVIOUS was written before this handler was reachable and is not written again.
    let previous = unsafe { (&raw const PREVIOUS).read() };
    match previous.sa_sigaction {
        libc::SIG_IGN => {}
        libc::SIG_DFL => {
            // SAFETY: restores the default action of this signal; the faulting instruction runs again and ends us.
            unsafe { libc::sigaction(signal, &previous, std::ptr::null_mut()) };
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: a non-default action with SA_SIGINFO holds a function of exactly this type.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: a non-default action without SA_SIGINFO holds a function of exactly this type.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
