//! What differs between worlds besides their faults, each by a chance of its own: a seed's other draws do not depend on it.

use std::time::Duration;

use failover::config::{CaptureStrategy, EpochPace};

use crate::real::rng::{Rng, mix};

/// Half of the worlds have epochs of a fixed length, the others such as follow the work. A chance of its own: the other draws of a seed do not depend on it.
pub(super) fn draw_pace(seed: u64, interval: Duration) -> EpochPace {
    let mut rng = Rng::new(mix(seed ^ 0x9ace));
    match rng.range(0, 6) {
        0..3 => EpochPace::Fixed(interval),
        3..5 => EpochPace::Latency(interval.max(Duration::from_millis(2))),
        _ => {
            let share = ["1%", "10%", "40%"][usize::try_from(rng.range(0, 3)).expect("small")];
            EpochPace::Overhead(share.to_owned().try_into().expect("a share"))
        }
    }
}

/// How pages come out of a world's guests.
pub(super) fn draw_capture(seed: u64) -> CaptureStrategy {
    match mix(seed ^ 0xca97) % 8 {
        0 | 1 => CaptureStrategy::StopAndCopy,
        2..5 => CaptureStrategy::CopyOnWrite,
        _ => CaptureStrategy::Postponed,
    }
}
