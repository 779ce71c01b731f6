//! The life of a protection session: find the backup, greet it, bring it in sync, keep it so. Pure: events and `now` in, commands for
//! the shell and inputs for the decision core out. Who may run and what may leave is decided there, not here.

use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::decide::{Input, LinkLoss};
use replication_proto::Epoch;

/// Number of an attempt to reach the backup; what belongs to an older one is ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Session(pub u64);

/// What the shell does for the session.
#[expect(clippy::large_enum_variant, reason = "one or two at a time, each carried out at once")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Connect to the backup, data and heartbeat; the answer is [`Protect::connected`] or [`Protect::lost`].
    Dial(Session),
    /// Copy the base, which ends `first`, and go on with one epoch after another.
    SendBase {
        /// Over which link.
        session: Session,
        /// The base's epoch.
        first: Epoch,
    },
    /// End both connections of the session and make the runner leave protection.
    Close(Session),
    /// Tell the decision core.
    Decide(Input),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    /// No connection. The next attempt is at `dial_at`.
    Apart { dial_at: Duration },
    /// Connecting, or waiting for the backup's answer to our greeting.
    Greeting { session: Session },
    /// The backup is compatible and waits until the decision core wants it.
    Joined { session: Session, backup: NodeRef },
    /// The base is under way.
    Base { session: Session, backup: NodeRef, first: Epoch },
    /// Epoch after epoch. `covered`: the core knows that the backup holds everything ever let out.
    Epochs { session: Session, backup: NodeRef, covered: bool, committed: Epoch, last: Option<Epoch> },
}

/// The session's state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Protect {
    state: State,
    retry: Duration,
    sessions: u64,
    /// Last epoch number used by any session; numbers are never used twice.
    last_epoch: Epoch,
}

impl Protect {
    /// Nothing is connected; the first attempt is due at once. `last_epoch`: the epoch that this side's state came from, 0 after a boot.
    pub fn new(retry: Duration, last_epoch: Epoch) -> Self {
        Self { state: State::Apart { dial_at: Duration::ZERO }, retry, sessions: 0, last_epoch }
    }

