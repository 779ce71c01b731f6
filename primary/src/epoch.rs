//! **The story of a checkpoint**, steps 1 to 9 of ARCHITECTURE.md's table; [`crate::link`] tells the rest, from the send to the release.

use std::sync::Arc;
use std::time::{Duration, Instant};

use failover::failpoint;
use replication_proto::{DiskChanges, Epoch};
use vmm::machine::{CaptureError, DirtyError, Machine, PauseError, RunError};
use vmm::memory::NotRam;
use vmm::{DirtySet, PauseTimings, PausedVm, Section, Tracking};

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
    /// When the guest ran on.
    pub resumed: Instant,
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

/// Ends `epoch` with a checkpoint and hands it to `link`.
///
/// # Errors
/// See [`CheckpointError`]; the guest runs on in every case but a failed resume.
pub fn checkpoint(
    machine: &mut dyn Machine,
    parts: &EpochParts,
    link: &Link,
    epoch: Epoch,
    afterwards: Afterwards,
) -> Result<PauseParts, CheckpointError> {
    let (staged, pause) = take(machine, parts, link, epoch, afterwards)?;
    // 8, 9. Encode and send, on the link's own thread.
    link.send(staged)?;
    Ok(pause)
}

/// The same for the checkpoint that ends a base which was begun on `link`.
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
    let (staged, _) = take(machine, parts, link, epoch, afterwards)?;
    link.end_base(staged)
}

/// Step 1, then [`stage`].
fn take(
    machine: &mut dyn Machine,
    parts: &EpochParts,
    link: &Link,
    epoch: Epoch,
    afterwards: Afterwards,
) -> Result<(StagedCheckpoint, PauseParts), CheckpointError> {
    // 1. The epoch may end only while what is in flight is within its limits, and while the disks' record is whole.
    if let Some(failure) = parts.disks.take_failure() {
        return Err(failure.into());
    }
    link.wait_for_room(&parts.arena)?;
    let (staged, pause) = stage(machine, parts, epoch, afterwards)?;
    parts.metrics.paused(&pause, staged.pages.len());
    link.check_size(epoch, staged.pages.bytes().len() + staged.disk.weight())?;
    Ok((staged, pause))
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

/// Steps 2 to 7: everything that happens while the guest is paused.
///
/// # Errors
/// As [`checkpoint`].
pub fn stage(
    machine: &mut dyn Machine,
    parts: &EpochParts,
    epoch: Epoch,
    afterwards: Afterwards,
) -> Result<(StagedCheckpoint, PauseParts), CheckpointError> {
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
    // 6. Copy them out; from here on nothing refers to guest memory.
    let staging = Instant::now();
    let pages = parts.arena.stage(&paused, &dirty)?;
    if parts.ram_digest {
        sections.push(digest_section(paused.ram())?);
    }
    sections.extend(parts.verifier.section(epoch, paused.ram())?);
    let stage = staging.elapsed();
    failpoint!(EpochStaged => return Err(RunError::Ended("a failpoint says so".into()).into()));
    // 7. The guest runs on. What follows happens beside it.
    let machine = match afterwards {
        Afterwards::RunsOn => paused.resume()?,
        Afterwards::StaysStopped => paused.stay_stopped(),
    };
    let resumed = Instant::now();
    failpoint!(EpochResumed => return Err(CheckpointError::LinkLost));
    sections.push(held_section(&held));
    let pause = PauseParts { machine, seal, stage, whole: resumed - began };
    Ok((StagedCheckpoint { epoch, pages, sections, disk, dirty, resumed }, pause))
}

fn held_section(held: &HeldFrames) -> Section {
    Section { kind: HELD_SECTION, version: HELD_VERSION, bytes: held.encode() }
}

/// How long [`checkpoint`] waits for room before it looks again whether the link still stands.
pub const ROOM_PATIENCE: Duration = Duration::from_millis(5);
