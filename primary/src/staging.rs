//! Buffers that own a checkpoint's pages once the guest runs on (postponed memory transfer, the idea of PMT-Checkpointing: the
//! pause ends with a local copy, the network comes later).
//!
//! The arena adapts to the size of the state: a buffer grows to the largest checkpoint that it held and stays prefaulted; one that was
//! far too large for a long time is given back to the host. What is in flight is bounded, and whoever would go over the bound
//! waits *before* the pause.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use replication_proto::PageIndex;
use replication_proto::mutant::{self, Mutant};
use vmm::memory::NotRam;
use vmm::{DirtySet, GuestRam, PAGE_SIZE, PageNo};

/// After this many uses in a row that needed less than a quarter of a buffer, it shrinks.
const SHRINK_AFTER_USES: u32 = 1_000;

/// So many pages are copied by one thread at a time: some ten microseconds' work.
const PIECE_PAGES: usize = 64;

/// Does pieces of work, so many of them: alone, or with others.
pub type Share<'a> = &'a dyn Fn(usize, &(dyn Fn(usize) + Sync));

/// Without help.
pub fn alone(pieces: usize, work: &(dyn Fn(usize) + Sync)) {
    (0..pieces).for_each(work);
}

/// A bounded pool of page buffers.
#[derive(Debug)]
pub struct Arena {
    state: Mutex<State>,
    freed: Condvar,
    /// Most bytes of staged pages in flight.
    limit: usize,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Buffer>,
    in_flight: usize,
}

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The memory of the last use's list of pages.
    indexes: Vec<PageIndex>,
    roomy_uses: u32,
}

/// The pages of one checkpoint, owned. The buffer returns to its arena on drop.
#[derive(Debug)]
pub struct StagedPages {
    /// Which pages, each once: those that were copied first, ascending, then those that were placed later, ascending.
    pub indexes: Vec<PageIndex>,
    buffer: Buffer,
    used: usize,
    arena: Arc<Arena>,
}

