//! What the side that waits does about what happens: events and `now` in, orders for the shell out. Pure. The simulator drives it as the
//! event loop does.

use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::decide::{Action, Input, LinkLoss};
use primary::decider::{Decider, heard, heard_heartbeat, node_of};
use primary::host::core_goodbye;
use primary::pulse::PulseReport;
use replication_proto::{Epoch, LinkError, RefuseCode};

use crate::intake::{IntakeEvent, LinkEnd};

/// How long after a failed attempt to ask the peer the next one is made.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// What happens to the side that waits.
#[derive(Debug)]
pub enum Event {
    /// From the data connection.
    Intake(IntakeEvent),
    /// From a heartbeat connection.
    Pulse(PulseReport),
    /// A heartbeat connection that this side wanted to open could not be made.
    NobodyThere,
    /// Straight to the decision core.
    Input(Input),
}

/// What the shell does, in this order, before it tells the next event. After an order that ends the wait nothing else is told here.
#[expect(clippy::large_enum_variant, reason = "a few at a time, each carried out at once")]
#[derive(Debug)]
pub enum Order {
    /// As the decision core says.
    Do(Action),
    /// Open a heartbeat connection to the peer, to learn which process lives there.
    AskPeer,
    /// This hollow standby's machine is not the primary's: it will never be of use, and ends.
    EndAsMismatch,
}

/// The waiting part of a process's life.
#[derive(Clone, Debug, Default)]
pub struct Course {
    /// The primary at the other end of the data connection.
    owner: Option<NodeRef>,
    committed: Epoch,
    /// The decision core wants to know which process runs on the peer's host, and no primary has connected since.
    asks: bool,
    /// When to ask it.
    ask_at: Option<Duration>,
}

impl Course {
    /// When [`Course::on_time`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        self.ask_at
    }

    /// The last committed epoch.
    pub fn committed(&self) -> Epoch {
        self.committed
    }

    /// Whether a primary is connected.
    pub fn is_connected(&self) -> bool {
        self.owner.is_some()
    }

    /// Something happened.
    pub fn on(&mut self, event: Event, decider: &mut Decider, now: Duration) -> Vec<Order> {
        let mut orders = Vec::new();
        let out = &mut orders;
        match event {
            Event::Intake(event) => self.on_intake(event, decider, now, out),
            Event::Pulse(PulseReport::Heard { peer, body, answers }) => {
                self.decide(Input::HigherGenerationSeen(peer.generation), decider, now, out);
                self.decide(heard_heartbeat(&peer, &body, answers, now), decider, now, out);
            }
            Event::Pulse(PulseReport::Generation(generation)) => {
                self.decide(Input::HigherGenerationSeen(generation), decider, now, out);
            }
            Event::Pulse(PulseReport::Goodbye(reason)) => {
                if let Some(peer) = self.owner.clone() {
                    self.decide(Input::PeerGoodbye { peer, reason: core_goodbye(reason) }, decider, now, out);
                }
            }
            Event::Pulse(PulseReport::Closed(end)) => {
                log::info!("heartbeat connection: {end}");
                if self.asks {
                    // Whoever runs there next is another process.
                    self.ask_at = Some(now + ASK_INTERVAL);
                }
            }
            Event::NobodyThere => self.ask_at = Some(now + ASK_INTERVAL),
            Event::Input(input) => self.decide(input, decider, now, out),
        }
        orders
    }

    /// Time passed, and everything that had arrived was told before: silence is judged last.
    pub fn on_time(&mut self, decider: &mut Decider, now: Duration) -> Vec<Order> {
        let mut orders = Vec::new();
        self.decide(Input::Tick, decider, now, &mut orders);
        if self.ask_at.take_if(|at| now >= *at).is_some() {
            orders.push(Order::AskPeer);
        }
        orders
    }

    fn on_intake(&mut self, event: IntakeEvent, decider: &mut Decider, now: Duration, out: &mut Vec<Order>) {
        match event {
            IntakeEvent::Opened(peer) => {
                self.owner = Some(node_of(&peer));
                (self.asks, self.ask_at) = (false, None);
                self.decide(Input::HigherGenerationSeen(peer.generation), decider, now, out);
                self.decide(heard(&peer), decider, now, out);
            }
            IntakeEvent::BaseBegun(peer) => {
                self.decide(Input::BaseBegun { owner: node_of(&peer) }, decider, now, out);
            }
            IntakeEvent::BaseCommitted(peer, epoch) => {
                self.committed = epoch;
                self.decide(Input::BaseCommitted { peer: node_of(&peer), epoch }, decider, now, out);
            }
            IntakeEvent::Committed(epoch) => {
                self.committed = epoch;
                self.decide(Input::Committed { epoch }, decider, now, out);
            }
            IntakeEvent::Heard(peer) => self.decide(heard(&peer), decider, now, out),
            IntakeEvent::Goodbye(peer, goodbye) => {
                let input = Input::PeerGoodbye { peer: node_of(&peer), reason: core_goodbye(goodbye.reason) };
                self.decide(input, decider, now, out);
            }
            IntakeEvent::Closed(end) => {
                self.owner = None;
                if self.is_mismatch(&end) {
                    out.push(Order::EndAsMismatch);
                }
                self.decide(Input::LinkLost(loss_of(&end)), decider, now, out);
            }
            // The applier's.
            IntakeEvent::Spoilt(why) => {
                log::error!("this standby has nothing to run from any more: {why}");
                self.decide(Input::CopyLost, decider, now, out);
            }
            IntakeEvent::ApplyHollow(_)
            | IntakeEvent::ApplyHollowDisk(_)
            | IntakeEvent::Compare(..)
            | IntakeEvent::Apply(..) => {}
        }
    }

    /// A hollow standby whose machine is another one than the primary's.
    fn is_mismatch(&self, end: &LinkEnd) -> bool {
        let LinkEnd::Protocol(LinkError::Incompatible(incompatible)) = end else { return false };
        let machine = [RefuseCode::Ram, RefuseCode::Facts, RefuseCode::Version, RefuseCode::Features];
        self.committed == Epoch(0) && machine.contains(&incompatible.code)
    }

    fn decide(&mut self, input: Input, decider: &mut Decider, now: Duration, out: &mut Vec<Order>) {
        // What follows the right to run is for the owner that this side becomes.
        let mut owns = false;
        for action in decider.decide(input, now) {
            owns |= matches!(action, Action::Activate(_) | Action::BootGuest(_));
            match action {
                Action::AskPeer => (self.asks, self.ask_at) = (true, Some(now)),
                // Nothing of a standby is ever let out.
                Action::HoldOutput | Action::DropBackup | Action::SayGoodbye(_) if !owns => {}
                other => out.push(Order::Do(other)),
            }
        }
    }
}

