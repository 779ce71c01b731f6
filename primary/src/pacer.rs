//! When an epoch ends. Pure. A fixed interval for now; whoever makes it clever changes only this file.

use std::time::Duration;

/// Decides when the next epoch ends.
#[derive(Clone, Debug)]
pub struct Pacer {
    interval: Duration,
    next: Duration,
}

impl Pacer {
    /// Epochs of `interval` each, the first of which ends one interval after `now`.
    pub fn fixed(interval: Duration, now: Duration) -> Self {
        Self { interval, next: now + interval }
    }

    /// When the running epoch should end.
    pub fn deadline(&self) -> Duration {
        self.next
    }

    /// An epoch ended. The rhythm is kept while we keep up; after a delay it starts anew, because epochs that were missed are not made up
    /// for (overload lengthens epochs, guarantee G7).
    pub fn ended(&mut self, now: Duration) {
        self.next += self.interval;
        if self.next <= now {
            self.next = now + self.interval;
        }
    }

    /// Length of an epoch.
    pub fn interval(&self) -> Duration {
        self.interval
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn keeps_its_rhythm_and_makes_up_for_nothing() {
        let mut p = Pacer::fixed(25 * MS, Duration::ZERO);
        assert_eq!(p.deadline(), 25 * MS);
        p.ended(27 * MS);
        assert_eq!(p.deadline(), 50 * MS);
        p.ended(180 * MS);
        assert_eq!(p.deadline(), 205 * MS);
    }
}
