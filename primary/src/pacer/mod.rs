//! When an epoch ends, and how fast a base is copied. Pure: what happens and `now` in, decisions out.
//!
//! An operator states a target, not an interval. [`adaptive`] has the rules that follow the work (Kemari's idea, a checkpoint for an output, with several
//! on their way at once); [`Pacer::look`] is asked whenever something happened, or when it wants to be.

use std::collections::VecDeque;
use std::time::Duration;

use failover::config::{EpochPace, Overload, PairConfig};
use failover::status::{OverloadStatus, PacingStatus};
use replication_proto::Epoch;

mod adaptive;
mod base;
mod measured;
mod pressure;
#[cfg(test)]
mod pressure_tests;
mod rounds;
#[cfg(test)]
mod tests;

pub use adaptive::{KEEP_FRESH, MOST_HELD, WORK};
pub use base::BasePacer;
pub use pressure::{Judged, OverloadRules, Reading, Slow, Turn};

use adaptive::Adaptive;
use measured::Measured;
use pressure::Pressure;

/// What is staged leaves room again soon after the link took some of it, which rings no bell.
const ROOM_INTERVAL: Duration = Duration::from_millis(5);

/// The operator's will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// When epochs end.
    pub pace: EpochPace,
    /// What happens when link or backup cannot keep up.
    pub overload: OverloadRules,
}

impl From<&PairConfig> for Rules {
    fn from(config: &PairConfig) -> Self {
        let (epoch, max_hold) = (&config.epoch, config.timers.max_hold);
        let overload = OverloadRules { policy: epoch.overload, patience: epoch.overload_patience, max_hold };
        Self { pace: epoch.pace, overload }
    }
}

impl From<EpochPace> for Rules {
    fn from(pace: EpochPace) -> Self {
        let (patience, max_hold) = (Duration::from_secs(5), Duration::from_secs(1));
        Self { pace, overload: OverloadRules { policy: Overload::default(), patience, max_hold } }
    }
}

/// What a decision is made on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Time.
    pub now: Duration,
    /// Since when the first output of the running epoch waits, or an epoch is wanted by whoever holds outputs.
    pub waiting_since: Option<Duration>,
    /// How many outputs of the running epoch wait.
    pub outputs: u32,
    /// Processor time that the guest's vCPUs have used in their lives, on average; `None`: not known, so it is taken to compute all the time.
    pub ran: Option<Duration>,
    /// Something on this side gets on with each epoch only: a comparison of both sides, a log of disk changes that fills.
    pub asked: bool,
    /// What is staged is at its limit: there is no room for another checkpoint.
    pub full: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// End the epoch now.
    End,
    /// Look again then, or as soon as an output waits or a commit arrives.
    Look(Duration),
}

/// A checkpoint that was taken.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// The epoch that it ended.
    pub epoch: Epoch,
    /// When its pause began.
    pub began: Duration,
    /// For how long the guest stood.
    pub pause: Duration,
    /// Since when the first of its outputs had waited.
    pub waited_since: Option<Duration>,
    /// As [`Look::outputs`], when its end was decided.
    pub outputs: u32,
    /// As [`Look::ran`], after the pause.
    pub ran: Option<Duration>,
}

/// A checkpoint that is not committed.
#[derive(Clone, Copy, Debug)]
struct Flying {
    epoch: Epoch,
    /// `None` of a base, whose commit says nothing of an epoch's.
    began: Option<Duration>,
    waited_since: Option<Duration>,
    outputs: u32,
}

#[derive(Clone, Debug)]
enum Rule {
    Fixed { interval: Duration, next: Duration },
    Adaptive(Adaptive),
}

/// Decides when epochs end.
#[derive(Clone, Debug)]
pub struct Pacer {
    pace: EpochPace,
    rule: Rule,
    in_flight_most: usize,
    flying: VecDeque<Flying>,
    measured: Measured,
    pressure: Pressure,
}

impl Pacer {
    /// The first epoch begins `now`, while the base that ended `base` is on its way. `in_flight_most`: so many checkpoints may be without a commit.
    pub fn new(rules: impl Into<Rules>, in_flight_most: usize, base: Epoch, now: Duration) -> Self {
        let Rules { pace, overload } = rules.into();
        let pressure = Pressure::new(overload, in_flight_most, now);
        let rule = match pace {
            EpochPace::Fixed(interval) => Rule::Fixed { interval, next: now + interval },
            EpochPace::Latency(latency) => Rule::Adaptive(Adaptive::latency(latency, now)),
            EpochPace::Overhead(share) => Rule::Adaptive(Adaptive::overhead(share.share(), now)),
        };
        let flying = VecDeque::from([Flying { epoch: base, began: None, waited_since: None, outputs: 0 }]);
        Self { pace, rule, in_flight_most, flying, measured: Measured::new(now), pressure }
    }

