//! The bookkeeping of a dirty map, without its file: which bits are set, which are so on stable storage, and which may be cleared. Pure.
//!
//! A set bit is *unsure* until it is on stable storage. It is *held* when some change of its block may be in no epoch's log; otherwise its
//! *last* epoch is known, and when the other side holds that epoch durably the bit may go.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::blocks::BlockSet;
use super::{Epoch, Point};

/// Blocks whose bits lie in one sector of the file.
pub const BLOCKS_PER_SECTOR: u64 = 512 * 8;

/// A block that changed less than so many epochs ago keeps its bit: it will change again, and clearing it would cost a sync at that.
const QUIET_EPOCHS: u64 = 40;
/// Moving the base costs two syncs: it is worth it for so many bits,
const MANY_BLOCKS: usize = 256;
/// or for any bit after so many epochs.
const LAZY_EPOCHS: u64 = 400;

/// Bits and what is known of them, see the module.
#[derive(Clone, Debug)]
pub struct Book {
    bits: BlockSet,
    unsure: BTreeSet<u64>,
    /// Set for a change that has not begun.
    fresh: BTreeSet<u64>,
    last: BTreeMap<u64, Epoch>,
    /// Sectors of the file that are to be written.
    stale: BTreeSet<u64>,
    base: Option<Point>,
    newest: Epoch,
    look_at: Epoch,
}

impl Book {
    /// From what a file held: every bit in it is on stable storage, and held.
    pub fn new(bits: BlockSet, base: Option<Point>) -> Self {
        Self {
            bits,
            unsure: BTreeSet::new(),
            fresh: BTreeSet::new(),
            last: BTreeMap::new(),
            stale: BTreeSet::new(),
            base,
            newest: Epoch(0),
            look_at: Epoch(0),
        }
    }

    /// The set bits.
    pub fn bits(&self) -> &BlockSet {
        &self.bits
    }

    /// What blocks without a bit hold: their content at this point.
    pub fn base(&self) -> Option<Point> {
        self.base
    }

    /// Blocks are about to change. They may when [`Self::is_sure`] says so.
    pub fn announce(&mut self, blocks: Range<u64>) {
        for block in blocks {
            if self.set(block) {
                self.fresh.insert(block);
            } else if let Some(last) = self.last.get_mut(&block) {
                // Not cleared before the change that comes now.
                *last = (*last).max(self.newest);
            }
        }
    }

    /// Blocks may differ from the base for another reason than a change of ours.
    pub fn raise(&mut self, blocks: impl IntoIterator<Item = u64>) {
        for block in blocks {
            self.set(block);
            self.hold_one(block);
        }
    }

    fn set(&mut self, block: u64) -> bool {
        let new = self.bits.insert(block);
        if new {
            self.unsure.insert(block);
            self.stale.insert(block / BLOCKS_PER_SECTOR);
        }
        new
    }

    fn hold_one(&mut self, block: u64) {
        self.fresh.remove(&block);
        self.last.remove(&block);
    }

    /// Whether the bits of all of `blocks` are set on stable storage.
    pub fn is_sure(&self, blocks: Range<u64>) -> bool {
        self.bits.contains_range(blocks.clone()) && self.unsure.range(blocks).next().is_none()
    }

    /// Blocks change now, in an epoch whose log is kept, or in none. False, and nothing noted, when their bits are not sure.
    pub fn touch(&mut self, blocks: Range<u64>, epoch: Option<Epoch>) -> bool {
        if !self.is_sure(blocks.clone()) {
            return false;
        }
        for block in blocks {
            match epoch {
                None => self.hold_one(block),
                Some(epoch) => {
                    self.newest = self.newest.max(epoch);
                    if self.fresh.remove(&block) || self.last.contains_key(&block) {
                        let last = self.last.entry(block).or_insert(epoch);
                        *last = (*last).max(epoch);
                    }
                }
            }
        }
        true
    }

    /// The log ends: what was noted in it may never arrive.
    pub fn hold(&mut self) {
        self.fresh.clear();
        self.last.clear();
    }

    /// What is held travels with a synchronisation whose result the other side holds with `epoch`.
    pub fn cover(&mut self, epoch: Epoch) {
        for block in self.bits.iter() {
            if !self.fresh.contains(&block) {
                let last = self.last.entry(block).or_insert(epoch);
                *last = (*last).max(epoch);
            }
        }
        self.newest = self.newest.max(epoch);
        self.look_at = Epoch(0);
    }

