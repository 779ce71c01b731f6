//! How fast a base is copied. Pure.

use std::time::Duration;

/// How much of the guest's time the copying of a base may cost, as the time that its vCPUs waited for a processor: a part of it, because write faults of
/// the dirty log and caches cost as much again.
const WAITED_MOST: f64 = 0.10;
/// Below this the copy gets faster again.
const WAITED_LITTLE: f64 = 0.04;
/// The copy never stands still: what the vCPUs wait for may be somebody else's doing, and the guest is unprotected until it is done.
const LEAST_OF_MOST: f64 = 0.25;
/// What is measured in a shorter time says nothing.
const MEASURED_LEAST: Duration = Duration::from_millis(20);
/// Longest pause between two pieces.
const PAUSE_MOST: Duration = Duration::from_millis(50);

/// How fast a base is copied: in a share of the time, which is taken back when the guest's vCPUs have to wait for a processor and grows while they do not,
/// as far as the configuration lets it.
#[derive(Clone, Debug)]
pub struct BasePacer {
    most: f64,
    share: f64,
    measured_at: Duration,
    waited: Option<Duration>,
}

impl BasePacer {
    /// Begins with all that is allowed: a share of the time, above 0 and at most 1.
    ///
    /// # Panics
    /// When `most` is not such a share.
    pub fn new(most: f64, now: Duration) -> Self {
        assert!(most > 0.0 && most <= 1.0, "a share of the time, not {most}");
        Self { most, share: most, measured_at: now, waited: None }
    }

    /// A piece was copied, which took so much processor time. `waited`: for how long the guest's vCPUs have waited for a processor in their lives, each on average, if that is known.
    /// Returns how long to pause before the next piece.
    pub fn copied(&mut self, took: Duration, waited: Option<Duration>, now: Duration) -> Duration {
        let span = now.saturating_sub(self.measured_at);
        if span >= MEASURED_LEAST {
            if let (Some(waited), Some(before)) = (waited, self.waited) {
                self.adapt(waited.saturating_sub(before).as_secs_f64() / span.as_secs_f64());
            }
            (self.measured_at, self.waited) = (now, waited);
        }
        took.mul_f64(1.0 / self.share - 1.0).min(PAUSE_MOST)
    }

    fn adapt(&mut self, waited: f64) {
        if waited > WAITED_MOST {
            // In proportion, and at most by half: one measurement may be of something else.
            self.share = (self.share * (WAITED_MOST / waited).max(0.5)).max(self.least());
        } else if waited < WAITED_LITTLE {
            self.share = (self.share * 1.25).min(self.most);
        }
    }

    fn least(&self) -> f64 {
        // All of the time means that nothing is more urgent than protection.
        if self.most < 1.0 { self.most * LEAST_OF_MOST } else { self.most }
    }

    /// The share of the time that is spent on copying now.
    pub fn share(&self) -> f64 {
        self.share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A guest whose vCPUs wait for a processor in proportion to the time spent on copying.
    fn settled(most: f64, cost: f64) -> f64 {
        let (mut pacer, mut now, mut waited) = (BasePacer::new(most, Duration::ZERO), Duration::ZERO, Duration::ZERO);
        for _ in 0..20_000 {
            let took = MS;
            let pause = pacer.copied(took, Some(waited), now);
            now += took + pause;
            waited += took.mul_f64(cost);
        }
        pacer.share()
    }

    #[test]
    fn a_base_is_copied_as_fast_as_the_guest_does_not_mind() {
        assert!(settled(0.8, 0.0) > 0.79, "nobody minds");
        let share = settled(0.8, 0.5);
        assert!((0.2..=0.3).contains(&share), "half of the copy's time is taken from the guest: {share}");
        assert!(settled(0.8, 100.0) >= 0.2 - 1e-9, "it never stands still");
        assert!(settled(1.0, 100.0) > 0.99, "nothing is more urgent");
        assert!(settled(0.2, 0.0) <= 0.2, "no more than is allowed");
        let mut unmeasured = BasePacer::new(0.25, Duration::ZERO);
        assert_eq!(unmeasured.copied(MS, None, MS), 3 * MS);
        assert_eq!(unmeasured.copied(100 * MS, None, 200 * MS), PAUSE_MOST);
    }
}
