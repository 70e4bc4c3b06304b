//! Chunks that are stored alone: from stored bytes to plain ones that are proved right.

use super::CodecError;
use super::Form;
use super::Sealing;
use super::decode_form;
use super::open_piece;
use super::verify;
use crate::rafs::facts::BlobFacts;
use crate::rafs::facts::ChunkFacts;
use crate::rafs::facts::Coding;

/// Room for the chunk at work, reused from one to the next.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Decrypted bytes.
    pub opened: Vec<u8>,
    /// Decoded ones.
    pub plain: Vec<u8>,
}

/// Decodes and verifies a chunk of `blob`, which is `stored`.
///
/// # Errors
/// What the decoder says; [`CodecError::Digest`], [`CodecError::Crc`].
pub fn alone<'a>(
    blob: &BlobFacts,
    sealing: Option<&Sealing>,
    facts: &ChunkFacts,
    stored: &'a [u8],
    buffers: &'a mut Buffers,
) -> Result<&'a [u8], CodecError> {
    let form = if facts.coding == Coding::Plain { Form::Plain } else { Form::Compressed };
    let len = facts.uncompressed_bytes as usize;
    let plain = if form == Form::Plain && sealing.is_none() && stored.len() == len {
        stored
    } else {
        let Buffers { opened, plain } = buffers;
        if plain.len() < len {
            plain.resize(len, 0);
        }
        let plain = plain.get_mut(..len).unwrap_or_default();
        let opened = open_piece(sealing, stored, opened)?;
        decode_form(blob.compressor, form, opened, sealing, plain)?;
        plain
    };
    verify(blob.digester, facts.digest, facts.crc32c, plain)?;
    Ok(plain)
}
