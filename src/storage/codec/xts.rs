//! AES-128-XTS (IEEE 1619), over whole data units of any length from 16 bytes on.
//!
//! The loop is ours and the block cipher is the `aes` crate's: it takes many blocks at once, which is what the AES
//! instructions of a processor need to be fast.

use aes::Aes128;
use aes::Block;
use aes::cipher::BlockCipherDecrypt;
use aes::cipher::BlockCipherEncrypt;
use aes::cipher::KeyInit;

use super::CodecError;

const BLOCK_BYTES: usize = 16;

/// Blocks that are worked on at once: enough for every width of the processors' pipelines.
const LANES: usize = 64;

/// A key, expanded.
#[derive(Clone)]
pub struct Xts {
    data: Aes128,
    tweak: Aes128,
}

impl std::fmt::Debug for Xts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Xts(..)")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Encrypt,
    Decrypt,
}

impl Xts {
    /// Expands `key`: the key of the data, then that of the tweak.
    pub fn new(key: &[u8; 32]) -> Self {
        let (data, tweak) = key.split_at(BLOCK_BYTES);
        let expand = |half: &[u8]| Aes128::new_from_slice(half).expect("half of 32 bytes is a key of AES-128");
        Self { data: expand(data), tweak: expand(tweak) }
    }

    /// Encrypts one data unit in place.
    ///
    /// # Errors
    /// [`CodecError::Unit`]: fewer than 16 bytes.
    pub fn encrypt(&self, iv: &[u8; 16], unit: &mut [u8]) -> Result<(), CodecError> {
        self.convert(Direction::Encrypt, iv, unit)
    }

    /// Decrypts one data unit in place.
    ///
    /// # Errors
    /// [`CodecError::Unit`]: fewer than 16 bytes.
    pub fn decrypt(&self, iv: &[u8; 16], unit: &mut [u8]) -> Result<(), CodecError> {
        self.convert(Direction::Decrypt, iv, unit)
    }

    fn convert(&self, direction: Direction, iv: &[u8; 16], unit: &mut [u8]) -> Result<(), CodecError> {
        let len = unit.len();
        if len < BLOCK_BYTES {
            return Err(CodecError::Unit(len));
        }
        let mut first = Block::from(*iv);
        self.tweak.encrypt_block(&mut first);
        let mut tweak = u128::from_le_bytes(first.into());
        let tail = len % BLOCK_BYTES;
        // Where bytes are left over, the last whole block takes part in the stealing.
        let whole = if tail == 0 { len } else { len - tail - BLOCK_BYTES };
        let (front, stolen) = unit.split_at_mut(whole);
        for run in front.chunks_mut(LANES * BLOCK_BYTES) {
            self.convert_run(direction, &mut tweak, run);
        }
        if let Some((last, rest)) = stolen.split_at_mut_checked(BLOCK_BYTES) {
            // Decrypting takes the two tweaks in the other order.
            let next = double(tweak);
            let (one, two) = if direction == Direction::Encrypt { (tweak, next) } else { (next, tweak) };
            let mut block = [0; BLOCK_BYTES];
            block.copy_from_slice(last);
            let stealing = self.convert_block(direction, one, block);
            block = stealing;
            block[..tail].copy_from_slice(rest);
            rest.copy_from_slice(&stealing[..tail]);
            last.copy_from_slice(&self.convert_block(direction, two, block));
        }
        Ok(())
    }

    /// Whole blocks, at most [`LANES`].
    fn convert_run(&self, direction: Direction, tweak: &mut u128, run: &mut [u8]) {
        let mut blocks = [Block::default(); LANES];
        let mut tweaks = [0u128; LANES];
        let (chunks, _) = run.as_chunks_mut::<BLOCK_BYTES>();
        let count = chunks.len();
        for ((block, mask), bytes) in blocks.iter_mut().zip(&mut tweaks).zip(chunks.iter()) {
            *mask = *tweak;
            *tweak = double(*tweak);
            *block = Block::from((u128::from_le_bytes(*bytes) ^ *mask).to_le_bytes());
        }
        self.convert_blocks(direction, &mut blocks[..count]);
        for ((block, mask), bytes) in blocks.iter().zip(&tweaks).zip(chunks) {
            *bytes = (u128::from_le_bytes((*block).into()) ^ *mask).to_le_bytes();
        }
    }

