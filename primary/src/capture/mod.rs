//! How the dirty pages of a guest come into buffers of ours, and when it runs on.
//!
//! | strategy | in the pause | the guest runs on | then |
//! |---|---|---|---|
//! | `postponed` | pages are copied | at once | the copy is sent (postponed memory transfer, PMT-Checkpointing) |
//! | `stop-and-copy` | the same | when the backup has the checkpoint | (Kemari, and Remus in its first form) |
//! | `copy-on-write` | pages are write-protected | at once | they are copied, those that the guest wants to write first; then sent (HotSnap) |
//! | `auto` | one or the other | at once | see [`choice`] |
//!
//! Before each of them, [`precopy`] may copy pages while the guest still runs, so that the pause has to do only with those that were written again.
//! Both sets belong to the epoch: they are retired together, or given back together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use failover::config::{CaptureStrategy, Precopy};
use failover::status::CaptureStatus;
use replication_proto::mutant::{self, Mutant};
use vmm::machine::DirtyError;
use vmm::memory::NotRam;
use vmm::write_protect::WriteProtectError;
use vmm::{DirtySet, GuestRam, Machine, PausedVm};

use crate::staging::{Arena, Share, StagedPages};

pub mod choice;
pub mod hold;
pub mod in_pause;
mod lately;
pub mod on_write;
pub mod precopy;
pub mod round;

use precopy::{Precopied, PrecopyPolicy, Sample};

/// Why pages could not be copied. Both sets of the epoch have gone back to the ledger.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The dirty log could not be read before the pause.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The dirty log named a page that is not RAM.
    #[error(transparent)]
    NotRam(#[from] NotRam),
    /// Guest memory could not be write-protected, or not be let go again as it should.
    #[error(transparent)]
    Protect(#[from] WriteProtectError),
}

/// When a guest runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunsOn {
    /// As soon as its pages are safe.
    AtOnce,
    /// When the backup has the checkpoint, or nobody can wait for that any more.
    WhenCommitted,
}

/// What there is to do in a pause.
pub struct Job<'a> {
    /// The guest's memory, which nobody writes now.
    pub ram: &'a GuestRam,
    /// Who helps to copy.
    pub share: Share<'a>,
    /// Where copies go.
    pub arena: &'a Arc<Arena>,
    /// The pages to copy.
    pub dirty: &'a DirtySet,
    /// Copies made before the pause. A page that is in `dirty`, too, is copied again, and the later copy counts.
    pub early: Option<StagedPages>,
    /// Whether the guest runs on at all.
    pub runs_on: bool,
}

/// Pages on their way into buffers.
pub enum Pending {
    /// They are there, or were.
    Copied(StagedPages),
    /// They are safe from the guest, and are copied while it runs.
    Beside(Box<dyn Beside>),
}

/// Pages that are copied while the guest runs. Dropping it unfinished lets the guest write all of them.
pub trait Beside: Send {
    /// Copies the rest. Returns the copies, and how many of them were made because the guest wanted to write the page.
    ///
    /// # Errors
    /// See [`CopyError`]; the guest may write everything.
    fn finish(self: Box<Self>) -> Result<(StagedPages, usize), CopyError>;
}

/// What came of one capture, for strategies that learn.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Pages that the pause had to do with.
    pub pages: usize,
    /// What that took of the pause.
    pub took: Duration,
    /// Of the pages, those that the guest wanted to write before they were copied; `None`: they were copied in the pause.
    pub written: Option<usize>,
}

/// A strategy: how the dirty pages of a stopped guest come into buffers, and when it runs on.
pub trait Strategy: Send {
    /// Its name, as in the configuration.
    fn name(&self) -> &'static str;

    /// Before the pause: whatever can be made ready while the guest runs.
    ///
    /// # Errors
    /// See [`CopyError`].
    fn prepare(&mut self, ram: &Arc<GuestRam>) -> Result<(), CopyError>;

    /// In the pause: makes the pages safe from the guest, which may write its memory when this returned.
    ///
    /// # Errors
    /// See [`CopyError`].
    fn capture(&mut self, job: Job<'_>) -> Result<Pending, CopyError>;

    /// When the guest runs on.
    fn runs_on(&self) -> RunsOn;

    /// What came of it.
    fn learn(&mut self, outcome: &Outcome);
}

/// What one side captures its guest with.
pub struct Capture {
    inside: Mutex<Inside>,
}

struct Inside {
    strategy: Box<dyn Strategy>,
    precopy: PrecopyPolicy,
    status: CaptureStatus,
}

/// Pages of an epoch that are safe from the guest. Dropped unfinished, everything is given back.
pub struct Copying {
    pending: Pending,
    dirty: DirtySet,
    epoch: Sample,
    took: Duration,
}

impl Capture {
    /// As configured.
    pub fn new(strategy: CaptureStrategy, precopy: Precopy) -> Self {
        let strategy: Box<dyn Strategy> = match strategy {
            CaptureStrategy::Postponed => Box::new(in_pause::Postponed),
            CaptureStrategy::StopAndCopy => Box::new(in_pause::StopAndCopy),
            CaptureStrategy::CopyOnWrite => Box::new(on_write::CopyOnWrite::default()),
            CaptureStrategy::Auto => Box::new(choice::Auto::new()),
        };
        Self::with(strategy, precopy)
    }

