//! Sections at the end of a blob, and its table of contents (format, section 9).

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::NO_TOOLS;
use super::RafsError;
use super::facts::Compressor;
use super::facts::Digest;
use super::malformed;
use super::part;
use super::tar;
use super::unknown;
use crate::limits;
use crate::sys::view::View;

/// Name of the section that is the table of contents.
const TOC: &[u8] = b"rafs.blob.toc";
/// Name of the section that is the bootstrap.
const BOOTSTRAP: &[u8] = b"image.boot";

const ENTRY_BYTES: u64 = 128;

/// A part of a file and how to get its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Where the stored bytes start in the file.
    pub offset: u64,
    /// Stored bytes, all inside the file.
    pub compressed_bytes: u64,
    /// Bytes of the content: decompressing must give exactly so many.
    pub uncompressed_bytes: u64,
    /// How it is compressed: [`Compressor::None`] or [`Compressor::Zstd`].
    pub compressor: Compressor,
    /// SHA-256 that the content must have, where it is known.
    pub sha256: Option<Digest>,
}

impl Section {
    /// A section that is stored as it is, without a digest.
    pub(super) fn plain(offset: u64, bytes: u64) -> Self {
        Self { offset, compressed_bytes: bytes, uncompressed_bytes: bytes, compressor: Compressor::None, sha256: None }
    }
}

/// An entry as stored (section 9.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    flags: U32,
    reserved: U32,
    name: [u8; 16],
    sha256: Digest,
    compressed_offset: U64,
    compressed_bytes: U64,
    uncompressed_bytes: U64,
    reserved_end: [u8; 48],
}

/// The bootstrap that is inlined in the blob `file`, a whole file; `None` when its tail shows no such section.
///
/// # Errors
/// [`RafsError::Malformed`] for a tail that is broken (section 14, rule 22); [`RafsError::Unknown`] for a bootstrap
/// compressed with lz4, which no reader accepts; a lost map.
pub fn find_bootstrap(file: &View) -> Result<Option<Section>, RafsError> {
    let Some(last) = tar::before(file, file.len())? else { return Ok(None) };
    let data_end = file.len().saturating_sub(tar::HEADER_BYTES);
    let Some(start) = data_end.checked_sub(last.bytes) else {
        return Err(malformed("tail section size", data_end, format!("{} bytes", last.bytes)));
    };
    let section = match last.name.as_slice() {
        BOOTSTRAP => Some(Section::plain(start, last.bytes)),
        TOC => find_in_toc(file, start, last.bytes)?,
        _ => None,
    };
    match section {
        Some(section) if section.uncompressed_bytes > limits::MAX_BOOTSTRAP_BYTES => {
            Err(malformed("bootstrap size", section.offset, format!("{} bytes", section.uncompressed_bytes)))
        }
        section => Ok(section),
    }
}

fn find_in_toc(file: &View, start: u64, bytes: u64) -> Result<Option<Section>, RafsError> {
    if bytes > limits::MAX_TOC_BYTES || !bytes.is_multiple_of(ENTRY_BYTES) {
        return Err(malformed("TOC size", start, format!("{bytes} bytes")));
    }
    for number in 0..bytes / ENTRY_BYTES {
        let at = start.saturating_add(number.saturating_mul(ENTRY_BYTES));
        let entry: RawEntry = file.record_at(at)?;
        let name = entry.name.split(|&byte| byte == 0).next().unwrap_or_default();
        if name != BOOTSTRAP {
            continue;
        }
        let compressor = match entry.flags.get() {
            1 => Compressor::None,
            2 => Compressor::Zstd,
            4 => return Err(unknown("TOC entry flags 4 (lz4)", "the inlined bootstrap", NO_TOOLS)),
            flags => return Err(malformed("TOC entry flags", at, format!("{flags:#x}"))),
        };
        let section = Section {
            offset: entry.compressed_offset.get(),
            compressed_bytes: entry.compressed_bytes.get(),
            uncompressed_bytes: entry.uncompressed_bytes.get(),
            compressor,
            sha256: (entry.sha256 != [0; 32]).then_some(entry.sha256),
        };
        part("TOC entry image.boot", section.offset, section.compressed_bytes, start)?;
        if compressor == Compressor::None && section.compressed_bytes != section.uncompressed_bytes {
            return Err(malformed("TOC entry sizes", at, "differ although the section is not compressed"));
        }
        return Ok(Some(section));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    fn with_toc(flags: u32, bytes: u64) -> Vec<u8> {
        let mut file = vec![7u8; 1000];
        let mut entry = RawEntry::new_zeroed();
        entry.flags = flags.into();
        entry.name[..10].copy_from_slice(BOOTSTRAP);
        entry.compressed_offset = 100.into();
        entry.compressed_bytes = bytes.into();
        entry.uncompressed_bytes = 800.into();
        file.extend_from_slice(RawEntry::new_zeroed().as_bytes());
        file.extend_from_slice(entry.as_bytes());
        file.extend_from_slice(&tar::header("rafs.blob.toc", 256));
        file
    }

    #[test]
    fn bootstrap_is_found_through_toc_or_last_header() {
        let section = find_bootstrap(&View::from_bytes(with_toc(2, 300))).unwrap().unwrap();
        let expected = Section {
            offset: 100,
            compressed_bytes: 300,
            uncompressed_bytes: 800,
            compressor: Compressor::Zstd,
            sha256: None,
        };
        assert_eq!(section, expected);

        let mut file = vec![7u8; 1000];
        file.extend_from_slice(&tar::header("image.boot", 900));
        assert_eq!(find_bootstrap(&View::from_bytes(file)).unwrap(), Some(Section::plain(100, 900)));
    }

    #[test]
    fn file_without_tail_has_no_bootstrap() {
        for len in [0, 511, 512, 5000] {
            assert_eq!(find_bootstrap(&View::from_bytes(vec![0; len])).unwrap(), None);
        }
        let mut file = vec![7u8; 1000];
        file.extend_from_slice(&tar::header("blob.meta", 900));
        assert_eq!(find_bootstrap(&View::from_bytes(file)).unwrap(), None);
    }

    #[test]
    fn broken_tails_are_refused() {
        for (flags, bytes) in [(0, 300), (3, 300), (2, 901), (2, u64::MAX), (1, 300)] {
            let outcome = find_bootstrap(&View::from_bytes(with_toc(flags, bytes)));
            assert!(matches!(outcome, Err(RafsError::Malformed { .. })), "{flags} {bytes}: {outcome:?}");
        }
        let outcome = find_bootstrap(&View::from_bytes(with_toc(4, 300)));
        assert!(matches!(outcome, Err(RafsError::Unknown { .. })), "{outcome:?}");
        for (name, bytes) in [("image.boot", 1001), ("rafs.blob.toc", 127), ("rafs.blob.toc", 1 << 30)] {
            let mut file = vec![7u8; 1000];
            file.extend_from_slice(&tar::header(name, bytes));
            assert!(find_bootstrap(&View::from_bytes(file)).is_err(), "{name} {bytes}");
        }
    }
}
