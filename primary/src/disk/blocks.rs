//! Sets of blocks of a disk: dense in memory, run lengths on the wire.

use std::ops::Range;

use vmm::disk::ByteRange;

/// Bytes of the unit in which changes are remembered across restarts.
pub const BLOCK_BYTES: u64 = 64 << 10;

const WORD_BITS: u64 = 64;

/// Why an encoded set was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockSetError {
    /// A number is cut off or longer than it need be.
    #[error("run {run} of a set of blocks is malformed")]
    Malformed {
        /// Which, from 0.
        run: u64,
    },
    /// A run is empty, or goes beyond the disk's end.
    #[error("run {run} of a set of blocks is empty or goes beyond block {blocks}")]
    Outside {
        /// Which, from 0.
        run: u64,
        /// Blocks that the set may hold.
        blocks: u64,
    },
}

/// A set of the blocks of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSet {
    blocks: u64,
    count: u64,
    words: Vec<u64>,
}

/// Blocks of a disk of `bytes`; the last may be short.
pub fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

/// The blocks that a range touches.
pub fn touched_by(range: ByteRange) -> Range<u64> {
    if range.len == 0 { 0..0 } else { range.offset / BLOCK_BYTES..range.end().div_ceil(BLOCK_BYTES) }
}

fn word_of(block: u64) -> (usize, u64) {
    let at = usize::try_from(block / WORD_BITS).expect("a set that fits memory");
    (at, 1 << (block % WORD_BITS))
}

impl BlockSet {
    /// None out of `blocks`.
    pub fn none(blocks: u64) -> Self {
        let words = usize::try_from(blocks.div_ceil(WORD_BITS)).expect("a set that fits memory");
        Self { blocks, count: 0, words: vec![0; words] }
    }

    /// All of `blocks`.
    pub fn all(blocks: u64) -> Self {
        let mut set = Self::none(blocks);
        set.insert_range(0..blocks);
        set
    }

    /// How many blocks the disk has.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// How many are in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `block` is in the set.
    pub fn contains(&self, block: u64) -> bool {
        let (at, bit) = word_of(block);
        self.words.get(at).is_some_and(|word| word & bit != 0)
    }

    /// Whether all of `blocks` are.
    pub fn contains_range(&self, mut blocks: Range<u64>) -> bool {
        blocks.all(|block| self.contains(block))
    }

    /// Adds a block; true when it was not there.
    ///
    /// # Panics
    /// When the disk has no such block.
    pub fn insert(&mut self, block: u64) -> bool {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        let (at, bit) = word_of(block);
        let word = self.words.get_mut(at).expect("a word for each block");
        let new = *word & bit == 0;
        *word |= bit;
        self.count += u64::from(new);
        new
    }

    /// Adds all of `blocks`.
    ///
    /// # Panics
    /// When the disk has no such blocks.
    pub fn insert_range(&mut self, blocks: Range<u64>) {
        for block in blocks {
            self.insert(block);
        }
    }

    /// Takes a block out; true when it was there.
    pub fn remove(&mut self, block: u64) -> bool {
        let (at, bit) = word_of(block);
        let Some(word) = self.words.get_mut(at) else { return false };
        let there = *word & bit != 0;
        *word &= !bit;
        self.count -= u64::from(there);
        there
    }

