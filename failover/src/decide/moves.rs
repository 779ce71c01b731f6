//! What operators order: the guest to the other side, protection on, off and paused.

use std::time::Duration;

use replication_proto::mutant::{Mutant, is};

use super::{
    Action, Asks, Command, CommandOutcome, Core, GoodbyeReason, NodeRef, Protection, ReasonCode, State, Ticket,
};

/// The ticket of a switchover that the backup asked for: its operator waits there.
const PEERS_TICKET: Ticket = Ticket(0);

impl Core {
    pub(super) fn command(&mut self, ticket: Ticket, command: Command, now: Duration, out: &mut Vec<Action>) {
        match command {
            Command::Stop => self.stop(ticket, now, out),
            Command::ForceTakeover { without_arbiter } => self.force(ticket, without_arbiter, now, out),
            Command::Rejoin => self.rejoin(ticket, now, out),
            Command::Switchover => match self.state.clone() {
                State::Protected { backup } => self.begin_switchover(backup, ticket, now, out),
                State::Standby => self.ask_for_guest(ticket, now, out),
                _ if self.mine.is_none() => {
                    refuse(ticket, "this side does not run the guest: ask the owner".into(), out);
                }
                _ => {
                    let text = format!(
                        "not protected ({}): nothing to switch to; wait with `ftctl status --wait armed`",
                        self.state_name().word()
                    );
                    refuse(ticket, text, out);
                }
            },
            Command::Protect | Command::Unprotect | Command::PauseProtection { .. } | Command::Verify
                if self.mine.is_none() =>
            {
                refuse(ticket, format!("this side does not run the guest: ask {}", self.config.peer), out);
            }
            Command::Verify if matches!(self.state, State::Protected { .. }) => out.push(Action::Verify(ticket)),
            Command::Verify => {
                let text = format!(
                    "not protected ({}): there is nothing to compare with; wait with `ftctl status --wait armed`",
                    self.state_name().word()
                );
                refuse(ticket, text, out);
            }
            Command::Protect => {
                self.protection = Protection::On;
                done(ticket, "a backup is taken on as soon as it is there".into(), out);
            }
            Command::Unprotect | Command::PauseProtection { .. }
                if matches!(self.state, State::Stopping { .. } | State::HandingOver { .. }) =>
            {
                refuse(ticket, "the guest is on its way off this node".into(), out);
            }
            Command::Unprotect => {
                self.give_protection_up(Protection::Off, ReasonCode::Unprotected, now, out);
                done(ticket, "no backup is taken on until `ftctl protect`".into(), out);
            }
            Command::PauseProtection { length } => {
                let until = Protection::PausedUntil(now.saturating_add(length));
                self.give_protection_up(until, ReasonCode::ProtectionPaused, now, out);
                let text = format!("no backup is taken on for {} s, or until `ftctl protect`", length.as_secs());
                done(ticket, text, out);
            }
        }
    }

    fn give_protection_up(&mut self, protection: Protection, reason: ReasonCode, now: Duration, out: &mut Vec<Action>) {
        self.protection = protection;
        if self.backup().is_some() {
            let strikes = self.strikes;
            self.lose(reason, now, out);
            // An order says nothing about the link.
            self.strikes = strikes;
        }
        self.reason = reason;
    }

    // ---- asked for by the backup -------------------------------------------------------------------------------------------------

    /// An operator wants the guest here: the owner is asked for it, in heartbeats.
    fn ask_for_guest(&mut self, ticket: Ticket, now: Duration, out: &mut Vec<Action>) {
        if !self.may_take_over() || self.evidence(now).is_some() || self.standby.stopped {
            let text = format!(
                "this backup is not in sync ({}): wait with `ftctl status --wait armed`",
                self.standby_reason().text()
            );
            return refuse(ticket, text, out);
        }
        if self.asks.is_some() {
            return refuse(ticket, format!("{} was asked for the guest already", self.config.peer), out);
        }
        self.asks = Some(Asks { ticket, until: now.saturating_add(self.config.timers.command_patience) });
    }

