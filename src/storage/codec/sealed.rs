//! Encrypted pieces of a blob (format, section 8): chunks, batches, the chunk table and its header.

use super::CodecError;
use super::xts::Xts;
use crate::rafs::facts::Cipher;
use crate::rafs::facts::PADDED_BYTES;

const PADDING_END: [u8; 2] = [0x78, 0x90];

/// The key and the tweak of one blob, ready for use.
#[derive(Debug, Clone)]
pub struct Sealing {
    xts: Xts,
    iv: [u8; 16],
}

impl Sealing {
    /// Expands the key of `cipher`.
    pub fn new(cipher: &Cipher) -> Self {
        Self { xts: Xts::new(&cipher.key), iv: cipher.iv }
    }

    /// Decrypts a stored piece in place.
    ///
    /// # Errors
    /// [`CodecError::Unit`]: fewer than 16 bytes.
    pub fn open(&self, piece: &mut [u8]) -> Result<(), CodecError> {
        self.xts.decrypt(&self.iv, piece)
    }
}

/// The bytes of a decrypted piece without its padding, where it looks padded. It need not be: 18 bytes of data may look
/// like this as well, so whoever knows a length compares that first.
pub fn without_padding(piece: &[u8]) -> Option<&[u8]> {
    let (front, end) = piece.split_last_chunk()?;
    let fill = *front.last()?;
    let is_padded = piece.len() == PADDED_BYTES as usize && *end == PADDING_END && (1..16).contains(&fill);
    is_padded.then(|| front.get(..16 - usize::from(fill)))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_seen_only_where_it_can_be() {
        let padded = |plain: &[u8]| {
            let mut piece = plain.to_vec();
            piece.resize(16, 16 - plain.len() as u8);
            piece.extend(PADDING_END);
            piece
        };
        for len in 1..16usize {
            let plain: Vec<u8> = (100..100 + len as u8).collect();
            assert_eq!(without_padding(&padded(&plain)), Some(&plain[..]));
        }
        let mut long = padded(b"abc");
        long.push(0);
        let mut no_fill = padded(b"abc");
        no_fill[15] = 16;
        for piece in [&b""[..], b"x", b"\x78\x90", &[0x90; 18], &long, &no_fill] {
            assert_eq!(without_padding(piece), None);
        }
    }

    #[test]
    fn piece_is_decrypted_with_the_tweak_of_its_blob() {
        // Format, section 18.
        let key = "0fa72937ff4e1d5b924a322a955e37fc6fd9e405a15e797d111d551e50998deb";
        let cipher = Cipher {
            key: hex::decode(key).unwrap().try_into().unwrap(),
            iv: hex::decode("50713ff4ce32c7ece3087c4ed946597e").unwrap().try_into().unwrap(),
        };
        let mut piece = hex::decode("665a862e6fa4c7fc50f9ca028d2bae9c725d").unwrap();
        Sealing::new(&cipher).open(&mut piece).unwrap();
        assert_eq!(without_padding(&piece), Some(&b"ids"[..]));
        assert_eq!(Sealing::new(&cipher).open(&mut [0; 15]), Err(CodecError::Unit(15)));
    }
}
