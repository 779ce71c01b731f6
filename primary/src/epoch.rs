//! **The story of a checkpoint**, steps 1 to 9 of ARCHITECTURE.md's table; [`crate::link`] tells the rest, from the send to the release.

use std::sync::Arc;
use std::time::{Duration, Instant};

use failover::failpoint;
use replication_proto::{DiskChanges, Epoch};
use vmm::machine::{CaptureError, DirtyError, Machine, PauseError, RunError};
use vmm::memory::NotRam;
use vmm::{DirtySet, PauseTimings, PausedVm, Section, Tracking};

use crate::capture::precopy::Precopied;
use crate::capture::{Capture, CopyError, Copying, RunsOn};
use crate::disk::{DiskFailure, OwnerDisks};
use crate::link::Link;
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::output::Gate;
use crate::output::held::{HELD_SECTION, HELD_VERSION, HeldFrames};
use crate::pacer::Slow;
use crate::ram_digest::digest_section;
use crate::staging::{Arena, StagedPages};
use crate::verify::{HashError, Verifier};

/// One checkpoint, owned: nothing in it refers to guest memory.
#[derive(Debug)]
pub struct StagedCheckpoint {
    /// The epoch that it ends.
    pub epoch: Epoch,
    /// The pages dirtied in the epoch.
    pub pages: StagedPages,
    /// Machine state, and the frames that wait for this epoch.
    pub sections: Vec<Section>,
    /// What the guest changed on its disks in the epoch.
    pub disk: DiskChanges,
    /// Kept until the commit, which retires it; dropped earlier, it gives its pages back.
    pub dirty: DirtySet,
    /// When the guest ran on, or could have.
    pub resumed: Instant,
}

/// A checkpoint some of whose pages may still be in guest memory, where they are safe from the guest.
pub struct Captured {
    epoch: Epoch,
    copying: Copying,
    sections: Vec<Section>,
    disk: DiskChanges,
    resumed: Instant,
}

/// A pause that is over, or that ends when its owner says so; at the latest when it is dropped.
pub struct Pause<'m> {
    began: Instant,
    parts: PauseParts,
    /// The guest waits for the commit.
    stopped: Option<PausedVm<'m>>,
}

/// What a checkpoint needs besides the machine.
pub struct EpochParts {
    /// Where the guest's outputs wait.
    pub gate: Arc<Gate>,
    /// Where its pages are staged.
    pub arena: Arc<Arena>,
    /// Where inbound frames are told to.
    pub mirror: Arc<Mirror>,
    /// Where the time goes.
    pub metrics: Arc<Metrics>,
    /// Whether each checkpoint carries a digest of all of RAM.
    pub ram_digest: bool,
    /// What is done about pages that are written in most epochs.
    pub tracking: Tracking,
    /// Most of its time that a base is copied in: a share.
    pub base_share: f64,
    /// The comparison of both sides that is under way, if any.
    pub verifier: Arc<Verifier>,
    /// The machine's disks.
    pub disks: Arc<OwnerDisks>,
    /// How pages come out of the guest.
    pub capture: Capture,
}

/// What the guest does after a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It runs on.
    RunsOn,
    /// It stays stopped: the last checkpoint of a planned switchover.
    StaysStopped,
}

