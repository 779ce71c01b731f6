//! Copies before the pause, and when they pay (the pre-copy pass of PMT-Checkpointing). Pure but for the copies that it carries.
//!
//! A page that is copied ahead and not written again is one page less for the pause. One that *is* written again is copied twice, and costs the guest a
//! write fault more, because its dirty bit was cleared while it ran. So pre-copy pays for guests that dirty many pages and leave them alone afterwards.

use std::time::Duration;

use failover::config::Precopy;
use vmm::DirtySet;

use super::lately::{Lately, TELLING, double, rounded};
use crate::staging::StagedPages;

/// What a write to a page whose dirty bit was cleared costs the guest: measured on KVM without hardware virtualisation; about 1 us with it.
const FAULT: f64 = 2.4e-6;
/// Shortening a pause by less is not worth a second look at the log: seconds.
const LEAST_SAVED: f64 = 100e-6;
/// What is saved must be so many times what the guest pays for it: a guest that runs is worth more than one whose pauses are short.
const MARGIN: f64 = 2.0;
/// While it does not pay it is tried once in so many epochs: guests change.
const TRIAL_EVERY: u32 = 64;

/// Pages that were copied before the pause: part of the epoch that ends next, whatever is written later. Dropped, it gives its pages back.
#[derive(Debug)]
pub struct Precopied {
    /// The copies.
    pub pages: StagedPages,
    /// The same pages, whose dirty bits were cleared before they were copied.
    pub dirty: DirtySet,
}

/// What came of one epoch.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Pages of the epoch.
    pub all: usize,
    /// Pages that the pause had to do with.
    pub late: usize,
    /// Pages that were copied before it, if that was tried.
    pub precopied: Option<usize>,
    /// What the pause spent on pages.
    pub took: Duration,
}

impl Sample {
    /// Pages that were copied before the pause and were written again.
    pub fn again(&self) -> usize {
        (self.precopied.unwrap_or_default() + self.late).saturating_sub(self.all)
    }
}

/// When pre-copy pays: what it saves of the pause against what pages cost that are written again. Learns, and forgets.
#[derive(Clone, Debug)]
pub struct PrecopyPolicy {
    mode: Precopy,
    /// Pages of an epoch.
    all: Lately,
    /// Seconds of pause for each page that is copied in it.
    page: Lately,
    /// Of an epoch's pages, the part that the pause was spared, and the part that was copied twice.
    spared: Lately,
    twice: Lately,
    /// Epochs without pre-copy since the last one with it.
    without: u32,
}

impl PrecopyPolicy {
    /// Knows nothing yet.
    pub fn new(mode: Precopy) -> Self {
        let unknown = Lately::default();
        Self { mode, all: unknown, page: unknown, spared: unknown, twice: unknown, without: 0 }
    }

    /// Whether pages of the epoch that ends next shall be copied before its pause.
    pub fn wants(&self) -> bool {
        match self.mode {
            Precopy::Always => true,
            Precopy::Never => false,
            Precopy::Auto => self.pays(),
        }
    }

    fn pays(&self) -> bool {
        let (all, page) = (self.all.or(0.0), self.page.or(0.0));
        if all * page < LEAST_SAVED {
            return false;
        }
        // What is not known is hoped for, which makes the first time a trial.
        let saved = all * self.spared.or(1.0) * page;
        let paid = all * self.twice.or(0.0) * FAULT;
        saved > paid * MARGIN + LEAST_SAVED / 2.0 || self.without >= TRIAL_EVERY
    }

    /// How many pages the pause will find that were not copied before it, about.
    pub fn expects(&self) -> usize {
        let pages = self.all.or(0.0) * (1.0 - self.spared.or(1.0)).clamp(0.0, 1.0);
        // A few at least: a device writes something.
        rounded(pages) + 16
    }