    fn convert_block(&self, direction: Direction, tweak: u128, bytes: [u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
        let mut block = [Block::from((u128::from_le_bytes(bytes) ^ tweak).to_le_bytes())];
        self.convert_blocks(direction, &mut block);
        (u128::from_le_bytes(block[0].into()) ^ tweak).to_le_bytes()
    }

    fn convert_blocks(&self, direction: Direction, blocks: &mut [Block]) {
        match direction {
            Direction::Encrypt => self.data.encrypt_blocks(blocks),
            Direction::Decrypt => self.data.decrypt_blocks(blocks),
        }
    }
}

/// The tweak of the next block: multiplied by x in GF(2^128).
fn double(tweak: u128) -> u128 {
    let carry = tweak >> 127;
    (tweak << 1) ^ (carry * 0x87)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes<const N: usize>(text: &str) -> [u8; N] {
        hex::decode(text).unwrap().try_into().unwrap()
    }

    #[track_caller]
    fn check(key: [u8; 32], iv: [u8; 16], plain: &[u8], stored: &[u8]) {
        let xts = Xts::new(&key);
        let mut unit = plain.to_vec();
        xts.encrypt(&iv, &mut unit).unwrap();
        assert_eq!(hex::encode(&unit), hex::encode(stored));
        xts.decrypt(&iv, &mut unit).unwrap();
        assert_eq!(unit, plain);
    }

    #[test]
    fn vectors_of_ieee_1619_are_met() {
        // Vector 2.
        let key = bytes("1111111111111111111111111111111122222222222222222222222222222222");
        let iv = bytes("33333333330000000000000000000000");
        let stored = "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0";
        check(key, iv, &[0x44; 32], &hex::decode(stored).unwrap());
        // Vectors 15 to 18: ciphertext stealing.
        let key = bytes("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0bfbebdbcbbbab9b8b7b6b5b4b3b2b1b0");
        let iv = bytes("9a785634120000000000000000000000");
        let plain: Vec<u8> = (0..20).collect();
        for (len, stored) in [
            (17, "6c1625db4671522d3d7599601de7ca09ed"),
            (18, "d069444b7a7e0cab09e24447d24deb1fedbf"),
            (19, "e5df1351c0544ba1350b3363cd8ef4beedbf9d"),
            (20, "9d84c813f719aa2c7be3f66171c7c5c2edbf9dac"),
        ] {
            check(key, iv, &plain[..len], &hex::decode(stored).unwrap());
        }
    }

    #[test]
    fn pieces_of_a_real_image_are_decrypted() {
        // Format, section 18.
        let key = bytes("0fa72937ff4e1d5b924a322a955e37fc6fd9e405a15e797d111d551e50998deb");
        let iv = bytes("50713ff4ce32c7ece3087c4ed946597e");
        for (plain, stored) in [
            ("660f0f0f0f0f0f0f0f0f0f0f0f0f0f0f7890", "af1ce3d459a1f4fd391427739613967ba3d5"),
            ("6964730d0d0d0d0d0d0d0d0d0d0d0d0d7890", "665a862e6fa4c7fc50f9ca028d2bae9c725d"),
        ] {
            check(key, iv, &hex::decode(plain).unwrap(), &hex::decode(stored).unwrap());
        }
    }

    #[test]
    fn unit_that_is_shorter_than_a_block_is_refused() {
        for len in [0, 1, 15] {
            let mut unit = vec![7; len];
            assert_eq!(Xts::new(&[1; 32]).decrypt(&[2; 16], &mut unit), Err(CodecError::Unit(len)));
            assert_eq!(unit, vec![7; len], "and left alone");
        }
    }

    proptest! {
        /// Against the standard's own words, block by block.
        #[test]
        fn every_length_agrees_with_the_definition(
            key in any::<[u8; 32]>(), iv in any::<[u8; 16]>(), blocks in 1usize..140, tail in 0usize..16,
        ) {
            let plain: Vec<u8> = (0..blocks * 16 + tail).map(|at| ((at * at) >> 3) as u8).collect();
            let xts = Xts::new(&key);
            let mut unit = plain.clone();
            xts.encrypt(&iv, &mut unit).unwrap();
            let mut expected = plain.clone();
            let mut tweak = {
                let mut block = Block::from(iv);
                xts.tweak.encrypt_block(&mut block);
                u128::from_le_bytes(block.into())
            };
            let one = |bytes: &[u8], tweak: u128| {
                let mut block = Block::from((u128::from_le_bytes(bytes.try_into().unwrap()) ^ tweak).to_le_bytes());
                xts.data.encrypt_block(&mut block);
                (u128::from_le_bytes(block.into()) ^ tweak).to_le_bytes()
            };
            for block in 0..blocks {
                let at = block * 16;
                let stored = one(&expected[at..at + 16], tweak);
                expected[at..at + 16].copy_from_slice(&stored);
                tweak = (tweak << 1) ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
            }
            if tail > 0 {
                let at = blocks * 16;
                let before: [u8; 16] = expected[at - 16..at].try_into().unwrap();
                let mut last = before;
                last[..tail].copy_from_slice(&expected[at..]);
                expected[at - 16..at].copy_from_slice(&one(&last, tweak));
                expected[at..].copy_from_slice(&before[..tail]);
            }
            prop_assert!(unit == expected);
            xts.decrypt(&iv, &mut unit).unwrap();
            prop_assert!(unit == plain);
        }
    }
}
