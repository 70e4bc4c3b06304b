//! Figures that are not requests per second: how soon, how much, and what waits for what.
//!
//! Each study makes what it needs and prints a table of its own.

pub mod drain;
pub mod fill;
pub mod first_byte;
pub mod hang;
pub mod held;
pub mod processes;
pub mod zran;

use std::time::Duration;

use nydus_vm::testing::make;

/// The middle of some times, and the longest.
#[derive(Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// Takes one more time in.
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// The value below which the share `of` of all times lies, in microseconds.
    pub fn quantile_us(&self, of: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let place = ((sorted.len() as f64 * of) as usize).min(sorted.len().saturating_sub(1));
        sorted.get(place).map_or(0.0, |time| time.as_secs_f64() * 1e6)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The longest, in microseconds.
    pub fn longest_us(&self) -> f64 {
        self.quantile_us(1.0)
    }
}

/// `len` bytes that compress to about a half, and cost a decoder about as much as programs do: words from a vocabulary, one
/// after the other.
pub fn half_text(seed: &str, len: usize) -> Vec<u8> {
    const WORDS: usize = 4096;
    let vocabulary = make::noise("vocabulary", WORDS + 16);
    let mut text = Vec::with_capacity(len + 16);
    for choice in make::noise(seed, len / 2).chunks_exact(2) {
        let word = usize::from(u16::from_le_bytes([choice[0], choice[1]]));
        let (start, length) = (word % WORDS, 3 + word / WORDS % 8);
        text.extend_from_slice(&vocabulary[start..start + length]);
        if text.len() >= len {
            break;
        }
    }
    text.truncate(len);
    text
}
