//! `capture = "auto"`: postponed, or on write where that pays.
//!
//! Protecting a page takes less of the pause than copying it, but a page that the guest wants to write before it was copied costs a fault that a second
//! thread serves: more than a hundred copies. So it pays for large sets that the guest leaves alone for a while; for epochs of a thousand pages it does not.

use std::sync::Arc;

use vmm::GuestRam;
use vmm::write_protect::WriteProtect;

use super::lately::{Lately, TELLING, double};
use super::on_write::CopyOnWrite;
use super::{CopyError, Job, Outcome, Pending, RunsOn, Strategy, in_pause};

/// What a write to a protected page costs the guest: measured on KVM without hardware virtualisation, in seconds.
const FAULT: f64 = 38e-6;
/// What protecting a page takes before anything was measured, as a part of what copying it takes.
const PROTECTED_GUESS: f64 = 0.5;
/// Shortening a pause by less is not worth it: seconds.
const LEAST_SAVED: f64 = 500e-6;
/// What is saved must be so many times what the guest pays for it.
const MARGIN: f64 = 2.0;
/// While it does not pay it is tried with one in so many sets that are large enough: guests change.
const TRIAL_EVERY: u32 = 64;

/// Whether a set shall be copied on write. Pure; learns, and forgets.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Seconds of pause for each page that is copied in it, or protected in it.
    copied: Lately,
    protected: Lately,
    /// Of the pages that were protected, the part that was written before it was copied.
    written: Lately,
    /// Sets that were large enough and were copied in the pause, since the last that was not.
    without: u32,
}

impl Choice {
    /// Whether so many pages shall be copied on write.
    pub fn on_write(&self, pages: usize) -> bool {
        let saved = self.saved(pages);
        let paid = double(pages) * self.written.or(0.0) * FAULT;
        saved > LEAST_SAVED && (saved > paid * MARGIN || self.without >= TRIAL_EVERY)
    }

    /// What the pause would be spared.
    fn saved(&self, pages: usize) -> f64 {
        // Unknown: nothing is saved as far as anybody knows.
        let copied = self.copied.or(0.0);
        double(pages) * (copied - self.protected.or(copied * PROTECTED_GUESS))
    }

    /// What came of a set.
    pub fn learn(&mut self, outcome: &Outcome) {
        let Outcome { pages, took, written } = *outcome;
        if pages < TELLING {
            return;
        }
        let page = took.as_secs_f64() / double(pages);
        let Some(written) = written else {
            self.copied.note(page);
            if self.saved(pages) > LEAST_SAVED {
                self.without = self.without.saturating_add(1);
            }
            return;
        };
        if std::mem::take(&mut self.without) >= TRIAL_EVERY {
            // What was known is old: the trial alone counts.
            self.written = Lately::default();
        }
        self.protected.note(page);
        self.written.note(double(written) / double(pages));
    }
}

/// The strategy.
#[derive(Debug)]
pub struct Auto {
    choice: Choice,
    /// `None`: this host cannot.
    on_write: Option<CopyOnWrite>,
    /// The last set should have been copied on write.
    wanted: bool,
}

impl Auto {
    /// Looks whether this host can write-protect guest memory.
    pub fn new() -> Self {
        let on_write = match WriteProtect::probe() {
            Ok(()) => Some(CopyOnWrite::default()),
            Err(error) => {
                log::info!("pages are never copied on write: {error}");
                None
            }
        };
        Self { choice: Choice::default(), on_write, wanted: false }
    }
}

impl Default for Auto {
    fn default() -> Self {
        Self::new()
    }
}

impl Strategy for Auto {
    fn name(&self) -> &'static str {
        "auto"
    }

    /// Nothing is registered, and no thread started, before it is wanted for the first time.
    fn prepare(&mut self, ram: &Arc<GuestRam>) -> Result<(), CopyError> {
        if let Some(on_write) = self.on_write.as_mut().filter(|_| self.wanted)
            && let Err(error) = on_write.prepare(ram)
        {
            log::warn!("pages are not copied on write any more: {error}");
            self.on_write = None;
        }
        Ok(())
    }

    fn capture(&mut self, job: Job<'_>) -> Result<Pending, CopyError> {
        self.wanted = job.runs_on && self.choice.on_write(job.dirty.len());
        match self.on_write.as_mut().filter(|on_write| self.wanted && on_write.is_ready()) {
            Some(on_write) => on_write.capture(job),
            None => in_pause::copy(job),
        }
    }

    fn runs_on(&self) -> RunsOn {
        RunsOn::AtOnce
    }

    fn learn(&mut self, outcome: &Outcome) {
        self.choice.learn(outcome);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// 1,000 sets of so many pages of which the part `written` is written early. Returns how many of the last 640 were copied on write.
    fn lives(choice: &mut Choice, pages: usize, written: f64, (copy, protect): (Duration, Duration)) -> usize {
        let mut chosen = 0;
        for n in 0..1_000 {
            let on_write = choice.on_write(pages);
            chosen += usize::from(on_write && n >= 360);
            let each = if on_write { protect } else { copy };
            let written = on_write.then(|| super::super::lately::rounded(double(pages) * written));
            choice.learn(&Outcome { pages, took: each * u32::try_from(pages).unwrap(), written });
        }
        chosen
    }

    const NS: Duration = Duration::from_nanos(1);
    const QUIET: (Duration, Duration) = (Duration::from_nanos(250), Duration::from_nanos(100));
    const SLOW: (Duration, Duration) = (Duration::from_nanos(2_400), Duration::from_nanos(150));

    #[test]
    fn large_sets_that_are_left_alone_are_copied_on_write() {
        assert_eq!(lives(&mut Choice::default(), 1_000, 0.0, QUIET), 0, "150 us are not worth it");
        assert_eq!(lives(&mut Choice::default(), 50_000, 0.0, QUIET), 640);
        let now_and_then = lives(&mut Choice::default(), 50_000, 0.02, QUIET);
        assert!((5..=11).contains(&now_and_then), "one page in fifty is too many: {now_and_then}");
        assert_eq!(lives(&mut Choice::default(), 1_000, 0.01, SLOW), 640, "a slow copy is worth some faults");
        assert_eq!(lives(&mut Choice::default(), 50_000, 0.0, (250 * NS, 250 * NS)), 0, "protecting saves nothing");
    }

    #[test]
    fn a_guest_that_changes_is_noticed() {
        let mut choice = Choice::default();
        assert!(lives(&mut choice, 50_000, 0.5, QUIET) < 12);
        assert_eq!(lives(&mut choice, 50_000, 0.0, QUIET), 640);
        assert!(lives(&mut choice, 50_000, 0.5, QUIET) < 12);
        assert_eq!(lives(&mut choice, 100, 0.0, QUIET), 0);
    }

    #[test]
    fn small_sets_do_not_make_pages_look_dear() {
        let mut choice = Choice::default();
        let idle = Outcome { pages: 3, took: Duration::from_micros(60), written: None };
        (0..100).for_each(|_| choice.learn(&idle));
        assert!(!choice.on_write(10_000), "nothing is known of pages yet");
    }
}
