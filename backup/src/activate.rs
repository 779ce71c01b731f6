//! **The story of an activation**: the standby becomes the machine that runs. Whoever calls this holds the permit; nothing here can
//! be undone, and every step is milliseconds or less.

use std::io;
use std::time::{Duration, Instant};

use failover::{RunPermit, failpoint};
use primary::host::Host;
use primary::output::held::{HELD_SECTION, HeldError, HeldFrames};
use primary::ram_digest::{self, RAM_DIGEST_SECTION, RamDigestError};
use primary::runner::{Runner, RunnerEvent};
use primary::silent::SilentTaps;
use replication_proto::Epoch;
use vmm::machine::{RestoreError, RunError};
use vmm::{ClockPolicy, Machine, Section, SectionKind};

use crate::commit::Holding;
use crate::disk::{DiskKeeper, SinkError};
use crate::inbound::Inbound;
use crate::link::LinkThread;
use crate::standby::{Applied, ApplierThread, Standby};

/// All that waits on the backup while the primary lives.
pub struct Waiting {
    /// The listening socket and the connection to the primary.
    pub link: LinkThread,
    /// Committed checkpoints on their way into memory.
    pub applier: ApplierThread,
    /// Committed changes on their way into the disks.
    pub disks: DiskKeeper,
    /// The machine.
    pub standby: Standby,
    /// Inbound frames that nobody has answered yet.
    pub taps: SilentTaps,
}

/// A machine that runs.
pub struct Activated {
    /// Its thread.
    pub runner: Runner,
    /// The epoch that it goes on from.
    pub epoch: Epoch,
    /// Frames of that epoch that were sent again.
    pub resent: usize,
    /// Frames that were delivered to the guest: to the primary after that epoch, or on this side's taps.
    pub delivered: usize,
    /// Digest of all of RAM, when the checkpoint carried one.
    pub ram_digest: Option<u128>,
    /// From the permit until the guest ran.
    pub took: Duration,
}

/// Why an activation failed. The guest does not run; the permit is spent.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// No base was ever committed here.
    #[error("this standby is hollow: no base was committed")]
    Hollow,
    /// The committed state is not one that this machine can run from.
    #[error("the committed state cannot be restored")]
    Restore(#[from] RestoreError),
    /// The disks do not hold what was committed.
    #[error("the committed changes of the disks cannot be applied: {0}")]
    Disks(#[from] SinkError),
    /// Memory is not what it was on the primary.
    #[error("the standby's memory is not that of the committed checkpoint")]
    Memory(#[from] RamDigestError),
    /// The held frames of the last epoch are unreadable.
    #[error(transparent)]
    Held(#[from] HeldError),
    /// The machine did not run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// No thread could be started.
    #[error("no thread could be started")]
    Thread(#[from] io::Error),
}

/// Turns what waits into a machine that runs.
///
/// # Errors
/// See [`ActivateError`].
pub fn activate(
    permit: RunPermit,
    waiting: Waiting,
    host: &Host,
    tell: impl Fn(RunnerEvent) + Send + 'static,
) -> Result<Activated, ActivateError> {
    let began = Instant::now();
    let Waiting { link, applier, disks, standby, taps } = waiting;
    failpoint!(TakeoverGranted => return Err(failpoint::injected().into()));
    // 1. No acknowledgement leaves from here on; the incomplete epoch is dropped. And the first that the LAN hears: frames for the guest arrive on this
    // host's taps from now on, and those that were faster are passed on by the other side, if it lives.
    let holding = link.seal();
    host.claim_place();
    failpoint!(TakeoverClosed => return Err(failpoint::injected().into()));
    // 2. Every committed checkpoint is in memory.
    let mut applied = applier.finish().ok_or(ActivateError::Hollow)?;
    let epoch = applied.epoch;
    // … and in the images, behind the journal. What the guest changes first waits until that is retired, which begins now, beside.
    if let Some(retire) = disks.finish()? {
        assert_eq!(retire.point().epoch, epoch, "memory and disks are of one epoch");
        host.disks.before_first_change(move || retire.run());
        host.disks.prepare_in_background()?;
    }
    failpoint!(TakeoverApplied => return Err(failpoint::injected().into()));
    let digest = take_section(&mut applied.sections, RAM_DIGEST_SECTION);
    let ram_digest = digest.map(|digest| ram_digest::compare(&digest, standby.machine().ram())).transpose()?;
    // 3. vCPUs, interrupt controllers, devices and clocks, as of the same instant.
    let mut machine = standby.into_machine();
    let held = restore(&mut *machine, holding, applied)?;
    failpoint!(TakeoverRestored => return Err(failpoint::injected().into()));
    // 4. The LAN learns where the guest is now. What the guest itself says waits for the word of the decision core.
    host.gate.adopt_speakers(held.speakers.clone());
    host.announce_guest()?;
    failpoint!(TakeoverAnnounced => return Err(failpoint::injected().into()));
    // 5. What the guest said in its last committed epoch may have died with the primary: say it again.
    held.frames.iter().for_each(|(nic, frame)| host.gate.send_for_guest(*nic, frame));
    failpoint!(TakeoverResent => return Err(failpoint::injected().into()));
    // 6. What was said to it since that epoch: to the primary, and on this tap.
    let (_, inbound) = link.close();
    let delivered = deliver(&mut *machine, &inbound, taps.stop());
    failpoint!(TakeoverDelivered => return Err(failpoint::injected().into()));
    // 7. Run, on the strength of the permit. Queues count as kicked, pending interrupts are raised again.
    let parts = host.epoch_parts();
    let runner = Runner::start(machine, parts, epoch, (&host.config).into(), host.clock.clone(), tell)?;
    runner.run(permit)?;
    let resent = held.frames.len();
    Ok(Activated { runner, epoch, resent, delivered, ram_digest, took: began.elapsed() })
}

/// Step 3: puts the last committed state into a machine whose memory holds it already. Returns what the guest said in that epoch.
///
/// # Errors
/// The state is not one that this machine can run from.
pub fn restore(machine: &mut dyn Machine, holding: Holding, applied: Applied) -> Result<HeldFrames, ActivateError> {
    let Applied { epoch, mut sections } = applied;
    assert_eq!(holding, Holding::Whole(epoch), "memory holds exactly the last committed epoch");
    let held = match take_section(&mut sections, HELD_SECTION) {
        Some(held) => HeldFrames::decode(held.version, &held.bytes)?,
        None => HeldFrames::default(),
    };
    machine.restore(&sections, ClockPolicy::ResumeFromCheckpoint)?;
    Ok(held)
}

/// Step 6: frames that reached the guest in epochs that were never committed, then those that `taps` heard, by network device. Says how many.
pub fn deliver(machine: &mut dyn Machine, inbound: &Inbound, taps: Vec<(u8, Vec<Vec<u8>>)>) -> usize {
    let mut delivered = 0;
    for (nic, heard_here) in taps {
        let mut frames = inbound.of(nic);
        frames.extend(heard_here);
        delivered += frames.len();
        machine.queue_inbound(nic, frames);
    }
    delivered
}

/// Takes a section out that is not the machine's.
fn take_section(sections: &mut Vec<Section>, kind: SectionKind) -> Option<Section> {
    let at = sections.iter().position(|section| section.kind == kind)?;
    Some(sections.remove(at))
}
