//! Several chunks that are stored as one piece: batches, and contexts of gzip files.
//!
//! A [`Unit`] keeps what was decoded, so that each of its chunks costs a copy at most. A batch is decoded whole. A
//! context is decoded as far as the chunk that is asked for, and goes on from there with the next one.

use super::CodecError;
use super::Form;
use super::Sealing;
use super::decode_form;
use super::inflate::Inflation;
use super::open_piece;
use super::verify;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::ZranContext;

/// What a decoder holds beside its output: its window and its tables.
const DECODER_BYTES: usize = 64 << 10;

/// The decoded bytes of a unit, as far as somebody needed them.
#[derive(Debug)]
pub enum Unit {
    /// A batch.
    Batch(Vec<u8>),
    /// A context.
    Context(Inflation),
}

impl Unit {
    /// Decodes a batch of `plain_bytes`.
    ///
    /// # Errors
    /// As [`super::decode`].
    pub fn batch(
        compressor: Compressor,
        sealing: Option<&Sealing>,
        stored: &[u8],
        plain_bytes: u32,
    ) -> Result<Self, CodecError> {
        let mut scratch = Vec::new();
        let opened = open_piece(sealing, stored, &mut scratch)?;
        let mut plain = vec![0; plain_bytes as usize];
        decode_form(compressor, Form::ByLength, opened, sealing, &mut plain)?;
        Ok(Self::Batch(plain))
    }

    /// Begins at a context.
    ///
    /// # Errors
    /// As [`Inflation::new`].
    pub fn context(context: &ZranContext) -> Result<Self, CodecError> {
        Inflation::new(context).map(Self::Context)
    }

    /// Whether all of it is decoded, so that its stored bytes are not needed any more.
    pub fn is_complete(&self) -> bool {
        match self {
            Self::Batch(_) => true,
            Self::Context(inflation) => inflation.is_complete(),
        }
    }

    /// Bytes of memory that it takes when all of it is decoded.
    pub fn room_bytes(&self) -> usize {
        match self {
            Self::Batch(plain) => plain.len(),
            Self::Context(inflation) => inflation.plain_bytes().saturating_add(DECODER_BYTES),
        }
    }

    /// The plain bytes of a chunk of `blob` that lies in the unit, verified. `stored` as for [`Unit::bytes`].
    ///
    /// # Errors
    /// As [`Unit::bytes`]; [`CodecError::Digest`], [`CodecError::Crc`].
    pub fn chunk(&mut self, blob: &BlobFacts, facts: &ChunkFacts, stored: &[u8]) -> Result<&[u8], CodecError> {
        let plain = self.bytes(stored, facts.offset_in_unit(), facts.uncompressed_bytes)?;
        verify(blob.digester, facts.digest, facts.crc32c, plain)?;
        Ok(plain)
    }

    /// `len` plain bytes from `offset`. `stored` is the whole stored unit, the same with every call.
    ///
    /// # Errors
    /// [`CodecError::Length`] where the unit does not have them; what the decoder says.
    pub fn bytes(&mut self, stored: &[u8], offset: u32, len: u32) -> Result<&[u8], CodecError> {
        let (offset, len) = (offset as usize, len as usize);
        let end = offset.saturating_add(len);
        let plain = match self {
            Self::Batch(plain) => plain,
            Self::Context(inflation) => {
                inflation.advance(stored, end)?;
                inflation.plain()
            }
        };
        plain.get(offset..end).ok_or(CodecError::Length { expected: end, actual: plain.len() })
    }
}
