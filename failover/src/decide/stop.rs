//! The stop rule: first the record says that the guest is off, then the backup hears it, then the process ends.

use std::time::Duration;

use replication_proto::mutant::{Mutant, is};

use super::fenced::fence_exit;
use super::{
    Action, CommandOutcome, Core, ExitCode, Gate, GoodbyeReason, GuestEnd, Reason, ReasonCode, Request, State, Ticket,
};

impl Core {
    pub(super) fn stop(&mut self, ticket: Ticket, now: Duration, out: &mut Vec<Action>) {
        match self.state.clone() {
            State::Stopping { .. } | State::Ended => {
                let outcome = CommandOutcome::Refused("is stopping already".into());
                out.push(Action::Reply { ticket, outcome });
            }
            State::Fenced { reason, .. } => self.stop_now(ticket, fence_exit(reason), out),
            _ if self.mine.is_none() => {
                out.push(Action::SayGoodbye(GoodbyeReason::Leaving));
                self.stop_now(ticket, ExitCode::Ok, out);
            }
            State::Draining { ticket: earlier, .. } | State::HandingOver { ticket: earlier, .. } => {
                let outcome = CommandOutcome::Refused("stopped before the switchover was done".into());
                out.push(Action::Reply { ticket: earlier, outcome });
                self.begin_stop(Some(ticket), ExitCode::Ok, ReasonCode::StopAsked, "stopped by an operator", now, out);
            }
            _ => self.begin_stop(Some(ticket), ExitCode::Ok, ReasonCode::StopAsked, "stopped by an operator", now, out),
        }
    }

    fn stop_now(&mut self, ticket: Ticket, code: ExitCode, out: &mut Vec<Action>) {
        self.reason = ReasonCode::StopAsked;
        out.push(Action::Reply { ticket, outcome: CommandOutcome::Done("stopped".into()) });
        self.exit(code, out);
    }

    pub(super) fn guest_ended(&mut self, end: GuestEnd, now: Duration, out: &mut Vec<Action>) {
        if self.mine.is_none() || matches!(self.state, State::Stopping { .. }) {
            return;
        }
        let (code, reason, note) = match end {
            GuestEnd::PoweredOff => (ExitCode::Ok, ReasonCode::GuestPoweredOff, "the guest switched itself off"),
            GuestEnd::Reset => (ExitCode::GuestReset, ReasonCode::GuestReset, "the guest asked for a reset"),
            GuestEnd::Crashed => (ExitCode::GuestCrashed, ReasonCode::GuestCrashed, "the guest crashed"),
        };
        if let State::Draining { ticket, .. } | State::HandingOver { ticket, .. } = self.state {
            let outcome = CommandOutcome::Refused("the guest ended".into());
            out.push(Action::Reply { ticket, outcome });
        }
        self.begin_stop(None, code, reason, note, now, out);
    }

    fn begin_stop(
        &mut self,
        ticket: Option<Ticket>,
        exit: ExitCode,
        reason: ReasonCode,
        note: &'static str,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        if !self.paused {
            self.paused = true;
            out.push(Action::PauseGuest);
        }
        // What was not acked waits for the record, too.
        if self.gate != Gate::Open {
            self.hold(out);
        }
        self.asked = ticket;
        let until = now.saturating_add(self.config.timers.stop_patience);
        self.go(State::Stopping { exit, note, until }, reason, now);
    }

    pub(super) fn advance_stopping(
        &mut self,
        exit: ExitCode,
        note: &'static str,
        until: Duration,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let recorded = !self.stale
            && self.settled()
            && self.known.as_ref().is_some_and(|known| {
                known.record.reason == Reason::Stopped && known.record.written_by == self.config.me
            });
        if recorded || is(Mutant::StopUnrecorded) {
            // Nobody can take over any more, so what the guest said last may leave, acked or not.
            self.gate = Gate::Open;
            out.push(Action::OpenOutput);
            out.push(Action::SayGoodbye(GoodbyeReason::Stopped));
            self.stop_reply("stopped", out);
            return self.exit(exit, out);
        }
        if now >= until {
            let takeover_possible = self.stale
                || !self.settled()
                || self.naming()
                || self.known.as_ref().is_some_and(|known| known.record.in_sync.is_some());
            out.push(Action::SayGoodbye(GoodbyeReason::Stopped));
            self.stop_reply("stopped, but the arbiter could not be told", out);
            let code = if takeover_possible && exit == ExitCode::Ok { ExitCode::StopNotRecorded } else { exit };
            self.reason = ReasonCode::StopNotRecorded;
            return self.exit(code, out);
        }
        if !self.due(now) {
            return;
        }
        if self.stale {
            return self.read(now, out);
        }
        let Some(mine) = self.mine else { return };
        let me = self.config.me.clone();
        let record = self.record(mine, &me, None, Reason::Stopped, note);
        self.swap(record, now, out);
    }

    /// A compare-and-swap that names a backup is under way: it may have been done by now.
    fn naming(&self) -> bool {
        let request = self.op.as_ref().map(|op| &op.request);
        matches!(request, Some(Request::Cas { record, .. }) if record.in_sync.is_some())
    }

    pub(super) fn stop_reply(&mut self, text: &str, out: &mut Vec<Action>) {
        if let Some(ticket) = self.asked.take() {
            out.push(Action::Reply { ticket, outcome: CommandOutcome::Done(text.to_owned()) });
        }
    }
}
