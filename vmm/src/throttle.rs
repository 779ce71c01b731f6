//! How much of its time a guest is kept from running, because what it does cannot be followed. (The idea is that of QEMU's auto-converge.)
//!
//! A slowed vCPU runs for a slice, rests for a slice, and so on. Slices are short, so that the guest answers while it is slowed; the running one is never so short
//! that entering and leaving the guest would be all that it does.

use std::time::Duration;

/// A slice of running and one of resting, together, while neither would get too short.
const PERIOD: Duration = Duration::from_millis(10);
/// The shortest slice of running.
const RUN_LEAST: Duration = Duration::from_micros(500);

/// The longest slice of resting: a guest that got more than its slice, because the host was late, makes up for it up to here.
const REST_MOST: Duration = Duration::from_millis(100);

/// The part of its time that a guest is kept from running, in per cent: 0 to 99.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Throttle(u8);

impl Throttle {
    /// It runs whenever it can.
    pub const NONE: Self = Self(0);
    /// The most that a guest is slowed: it still runs.
    pub const MOST: Self = Self(99);

    /// Keeps a guest from running for so many per cent of its time; more than [`Throttle::MOST`] is that.
    pub fn percent(percent: u8) -> Self {
        Self(percent.min(Self::MOST.0))
    }

    /// In per cent: 0 to 99.
    pub fn as_percent(self) -> u8 {
        self.0
    }

    /// The same as a part of one.
    pub fn share(self) -> f64 {
        f64::from(self.0) / 100.0
    }

    /// Whether it changes anything.
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }

    /// How long a vCPU runs at a time.
    pub fn run(self) -> Duration {
        (PERIOD * (100 - u32::from(self.0)) / 100).max(RUN_LEAST)
    }

    /// How long it rests after it ran for so long; not at all under [`Throttle::NONE`].
    pub fn rest_after(self, ran: Duration) -> Duration {
        let (rest, run) = (u32::from(self.0), 100 - u32::from(self.0));
        (ran.min(REST_MOST) * rest / run).min(REST_MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_have_the_right_proportion_and_stay_short() {
        for percent in 1..=99 {
            let throttle = Throttle::percent(percent);
            let (run, rest) = (throttle.run(), throttle.rest_after(throttle.run()));
            let share = rest.as_secs_f64() / (run + rest).as_secs_f64();
            assert!((share - f64::from(percent) / 100.0).abs() < 1e-6, "{percent}: {run:?} {rest:?}");
            assert!(run >= RUN_LEAST && run + rest <= Duration::from_millis(50), "{percent}: {run:?} {rest:?}");
        }
        assert_eq!(Throttle::NONE.rest_after(Duration::from_secs(1)), Duration::ZERO);
        assert_eq!(Throttle::percent(100), Throttle::MOST);
        let late = Duration::from_millis(4);
        assert_eq!(Throttle::percent(75).rest_after(late), 3 * late, "what it had too much is made up for");
        assert_eq!(Throttle::MOST.rest_after(late), REST_MOST);
    }
}
