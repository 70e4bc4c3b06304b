//! Descriptors that a library takes out of their owner and forgets.

#![expect(unsafe_code, reason = "a bare descriptor number becomes owned again")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use vmm_sys_util::event::EventConsumer;
use vmm_sys_util::event::EventFlag;
use vmm_sys_util::event::EventNotifier;
use vmm_sys_util::event::new_event_consumer_and_notifier;

/// The number of a descriptor whose owner was given to vhost-user-backend as the exit event of a worker.
///
/// vhost-user-backend 0.24 takes it out with `into_raw_fd`, watches it, and closes it nowhere: one descriptor for each
/// worker of each connection. [`Self::close`] closes it once the library's objects are gone.
#[derive(Debug)]
pub struct ForgottenFd(RawFd);

/// An event with its two ends for vhost-user-backend, and the number of the end it will forget. The consumer is for
/// `VhostUserBackend::exit_event` and nothing else: dropped anywhere, its descriptor would be closed twice.
///
/// # Errors
/// What `eventfd` answers.
pub fn exit_event() -> io::Result<(EventConsumer, EventNotifier, ForgottenFd)> {
    let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
    let forgotten = ForgottenFd(consumer.as_raw_fd());
    Ok((consumer, notifier, forgotten))
}

impl ForgottenFd {
    /// Closes the descriptor. The library's objects must be gone: nobody may be using its number any more.
    pub fn close(self) {
        // SAFETY: the consumer of `exit_event` lost its owner inside vhost-user-backend, which closes it nowhere, so
        // the number is open and ours alone; `self` is consumed, so this happens once.
        drop(unsafe { OwnedFd::from_raw_fd(self.0) });
    }
}
