//! What changed in a page since a copy that both sides have: runs of equal bytes and runs of new bytes in turn, after the format of QEMU's XBZRLE
//! (P. Svärd et al., *Evaluation of delta compression techniques for efficient live migration of large virtual machines*, VEE 2011).
//!
//! A patch is a list of: bytes to skip, bytes that follow (at least one), these bytes; both counts in LEB128. What lies behind the last is unchanged.

use std::ops::Range;

use crate::error::Malformed;
use crate::limits::{MAX_PATCH_BYTES, PAGE_BYTES};

const _: () = assert!(PAGE_BYTES == BLOCK * u64::BITS as usize, "a bit for each block");

/// Equal bytes between two runs that are sent rather than skipped: a run costs two bytes of counts.
const GAP: usize = 3;
const WORD: usize = 8;
/// A page has as many blocks as a [`Blocks`] has bits.
const BLOCK: usize = 64;

const BAD: Malformed = Malformed::Value { field: "patch" };

/// Appends the patch that makes `old` into `new`, both one page; nothing and false if it is longer than [`MAX_PATCH_BYTES`].
pub(crate) fn put(out: &mut Vec<u8>, old: &[u8], new: &[u8]) -> bool {
    assert!(old.len() == PAGE_BYTES && new.len() == PAGE_BYTES, "two pages");
    let blocks = Blocks::changed(old, new);
    // Quick for pages that are new altogether; those with few blocks that changed need not be looked at for it.
    if blocks.bytes() > MAX_PATCH_BYTES && changed_words(old, new) * WORD > MAX_PATCH_BYTES {
        return false;
    }
    let start = out.len();
    let mut done = 0;
    while let Some(first) = blocks.next_change(old, new, done) {
        let end = run_end(old, new, first);
        put_count(out, first - done);
        put_count(out, end - first);
        out.extend_from_slice(&new[first..end]);
        if out.len() - start > MAX_PATCH_BYTES {
            out.truncate(start);
            return false;
        }
        done = end;
    }
    true
}

/// Changes `page` as `patch` says.
///
/// # Errors
/// [`Malformed::Value`]; the page is changed in part.
pub(crate) fn apply(page: &mut [u8], patch: &[u8]) -> Result<(), Malformed> {
    assert_eq!(page.len(), PAGE_BYTES, "one page");
    let (mut left, mut at) = (patch, 0);
    while !left.is_empty() {
        at += take_count(&mut left)?;
        let count = take_count(&mut left)?;
        let (new, rest) = left.split_at_checked(count).filter(|_| count > 0).ok_or(BAD)?;
        page.get_mut(at..at + count).ok_or(BAD)?.copy_from_slice(new);
        (left, at) = (rest, at + count);
    }
    Ok(())
}

