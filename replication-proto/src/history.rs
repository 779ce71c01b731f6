//! Copies of pages that went over a connection, the same ones on both sides: what a patch is a patch of. A direct-mapped cache, so that both
//! sides agree on what it holds without a word. It lives as long as the connection.
//!
//! The sender keeps book of what a copy was worth: one that never makes a patch costs both sides a copy and a comparison for nothing.

use crate::ids::PageIndex;
use crate::limits::{MAX_HISTORY_PAGES, PAGE_BYTES};
use crate::ram::RamLayout;

const NONE: u64 = u64::MAX;
/// Whole pages in a row after which a page's copy is given up.
const GIVEN_UP_AFTER: u8 = 2;
/// A page that was given up is tried again after so many.
const TRIED_AGAIN_AFTER: u8 = 32;

/// See the module.
pub(crate) struct PageHistory {
    ram: RamLayout,
    /// Which page's copy a slot holds.
    held: Vec<u64>,
    /// Memory that was never written is not there: the allocation is zeroed by the host when it is touched.
    copies: Vec<u8>,
    /// Whole pages in a row that were sent of the slot's page. Only the sender's.
    in_vain: Vec<u8>,
}

impl PageHistory {
    /// Nothing yet; as much as the guest's memory, or as is allowed.
    pub(crate) fn new(ram: &RamLayout) -> Self {
        let slots = usize::try_from(ram.pages()).unwrap_or(usize::MAX).min(MAX_HISTORY_PAGES);
        Self { ram: ram.clone(), held: vec![NONE; slots], copies: vec![0; slots * PAGE_BYTES], in_vain: vec![0; slots] }
    }

    /// The copy of `page`, if there is one.
    pub(crate) fn copy_of(&mut self, page: PageIndex) -> Option<&mut [u8]> {
        let slot = self.slot(page).filter(|slot| self.held[*slot] == page.0)?;
        Some(&mut self.copies[slot * PAGE_BYTES..][..PAGE_BYTES])
    }

    /// `page` went over the connection as a whole. What is no memory of the guest is for others to refuse.
    pub(crate) fn keep(&mut self, page: PageIndex, bytes: &[u8]) {
        if let Some(slot) = self.slot(page) {
            self.held[slot] = page.0;
            self.copies[slot * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(bytes);
        }
    }

    /// A copy made a patch.
    pub(crate) fn paid(&mut self, page: PageIndex) {
        if let Some(slot) = self.slot(page) {
            self.in_vain[slot] = 0;
        }
    }

    /// `page` is going to be sent as a whole: whether a copy may be worth its while. If not, the sender's is forgotten; the other side's is never
    /// used again.
    pub(crate) fn is_worth_keeping(&mut self, page: PageIndex) -> bool {
        let Some(slot) = self.slot(page) else { return false };
        if self.held[slot] != page.0 && self.in_vain[slot] <= GIVEN_UP_AFTER {
            // Another page's slot, or nobody's.
            self.in_vain[slot] = 0;
            return true;
        }
        self.in_vain[slot] = (self.in_vain[slot] + 1) % TRIED_AGAIN_AFTER;
        let worth = self.in_vain[slot] <= GIVEN_UP_AFTER;
        if !worth {
            self.held[slot] = NONE;
        }
        worth
    }

    fn slot(&self, page: PageIndex) -> Option<usize> {
        let slots = u64::try_from(self.held.len()).expect("a bounded number");
        Some(usize::try_from(self.ram.position(page)? % slots).expect("below a bounded number"))
    }
}

impl core::fmt::Debug for PageHistory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PageHistory").field("slots", &self.held.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::PageRange;

    #[test]
    fn a_slot_holds_the_page_that_came_last() {
        let most = u64::try_from(MAX_HISTORY_PAGES).unwrap();
        let far = PageIndex(1 << 30);
        let ranges = vec![PageRange { first: PageIndex(100), pages: most }, PageRange { first: far, pages: 4 }];
        let mut history = PageHistory::new(&RamLayout::new(ranges).unwrap());
        assert!(history.copy_of(PageIndex(100)).is_none());
        history.keep(PageIndex(100), &[1; PAGE_BYTES]);
        history.keep(PageIndex(101), &[2; PAGE_BYTES]);
        assert_eq!(history.copy_of(PageIndex(100)).unwrap()[0], 1);
        history.keep(far, &[3; PAGE_BYTES]);
        assert!(history.copy_of(PageIndex(100)).is_none(), "its slot was given away");
        assert_eq!((history.copy_of(far).unwrap()[9], history.copy_of(PageIndex(101)).unwrap()[9]), (3, 2));
        history.keep(PageIndex(99), &[4; PAGE_BYTES]);
        assert!(history.copy_of(PageIndex(99)).is_none(), "it is no memory");
    }

    #[test]
    fn a_copy_that_never_makes_a_patch_is_given_up_for_a_while() {
        let page = PageIndex(3);
        let ram = RamLayout::new(vec![PageRange { first: PageIndex(0), pages: 8 }]).unwrap();
        let mut history = PageHistory::new(&ram);
        let send = |history: &mut PageHistory| {
            let kept = history.is_worth_keeping(page);
            if kept {
                history.keep(page, &[1; PAGE_BYTES]);
            }
            assert_eq!(history.copy_of(page).is_some(), kept);
            kept
        };
        let sent: Vec<bool> = (0..100).map(|_| send(&mut history)).collect();
        assert_eq!(sent[..4], [true, true, true, false]);
        let kept = sent.iter().filter(|kept| **kept).count();
        assert!((6..=15).contains(&kept), "{kept} of 100");
        while !send(&mut history) {}
        history.paid(page);
        assert!(send(&mut history) && send(&mut history) && !send(&mut history), "a patch begins the count anew");
    }
}
