//! Buffers that own a checkpoint's pages once the guest runs on (postponed memory transfer, the idea of PMT-Checkpointing: the
//! pause ends with a local copy, the network comes later).
//!
//! The arena adapts to the size of the state: a buffer grows to the largest checkpoint that it held and stays prefaulted; one that was
//! far too large for a long time is given back to the host. What is in flight is bounded, and whoever would go over the bound
//! waits *before* the pause.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use replication_proto::PageIndex;
use vmm::memory::NotRam;
use vmm::{DirtySet, GuestRam, PAGE_SIZE, PageNo, PausedVm};

/// After this many uses in a row that needed less than a quarter of a buffer, it shrinks.
const SHRINK_AFTER_USES: u32 = 1_000;

/// So many pages are copied by one thread at a time: some ten microseconds' work.
const PIECE_PAGES: usize = 64;

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
    /// Which pages, ascending.
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
    pub fn stage(self: &Arc<Self>, paused: &PausedVm<'_>, dirty: &DirtySet) -> Result<StagedPages, NotRam> {
        let mut staged = self.take(dirty.len());
        staged.indexes.extend(dirty.iter().map(|page| PageIndex(page.0)));
        staged.fill(paused.ram(), |pieces, work| paused.share_work(pieces, work))?;
        Ok(staged)
    }

    /// Copies these pages out of `ram`, of a guest that runs: a page that it writes meanwhile is dirty again.
    ///
    /// # Errors
    /// One of them is no RAM.
    pub fn stage_pages(self: &Arc<Self>, ram: &GuestRam, pages: &[PageNo]) -> Result<StagedPages, NotRam> {
        let mut staged = self.take(pages.len());
        staged.indexes.extend(pages.iter().map(|page| PageIndex(page.0)));
        staged.fill(ram, |pieces, work| (0..pieces).for_each(work))?;
        Ok(staged)
    }

    fn take(self: &Arc<Self>, pages: usize) -> StagedPages {
        let used = pages * PAGE_SIZE;
        let mut state = self.lock();
        state.in_flight += used;
        let mut buffer = state.free.pop().unwrap_or_default();
        drop(state);
        if buffer.bytes.len() < used {
            // A quarter more than asked: epochs of one guest differ a little, and growing zeroes the whole buffer.
            buffer.bytes.resize((used + used / 4).next_multiple_of(PAGE_SIZE), 0);
        }
        buffer.note_use(used);
        let mut indexes = std::mem::take(&mut buffer.indexes);
        indexes.clear();
        indexes.reserve(pages);
        StagedPages { indexes, buffer, used, arena: Arc::clone(self) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
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
    /// Copies the pages of `indexes` in.
    fn fill(&mut self, ram: &GuestRam, share: impl Fn(usize, &(dyn Fn(usize) + Sync))) -> Result<(), NotRam> {
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
