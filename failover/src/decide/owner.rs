//! The owner's half: taking a backup on (R5), and going on without it (R3).

use std::time::Duration;

use replication_proto::Epoch;
use replication_proto::mutant::{Mutant, is};

use super::{
    Action, CommandOutcome, Core, Evidence, FenceReason, Gate, GoodbyeReason, LinkLoss, MAX_STRIKES, NodeRef,
    Protection, Reason, ReasonCode, STABLE, STEADY, State,
};

impl Core {
    // ---- events ------------------------------------------------------------------------------------------------------------------

    pub(super) fn backup_joined(&mut self, backup: NodeRef, now: Duration, out: &mut Vec<Action>) {
        if self.mine.is_none() || backup.node != self.config.peer {
            return;
        }
        // A new connection while one is in use means that the old one is dead, whoever notices it first. The shell closes all there is: the backup
        // will come again.
        if self.backup().is_some() {
            return self.lose(ReasonCode::BackupReplaced, now, out);
        }
        let anew = self.waiting.replace(backup.clone()) != Some(backup);
        if anew && self.strikes > 1 {
            self.protect_after = self.protect_after.max(now.saturating_add(STEADY));
        }
    }

    pub(super) fn base_committed(&mut self, peer: &NodeRef, epoch: Epoch, now: Duration, out: &mut Vec<Action>) {
        if self.mine.is_none() {
            return self.standby_base_committed(peer, epoch);
        }
        if matches!(&self.state, State::Resync { backup } if backup == peer) {
            if is(Mutant::InSyncBeforeHolding) {
                return self.go(State::Pairing { backup: peer.clone() }, ReasonCode::ClosingIn, now);
            }
            // R5: hold first; what is let out from here on must be covered by an ack before the record names the backup.
            self.hold(out);
            if is(Mutant::PairingUncovered) {
                return self.go(State::Pairing { backup: peer.clone() }, ReasonCode::ClosingIn, now);
            }
            self.go(State::Covering { backup: peer.clone() }, ReasonCode::ClosingIn, now);
        }
    }

    pub(super) fn released_covered(&mut self, backup: &NodeRef, now: Duration) {
        if matches!(&self.state, State::Covering { backup: covered } if covered == backup) {
            assert!(self.gate == Gate::Held, "R5: output is held before the record names a backup");
            self.go(State::Pairing { backup: backup.clone() }, ReasonCode::ClosingIn, now);
        }
    }

    pub(super) fn link_lost(&mut self, loss: LinkLoss, now: Duration, out: &mut Vec<Action>) {
        self.waiting = None;
        if self.mine.is_none() {
            // Our own closing says nothing about the owner; the standby stays what it is, promotable at its last commit.
            if loss == LinkLoss::PeerClosed {
                self.detector.closed(now);
            }
            return;
        }
        let reason = match loss {
            LinkLoss::PeerClosed => ReasonCode::BackupClosed,
            LinkLoss::Local => ReasonCode::BackupDropped,
            LinkLoss::Overloaded => ReasonCode::Overloaded,
        };
        match (&self.state, loss) {
            // The stream is lost for good, but the backup may be just about to take over: the grace keeps the contest fair.
            (State::Protected { .. } | State::Draining { .. }, LinkLoss::PeerClosed) => self.detector.stream_lost(now),
            // It closes the connection as soon as it has won: what the record says by now is worth a look.
            (State::HandingOver { .. }, LinkLoss::PeerClosed) => self.retry_at = None,
            // What we closed ourselves looks to the backup like our death: be first at the arbiter.
            _ if self.backup().is_some() => self.lose(reason, now, out),
            _ => {}
        }
    }

    pub(super) fn peer_goodbye(&mut self, peer: &NodeRef, reason: GoodbyeReason) {
        if self.mine.is_some() {
            self.detector.left(peer.incarnation);
        } else {
            self.standby_goodbye(peer, reason);
        }
    }

    // ---- losing a backup ---------------------------------------------------------------------------------------------------------

    /// The backup that this side deals with at the moment.
    pub(super) fn backup(&self) -> Option<&NodeRef> {
        match &self.state {
            State::Resync { backup }
            | State::Covering { backup }
            | State::Pairing { backup }
            | State::Protected { backup }
            | State::Draining { backup, .. }
            | State::HandingOver { backup, .. } => Some(backup),
            State::Contending { backup } => backup.as_ref(),
            _ => None,
        }
    }

