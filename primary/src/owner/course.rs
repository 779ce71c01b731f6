//! What the side that owns the guest does about what happens: events and `now` in, orders for the shell out. Pure; it ties the
//! decision core to the session's state machine. The simulator drives it as the event loop does.

use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::decide::{Action, FenceReason, GoodbyeReason, GuestEnd, Input, LinkLoss, StateName};
use replication_proto::Epoch;
use replication_proto::mutant::{self, Mutant};

use crate::decider::{Decider, heard_heartbeat, node_of};
use crate::protect::{Protect, Session, Step};
use crate::pulse::PulseReport;
use crate::stream::StreamEvent;

/// Longest time without a commit while epochs wait for one.
const STALL_LIMIT: Duration = Duration::from_secs(5);

/// What happens to the side that owns the guest.
#[derive(Debug)]
pub enum Event {
    /// Both connections of the session stand.
    Connected(Session),
    /// They could not be made.
    NotConnected(Session),
    /// From the data connection. `covers`: of a commit, whether its checkpoint was taken after outputs began to be held.
    Stream {
        /// Of which session.
        session: Session,
        /// What.
        event: StreamEvent,
        /// See above.
        covers: bool,
    },
    /// The data connection is gone.
    Closed(Session, LinkLoss),
    /// From the heartbeat connection.
    Pulse(Session, PulseReport),
    /// The last checkpoint of a planned switchover has been handed to the stream.
    FinalSent(Epoch),
    /// The runner has left protection.
    ProtectionFailed(LinkLoss),
    /// The guest ended, by itself or with its machine.
    GuestEnded(GuestEnd),
    /// Straight to the decision core.
    Input(Input),
}

/// What the shell does, in this order, before it tells the next event.
#[expect(clippy::large_enum_variant, reason = "a few at a time, each carried out at once")]
#[derive(Debug)]
pub enum Order {
    /// As the decision core says; never one of those that follow here.
    Do(Action),
    /// Connect to the backup.
    Dial(Session),
    /// Copy the base, which ends `first`, then go on with one epoch after another.
    SendBase {
        /// Over which connection.
        session: Session,
        /// The base's epoch.
        first: Epoch,
    },
    /// End both connections of the session and make the runner leave protection; then say [`Course::epoch_used`].
    Close(Session),
    /// Stop the guest for good and keep its memory.
    Freeze,
    /// Say goodbye on this session's data connection, which closes by itself after it.
    Goodbye(Session, GoodbyeReason),
}

/// The owner's part of a process's life.
#[derive(Clone, Debug)]
pub struct Course {
    protect: Protect,
    /// The session whose connections stand.
    connected: Option<Session>,
    /// The process at the other end of it.
    backup: Option<NodeRef>,
    /// A goodbye is on its way.
    leaving: bool,
    committed: Epoch,
    /// When the backup last committed something, or when there was nothing to commit.
    progress_at: Duration,
}

impl Course {
    /// `retry`: pause between two attempts to connect. `last_epoch`: the epoch that the machine's state came from, 0 after a boot.
    pub fn new(retry: Duration, last_epoch: Epoch) -> Self {
        Self {
            protect: Protect::new(retry, last_epoch),
            connected: None,
            backup: None,
            leaving: false,
            committed: last_epoch,
            progress_at: Duration::ZERO,
        }
    }

    /// When [`Course::on_time`] has something to do, beside the decision core.
    pub fn deadline(&self, decider: &Decider) -> Option<Duration> {
        self.protect.deadline().filter(|_| looks_for_backup(decider))
    }

    /// The last epoch that a backup committed.
    pub fn committed(&self) -> Epoch {
        self.committed
    }

    /// Whether this session is the one under way.
    pub fn is_current(&self, session: Session) -> bool {
        self.protect.session() == Some(session)
    }

    /// Whether the connection of this session closes by itself, after a goodbye.
    pub fn is_leaving(&self, session: Session) -> bool {
        self.leaving && self.connected == Some(session)
    }

    /// A [`Order::Close`] was carried out; `last` is the last epoch that was used.
    pub fn epoch_used(&mut self, last: Epoch) {
        self.protect.epoch_used(last);
    }

