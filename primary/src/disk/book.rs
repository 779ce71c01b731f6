//! The bookkeeping of a dirty map, without its file: which bits are set, which are so on stable storage, and which may be cleared. Pure.
//!
//! A set bit is *unsure* until it is on stable storage. It is *held* when some change of its block may be in no epoch's log; otherwise its
//! *last* epoch is known, and when the other side holds that epoch durably the bit may go.
//!
//! When it goes is a matter of time, not of epochs, of which a second may have a thousand or none.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use super::blocks::BlockSet;
use super::{Epoch, Point};

/// Blocks whose bits lie in one sector of the file.
pub const BLOCKS_PER_SECTOR: u64 = 512 * 8;

/// A block that changed a shorter time ago keeps its bit: it will change again, and clearing it would cost a sync at that.
pub const QUIET: Duration = Duration::from_secs(1);
/// Moving the base costs two syncs: it is worth it for so many bits (64 MiB, of which a synchronisation would compare every block),
const MANY_BLOCKS: usize = 1024;
/// or when some bit could have gone for so long.
const LAZY: Duration = Duration::from_secs(10);

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
    looks: Looks,
}

/// When it was looked what may be cleared, and what was durable then.
#[derive(Clone, Debug, Default)]
struct Looks {
    /// The other side held this on stable storage at the last look.
    last: Option<(Duration, Epoch)>,
    /// And this at the one before: blocks that did not change since are quiet.
    quiet: Epoch,
    /// Since this look something could be cleared and was not.
    waiting: Option<Duration>,
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
            looks: Looks::default(),
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
    }

    /// Whether moving the base to `durable`, which the other side holds on stable storage, is worth its syncs; asked at each such acknowledgement,
    /// `now` since any fixed moment. Cheap most of the time.
    pub fn is_due(&mut self, durable: Point, now: Duration) -> bool {
        self.newest = self.newest.max(durable.epoch);
        let other_generation = match self.base {
            Some(base) if base.generation > durable.generation => return false,
            Some(base) if base.generation == durable.generation && durable.epoch <= base.epoch => return false,
            Some(base) => base.generation < durable.generation,
            None => true,
        };
        // After a synchronisation the base moves at once.
        self.look(durable.epoch, now) || other_generation
    }

    /// Whether it is worth it for what is clearable.
    fn look(&mut self, durable: Epoch, now: Duration) -> bool {
        match self.looks.last {
            Some((at, _)) if now < at + QUIET => return false,
            Some((_, then)) => self.looks.quiet = then,
            None => {}
        }
        self.looks.last = Some((now, durable));
        let clearable = self.clearable(durable).take(MANY_BLOCKS).count();
        if clearable == 0 {
            self.looks.waiting = None;
            return false;
        }
        let waiting = *self.looks.waiting.get_or_insert(now);
        clearable >= MANY_BLOCKS || now >= waiting + LAZY
    }

    fn clearable(&self, durable: Epoch) -> impl Iterator<Item = u64> + '_ {
        // `durable` may be what an earlier look found.
        let until = durable.min(self.looks.quiet);
        self.last.iter().filter(move |(_, last)| **last <= until).map(|(block, _)| *block)
    }

    /// The base has moved, on stable storage, to what the other side holds durably; the image is synced at least that far. Bits go.
    pub fn base_moved(&mut self, durable: Point) {
        self.base = Some(durable);
        self.looks.waiting = None;
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
        self.looks = Looks::default();
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
        /// Epochs of changes in the log since the bit was set, and when they were made.
        logged: Vec<(u64, Duration)>,
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
        /// What is durable lags so many epochs behind.
        Durable(u64),
        Time(Duration),
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
            4 => (0_u64..1500).prop_map(|ms| Step::Time(Duration::from_millis(ms))),
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
            let (mut running, mut now) = (1, Duration::from_secs(50));
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
                        if logged { n.logged.push((running, now)) } else { n.held = true }
                    }
                    Step::Announce(block) => {
                        book.announce(block..block + 1);
                        settle(&mut book);
                        naive[usize::try_from(block).unwrap()].coming |= !before.contains(block);
                    }
                    Step::Seal(epochs) => running += epochs,
                    Step::Durable(behind) => {
                        let durable = running.saturating_sub(1 + behind);
                        // An acknowledgement that was on its way for longer than another is no worse for it.
                        if durable > 0 && book.is_due(point(running - 1), now) | book.is_due(point(durable), now) {
                            book.base_moved(point(durable));
                        }
                        for block in 0..BLOCKS {
                            let n = &mut naive[usize::try_from(block).unwrap()];
                            if before.contains(block) && !book.bits().contains(block) {
                                prop_assert!(!n.held && !n.coming, "block {} is held", block);
                                prop_assert!(n.logged.iter().all(|(e, at)| *e <= durable && *at + QUIET <= now), "block {} at {}", block, durable);
                                *n = Naive::default();
                            }
                        }
                    }
                    Step::Time(span) => now += span,
                    Step::Hold => {
                        book.hold();
                        naive.iter_mut().for_each(|n| (n.held, n.coming) = (true, false));
                    }
                    Step::Cover => {
                        book.cover(Epoch(running));
                        for n in naive.iter_mut().filter(|n| !n.coming) {
                            n.held = false;
                            n.logged.push((running, now));
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
            for _ in 0..40 {
                (running, now) = (running + 1, now + QUIET / 2);
                if book.is_due(point(running), now) {
                    book.base_moved(point(running));
                }
            }
            prop_assert!(book.bits().is_empty(), "{LAZY:?} and some looks are over");
        }
    }

    /// Epochs a second are no measure: the same block, at 40 a second and at 1,000.
    #[test]
    fn a_hot_block_keeps_its_bit_and_costs_no_sync() {
        for epoch_ms in [25, 1] {
            let mut book = Book::new(BlockSet::none(BLOCKS), Some(point(1)));
            for epoch in 2..40_000 {
                let now = Duration::from_millis(epoch * epoch_ms);
                // Each 0.9 s, that is.
                if epoch == 2 || epoch % (900 / epoch_ms) == 0 {
                    book.announce(0..1);
                    if epoch == 2 {
                        settle(&mut book);
                    }
                    assert!(book.touch(0..1, Some(Epoch(epoch))), "epoch {epoch}");
                }
                assert!(!book.is_due(point(epoch - 1), now), "epoch {epoch}");
            }
        }
    }

    #[test]
    fn quiet_blocks_go_soon_when_they_are_many_and_late_when_they_are_few() {
        let many = u64::try_from(MANY_BLOCKS).unwrap();
        for (blocks, seconds) in [(many, 1..=2), (many - 1, 11..=12)] {
            let mut book = Book::new(BlockSet::none(many), Some(point(1)));
            book.announce(0..blocks);
            settle(&mut book);
            assert!(book.touch(0..blocks, Some(Epoch(2))));
            let due = (0..).find(|ms| book.is_due(point(2 + ms), Duration::from_millis(*ms))).unwrap();
            assert!(seconds.contains(&due.div_ceil(1000)), "{blocks}: {due} ms");
            book.base_moved(point(2 + due));
            assert!(book.bits().is_empty());
        }
    }

    /// The thread that moves the base may be late, and what it was told of stale.
    #[test]
    fn a_late_move_clears_only_what_was_durable_when_it_was_ordered() {
        let mut book = Book::new(BlockSet::none(BLOCKS), Some(point(1)));
        for (block, epoch) in [(0, 2), (1, 7)] {
            book.announce(block..block + 1);
            settle(&mut book);
            assert!(book.touch(block..block + 1, Some(Epoch(epoch))));
        }
        for second in 0..20 {
            book.is_due(point(10 + second), Duration::from_secs(second));
        }
        book.base_moved(point(6));
        assert!(!book.bits().contains(0) && book.bits().contains(1));
    }
}
