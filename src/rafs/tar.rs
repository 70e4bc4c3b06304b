//! Tar headers: those behind the sections of a blob (format, section 9.1), and those of OCI layers.

use super::RafsError;

/// Bytes of a header, and the unit of a tar.
pub(super) const HEADER_BYTES: u64 = 512;

const SIZE: std::ops::Range<usize> = 124..136;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const TYPE: usize = 156;
const MAGIC: std::ops::Range<usize> = 257..262;

/// What a header says of its data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) name: Vec<u8>,
    pub(super) bytes: u64,
    pub(super) is_file: bool,
}

/// Reads a header; `None` for a block that is none.
pub(super) fn parse(header: &[u8; HEADER_BYTES as usize]) -> Option<Member> {
    if header.get(MAGIC)? != b"ustar" || octal(header.get(CHECKSUM)?)? != checksum(header) {
        return None;
    }
    let name = header.get(..100)?.split(|&byte| byte == 0).next()?.to_vec();
    Some(Member { name, bytes: octal(header.get(SIZE)?)?, is_file: matches!(header.get(TYPE)?, b'0' | 0) })
}

/// The sum of all bytes, with those of the checksum itself taken as blanks.
fn checksum(header: &[u8; HEADER_BYTES as usize]) -> u64 {
    header.iter().enumerate().fold(0u64, |sum, (at, &byte)| {
        sum.saturating_add(if CHECKSUM.contains(&at) { b' '.into() } else { byte.into() })
    })
}

/// An octal number, with blanks before it, ended by a blank, NUL or the field's end.
fn octal(field: &[u8]) -> Option<u64> {
    let digits = field.trim_ascii_start().split(|byte| matches!(byte, b' ' | 0)).next()?;
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, &digit| {
        let digit = digit.checked_sub(b'0').filter(|&digit| digit < 8)?;
        value.checked_mul(8)?.checked_add(digit.into())
    })
}

/// Makes a header as the builder writes them behind a section: for tests and the builder of test data.
#[cfg(test)]
pub(super) fn header(name: &str, bytes: u64) -> [u8; HEADER_BYTES as usize] {
    let mut header = [0u8; HEADER_BYTES as usize];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[124..135].copy_from_slice(format!("{bytes:011o}").as_bytes());
    header[TYPE] = b'0';
    header[257..265].copy_from_slice(b"ustar  \0");
    let sum = checksum(&header);
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

/// The header that ends at `end`, where there is one.
pub(super) fn before(file: &crate::sys::view::View, end: u64) -> Result<Option<Member>, RafsError> {
    match end.checked_sub(HEADER_BYTES) {
        Some(at) if end <= file.len() => Ok(parse(&file.array_at(at)?)),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_made_is_read_back_and_a_flipped_bit_is_noticed() {
        let good = header("image.boot", 0o1234);
        let expected = Member { name: b"image.boot".to_vec(), bytes: 0o1234, is_file: true };
        assert_eq!(parse(&good), Some(expected));
        for at in [0, 130, 156, 258, 300] {
            let mut bad = good;
            bad[at] ^= 1;
            assert_eq!(parse(&bad), None, "byte {at}");
        }
        assert_eq!(parse(&[0; 512]), None);
    }
}
