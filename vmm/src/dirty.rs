//! Which pages were written, and how the answer survives a failure.
//!
//! Reading KVM's log clears it, so from then on the only record of those writes is the [`DirtySet`] that was made from it. In
//! continuous replication that window lasts until the backup has *committed* the epoch, not until the bytes were sent. A set
//! therefore gives its pages back when it is dropped; only [`DirtySet::retire`], called on the commit, ends them. (The
//! discipline is Propolis's `RamOfferDiscipline` and Firecracker's `store_dirty_bitmap`, stretched to the acknowledgement.)

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::PageNo;
use crate::page_bits::PageBits;

/// Holds the pages that were handed back, until the next set takes them along.
#[derive(Debug, Default)]
pub struct DirtyLedger {
    returned: Mutex<PageBits>,
}

impl DirtyLedger {
    /// An empty ledger.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Makes the set of one interval: `written` (KVM's log and the VMM's own writes) united with all that earlier sets gave back.
    pub fn take(self: &Arc<Self>, written: PageBits) -> DirtySet {
        let mut bits = written;
        bits.unite(&std::mem::take(&mut *self.lock()));
        DirtySet { bits, ledger: Arc::clone(self), retired: false }
    }

    /// Forgets everything handed back: the whole of RAM is about to be copied anyway.
    pub fn clear(&self) {
        self.lock().clear();
    }

    /// True when no page waits to be taken along.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, PageBits> {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pages that were written in one interval. Dropping it gives them back to the ledger; [`DirtySet::retire`] ends them.
#[derive(Debug)]
#[must_use = "dropping a dirty set gives its pages back to the ledger"]
pub struct DirtySet {
    bits: PageBits,
    ledger: Arc<DirtyLedger>,
    retired: bool,
}

impl DirtySet {
    /// Number of pages.
    pub fn len(&self) -> usize {
        self.bits.len()
    }

    /// True when nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageNo> + '_ {
        self.bits.iter()
    }

    /// Both sets as one: they are retired together, or given back together.
    ///
    /// # Panics
    /// When they are of different machines.
    pub fn united(mut self, mut other: Self) -> Self {
        assert!(Arc::ptr_eq(&self.ledger, &other.ledger), "dirty sets of two machines");
        self.bits.unite(&other.bits);
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
            self.ledger.lock().unite(&self.bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    fn log(pages: &[u64]) -> PageBits {
        pages.iter().map(|page| PageNo(*page)).collect()
    }

    fn pages(set: &DirtySet) -> Vec<u64> {
        set.iter().map(|p| p.0).collect()
    }

    #[test]
    fn ledger_two_sources_are_united() {
        let ledger = DirtyLedger::new();
        let mut written = log(&[3, 64]);
        written.unite(&log(&[3, 1023]));
        let set = ledger.take(written);
        assert_eq!(pages(&set), [3, 64, 1023]);
        assert_eq!(set.len(), 3);
        set.retire();
        assert!(ledger.is_empty());
    }

    #[test]
    fn ledger_dropped_set_comes_back_with_the_next() {
        let ledger = DirtyLedger::new();
        drop(ledger.take(log(&[7])));
        drop(ledger.take(log(&[9])));
        let set = ledger.take(log(&[8]));
        assert_eq!(pages(&set), [7, 8, 9]);
    }

    #[test]
    fn united_sets_come_back_together_and_are_retired_together() {
        let ledger = DirtyLedger::new();
        let both = |a: &[u64], b: &[u64]| ledger.take(log(a)).united(ledger.take(log(b)));
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
        let ram = GuestRam::new(4 << 20).unwrap();
        let ledger = DirtyLedger::new();
        ram.copy_in(PageNo(5), &[1; 4096]).unwrap();
        let set = ledger.take(ram.take_own_writes());
        assert_eq!(pages(&set), [5]);
        set.retire();
        assert!(ledger.take(ram.take_own_writes()).is_empty());
    }
}
