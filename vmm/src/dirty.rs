//! Which pages were written, and how the answer survives a failure.
//!
//! Reading KVM's log clears it, so from then on the only record of those writes is the [`DirtySet`] that was made from it. In
//! continuous replication that window lasts until the backup has *committed* the epoch, not until the bytes were sent. A set
//! therefore gives its pages back when it is dropped; only [`DirtySet::retire`], called on the commit, ends them. (The
//! discipline is Propolis's `RamOfferDiscipline` and Firecracker's `store_dirty_bitmap`, stretched to the acknowledgement.)

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::{GuestRam, PageNo, RamRegion};

/// Bits of every region of RAM, in region order, one bit a page, low bit first.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bits {
    regions: Vec<RamRegion>,
    words: Vec<Vec<u64>>,
}

impl Bits {
    fn empty(regions: &[RamRegion]) -> Self {
        let words = regions.iter().map(|r| vec![0; words_for(r)]).collect();
        Self { regions: regions.to_vec(), words }
    }

    fn unite(&mut self, words: &[Vec<u64>]) {
        assert_eq!(words.len(), self.words.len(), "a bitmap of another machine");
        for (mine, theirs) in self.words.iter_mut().zip(words) {
            for (m, t) in mine.iter_mut().zip(theirs) {
                *m |= t;
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.words.iter().flatten().all(|w| *w == 0)
    }
}

fn words_for(region: &RamRegion) -> usize {
    usize::try_from(region.pages / 64).unwrap_or(usize::MAX)
}

/// Holds the pages that were handed back, until the next set takes them along.
#[derive(Debug)]
pub struct DirtyLedger {
    returned: Mutex<Bits>,
}

impl DirtyLedger {
    /// An empty ledger for this RAM.
    pub fn new(ram: &GuestRam) -> Arc<Self> {
        Arc::new(Self { returned: Mutex::new(Bits::empty(ram.regions())) })
    }

    /// Makes the set of one interval: `logs` (KVM's log and the VMM's own writes, words for each region) united with all that
    /// earlier sets gave back.
    pub fn take(self: &Arc<Self>, logs: &[&[Vec<u64>]]) -> DirtySet {
        let mut returned = self.lock();
        let regions = returned.regions.clone();
        let mut bits = std::mem::replace(&mut *returned, Bits::empty(&regions));
        drop(returned);
        for log in logs {
            bits.unite(log);
        }
        DirtySet { bits, ledger: Arc::clone(self), retired: false }
    }

    /// Forgets everything handed back: the whole of RAM is about to be copied anyway.
    pub fn clear(&self) {
        let mut returned = self.lock();
        let regions = returned.regions.clone();
        *returned = Bits::empty(&regions);
    }

    /// True when no page waits to be taken along.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Bits> {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pages that were written in one interval. Dropping it gives them back to the ledger; [`DirtySet::retire`] ends them.
#[derive(Debug)]
#[must_use = "dropping a dirty set gives its pages back to the ledger"]
pub struct DirtySet {
    bits: Bits,
    ledger: Arc<DirtyLedger>,
    retired: bool,
}

impl DirtySet {
    /// Number of pages.
    pub fn len(&self) -> usize {
        self.bits.words.iter().flatten().map(|w| w.count_ones() as usize).sum()
    }

    /// True when nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageNo> + '_ {
        self.bits.regions.iter().zip(&self.bits.words).flat_map(|(region, words)| {
            (0u64..).step_by(64).zip(words).filter(|(_, w)| **w != 0).flat_map(move |(base, word)| {
                SetBits(*word).map(move |bit| PageNo(region.first.0 + base + u64::from(bit)))
            })
        })
    }

    /// Both sets as one: they are retired together, or given back together.
    ///
    /// # Panics
    /// When they are of different machines.
    pub fn united(mut self, mut other: Self) -> Self {
        assert!(Arc::ptr_eq(&self.ledger, &other.ledger), "dirty sets of two machines");
        self.bits.unite(&other.bits.words);
        other.retired = true;
        self
    }

    /// The backup has committed these pages: they are done with.
    pub fn retire(mut self) {
        self.retired = true;
    }
}

impl Drop for DirtySet {
    fn drop(&mut self) {
        if !self.retired {
            self.ledger.lock().unite(&self.bits.words);
        }
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
    use super::*;

    fn ram() -> GuestRam {
        GuestRam::new(4 << 20).unwrap()
    }

    fn log(ram: &GuestRam, pages: &[u64]) -> Vec<Vec<u64>> {
        let mut bits = Bits::empty(ram.regions());
        for p in pages {
            bits.words[0][usize::try_from(p / 64).unwrap()] |= 1 << (p % 64);
        }
        bits.words
    }

    fn pages(set: &DirtySet) -> Vec<u64> {
        set.iter().map(|p| p.0).collect()
    }

    #[test]
    fn ledger_two_sources_are_united() {
        let ram = ram();
        let ledger = DirtyLedger::new(&ram);
        let set = ledger.take(&[&log(&ram, &[3, 64]), &log(&ram, &[3, 1023])]);
        assert_eq!(pages(&set), [3, 64, 1023]);
        assert_eq!(set.len(), 3);
        set.retire();
        assert!(ledger.is_empty());
    }

    #[test]
    fn ledger_dropped_set_comes_back_with_the_next() {
        let ram = ram();
        let ledger = DirtyLedger::new(&ram);
        drop(ledger.take(&[&log(&ram, &[7])]));
        drop(ledger.take(&[&log(&ram, &[9])]));
        let set = ledger.take(&[&log(&ram, &[8])]);
        assert_eq!(pages(&set), [7, 8, 9]);
    }

    #[test]
    fn united_sets_come_back_together_and_are_retired_together() {
        let ram = ram();
        let ledger = DirtyLedger::new(&ram);
        let both = |a, b| ledger.take(&[&log(&ram, a)]).united(ledger.take(&[&log(&ram, b)]));
        let set = both(&[7, 9], &[9, 70]);
        assert_eq!(pages(&set), [7, 9, 70]);
        drop(set);
        let set = both(&[1], &[]);
        assert_eq!(pages(&set), [1, 7, 9, 70]);
        set.retire();
        assert!(ledger.is_empty());
    }

    #[test]
    fn own_writes_reach_the_set() {
        let ram = ram();
        let ledger = DirtyLedger::new(&ram);
        ram.copy_in(PageNo(5), &[1; 4096]).unwrap();
        let set = ledger.take(&[&ram.take_own_writes()]);
        assert_eq!(pages(&set), [5]);
        set.retire();
        assert!(ledger.take(&[&ram.take_own_writes()]).is_empty());
    }
}
