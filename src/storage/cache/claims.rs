//! Whose chunk is where: the records by which images that share a data file keep out of each other's way.
//!
//! Chunk numbers, places and digests come from bootstraps, and a bootstrap can lie: it may name the blob of another
//! image and place a chunk of its own over that image's data. So a data file is never written by a chunk's number
//! alone. A process first *claims* the chunk: it enters what its image states of it, the place and a keyed tag over
//! everything that makes the content, and is refused if that contradicts a claim that stands:
//!
//! 1. A record belongs to one statement. Another statement about the same chunk is *disputed*: its image reads the chunk
//!    from memory and writes nothing.
//! 2. The places of all claims ascend with the chunk numbers and do not overlap, as in every honest blob (format,
//!    section 5.1). A claim that breaks this is refused.
//! 3. A chunk is believed only by those whose own statement is the one of the record, once its data was written.
//! 4. Nobody takes over a record whose data was written once, until its file is made anew or the machine boots: others
//!    may have it mapped. One whose data was never written is taken over under the chunk's lock.
//!
//! So a lying image can cost another one the cache of some chunks, and never shows it wrong bytes.
//!
//! ```text
//! per chunk, 16 bytes   place: 0..25 bytes, 25..63 offset in units of the blob's alignment, 63 settled; 0: no claim
//!                       tag: 0..1 written, 1..2 on the disk, 2..8 how often it was found wrong, 8..64 tag
//! then, one bit per 512 chunks, in words of 8 bytes: whether one of them has a record
//! ```
//!
//! Claims are made by several processes at once, without a common lock: a claim is entered unsettled, then compared
//! with its neighbours up to the next settled ones, then settled or taken back. Of two that contradict each other at
//! least one sees the other.

use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use super::extents::LEN_BITS;
use crate::sys::bitmap::Lost;
use crate::sys::bitmap::SharedBytes;

const RECORD_BYTES: usize = 16;
/// Chunks per bit of the summary.
const GROUP_CHUNKS: usize = 512;

/// In the place: compared with its neighbours.
const SETTLED: u64 = 1 << 63;
/// In the tag: the data was written.
const WRITTEN: u64 = 1;
/// In the tag: the data reached the disk.
const SYNCED: u64 = 2;
/// In the tag: how often it was found wrong.
const WRONG_SHIFT: u32 = 2;
const WRONG_MASK: u64 = 0x3f << WRONG_SHIFT;
/// The tag proper.
const TAG_MASK: u64 = !0xff;

/// What an image states of a chunk, as it stands in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statement {
    place: u64,
    tag: u64,
}

impl Statement {
    /// A statement from the place (as `extents::pack` makes it) and a hash over what makes the content.
    pub fn new(place: u64, hash: u64) -> Self {
        // A tag is never 0, so that an empty record is nobody's.
        let tag = hash & TAG_MASK;
        Self { place, tag: if tag == 0 { TAG_MASK } else { tag } }
    }
}

/// How a record stands to a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nobody's, or ours with nothing written yet.
    Open,
    /// Another statement was claimed, and nothing written yet: by somebody who is at it, or died.
    Contested,
    /// The statement is the one of the record, and its data is there.
    Believed,
    /// Another statement stands.
    Disputed,
}

/// By what right a chunk is claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// The caller holds its lock: who claimed it before and wrote nothing has failed or died.
    Locked,
    /// Others may be at it: the file system cannot lock, or another process does not get on.
    Unlocked,
}

/// Whether chunks may lie at the very same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Each has its own.
    None,
    /// Several chunks of one stored unit have the unit's place.
    Units,
}

/// The records of one blob.
#[derive(Debug)]
pub struct Claims {
    bytes: SharedBytes,
    start: usize,
    chunks: u32,
    shift: u32,
    sharing: Sharing,
}

/// Chunks that had to be flushed at some moment; see [`Claims::snapshot`].
#[derive(Debug)]
pub struct Snapshot(Vec<u32>);

impl Claims {
    /// Bytes of the records of `chunks` chunks.
    pub fn bytes(chunks: u32) -> usize {
        chunks as usize * RECORD_BYTES + (chunks as usize).div_ceil(GROUP_CHUNKS).div_ceil(64) * 8
    }

    /// The records that begin at byte `start`, a multiple of 8, of `bytes`. Offsets are in units of `1 << shift`.
    pub fn new(bytes: SharedBytes, start: usize, chunks: u32, shift: u32, sharing: Sharing) -> Self {
        Self { bytes, start, chunks, shift, sharing }
    }