    /// Whether moving the base to `durable`, which the other side holds on stable storage, is worth its syncs. Cheap most of the time.
    pub fn is_due(&mut self, durable: Point) -> bool {
        self.newest = self.newest.max(durable.epoch);
        let base = match self.base {
            Some(base) if base.generation == durable.generation => base.epoch,
            // Another generation than that of the base: after a synchronisation, once.
            Some(base) if base.generation > durable.generation => return false,
            _ => return true,
        };
        if durable.epoch <= base || durable.epoch < self.look_at {
            return false;
        }
        self.look_at = Epoch(durable.epoch.0.saturating_add(QUIET_EPOCHS / 2));
        let clearable = self.clearable(durable.epoch).count();
        clearable >= MANY_BLOCKS || clearable > 0 && durable.epoch.0 - base.0 >= LAZY_EPOCHS
    }

    fn clearable(&self, durable: Epoch) -> impl Iterator<Item = u64> + '_ {
        let quiet = move |last: Epoch| last.0.saturating_add(QUIET_EPOCHS) <= durable.0;
        self.last.iter().filter(move |(_, last)| quiet(**last)).map(|(block, _)| *block)
    }

    /// The base has moved, on stable storage, to what the other side holds durably; the image is synced at least that far. Bits go.
    pub fn base_moved(&mut self, durable: Point) {
        self.base = Some(durable);
        let gone: Vec<u64> = self.clearable(durable.epoch).filter(|block| !self.unsure.contains(block)).collect();
        for block in gone {
            self.last.remove(&block);
            self.clear(block);
        }
    }

    /// The base is another, on stable storage; bits stay.
    pub fn base_set(&mut self, base: Option<Point>) {
        self.base = base;
    }

    /// The image holds exactly this point, and the base says so on stable storage. All bits go but those of changes to come.
    pub fn reset(&mut self, point: Point) {
        self.base = Some(point);
        self.last.clear();
        let gone: Vec<u64> =
            self.bits.iter().filter(|block| !self.fresh.contains(block) && !self.unsure.contains(block)).collect();
        gone.into_iter().for_each(|block| self.clear(block));
        self.look_at = Epoch(0);
    }

    fn clear(&mut self, block: u64) {
        self.bits.remove(block);
        self.stale.insert(block / BLOCKS_PER_SECTOR);
    }

    /// Takes what is to be written: the numbers of sectors, and the blocks that are sure once they are written and synced.
    pub fn take_round(&mut self) -> (BTreeSet<u64>, BTreeSet<u64>) {
        (std::mem::take(&mut self.stale), self.unsure.clone())
    }

    /// Something was not, or perhaps not, written or synced: the sectors of a round, and all whose bits are not sure, are to be written again. A sync that succeeds
    /// later says nothing of what was written before it failed.
    pub fn round_failed(&mut self, sectors: BTreeSet<u64>) {
        self.stale.extend(sectors);
        self.stale.extend(self.unsure.iter().map(|block| block / BLOCKS_PER_SECTOR));
    }

    /// A round is on stable storage.
    pub fn round_done(&mut self, sure: &BTreeSet<u64>) {
        for block in sure {
            self.unsure.remove(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::disk::Generation;

    const BLOCKS: u64 = 6;

    /// What a block went through, remembered in full.
    #[derive(Clone, Debug, Default)]
    struct Naive {
        /// Epochs of changes in the log since the bit was set.
        logged: Vec<u64>,
        /// Some change may be in no log.
        held: bool,
        /// Announced and not changed since.
        coming: bool,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Change(u64),
        ChangeUnlogged(u64),
        Announce(u64),
        Seal(u64),
        Durable(u64),
        Hold,
        Cover,
        Raise(u64),
        Reset,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..BLOCKS).prop_map(Step::Change),
            1 => (0..BLOCKS).prop_map(Step::ChangeUnlogged),
            2 => (0..BLOCKS).prop_map(Step::Announce),
            6 => (1_u64..60).prop_map(Step::Seal),
            6 => (0_u64..80).prop_map(Step::Durable),
            1 => Just(Step::Hold),
            1 => Just(Step::Cover),
            1 => (0..BLOCKS).prop_map(Step::Raise),
            1 => Just(Step::Reset),
        ]
    }

    fn settle(book: &mut Book) {
        let (_, sure) = book.take_round();
        book.round_done(&sure);
    }

    fn point(epoch: u64) -> Point {
        Point { generation: Generation(1), epoch: Epoch(epoch) }
    }

    proptest! {
        /// A bit is cleared only if every change of its block since the bit was set is in an epoch that is durable over there, long ago.
        #[test]
        fn bits_are_cleared_when_everything_is_durable_and_only_then(steps in prop::collection::vec(step(), 1..120)) {
            let mut book = Book::new(BlockSet::none(BLOCKS), Some(point(0)));
            let mut naive = vec![Naive::default(); 6];
            let mut running = 1;
            for step in steps {
                let before = book.bits().clone();
                match step {
                    Step::Change(block) | Step::ChangeUnlogged(block) => {
                        let n = &mut naive[usize::try_from(block).unwrap()];
                        let logged = matches!(step, Step::Change(_));
                        book.announce(block..block + 1);
                        prop_assert_eq!(book.touch(block..block + 1, None), before.contains(block) && !book.unsure.contains(&block));
                        n.held |= before.contains(block) && !book.unsure.contains(&block);
                        settle(&mut book);
                        prop_assert!(book.touch(block..block + 1, logged.then_some(Epoch(running))));
                        n.coming = false;
                        if logged { n.logged.push(running) } else { n.held = true }
                    }
                    Step::Announce(block) => {
                        book.announce(block..block + 1);
                        settle(&mut book);
                        naive[usize::try_from(block).unwrap()].coming |= !before.contains(block);
                    }
                    Step::Seal(epochs) => running += epochs,
                    Step::Durable(behind) => {
                        let durable = running.saturating_sub(1 + behind);
                        if durable > 0 && book.is_due(point(durable)) {
                            book.base_moved(point(durable));
                        }
                        for block in 0..BLOCKS {
                            let n = &mut naive[usize::try_from(block).unwrap()];
                            if before.contains(block) && !book.bits().contains(block) {
                                prop_assert!(!n.held && !n.coming, "block {} is held", block);
                                prop_assert!(n.logged.iter().all(|e| e + QUIET_EPOCHS <= durable), "block {} at {}", block, durable);
                                *n = Naive::default();
                            }
                        }
                    }
                    Step::Hold => {
                        book.hold();
                        naive.iter_mut().for_each(|n| (n.held, n.coming) = (true, false));
                    }
                    Step::Cover => {
                        book.cover(Epoch(running));
                        for n in naive.iter_mut().filter(|n| !n.coming) {
                            n.held = false;
                            n.logged.push(running);
                        }
                    }
                    Step::Raise(block) => {
                        book.raise([block]);
                        settle(&mut book);
                        let n = &mut naive[usize::try_from(block).unwrap()];
                        // What was announced is forgotten: its change will find its bit gone, and set it again.
                        (n.held, n.coming) = (true, false);
                    }
                    Step::Reset => {
                        book.reset(point(running));
                        running += 1;
                        for (block, n) in (0..).zip(&mut naive) {
                            if !book.bits().contains(block) {
                                prop_assert!(!n.coming);
                                *n = Naive::default();
                            }
                        }
                    }
                }
                for (block, n) in (0..).zip(&naive) {
                    let changed = n.held || n.coming || !n.logged.is_empty();
                    prop_assert!(book.bits().contains(block) || !changed || matches!(step, Step::Hold | Step::Cover), "block {}", block);
                }
                // Nothing is known of blocks without a bit, and nothing need be.
                for (block, n) in (0..).zip(&mut naive) {
                    if !book.bits().contains(block) {
                        *n = Naive::default();
                    }
                }
            }
            // Not only safe: in the end everything goes.
            if naive.iter().any(|n| n.coming) {
                return Ok(());
            }
            book.cover(Epoch(running));
            let end = point(running + 10 * LAZY_EPOCHS);
            prop_assert!(book.bits().is_empty() || book.is_due(end));
            book.base_moved(end);
            prop_assert!(book.bits().is_empty());
        }
    }

    #[test]
    fn a_hot_block_keeps_its_bit_and_costs_no_sync() {
        let mut book = Book::new(BlockSet::none(BLOCKS), Some(point(1)));
        let mut moves = 0;
        for epoch in 2..4000 {
            book.announce(0..1);
            if epoch == 2 {
                settle(&mut book);
            }
            assert!(book.touch(0..1, Some(Epoch(epoch))), "epoch {epoch}");
            if book.is_due(point(epoch - 1)) {
                book.base_moved(point(epoch - 1));
                moves += 1;
            }
        }
        assert_eq!(moves, 0);
    }
}
