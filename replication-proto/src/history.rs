//! Copies of pages that went over a connection, the same ones on both sides: what a patch is a patch of. A direct-mapped cache, so that both
//! sides agree on what it holds without a word. It lives as long as the connection.

use crate::ids::PageIndex;
use crate::limits::{MAX_HISTORY_PAGES, PAGE_BYTES};
use crate::ram::RamLayout;

const NONE: u64 = u64::MAX;

/// See the module.
pub(crate) struct PageHistory {
    ram: RamLayout,
    /// Which page's copy a slot holds.
    held: Vec<u64>,
    /// Memory that was never written is not there: the allocation is zeroed by the host when it is touched.
    copies: Vec<u8>,
}

impl PageHistory {
    /// Nothing yet; as much as the guest's memory, or as is allowed.
    pub(crate) fn new(ram: &RamLayout) -> Self {
        let slots = usize::try_from(ram.pages()).unwrap_or(usize::MAX).min(MAX_HISTORY_PAGES);
        Self { ram: ram.clone(), held: vec![NONE; slots], copies: vec![0; slots * PAGE_BYTES] }
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
}