    /// Whether the file was truncated or cannot be read; nothing is believed then.
    pub fn is_lost(&self) -> bool {
        self.bytes.get(0).is_err()
    }

    /// How the record of `chunk` stands to `statement`. Lost records are open.
    pub fn standing(&self, chunk: u32, statement: Statement) -> Standing {
        let Some(at) = self.record(chunk) else { return Standing::Open };
        let Ok(word) = self.bytes.word(at + 8) else { return Standing::Open };
        let is_ours = word & TAG_MASK == statement.tag;
        match (is_ours, word & WRITTEN != 0, word & WRONG_MASK != 0) {
            (true, true, _) => Standing::Believed,
            (true, false, _) => Standing::Open,
            (false, false, false) if word & TAG_MASK == 0 => Standing::Open,
            (false, false, false) => Standing::Contested,
            (false, _, _) => Standing::Disputed,
        }
    }

    /// Enters `statement` for `chunk`, or finds it there. `false`: it contradicts what stands; the data file must not
    /// be written for it. Lost records refuse everything.
    pub fn claim(&self, chunk: u32, statement: Statement, right: Right) -> bool {
        match self.record(chunk) {
            Some(at) => self.try_claim(chunk, at, statement, right).unwrap_or(false),
            None => false,
        }
    }

    fn try_claim(&self, chunk: u32, at: usize, ours: Statement, right: Right) -> Result<bool, Lost> {
        let (place, tag) = (self.bytes.word(at)?, self.bytes.word(at + 8)?);
        if place == ours.place | SETTLED && tag & TAG_MASK == ours.tag {
            return Ok(true);
        }
        let was_written = tag & (WRITTEN | WRONG_MASK) != 0;
        if was_written || (place != 0 && right == Right::Unlocked) {
            return Ok(false);
        }
        self.note_group(chunk as usize / GROUP_CHUNKS)?;
        if !self.bytes.replace_word(at, place, ours.place)? {
            return Ok(false);
        }
        // Pairs with itself: either we see a claim that was entered meanwhile, or its owner sees ours.
        fence(Ordering::SeqCst);
        let is_clear = self.neighbours_allow(chunk as usize, ours.place)?;
        if !is_clear || !self.bytes.replace_word(at + 8, tag, ours.tag)? {
            self.bytes.replace_word(at, ours.place, 0)?;
            return Ok(false);
        }
        self.bytes.replace_word(at, ours.place, ours.place | SETTLED)
    }

    /// Whether `place` lies behind all claims of lower numbers and before all of higher ones.
    fn neighbours_allow(&self, chunk: usize, place: u64) -> Result<bool, Lost> {
        let allows = |from: &mut dyn Iterator<Item = usize>, is_right: &dyn Fn(u64) -> bool| {
            for other in from {
                let word = self.bytes.word(self.start + other * RECORD_BYTES)?;
                if word != 0 && !is_right(word & !SETTLED) {
                    return Ok(false);
                }
                if word & SETTLED != 0 {
                    break;
                }
            }
            Ok(true)
        };
        let is_shared = |other| self.sharing == Sharing::Units && other == place;
        let chunks = self.chunks as usize;
        let of_group = |group: usize| group * GROUP_CHUNKS..((group + 1) * GROUP_CHUNKS).min(chunks);
        let here = chunk / GROUP_CHUNKS;
        let below = std::iter::successors(Some(here), |group| self.group_below(*group));
        let below = below.flat_map(|group| of_group(group).rev());
        let above = std::iter::successors(Some(here), |group| self.group_above(*group)).flat_map(of_group);
        let before = |other| self.end(other) <= self.offset(place) || is_shared(other);
        let behind = |other| self.end(place) <= self.offset(other) || is_shared(other);
        Ok(allows(&mut below.skip_while(|other| *other >= chunk), &before)?
            && allows(&mut above.skip_while(|other| *other <= chunk), &behind)?)
    }

    fn note_group(&self, group: usize) -> Result<(), Lost> {
        let at = self.summary() + group / 64 * 8;
        loop {
            let old = self.bytes.word(at)?;
            let new = old | 1 << (group % 64);
            if old == new || self.bytes.replace_word(at, old, new)? {
                return Ok(());
            }
        }
    }

