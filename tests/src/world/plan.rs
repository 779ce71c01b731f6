//! What a seed draws: the world's settings, and which of its faults may happen.

use std::time::Duration;

use failover::config::{CaptureStrategy, EpochPace, Overload, Precopy};
use failover::decide::{OnBackupLoss, Rejoin};
use primary::pacer::OverloadRules;

use super::faults::Kind;
use super::{MS, Nanos, SECOND};
use crate::real::rng::{Rng, mix};

/// What differs between worlds besides their faults.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// When epochs end.
    pub pace: EpochPace,
    /// What happens when link or backup cannot keep up with the guest.
    pub overload: OverloadRules,
    /// Bytes that the link between the hosts takes in a second while things go wrong; 0: as many as there are.
    pub link_rate: u64,
    /// What happens when the backup is lost.
    pub on_backup_loss: OnBackupLoss,
    /// Whether a fenced side becomes the backup by itself.
    pub rejoin: Rejoin,
    /// Pause between attempts to protect.
    pub retry: Duration,
    /// How late event loops may wake.
    pub jitter: Nanos,
    /// Which faults may happen.
    pub kinds: Vec<Kind>,
    /// About how long it is from one fault to the next.
    pub pause: Nanos,
    /// How long anything may fail.
    pub length: Nanos,
    /// Whether everything is put right afterwards, and must then be well.
    pub recovers: bool,
    /// Whether the guest has a disk.
    pub disk: bool,
    /// How pages come out of the guest.
    pub capture: CaptureStrategy,
    /// Whether before the pause: what follows measurements would make a world another one each time.
    pub precopy: Precopy,
}

impl Plan {
    /// The world of a seed.
    pub fn draw(seed: u64) -> Self {
        let mut rng = Rng::new(mix(seed ^ 0x51_0a));
        let pick = |rng: &mut Rng, of: &[u64]| of[usize::try_from(rng.range(0, of.len() as u64)).expect("small")];
        let mut kinds: Vec<Kind> = Kind::ALL
            .into_iter()
            .filter(|kind| match kind {
                // Who restores old backups of the arbiter gives up being armed.
                Kind::RollBack | Kind::Skew => rng.range(0, 12) == 0,
                Kind::Stop | Kind::GuestEnds => rng.range(0, 5) == 0,
                _ => rng.range(0, 3) == 0,
            })
            .collect();
        let mut later = Rng::new(mix(seed ^ 0xd1_11));
        kinds.extend(Kind::LATER.into_iter().filter(|_| later.range(0, 4) == 0));
        Self {
            seed,
            pace: draw_pace(seed, Duration::from_millis(pick(&mut rng, &[1, 1, 2, 5, 10, 25]))),
            overload: draw_overload(seed),
            link_rate: draw_link_rate(seed),
            on_backup_loss: if rng.range(0, 8) == 0 { OnBackupLoss::Hold } else { OnBackupLoss::Solo },
            rejoin: match mix(seed ^ 0x7e) % 4 {
                0 => Rejoin::AtOnce,
                1 => Rejoin::Never,
                _ => Rejoin::AfterKeep,
            },
            retry: Duration::from_millis(pick(&mut rng, &[50, 200])),
            jitter: pick(&mut rng, &[20_000, 300_000, 3 * MS, 20 * MS]),
            kinds,
            pause: pick(&mut rng, &[300, 1_000, 3_000, 8_000]) * MS,
            length: pick(&mut rng, &[10, 20, 30]) * SECOND,
            recovers: true,
            disk: false,
            capture: draw_capture(seed),
            precopy: if mix(seed ^ 0x93ec).is_multiple_of(2) { Precopy::Always } else { Precopy::Never },
        }
        .with_disk(!mix(seed ^ 0xd15c).is_multiple_of(4))
    }

    /// The same world, whose guest has a disk or has none.
    pub fn with_disk(mut self, disk: bool) -> Self {
        self.kinds.retain(|kind| !Kind::DISKS.contains(kind));
        let mut rng = Rng::new(mix(self.seed ^ 0xd15c_0001));
        let drawn = Kind::DISKS.into_iter().filter(|_| rng.range(0, 2) == 0);
        self.kinds.extend(drawn.filter(|_| disk));
        self.disk = disk;
        self
    }

    /// A world in which nothing fails by itself.
    pub fn calm(seed: u64) -> Self {
        Self {
            kinds: Vec::new(),
            pace: EpochPace::Fixed(Duration::from_millis(25)),
            link_rate: 0,
            on_backup_loss: OnBackupLoss::Solo,
            rejoin: Rejoin::AfterKeep,
            retry: Duration::from_millis(50),
            jitter: 20_000,
            disk: false,
            capture: CaptureStrategy::Postponed,
            precopy: Precopy::Never,
            ..Self::draw(seed)
        }
    }
}

/// Half of the worlds have epochs of a fixed length, the others such as follow the work. A chance of its own: the other draws of a seed do not depend on it.
fn draw_pace(seed: u64, interval: Duration) -> EpochPace {
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
fn draw_overload(seed: u64) -> OverloadRules {
    let mut rng = Rng::new(mix(seed ^ 0x0e_7e));
    let policies = [Overload::Lengthen, Overload::Throttle, Overload::Drop];
    OverloadRules {
        policy: policies[usize::try_from(rng.range(0, 3)).expect("small")],
        patience: Duration::from_millis(rng.range(500, 5_000)),
        max_hold: Duration::from_secs(1),
    }
}

/// One world in six has a link that is too narrow for its guest.
fn draw_link_rate(seed: u64) -> u64 {
    let mut rng = Rng::new(mix(seed ^ 0x11_4c));
    if rng.range(0, 6) == 0 { rng.range(20_000, 200_000) } else { 0 }
}

/// How pages come out of a world's guests.
fn draw_capture(seed: u64) -> CaptureStrategy {
    match mix(seed ^ 0xca97) % 8 {
        0 | 1 => CaptureStrategy::StopAndCopy,
        2..5 => CaptureStrategy::CopyOnWrite,
        _ => CaptureStrategy::Postponed,
    }
}
