//! Which pages the guest's memory has, and a set of them.

use crate::ids::PageIndex;
use crate::limits::{MAX_RAM_PAGES, MAX_RAM_RANGES, PAGE_INDEX_END};

/// Consecutive pages of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: u64,
}

/// A list of ranges is not a memory layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RamError {
    /// No range at all.
    #[error("no memory ranges")]
    Empty,
    /// Over [`MAX_RAM_RANGES`] or [`MAX_RAM_PAGES`].
    #[error("too many memory ranges or pages")]
    TooLarge,
    /// A range is empty or ends over [`PAGE_INDEX_END`].
    #[error("a memory range is empty or ends beyond 52 bits of address")]
    BadRange,
    /// A range starts before the end of the one in front of it.
    #[error("memory ranges overlap or are not ascending")]
    NotAscending,
}

/// The guest's memory: ascending ranges that do not overlap. Two sides match only if their ranges are equal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RamLayout {
    ranges: Vec<PageRange>,
    pages: u64,
}

impl RamLayout {
    /// Checks `ranges` and takes them.
    ///
    /// # Errors
    /// [`RamError`] says which rule of a layout is broken.
    pub fn new(ranges: Vec<PageRange>) -> Result<Self, RamError> {
        if ranges.is_empty() {
            return Err(RamError::Empty);
        }
        if ranges.len() > MAX_RAM_RANGES {
            return Err(RamError::TooLarge);
        }
        let (mut end, mut pages) = (0, 0);
        for range in &ranges {
            if range.first.0 < end {
                return Err(RamError::NotAscending);
            }
            end = range.first.0.checked_add(range.pages).ok_or(RamError::BadRange)?;
            if range.pages == 0 || end > PAGE_INDEX_END {
                return Err(RamError::BadRange);
            }
            pages += range.pages;
        }
        if pages > MAX_RAM_PAGES {
            return Err(RamError::TooLarge);
        }
        Ok(Self { ranges, pages })
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> &[PageRange] {
        &self.ranges
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether `page` is memory.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.position(page).is_some()
    }

    /// The how-manieth page of memory `page` is, or `None` outside of memory.
    pub fn position(&self, page: PageIndex) -> Option<u64> {
        let mut before = 0;
        for range in &self.ranges {
            match page.0.checked_sub(range.first.0) {
                None => return None,
                Some(offset) if offset < range.pages => return Some(before + offset),
                Some(_) => before += range.pages,
            }
        }
        None
    }
}

/// Set of pages of one layout. Emptying it costs as much as filling it did.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Vec<u64>,
    used_words: Vec<u32>,
    len: u64,
}

impl PageSet {
    pub(crate) fn new(ram: &RamLayout) -> Self {
        let words = usize::try_from(ram.pages().div_ceil(64)).expect("a bitmap of the guest's memory fits the host's");
        Self { words: vec![0; words], used_words: Vec::new(), len: 0 }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Adds the page at `position` (of [`RamLayout::position`]); false if it was there.
    pub(crate) fn insert(&mut self, position: u64) -> bool {
        let index = u32::try_from(position / 64).expect("positions are below 2^32 pages");
        let word = &mut self.words[index as usize];
        let bit = 1 << (position % 64);
        if *word & bit != 0 {
            return false;
        }
        if *word == 0 {
            self.used_words.push(index);
        }
        *word |= bit;
        self.len += 1;
        true
    }

    pub(crate) fn clear(&mut self) {
        for index in self.used_words.drain(..) {
            self.words[index as usize] = 0;
        }
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, pages: u64) -> PageRange {
        PageRange { first: PageIndex(first), pages }
    }

    #[test]
    fn a_layout_with_a_hole_knows_its_pages() {
        let ram = RamLayout::new(vec![range(0, 10), range(16, 4)]).unwrap();
        assert_eq!(ram.pages(), 14);
        let positions = [0, 9, 10, 15, 16, 19, 20, u64::MAX].map(|page| ram.position(PageIndex(page)));
        assert_eq!(positions, [Some(0), Some(9), None, None, Some(10), Some(13), None, None]);
    }

    #[test]
    fn wrong_layouts_are_named() {
        let layout = |ranges: &[PageRange]| RamLayout::new(ranges.to_vec()).err();
        assert_eq!(layout(&[]), Some(RamError::Empty));
        assert_eq!(layout(&[range(0, 0)]), Some(RamError::BadRange));
        assert_eq!(layout(&[range(1, u64::MAX)]), Some(RamError::BadRange));
        assert_eq!(layout(&[range(PAGE_INDEX_END, 1)]), Some(RamError::BadRange));
        assert_eq!(layout(&[range(5, 5), range(0, 5)]), Some(RamError::NotAscending));
        assert_eq!(layout(&[range(0, 5), range(4, 5)]), Some(RamError::NotAscending));
        assert_eq!(layout(&[range(0, MAX_RAM_PAGES + 1)]), Some(RamError::TooLarge));
        assert_eq!(layout(&vec![range(0, 1); MAX_RAM_RANGES + 1]), Some(RamError::TooLarge));
    }

    #[test]
    fn a_set_counts_each_page_once_and_empties() {
        let mut set = PageSet::new(&RamLayout::new(vec![range(0, 130)]).unwrap());
        assert!(set.insert(0) && set.insert(63) && set.insert(129) && !set.insert(63));
        assert_eq!(set.len(), 3);
        set.clear();
        assert_eq!(set.len(), 0);
        assert!(set.insert(63));
    }
}