    /// Whether [`Look::ran`] matters.
    pub fn wants_ran(&self) -> bool {
        matches!(self.rule, Rule::Adaptive(_))
    }

    /// Checkpoints without a commit.
    pub fn in_flight(&self) -> usize {
        self.flying.len()
    }

    /// The longest that an output waits for the end of its epoch while fewer checkpoints than the limit are on their way.
    pub fn bound(&self) -> Duration {
        match &self.rule {
            Rule::Fixed { interval, .. } => *interval,
            Rule::Adaptive(rule) => rule.bound(),
        }
    }

    /// What to do now.
    pub fn look(&mut self, look: &Look) -> Next {
        self.measured.time_passes(look.now);
        let due = match &mut self.rule {
            Rule::Fixed { next, .. } => *next,
            Rule::Adaptive(rule) => rule.due(look, self.flying.len(), self.measured.commit()),
        };
        // A commit that makes room is told.
        let behind = self.flying.len() >= self.pressure.depth();
        if look.now < due {
            self.pressure.free(look.now);
            Next::Look(due)
        } else if behind || look.full {
            self.pressure.blocked(due);
            Next::Look(look.now + if behind { WORK } else { ROOM_INTERVAL })
        } else {
            self.pressure.free(look.now);
            Next::End
        }
    }

    /// With how many outputs to look again, if that matters before the time that [`Pacer::look`] named.
    pub fn hoped_for(&self, look: &Look) -> Option<u32> {
        match &self.rule {
            Rule::Fixed { .. } => None,
            Rule::Adaptive(rule) => rule.hoped_for(look),
        }
    }

    /// Looks whether link and backup keep up; to be called several times a second.
    pub fn judge(&mut self, reading: &Reading, now: Duration) -> Judged {
        let oldest = self.flying.front().map(|flying| flying.began);
        if oldest == Some(None) {
            self.pressure.begin_anew(now);
            return Judged::default();
        }
        let waits = oldest.flatten().map(|began| now.saturating_sub(began)).unwrap_or_default();
        self.pressure.judge(reading, self.measured.commit().max(waits), now)
    }

    /// What is slow, and since when, if link or backup do not keep up.
    pub fn overloaded(&self) -> Option<(Slow, Duration)> {
        self.pressure.overloaded()
    }

    /// Whether they do, for the status.
    pub fn overload_status(&self, now: Duration) -> OverloadStatus {
        self.pressure.status(self.measured.commit(), self.measured.epochs_per_second(), now)
    }

    /// A checkpoint was taken; the guest runs again, `now`.
    ///
    /// The rhythm of fixed intervals is kept while we keep up; after a delay it starts anew, because epochs that were missed are not made up for (overload
    /// lengthens epochs, guarantee G7). It also starts anew where less than half of an interval is left: a guest that stands for most of each
    /// interval, as one whose pauses last until the commit, would hardly run at all.
    ///
    /// # Panics
    /// More are in flight than may be: whoever takes checkpoints did not ask.
    pub fn ended(&mut self, taken: &Taken, now: Duration) {
        let Taken { epoch, began, pause, waited_since, outputs, ran } = *taken;
        self.flying.push_back(Flying { epoch, began: Some(began), waited_since, outputs });
        let lost = match &mut self.rule {
            Rule::Fixed { interval, next } => {
                *next += *interval;
                if *next < now + *interval / 2 {
                    *next = now + *interval;
                }
                pause
            }
            Rule::Adaptive(rule) => rule.ended(pause, (outputs, ran), now),
        };
        self.measured.ended(lost, now);
        assert!(self.flying.len() <= self.in_flight_most, "{} checkpoints in flight", self.flying.len());
    }

    /// The backup has committed every epoch up to this one.
    pub fn committed(&mut self, epoch: Epoch, now: Duration) {
        while let Some(flying) = self.flying.front().copied().filter(|flying| flying.epoch <= epoch) {
            self.flying.pop_front();
            if let Rule::Adaptive(rule) = &mut self.rule {
                rule.released(flying.outputs);
            }
            if let Some(began) = flying.began {
                let added = flying.waited_since.map(|since| now.saturating_sub(since));
                self.measured.committed(now.saturating_sub(began), added);
            }
        }
    }

    /// How it goes, for the status.
    pub fn status(&self) -> PacingStatus {
        let status = self.measured.fill(PacingStatus::configured(self.pace));
        let (met, text) = match self.pace {
            EpochPace::Fixed(_) => (None, String::new()),
            EpochPace::Latency(latency) => self.measured.judge_latency(latency),
            EpochPace::Overhead(share) => self.measured.judge_overhead(share.share(), MOST_HELD),
        };
        PacingStatus { met, text, ..status }
    }
}