impl Arena {
    /// An arena that holds at most `limit` bytes of pages in flight. One checkpoint may exceed it alone: then it is the only one.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), freed: Condvar::new(), limit })
    }

    /// Bytes in flight.
    pub fn in_flight(&self) -> usize {
        self.lock().in_flight
    }

    /// Waits until less than the limit is in flight, for at most `patience`. True when there is room.
    pub fn wait_for_room(&self, patience: Duration) -> bool {
        let state = self.lock();
        let (state, _) = self
            .freed
            .wait_timeout_while(state, patience, |s| s.in_flight >= self.limit)
            .unwrap_or_else(PoisonError::into_inner);
        state.in_flight < self.limit
    }

    /// Copies the pages of `dirty` out of the stopped guest, with the help of whoever has nothing to do in a pause.
    ///
    /// # Errors
    /// One of them is no RAM.
    pub fn stage(self: &Arc<Self>, ram: &GuestRam, dirty: &DirtySet, share: Share<'_>) -> Result<StagedPages, NotRam> {
        let mut staged = self.empty();
        staged.stage_over(ram, dirty, share)?;
        Ok(staged)
    }

    /// Copies these pages out of `ram`, of a guest that runs: a page that it writes meanwhile is dirty again.
    ///
    /// # Errors
    /// One of them is no RAM.
    pub fn stage_pages(self: &Arc<Self>, ram: &GuestRam, pages: &[PageNo]) -> Result<StagedPages, NotRam> {
        let mut staged = self.empty();
        staged.append(pages.len(), pages.iter().copied());
        staged.fill(ram, &alone)?;
        Ok(staged)
    }

    /// Copies the pages of `dirty` out of `ram` before the pause of their epoch: a page that the guest writes meanwhile is dirty again. There is room for
    /// `later` more of them, so that the pause need not make it.
    pub fn stage_early(
        self: &Arc<Self>,
        ram: &GuestRam,
        dirty: &DirtySet,
        later: usize,
    ) -> Result<StagedPages, NotRam> {
        let mut staged = self.empty();
        staged.buffer.make_room((dirty.len() + later) * PAGE_SIZE);
        staged.stage_over(ram, dirty, &alone)?;
        Ok(staged)
    }

    /// No pages yet.
    pub fn empty(self: &Arc<Self>) -> StagedPages {
        let mut buffer = self.lock().free.pop().unwrap_or_default();
        let mut indexes = std::mem::take(&mut buffer.indexes);
        indexes.clear();
        StagedPages { indexes, buffer, used: 0, arena: Arc::clone(self) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    fn make_room(&mut self, used: usize) {
        if self.bytes.len() < used {
            // A quarter more than asked: epochs of one guest differ a little, and growing zeroes the whole buffer.
            self.bytes.resize((used + used / 4).next_multiple_of(PAGE_SIZE), 0);
        }
    }

    fn note_use(&mut self, used: usize) {
        if used * 4 >= self.bytes.len() {
            self.roomy_uses = 0;
            return;
        }
        self.roomy_uses += 1;
        if self.roomy_uses >= SHRINK_AFTER_USES {
            self.bytes.truncate(self.bytes.len() / 2);
            self.bytes.shrink_to_fit();
            self.roomy_uses = 0;
        }
    }
}

impl StagedPages {
    /// Copies all pages in.
    fn fill(&mut self, ram: &GuestRam, share: Share<'_>) -> Result<(), NotRam> {
        let (pages, rest) = self.buffer.bytes[..self.used].as_chunks_mut::<PAGE_SIZE>();
        assert!(rest.is_empty() && pages.len() == self.indexes.len(), "a set of pages yields as many as it counts");
        if pages.len() <= PIECE_PAGES {
            return copy_out(ram, &self.indexes, pages);
        }
        let pieces = self.indexes.chunks(PIECE_PAGES).zip(pages.chunks_mut(PIECE_PAGES));
        let pieces: Vec<_> = pieces.map(|(indexes, pages)| Mutex::new((indexes, pages, Ok(())))).collect();
        share(pieces.len(), &|piece| {
            let mut piece = pieces[piece].lock().unwrap_or_else(PoisonError::into_inner);
            let (indexes, pages, done) = &mut *piece;
            *done = copy_out(ram, indexes, pages);
        });
        pieces.into_iter().try_for_each(|piece| piece.into_inner().unwrap_or_else(PoisonError::into_inner).2)
    }

    /// Adds pages whose content means nothing yet.
    fn append(&mut self, count: usize, pages: impl Iterator<Item = PageNo>) {
        let here = self.len();
        self.indexes.reserve(count);
        self.indexes.extend(pages.map(|page| PageIndex(page.0)));
        assert_eq!(self.len() - here, count, "a set of pages yields as many as it counts");
        self.make_room(here);
    }

    /// There were `here` pages, and there are more now.
    fn make_room(&mut self, here: usize) {
        let more = (self.indexes.len() - here) * PAGE_SIZE;
        self.used += more;
        self.arena.lock().in_flight += more;
        self.buffer.make_room(self.used);
        self.buffer.note_use(self.used);
    }

    /// Copies the pages of `dirty` out of `ram`, over the copies of those that are here already: the later copy counts. The guest is paused, and `share` lets others
    /// help; or it runs, and what it writes meanwhile is dirty again.
    pub fn stage_over(&mut self, ram: &GuestRam, dirty: &DirtySet, share: Share<'_>) -> Result<(), NotRam> {
        if self.is_empty() {
            self.append(dirty.len(), dirty.iter());
            return self.fill(ram, share);
        }
        let copied_before = self.len();
        for (page, slot) in self.place(dirty) {
            if slot < copied_before && mutant::is(Mutant::PrecopiedPageKept) {
                continue;
            }
            ram.copy_out(page, self.slot(slot))?;
        }
        Ok(())
    }

    /// Gives each page of `dirty` a slot of the buffer, ascending: the one that it has, or a new one, whose content means nothing yet.
    pub fn place(&mut self, dirty: &DirtySet) -> Vec<(PageNo, usize)> {
        let here = self.len();
        let mut slots = Vec::with_capacity(dirty.len());
        let mut at = 0;
        for page in dirty.iter() {
            while at < here && self.indexes[at].0 < page.0 {
                at += 1;
            }
            if at < here && self.indexes[at].0 == page.0 {
                slots.push((page, at));
            } else {
                slots.push((page, self.indexes.len()));
                self.indexes.push(PageIndex(page.0));
            }
        }
        self.make_room(here);
        slots
    }

    /// Where the copy of a page is, by its slot.
    pub fn slot(&mut self, slot: usize) -> &mut [u8; PAGE_SIZE] {
        &mut self.buffer.bytes.as_chunks_mut().0[slot]
    }

    /// The pages, one after another, in the order of `indexes`.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer.bytes[..self.used]
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.indexes.len()
    }

    /// True when the epoch dirtied nothing.
    pub fn is_empty(&self) -> bool {
        self.indexes.is_empty()
    }
}