    /// Orders for actions that the decision core gave before this side owned the guest.
    pub fn adopt(&mut self, actions: Vec<Action>, now: Duration) -> Vec<Order> {
        let mut orders = Vec::new();
        self.act(actions, now, &mut orders);
        orders
    }

    /// Something happened.
    pub fn on(&mut self, event: Event, decider: &mut Decider, now: Duration) -> Vec<Order> {
        let mut orders = Vec::new();
        let out = &mut orders;
        match event {
            Event::Connected(session) => {
                if self.is_current(session) {
                    (self.connected, self.backup, self.leaving) = (Some(session), None, false);
                }
            }
            Event::NotConnected(session) => self.lost(session, LinkLoss::Local, decider, now, out),
            Event::Stream { session, event, covers } => {
                if self.is_current(session) {
                    self.on_stream(session, event, covers, decider, now, out);
                }
            }
            Event::Closed(session, loss) => {
                if self.is_leaving(session) {
                    // The decision core waits for what the backup makes of the goodbye.
                    let step = self.protect.drop_backup(now);
                    self.take(step, decider, now, out);
                    self.decide(Input::LinkLost(loss), decider, now, out);
                } else {
                    self.lost(session, loss, decider, now, out);
                }
            }
            Event::Pulse(session, report) => {
                if self.is_current(session) {
                    self.on_pulse(session, report, decider, now, out);
                }
            }
            Event::FinalSent(epoch) => {
                let step = self.protect.final_sent(epoch);
                self.take(step, decider, now, out);
            }
            Event::ProtectionFailed(loss) => {
                if let Some(session) = self.protect.session() {
                    self.lost(session, loss, decider, now, out);
                }
            }
            Event::GuestEnded(end) => self.decide(Input::GuestEnded(end), decider, now, out),
            Event::Input(input) => self.decide(input, decider, now, out),
        }
        orders
    }

    /// Time passed, and everything that had arrived was told before: silence is judged last. `last_epoch`: the last that was sealed.
    pub fn on_time(&mut self, last_epoch: Epoch, decider: &mut Decider, now: Duration) -> Vec<Order> {
        let mut orders = Vec::new();
        if looks_for_backup(decider) {
            let step = self.protect.tick(now);
            self.take(step, decider, now, &mut orders);
        }
        self.watch_progress(last_epoch, decider, now, &mut orders);
        self.decide(Input::Tick, decider, now, &mut orders);
        orders
    }

    /// A backup that lives and commits nothing would hold the guest's output for ever: heartbeats say nothing about the stream.
    fn watch_progress(&mut self, last_epoch: Epoch, decider: &mut Decider, now: Duration, out: &mut Vec<Order>) {
        if !self.protect.base_committed() || last_epoch <= self.committed {
            self.progress_at = now;
        } else if now.saturating_sub(self.progress_at) >= STALL_LIMIT
            && let Some(session) = self.protect.session()
        {
            log::warn!("the backup has committed nothing for {STALL_LIMIT:?}");
            self.lost(session, LinkLoss::Local, decider, now, out);
        }
    }

    fn on_stream(
        &mut self,
        session: Session,
        event: StreamEvent,
        covers: bool,
        decider: &mut Decider,
        now: Duration,
        out: &mut Vec<Order>,
    ) {
        match event {
            StreamEvent::Accepted(peer, _) => {
                let backup = node_of(&peer);
                self.backup = Some(backup.clone());
                let step = self.protect.accepted(session, backup);
                self.take(step, decider, now, out);
            }
            StreamEvent::Refused { refuse: _, generation } => {
                self.decide(Input::HigherGenerationSeen(generation), decider, now, out);
                self.lost(session, LinkLoss::Local, decider, now, out);
            }
            StreamEvent::Committed(epoch) => {
                self.committed = self.committed.max(epoch);
                self.progress_at = now;
                for step in self.protect.committed(session, epoch, covers) {
                    self.take(Some(step), decider, now, out);
                }
            }
            StreamEvent::Wanted(_) | StreamEvent::Durable(_) | StreamEvent::Verified(..) => {}
            StreamEvent::Heard => {
                if let Some(peer) = self.backup.clone() {
                    self.decide(Input::PeerHeard { peer, report: None }, decider, now, out);
                }
            }
            StreamEvent::Goodbye(_) => {
                if let Some(peer) = self.backup.clone() {
                    let input = Input::PeerGoodbye { peer, reason: GoodbyeReason::Leaving };
                    self.decide(input, decider, now, out);
                }
            }
        }
    }

