//! FUSE_INIT: what is negotiated, and why.

use super::filesystem::InitPolicy;
use super::filesystem::Session;
use super::wire;
use crate::limits::MAX_BACKGROUND;
use crate::limits::MAX_IO_BYTES;
use crate::limits::MAX_IO_PAGES;

/// Flags of FUSE_INIT that we grant or look at; bits from 32 on travel in `flags2`.
mod flag {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
}

/// Flags that every guest gets if it offers them, each with its reason. Left out on purpose: WRITEBACK_CACHE (turns
/// FOPEN_NOFLUSH off), AUTO_INVAL_DATA (content never changes), POSIX_ACL and SECURITY_CTX (nothing is created),
/// ALLOW_IDMAP (some guests break the mount without POSIX_ACL), REQUEST_TIMEOUT (a slow registry must not abort the
/// mount).
const GRANTED: [(u64, &str); 11] = [
    (flag::ASYNC_READ, "readahead sends its requests in parallel"),
    (flag::BIG_WRITES, "writes larger than a page, where anything is writable"),
    (flag::DO_READDIRPLUS, "a listing brings its attributes"),
    (flag::READDIRPLUS_AUTO, "and does not where nobody stats the entries"),
    (flag::ASYNC_DIO, "direct reads run in parallel"),
    (flag::PARALLEL_DIROPS, "lookups in one directory do not wait for each other"),
    (flag::MAX_PAGES, "requests of 1 MiB instead of 128 KiB"),
    (flag::CACHE_SYMLINKS, "a symlink is read once"),
    (flag::EXPLICIT_INVAL_DATA, "the page cache is never dropped for a changed time or size"),
    (flag::HANDLE_KILLPRIV_V2, "saves GETXATTR of security.capability before writes"),
    (flag::INIT_EXT, "flags beyond 32 bits are understood"),
];

/// FUSE_INIT as the guest sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offer {
    pub major: u32,
    pub minor: u32,
    max_readahead: u32,
    flags: u64,
}

impl Offer {
    /// Reads the arguments of INIT: 8 bytes before 7.6, 16 before 7.36, 64 since. `None` if even the versions are
    /// not there.
    pub(super) fn read(args: &[u8]) -> Option<Self> {
        fn prefix<T: zerocopy::FromBytes>(bytes: &[u8]) -> Option<(T, &[u8])> {
            let (front, rest) = bytes.split_at_checked(size_of::<T>())?;
            Some((T::read_from_bytes(front).ok()?, rest))
        }
        let (wire::InitIn { major, minor }, rest) = prefix(args)?;
        let Some((wire::InitInFlags { max_readahead, flags }, rest)) = prefix(rest) else {
            return Some(Self { major, minor, max_readahead: 0, flags: 0 });
        };
        let mut flags = u64::from(flags);
        if flags & flag::INIT_EXT != 0 {
            let high = prefix::<u32>(rest).map_or(0, |(flags2, _)| flags2);
            flags |= u64::from(high) << 32;
        }
        Some(Self { major, minor, max_readahead, flags })
    }
}

/// What a session begins with: the answer, and what it means for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agreement {
    pub session: Session,
    pub answer: wire::InitOut,
    /// Bytes of `answer` that this guest's version knows.
    pub answer_bytes: usize,
}

/// Settles a session with a guest of our major version.
pub(super) fn agree(offer: &Offer, policy: InitPolicy) -> Agreement {
    let minor = offer.minor.min(wire::MINOR);
    let mut wanted = GRANTED.iter().fold(0, |flags, (flag, _)| flags | flag);
    if policy.export_support {
        wanted |= flag::EXPORT_SUPPORT;
    }
    if policy.zero_message_open {
        // Kernels go by the ENOSYS; the bits tell whoever reads a trace.
        wanted |= flag::NO_OPEN_SUPPORT | flag::NO_OPENDIR_SUPPORT;
    }
    let flags = offer.flags & wanted;
    let session = Session {
        minor,
        no_open: flags & flag::NO_OPEN_SUPPORT != 0,
        no_opendir: flags & flag::NO_OPENDIR_SUPPORT != 0,
    };
    let answer = wire::InitOut {
        max_readahead: offer.max_readahead,
        flags: low(flags),
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND / 4 * 3,
        max_write: MAX_IO_BYTES,
        time_gran: 1,
        max_pages: if flags & flag::MAX_PAGES == 0 { 0 } else { MAX_IO_PAGES },
        flags2: low(flags >> 32),
        ..versions(minor)
    };
    Agreement { session, answer, answer_bytes: answer_bytes(minor) }
}

/// The answer to a guest of a newer major version: our version. It sends another INIT then, of that version.
pub(super) fn ask_for_our_major() -> wire::InitOut {
    versions(wire::MINOR)
}

fn versions(minor: u32) -> wire::InitOut {
    wire::InitOut {
        major: wire::MAJOR,
        minor,
        max_readahead: 0,
        flags: 0,
        max_background: 0,
        congestion_threshold: 0,
        max_write: 0,
        time_gran: 0,
        max_pages: 0,
        map_alignment: 0,
        flags2: 0,
        unused: [0; 7],
    }
}

/// `FUSE_COMPAT_INIT_OUT_SIZE`, `FUSE_COMPAT_22_INIT_OUT_SIZE`, and the structure of today.
fn answer_bytes(minor: u32) -> usize {
    match minor {
        0..5 => 8,
        5..23 => 24,
        _ => size_of::<wire::InitOut>(),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is meant")]
fn low(flags: u64) -> u32 {
    flags as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_granted_flag_has_one_bit_of_its_own() {
        let all = GRANTED.iter().fold(0u64, |seen, (flag, reason)| {
            assert_eq!(flag.count_ones(), 1, "{reason}");
            assert_eq!(seen & flag, 0, "{reason}");
            seen | flag
        });
        let forbidden = (1 << 12) | (1 << 16) | (1 << 20) | (1 << 31);
        assert_eq!(all & forbidden, 0);
    }
}
