//! Sets of pages whose cost follows the pages in them and not the size of RAM: words of 64 pages, only those that are not empty.

use crate::memory::PageNo;

/// Pages of one word.
pub const WORD_PAGES: u64 = 64;

/// A set of pages, as words of 64 bits in ascending order, low bit first. A word's number is that of its first page divided by 64: regions of RAM begin and
/// end between words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageBits {
    words: Vec<(u64, u64)>,
}

impl PageBits {
    /// Adds 64 pages, those of the word `number`. Words are added in ascending order; an empty one is left out.
    ///
    /// # Panics
    /// `number` is not above all others.
    pub fn push(&mut self, number: u64, bits: u64) {
        assert!(self.words.last().is_none_or(|(last, _)| *last < number), "words are added in ascending order");
        if bits != 0 {
            self.words.push((number, bits));
        }
    }

    /// Adds a bitmap whose first bit is that of the page `first`, above all that is there.
    ///
    /// # Panics
    /// `first` is not the first page of a word, or not above all others.
    pub fn push_all(&mut self, first: PageNo, bitmap: &[u64]) {
        assert!(first.0.is_multiple_of(WORD_PAGES), "a bitmap begins with a word");
        let first = first.0 / WORD_PAGES;
        let (eights, rest) = bitmap.as_chunks::<8>();
        let mut number = first;
        for eight in eights {
            // Most of a large guest was not written: eight words are one look.
            if eight.iter().fold(0, |all, word| all | word) != 0 {
                (number..).zip(eight).for_each(|(number, word)| self.push(number, *word));
            }
            number += 8;
        }
        (number..).zip(rest).for_each(|(number, word)| self.push(number, *word));
    }

    /// The words: their numbers and bits, ascending.
    pub fn words(&self) -> &[(u64, u64)] {
        &self.words
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.words.iter().map(|(_, bits)| bits.count_ones() as usize).sum()
    }

    /// True when there is no page.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageNo> + '_ {
        self.words
            .iter()
            .flat_map(|(number, bits)| SetBits(*bits).map(move |bit| PageNo(number * WORD_PAGES + u64::from(bit))))
    }

    /// Adds all pages of another set.
    pub fn unite(&mut self, other: &Self) {
        if self.is_empty() {
            self.words.clone_from(&other.words);
        } else if !other.is_empty() {
            self.words = merge(&self.words, &other.words, |mine, theirs| mine | theirs);
        }
    }

    /// The pages of this set that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let words = merge(&self.words, &other.words, |mine, theirs| mine & !theirs);
        Self { words: words.into_iter().filter(|(_, bits)| *bits != 0).collect() }
    }

    /// Forgets all pages, and keeps the memory.
    pub fn clear(&mut self) {
        self.words.clear();
    }
}

impl FromIterator<PageNo> for PageBits {
    /// Pages in any order.
    fn from_iter<T: IntoIterator<Item = PageNo>>(pages: T) -> Self {
        let mut words: std::collections::BTreeMap<u64, u64> = std::collections::BTreeMap::new();
        for page in pages {
            *words.entry(page.0 / WORD_PAGES).or_default() |= 1 << (page.0 % WORD_PAGES);
        }
        Self { words: words.into_iter().collect() }
    }
}

/// Both lists as one, ascending; a word that is missing in one of them is empty there.
fn merge(mine: &[(u64, u64)], theirs: &[(u64, u64)], both: impl Fn(u64, u64) -> u64) -> Vec<(u64, u64)> {
    let mut merged = Vec::with_capacity(mine.len().max(theirs.len()));
    let (mut mine, mut theirs) = (mine.iter().peekable(), theirs.iter().peekable());
    loop {
        let number = match (mine.peek(), theirs.peek()) {
            (Some((m, _)), Some((t, _))) => *m.min(t),
            (Some((m, _)), None) => *m,
            (None, Some((t, _))) => *t,
            (None, None) => return merged,
        };
        let of = |side: &mut std::iter::Peekable<std::slice::Iter<'_, (u64, u64)>>| {
            side.next_if(|(at, _)| *at == number).map_or(0, |(_, bits)| *bits)
        };
        merged.push((number, both(of(&mut mine), of(&mut theirs))));
    }
}

/// Positions of the one bits of a word, ascending.
struct SetBits(u64);

impl Iterator for SetBits {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn of(pages: &BTreeSet<u64>) -> PageBits {
        pages.iter().map(|page| PageNo(*page)).collect()
    }

    fn pages(bits: &PageBits) -> BTreeSet<u64> {
        bits.iter().map(|page| page.0).collect()
    }

    proptest! {
        #[test]
        fn sets_of_pages_are_sets(a in prop::collection::btree_set(0u64..900, 0..80), b in prop::collection::btree_set(0u64..900, 0..80)) {
            let (mine, theirs) = (of(&a), of(&b));
            prop_assert_eq!(&pages(&mine), &a);
            prop_assert_eq!(mine.len(), a.len());
            let mut both = mine.clone();
            both.unite(&theirs);
            prop_assert_eq!(pages(&both), &a | &b);
            prop_assert_eq!(&both, &of(&(&a | &b)));
            prop_assert_eq!(mine.without(&theirs), of(&(&a - &b)));
        }

        #[test]
        fn a_bitmap_is_the_set_of_its_pages(words in prop::collection::vec(prop_oneof![Just(0u64), any::<u64>()], 0..40)) {
            let mut bits = PageBits::default();
            bits.push_all(PageNo(128), &words);
            let expected: BTreeSet<u64> = (0..words.len() * 64).filter(|at| words[at / 64] >> (at % 64) & 1 == 1).map(|at| 128 + at as u64).collect();
            prop_assert_eq!(pages(&bits), expected);
            prop_assert!(bits.words().iter().all(|(_, bits)| *bits != 0));
        }
    }

    #[test]
    #[should_panic(expected = "ascending")]
    fn words_out_of_order_are_a_programmers_error() {
        let mut bits = PageBits::default();
        bits.push(3, 1);
        bits.push(3, 2);
    }
}