    fn on_pulse(
        &mut self,
        session: Session,
        report: PulseReport,
        decider: &mut Decider,
        now: Duration,
        out: &mut Vec<Order>,
    ) {
        match report {
            PulseReport::Heard { peer, body, answers } => {
                self.decide(Input::HigherGenerationSeen(peer.generation), decider, now, out);
                self.decide(heard_heartbeat(&peer, &body, answers, now), decider, now, out);
            }
            PulseReport::Generation(generation) => {
                self.decide(Input::HigherGenerationSeen(generation), decider, now, out);
            }
            PulseReport::Goodbye(_) => {}
            // A new owner closes it before it runs; what still reaches this side is passed on over the other one until then.
            PulseReport::Closed(_) if self.is_leaving(session) => {}
            PulseReport::Closed(_) => self.lost(session, LinkLoss::PeerClosed, decider, now, out),
        }
    }

    fn lost(&mut self, session: Session, loss: LinkLoss, decider: &mut Decider, now: Duration, out: &mut Vec<Order>) {
        if mutant::is(Mutant::GateOpensOnLinkLoss) && self.is_current(session) {
            out.push(Order::Do(Action::OpenOutput));
        }
        for step in self.protect.lost(session, loss, now) {
            self.take(Some(step), decider, now, out);
        }
    }

    fn take(&mut self, step: Option<Step>, decider: &mut Decider, now: Duration, out: &mut Vec<Order>) {
        match step {
            None => {}
            Some(Step::Dial(session)) => out.push(Order::Dial(session)),
            Some(Step::SendBase { session, first }) => out.push(Order::SendBase { session, first }),
            Some(Step::Close(session)) => self.close(session, out),
            Some(Step::Decide(input)) => self.decide(input, decider, now, out),
        }
    }

    fn close(&mut self, session: Session, out: &mut Vec<Order>) {
        if self.connected.take_if(|connected| *connected == session).is_some() {
            (self.backup, self.leaving) = (None, false);
        }
        out.push(Order::Close(session));
    }

    fn decide(&mut self, input: Input, decider: &mut Decider, now: Duration, out: &mut Vec<Order>) {
        let actions = decider.decide(input, now);
        self.act(actions, now, out);
    }

    fn act(&mut self, actions: Vec<Action>, now: Duration, out: &mut Vec<Order>) {
        for action in actions {
            match action {
                Action::StartBase { backup } => match self.protect.start_base(&backup) {
                    Some(Step::SendBase { session, first }) => out.push(Order::SendBase { session, first }),
                    _ => log::warn!("the backup left before its base could begin"),
                },
                Action::DropBackup => self.drop_backup(now, out),
                Action::Fence { reason } => {
                    out.push(Order::Do(Action::Fence { reason }));
                    // What reaches a side that handed the guest over is passed on, until the new owner closes the connection.
                    if reason != FenceReason::HandedOver {
                        self.drop_backup(now, out);
                    }
                    out.push(Order::Freeze);
                }
                Action::HoldOutput => {
                    self.protect.outputs_held();
                    out.push(Order::Do(Action::HoldOutput));
                }
                Action::SayGoodbye(reason) => {
                    if let Some(session) = self.connected {
                        self.leaving = true;
                        out.push(Order::Goodbye(session, reason));
                    }
                }
                other => out.push(Order::Do(other)),
            }
        }
    }

    fn drop_backup(&mut self, now: Duration, out: &mut Vec<Order>) {
        if let Some(Step::Close(session)) = self.protect.drop_backup(now) {
            self.close(session, out);
        }
    }
}

/// Only a side that runs the guest, and means to, looks for a backup.
fn looks_for_backup(decider: &Decider) -> bool {
    let state = decider.state();
    state.runs() && state != StateName::SwitchingOver
}