/// Copies pages, ascending by their indexes, out of guest memory: neighbours at one go.
fn copy_out(ram: &GuestRam, indexes: &[PageIndex], pages: &mut [[u8; PAGE_SIZE]]) -> Result<(), NotRam> {
    let mut rest = pages;
    for run in indexes.chunk_by(|a, b| a.0 + 1 == b.0) {
        let (into, later) = rest.split_at_mut(run.len());
        rest = later;
        ram.copy_out_run(PageNo(run[0].0), into)?;
    }
    Ok(())
}

impl Drop for StagedPages {
    fn drop(&mut self) {
        self.buffer.indexes = std::mem::take(&mut self.indexes);
        let mut state = self.arena.lock();
        state.in_flight -= self.used;
        state.free.push(std::mem::take(&mut self.buffer));
        drop(state);
        self.arena.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(numbers: &[u64]) -> DirtySet {
        vmm::DirtyLedger::new().take(numbers.iter().map(|page| PageNo(*page)).collect())
    }

    fn pages(numbers: impl IntoIterator<Item = u64>) -> Vec<PageNo> {
        numbers.into_iter().map(PageNo).collect()
    }

    #[test]
    fn staged_pages_are_copies() {
        let ram = GuestRam::new(2 << 20).unwrap();
        ram.copy_in(PageNo(3), &[7; PAGE_SIZE]).unwrap();
        let staged = Arena::new(1 << 20).stage_pages(&ram, &pages([1, 3])).unwrap();
        ram.copy_in(PageNo(3), &[9; PAGE_SIZE]).unwrap();
        assert_eq!(staged.indexes, [PageIndex(1), PageIndex(3)]);
        assert_eq!(staged.bytes(), [[0; PAGE_SIZE], [7; PAGE_SIZE]].concat());
    }

    #[test]
    fn pages_of_many_pieces_and_runs_come_out_in_order() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let all: Vec<PageNo> = pages((0..1024).filter(|page| page % 5 != 0));
        for page in &all {
            ram.copy_in(*page, &[u8::try_from(page.0 % 251).unwrap(); PAGE_SIZE]).unwrap();
        }
        let staged = Arena::new(1 << 30).stage_pages(&ram, &all).unwrap();
        assert_eq!(staged.len(), all.len());
        for (page, bytes) in all.iter().zip(staged.bytes().chunks(PAGE_SIZE)) {
            assert!(bytes.iter().all(|byte| u64::from(*byte) == page.0 % 251), "page {page:?}");
        }
        assert_eq!(Arena::new(1 << 30).stage_pages(&ram, &pages(1000..1100)).unwrap_err().page, PageNo(1024));
    }

    #[test]
    fn a_page_that_is_staged_twice_counts_once_and_the_later_copy_counts() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let write = |page, byte| ram.copy_in(PageNo(page), &[byte; PAGE_SIZE]).unwrap();
        (0..6).for_each(|page| write(page, 1));
        let arena = Arena::new(1 << 20);
        let mut staged = arena.stage_early(&ram, &dirty(&[1, 3, 5]), 1).unwrap();
        assert_eq!(arena.in_flight(), 3 * PAGE_SIZE);
        (0..6).for_each(|page| write(page, 2));
        staged.stage_over(&ram, &dirty(&[0, 3, 4]), &alone).unwrap();
        assert_eq!(staged.indexes, [1, 3, 5, 0, 4].map(PageIndex));
        let first: Vec<u8> = staged.bytes().iter().step_by(PAGE_SIZE).copied().collect();
        assert_eq!(first, [1, 2, 1, 2, 2]);
        assert_eq!(arena.in_flight(), 5 * PAGE_SIZE);
        drop(staged);
        assert_eq!(arena.in_flight(), 0);
    }

    #[test]
    fn the_limit_is_waited_for_and_buffers_return() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let arena = Arena::new(2 * PAGE_SIZE);
        let first = arena.stage_pages(&ram, &pages([1, 2, 3])).unwrap();
        assert_eq!(arena.in_flight(), 3 * PAGE_SIZE);
        assert!(!arena.wait_for_room(Duration::from_millis(1)));
        drop(first);
        assert!(arena.wait_for_room(Duration::from_millis(1)));
        assert_eq!(arena.in_flight(), 0);
    }

    #[test]
    fn a_buffer_that_is_far_too_large_shrinks() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let arena = Arena::new(1 << 20);
        drop(arena.stage_pages(&ram, &pages(0..256)).unwrap());
        for _ in 0..SHRINK_AFTER_USES {
            drop(arena.stage_pages(&ram, &pages([1])).unwrap());
        }
        assert_eq!(arena.lock().free[0].bytes.len(), 160 * PAGE_SIZE);
    }
}
