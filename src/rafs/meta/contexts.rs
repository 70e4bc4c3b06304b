//! Contexts behind the entries of the chunk information array: batches (format, section 6.5), and places where decoding
//! of a gzip file can begin (section 7).

use std::ops::Range;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::limits;
use crate::rafs::RafsError;
use crate::rafs::facts::ZranContext;
use crate::rafs::malformed;
use crate::sys::view::View;

/// Bytes of a context of either kind.
const CONTEXT_BYTES: u64 = 40;

/// Most upper bits of the byte before a stretch that can belong to it.
const MAX_PRIME_BITS: u8 = 7;

/// A batch as stored.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBatch {
    stored_bytes: U32,
    plain_bytes: U32,
    reserved: [u8; 32],
}

/// A place in a gzip file as stored.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawStretch {
    stored_at: U64,
    plain_at: U64,
    dictionary_at: U64,
    stored_bytes: U32,
    plain_bytes: U32,
    dictionary_bytes: U32,
    byte: u8,
    bits: u8,
    reserved: [u8; 2],
}

const _: () = assert!(size_of::<RawBatch>() as u64 == CONTEXT_BYTES && size_of::<RawStretch>() as u64 == CONTEXT_BYTES);

/// A batch: both sizes are from 1 byte to the largest chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch {
    pub(super) stored_bytes: u32,
    pub(super) plain_bytes: u32,
}

/// A stretch of a gzip file, checked.
#[derive(Debug, Clone)]
pub(super) struct Stretch {
    /// Offset and bytes in the gzip file.
    pub(super) stored: (u64, u32),
    /// Bytes it decodes to, at most those of the largest chunk.
    pub(super) plain_bytes: u32,
    prime: (u8, u8),
    /// Where its dictionary is in the decoded array.
    dictionary: Range<u64>,
}

/// Where the contexts are in the decoded array, and how many. The bytes may change under us, these numbers do not.
#[derive(Debug, Clone)]
pub(super) struct Contexts {
    array: Range<u64>,
    count: u32,
    /// What follows the array: the dictionaries.
    dictionaries: Range<u64>,
}

impl Contexts {
    /// Those of a blob without any.
    pub(super) fn none() -> Self {
        Self { array: 0..0, count: 0, dictionaries: 0..0 }
    }

    /// `count` contexts, and their dictionaries, in the part `place` of the decoded array.
    pub(super) fn new(place: Range<u64>, count: u32) -> Result<Self, RafsError> {
        let end = place.start.saturating_add(CONTEXT_BYTES.saturating_mul(count.into()));
        if end > place.end {
            let reason = format!("{count} in {} bytes", place.end.saturating_sub(place.start));
            return Err(malformed("blob meta header contexts", 56, reason));
        }
        Ok(Self { array: place.start..end, count, dictionaries: end..place.end })
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    fn offset_of(&self, context: u32) -> Result<u64, RafsError> {
        if context >= self.count {
            return Err(malformed("CI context index", 0, format!("{context} of {} contexts", self.count)));
        }
        Ok(self.array.start.saturating_add(CONTEXT_BYTES.saturating_mul(context.into())))
    }

    /// The batch with the number `context`.
    pub(super) fn batch(&self, view: &View, context: u32) -> Result<Batch, RafsError> {
        let at = self.offset_of(context)?;
        let raw: RawBatch = view.record_at(at)?;
        let batch = Batch { stored_bytes: raw.stored_bytes.get(), plain_bytes: raw.plain_bytes.get() };
        let is_possible = |bytes| (1..=limits::MAX_CHUNK_BYTES).contains(&bytes);
        if is_possible(batch.stored_bytes) && is_possible(batch.plain_bytes) {
            return Ok(batch);
        }
        let reason = format!("{} bytes stored, {} plain", batch.stored_bytes, batch.plain_bytes);
        Err(malformed("batch context sizes", at, reason))
    }

    /// The stretch with the number `context` of a gzip file of `file_bytes`.
    pub(super) fn stretch(&self, view: &View, context: u32, file_bytes: u64) -> Result<Stretch, RafsError> {
        let at = self.offset_of(context)?;
        let raw: RawStretch = view.record_at(at)?;
        let (stored_at, stored_bytes) = (raw.stored_at.get(), raw.stored_bytes.get());
        let is_possible = |bytes| (1..=limits::MAX_CHUNK_BYTES).contains(&bytes);
        if !is_possible(stored_bytes) || !is_possible(raw.plain_bytes.get()) {
            let reason = format!("{stored_bytes} bytes stored, {} plain", raw.plain_bytes);
            return Err(malformed("ZRan context sizes", at, reason));
        }
        if stored_at.checked_add(stored_bytes.into()).is_none_or(|end| end > file_bytes) {
            let reason = format!("{stored_bytes} bytes at {stored_at:#x}, blob data ends at {file_bytes}");
            return Err(malformed("ZRan context offset", at, reason));
        }
        if raw.bits > MAX_PRIME_BITS {
            return Err(malformed("ZRan context bits", at, format!("{} of one byte", raw.bits)));
        }
        if raw.dictionary_bytes.get() > limits::MAX_ZRAN_DICTIONARY_BYTES {
            return Err(malformed("ZRan dictionary size", at, format!("{} bytes", raw.dictionary_bytes)));
        }
        let start = self.dictionaries.start.checked_add(raw.dictionary_at.get());
        let end = start.and_then(|start| start.checked_add(raw.dictionary_bytes.get().into()));
        let dictionary = match (start, end) {
            // One without bytes may be anywhere.
            _ if raw.dictionary_bytes.get() == 0 => self.dictionaries.start..self.dictionaries.start,
            (Some(start), Some(end)) if end <= self.dictionaries.end => start..end,
            _ => {
                let reason = format!("{} bytes at {:#x}", raw.dictionary_bytes, raw.dictionary_at);
                return Err(malformed("ZRan dictionary offset", at, reason));
            }
        };
        Ok(Stretch {
            stored: (stored_at, stored_bytes),
            plain_bytes: raw.plain_bytes.get(),
            prime: (raw.byte, raw.bits),
            dictionary,
        })
    }

    /// All there is to the stretch with the number `context`.
    pub(super) fn zran(&self, view: &View, context: u32, file_bytes: u64) -> Result<ZranContext, RafsError> {
        let stretch = self.stretch(view, context, file_bytes)?;
        let (at, bytes) = stretch.stored;
        let dictionary = stretch.dictionary;
        Ok(ZranContext {
            // It lies in the file, so this does not overflow.
            stored: at..at.saturating_add(bytes.into()),
            plain_bytes: stretch.plain_bytes,
            prime: stretch.prime,
            dictionary: view.vec_at(dictionary.start, dictionary.end.saturating_sub(dictionary.start))?,
        })
    }

    /// Checks every stretch of a gzip file of `file_bytes`, those that no chunk uses too.
    pub(super) fn check_zran(&self, view: &View, file_bytes: u64) -> Result<(), RafsError> {
        (0..self.count).try_for_each(|context| self.stretch(view, context, file_bytes).map(drop))
    }
}
