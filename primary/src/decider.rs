//! The decision core, with time as it is shown to it and the words that heartbeats carry for it. Pure; the event loops of both sides and the
//! simulator hold one each.

use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::decide::{Action, Core, CoreConfig, Input, PeerReport, StateName, View};
use replication_proto::{Epoch, HeartbeatBody, Identity, VmId};

use crate::attention::Attention;
use crate::pulse::Voice;

/// Bit of a heartbeat's `armed` byte: the speaker is PROTECTED.
const SAYS_PROTECTED: u8 = 1;
/// The same: the speaker, a backup in sync, asks for the guest.
const ASKS_FOR_GUEST: u8 = 2;

/// The decision core of one process, with its view of time. All `now`s are times since the process started.
#[derive(Clone, Debug)]
pub struct Decider {
    core: Core,
    attention: Attention,
    vm: VmId,
    me: NodeRef,
}

impl Decider {
    /// A core that has not started yet.
    pub fn new(config: CoreConfig) -> Self {
        let (vm, me) = (config.vm, config.me.clone());
        Self { core: Core::new(config), attention: Attention::default(), vm, me }
    }

    /// Hands an input to the core.
    pub fn decide(&mut self, input: Input, now: Duration) -> Vec<Action> {
        self.core.handle(input, self.attention.core_time(now))
    }

    /// How long an event loop may sleep: until the core's next deadline or `other`, but at most `most`.
    pub fn falls_asleep(&mut self, now: Duration, other: Option<Duration>, most: Duration) -> Duration {
        let core_now = self.attention.core_time(now);
        let core = self.core.next_deadline(core_now).map(|at| at.saturating_sub(core_now));
        let other = other.map(|at| at.saturating_sub(now));
        let wait = core.into_iter().chain(other).fold(most, Duration::min);
        self.attention.sleeps(now, now + wait);
        wait
    }

    /// The event loop is awake again. Returns what it slept through and is left out of the core's time.
    pub fn wakes_up(&mut self, now: Duration) -> Option<Duration> {
        self.attention.wakes(now)
    }

    /// Who this process is, under the highest generation that it knows.
    pub fn identity(&self) -> Identity {
        let NodeRef { node, incarnation } = self.me.clone();
        Identity { vm: self.vm, node, generation: self.core.generation(), incarnation }
    }

    /// The core's state in the words of the documentation.
    pub fn state(&self) -> StateName {
        self.core.state_name()
    }

    /// The core.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Facts for the status.
    pub fn view(&self, now: Duration) -> View {
        self.core.view_of(self.attention.core_time(now), self.attention.slept())
    }
}

/// What heartbeats say of a side with this view, whose last committed epoch is `committed`.
pub fn voice(view: &View, committed: Epoch) -> Voice {
    let body = HeartbeatBody {
        committed_epoch: committed,
        state: StateName::ALL.iter().zip(0u8..).find(|(s, _)| **s == view.state).map_or(0, |(_, n)| n),
        armed: if view.protected { SAYS_PROTECTED } else { 0 } | if view.asks { ASKS_FOR_GUEST } else { 0 },
        arbiter_ok_ms: view.arbiter_age.map(|age| u32::try_from(age.as_millis()).unwrap_or(u32::MAX)),
    };
    Voice { generation: view.generation, body }
}

/// A frame of the data connection arrived: what that means to the core.
pub fn heard(peer: &Identity) -> Input {
    Input::PeerHeard { peer: node_of(peer), report: None }
}

/// A heartbeat is handled at `now`, which the peer said after `answers` ([`PulseEvent::Heard`](replication_proto::PulseEvent::Heard)). It may have waited in the connection
/// or in our queues meanwhile; without `answers` nobody knows for how long, and ages that it names say nothing.
pub fn heard_heartbeat(peer: &Identity, body: &HeartbeatBody, answers: Option<Duration>, now: Duration) -> Input {
    let waited = answers.map(|said_after| now.saturating_sub(said_after));
    let said = body.arbiter_ok_ms.map(|ms| Duration::from_millis(u64::from(ms)));
    let report = PeerReport {
        arbiter_age: said.zip(waited).map(|(said, waited)| said.saturating_add(waited)),
        protected: body.armed & SAYS_PROTECTED != 0,
        asks: body.armed & ASKS_FOR_GUEST != 0,
    };
    Input::PeerHeard { peer: node_of(peer), report: Some(report) }
}

/// The process behind an identity.
pub fn node_of(peer: &Identity) -> NodeRef {
    NodeRef { node: peer.node.clone(), incarnation: peer.incarnation }
}

#[cfg(test)]
mod tests {
    use replication_proto::{Generation, Incarnation, NodeName};

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_a_heartbeat_says_ages_while_it_waits() {
        let peer = Identity {
            vm: VmId(1),
            node: NodeName::new("b").expect("a name"),
            generation: Generation(1),
            incarnation: Incarnation(2),
        };
        let body = HeartbeatBody { arbiter_ok_ms: Some(40), ..HeartbeatBody::default() };
        let age = |body: &HeartbeatBody, answers| match heard_heartbeat(&peer, body, answers, 5_000 * MS) {
            Input::PeerHeard { report: Some(report), .. } => report.arbiter_age,
            other => panic!("{other:?}"),
        };
        assert_eq!(age(&body, Some(4_990 * MS)), Some(50 * MS));
        assert_eq!(age(&body, Some(MS)), Some(5_039 * MS), "it waited in the connection");
        assert_eq!(age(&body, None), None, "nobody knows for how long it waited");
        assert_eq!(age(&HeartbeatBody::default(), Some(5_000 * MS)), None, "never reached");
    }
}
