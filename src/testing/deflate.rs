//! Where the blocks of a gzip file begin, found by a second, plain inflater: the borders at which ZRan contexts can be
//! cut, and an oracle for what comes out. Panics on anything that is no gzip: its input is made by tests.

/// The beginning of a deflate block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Border {
    /// Bits of the file before it.
    pub bit: usize,
    /// Plain bytes before it, over all members.
    pub plain: usize,
    /// Which member it is in.
    pub member: usize,
}

/// All members of `gzip`: the borders of their blocks, and what they decode to.
pub fn walk(gzip: &[u8]) -> (Vec<Border>, Vec<u8>) {
    let mut bits = Bits { bytes: gzip, at: 0 };
    let (mut borders, mut plain) = (Vec::new(), Vec::new());
    for member in 0.. {
        if bits.at / 8 == gzip.len() {
            break;
        }
        skip_header(&mut bits);
        loop {
            borders.push(Border { bit: bits.at, plain: plain.len(), member });
            let is_last = bits.take(1) == 1;
            block(&mut bits, &mut plain);
            if is_last {
                break;
            }
        }
        bits.align();
        bits.at += 8 * 8;
    }
    (borders, plain)
}

struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn take(&mut self, count: usize) -> usize {
        (0..count).fold(0, |value, place| {
            let bit = self.bytes[self.at / 8] >> (self.at % 8) & 1;
            self.at += 1;
            value | usize::from(bit) << place
        })
    }

    fn align(&mut self) {
        self.at = self.at.next_multiple_of(8);
    }
}

fn skip_header(bits: &mut Bits<'_>) {
    assert_eq!((bits.take(8), bits.take(8), bits.take(8)), (0x1f, 0x8b, 8), "a gzip member");
    let flags = bits.take(8);
    bits.take(48);
    if flags & 4 != 0 {
        let len = bits.take(16);
        bits.at += len * 8;
    }
    for text in [8, 16] {
        if flags & text != 0 {
            while bits.take(8) != 0 {}
        }
    }
    if flags & 2 != 0 {
        bits.take(16);
    }
}

/// Canonical codes: how many there are of each length, and the symbols in their order.
struct Codes {
    counts: [usize; 16],
    symbols: Vec<usize>,
}

impl Codes {
    fn new(lengths: &[usize]) -> Self {
        let mut counts = [0; 16];
        lengths.iter().for_each(|len| counts[*len] += 1);
        counts[0] = 0;
        let mut symbols: Vec<usize> = (0..lengths.len()).filter(|symbol| lengths[*symbol] > 0).collect();
        symbols.sort_by_key(|symbol| lengths[*symbol]);
        Self { counts, symbols }
    }

    fn take(&self, bits: &mut Bits<'_>) -> usize {
        let (mut code, mut first, mut index) = (0, 0, 0);
        for count in &self.counts[1..] {
            code |= bits.take(1);
            if code < first + count {
                return self.symbols[index + code - first];
            }
            index += count;
            first = (first + count) << 1;
            code <<= 1;
        }
        panic!("no such code");
    }
}

fn block(bits: &mut Bits<'_>, plain: &mut Vec<u8>) {
    match bits.take(2) {
        0 => {
            bits.align();
            let len = bits.take(16);
            bits.take(16);
            plain.extend((0..len).map(|_| bits.take(8) as u8));
        }
        1 => {
            let lengths: Vec<usize> = [(144, 8), (112, 9), (24, 7), (8, 8)]
                .into_iter()
                .flat_map(|(count, len)| std::iter::repeat_n(len, count))
                .collect();
            symbols(bits, &Codes::new(&lengths), &Codes::new(&[5; 30]), plain);
        }
        2 => {
            let (literals, distances) = dynamic(bits);
            symbols(bits, &literals, &distances, plain);
        }
        _ => panic!("no such block"),
    }
}

fn dynamic(bits: &mut Bits<'_>) -> (Codes, Codes) {
    const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
    let (literals, distances, given) = (bits.take(5) + 257, bits.take(5) + 1, bits.take(4) + 4);
    let mut lengths = [0; 19];
    ORDER[..given].iter().for_each(|place| lengths[*place] = bits.take(3));
    let codes = Codes::new(&lengths);
    let mut lengths = Vec::new();
    while lengths.len() < literals + distances {
        let (value, times) = match codes.take(bits) {
            16 => (*lengths.last().expect("a length before"), 3 + bits.take(2)),
            17 => (0, 3 + bits.take(3)),
            18 => (0, 11 + bits.take(7)),
            len => (len, 1),
        };
        lengths.extend(std::iter::repeat_n(value, times));
    }
    (Codes::new(&lengths[..literals]), Codes::new(&lengths[literals..]))
}

fn symbols(bits: &mut Bits<'_>, literals: &Codes, distances: &Codes, plain: &mut Vec<u8>) {
    loop {
        match literals.take(bits) {
            literal @ 0..256 => plain.push(literal as u8),
            256 => return,
            symbol => {
                let len = match symbol - 257 {
                    28 => 258,
                    place => spread(bits, place, 4) + 3,
                };
                let place = distances.take(bits);
                let distance = spread(bits, place, 2) + 1;
                (0..len).for_each(|_| plain.push(plain[plain.len() - distance]));
            }
        }
    }
}

/// Lengths and distances: groups of `group` symbols that take one bit more each time; the first two have none.
fn spread(bits: &mut Bits<'_>, place: usize, group: usize) -> usize {
    if place < group * 2 {
        return place;
    }
    let extra = place / group - 1;
    ((group + place % group) << extra) + bits.take(extra)
}
