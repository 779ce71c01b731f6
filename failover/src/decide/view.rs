//! What the core shows of itself: deadlines for the shell's event loop, facts for the status.

use std::collections::VecDeque;
use std::time::Duration;

use replication_proto::mutant::{Mutant, is};
use replication_proto::{Epoch, Generation};

use super::{Core, Gate, NodeRef, Protection, ReasonCode, State, StateName, Versioned};
use crate::detector::Detector;

/// Sleeps that are remembered one by one; what is older is added to the oldest of them.
const SLEEPS: usize = 64;

/// What a process slept through though it did not mean to. Its core's clock leaves short sleeps out, and what waited in its sockets meanwhile is
/// as old as the sleep: neither may make a status say more than is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slept {
    /// When, on the core's clock, and for how long; the latest is last.
    left_out: VecDeque<(Duration, Duration)>,
    woke: Option<Duration>,
}

impl Slept {
    /// `late` was left out of the core's clock when it stood at `now`.
    pub fn left_out(&mut self, now: Duration, late: Duration) {
        if self.left_out.len() == SLEEPS {
            let (_, oldest) = self.left_out.pop_front().expect("it is full");
            self.left_out[0].1 = self.left_out[0].1.saturating_add(oldest);
        }
        self.left_out.push_back((now, late));
    }

    /// A sleep so long that anything may have happened ended at `now`.
    pub fn woke(&mut self, now: Duration) {
        self.woke = Some(now);
    }

    /// What the core's clock left out from `then` on.
    fn since(&self, then: Duration) -> Duration {
        self.left_out
            .iter()
            .rev()
            .take_while(|(at, _)| *at >= then)
            .fold(Duration::ZERO, |sum, (_, late)| sum.saturating_add(*late))
    }
}

/// The facts that a status is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The state.
    pub state: StateName,
    /// Why.
    pub reason: ReasonCode,
    /// Since when, on the clock of `now`.
    pub since: Duration,
    /// The generation that this side runs in, or the highest that it has seen.
    pub generation: Generation,
    /// Whether this side holds the right to run.
    pub owner: bool,
    /// What the output gate was told last.
    pub gate: Gate,
    /// PROTECTED (G11): output is gated on a committed backup and the record says so.
    pub protected: bool,
    /// ARMED (G11): a takeover now would also be granted.
    pub armed: bool,
    /// The backup that this side deals with (owner), or the owner that it follows (standby).
    pub partner: Option<NodeRef>,
    /// How long ago the partner was heard.
    pub partner_age: Option<Duration>,
    /// How long ago the partner had a usable answer of the arbiter, as far as it said.
    pub partner_arbiter_age: Option<Duration>,
    /// The last committed epoch of a standby.
    pub committed: Option<Epoch>,
    /// How long ago the latest request to the arbiter was made that had a usable answer.
    pub arbiter_age: Option<Duration>,
    /// For how long a request to the arbiter has been outstanding.
    pub arbiter_pending: Option<Duration>,
    /// The record as last accepted.
    pub record: Option<Versioned>,
    /// What a person must look at.
    pub alarm: Option<ReasonCode>,
    /// The operator forced this side to run without the arbiter.
    pub blind: bool,
    /// This backup asks the owner for the guest.
    pub asks: bool,
    /// For how long backups are not taken on yet: protection is paused, or was lost too often.
    pub protects_in: Option<Duration>,
}

impl Core {
    /// The generation that this side runs in, or the highest that it has seen.
    pub fn generation(&self) -> Generation {
        self.mine.unwrap_or(self.highest)
    }

    /// The state in the words of the documentation.
    pub fn state_name(&self) -> StateName {
        match &self.state {
            State::Starting => StateName::Starting,
            State::Claiming { .. } => StateName::Claiming,
            State::Solo => StateName::Solo,
            State::Resync { .. } | State::Covering { .. } | State::Pairing { .. } => StateName::Resync,
            State::Protected { .. } => StateName::Protected,
            State::Contending { .. } => StateName::Contending,
            State::Draining { .. } | State::HandingOver { .. } => StateName::SwitchingOver,
            State::Stopping { .. } => StateName::Stopping,
            State::Standby if self.may_take_over() => StateName::InSync,
            State::Standby => StateName::Standby,
            State::TakingOver | State::Forcing { fenced: None, .. } => StateName::TakingOver,
            State::Fenced { .. } | State::Forcing { fenced: Some(_), .. } => StateName::Fenced,
            State::Ended => StateName::Ended,
        }
    }