/// What the end of a connection says about the primary: only what its kernel did is evidence against it. A fault of this host's own must not
/// start a contest that the primary, which lives, could lose (R9).
fn loss_of(end: &LinkEnd) -> LinkLoss {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    match end {
        LinkEnd::EndOfFile => LinkLoss::PeerClosed,
        LinkEnd::Io(error) if matches!(error.kind(), ConnectionReset | ConnectionAborted | BrokenPipe) => {
            LinkLoss::PeerClosed
        }
        LinkEnd::Io(_)
        | LinkEnd::Protocol(_)
        | LinkEnd::Commit(_)
        | LinkEnd::Inbox(_)
        | LinkEnd::Disk(_)
        | LinkEnd::Displaced => LinkLoss::Local,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use failover::decide::{ColdStart, CoreConfig, CoreTimers, OnBackupLoss, Role};
    use primary::pulse::PulseEnd;
    use replication_proto::{Generation, Incarnation, NodeName, VmId};

    fn node(name: &str, incarnation: u128) -> NodeRef {
        NodeRef { node: NodeName::new(name).unwrap(), incarnation: Incarnation(incarnation) }
    }

    fn decider() -> Decider {
        Decider::new(CoreConfig {
            vm: VmId(1),
            me: node("a", 1),
            peer: node("b", 2).node,
            role: Role::Primary,
            highest_generation: Generation(0),
            on_backup_loss: OnBackupLoss::Solo,
            cold_start: ColdStart::Owner,
            rejoin: failover::decide::Rejoin::default(),
            force_cold_boot: false,
            timers: CoreTimers::default(),
        })
    }

    /// Found by the failpoint `ack.send=error`: a fault of the backup's own host made it contend after the short grace.
    #[test]
    fn a_fault_of_this_host_is_no_evidence_against_the_primary() {
        let io = |kind: std::io::ErrorKind| LinkEnd::Io(kind.into());
        assert_eq!(loss_of(&LinkEnd::EndOfFile), LinkLoss::PeerClosed);
        assert_eq!(loss_of(&io(std::io::ErrorKind::ConnectionReset)), LinkLoss::PeerClosed);
        assert_eq!(loss_of(&io(std::io::ErrorKind::OutOfMemory)), LinkLoss::Local);
        assert_eq!(loss_of(&io(std::io::ErrorKind::TimedOut)), LinkLoss::Local);
    }

    /// Found by the simulator (seed 10036): the peer was asked once, died, and came back as another process, and both sides waited for ever.
    #[test]
    fn a_peer_that_answered_and_died_is_asked_again() {
        let (mut course, mut decider) = (Course { asks: true, ..Course::default() }, decider());
        let now = Duration::from_secs(7);
        course.on(Event::Pulse(PulseReport::Closed(PulseEnd::EndOfFile)), &mut decider, now);
        assert_eq!(course.deadline(), Some(now + ASK_INTERVAL));
        let orders = course.on_time(&mut decider, now + ASK_INTERVAL);
        assert!(orders.iter().any(|order| matches!(order, Order::AskPeer)));
    }
}