    /// Adds what is in `other`.
    ///
    /// # Panics
    /// When it is a set of another disk's blocks.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.blocks, other.blocks, "sets of the same disk");
        for (word, add) in self.words.iter_mut().zip(&other.words) {
            *word |= add;
        }
        self.count = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
    }

    /// The blocks in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranges().flatten()
    }

    /// Ranges of neighbouring blocks in the set, ascending, none empty and none touching another.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.seek(at, true)?;
            at = self.seek(start, false).unwrap_or(self.blocks);
            Some(start..at)
        })
    }

    /// The same, in bytes of a disk that has `bytes` (the last block may be short).
    pub fn byte_ranges(&self, bytes: u64) -> impl Iterator<Item = ByteRange> + '_ {
        self.ranges().map(move |range| {
            let offset = range.start * BLOCK_BYTES;
            ByteRange { offset, len: (range.end * BLOCK_BYTES).min(bytes).saturating_sub(offset) }
        })
    }

    /// The first block from `from` on that is in the set (or not), if there is one.
    fn seek(&self, from: u64, wanted: bool) -> Option<u64> {
        let flip = if wanted { 0 } else { u64::MAX };
        let (first, bit) = word_of(from);
        for (at, word) in self.words.iter().enumerate().skip(first) {
            let mut found = word ^ flip;
            if at == first {
                found &= !(bit - 1);
            }
            if found != 0 {
                let base = u64::try_from(at).unwrap_or(u64::MAX).saturating_mul(WORD_BITS);
                return Some(base + u64::from(found.trailing_zeros())).filter(|block| *block < self.blocks);
            }
        }
        None
    }

    /// The bits of a file: block n is bit n % 8 of byte n / 8. `first` is a multiple of 8; what lies beyond the last block is zero.
    pub fn bits(&self, first: u64, into: &mut [u8]) {
        assert!(first.is_multiple_of(8), "whole bytes");
        for (byte, number) in into.iter_mut().zip(first / 8..) {
            let at = usize::try_from(number / 8).unwrap_or(usize::MAX);
            let word = self.words.get(at).copied().unwrap_or(0).to_le_bytes();
            let [b0, b1, b2, b3, b4, b5, b6, b7] = word;
            *byte = match number % 8 {
                0 => b0,
                1 => b1,
                2 => b2,
                3 => b3,
                4 => b4,
                5 => b5,
                6 => b6,
                _ => b7,
            };
        }
    }

    /// Adds the blocks whose bits are set in `bytes`, which begin with block `first`. False when a bit beyond the last block is set.
    pub fn add_bits(&mut self, first: u64, bytes: &[u8]) -> bool {
        for (byte, start) in bytes.iter().zip((first..).step_by(8)) {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                if start + bit >= self.blocks {
                    return false;
                }
                self.insert(start + bit);
            }
        }
        true
    }

    /// Lengths of runs, in turn not in the set and in it, as LEB128 numbers. What is not covered at the end is not in the set.
    pub fn encode(&self) -> Vec<u8> {
        encode_ranges(self.ranges())
    }

    /// As [`Self::encode`] in at most `most` bytes: if it must be, gaps are filled, smallest first, so that the result is a superset.
    ///
    /// # Panics
    /// When `most` is less than 32.
    pub fn encode_within(&self, most: usize) -> Vec<u8> {
        assert!(most >= 32, "room for one run");
        let mut gap = 1;
        loop {
            let encoded = encode_ranges(Joined { ranges: self.ranges(), gap, held: None });
            if encoded.len() <= most {
                return encoded;
            }
            gap *= 2;
        }
    }

    /// Reads what [`Self::encode`] wrote; allocates for `blocks`, whatever the bytes say.
    ///
    /// # Errors
    /// See [`BlockSetError`].
    pub fn decode(blocks: u64, mut bytes: &[u8]) -> Result<Self, BlockSetError> {
        let mut set = Self::none(blocks);
        let (mut at, mut run, mut inside) = (0_u64, 0_u64, false);
        while !bytes.is_empty() {
            let (length, rest) = take_number(bytes).ok_or(BlockSetError::Malformed { run })?;
            bytes = rest;
            let outside = BlockSetError::Outside { run, blocks };
            let end = at.checked_add(length).filter(|end| *end <= blocks).ok_or(outside)?;
            if length == 0 && run > 0 {
                return Err(outside);
            }
            if inside {
                set.insert_range(at..end);
            }
            (at, run, inside) = (end, run + 1, !inside);
        }
        Ok(set)
    }
}

/// Ranges with gaps shorter than `gap` filled.
struct Joined<I> {
    ranges: I,
    gap: u64,
    held: Option<Range<u64>>,
}

impl<I: Iterator<Item = Range<u64>>> Iterator for Joined<I> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let mut whole = self.held.take().or_else(|| self.ranges.next())?;
        for next in self.ranges.by_ref() {
            if next.start - whole.end >= self.gap {
                self.held = Some(next);
                break;
            }
            whole.end = next.end;
        }
        Some(whole)
    }
}