fn words(page: &[u8]) -> impl Iterator<Item = u64> {
    page.as_chunks::<WORD>().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// Which blocks of a page differ, the first in the lowest bit: most pages change in few places, and these are found without looking at every word twice.
#[derive(Clone, Copy)]
struct Blocks(u64);

impl Blocks {
    fn changed(old: &[u8], new: &[u8]) -> Self {
        let pairs = old.as_chunks::<BLOCK>().0.iter().zip(new.as_chunks::<BLOCK>().0);
        Self(pairs.enumerate().fold(0, |bits, (block, (old, new))| bits | u64::from(old != new) << block))
    }

    /// Where the next row of neighbours among them is, from byte `from` on.
    fn row(self, from: usize) -> Option<Range<usize>> {
        let block = from / BLOCK;
        let left = self.0.checked_shr(u32::try_from(block).expect("within a page")).filter(|left| *left != 0)?;
        let skipped = left.trailing_zeros();
        let (begin, count) = (block + skipped as usize, (left >> skipped).trailing_ones() as usize);
        Some(from.max(begin * BLOCK)..(begin + count) * BLOCK)
    }

    /// Bytes in them.
    fn bytes(self) -> usize {
        self.0.count_ones() as usize * BLOCK
    }

    /// The first byte from `from` on that differs.
    fn next_change(self, old: &[u8], new: &[u8], mut from: usize) -> Option<usize> {
        loop {
            let row = self.row(from)?;
            if let Some(at) = first_change(&old[row.clone()], &new[row.clone()]) {
                return Some(row.start + at);
            }
            from = row.end;
        }
    }
}

fn changed_words(old: &[u8], new: &[u8]) -> usize {
    words(old).zip(words(new)).filter(|(old, new)| old != new).count()
}

/// The first byte that differs.
fn first_change(old: &[u8], new: &[u8]) -> Option<usize> {
    let differing = words(old).zip(words(new)).map(|(old, new)| old ^ new).enumerate().find(|(_, bits)| *bits != 0);
    if let Some((word, bits)) = differing {
        return Some(word * WORD + bits.trailing_zeros() as usize / 8);
    }
    let tail = old.len() - old.len() % WORD;
    (tail..old.len()).find(|at| old[*at] != new[*at])
}

/// Behind the last byte of the run that begins with the change at `first`.
fn run_end(old: &[u8], new: &[u8], first: usize) -> usize {
    let mut end = first + 1;
    loop {
        let new_altogether = |(old, new): &(u64, u64)| !has_zero_byte(old ^ new);
        end += words(&old[end..]).zip(words(&new[end..])).take_while(new_altogether).count() * WORD;
        match (end..PAGE_BYTES.min(end + GAP)).find(|at| old[*at] != new[*at]) {
            Some(more) => end = more + 1,
            None => return end,
        }
    }
}

/// See *Hacker's Delight*, 6-1.
fn has_zero_byte(word: u64) -> bool {
    const LOW: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    word.wrapping_sub(LOW) & !word & HIGH != 0
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    let [low, high] = [count & 0x7f, count >> 7].map(|part| u8::try_from(part).expect("counts are at most a page"));
    if high == 0 { out.push(low) } else { out.extend_from_slice(&[low | 0x80, high]) }
}

/// Two bytes at most: no count is over a page.
fn take_count(left: &mut &[u8]) -> Result<usize, Malformed> {
    let mut take = || left.split_off_first().copied().map(usize::from).ok_or(BAD);
    let low = take()?;
    if low & 0x80 == 0 {
        return Ok(low);
    }
    let high = take()?;
    if high == 0 || high & 0x80 != 0 { Err(BAD) } else { Ok(low & 0x7f | high << 7) }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dice(u64);

    impl Dice {
        fn below(&mut self, end: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(self.0 >> 33).unwrap() % end
        }

        fn byte(&mut self) -> u8 {
            u8::try_from(self.below(256)).unwrap()
        }
    }

    fn patched(old: &[u8], new: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![9];
        let fits = put(&mut out, old, new);
        assert_eq!(out.remove(0), 9, "it appends");
        if !fits {
            assert!(out.is_empty());
            return None;
        }
        let mut page = old.to_vec();
        apply(&mut page, &out).unwrap();
        assert_eq!(page, new);
        Some(out)
    }

    #[test]
    fn any_change_comes_back_and_small_ones_are_small() {
        let mut dice = Dice(7);
        let old: Vec<u8> = (0..PAGE_BYTES).map(|_| dice.byte()).collect();
        assert_eq!(patched(&old, &old), Some(vec![]));
        for round in 0..2_000 {
            let mut new = old.clone();
            for _ in 0..dice.below(40) {
                let at = dice.below(PAGE_BYTES);
                let end = PAGE_BYTES.min(at + 1 + dice.below(1 + round % 100));
                new[at..end].iter_mut().for_each(|byte| *byte = dice.byte());
            }
            let changed = old.iter().zip(&new).filter(|(old, new)| old != new).count();
            match patched(&old, &new) {
                Some(patch) => assert!(patch.len() <= 7 * changed, "{} bytes for {changed}", patch.len()),
                None => assert!(changed * WORD > MAX_PATCH_BYTES, "{changed} bytes changed"),
            }
        }
    }

    #[test]
    fn sizes_of_known_changes() {
        let old = vec![1; PAGE_BYTES];
        let with = |at: &[usize]| {
            let mut new = old.clone();
            at.iter().for_each(|at| new[*at] = 2);
            new
        };
        assert_eq!(patched(&old, &with(&[0])), Some(vec![0, 1, 2]));
        assert_eq!(patched(&old, &with(&[4095])), Some(vec![0xff, 0x1f, 1, 2]));
        assert_eq!(patched(&old, &with(&[1, 3])), Some(vec![1, 3, 2, 1, 2]));
        assert_eq!(patched(&old, &with(&[1, 6])), Some(vec![1, 1, 2, 4, 1, 2]));
        let line: Vec<usize> = (128..192).collect();
        assert_eq!(patched(&old, &with(&line)).unwrap().len(), 2 + 1 + 64);
        let scattered: Vec<usize> = (0..64).map(|n| n * 64).collect();
        assert_eq!(patched(&old, &with(&scattered)).unwrap().len(), 64 * 3);
        assert_eq!(patched(&old, &vec![2; PAGE_BYTES]), None);
        let many: Vec<usize> = (0..256).map(|n| n * 16).collect();
        assert_eq!(patched(&old, &with(&many)).unwrap().len(), 256 * 3);
    }

    #[test]
    fn what_is_no_patch_is_refused() {
        let apply = |patch: &[u8]| super::apply(&mut [0; PAGE_BYTES], patch);
        assert!(apply(&[0xff, 0x1f, 1, 7]).is_ok());
        for wrong in [
            &[0][..],
            &[0, 0],
            &[0, 1],
            &[0, 2, 7],
            &[0x80, 0x20, 1, 7],
            &[0xff, 0x1f, 2, 7, 7],
            &[0xff, 0x7f, 1, 7],
            &[0x80, 0x00, 1, 7],
            &[0x80, 0x80, 1, 7],
            &[0, 1, 7, 0x80],
            &[0, 1, 7, 1],
        ] {
            assert_eq!(apply(wrong), Err(BAD), "{wrong:?}");
        }
        let mut dice = Dice(3);
        for _ in 0..20_000 {
            let noise: Vec<u8> = (0..dice.below(40)).map(|_| dice.byte() & 0x8f).collect();
            apply(&noise).ok();
        }
    }
}