/// Why a checkpoint was given up. Its dirty pages went back to the ledger, its outputs stay held.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The link to the backup is gone.
    #[error("the link to the backup is gone")]
    LinkLost,
    /// This side lost the right to run.
    #[error("this side was fenced")]
    Fenced,
    /// The guest could not be stopped.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Its state could not be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The dirty log could not be read.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The dirty log named a page that is not RAM.
    #[error(transparent)]
    NotRam(#[from] NotRam),
    /// The pages could not be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// A disk of this side failed: the backup's may differ from it.
    #[error(transparent)]
    Disk(#[from] DiskFailure),
    /// A disk could not be read to be sent.
    #[error("a disk cannot be read to be sent: {0}")]
    DiskRead(std::io::Error),
    /// Somebody else opened the same image.
    #[error("another process opened the same disk image: each side needs one of its own")]
    SharedDisk,
    /// What was to be compared could not be read.
    #[error(transparent)]
    Verify(#[from] HashError),
    /// The guest could not be resumed.
    #[error(transparent)]
    Resume(#[from] RunError),
    /// Link or backup could not keep up for so long that protection is to end.
    #[error("overloaded: the {} could not keep up for {lasted:.1?}", slow.word())]
    Overloaded {
        /// What could not.
        slow: Slow,
        /// For how long.
        lasted: Duration,
    },
    /// The backup could never hold a checkpoint of this size.
    #[error("epoch {epoch} dirtied {bytes} bytes, more than the {limit} that the backup takes")]
    TooLarge {
        /// The epoch.
        epoch: Epoch,
        /// Its size.
        bytes: usize,
        /// `limits.inbox`.
        limit: usize,
    },
}

/// Waits until the backup has committed an epoch, or nobody can wait for that any more.
pub type AwaitCommit<'a> = dyn FnMut(Epoch) + 'a;

/// Ends `epoch` with a checkpoint and hands it to `link`.
///
/// # Errors
/// See [`CheckpointError`]; the guest runs on in every case but a failed resume.
pub fn checkpoint(
    machine: &mut dyn Machine,
    parts: &EpochParts,
    link: &Link,
    (epoch, afterwards): (Epoch, Afterwards),
    await_commit: &mut AwaitCommit<'_>,
) -> Result<PauseParts, CheckpointError> {
    ready(parts, link)?;
    // Before the pause, where that pays: pages are copied whose dirty bits were cleared first. They are part of this epoch, whatever happens.
    let early = parts.capture.precopy(machine, &parts.arena)?;
    let (captured, pause) = stage(machine, parts, early, epoch, afterwards)?;
    let staged = captured.finish(parts)?;
    let pages = staged.pages.len();
    link.check_size(epoch, staged.weight())?;
    // 8, 9. Encode and send, on the link's own thread.
    link.send(staged)?;
    // 7, late: with `stop-and-copy` the guest has waited until here, and waits for the commit.
    if pause.waits() {
        await_commit(epoch);
    }
    let pause = pause.end()?;
    parts.metrics.paused(&pause, pages);
    Ok(pause)
}

/// The same for the checkpoint that ends a base which was begun on `link`. Its commit is never waited for: what comes before it on the link takes long,
/// and nothing is held for it.
///
/// # Errors
/// As [`checkpoint`].
pub fn checkpoint_base(
    machine: &mut dyn Machine,
    parts: &EpochParts,
    link: &Link,
    epoch: Epoch,
    afterwards: Afterwards,
) -> Result<(), CheckpointError> {
    ready(parts, link)?;
    let (captured, pause) = stage(machine, parts, None, epoch, afterwards)?;
    let pause = pause.end()?;
    let staged = captured.finish(parts)?;
    parts.metrics.paused(&pause, staged.pages.len());
    link.check_size(epoch, staged.weight())?;
    link.end_base(staged)
}

/// 1. The epoch may end only while what is in flight is within its limits, and while the disks' record is whole.
fn ready(parts: &EpochParts, link: &Link) -> Result<(), CheckpointError> {
    if let Some(failure) = parts.disks.take_failure() {
        return Err(failure.into());
    }
    link.wait_for_room(&parts.arena)
}

/// How long each part of a pause took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseParts {
    /// What the machine did itself: stop, capture, dirty log, resume.
    pub machine: PauseTimings,
    /// Sealing outputs.
    pub seal: Duration,
    /// Copying pages out.
    pub stage: Duration,
    /// From before the stop until after the resume.
    pub whole: Duration,
}

/// Steps 2 to 7: everything that happens while the guest is paused. `early`: what was copied before.
///
/// # Errors
/// As [`checkpoint`].
pub fn stage<'m>(
    machine: &'m mut dyn Machine,
    parts: &EpochParts,
    early: Option<Precopied>,
    epoch: Epoch,
    afterwards: Afterwards,
) -> Result<(Captured, Pause<'m>), CheckpointError> {
    // 2. Stop the vCPUs exactly, quiesce devices, drain interrupts.
    failpoint!(EpochStop => return Err(PauseError::Stuck { vcpu: 0, waited: Duration::ZERO }.into()));
    let mut paused = PausedVm::pause(machine)?;
    failpoint!(EpochStopped);
    let began = paused.began();
    // 3. Outputs so far belong to this epoch; before resume, once.
    let sealing = Instant::now();
    if afterwards == Afterwards::StaysStopped {
        parts.gate.keep(epoch);
    }
    let held = parts.gate.seal(epoch).ok_or(CheckpointError::Fenced)?;
    let seal = sealing.elapsed();
    failpoint!(EpochSealed => return Err(CaptureError::Host { what: "state".into(), source: failpoint::injected() }.into()));
    let disk = parts.disks.seal(epoch);
    // 4. Machine state. May itself write guest memory, so it comes before the dirty set.
    let mut sections = paused.capture()?;
    failpoint!(EpochCaptured => return Err(DirtyError { call: "none", source: failpoint::injected() }.into()));
    // 5. Which pages were written, by the guest and by us; and those that are written in most epochs, whether they were in this one or not.
    let dirty = paused.take_dirty()?;
    failpoint!(EpochDirty => return Err(NotRam { page: vmm::PageNo(u64::MAX) }.into()));
    // 6. Copy them out, or protect them so that they are copied before they change. What is of an epoch is safe from the guest now.
    let staging = Instant::now();
    let runs_on = afterwards == Afterwards::RunsOn;
    let copying = parts.capture.copy(&paused, &parts.arena, dirty, early, runs_on)?;
    if parts.ram_digest {
        sections.push(digest_section(paused.ram())?);
    }
    sections.extend(parts.verifier.section(epoch, paused.ram())?);
    let stage = staging.elapsed();
    failpoint!(EpochStaged => return Err(RunError::Ended("a failpoint says so".into()).into()));
    // 7. The guest runs on, or waits for the commit. What follows happens beside it.
    let (machine, stopped) = match (afterwards, parts.capture.runs_on()) {
        (Afterwards::RunsOn, RunsOn::AtOnce) => (paused.resume()?, None),
        (Afterwards::RunsOn, RunsOn::WhenCommitted) => (PauseTimings::default(), Some(paused)),
        (Afterwards::StaysStopped, _) => (paused.stay_stopped(), None),
    };
    let resumed = Instant::now();
    failpoint!(EpochResumed => return Err(CheckpointError::LinkLost));
    sections.push(held_section(&held));
    let pause = PauseParts { machine, seal, stage, whole: resumed - began };
    Ok((Captured { epoch, copying, sections, disk, resumed }, Pause { began, parts: pause, stopped }))
}

impl Captured {
    /// 6, the rest: pages that were protected in the pause are copied. From here on nothing refers to guest memory.
    ///
    /// # Errors
    /// See [`CopyError`]: the guest may write everything, and the dirty set went back to the ledger.
    pub fn finish(self, parts: &EpochParts) -> Result<StagedCheckpoint, CopyError> {
        let Self { epoch, copying, sections, disk, resumed } = self;
        let (pages, dirty) = parts.capture.finish(copying)?;
        Ok(StagedCheckpoint { epoch, pages, sections, disk, dirty, resumed })
    }
}

impl Pause<'_> {
    /// Whether the guest waits for the commit.
    pub fn waits(&self) -> bool {
        self.stopped.is_some()
    }

    /// The guest runs on, if it does not already and is to at all. Says how long each part took.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn end(mut self) -> Result<PauseParts, RunError> {
        if let Some(paused) = self.stopped.take() {
            self.parts.machine = paused.resume()?;
            self.parts.whole = self.began.elapsed();
        }
        Ok(self.parts)
    }

    /// The guest goes on waiting when the guard is gone: whoever wanted that lets it run on.
    pub fn keep_waiting(mut self) {
        if let Some(paused) = self.stopped.take() {
            paused.stay_stopped();
        }
    }
}

impl StagedCheckpoint {
    /// Bytes of pages and disks.
    fn weight(&self) -> usize {
        self.pages.bytes().len() + self.disk.weight()
    }
}

fn held_section(held: &HeldFrames) -> Section {
    Section { kind: HELD_SECTION, version: HELD_VERSION, bytes: held.encode() }
}

/// How long [`checkpoint`] waits for room before it looks again whether the link still stands.
pub const ROOM_PATIENCE: Duration = Duration::from_millis(5);
