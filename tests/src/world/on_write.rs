//! `capture = "copy-on-write"` in a simulated world: the real bookkeeping, without userfaultfd. A write of the guest asks first, as the kernel does for a real
//! one, and the copier's steps are events of the world between which the guest runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use primary::capture::round::{Rescued, Round};
use primary::capture::{Beside, CopyError, Job, Outcome, Pending, RunsOn, Strategy, in_pause};
use primary::staging::StagedPages;
use vmm::{GuestRam, PAGE_SIZE, PageNo};

/// The pages of one machine that may not be written before they are copied.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<Option<Watched>>>);

struct Watched {
    round: Round,
    copied: Vec<Rescued>,
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, Option<Watched>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there are pages that wait to be copied, or for the end of their round.
    pub fn is_watching(&self) -> bool {
        self.lock().is_some()
    }

    /// Somebody is about to write a page.
    ///
    /// # Panics
    /// When it is not RAM.
    pub fn writes(&self, ram: &GuestRam, page: PageNo) {
        if let Some(watched) = &mut *self.lock() {
            watched.round.wanted(page, |into| ram.copy_out(page, into)).expect("a page of this RAM");
        }
    }

    /// The copier copies at most so many adjacent pages. False: nothing is left.
    ///
    /// # Panics
    /// When the pages are not RAM.
    pub fn step(&self, ram: &GuestRam, most: usize) -> bool {
        let mut watched = self.lock();
        let Some(Watched { round, copied }) = &mut *watched else { return false };
        let Some(run) = round.next_run(most) else { return false };
        for (page, slot) in &round.pages()[run] {
            let mut copy = Box::new([0; PAGE_SIZE]);
            ram.copy_out(*page, &mut copy).expect("a page of this RAM");
            copied.push((*slot, copy));
        }
        true
    }
}

/// The strategy.
pub struct SimOnWrite {
    watch: Watch,
    ram: Arc<GuestRam>,
}

impl SimOnWrite {
    /// For a machine that asks `watch` before it writes `ram`.
    pub fn new(watch: Watch, ram: Arc<GuestRam>) -> Self {
        Self { watch, ram }
    }
}

impl Strategy for SimOnWrite {
    fn name(&self) -> &'static str {
        "copy-on-write"
    }

    fn prepare(&mut self, _ram: &Arc<GuestRam>) -> Result<(), CopyError> {
        Ok(())
    }

    fn capture(&mut self, job: Job<'_>) -> Result<Pending, CopyError> {
        if !job.runs_on || job.dirty.is_empty() {
            return in_pause::copy(job);
        }
        let mut pages = job.early.unwrap_or_else(|| job.arena.empty());
        let round = Round::new(pages.place(job.dirty));
        let before = self.watch.lock().replace(Watched { round, copied: Vec::new() });
        assert!(before.is_none(), "a pause waits for the pages of the one before");
        Ok(Pending::Beside(Box::new(Unfinished {
            watch: self.watch.clone(),
            ram: self.ram.clone(),
            pages: Some(pages),
        })))
    }

    fn runs_on(&self) -> RunsOn {
        RunsOn::AtOnce
    }

    fn learn(&mut self, _outcome: &Outcome) {}
}

struct Unfinished {
    watch: Watch,
    ram: Arc<GuestRam>,
    pages: Option<StagedPages>,
}

impl Beside for Unfinished {
    fn finish(mut self: Box<Self>) -> Result<(StagedPages, usize), CopyError> {
        while self.watch.step(&self.ram, usize::MAX) {}
        let mut pages = self.pages.take().expect("finished once");
        let Watched { round, copied } = self.watch.lock().take().expect("its round");
        let rescued = round.rescued();
        for (slot, copy) in copied.iter().chain(&rescued) {
            pages.slot(*slot).copy_from_slice(&**copy);
        }
        Ok((pages, rescued.len()))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.pages.is_some() {
            *self.watch.lock() = None;
        }
    }
}