    /// When [`Protect::tick`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        match self.state {
            State::Apart { dial_at } => Some(dial_at),
            _ => None,
        }
    }

    /// The session that is under way.
    pub fn session(&self) -> Option<Session> {
        match &self.state {
            State::Apart { .. } => None,
            State::Greeting { session }
            | State::Joined { session, .. }
            | State::Base { session, .. }
            | State::Epochs { session, .. } => Some(*session),
        }
    }

    /// The backup's base is complete and epochs follow.
    pub fn base_committed(&self) -> bool {
        matches!(self.state, State::Epochs { .. })
    }

    /// Time passed.
    pub fn tick(&mut self, now: Duration) -> Option<Step> {
        match self.state {
            State::Apart { dial_at } if now >= dial_at => {
                self.sessions += 1;
                let session = Session(self.sessions);
                self.state = State::Greeting { session };
                Some(Step::Dial(session))
            }
            _ => None,
        }
    }

    /// The backup accepted our greeting.
    pub fn accepted(&mut self, session: Session, backup: NodeRef) -> Option<Step> {
        if self.state != (State::Greeting { session }) {
            return None;
        }
        self.state = State::Joined { session, backup: backup.clone() };
        Some(Step::Decide(Input::BackupJoined { backup }))
    }

    /// The decision core wants this backup brought in sync.
    pub fn start_base(&mut self, wanted: &NodeRef) -> Option<Step> {
        let State::Joined { session, backup } = &self.state else { return None };
        if backup != wanted {
            return None;
        }
        let (session, backup, first) = (*session, backup.clone(), self.last_epoch.next());
        self.last_epoch = first;
        self.state = State::Base { session, backup, first };
        Some(Step::SendBase { session, first })
    }

    /// The backup holds every epoch up to this one. `covers_released`: its checkpoint was taken after outputs began to be held.
    pub fn committed(&mut self, session: Session, epoch: Epoch, covers_released: bool) -> Vec<Step> {
        let mut told = Vec::new();
        self.last_epoch = self.last_epoch.max(epoch);
        if let State::Base { session: s, backup, first } = &self.state
            && *s == session
            && epoch >= *first
        {
            let backup = backup.clone();
            told.push(Step::Decide(Input::BaseCommitted { peer: backup.clone(), epoch }));
            self.state = State::Epochs { session, backup, covered: false, committed: epoch, last: None };
        }
        if let State::Epochs { session: s, backup, covered, committed, last } = &mut self.state
            && *s == session
        {
            *committed = epoch.max(*committed);
            if covers_released && !*covered {
                *covered = true;
                told.push(Step::Decide(Input::ReleasedCovered { backup: backup.clone(), epoch }));
            }
            if *last == Some(epoch) {
                told.push(Step::Decide(Input::SwitchoverReady { epoch }));
            }
        }
        told
    }

    /// The decision core holds outputs: only a later epoch covers what was let out.
    pub fn outputs_held(&mut self) {
        if let State::Epochs { covered, .. } = &mut self.state {
            *covered = false;
        }
    }

    /// The last checkpoint before a switchover is on its way. Its commit may have been faster than this news.
    pub fn final_sent(&mut self, epoch: Epoch) -> Option<Step> {
        self.last_epoch = self.last_epoch.max(epoch);
        let State::Epochs { committed, last, .. } = &mut self.state else { return None };
        *last = Some(epoch);
        (*committed >= epoch).then_some(Step::Decide(Input::SwitchoverReady { epoch }))
    }

    /// An epoch was sealed: its number is used up even if it is never committed.
    pub fn epoch_used(&mut self, epoch: Epoch) {
        self.last_epoch = self.last_epoch.max(epoch);
    }

    /// A connection of the session is gone, or could not be made.
    pub fn lost(&mut self, session: Session, loss: LinkLoss, now: Duration) -> Vec<Step> {
        if self.session() != Some(session) {
            return Vec::new();
        }
        let known_to_core = !matches!(self.state, State::Greeting { .. });
        self.state = State::Apart { dial_at: now.saturating_add(self.retry) };
        // The core first: closing takes a moment, and it makes the backup contend for the record.
        let told = known_to_core.then_some(Step::Decide(Input::LinkLost(loss)));
        told.into_iter().chain([Step::Close(session)]).collect()
    }

    /// For explorers of the state space: sessions that are over leave no trace in the numbers. Only while nothing that belongs to one of them can
    /// still arrive.
    #[doc(hidden)]
    pub fn forget_past_sessions(&mut self) {
        self.sessions = 0;
        match &mut self.state {
            State::Apart { .. } => {}
            State::Greeting { session }
            | State::Joined { session, .. }
            | State::Base { session, .. }
            | State::Epochs { session, .. } => (*session, self.sessions) = (Session(1), 1),
        }
    }

    /// The decision core wants the connection closed.
    pub fn drop_backup(&mut self, now: Duration) -> Option<Step> {
        let session = self.session()?;
        self.state = State::Apart { dial_at: now.saturating_add(self.retry) };
        Some(Step::Close(session))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_proto::{Incarnation, NodeName};

    const SEC: Duration = Duration::from_secs(1);

    fn backup() -> NodeRef {
        NodeRef { node: NodeName::new("b").unwrap(), incarnation: Incarnation(7) }
    }

    fn in_base() -> Protect {
        let mut p = Protect::new(SEC, Epoch(41));
        assert_eq!(p.tick(Duration::ZERO), Some(Step::Dial(Session(1))));
        assert_eq!(p.accepted(Session(1), backup()), Some(Step::Decide(Input::BackupJoined { backup: backup() })));
        assert_eq!(p.start_base(&backup()), Some(Step::SendBase { session: Session(1), first: Epoch(42) }));
        p
    }

    #[test]
    fn base_then_covered_epoch_are_told_once_each() {
        let mut p = in_base();
        let told = p.committed(Session(1), Epoch(42), false);
        assert_eq!(told, [Step::Decide(Input::BaseCommitted { peer: backup(), epoch: Epoch(42) })]);
        assert!(p.committed(Session(1), Epoch(43), false).is_empty());
        let told = p.committed(Session(1), Epoch(44), true);
        assert_eq!(told, [Step::Decide(Input::ReleasedCovered { backup: backup(), epoch: Epoch(44) })]);
        assert!(p.committed(Session(1), Epoch(45), true).is_empty());
        p.outputs_held();
        assert_eq!(p.committed(Session(1), Epoch(46), true).len(), 1);
    }

    #[test]
    fn what_belongs_to_an_older_session_is_ignored() {
        let mut p = in_base();
        assert_eq!(p.lost(Session(1), LinkLoss::PeerClosed, SEC).len(), 2);
        assert!(p.lost(Session(1), LinkLoss::PeerClosed, SEC).is_empty());
        assert!(p.committed(Session(1), Epoch(42), true).is_empty());
        assert_eq!(p.deadline(), Some(2 * SEC));
        assert_eq!(p.tick(2 * SEC), Some(Step::Dial(Session(2))));
        assert!(p.accepted(Session(1), backup()).is_none());
    }

    #[test]
    fn epoch_numbers_are_never_used_twice() {
        let mut p = in_base();
        p.epoch_used(Epoch(60));
        p.drop_backup(SEC);
        p.tick(2 * SEC);
        p.accepted(Session(2), backup());
        assert_eq!(p.start_base(&backup()), Some(Step::SendBase { session: Session(2), first: Epoch(61) }));
    }

    #[test]
    fn a_failed_dial_is_nobodys_business() {
        let mut p = Protect::new(SEC, Epoch(0));
        p.tick(Duration::ZERO);
        assert_eq!(p.lost(Session(1), LinkLoss::Local, SEC), [Step::Close(Session(1))]);
    }

    #[test]
    fn the_last_commit_of_a_switchover_is_told() {
        let mut p = in_base();
        p.committed(Session(1), Epoch(42), true);
        assert_eq!(p.final_sent(Epoch(43)), None);
        let told = p.committed(Session(1), Epoch(43), true);
        assert_eq!(told, [Step::Decide(Input::SwitchoverReady { epoch: Epoch(43) })]);
    }

    #[test]
    fn a_commit_faster_than_the_news_of_the_last_checkpoint_counts() {
        let mut p = in_base();
        p.committed(Session(1), Epoch(42), true);
        p.committed(Session(1), Epoch(43), true);
        assert_eq!(p.final_sent(Epoch(43)), Some(Step::Decide(Input::SwitchoverReady { epoch: Epoch(43) })));
    }
}
