//! The record of what the VMM itself wrote to guest memory, which no log of KVM's has.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use crate::memory::{PAGE_SHIFT, PageNo};
use crate::page_bits::{PageBits, WORD_PAGES};

/// One bit a page of a region, and one bit for each 64 of these: whoever takes the pages looks at what was written, not at all of RAM.
///
/// A writer sets a page's bit first and its word's bit then; who takes clears a word's bit first and the word then. So a page is either taken, or its word's bit
/// is set afterwards and it is taken next time.
#[derive(Debug, Default)]
pub struct OwnWrites {
    pages: Vec<AtomicU64>,
    words: Vec<AtomicU64>,
    len: usize,
}

impl OwnWrites {
    /// Takes the pages that were written since the last call. `first`: the region's first page.
    pub(crate) fn take(&self, first: PageNo, into: &mut PageBits) {
        let first = first.0 / WORD_PAGES;
        for (at, summary) in (0u64..).step_by(64).zip(&self.words) {
            // Mostly nothing, and a load is cheap.
            if summary.load(Ordering::Acquire) == 0 {
                continue;
            }
            let mut left = summary.swap(0, Ordering::AcqRel);
            while left != 0 {
                let number = at + u64::from(left.trailing_zeros());
                left &= left - 1;
                let bits = usize::try_from(number).ok().and_then(|number| self.pages.get(number));
                into.push(first + number, bits.map_or(0, |bits| bits.swap(0, Ordering::AcqRel)));
            }
        }
    }

    fn mark(&self, page: usize) {
        let Some(bits) = self.pages.get(page / 64) else { return };
        bits.fetch_or(1 << (page % 64), Ordering::AcqRel);
        if let Some(summary) = self.words.get(page / (64 * 64)) {
            summary.fetch_or(1 << (page / 64 % 64), Ordering::AcqRel);
        }
    }
}

impl NewBitmap for OwnWrites {
    fn with_len(len: usize) -> Self {
        let zeros = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let pages = zeros(len.div_ceil(64 << PAGE_SHIFT));
        Self { words: zeros(pages.len().div_ceil(64)), pages, len }
    }
}

impl<'a> WithBitmapSlice<'a> for OwnWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for OwnWrites {
    /// What lies beyond the region is ignored, as the library's own bitmap does.
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || offset >= self.len {
            return;
        }
        let last = offset.saturating_add(len - 1).min(self.len - 1);
        (offset >> PAGE_SHIFT..=last >> PAGE_SHIFT).for_each(|page| self.mark(page));
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset >> PAGE_SHIFT;
        offset < self.len
            && self.pages.get(page / 64).is_some_and(|bits| bits.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(bitmap: &OwnWrites) -> Vec<u64> {
        let mut bits = PageBits::default();
        bitmap.take(PageNo(1 << 20), &mut bits);
        bits.iter().map(|page| page.0 - (1 << 20)).collect()
    }

    #[test]
    fn every_page_that_a_write_touches_is_taken_once() {
        let bitmap = OwnWrites::with_len(10_000 << 12);
        bitmap.mark_dirty(4095, 2);
        bitmap.mark_dirty((9_999 << 12) + 4000, 96);
        bitmap.mark_dirty(5_000 << 12, 0);
        bitmap.slice_at(4_097 << 12).mark_dirty(0, 1);
        assert!(bitmap.dirty_at(0) && bitmap.dirty_at(4096) && !bitmap.dirty_at(8192));
        assert_eq!(taken(&bitmap), [0, 1, 4_097, 9_999]);
        assert_eq!(taken(&bitmap), [0; 0]);
        bitmap.mark_dirty(0, 1);
        assert_eq!(taken(&bitmap), [0]);
    }

    #[test]
    fn what_is_outside_is_ignored() {
        let bitmap = OwnWrites::with_len(3 << 12);
        bitmap.mark_dirty(3 << 12, 5);
        bitmap.mark_dirty((2 << 12) + 1, usize::MAX);
        assert_eq!(taken(&bitmap), [2]);
        assert!(!bitmap.dirty_at(3 << 12));
    }

    #[test]
    fn nothing_is_lost_between_writers_and_who_takes() {
        let bitmap = OwnWrites::with_len(8_192 << 12);
        let mut seen = vec![false; 8_192];
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..2)
                .map(|which| {
                    let bitmap = &bitmap;
                    scope.spawn(move || (which..8_192).step_by(2).for_each(|page| bitmap.mark_dirty(page << 12, 1)))
                })
                .collect();
            while !writers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                taken(&bitmap).into_iter().for_each(|page| seen[usize::try_from(page).unwrap()] = true);
            }
        });
        taken(&bitmap).into_iter().for_each(|page| seen[usize::try_from(page).unwrap()] = true);
        assert!(seen.iter().all(|seen| *seen));
    }
}