    /// The stream to the backup cannot go on. Where the record may name it, output is held and the arbiter is asked.
    pub(super) fn lose(&mut self, reason: ReasonCode, now: Duration, out: &mut Vec<Action>) {
        if let State::Draining { ticket, .. } | State::HandingOver { ticket, .. } = self.state {
            let text = "the backup was lost before it could take the guest over".to_owned();
            out.push(Action::Reply { ticket, outcome: CommandOutcome::Refused(text) });
        }
        let never_named = matches!(self.state, State::Resync { .. } | State::Covering { .. })
            || (is(Mutant::PairingLostIsNeverNamed) && matches!(self.state, State::Pairing { .. }));
        self.hold(out);
        self.drop_backup(out);
        self.count_loss(now);
        self.detector.forget();
        (self.report, self.asked_for) = (None, false);
        self.reason = reason;
        if never_named {
            // No record named this backup and none can: the last successful solo write still holds (R3).
            return self.gone_solo(false, now, out);
        }
        // The isolation timer runs from the beginning of the contest, whatever is lost during it.
        let since = if matches!(self.state, State::Contending { .. }) { self.since } else { now };
        self.go(State::Contending { backup: None }, reason, since);
    }

    /// There is one connection, whoever waits at its other end: after this nobody does.
    pub(super) fn drop_backup(&mut self, out: &mut Vec<Action>) {
        self.waiting = None;
        out.push(Action::DropBackup);
    }

    /// Row 20: a link that flaps is not answered with a storm of base copies and writes to the arbiter.
    pub(super) fn count_loss(&mut self, now: Duration) {
        if self.protected_since.take().is_some_and(|since| now.saturating_sub(since) >= STABLE) {
            self.strikes = 0;
        }
        let pause = self.config.timers.protect_retry.saturating_mul(1 << self.strikes);
        self.protect_after = now.saturating_add(pause);
        self.strikes = (self.strikes + 1).min(MAX_STRIKES);
    }

    pub(super) fn silence_reason(evidence: Evidence) -> ReasonCode {
        match evidence {
            Evidence::Silent => ReasonCode::BackupSilent,
            Evidence::Closed => ReasonCode::BackupClosed,
            Evidence::Replaced => ReasonCode::BackupReplaced,
            Evidence::Left => ReasonCode::BackupLeft,
        }
    }

    // ---- goals -------------------------------------------------------------------------------------------------------------------

    pub(super) fn advance_solo(&mut self, now: Duration, out: &mut Vec<Action>) {
        let named = self.known.as_ref().is_some_and(|known| known.record.in_sync.is_some());
        if named && !self.stale && !self.blind {
            // Not written by this process: a person edited the record. It must not name anybody while output is open.
            self.hold(out);
            return self.go(State::Contending { backup: None }, ReasonCode::NotInSync, now);
        }
        let trusted = !self.stale && self.alarm.is_none() && !self.blind && self.settled();
        if self.protection != Protection::On || now < self.protect_after || !trusted {
            return;
        }
        if let Some(backup) = self.waiting.take() {
            self.watch(backup.incarnation, now);
            out.push(Action::StartBase { backup: backup.clone() });
            self.go(State::Resync { backup }, ReasonCode::BaseCopy, now);
        }
    }

    pub(super) fn advance_resync(&mut self, _backup: &NodeRef, now: Duration, out: &mut Vec<Action>) {
        if let Some(evidence) = self.evidence(now) {
            self.lose(Self::silence_reason(evidence), now, out);
        }
    }

