//! Stretches of gzip files, decoded from a context on (format, section 7).
//!
//! A context may begin in the middle of a byte, and flate2 begins at whole bytes only. So what it is given first are
//! empty deflate blocks, of as many bits as it takes to fill the lower part of that byte: no output, no unsafe code, and
//! the decoder meets the first block of the context where it really begins.

use flate2::Decompress;
use flate2::FlushDecompress;
use flate2::Status;

use super::CodecError;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::ZranContext;

const MALFORMED: CodecError = CodecError::Malformed(Compressor::Gzip);

/// CRC and length behind the deflate stream of a gzip member.
const TRAILER_BYTES: usize = 8;

/// A context, decoded as far as somebody needs it. Its stored bytes are given with each step: those of the whole
/// context, always the same.
pub struct Inflation {
    state: Decompress,
    /// Stored bytes that were taken.
    taken: usize,
    /// Where one member ended, and the next one begins.
    is_between: bool,
    plain: Vec<u8>,
    plain_bytes: usize,
}

impl std::fmt::Debug for Inflation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflation").field("decoded", &self.plain.len()).field("of", &self.plain_bytes).finish()
    }
}

impl Inflation {
    /// Begins at `context`; nothing is decoded yet.
    ///
    /// # Errors
    /// [`CodecError::Malformed`]: a dictionary or a part of a byte that cannot be.
    pub fn new(context: &ZranContext) -> Result<Self, CodecError> {
        let mut state = Decompress::new(false);
        if !context.dictionary.is_empty() {
            state.set_dictionary(&context.dictionary).map_err(|_| MALFORMED)?;
        }
        let (byte, bits) = context.prime;
        if bits > 0 {
            let prefix = Prefix::before(byte, bits).ok_or(MALFORMED)?;
            let status = state.decompress(prefix.bytes(), &mut [0], FlushDecompress::None);
            // Nothing may come out, and everything must go in.
            let is_taken = state.total_in() == prefix.len as u64 && state.total_out() == 0;
            if !is_taken || !matches!(status, Ok(Status::Ok | Status::BufError)) {
                return Err(MALFORMED);
            }
        }
        let plain_bytes = context.plain_bytes as usize;
        Ok(Self { state, taken: 0, is_between: false, plain: Vec::new(), plain_bytes })
    }

    /// What is decoded so far.
    pub fn plain(&self) -> &[u8] {
        &self.plain
    }

    /// Bytes of the whole context.
    pub fn plain_bytes(&self) -> usize {
        self.plain_bytes
    }

    /// Whether all of it is decoded.
    pub fn is_complete(&self) -> bool {
        self.plain.len() == self.plain_bytes
    }

    /// Decodes until at least `until` bytes are out.
    ///
    /// # Errors
    /// [`CodecError::Length`] where the context does not have them, [`CodecError::Malformed`]. What is out stays.
    pub fn advance(&mut self, stored: &[u8], until: usize) -> Result<(), CodecError> {
        if until > self.plain_bytes {
            return Err(CodecError::Length { expected: until, actual: self.plain_bytes });
        }
        let mut filled = self.plain.len();
        if until <= filled {
            return Ok(());
        }
        self.plain.reserve_exact(self.plain_bytes - filled);
        self.plain.resize(until, 0);
        let outcome = self.fill(stored, &mut filled, until);
        self.plain.truncate(filled);
        outcome
    }

    fn fill(&mut self, stored: &[u8], filled: &mut usize, until: usize) -> Result<(), CodecError> {
        while *filled < until {
            let rest = stored.get(self.taken..).unwrap_or_default();
            if self.is_between {
                self.taken += next_member(rest).ok_or(MALFORMED)?;
                self.is_between = false;
                self.state.reset(false);
                continue;
            }
            let before = (self.state.total_in(), self.state.total_out());
            let status = self.state.decompress(rest, &mut self.plain[*filled..until], FlushDecompress::None);
            let (went_in, came_out) = (self.state.total_in() - before.0, self.state.total_out() - before.1);
            // Both are at most the lengths of the two slices.
            self.taken += went_in as usize;
            *filled += came_out as usize;
            match status.map_err(|_| MALFORMED)? {
                Status::StreamEnd => self.is_between = true,
                // Cut short: the rest is not in the context.
                Status::Ok | Status::BufError if went_in == 0 && came_out == 0 => return Err(MALFORMED),
                Status::Ok | Status::BufError => {}
            }
        }
        Ok(())
    }
}

