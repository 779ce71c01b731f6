//! The start rule: who boots, and who offers itself as the backup.

use std::time::Duration;

use replication_proto::mutant::{Mutant, is};

use super::{Action, ColdStart, Core, ExitCode, Reason, ReasonCode, Role, State};

impl Core {
    pub(super) fn started(&mut self, now: Duration, out: &mut Vec<Action>) {
        assert!(self.state == State::Starting, "started once");
        // A backup never boots, so it need not wait for the arbiter to offer itself.
        if self.config.role == Role::Backup {
            self.offer(ReasonCode::Offered, now, out);
        }
    }

    pub(super) fn advance_starting(&mut self, now: Duration, out: &mut Vec<Action>) {
        if !self.due(now) {
            return;
        }
        if self.stale {
            return self.read(now, out);
        }
        let Some(known) = &self.known else {
            return self.go(State::Claiming { reason: Reason::Created }, ReasonCode::FirstBoot, now);
        };
        let record = &known.record;
        if self.config.force_cold_boot {
            return self.go(State::Claiming { reason: Reason::Forced }, ReasonCode::Forced, now);
        }
        if record.owner.node != self.config.me.node {
            return self.offer(ReasonCode::OwnedElsewhere, now, out);
        }
        if record.in_sync.is_some() && !is(Mutant::RestartedPrimaryBoots) {
            // A restarted primary must not beat the takeover of its backup.
            self.offer(ReasonCode::RecordNamesBackup, now, out);
            out.push(Action::AskPeer);
            return;
        }
        let stopped = record.reason == Reason::Stopped;
        if stopped || self.config.cold_start == ColdStart::Owner {
            self.go(State::Claiming { reason: Reason::ColdStart }, ReasonCode::ColdBoot, now);
        } else {
            self.reason = ReasonCode::ColdStartRefused;
            self.exit(ExitCode::ColdStartRefused, out);
        }
    }

    /// Writes the record that gives this process the right to boot. The grant itself is seen by [`Core::learn`].
    pub(super) fn advance_claiming(&mut self, reason: Reason, now: Duration, out: &mut Vec<Action>) {
        if !self.due(now) {
            return;
        }
        if self.stale {
            return self.read(now, out);
        }
        let still_right = match (reason, &self.known) {
            (Reason::Created, known) => known.is_none(),
            (Reason::ColdStart, Some(known)) => {
                known.record.owner.node == self.config.me.node
                    && (known.record.in_sync.is_none() || self.in_sync_is_dead() || is(Mutant::RestartedPrimaryBoots))
            }
            (Reason::ColdStart, None) => false,
            _ => true,
        };
        if !still_right {
            // Somebody was faster: begin again with the record as it is now.
            return self.go(State::Starting, ReasonCode::Starting, now);
        }
        let Some(generation) = self.highest.checked_next() else {
            self.reason = ReasonCode::ArbiterUnusable;
            return self.exit(ExitCode::ArbiterUnusable, out);
        };
        let me = self.config.me.clone();
        let record = self.record(generation, &me, None, reason, "boots the guest");
        self.swap(record, now, out);
    }

    pub(super) fn offer(&mut self, reason: ReasonCode, now: Duration, out: &mut Vec<Action>) {
        out.push(Action::OfferAsBackup);
        self.go(State::Standby, reason, now);
    }

    /// Both hosts lost the guest: the process that the record names as in sync is dead, because another one runs in its place (R6: it can never
    /// come back, and two processes of one node exclude each other by the lock on the state directory).
    fn in_sync_is_dead(&self) -> bool {
        let Some(known) = &self.known else { return false };
        let Some(backup) = &known.record.in_sync else { return false };
        known.record.owner.node == self.config.me.node
            && backup.node == self.config.peer
            && self
                .standby
                .owner
                .as_ref()
                .is_some_and(|met| met.node == backup.node && met.incarnation != backup.incarnation)
    }

    /// Whether a process that offered itself as the backup finds that there is nobody left to wait for.
    pub(super) fn may_boot_after_all(&self) -> bool {
        self.config.role == Role::Primary
            && self.config.cold_start == ColdStart::Owner
            && self.standby.committed.is_none()
            && self.detector.watched().is_none()
            && !self.stale
            && (self.in_sync_is_dead() || self.owned_by_a_former_life())
    }

    /// The right to run went to an earlier process of this node, late: its request was carried out after this one had looked. Nobody may take over,
    /// and this process would have booted if it had begun now.
    fn owned_by_a_former_life(&self) -> bool {
        self.known.as_ref().is_some_and(|known| {
            let owner = &known.record.owner;
            owner.node == self.config.me.node
                && owner.incarnation != self.config.me.incarnation
                && known.record.in_sync.is_none()
        })
    }
}