    /// The next group of a higher number with records.
    fn group_above(&self, group: usize) -> Option<usize> {
        let groups = (self.chunks as usize).div_ceil(GROUP_CHUNKS);
        let first = group + 1;
        (first / 64..groups.div_ceil(64)).find_map(|word| {
            let skipped = if word == first / 64 { first % 64 } else { 0 };
            let bits = self.summary_word(word) & (u64::MAX << skipped);
            (bits != 0).then(|| word * 64 + bits.trailing_zeros() as usize).filter(|group| *group < groups)
        })
    }

    /// The next group of a lower number with records.
    fn group_below(&self, group: usize) -> Option<usize> {
        let last = group.checked_sub(1)?;
        (0..=last / 64).rev().find_map(|word| {
            let kept = if word == last / 64 { last % 64 } else { 63 };
            let bits = self.summary_word(word) & (u64::MAX >> (63 - kept));
            (bits != 0).then(|| word * 64 + 63 - bits.leading_zeros() as usize)
        })
    }

    fn has_records(&self, group: usize) -> bool {
        self.summary_word(group / 64) & 1 << (group % 64) != 0
    }

    fn summary_word(&self, word: usize) -> u64 {
        self.bytes.word(self.summary() + word * 8).unwrap_or(0)
    }

    fn offset(&self, place: u64) -> u64 {
        place >> LEN_BITS << self.shift
    }

    fn end(&self, place: u64) -> u64 {
        self.offset(place).saturating_add(place & ((1 << LEN_BITS) - 1))
    }

    /// The data of `chunk` was written, or verified, under the claim of `statement`.
    pub fn note_written(&self, chunk: u32, statement: Statement) {
        self.change(chunk, |word| (word & TAG_MASK == statement.tag).then_some(word | WRITTEN));
    }

    /// The data of `chunk` was found wrong by those of `statement`: it is believed no more. `true`: this must reach the
    /// disk before the chunk is written again.
    pub fn note_wrong(&self, chunk: u32, statement: Statement) -> bool {
        let old = self.change(chunk, |word| {
            let is_believed = word & TAG_MASK == statement.tag && word & WRITTEN != 0;
            let wrong = (word & WRONG_MASK).saturating_add(1 << WRONG_SHIFT).min(WRONG_MASK);
            is_believed.then_some(word & TAG_MASK | wrong)
        });
        old.is_some_and(|word| word & SYNCED != 0)
    }

    /// What is written and not known to be on the disk: what [`Claims::note_synced`] may be told after a flush that
    /// begins later.
    pub fn snapshot(&self) -> Snapshot {
        let chunks = (0..self.chunks as usize).step_by(GROUP_CHUNKS).filter(|at| self.has_records(at / GROUP_CHUNKS));
        let each = chunks.flat_map(|first| first..(first + GROUP_CHUNKS).min(self.chunks as usize));
        let unsynced = each.filter_map(|chunk| {
            let word = self.bytes.word(self.start + chunk * RECORD_BYTES + 8).ok()?;
            // Found wrong too often to tell one writing from another: never noted as on the disk.
            let counts = word & (WRITTEN | SYNCED) == WRITTEN && word & WRONG_MASK != WRONG_MASK;
            // 24 bits of the number, 6 of the count.
            counts.then_some((chunk as u32) << 8 | (word & WRONG_MASK) as u32)
        });
        Snapshot(unsynced.collect())
    }

    /// The data of the chunks in `snapshot` reached the disk; but not what was written again since.
    pub fn note_synced(&self, snapshot: &Snapshot) {
        for noted in &snapshot.0 {
            let wrong = u64::from(noted & 0xff);
            self.change(noted >> 8, |word| {
                (word & WRITTEN != 0 && word & WRONG_MASK == wrong).then_some(word | SYNCED)
            });
        }
    }

    /// Forgets all claims whose data is not known to be on the disk. Nobody else has the file open.
    pub fn keep_only_synced(&self) {
        for chunk in (0..self.chunks).filter(|chunk| self.has_records(*chunk as usize / GROUP_CHUNKS)) {
            let Some(at) = self.record(chunk) else { continue };
            if self.bytes.word(at + 8).is_ok_and(|tag| tag & SYNCED != 0) {
                continue;
            }
            for at in [at + 8, at] {
                let _ = self.bytes.word(at).and_then(|word| self.bytes.replace_word(at, word, 0));
            }
        }
    }

