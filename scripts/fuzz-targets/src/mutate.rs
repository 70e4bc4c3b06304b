//! Mutations that know that formats are made of little-endian numbers, offsets and records of equal size.
//!
//! Random bytes get stuck at magic numbers and checks of ranges; an edit of a field of a good image gets past them.

/// xorshift: what libFuzzer's seed becomes a sequence of numbers by.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Mutates the first `size` bytes of `data`; returns the new size, at most `max_size`. Half of the time libFuzzer's own
/// mutations, half of the time one to four edits of fields or records.
pub fn fields(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut random = Random(u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    if size < 16 || random.next() & 1 == 0 {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let size = size.min(data.len()).min(max_size);
    for _ in 0..=random.below(4) {
        match random.below(8) {
            0 => copy_record(&mut data[..size], &mut random),
            1 => swap_records(&mut data[..size], &mut random),
            _ => edit_field(&mut data[..size], &mut random),
        }
    }
    size
}

/// A place for `len` bytes at a multiple of `align`: often near the front, where headers and tables are, and often
/// where something is stored.
fn place(data: &[u8], len: usize, align: usize, random: &mut Random) -> usize {
    let last = data.len().saturating_sub(len);
    let mut at = 0;
    for _ in 0..6 {
        let front = if random.next() & 1 == 0 { last } else { last.min(4096) };
        at = random.below(front + 1) / align * align;
        if data[at..].iter().take(len).any(|byte| *byte != 0) {
            break;
        }
    }
    at
}

fn edit_field(data: &mut [u8], random: &mut Random) {
    let width = 1 << random.below(4);
    let at = place(data, width, width, random);
    let mut bytes = [0; 8];
    bytes[..width].copy_from_slice(&data[at..at + width]);
    let old = u64::from_le_bytes(bytes);
    let other = place(data, 8.min(data.len()), 4, random);
    let new = match random.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << random.below(64),
        3 => (1u64 << random.below(64)).wrapping_sub(1),
        4 => old.wrapping_add(1),
        5 => old.wrapping_sub(1),
        6 => old ^ 1 << random.below(width * 8),
        7 => data.len() as u64,
        8 => (data.len() as u64).wrapping_sub(random.below(64) as u64),
        9 => (random.below(data.len()) as u64) & !31,
        10 => u64::from_le_bytes(std::array::from_fn(|i| data.get(other + i).copied().unwrap_or(0))),
        _ => random.next(),
    };
    data[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
}

fn record_bytes(data: &[u8], random: &mut Random) -> usize {
    [8, 12, 16, 24, 32, 64, 80, 128, 256][random.below(9)].min(data.len() / 2)
}

fn copy_record(data: &mut [u8], random: &mut Random) {
    let len = record_bytes(data, random);
    let (from, to) = (place(data, len, 4, random), place(data, len, 4, random));
    data.copy_within(from..from + len, to);
}

fn swap_records(data: &mut [u8], random: &mut Random) {
    let len = record_bytes(data, random);
    let (a, b) = (place(data, len, 4, random), place(data, len, 4, random));
    let (first, second) = (a.min(b), a.max(b));
    if first + len <= second {
        let (front, back) = data.split_at_mut(second);
        front[first..first + len].swap_with_slice(&mut back[..len]);
    }
}
