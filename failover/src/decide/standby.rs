//! The standby's half: following, taking over (R4), and by force (R11).

use std::time::Duration;

use replication_proto::Epoch;
use replication_proto::mutant::{Mutant, is};

use super::{
    Action, CommandOutcome, Core, Evidence, FenceReason, GoodbyeReason, NodeRef, Reason, ReasonCode, Request, Role,
    StandbyFacts, State, Ticket,
};

impl Core {
    pub(super) fn base_begun(&mut self, owner: NodeRef, now: Duration) {
        // A base may be faster than the arbiter's first answer to this process.
        let waits = matches!(
            self.state,
            State::Starting
                | State::Claiming { .. }
                | State::Standby
                | State::TakingOver
                | State::Forcing { fenced: None, .. }
        );
        if self.mine.is_some() || owner.node != self.config.peer || !waits {
            return;
        }
        self.watch(owner.incarnation, now);
        self.standby = StandbyFacts { owner: Some(owner), ..StandbyFacts::default() };
        self.reason = ReasonCode::Hollow;
    }

    pub(super) fn standby_base_committed(&mut self, owner: &NodeRef, epoch: Epoch) {
        if self.standby.owner.as_ref() == Some(owner) {
            self.standby.committed = Some(epoch);
            self.reason = ReasonCode::Following;
        }
    }

    pub(super) fn committed(&mut self, epoch: Epoch) {
        if self.mine.is_none() && self.standby.committed.is_some_and(|last| epoch > last) {
            self.standby.committed = Some(epoch);
        }
    }

    pub(super) fn copy_lost(&mut self) {
        if self.mine.is_none() {
            self.standby.committed = None;
            self.reason = ReasonCode::Hollow;
        }
    }

    pub(super) fn standby_goodbye(&mut self, owner: &NodeRef, reason: GoodbyeReason) {
        if self.standby.owner.as_ref() != Some(owner) {
            return;
        }
        match reason {
            GoodbyeReason::Stopped => {
                self.standby.stopped = true;
                self.reason = ReasonCode::OwnerStopped;
            }
            GoodbyeReason::Switchover => {
                self.standby.handed_over = true;
                self.detector.left(owner.incarnation);
            }
            GoodbyeReason::Leaving => self.detector.left(owner.incarnation),
        }
    }

    /// R4: the record names exactly this process as in sync with the other node, and there is something to run from.
    pub(super) fn may_take_over(&self) -> bool {
        self.standby.committed.is_some()
            && self.known.as_ref().is_some_and(|known| {
                let named = known.record.in_sync.as_ref().is_some_and(|named| {
                    *named == self.config.me
                        || (is(Mutant::RecordWithoutIncarnation) && named.node == self.config.me.node)
                });
                known.record.owner.node == self.config.peer && named && known.record.generation == self.highest
            })
    }

    pub(super) fn advance_standby(&mut self, now: Duration) {
        if self.may_boot_after_all() {
            return self.go(State::Claiming { reason: Reason::ColdStart }, ReasonCode::ColdBoot, now);
        }
        let Some(evidence) = self.evidence(now) else { return };
        if self.standby.committed.is_none() || self.standby.stopped {
            return;
        }
        let revision = self.known.as_ref().map(|known| known.revision);
        if self.standby.declined.is_some() && self.standby.declined == revision {
            return;
        }
        // A record that does not name us may be out of date; one that does is checked by the compare-and-swap itself.
        self.stale |= !self.may_take_over();
        let reason = match evidence {
            Evidence::Silent => ReasonCode::OwnerSilent,
            Evidence::Closed => ReasonCode::OwnerClosed,
            Evidence::Replaced => ReasonCode::OwnerReplaced,
            Evidence::Left => ReasonCode::OwnerLeft,
        };
        self.go(State::TakingOver, reason, now);
    }

    pub(super) fn advance_taking_over(&mut self, now: Duration, out: &mut Vec<Action>) {
        if self.op.is_some() {
            return;
        }
        if self.settled() && (self.evidence(now).is_none() || self.standby.committed.is_none() || self.standby.stopped)
        {
            let reason = if self.standby.committed.is_some() { ReasonCode::Following } else { ReasonCode::Hollow };
            return self.go(State::Standby, reason, now);
        }
        if !self.due(now) {
            return;
        }
        if self.stale {
            return self.read(now, out);
        }
        if !self.may_take_over() {
            self.standby.declined = self.known.as_ref().map(|known| known.revision);
            return self.go(State::Standby, ReasonCode::TakeoverRefused, now);
        }
        let Some(generation) = self.highest.checked_next() else {
            return self.raise(ReasonCode::ArbiterUnusable, "the 64 bits of the generation are used up".into(), out);
        };
        if is(Mutant::TakeoverWithoutCas) {
            return self.granted(generation, now, out);
        }
        let (reason, note) = if self.standby.handed_over {
            (Reason::Switchover, "the owner handed the guest over")
        } else {
            (Reason::Takeover, "the owner is silent")
        };
        let me = self.config.me.clone();
        let record = self.record(generation, &me, None, reason, note);
        self.swap(record, now, out);
    }