/// Bytes up to the deflate stream of the next gzip member: the trailer of the one before, and a header.
fn next_member(bytes: &[u8]) -> Option<usize> {
    const HAS_CRC: u8 = 2;
    const HAS_EXTRA: u8 = 4;
    const HAS_NAME: u8 = 8;
    const HAS_COMMENT: u8 = 16;
    let (_, rest) = bytes.split_at_checked(TRAILER_BYTES)?;
    let (fixed, mut rest) = rest.split_at_checked(10)?;
    let &[0x1f, 0x8b, 8, flags, ..] = fixed else { return None };
    if flags & HAS_EXTRA != 0 {
        let (len, behind) = rest.split_first_chunk()?;
        rest = behind.get(usize::from(u16::from_le_bytes(*len))..)?;
    }
    for text in [HAS_NAME, HAS_COMMENT] {
        if flags & text != 0 {
            let end = rest.iter().position(|byte| *byte == 0)?;
            rest = rest.get(end + 1..)?;
        }
    }
    if flags & HAS_CRC != 0 {
        rest = rest.get(2..)?;
    }
    Some(bytes.len() - rest.len())
}

/// Empty deflate blocks that end inside a byte, and the byte with the upper bits that the stream has in it.
struct Prefix {
    bits: [u8; 16],
    len: usize,
}

impl Prefix {
    /// `None` for a number of bits that is not 1 to 7.
    fn before(byte: u8, bits: u8) -> Option<Self> {
        let below = 8u32.checked_sub(bits.into()).filter(|below| (1..8).contains(below))?;
        let mut blocks = Bits::default();
        if below % 2 == 1 {
            blocks.push_dynamic();
        }
        while blocks.len % 8 != below {
            blocks.push_fixed();
        }
        // `below` bits of the last byte are taken; the others are the stream's.
        let last = u128::from(byte >> below);
        blocks.push(last, bits.into());
        let len = (blocks.len / 8) as usize;
        Some(Self { bits: blocks.bits.to_le_bytes(), len })
    }

    fn bytes(&self) -> &[u8] {
        &self.bits[..self.len]
    }
}

/// Bits as deflate has them: the first one lowest.
#[derive(Default)]
struct Bits {
    bits: u128,
    len: u32,
}

impl Bits {
    fn push(&mut self, value: u128, bits: u32) {
        self.bits |= value << self.len;
        self.len += bits;
    }

    /// A block with fixed codes and no data: 10 bits, so the place in the byte moves on by two.
    fn push_fixed(&mut self) {
        self.push(0, 1); // not the last block
        self.push(1, 2); // fixed codes
        self.push(0, 7); // end of block
    }

    /// A block with codes of its own and no data: 93 bits, an odd number.
    fn push_dynamic(&mut self) {
        /// Code lengths are given in the order 16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15.
        const LENGTHS: u32 = 19;
        const PLACE_OF_18: u32 = 2;
        const PLACE_OF_1: u32 = 17;
        self.push(0, 1); // not the last block
        self.push(2, 2); // codes of its own
        self.push(0, 5); // 257 literal codes
        self.push(0, 5); // one distance code
        self.push(u128::from(LENGTHS - 4), 4);
        for place in 0..LENGTHS {
            self.push(u128::from(place == PLACE_OF_18 || place == PLACE_OF_1), 3);
        }
        // So "1" is written as 0, and "18" (that many zeros) as 1.
        for zeros in [138, 118] {
            self.push(1, 1);
            self.push(zeros - 11, 7);
        }
        self.push(0, 1); // the end of block has a code of one bit,
        self.push(0, 1); // and so has the distance
        self.push(0, 1); // end of block
    }
}

#[cfg(test)]
#[cfg(feature = "testing")]
mod tests;
