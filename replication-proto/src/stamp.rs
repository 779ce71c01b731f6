//! Times that travel with heartbeats and come back, so that each side can tell how old what it hears may be. The idea is that of TCP's timestamps (RFC 7323): whoever
//! made a stamp is the only one who reads it, so the clocks of the two sides need not agree.

use core::num::NonZeroU32;
use core::time::Duration;

/// A time in milliseconds, modulo 2^32 - 1 (49 days).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp(NonZeroU32);

/// How many stamps there are: all 32-bit numbers but 0.
const STAMPS: u64 = u32::MAX as u64;

impl Stamp {
    /// The stamp of a time on this side's clock.
    pub(crate) fn new(now: Duration) -> Self {
        let ms = now.as_millis() % u128::from(STAMPS);
        let number = u32::try_from(ms + 1).ok().and_then(NonZeroU32::new);
        Self(number.expect("a remainder and one are from 1 to 2^32 - 1"))
    }

    pub(crate) fn to_wire(self) -> u32 {
        self.0.get()
    }

    pub(crate) fn from_wire(number: u32) -> Option<Self> {
        NonZeroU32::new(number).map(Self)
    }

    /// The latest time, up to a millisecond early, that had this stamp and was not after `last`. A stamp that nobody made is some time within the 49 days before it.
    pub(crate) fn latest_until(self, last: Duration) -> Duration {
        let (last_number, number) = (u64::from(Self::new(last).to_wire()), u64::from(self.to_wire()));
        let age_ms = (last_number + STAMPS - number) % STAMPS;
        let last_ms = Duration::from_millis(u64::try_from(last.as_millis()).unwrap_or(u64::MAX));
        last_ms.saturating_sub(Duration::from_millis(age_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_finds_its_time_across_the_wrap() {
        let wrap = STAMPS;
        for made in [0, 1, 500, wrap - 2, wrap - 1, wrap, wrap + 1, 3 * wrap + 7] {
            for age in [0, 1, 20, 100_000, wrap - 1] {
                let (made, last) = (Duration::from_millis(made), Duration::from_millis(made + age));
                let stamp = Stamp::from_wire(Stamp::new(made).to_wire()).unwrap();
                assert_eq!(stamp.latest_until(last), made, "{age} ms old");
            }
        }
    }

    #[test]
    fn a_time_is_never_made_younger_than_it_is() {
        let made = Duration::from_micros(1_999);
        assert_eq!(Stamp::new(made).latest_until(made), Duration::from_millis(1));
    }

    #[test]
    fn a_forged_stamp_of_the_future_is_old() {
        let now = Duration::from_secs(3600);
        assert_eq!(Stamp::new(Duration::from_secs(3601)).latest_until(now), Duration::ZERO);
    }
}
