//! What a machine can do, whatever it is made of.

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::Receiver;

use crate::config::{ClockPolicy, Fact};
use crate::dirty::{DirtyLedger, DirtySet};
use crate::hot::Tracking;
use crate::memory::GuestRam;
use crate::pause::Stopped;
use crate::section::Section;
use crate::throttle::Throttle;

/// A machine: built (never run), loaded or restored, run, stopped, captured.
///
/// Methods that need a stopped machine take a [`Stopped`] token, which only [`crate::PausedVm`] can make. There are no default
/// methods: a machine that forgets one does not compile.
pub trait Machine: Send {
    /// What the other host must share for a restore there to be right: RAM size, vCPUs, devices, CPUID, TSC, MSR list, …
    fn facts(&self) -> Vec<Fact>;

    /// Guest RAM. May be read while the guest runs; a page read then may be torn, and is then also dirty.
    fn ram(&self) -> &Arc<GuestRam>;

    /// Where un-retired dirty pages wait.
    fn ledger(&self) -> &Arc<DirtyLedger>;

    /// Loads the kernel and sets the boot state. The machine is not running afterwards.
    fn load(&mut self) -> Result<(), BootError>;

    /// Puts a captured state into a machine that was built from an equal configuration and never ran. All sections must be
    /// consumed and none missing. RAM is written separately, before.
    fn restore(&mut self, sections: &[Section], clock: ClockPolicy) -> Result<(), RestoreError>;

    /// After a restore and before [`Machine::run`]: frames that arrived while nobody ran, for the device to deliver first. A
    /// restored machine also counts every queue as kicked and raises every pending interrupt again when it runs.
    fn queue_inbound(&mut self, nic: u8, frames: Vec<Vec<u8>>);

    /// Runs (or goes on running) the guest. The only way in which guest code executes.
    fn run(&mut self) -> Result<(), RunError>;

    /// Starts or ends recording of guest writes. Starting begins with an empty log and an empty ledger. A machine that cannot leave hot pages out
    /// tracks all pages alike.
    fn track_dirty(&mut self, tracking: Tracking) -> Result<(), DirtyError>;

    /// Pages written since the last call (or since tracking began), united with all that was given back, and hot pages. May be called while the guest
    /// runs: each bit is cleared before the caller can copy its page, so a page that is written during the copy is dirty again; what is not cleared is
    /// in the next set whatever happens.
    fn take_dirty(&mut self) -> Result<DirtySet, DirtyError>;

    /// As [`Machine::take_dirty`] while the guest runs, before the pages of an epoch are taken for good: those that are not likely to be written again
    /// in it. The rest stays for [`Machine::take_dirty`]. What is taken here was cleared and belongs to the epoch, whatever happens to it later.
    fn take_cold_dirty(&mut self) -> Result<DirtySet, DirtyError>;

    /// Does `work` for each piece from 0, once, and returns when all are done. Threads of the machine that stand idle because it is stopped may help, so pieces are
    /// done in any order and at one time.
    fn share_work(&self, pieces: usize, work: &(dyn Fn(usize) + Sync));

    /// Slows the guest from now on, until it is told otherwise; a machine that does not run yet forgets it. A slowed guest stops as soon as any other.
    fn throttle(&mut self, throttle: Throttle) -> Result<(), ThrottleError>;

    /// Things that happen to the guest on its own account.
    fn events(&self) -> Receiver<MachineEvent>;

    /// Stops the guest exactly: devices' host side parked, every vCPU out of guest mode with its last exit completed. Called by
    /// [`crate::PausedVm`] only.
    fn stop(&mut self, token: &Stopped) -> Result<StopTimings, PauseError>;

    /// All sections of a stopped machine, in ascending order of kind.
    fn capture(&mut self, token: &Stopped) -> Result<Vec<Section>, CaptureError>;

    /// Ends the machine's threads. The machine cannot run again. Idempotent; also done on drop.
    fn shut_down(&mut self);
}

/// What can happen to a running guest on its own account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest switched itself off.
    PoweredOff,
    /// The guest asked for a reset, which this machine treats as an end.
    Reset,
    /// A vCPU cannot go on: triple fault, emulation failure, an error of the host.
    Crashed {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM said.
        reason: String,
    },
}

/// The parts of a stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StopTimings {
    /// Parking the devices' host side.
    pub quiesce: Duration,
    /// From the kick until the last vCPU had completed its exits and read its own state.
    pub kick: Duration,
    /// How much of `kick` the slowest vCPU spent reading its state: done in the same wake-up, so that a pause needs one each way.
    pub vcpu_state: Duration,
}

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The image is not one this machine can start.
    #[error("{path} is not a bootable image: {reason}")]
    Image {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The image, command line or initrd does not fit.
    #[error("{what} does not fit into guest memory: {reason}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// How much is missing.
        reason: String,
    },
    /// The host refused to set the boot state.
    #[error("cannot set the boot state ({call})")]
    Host {
        /// The call that failed.
        call: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Why a machine could not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It was shut down, or a vCPU crashed before.
    #[error("the machine has ended: {0}")]
    Ended(String),
    /// It has neither been loaded nor restored.
    #[error("the machine has no state to run from")]
    Hollow,
    /// The host refused.
    #[error("cannot run the machine")]
    Host(#[from] std::io::Error),
}

/// Why a machine could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// A vCPU ended by itself.
    #[error("the machine has ended: {0}")]
    Ended(String),
    /// A vCPU did not come out of guest mode in time.
    #[error("vCPU {vcpu} did not stop within {} ms", waited.as_millis())]
    Stuck {
        /// Which vCPU.
        vcpu: u8,
        /// How long it was waited for.
        waited: Duration,
    },
}

/// Why the state of a stopped machine could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A call to the host failed.
    #[error("cannot capture {what}")]
    Host {
        /// Section and call.
        what: String,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Why a captured state was refused. Sections come from a peer or a file: nothing in them is believed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A section that this machine needs is not there.
    #[error("section {0:?} is missing")]
    Missing(crate::SectionKind),
    /// A section that this machine has no place for, or a second one of a kind.
    #[error("section {0:?} is not one of this machine's, or came twice")]
    Unexpected(crate::SectionKind),
    /// A version that this build does not read.
    #[error("section {kind:?} has version {got}, this build reads {reads}")]
    Version {
        /// Which section.
        kind: crate::SectionKind,
        /// As received.
        got: u16,
        /// As supported.
        reads: u16,
    },
    /// The bytes are not a state of that kind.
    #[error("section {kind:?} is malformed: {reason}")]
    Malformed {
        /// Which section.
        kind: crate::SectionKind,
        /// What is wrong.
        reason: String,
    },
    /// The host refused the state.
    #[error("the host refused {what}")]
    Host {
        /// Section and call.
        what: String,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Why a guest could not be slowed: no thread could be started for it.
#[derive(Debug, thiserror::Error)]
#[error("the guest cannot be slowed")]
pub struct ThrottleError(#[from] pub std::io::Error);

/// Why the dirty log could not be read or switched.
#[derive(Debug, thiserror::Error)]
#[error("dirty log: {call} failed")]
pub struct DirtyError {
    /// The call.
    pub call: &'static str,
    /// The host's answer.
    #[source]
    pub source: std::io::Error,
}