    pub(super) fn advance_pairing(&mut self, backup: &NodeRef, now: Duration, out: &mut Vec<Action>) {
        if let Some(evidence) = self.evidence(now) {
            return self.lose(Self::silence_reason(evidence), now, out);
        }
        let named =
            !self.stale && self.known.as_ref().is_some_and(|known| known.record.in_sync.as_ref() == Some(backup));
        if named && self.settled() {
            self.gate = Gate::OnAck(backup.clone());
            self.protected_since = Some(now);
            self.standby.declined = None;
            out.push(Action::TrustAcks { backup: backup.clone() });
            return self.go(State::Protected { backup: backup.clone() }, ReasonCode::Covered, now);
        }
        if !self.due(now) {
            return;
        }
        if self.stale {
            return self.read(now, out);
        }
        let Some(mine) = self.mine else { return };
        let me = self.config.me.clone();
        let record = self.record(mine, &me, Some(backup), Reason::Protected, "the backup is in sync");
        self.swap(record, now, out);
    }

    pub(super) fn advance_protected(&mut self, backup: &NodeRef, now: Duration, out: &mut Vec<Action>) {
        let named = self.known.as_ref().is_some_and(|known| known.record.in_sync.as_ref() == Some(backup));
        if !named {
            return self.lose(ReasonCode::NotInSync, now, out);
        }
        let Some(evidence) = self.evidence(now) else { return };
        // Nothing leaves from here on, until the backup is heard again or the arbiter agreed to go on alone.
        self.hold(out);
        let reason = Self::silence_reason(evidence);
        if evidence == Evidence::Silent {
            self.go(State::Contending { backup: Some(backup.clone()) }, reason, now);
        } else {
            self.lose(reason, now, out);
        }
    }

    /// R3: go solo. `backup` is still connected and may yet be heard again.
    pub(super) fn advance_contending(&mut self, backup: Option<&NodeRef>, now: Duration, out: &mut Vec<Action>) {
        if self.isolated(now) {
            return self.fence(FenceReason::Isolated, now, out);
        }
        if is(Mutant::SoloWithoutCas) {
            return self.gone_solo(backup.is_some(), now, out);
        }
        if self.op.is_some() {
            return;
        }
        let in_sync = self.known.as_ref().and_then(|known| known.record.in_sync.clone());
        if !self.stale && (self.settled() || is(Mutant::SoloFromBareRead)) {
            if in_sync.is_none() {
                return self.gone_solo(backup.is_some(), now, out);
            }
            if backup.is_some() && in_sync.as_ref() == backup && self.evidence(now).is_none() {
                return self.heard_again(now, out);
            }
        }
        if !self.due(now) {
            return;
        }
        if self.stale {
            return self.read(now, out);
        }
        let Some(mine) = self.mine else { return };
        let (reason, note) = match self.reason {
            code @ (ReasonCode::Unprotected | ReasonCode::ProtectionPaused) => (Reason::Unprotected, code.text()),
            code => (Reason::BackupLost, code.text()),
        };
        let me = self.config.me.clone();
        let record = self.record(mine, &me, None, reason, note);
        self.swap(record, now, out);
    }

    pub(super) fn gone_solo(&mut self, connected: bool, now: Duration, out: &mut Vec<Action>) {
        if connected {
            // The record does not name it any more: it begins anew with a base.
            self.drop_backup(out);
            self.count_loss(now);
        }
        self.detector.forget();
        self.open(out);
        self.resume(out);
        let reason = self.reason;
        self.go(State::Solo, reason, now);
    }

    fn heard_again(&mut self, now: Duration, out: &mut Vec<Action>) {
        let State::Contending { backup: Some(backup) } = self.state.clone() else { return };
        self.gate = Gate::OnAck(backup.clone());
        out.push(Action::TrustAcks { backup: backup.clone() });
        self.resume(out);
        self.go(State::Protected { backup }, ReasonCode::Covered, now);
    }

    pub(super) fn resume(&mut self, out: &mut Vec<Action>) {
        if self.paused {
            self.paused = false;
            out.push(Action::ResumeGuest);
        }
    }

    /// Neither the peer nor the arbiter was reached for so long that this side gives up.
    fn isolated(&self, now: Duration) -> bool {
        let apart = self.detector.watched().is_none() || self.evidence(now).is_some();
        apart && self.isolated_at().is_some_and(|at| now >= at)
    }

    pub(super) fn isolated_at(&self) -> Option<Duration> {
        matches!(self.state, State::Contending { .. }).then(|| {
            let last = self.last_usable.map_or(self.since, |usable| usable.max(self.since));
            last.saturating_add(self.config.timers.isolation_halt)
        })
    }
}
