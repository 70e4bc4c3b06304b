//! Holes: runs of chunks whose digest is that of zeros.

use std::sync::Mutex;
use std::sync::PoisonError;

use sha2::Digest as _;

use super::facts::Digest;
use super::facts::Digester;
use crate::limits;

/// What [`super::image::Image::seek`] looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whence {
    /// `SEEK_DATA`.
    Data,
    /// `SEEK_HOLE`.
    Hole,
}

/// Digests of zeros of the lengths that were asked for lately, most recent first. The lock is never held while hashing.
#[derive(Debug)]
pub(super) struct ZeroDigests {
    known: Mutex<Vec<(Digester, u64, Digest)>>,
}

impl ZeroDigests {
    pub(super) fn new() -> Self {
        Self { known: Mutex::new(Vec::new()) }
    }

    /// The digest of `len` zeros; `len` is at most a chunk.
    pub(super) fn digest(&self, digester: Digester, len: u64) -> Digest {
        {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(position) = known.iter().position(|row| row.0 == digester && row.1 == len)
                && let Some(row) = known.get_mut(..=position)
            {
                row.rotate_right(1);
                if let Some(first) = row.first() {
                    return first.2;
                }
            }
        }
        let digest = digest_of_zeros(digester, len);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.truncate(limits::ZERO_DIGESTS.saturating_sub(1));
        known.insert(0, (digester, len, digest));
        digest
    }
}

fn digest_of_zeros(digester: Digester, len: u64) -> Digest {
    const ZEROS: [u8; 4096] = [0; 4096];
    let parts = (0..len).step_by(ZEROS.len()).filter_map(|start| {
        let rest = usize::try_from(len.saturating_sub(start)).unwrap_or(usize::MAX);
        ZEROS.get(..rest.min(ZEROS.len()))
    });
    match digester {
        Digester::Blake3 => {
            let mut hasher = blake3::Hasher::new();
            parts.for_each(|part| {
                hasher.update(part);
            });
            *hasher.finalize().as_bytes()
        }
        Digester::Sha256 => {
            let mut hasher = sha2::Sha256::new();
            parts.for_each(|part| hasher.update(part));
            hasher.finalize().into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_zeros_equals_that_of_a_buffer_of_zeros() {
        let zeros = ZeroDigests::new();
        for len in [0u64, 1, 4095, 4096, 4097, 1 << 20, 1] {
            let buffer = vec![0u8; len as usize];
            assert_eq!(zeros.digest(Digester::Blake3, len), *blake3::hash(&buffer).as_bytes());
            assert_eq!(zeros.digest(Digester::Sha256, len), <[u8; 32]>::from(sha2::Sha256::digest(&buffer)));
        }
        assert_eq!(zeros.known.lock().unwrap().len(), 12);
    }

    #[test]
    fn digests_remembered_stay_bounded() {
        let zeros = ZeroDigests::new();
        for len in 0..1000 {
            zeros.digest(Digester::Blake3, len);
        }
        let known = zeros.known.lock().unwrap();
        assert_eq!(known.len(), limits::ZERO_DIGESTS);
        assert_eq!(known[0].1, 999);
    }
}