    /// With a strategy of the caller's.
    pub fn with(strategy: Box<dyn Strategy>, precopy: Precopy) -> Self {
        let (name, mode) = (strategy.name().into(), precopy.word().into());
        let status = CaptureStatus { strategy: name, precopy: mode, ..CaptureStatus::default() };
        Self { inside: Mutex::new(Inside { strategy, precopy: PrecopyPolicy::new(precopy), status }) }
    }

    /// Before the pause, while the guest runs: makes the strategy ready, and copies pages ahead if that pays. Their dirty bits are cleared before
    /// they are copied, and from then on they are part of the epoch that ends next.
    ///
    /// # Errors
    /// See [`CopyError`].
    pub fn precopy(&self, machine: &mut dyn Machine, arena: &Arc<Arena>) -> Result<Option<Precopied>, CopyError> {
        let inside = &mut *self.lock();
        inside.strategy.prepare(machine.ram())?;
        if !inside.precopy.wants() {
            return Ok(None);
        }
        let dirty = machine.take_cold_dirty()?;
        let pages = arena.stage_early(machine.ram(), &dirty, inside.precopy.expects())?;
        Ok(Some(Precopied { pages, dirty }))
    }

    /// In the pause: makes the pages of `dirty`, and those that were copied before, safe from the guest.
    ///
    /// # Errors
    /// See [`CopyError`].
    pub fn copy(
        &self,
        paused: &PausedVm<'_>,
        arena: &Arc<Arena>,
        dirty: DirtySet,
        early: Option<Precopied>,
        runs_on: bool,
    ) -> Result<Copying, CopyError> {
        let inside = &mut *self.lock();
        let began = Instant::now();
        let late = dirty.len();
        let (early, early_dirty) = early.map(|Precopied { pages, dirty }| (pages, dirty)).unzip();
        let precopied = early.as_ref().map(StagedPages::len);
        let share: Share<'_> = &|pieces, work| paused.share_work(pieces, work);
        let job = Job { ram: paused.ram(), share, arena, dirty: &dirty, early, runs_on };
        let pending = inside.strategy.capture(job)?;
        let took = began.elapsed();
        let dirty = match early_dirty {
            Some(early) if mutant::is(Mutant::PrecopyRetired) => {
                early.retire();
                dirty
            }
            Some(early) => early.united(dirty),
            None => dirty,
        };
        let epoch = Sample { all: dirty.len(), late, precopied, took };
        Ok(Copying { pending, dirty, epoch, took })
    }

    /// After the pause: copies what was left, and learns. The pages own their bytes, and the set has them all.
    ///
    /// # Errors
    /// See [`CopyError`].
    pub fn finish(&self, copying: Copying) -> Result<(StagedPages, DirtySet), CopyError> {
        let Copying { pending, dirty, epoch, took } = copying;
        let (pages, written) = match pending {
            Pending::Copied(pages) => (pages, None),
            Pending::Beside(beside) => beside.finish().map(|(pages, written)| (pages, Some(written)))?,
        };
        let inside = &mut *self.lock();
        inside.precopy.learn(&epoch, written.is_none());
        inside.strategy.learn(&Outcome { pages: epoch.late, took, written });
        inside.count(&epoch, written);
        Ok((pages, dirty))
    }

    /// When the guest runs on after a checkpoint.
    pub fn runs_on(&self) -> RunsOn {
        self.lock().strategy.runs_on()
    }

    /// What was done, for the status.
    pub fn status(&self) -> CaptureStatus {
        self.lock().status.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    fn count(&mut self, epoch: &Sample, written: Option<usize>) {
        let wide = |pages: usize| u64::try_from(pages).unwrap_or(u64::MAX);
        let status = &mut self.status;
        if let Some(precopied) = epoch.precopied {
            status.precopied_epochs_total += 1;
            status.precopied_pages_total += wide(precopied);
            status.precopied_again_total += wide(epoch.again());
        }
        if let Some(written) = written {
            status.protected_epochs_total += 1;
            status.protected_pages_total += wide(epoch.late);
            status.copied_on_write_total += wide(written);
        }
        status.precopies = epoch.precopied.is_some();
        status.protects = written.is_some();
    }
}