fn encode_ranges(ranges: impl Iterator<Item = Range<u64>>) -> Vec<u8> {
    let (mut out, mut at) = (Vec::new(), 0);
    for range in ranges {
        put_number(&mut out, range.start - at);
        put_number(&mut out, range.end - range.start);
        at = range.end;
    }
    out
}

fn put_number(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = u8::try_from(value & 0x7F).expect("seven bits");
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

fn take_number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0_u64;
    for (at, byte) in bytes.iter().take(9).enumerate() {
        value |= u64::from(byte & 0x7F) << (7 * at);
        if byte & 0x80 == 0 {
            // One encoding for each number.
            let shortest = at == 0 || *byte != 0;
            return shortest.then_some((value, bytes.get(at + 1..)?));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set_of(blocks: u64, members: &BTreeSet<u64>) -> BlockSet {
        let mut set = BlockSet::none(blocks);
        members.iter().for_each(|block| assert!(set.insert(*block)));
        set
    }

    proptest! {
        #[test]
        fn a_set_is_what_was_put_in(
            blocks in 1_u64..700, a in prop::collection::btree_set(0_u64..700, 0..200), b in prop::collection::btree_set(0_u64..700, 0..20),
        ) {
            let a: BTreeSet<u64> = a.into_iter().filter(|n| *n < blocks).collect();
            let b: BTreeSet<u64> = b.into_iter().filter(|n| *n < blocks).collect();
            let mut set = set_of(blocks, &a);
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(BlockSet::decode(blocks, &set.encode()), Ok(set.clone()));
            let short = set.encode_within(32);
            let wide = BlockSet::decode(blocks, &short).unwrap();
            prop_assert!(short.len() <= 32 && a.iter().all(|n| wide.contains(*n)));
            let mut bytes = vec![0; usize::try_from(blocks.div_ceil(8)).unwrap()];
            set.bits(0, &mut bytes);
            let mut read = BlockSet::none(blocks);
            prop_assert!(read.add_bits(0, &bytes));
            prop_assert_eq!(&read, &set);
            set.union(&set_of(blocks, &b));
            prop_assert_eq!(set.count(), u64::try_from(a.union(&b).count()).unwrap());
            for n in &b {
                prop_assert!(set.remove(*n) && !set.remove(*n));
            }
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), a.difference(&b).copied().collect());
        }

        #[test]
        fn arbitrary_bytes_are_a_set_within_its_bounds_or_an_error(blocks in 0_u64..100_000, bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(set) = BlockSet::decode(blocks, &bytes) {
                prop_assert!(set.count() <= blocks);
                prop_assert_eq!(BlockSet::decode(blocks, &set.encode()), Ok(set));
            }
        }
    }

    #[test]
    fn malformed_runs_are_refused() {
        let decode = |bytes: &[u8]| BlockSet::decode(100, bytes);
        assert_eq!(decode(&[0, 100]), Ok(BlockSet::all(100)));
        assert_eq!(decode(&[0, 101]), Err(BlockSetError::Outside { run: 1, blocks: 100 }));
        assert_eq!(decode(&[5, 0]), Err(BlockSetError::Outside { run: 1, blocks: 100 }));
        assert_eq!(decode(&[0x80]), Err(BlockSetError::Malformed { run: 0 }));
        assert_eq!(decode(&[0x80, 0]), Err(BlockSetError::Malformed { run: 0 }));
        assert_eq!(decode(&[0xFF; 12]), Err(BlockSetError::Malformed { run: 0 }));
        let mut set = BlockSet::none(10);
        assert!(!set.add_bits(0, &[0, 0x04]), "bit 10 of 10");
    }

    #[test]
    fn ranges_of_bytes_end_with_the_disk() {
        let bytes = 3 * BLOCK_BYTES - 512;
        let ranges: Vec<ByteRange> = BlockSet::all(blocks_of(bytes)).byte_ranges(bytes).collect();
        assert_eq!(ranges, [ByteRange { offset: 0, len: bytes }]);
        assert_eq!(touched_by(ByteRange { offset: BLOCK_BYTES - 512, len: 1024 }), 0..2);
        assert_eq!(touched_by(ByteRange { offset: BLOCK_BYTES, len: 0 }), 0..0);
    }
}
