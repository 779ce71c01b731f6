//! Epochs that follow the work.
//!
//! | what there is | when the epoch ends |
//! |---|---|
//! | an output waits, nothing is in flight | at once, or as soon as the other clients have spoken, too ([`super::rounds`]), while pauses stay within their budget of the guest's time |
//! | an output waits behind a checkpoint that is in flight | with that one's commit, or when waiting longer would miss the target |
//! | an output waits, the budget is spent | when it allows the next pause; with a latency as the target, not later than the target allows |
//! | a guest that computes and says nothing | after [`WORK`] of processor time, so that no epoch outgrows the backup's limits |
//! | an idle guest | after [`KEEP_FRESH`], so that a takeover knows about what time it is |
//!
//! What a pause costs is counted in the guest's time: one that finds the guest waiting for a client costs it little, and a guest that waits for
//! answers to what it said gains nothing from a longer epoch.

use std::time::Duration;

use super::Look;
use super::rounds::Rounds;

/// Most processor time of the guest in one epoch, while no budget asks for more.
pub const WORK: Duration = Duration::from_millis(25);
/// Longest epoch of an idle guest.
pub const KEEP_FRESH: Duration = Duration::from_secs(1);
/// No output waits longer for the end of its epoch, whatever the budget: half of the least retransmission timeout of TCP (200 ms on Linux).
pub const MOST_HELD: Duration = Duration::from_millis(100);
/// The guest's time that a latency target may cost before epochs get longer, as far as the target lets them.
const LATENCY_BUDGET: f64 = 0.25;
/// Guest time that was not lost counts for so long: a burst after silence is served at once.
const CREDIT: Duration = Duration::from_millis(20);
/// With checkpoints in flight and a target that cannot be met, epochs are still no shorter than this part of it: more of them would only add to the load.
const LEAST_PART: u32 = 4;
/// Weight of the newest epoch in the estimate of how busy the guest is.
const NEWEST: f64 = 0.125;

#[derive(Clone, Copy, Debug)]
enum Target {
    Latency(Duration),
    Overhead,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Adaptive {
    target: Target,
    /// The part of the guest's time that pauses may take.
    budget: f64,
    /// When the budget allows the next pause.
    allowed_at: Duration,
    /// When the last pause ended.
    began: Duration,
    /// The guest's processor time then.
    ran: Option<Duration>,
    /// The part of the time between pauses in which the guest computes.
    busy: f64,
    rounds: Rounds,
}

impl Adaptive {
    pub(super) fn latency(latency: Duration, now: Duration) -> Self {
        Self::new(Target::Latency(latency), LATENCY_BUDGET, now)
    }

    pub(super) fn overhead(budget: f64, now: Duration) -> Self {
        Self::new(Target::Overhead, budget, now)
    }

    fn new(target: Target, budget: f64, now: Duration) -> Self {
        assert!(budget > 0.0 && budget <= 1.0, "a share of the guest's time, not {budget}");
        Self { target, budget, allowed_at: now, began: now, ran: None, busy: 1.0, rounds: Rounds::default() }
    }

    pub(super) fn bound(&self) -> Duration {
        match self.target {
            Target::Latency(latency) => latency.min(MOST_HELD),
            Target::Overhead => MOST_HELD,
        }
    }

    /// When the running epoch ends, as things are. `commit`: what lately passed from a pause to its commit.
    pub(super) fn due(&mut self, look: &Look, in_flight: usize, commit: Duration) -> Duration {
        self.rounds.look(look.outputs, in_flight, commit, look.now);
        let work = self.work_due(look);
        let Some(since) = look.waiting_since else { return work };
        let alone = self.rounds.holds(look.outputs).map_or(since, |until| until.max(since)).max(self.allowed_at);
        let output = match self.target {
            Target::Latency(latency) => {
                let late = since + latency.saturating_sub(commit).max(latency / LEAST_PART);
                if in_flight == 0 { alone.min(late.max(since)) } else { late }
            }
            Target::Overhead if in_flight == 0 => alone,
            Target::Overhead => self.allowed_at.max(since + commit),
        };
        output.min(since + MOST_HELD).min(work)
    }

    /// When the epoch ends even if nobody says anything.
    fn work_due(&self, look: &Look) -> Duration {
        let fresh = self.began + KEEP_FRESH;
        if look.asked {
            return self.allowed_at.max(self.began + WORK).min(fresh);
        }
        // An output may wait for so long for the budget, and so may work.
        let most = self.began + MOST_HELD;
        let left = match (look.ran, self.ran) {
            (Some(ran), Some(before)) => WORK.saturating_sub(ran.saturating_sub(before)),
            _ => (self.began + WORK).saturating_sub(look.now),
        };
        if left.is_zero() {
            return self.allowed_at.min(most.max(look.now)).min(fresh).max(self.began + WORK);
        }
        // It cannot have used what is left any sooner.
        (look.now + left).min(fresh)
    }

    /// See [`super::Pacer::hoped_for`].
    pub(super) fn hoped_for(&self, look: &Look) -> Option<u32> {
        self.rounds.hoped_for(look.outputs, look.now)
    }

    /// A commit let out so many outputs.
    pub(super) fn released(&mut self, outputs: u32) {
        self.rounds.released(outputs);
    }

    /// A pause ended, of an epoch with so many outputs. Returns what the guest lost by it.
    pub(super) fn ended(
        &mut self,
        pause: Duration,
        (outputs, ran): (u32, Option<Duration>),
        now: Duration,
    ) -> Duration {
        self.rounds.ended(outputs);
        let between = now.saturating_sub(self.began).saturating_sub(pause).as_secs_f64();
        let newest = match (ran, self.ran) {
            (Some(ran), Some(before)) if between > 0.0 => ran.saturating_sub(before).as_secs_f64() / between,
            (Some(_), None) => self.busy,
            _ => 1.0,
        };
        self.busy += (newest.clamp(0.0, 1.0) - self.busy) * NEWEST;
        let lost = pause.mul_f64(self.busy);
        self.allowed_at = self.allowed_at.max(now.saturating_sub(CREDIT)) + lost.mul_f64(1.0 / self.budget);
        (self.began, self.ran) = (now, ran);
        lost
    }
}
