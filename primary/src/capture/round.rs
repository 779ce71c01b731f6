//! One set of write-protected pages on its way into buffers: who copies which page, and when. Pure.
//!
//! A copier goes through the set, runs of adjacent pages at a time; who wants to write a page that nobody has begun to copy has it copied first. Each page is
//! copied by one of them, once, before its first write. The copier owns the buffers, so what was copied for a writer is kept beside them until the end.

use std::ops::Range;
use std::sync::Arc;

use replication_proto::mutant::{self, Mutant};
use vmm::write_protect::PageRun;
use vmm::{PAGE_SIZE, PageNo};

/// A page, and the slot of the buffer that its copy belongs to.
pub type Placed = (PageNo, usize);

/// A page that was copied for somebody who wanted to write it.
pub type Rescued = (usize, Box<[u8; PAGE_SIZE]>);

/// See the module.
#[derive(Debug)]
pub struct Round {
    /// Ascending.
    pages: Arc<[Placed]>,
    /// Somebody copies it, or has copied it.
    begun: Vec<bool>,
    /// Before it everything is begun.
    next: usize,
    rescued: Vec<Rescued>,
}

impl Round {
    /// Nothing is copied yet.
    ///
    /// # Panics
    /// When the pages are not ascending.
    pub fn new(pages: Vec<Placed>) -> Self {
        assert!(pages.is_sorted_by(|a, b| a.0 < b.0), "each page once, in order");
        Self { begun: vec![false; pages.len()], pages: pages.into(), next: 0, rescued: Vec::new() }
    }

    /// The pages, ascending.
    pub fn pages(&self) -> &Arc<[Placed]> {
        &self.pages
    }

    /// Which pages the copier shall copy next: adjacent ones, at most `most`, as a part of [`Round::pages`]. `None`: all are begun, and those that were
    /// copied for writers are finished.
    pub fn next_run(&mut self, most: usize) -> Option<Range<usize>> {
        while self.begun.get(self.next) == Some(&true) {
            self.next += 1;
        }
        let first = self.next;
        let joins = |at: &usize| {
            let (page, _) = self.pages[*at];
            !self.begun[*at] && page.0 - self.pages[first].0.0 == (*at - first) as u64
        };
        let run = first..(first..self.pages.len()).take(most).take_while(joins).count() + first;
        self.begun[run.clone()].fill(true);
        self.next = run.end;
        (!run.is_empty()).then_some(run)
    }

    /// Somebody waits to write `page`. True: it was copied now, and may be written. False: it is not this round's, or somebody is at it, who lets it be
    /// written when that is done.
    ///
    /// # Errors
    /// Those of `copy`.
    pub fn wanted<E>(
        &mut self,
        page: PageNo,
        copy: impl FnOnce(&mut [u8; PAGE_SIZE]) -> Result<(), E>,
    ) -> Result<bool, E> {
        let Ok(at) = self.pages.binary_search_by_key(&page, |(page, _)| *page) else { return Ok(false) };
        if self.begun[at] || mutant::is(Mutant::WrittenBeforeCopied) {
            return Ok(false);
        }
        let mut copied = Box::new([0; PAGE_SIZE]);
        copy(&mut copied)?;
        self.begun[at] = true;
        self.rescued.push((self.pages[at].1, copied));
        Ok(true)
    }

    /// What was copied for writers.
    pub fn rescued(self) -> Vec<Rescued> {
        self.rescued
    }
}

/// Adjacent pages of a list as runs.
pub fn runs(pages: &[Placed]) -> impl Iterator<Item = PageRun> + '_ {
    pages.chunk_by(|a, b| a.0.0 + 1 == b.0.0).map(run_of)
}

/// Adjacent pages as a run.
pub fn run_of(adjacent: &[Placed]) -> PageRun {
    PageRun { first: adjacent[0].0, pages: adjacent.len() as u64 }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn placed(pages: &[u64]) -> Vec<Placed> {
        pages.iter().enumerate().map(|(slot, page)| (PageNo(*page), slot)).collect()
    }

    fn written(round: &mut Round, page: u64) -> bool {
        let Ok(copied) = round.wanted(PageNo(page), |into| {
            into[0] = 1;
            Ok::<_, Infallible>(())
        });
        copied
    }

    #[test]
    fn runs_are_adjacent_and_bounded() {
        let pages = placed(&[1, 2, 3, 7, 8, 20]);
        let all: Vec<_> = runs(&pages).map(|run| (run.first.0, run.pages)).collect();
        assert_eq!(all, [(1, 3), (7, 2), (20, 1)]);
        let mut round = Round::new(pages);
        let mut next = || round.next_run(2);
        assert_eq!([next(), next(), next(), next()], [Some(0..2), Some(2..3), Some(3..5), Some(5..6)]);
        assert_eq!(next(), None);
        assert_eq!(Round::new(Vec::new()).next_run(8), None);
    }

    #[test]
    fn a_writer_is_served_before_the_copier_comes_and_not_after() {
        let mut round = Round::new(placed(&[1, 2, 3, 4]));
        assert!(written(&mut round, 3));
        assert!(!written(&mut round, 3), "it may be written already");
        assert!(!written(&mut round, 9), "not of this round");
        assert_eq!(round.next_run(8), Some(0..2));
        assert!(!written(&mut round, 1), "the copier is at it");
        assert_eq!(round.next_run(8), Some(3..4));
        assert_eq!(round.next_run(8), None);
        let rescued = round.rescued();
        assert_eq!((rescued.len(), rescued[0].0, rescued[0].1[0]), (1, 2, 1));
    }

    /// Whatever the order of things, each page is copied once.
    #[test]
    fn each_page_is_copied_once() {
        let mut state = 9u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 40
        };
        for _ in 0..500 {
            let pages: Vec<_> = (0..40).filter(|_| !noise().is_multiple_of(3)).collect();
            let mut round = Round::new(placed(&pages));
            let mut copies = vec![0; pages.len()];
            loop {
                if noise().is_multiple_of(2) {
                    written(&mut round, noise() % 40);
                } else if let Some(run) = round.next_run(1 + usize::try_from(noise() % 6).unwrap()) {
                    run.for_each(|at| copies[at] += 1);
                } else {
                    break;
                }
            }
            round.rescued().iter().for_each(|(slot, _)| copies[*slot] += 1);
            assert!(copies.iter().all(|n| *n == 1), "{copies:?}");
        }
    }
}
