//! A side that lost the right to run: its guest is paused and kept, for as long as somebody may want it back; then the process ends, or becomes the
//! backup of the side that runs.

use std::time::Duration;

use replication_proto::mutant::{Mutant, is};

use super::{Action, CommandOutcome, Core, ExitCode, FenceReason, Gate, ReasonCode, Rejoin, Request, State, Ticket};

impl Core {
    /// Somebody else has, or may have, the right to run.
    pub(super) fn superseded(&mut self, now: Duration, out: &mut Vec<Action>) {
        match self.state {
            State::Stopping { .. } => {
                out.push(Action::HoldOutput);
                self.mine = None;
                self.stop_reply("stopped; the other side runs the guest", out);
                self.reason = ReasonCode::Superseded;
                self.exit(ExitCode::Fenced, out);
            }
            State::HandingOver { ticket, .. } => {
                self.fence(FenceReason::HandedOver, now, out);
                let text = format!("{} runs in generation {}", self.config.peer, self.highest);
                out.push(Action::Reply { ticket, outcome: CommandOutcome::Done(text) });
            }
            State::Draining { ticket, .. } => {
                self.fence(FenceReason::Superseded, now, out);
                let text = format!("{} took over in the meantime", self.config.peer);
                out.push(Action::Reply { ticket, outcome: CommandOutcome::Done(text) });
            }
            _ => self.fence(FenceReason::Superseded, now, out),
        }
    }

    pub(super) fn fence(&mut self, reason: FenceReason, now: Duration, out: &mut Vec<Action>) {
        self.mine = None;
        self.gate = Gate::Held;
        self.paused = true;
        self.waiting = None;
        self.detector.forget();
        out.push(Action::HoldOutput);
        out.push(Action::Fence { reason });
        self.go_fenced(reason, now);
    }

    /// The guest is paused here; how long it is kept depends on why.
    pub(super) fn go_fenced(&mut self, reason: FenceReason, now: Duration) {
        let timers = &self.config.timers;
        let (code, keep) = match reason {
            FenceReason::Superseded => (ReasonCode::Superseded, timers.fenced_keep),
            FenceReason::Isolated => (ReasonCode::Isolated, timers.fenced_keep),
            FenceReason::HandedOver => (ReasonCode::HandedOver, timers.handed_over_keep),
        };
        let rejoin_after = match (self.config.rejoin, reason) {
            // Perhaps nobody else has the guest: what is kept here may be the only copy there is.
            (_, FenceReason::Isolated) if !is(Mutant::IsolatedRejoins) => None,
            (Rejoin::Never, _) => None,
            (Rejoin::AfterKeep, FenceReason::Superseded) => Some(keep),
            (Rejoin::AfterKeep | Rejoin::AtOnce, _) => Some(timers.rejoin_linger),
        };
        let rejoin_at = rejoin_after.map(|after| now.saturating_add(after));
        self.go(State::Fenced { reason, until: now.saturating_add(keep), rejoin_at }, code, now);
    }

    /// A side that had halted because it reached nobody learns that the other side has the guest: from here on it is one that was superseded.
    pub(super) fn isolation_ends(&mut self, now: Duration) {
        if matches!(self.state, State::Fenced { reason: FenceReason::Isolated, .. }) && self.peer_owns() {
            self.go_fenced(FenceReason::Superseded, now);
        }
    }

    pub(super) fn advance_fenced(
        &mut self,
        reason: FenceReason,
        until: Duration,
        rejoin_at: Option<Duration>,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        if rejoin_at.is_some_and(|at| now >= at) {
            if self.may_drop_guest() || (is(Mutant::IsolatedRejoins) && reason == FenceReason::Isolated) {
                self.state = State::Ended;
                self.reason = ReasonCode::Rejoining;
                return out.push(Action::Rejoin);
            }
            if now < until && self.stale && self.due(now) {
                // Who owns the guest is known from hearsay only.
                return self.read(now, out);
            }
        }
        if now >= until {
            self.exit(fence_exit(reason), out);
        }
    }

    /// An operator wants this side as the backup, whatever the policy says.
    pub(super) fn rejoin(&mut self, ticket: Ticket, now: Duration, out: &mut Vec<Action>) {
        let refused = |text: String| Action::Reply { ticket, outcome: CommandOutcome::Refused(text) };
        let State::Fenced { reason, until, .. } = self.state else {
            let text = format!("this side is {}: only a fenced side has anything to give up", self.state_name().word());
            return out.push(refused(text));
        };
        if !self.may_drop_guest() {
            let text = format!(
                "the record does not show that {} owns the guest: what is kept here may be its only copy; \
                 repair the arbiter's path, or resume it here with `ftctl failover --force`",
                self.config.peer
            );
            return out.push(refused(text));
        }
        let rejoin_at = now.saturating_add(self.config.timers.rejoin_linger);
        self.state = State::Fenced { reason, until: until.max(rejoin_at), rejoin_at: Some(rejoin_at) };
        let text = format!("drops its copy of the guest and becomes the backup of {}", self.config.peer);
        out.push(Action::Reply { ticket, outcome: CommandOutcome::Done(text) });
    }

    /// The record names the peer as the owner in a later generation than any of ours, and no write of ours can change that any more.
    fn may_drop_guest(&self) -> bool {
        let writing = matches!(self.op.as_ref().map(|op| &op.request), Some(Request::Cas { .. }));
        self.peer_owns() && !self.stale && self.settled() && !writing
    }

    fn peer_owns(&self) -> bool {
        self.known.as_ref().is_some_and(|known| {
            let record = &known.record;
            record.owner.node == self.config.peer && record.generation > self.permitted
        })
    }
}

pub(super) const fn fence_exit(reason: FenceReason) -> ExitCode {
    match reason {
        FenceReason::Superseded => ExitCode::Fenced,
        FenceReason::Isolated => ExitCode::Isolated,
        FenceReason::HandedOver => ExitCode::HandedOver,
    }
}
