//! What differs between worlds, each by a chance of its own: the other draws of a seed do not depend on it.

use std::time::Duration;

use failover::config::{EpochPace, Overload};
use primary::pacer::OverloadRules;

use crate::real::rng::{Rng, mix};

/// Half of the worlds have epochs of a fixed length, the others such as follow the work. A chance of its own: the other draws of a seed do not depend on it.
pub(super) fn pace(seed: u64, interval: Duration) -> EpochPace {
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

/// A third of the worlds each. A chance of its own, as that of the pace.
pub(super) fn overload(seed: u64) -> OverloadRules {
    let mut rng = Rng::new(mix(seed ^ 0x0e_7e));
    let policies = [Overload::Lengthen, Overload::Throttle, Overload::Drop];
    OverloadRules {
        policy: policies[usize::try_from(rng.range(0, 3)).expect("small")],
        patience: Duration::from_millis(rng.range(500, 5_000)),
        max_hold: Duration::from_secs(1),
    }
}

/// One world in six has a link that is too narrow for its guest.
pub(super) fn link_rate(seed: u64) -> u64 {
    let mut rng = Rng::new(mix(seed ^ 0x11_4c));
    if rng.range(0, 6) == 0 { rng.range(20_000, 200_000) } else { 0 }
}