    /// An epoch ended. `in_pause`: its pages were copied in the pause, so that it tells what that takes.
    pub fn learn(&mut self, epoch: &Sample, in_pause: bool) {
        self.all.note(double(epoch.all));
        if in_pause && epoch.late >= TELLING {
            self.page.note(epoch.took.as_secs_f64() / double(epoch.late));
        }
        self.without = self.without.saturating_add(1);
        if epoch.precopied.is_some() {
            if std::mem::take(&mut self.without) > TRIAL_EVERY {
                // What was known is old: the trial alone counts.
                (self.spared, self.twice) = (Lately::default(), Lately::default());
            }
            if epoch.all > 0 {
                self.spared.note(double(epoch.all.saturating_sub(epoch.late)) / double(epoch.all));
                self.twice.note(double(epoch.again()) / double(epoch.all));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that dirties `pages` in an epoch and writes the part `again` of those that were copied early once more; a page takes `page` to copy.
    /// Returns in how many of the last 640 of 1,000 epochs pages were copied early.
    fn lives(policy: &mut PrecopyPolicy, pages: usize, again: f64, page: Duration) -> usize {
        let mut early = 0;
        for n in 0..1_000 {
            let wants = policy.wants();
            early += usize::from(wants && n >= 360);
            let late = if wants { rounded(double(pages) * again) } else { pages };
            let took = page * u32::try_from(late).unwrap();
            policy.learn(&Sample { all: pages, late, precopied: wants.then_some(pages), took }, true);
        }
        early
    }

    const NS: Duration = Duration::from_nanos(1);

    #[test]
    fn it_is_used_where_it_pays_and_left_where_it_does_not() {
        let auto = || PrecopyPolicy::new(Precopy::Auto);
        let always = |early| early == 640;
        let now_and_then = |early| (5..=11).contains(&early);
        assert_eq!(lives(&mut auto(), 100, 0.0, 250 * NS), 0, "25 us are not worth it");
        assert!(always(lives(&mut auto(), 10_000, 0.01, 250 * NS)), "few are written again");
        assert!(now_and_then(lives(&mut auto(), 10_000, 0.5, 250 * NS)), "half of them fault again: tried, and left");
        assert!(always(lives(&mut auto(), 10_000, 0.1, 2_400 * NS)), "a slow copy is worth some faults");
        assert!(now_and_then(lives(&mut auto(), 10_000, 0.5, 2_400 * NS)));
        assert_eq!(lives(&mut PrecopyPolicy::new(Precopy::Never), 10_000, 0.0, 250 * NS), 0);
        assert!(always(lives(&mut PrecopyPolicy::new(Precopy::Always), 10, 1.0, 250 * NS)));
    }

    #[test]
    fn a_guest_that_changes_is_noticed() {
        let mut policy = PrecopyPolicy::new(Precopy::Auto);
        assert!(lives(&mut policy, 10_000, 0.9, 250 * NS) < 12);
        assert_eq!(lives(&mut policy, 10_000, 0.0, 250 * NS), 640);
        assert!(lives(&mut policy, 10_000, 0.9, 250 * NS) < 12);
        assert_eq!(lives(&mut policy, 10, 0.0, 250 * NS), 0);
    }

    #[test]
    fn small_sets_do_not_make_pages_look_dear() {
        let mut policy = PrecopyPolicy::new(Precopy::Auto);
        assert_eq!(lives(&mut policy, 20, 0.0, Duration::from_micros(20)), 0);
    }

    #[test]
    fn what_is_expected_is_what_was_late() {
        let mut policy = PrecopyPolicy::new(Precopy::Always);
        assert_eq!(policy.expects(), 16);
        lives(&mut policy, 10_000, 0.25, 250 * NS);
        assert!((2_400..2_600).contains(&policy.expects()), "{}", policy.expects());
    }

    #[test]
    fn pages_that_were_copied_twice_are_counted_once() {
        let epoch = Sample { all: 120, late: 50, precopied: Some(100), took: Duration::ZERO };
        assert_eq!(epoch.again(), 30);
        assert_eq!(Sample { precopied: None, late: 120, ..epoch }.again(), 0);
    }
}
