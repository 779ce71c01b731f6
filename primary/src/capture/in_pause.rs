//! The two strategies that copy in the pause. They differ in when the guest runs on.

use std::sync::Arc;

use vmm::GuestRam;

use super::{CopyError, Job, Outcome, Pending, RunsOn, Strategy};

/// Copied in the pause, sent while the guest runs.
#[derive(Debug)]
pub struct Postponed;

/// Copied in the pause, which lasts until the backup has the checkpoint.
#[derive(Debug)]
pub struct StopAndCopy;

/// Copies all that there is to copy, now.
///
/// # Errors
/// See [`CopyError`].
pub fn copy(job: Job<'_>) -> Result<Pending, CopyError> {
    let Job { ram, share, arena, dirty, early, runs_on: _ } = job;
    let pages = match early {
        None => arena.stage(ram, dirty, share)?,
        Some(mut pages) => {
            pages.stage_over(ram, dirty, share)?;
            pages
        }
    };
    Ok(Pending::Copied(pages))
}

impl Strategy for Postponed {
    fn name(&self) -> &'static str {
        "postponed"
    }

    fn prepare(&mut self, _ram: &Arc<GuestRam>) -> Result<(), CopyError> {
        Ok(())
    }

    fn capture(&mut self, job: Job<'_>) -> Result<Pending, CopyError> {
        copy(job)
    }

    fn runs_on(&self) -> RunsOn {
        RunsOn::AtOnce
    }

    fn learn(&mut self, _outcome: &Outcome) {}
}

impl Strategy for StopAndCopy {
    fn name(&self) -> &'static str {
        "stop-and-copy"
    }

    fn prepare(&mut self, _ram: &Arc<GuestRam>) -> Result<(), CopyError> {
        Ok(())
    }

    fn capture(&mut self, job: Job<'_>) -> Result<Pending, CopyError> {
        copy(job)
    }

    fn runs_on(&self) -> RunsOn {
        RunsOn::WhenCommitted
    }

    fn learn(&mut self, _outcome: &Outcome) {}
}
