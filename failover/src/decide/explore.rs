//! For explorers of the state space: states that differ only in what can never matter again become equal. Nothing here takes part in a decision.

use std::time::Duration;

use super::{Core, OpId, PeerReport, Protection, ReasonCode, Record, Request, STABLE, State, Versioned};

/// Moves times so that one moment becomes another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shift {
    now: Duration,
    to: Duration,
}

impl Shift {
    /// A moment that lies behind, and counts by its age only up to `reach`.
    pub(crate) fn past(self, at: Duration, reach: Duration) -> Duration {
        self.to - self.now.saturating_sub(at).min(reach)
    }

    /// A moment to come; what is due already is due now, and what never comes never comes.
    fn future(self, at: Duration) -> Duration {
        if at == Duration::MAX { at } else { self.to.saturating_add(at.saturating_sub(self.now)) }
    }
}

impl Core {
    /// Makes states equal that behave equally from now on: all times are moved so that `now` becomes `to`, ages count up to the timer that they are
    /// compared with, an outstanding request gets number 0, and texts for people are dropped. Timers of [`Duration::MAX`] never run out.
    ///
    /// # Panics
    /// When `to` is less than the longest age that matters.
    #[doc(hidden)]
    pub fn canonicalise(&mut self, now: Duration, to: Duration) {
        let shift = Shift { now, to };
        let timers = self.config.timers.clone();
        let probes = if timers.arbiter_probe == Duration::MAX {
            Duration::ZERO
        } else {
            timers.arbiter_probe.saturating_mul(3).saturating_add(Duration::from_millis(1))
        };
        let halt = if timers.isolation_halt == Duration::MAX { Duration::ZERO } else { timers.isolation_halt };
        let silence = self.silence();
        self.since = shift.past(self.since, halt);
        self.last_usable = self.last_usable.map(|at| shift.past(at, halt.max(probes)));
        self.probe_at = shift.future(self.probe_at);
        self.retry_at = self.retry_at.filter(|at| *at > now).map(|at| shift.future(at));
        self.protect_after = shift.future(self.protect_after);
        if let Protection::PausedUntil(until) = &mut self.protection {
            *until = shift.future(*until);
        }
        if let Some(asks) = &mut self.asks {
            asks.until = shift.future(asks.until);
        }
        if timers.protect_retry.is_zero() {
            (self.strikes, self.protected_since) = (0, None);
        }
        self.protected_since = self.protected_since.map(|at| shift.past(at, STABLE));
        self.detector.canonicalise(shift, silence, timers.eof_grace);
        self.report = self.report.take().map(|(heard, said)| {
            let age = now.saturating_sub(heard);
            let arbiter_age = said.arbiter_age.map(|said| said.saturating_add(age).min(probes));
            (to, PeerReport { arbiter_age, ..said })
        });
        self.canonicalise_state(shift);
        self.canonicalise_request(shift, halt.max(probes));
        let versioned = [self.known.as_mut(), self.refused.as_mut()];
        versioned.into_iter().flatten().for_each(|Versioned { record, .. }| record.note.clear());
    }

    fn canonicalise_state(&mut self, shift: Shift) {
        match &mut self.state {
            State::Draining { until, .. } | State::HandingOver { until, .. } | State::Forcing { until, .. } => {
                *until = shift.future(*until)
            }
            State::Fenced { until, rejoin_at, .. } => {
                *until = shift.future(*until);
                *rejoin_at = rejoin_at.map(|at| shift.future(at));
            }
            State::Stopping { note, until, .. } => (*note, *until) = ("", shift.future(*until)),
            _ => {}
        }
        // The only reason that a decision depends on: what the record says of a backup that is given up.
        let by_order = matches!(self.reason, ReasonCode::Unprotected | ReasonCode::ProtectionPaused);
        let unprotected = matches!(self.state, State::Contending { .. }) && by_order;
        self.reason = if unprotected { ReasonCode::Unprotected } else { ReasonCode::Starting };
    }

    fn canonicalise_request(&mut self, shift: Shift, reach: Duration) {
        self.next_op = 1;
        if let Some(op) = &mut self.op {
            (op.id, op.issued) = (OpId(0), shift.past(op.issued, reach));
            if let Request::Cas { record: Record { note, .. }, .. } = &mut op.request {
                note.clear();
            }
        }
    }
}
