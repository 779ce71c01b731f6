//! The guard without which nothing can be captured.

use std::time::{Duration, Instant};

use crate::dirty::DirtySet;
use crate::machine::{CaptureError, DirtyError, Machine, PauseError, RunError, StopTimings};
use crate::memory::GuestRam;
use crate::section::Section;

/// Proof that a machine is stopped. Only [`PausedVm`] makes one.
#[derive(Debug)]
pub struct Stopped(());

/// How long each part of a pause took, as far as the machine is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseTimings {
    /// Parking devices and stopping vCPUs.
    pub stop: StopTimings,
    /// Reading vCPU, irqchip, clock and device state.
    pub capture: Duration,
    /// Reading the dirty log.
    pub dirty: Duration,
    /// Handing the vCPUs back.
    pub resume: Duration,
}

/// A stopped machine. Dropping it resumes the guest; [`PausedVm::stay_stopped`] does not.
///
/// The idea is crosvm's suspend guards: freezing is a value, so "capture what runs" does not compile, and no path out of a
/// function can forget to resume.
#[must_use = "dropping the guard resumes the guest"]
pub struct PausedVm<'m> {
    machine: &'m mut dyn Machine,
    token: Stopped,
    timings: PauseTimings,
    began: Instant,
    resumed: bool,
}

impl<'m> PausedVm<'m> {
    /// Stops `machine` exactly (see [`Machine::stop`]).
    pub fn pause(machine: &'m mut dyn Machine) -> Result<Self, PauseError> {
        let began = Instant::now();
        let token = Stopped(());
        let stop = machine.stop(&token)?;
        let timings = PauseTimings { stop, ..PauseTimings::default() };
        Ok(Self { machine, token, timings, began, resumed: false })
    }

    /// All sections. May itself write guest memory, so it comes before [`PausedVm::take_dirty`].
    pub fn capture(&mut self) -> Result<Vec<Section>, CaptureError> {
        let t = Instant::now();
        let sections = self.machine.capture(&self.token);
        self.timings.capture += t.elapsed();
        sections
    }

    /// The pages written in the interval that ends with this pause.
    pub fn take_dirty(&mut self) -> Result<DirtySet, DirtyError> {
        let t = Instant::now();
        let set = self.machine.take_dirty();
        self.timings.dirty += t.elapsed();
        set
    }

    /// Does `work` for each piece from 0; threads that stand idle in a pause may help (see [`Machine::share_work`]).
    pub fn share_work(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        self.machine.share_work(pieces, work);
    }

    /// Guest RAM, which nobody writes now.
    pub fn ram(&self) -> &GuestRam {
        self.machine.ram()
    }

    /// When the pause began.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Lets the guest run on and says how long each part took.
    pub fn resume(mut self) -> Result<PauseTimings, RunError> {
        self.resumed = true;
        let t = Instant::now();
        self.machine.run()?;
        self.timings.resume = t.elapsed();
        Ok(self.timings)
    }

    /// Keeps the guest stopped after the guard is gone (a fenced primary, the last pause of a planned switchover).
    pub fn stay_stopped(mut self) -> PauseTimings {
        self.resumed = true;
        self.timings
    }
}

impl Drop for PausedVm<'_> {
    fn drop(&mut self) {
        if !self.resumed
            && let Err(error) = self.machine.run()
        {
            log::error!("the guest could not be resumed: {error}");
        }
    }
}
