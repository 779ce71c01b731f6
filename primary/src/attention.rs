//! Time as the decision core sees it. A process that did not run for a moment has heard nothing in that moment, and its peer is not to
//! blame: a slow host must not look like a dead one. So what this process itself slept through is left out of the core's clock, as long
//! as it was short. A long sleep counts in full: by then the other side will have acted. Timers decide when somebody asks the arbiter,
//! never what it answers, so this touches availability only. Pure.

use std::time::Duration;

use failover::decide::Slept;

/// Waking up later than this is not ordinary scheduling.
const LATE: Duration = Duration::from_millis(40);
/// A longer sleep is counted.
const LONGEST_LEFT_OUT: Duration = Duration::from_secs(1);

/// What an event loop slept through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attention {
    left_out: Duration,
    expected: Option<Duration>,
    awake: Duration,
    slept: Slept,
}

impl Attention {
    /// The core's time at `now`.
    pub fn core_time(&self, now: Duration) -> Duration {
        now.saturating_sub(self.left_out)
    }

    /// What the core's time does not show: for its status.
    pub fn slept(&self) -> &Slept {
        &self.slept
    }

    /// The loop goes to sleep at `now` and means to be back by `until`.
    pub fn sleeps(&mut self, now: Duration, until: Duration) {
        self.alive(now, self.awake);
        self.expected = Some(until);
    }

    /// The loop is back. Returns what was left out, if it was late.
    pub fn wakes(&mut self, now: Duration) -> Option<Duration> {
        let Some(expected) = self.expected.take() else {
            self.alive(now, self.awake);
            return None;
        };
        let late = now.saturating_sub(expected);
        if (LATE..=LONGEST_LEFT_OUT).contains(&late) {
            self.left_out += late;
            self.slept.left_out(self.core_time(now), late);
            self.awake = now;
            return Some(late);
        }
        self.alive(now, expected);
        None
    }

    /// The loop runs at `now`, and was to run again by `due`.
    fn alive(&mut self, now: Duration, due: Duration) {
        if now.saturating_sub(due) > LONGEST_LEFT_OUT {
            self.slept.woke(self.core_time(now));
        }
        self.awake = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_short_sleep_beyond_what_was_meant_is_left_out() {
        let mut a = Attention::default();
        a.sleeps(Duration::ZERO, 100 * MS);
        assert_eq!(a.wakes(420 * MS), Some(320 * MS));
        assert_eq!(a.core_time(420 * MS), 100 * MS);
        a.sleeps(420 * MS, 450 * MS);
        assert_eq!(a.wakes(455 * MS), None);
        assert_eq!(a.core_time(455 * MS), 135 * MS);
    }

    #[test]
    fn a_long_sleep_counts_in_full() {
        let mut a = Attention::default();
        a.sleeps(Duration::ZERO, 100 * MS);
        assert_eq!(a.wakes(1_600 * MS), None);
        assert_eq!(a.core_time(1_600 * MS), 1_600 * MS);
    }

    fn woke(at: Duration) -> Slept {
        let mut slept = Slept::default();
        slept.woke(at);
        slept
    }

    #[test]
    fn a_long_stop_is_noticed_in_the_middle_of_work_and_while_asleep() {
        let mut a = Attention::default();
        a.sleeps(Duration::ZERO, 100 * MS);
        assert_eq!(a.wakes(100 * MS), None);
        assert_eq!(a.slept(), &Slept::default());
        a.sleeps(1_200 * MS, 1_300 * MS);
        assert_eq!(a.slept(), &woke(1_200 * MS), "it worked for 1.1 s");
        a.wakes(1_300 * MS);
        assert_eq!(a.slept(), &woke(1_200 * MS));
        a.sleeps(1_300 * MS, 1_400 * MS);
        a.wakes(2_500 * MS);
        assert_eq!(a.slept(), &woke(2_500 * MS), "it slept for 1.1 s too long");
    }
}