    pub(super) fn force(&mut self, ticket: Ticket, without_arbiter: bool, now: Duration, out: &mut Vec<Action>) {
        let fenced = match self.state {
            State::Fenced { reason, .. } => Some(reason),
            State::Standby | State::TakingOver if self.standby.committed.is_some() => None,
            State::Standby | State::TakingOver => {
                let text = "the standby has no committed base: there is nothing to run from".to_owned();
                return out.push(Action::Reply { ticket, outcome: CommandOutcome::Refused(text) });
            }
            State::Forcing { .. } => {
                let text = "a forced takeover is under way".to_owned();
                return out.push(Action::Reply { ticket, outcome: CommandOutcome::Refused(text) });
            }
            _ => {
                let text =
                    format!("this side is {}; only a standby or a fenced side can be forced", self.state_name().word());
                return out.push(Action::Reply { ticket, outcome: CommandOutcome::Refused(text) });
            }
        };
        self.stale = true;
        self.retry_at = None;
        let until = now.saturating_add(self.config.timers.command_patience);
        self.go(State::Forcing { ticket, without_arbiter, fenced, until }, ReasonCode::Forced, now);
    }

    pub(super) fn advance_forcing(
        &mut self,
        ticket: Ticket,
        without_arbiter: bool,
        fenced: Option<FenceReason>,
        until: Duration,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let Some(generation) = self.highest.checked_next() else {
            return self.raise(ReasonCode::ArbiterUnusable, "the 64 bits of the generation are used up".into(), out);
        };
        if fenced.is_none() && self.standby.committed.is_none() {
            // A new base is being written over what there was.
            return self.give_force_up(
                ticket,
                None,
                "the owner began a new base: there is nothing to run from",
                now,
                out,
            );
        }
        if now >= until {
            return self.force_ran_out(ticket, without_arbiter, fenced, now, out);
        }
        if !self.due(now) {
            return;
        }
        // A record that was rolled back is overwritten here and nowhere else: this is how an operator re-seeds the arbiter.
        let rolled_back = self.stale && self.alarm == Some(ReasonCode::ArbiterRolledBack);
        if self.stale && !rolled_back {
            return self.read(now, out);
        }
        let expected =
            if rolled_back { self.refused.as_ref() } else { self.known.as_ref() }.map(|found| found.revision);
        if rolled_back {
            // Revisions begin anew with the arbiter that was restored.
            self.known = None;
            self.alarm = None;
        }
        let me = self.config.me.clone();
        let record = self.record(generation, &me, None, Reason::Forced, "forced by an operator");
        self.issue(Request::Cas { expected, record }, now, out);
    }

    fn force_ran_out(
        &mut self,
        ticket: Ticket,
        without_arbiter: bool,
        fenced: Option<FenceReason>,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        if without_arbiter {
            // The operator vouches that the other side is off; nothing else stands behind this permit.
            let generation = self.highest.next();
            self.blind = true;
            return self.granted(generation, now, out);
        }
        self.give_force_up(ticket, fenced, "the arbiter does not answer", now, out);
    }

    fn give_force_up(
        &mut self,
        ticket: Ticket,
        fenced: Option<FenceReason>,
        why: &str,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let writing = matches!(self.op.as_ref().map(|op| &op.request), Some(Request::Cas { .. }));
        let outcome = if writing || self.uncertain_at.is_some() {
            CommandOutcome::Unknown("the arbiter's answer is lost; look again with `ftctl status`".into())
        } else {
            CommandOutcome::Refused(why.to_owned())
        };
        out.push(Action::Reply { ticket, outcome });
        match fenced {
            Some(reason) => self.go_fenced(reason, now),
            None if self.standby.committed.is_none() => self.go(State::Standby, ReasonCode::Hollow, now),
            None => self.go(State::Standby, ReasonCode::ArbiterUnreachable, now),
        }
    }

    /// What a standby that the record calls the owner tells its operator.
    pub(super) fn standby_reason(&self) -> ReasonCode {
        let owned_here = self.known.as_ref().is_some_and(|known| known.record.owner.node == self.config.me.node);
        match self.reason {
            ReasonCode::Offered if owned_here && self.config.role == Role::Backup => ReasonCode::OwnedHere,
            reason => reason,
        }
    }
}
