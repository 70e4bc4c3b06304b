//! Chunk tables: from the form in which a blob has them to that of their cache files (format, sections 6.1 and 11).

use super::CodecError;
use super::Form;
use super::Sealing;
use super::decode_form;
use super::open_piece;
use crate::rafs::facts::Compressor;
use crate::rafs::facts::MetaLocation;
use crate::rafs::meta::META_HEADER_BYTES;

/// Decodes `stored`, the bytes of [`crate::rafs::meta::stored_range`], into a file of `cache_bytes`
/// ([`crate::rafs::meta::cache_bytes`]). The array and its header are encrypted each by itself. Nothing is checked but
/// lengths.
///
/// # Errors
/// As [`super::decode`].
pub fn decode(
    location: &MetaLocation,
    sealing: Option<&Sealing>,
    stored: &[u8],
    cache_bytes: u64,
) -> Result<Vec<u8>, CodecError> {
    // Both sizes were checked against the largest table.
    let (array_bytes, plain_bytes) = (location.compressed_bytes as usize, location.uncompressed_bytes as usize);
    let cut = CodecError::Length { expected: array_bytes, actual: stored.len() };
    let (array, header) = stored.split_at_checked(array_bytes).ok_or(cut)?;
    let mut content = vec![0; cache_bytes as usize];
    let mut scratch = Vec::new();
    let form = if location.compressor == Compressor::None { Form::Plain } else { Form::Compressed };
    let array = open_piece(sealing, array, &mut scratch)?;
    let short = CodecError::Length { expected: plain_bytes, actual: content.len() };
    decode_form(location.compressor, form, array, sealing, content.get_mut(..plain_bytes).ok_or(short)?)?;
    let header = open_piece(sealing, header, &mut scratch)?;
    let wrong = CodecError::Length { expected: META_HEADER_BYTES as usize, actual: header.len() };
    let header: &[u8; META_HEADER_BYTES as usize] = header.try_into().map_err(|_| wrong)?;
    *content.last_chunk_mut().ok_or(wrong)? = *header;
    Ok(content)
}