    /// What the backup says in its heartbeats. It is asked once: an owner that gave the switchover up waits until it is asked anew.
    pub(super) fn peer_asks(&mut self, asks: bool, now: Duration, out: &mut Vec<Action>) {
        let anew = asks && !std::mem::replace(&mut self.asked_for, asks);
        if let State::Protected { backup } = self.state.clone()
            && anew
        {
            self.begin_switchover(backup, PEERS_TICKET, now, out);
        }
    }

    pub(super) fn stop_asking(&mut self, now: Duration, out: &mut Vec<Action>) {
        if let Some(Asks { ticket, .. }) = self.asks.take_if(|asks| now >= asks.until) {
            let text = format!("{} did not hand the guest over in time; see its status", self.config.peer);
            refuse(ticket, text, out);
        }
    }

    // ---- switchover --------------------------------------------------------------------------------------------------------------

    fn begin_switchover(&mut self, backup: NodeRef, ticket: Ticket, now: Duration, out: &mut Vec<Action>) {
        out.push(Action::BeginSwitchover);
        self.paused = true;
        let until = now.saturating_add(self.config.timers.command_patience);
        self.go(State::Draining { backup, ticket, until }, ReasonCode::SwitchoverAsked, now);
    }

    pub(super) fn switchover_ready(&mut self, now: Duration, out: &mut Vec<Action>) {
        if let State::Draining { backup, ticket, .. } = self.state.clone() {
            self.hold(out);
            out.push(Action::SayGoodbye(GoodbyeReason::Switchover));
            // The guest is stopped: a backup that died just now must not cost more than a few takeovers. The record decides in any case.
            let timers = &self.config.timers;
            let until = now.saturating_add(timers.takeover.saturating_mul(4).min(timers.command_patience));
            self.go(State::HandingOver { backup, ticket, until }, ReasonCode::SwitchoverAsked, now);
        }
    }

    pub(super) fn advance_draining(
        &mut self,
        backup: &NodeRef,
        ticket: Ticket,
        until: Duration,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        if let Some(evidence) = self.evidence(now) {
            return self.lose(Self::silence_reason(evidence), now, out);
        }
        if now >= until {
            let text = "the last epoch was not committed in time; the guest goes on here".to_owned();
            out.push(Action::Reply { ticket, outcome: CommandOutcome::Refused(text) });
            // The record was not touched: still protected, as before.
            self.resume(out);
            self.go(State::Protected { backup: backup.clone() }, ReasonCode::SwitchoverGivenUp, now);
        }
    }

    /// Waits for the backup's takeover. If it does not come, the record decides whether this side may go on.
    pub(super) fn advance_handing_over(
        &mut self,
        _backup: &NodeRef,
        ticket: Ticket,
        until: Duration,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        if now >= until {
            let text = "the backup did not take over in time; the guest goes on here if the arbiter agrees".to_owned();
            out.push(Action::Reply { ticket, outcome: CommandOutcome::Refused(text) });
            self.drop_backup(out);
            self.count_loss(now);
            self.detector.forget();
            if is(Mutant::HandoverGivenUpBlindly) {
                return self.gone_solo(false, now, out);
            }
            return self.go(State::Contending { backup: None }, ReasonCode::SwitchoverGivenUp, now);
        }
        if self.due(now) {
            self.read(now, out);
            // Not an error: just the next look.
            self.retry_at = Some(now.saturating_add(self.config.timers.arbiter_retry));
        }
    }
}

fn refuse(ticket: Ticket, text: String, out: &mut Vec<Action>) {
    out.push(Action::Reply { ticket, outcome: CommandOutcome::Refused(text) });
}

fn done(ticket: Ticket, text: String, out: &mut Vec<Action>) {
    out.push(Action::Reply { ticket, outcome: CommandOutcome::Done(text) });
}