    /// Facts for the status, at `now`, of a process that never slept.
    pub fn view(&self, now: Duration) -> View {
        self.view_of(now, &Slept::default())
    }

    /// Facts for the status, at `now`, of a process that slept.
    pub fn view_of(&self, now: Duration, slept: &Slept) -> View {
        let age = |then: Duration| now.saturating_sub(then).saturating_add(slept.since(then));
        let partner_arbiter_age =
            self.report.and_then(|(heard, report)| report.arbiter_age.map(|said| said.saturating_add(age(heard))));
        let arbiter_age = self.last_usable.map(age);
        let state = self.state_name();
        // Two probes may be lost before the arbiter counts as away.
        let fresh = |age: Option<Duration>| {
            age.is_some_and(|age| age <= self.config.timers.arbiter_probe.saturating_mul(3)) && self.alarm.is_none()
        };
        // What is read right after a long sleep was sent in the course of it. What comes after as long as nobody may be silent was sent since.
        let since = slept.woke.map_or(Duration::ZERO, |woke| woke.saturating_add(self.silence()));
        let partner_alive =
            self.evidence(now).is_none() && self.detector.last_heard().is_some_and(|heard| heard >= since);
        let (protected, armed) = match state {
            StateName::Protected => (true, partner_alive && fresh(partner_arbiter_age)),
            // The standby speaks for itself; whether output is gated only the owner can say.
            StateName::InSync => {
                let said = self.report.is_some_and(|(_, report)| report.protected) && partner_alive;
                (said, said && fresh(arbiter_age))
            }
            StateName::Resync if is(Mutant::ProtectedTooEarly) => {
                (matches!(self.state, State::Covering { .. } | State::Pairing { .. }), false)
            }
            _ => (false, false),
        };
        View {
            state,
            reason: self.standby_reason(),
            since: self.since,
            generation: self.generation(),
            owner: self.mine.is_some(),
            gate: self.gate.clone(),
            protected,
            armed,
            partner: self.backup().or(self.standby.owner.as_ref()).or(self.waiting.as_ref()).cloned(),
            partner_age: self.detector.last_heard().map(age),
            partner_arbiter_age,
            committed: self.standby.committed,
            arbiter_age,
            arbiter_pending: self.op.as_ref().map(|op| age(op.issued)),
            record: self.known.clone(),
            alarm: self.alarm,
            blind: self.blind,
            asks: self.asks.is_some(),
            protects_in: self.protects_at().map(|at| at.saturating_sub(now)).filter(|left| !left.is_zero()),
        }
    }

    /// When backups are taken on again, if that is a matter of time.
    fn protects_at(&self) -> Option<Duration> {
        match (&self.state, &self.protection) {
            (State::Solo | State::Contending { .. }, Protection::On) => Some(self.protect_after),
            (_, Protection::PausedUntil(until)) => Some(*until),
            _ => None,
        }
    }

    /// When to hand over [`super::Input::Tick`] at the latest if nothing else happens. Always later than the last `now`.
    pub fn next_deadline(&self, now: Duration) -> Option<Duration> {
        let timers = &self.config.timers;
        let watched = |detector: &Detector| detector.deadline(self.silence(), timers.eof_grace);
        let own = match &self.state {
            State::Stopping { until, .. }
            | State::Draining { until, .. }
            | State::HandingOver { until, .. }
            | State::Forcing { until, .. } => Some(*until),
            State::Fenced { until, rejoin_at, .. } => {
                Some(rejoin_at.filter(|at| *at > now).unwrap_or(*until).min(*until))
            }
            State::Contending { .. } => self.isolated_at(),
            State::Solo if self.waiting.is_some() => Some(self.protect_after),
            State::Ended => return None,
            _ => None,
        };
        let waits = self.op.is_none();
        let pause = match self.protection {
            Protection::PausedUntil(until) => Some(until),
            Protection::On | Protection::Off => None,
        };
        let asks = self.asks.as_ref().map(|asks| asks.until);
        let retry = self.retry_at.filter(|_| waits);
        let probe = waits.then_some(self.probe_at);
        [own, watched(&self.detector), pause, asks, retry, probe].into_iter().flatten().filter(|at| *at > now).min()
    }
}
