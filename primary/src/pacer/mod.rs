//! When an epoch ends, and how fast a base is copied. Pure: what happens and `now` in, decisions out.
//!
//! An operator states a target, not an interval. [`adaptive`] has the rules that follow the work (Kemari's idea, a checkpoint for an output, with several
//! on their way at once); [`Pacer::look`] is asked whenever something happened, or when it wants to be.

use std::collections::VecDeque;
use std::time::Duration;

use failover::config::EpochPace;
use failover::status::PacingStatus;
use replication_proto::Epoch;

mod adaptive;
mod base;
mod measured;
#[cfg(test)]
mod tests;

pub use adaptive::{KEEP_FRESH, MOST_HELD, WORK};
pub use base::BasePacer;

use adaptive::Adaptive;
use measured::Measured;

/// What a decision is made on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Time.
    pub now: Duration,
    /// Since when the first output of the running epoch waits, or an epoch is wanted by whoever holds outputs.
    pub waiting_since: Option<Duration>,
    /// Processor time that the guest's vCPUs have used in their lives, on average; `None`: not known, so it is taken to compute all the time.
    pub ran: Option<Duration>,
    /// Something on this side gets on with each epoch only: a comparison of both sides, a log of disk changes that fills.
    pub asked: bool,
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
}

impl Pacer {
    /// The first epoch begins `now`, while the base that ended `base` is on its way. `in_flight_most`: so many checkpoints may be without a commit.
    pub fn new(pace: EpochPace, in_flight_most: usize, base: Epoch, now: Duration) -> Self {
        let rule = match pace {
            EpochPace::Fixed(interval) => Rule::Fixed { interval, next: now + interval },
            EpochPace::Latency(latency) => Rule::Adaptive(Adaptive::latency(latency, now)),
            EpochPace::Overhead(share) => Rule::Adaptive(Adaptive::overhead(share.share(), now)),
        };
        let flying = VecDeque::from([Flying { epoch: base, began: None, waited_since: None }]);
        Self { pace, rule, in_flight_most, flying, measured: Measured::new(now) }
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
        let due = match &self.rule {
            // A commit that makes room is told.
            _ if self.flying.len() >= self.in_flight_most => return Next::Look(look.now + WORK),
            Rule::Fixed { next, .. } => *next,
            Rule::Adaptive(rule) => rule.due(look, self.flying.len(), self.measured.commit()),
        };
        if look.now >= due { Next::End } else { Next::Look(due) }
    }

    /// A checkpoint was taken; the guest runs again, `now`.
    ///
    /// The rhythm of fixed intervals is kept while we keep up; after a delay it starts anew, because epochs that were missed are not made up for (overload
    /// lengthens epochs, guarantee G7).
    ///
    /// # Panics
    /// More are in flight than may be: whoever takes checkpoints did not ask.
    pub fn ended(&mut self, taken: &Taken, now: Duration) {
        let Taken { epoch, began, pause, waited_since, ran } = *taken;
        self.flying.push_back(Flying { epoch, began: Some(began), waited_since });
        let lost = match &mut self.rule {
            Rule::Fixed { interval, next } => {
                *next += *interval;
                if *next <= now {
                    *next = now + *interval;
                }
                pause
            }
            Rule::Adaptive(rule) => rule.ended(pause, ran, now),
        };
        self.measured.ended(lost, now);
        assert!(self.flying.len() <= self.in_flight_most, "{} checkpoints in flight", self.flying.len());
    }

    /// The backup has committed every epoch up to this one.
    pub fn committed(&mut self, epoch: Epoch, now: Duration) {
        while let Some(flying) = self.flying.front().copied().filter(|flying| flying.epoch <= epoch) {
            self.flying.pop_front();
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