    /// Changes the tag of `chunk` to what `change` makes of it; the old one, if it was changed.
    fn change(&self, chunk: u32, change: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        let at = self.record(chunk)? + 8;
        loop {
            let old = self.bytes.word(at).ok()?;
            if self.bytes.replace_word(at, old, change(old)?).ok()? {
                return Some(old);
            }
        }
    }

    fn record(&self, chunk: u32) -> Option<usize> {
        (chunk < self.chunks).then(|| self.start + chunk as usize * RECORD_BYTES)
    }

    fn summary(&self) -> usize {
        self.start + self.chunks as usize * RECORD_BYTES
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::super::extents::pack;
    use super::*;

    const CHUNKS: u32 = 2000;

    /// Records, and the same ones as another process sees them.
    fn two(sharing: Sharing) -> [Claims; 2] {
        let file = tempfile::tempfile().unwrap();
        let len = (64 + Claims::bytes(CHUNKS)) as u64;
        file.set_len(len).unwrap();
        [(); 2].map(|()| Claims::new(SharedBytes::map(file.as_fd(), len).unwrap(), 64, CHUNKS, 0, sharing))
    }

    fn says(offset: u64, len: u32, hash: u64) -> Statement {
        Statement::new(pack(offset, len, 0).unwrap(), hash << 8)
    }

    #[test]
    fn equal_statements_share_a_record_and_others_are_disputed() {
        let [one, two] = two(Sharing::None);
        let (honest, moved, other) = (says(100, 50, 7), says(200, 50, 8), says(100, 50, 9));
        assert_eq!(one.standing(3, honest), Standing::Open);
        assert!(one.claim(3, honest, Right::Locked) && two.claim(3, honest, Right::Unlocked));
        assert_eq!(two.standing(3, honest), Standing::Open, "claimed, not written");
        assert_eq!(two.standing(3, other), Standing::Contested);
        one.note_written(3, honest);
        assert_eq!(two.standing(3, honest), Standing::Believed);
        for lie in [moved, other] {
            assert_eq!(two.standing(3, lie), Standing::Disputed);
            assert!(!two.claim(3, lie, Right::Locked));
            two.note_written(3, lie);
            assert!(!two.note_wrong(3, lie));
            assert_eq!(one.standing(3, honest), Standing::Believed, "lies change nothing");
        }
        assert_eq!(one.standing(CHUNKS, honest), Standing::Open);
        assert!(!one.claim(CHUNKS, honest, Right::Locked));
    }

    #[test]
    fn claims_that_overlap_or_do_not_ascend_are_refused() {
        let [one, two] = two(Sharing::None);
        // Far apart: the neighbours are in other groups.
        for (chunk, offset) in [(0, 0), (700, 7000), (1999, 19_990)] {
            assert!(one.claim(chunk, says(offset, 10, 1), Right::Locked));
        }
        let refused =
            [(1, 5, 10), (1, 0, 10), (699, 6995, 10), (699, 6000, 1 << 20), (701, 6990, 20), (1998, 19_981, 10)];
        for (chunk, offset, len) in refused {
            let lie = says(offset, len, 2);
            assert!(!two.claim(chunk, lie, Right::Locked), "{chunk} {offset} {len}");
            assert_eq!(two.bytes.word(two.record(chunk).unwrap()), Ok(0), "taken back");
        }
        for (chunk, offset, len) in [(1, 10, 10), (699, 6990, 10), (701, 7010, 10), (1998, 19_980, 10)] {
            assert!(two.claim(chunk, says(offset, len, 3), Right::Locked), "{chunk} {offset} {len}");
        }
    }

    #[test]
    fn groups_with_records_are_found_in_both_directions() {
        let file = tempfile::tempfile().unwrap();
        let chunks = 512 * 200;
        let len = Claims::bytes(chunks) as u64;
        file.set_len(len).unwrap();
        let claims = Claims::new(SharedBytes::map(file.as_fd(), len).unwrap(), 0, chunks, 0, Sharing::None);
        let marked = [0, 1, 62, 63, 64, 127, 128, 199];
        marked.iter().for_each(|group| claims.note_group(*group).unwrap());
        for group in 0..200 {
            assert_eq!(claims.has_records(group), marked.contains(&group), "{group}");
            assert_eq!(claims.group_above(group), marked.into_iter().find(|other| *other > group), "{group}");
            assert_eq!(claims.group_below(group), marked.into_iter().rfind(|other| *other < group), "{group}");
        }
    }

    #[test]
    fn chunks_of_one_unit_may_share_its_place_where_units_are_kept() {
        let [one, _] = two(Sharing::Units);
        assert!(one.claim(3, says(100, 50, 1), Right::Locked) && one.claim(4, says(100, 50, 2), Right::Locked));
        assert!(!one.claim(5, says(120, 50, 3), Right::Locked));
        assert!(one.claim(5, says(150, 50, 3), Right::Locked));
    }

    #[test]
    fn claim_of_the_dead_is_taken_over_under_the_lock_and_written_data_never() {
        let [dead, two] = two(Sharing::None);
        let (lie, honest) = (says(0, 4096, 1), says(8192, 4096, 2));
        assert!(dead.claim(2, lie, Right::Locked));
        assert!(!two.claim(2, honest, Right::Unlocked), "it may live");
        assert!(two.claim(2, honest, Right::Locked));
        two.note_written(2, honest);
        assert!(!two.note_wrong(2, honest), "was not on the disk");
        assert_eq!(two.standing(2, honest), Standing::Open);
        assert_eq!(two.standing(2, lie), Standing::Disputed, "somebody may have it mapped");
        assert!(!dead.claim(2, lie, Right::Locked) && two.claim(2, honest, Right::Locked));
    }

    #[test]
    fn only_what_was_flushed_outlives_a_boot() {
        let [one, _] = two(Sharing::None);
        let at = |chunk: u32| says(u64::from(chunk) * 10, 10, u64::from(chunk) + 1);
        for chunk in [0, 5, 600, 601] {
            assert!(one.claim(chunk, at(chunk), Right::Locked));
        }
        [0, 5, 600].iter().for_each(|chunk| one.note_written(*chunk, at(*chunk)));
        let snapshot = one.snapshot();
        // Found wrong and written again after the flush began: nobody knows whether that is on the disk.
        one.note_wrong(5, at(5));
        one.note_written(5, at(5));
        one.note_synced(&snapshot);
        assert!(one.note_wrong(600, at(600)), "was on the disk");
        one.note_written(600, at(600));
        one.keep_only_synced();
        let believed = |chunk: &u32| one.standing(*chunk, at(*chunk)) == Standing::Believed;
        assert_eq!((0..CHUNKS).filter(believed).collect::<Vec<_>>(), [0]);
        assert!(one.claim(5, says(10, 1, 77), Right::Locked), "forgotten altogether");
    }

    #[test]
    fn data_that_is_found_wrong_again_and_again_is_never_noted_as_flushed() {
        let [one, _] = two(Sharing::None);
        assert!(one.claim(0, says(0, 10, 1), Right::Locked));
        for _ in 0..100 {
            one.note_written(0, says(0, 10, 1));
            one.note_wrong(0, says(0, 10, 1));
        }
        one.note_written(0, says(0, 10, 1));
        one.note_synced(&one.snapshot());
        assert!(!one.note_wrong(0, says(0, 10, 1)));
    }

    #[test]
    fn two_liars_at_once_never_both_get_a_place() {
        for round in 0..200u64 {
            let [one, two] = two(Sharing::None);
            let barrier = std::sync::Barrier::new(2);
            let race = |claims: &Claims, chunk, offset| {
                barrier.wait();
                claims.claim(chunk, says(offset, 100, round), Right::Locked)
            };
            let (first, second) = std::thread::scope(|scope| {
                let first = scope.spawn(|| race(&one, 7, 1000));
                (race(&two, 900, 1000 + round % 100), first.join().unwrap())
            });
            assert!(!(first && second), "{round}");
        }
    }

    proptest! {
        #[test]
        fn claims_that_stand_never_overlap(wants in proptest::collection::vec((0..CHUNKS, 0u64..5000, 1u32..300), 1..200)) {
            let [one, two] = two(Sharing::None);
            let mut standing = std::collections::BTreeMap::new();
            for (at, (chunk, offset, len)) in wants.into_iter().enumerate() {
                let claims = if at % 2 == 0 { &one } else { &two };
                let statement = says(offset, len, at as u64 + 1);
                if claims.claim(chunk, statement, Right::Locked) {
                    claims.note_written(chunk, statement);
                    prop_assert!(standing.insert(chunk, (offset, offset + u64::from(len))).is_none());
                }
            }
            let places: Vec<_> = standing.into_values().collect();
            prop_assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{places:?}");
        }
    }
}
