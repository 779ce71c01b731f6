//! Time as the decision core sees it. A process that did not run for a moment has heard nothing in that moment, and its peer is not to
//! blame: a slow host must not look like a dead one. So what this process itself slept through is left out of the core's clock, as long
//! as it was short. A long sleep counts in full: by then the other side will have acted. Timers decide when somebody asks the arbiter,
//! never what it answers, so this touches availability only. Pure.

use std::time::Duration;

/// Waking up later than this is not ordinary scheduling.
const LATE: Duration = Duration::from_millis(40);
/// A longer sleep is counted.
const LONGEST_LEFT_OUT: Duration = Duration::from_secs(1);

/// What an event loop slept through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attention {
    left_out: Duration,
    expected: Option<Duration>,
}

impl Attention {
    /// The core's time at `now`.
    pub fn core_time(&self, now: Duration) -> Duration {
        now.saturating_sub(self.left_out)
    }

    /// The loop goes to sleep and means to be back by `until`.
    pub fn sleeps(&mut self, until: Duration) {
        self.expected = Some(until);
    }

    /// The loop is back. Returns what was left out, if it was late.
    pub fn wakes(&mut self, now: Duration) -> Option<Duration> {
        let late = now.saturating_sub(self.expected.take()?);
        if late < LATE || late > LONGEST_LEFT_OUT {
            return None;
        }
        self.left_out += late;
        Some(late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_short_sleep_beyond_what_was_meant_is_left_out() {
        let mut a = Attention::default();
        a.sleeps(100 * MS);
        assert_eq!(a.wakes(420 * MS), Some(320 * MS));
        assert_eq!(a.core_time(420 * MS), 100 * MS);
        a.sleeps(450 * MS);
        assert_eq!(a.wakes(455 * MS), None);
        assert_eq!(a.core_time(455 * MS), 135 * MS);
    }

    #[test]
    fn a_long_sleep_counts_in_full() {
        let mut a = Attention::default();
        a.sleeps(100 * MS);
        assert_eq!(a.wakes(1_600 * MS), None);
        assert_eq!(a.core_time(1_600 * MS), 1_600 * MS);
    }
}
