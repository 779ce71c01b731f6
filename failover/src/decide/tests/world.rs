//! Two cores in virtual time, with an arbiter that loses answers and a link that can be cut in each direction.
//!
//! The shells are modelled as far as the safety argument needs them: epochs, acks, an output gate. Every release and every permit is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use replication_proto::{Epoch, Generation, Incarnation, NodeName, VmId};

use super::super::*;
use crate::exit::ExitCode;

pub(super) const A: usize = 0;
pub(super) const B: usize = 1;
pub(super) const VM: VmId = VmId(0x77);
const DELAY: Duration = Duration::from_micros(200);
const EPOCH: Duration = Duration::from_millis(25);
const HEARTBEAT: Duration = Duration::from_millis(20);
const BASE: Duration = Duration::from_millis(60);

pub(super) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[derive(Debug, Clone)]
enum Message {
    /// With it: whether the sender would be a backup.
    Heartbeat(PeerReport, bool),
    BaseBegin,
    BaseEnd(u64),
    BaseAck(u64),
    Epoch(u64),
    Ack(u64),
    Goodbye(GoodbyeReason),
    Closed,
}

#[derive(Debug, Clone)]
enum Event {
    Deliver { to: usize, from: NodeRef, generation: Generation, connection: u64, message: Message },
    Answer { to: usize, incarnation: Incarnation, op: OpId, answer: Answer },
    Apply { expected: Option<Revision>, record: Record },
    Beat { node: usize, incarnation: Incarnation },
    EndEpoch { node: usize, incarnation: Incarnation },
    BaseDone { node: usize, incarnation: Incarnation, connection: u64 },
    Wake { node: usize, incarnation: Incarnation },
    Stalled { node: usize, incarnation: Incarnation, connection: u64 },
}

/// What becomes of requests to the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    Good,
    /// No answer, nothing done.
    Down,
    /// Done, but the answer is lost.
    AnswerLost,
    /// The answer is lost; it is done this much later, if the revision still fits.
    Late(Duration),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Guest {
    Off,
    Runs(Generation),
    Paused(Generation),
}

pub(super) struct Node {
    pub(super) core: Option<Core>,
    pub(super) me: NodeRef,
    pub(super) guest: Guest,
    pub(super) exit: Option<ExitCode>,
    /// Times that a process of this node began anew as a backup.
    pub(super) rejoined: u32,
    pub(super) replies: Vec<CommandOutcome>,
    pub(super) alarms: Vec<ReasonCode>,
    pub(super) service: Service,
    pub(super) announced: Vec<StateName>,
    pub(super) bases: usize,
    frozen: bool,
    buffered: Vec<Event>,
    persisted: Generation,
    gate: Gate,
    epoch: u64,
    released: u64,
    held_at: u64,
    committed: Option<u64>,
    connection: Option<u64>,
    base_sent: bool,
    wake: Option<Duration>,
}

pub(super) struct World {
    pub(super) now: Duration,
    pub(super) nodes: [Node; 2],
    pub(super) record: Option<Versioned>,
    /// Messages *from* this node are lost.
    pub(super) cut: [bool; 2],
    pub(super) writes: usize,
    /// Writes whose answer is lost and that are applied later.
    pub(super) late: usize,
    pub(super) hold_policy: bool,
    pub(super) cold_start: ColdStart,
    pub(super) rejoin: Rejoin,
    pub(super) promotions: Vec<(Generation, u64)>,
    /// Generations that began with a boot, each with no memory of what was before: a lineage of its own.
    boots: BTreeSet<Generation>,
    events: BTreeMap<(Duration, u64), Event>,
    sequence: u64,
    permits: BTreeSet<Generation>,
    releases: Vec<(Generation, u64)>,
    /// From here on a promotion may lose output: an operator forced it.
    forced: bool,
}

pub(super) fn node_ref(node: usize, incarnation: u128) -> NodeRef {
    let name = if node == A { "a" } else { "b" };
    NodeRef { node: NodeName::new(name).unwrap(), incarnation: Incarnation(incarnation) }
}

impl World {
    pub(super) fn new() -> Self {
        let node = |at| Node {
            core: None,
            me: node_ref(at, 0),
            guest: Guest::Off,
            exit: None,
            rejoined: 0,
            replies: vec![],
            alarms: vec![],
            service: Service::Good,
            announced: vec![],
            bases: 0,
            frozen: false,
            buffered: vec![],
            persisted: Generation(0),
            gate: Gate::Held,
            epoch: 0,
            released: 0,
            held_at: 0,
            committed: None,
            connection: None,
            base_sent: false,
            wake: None,
        };
        Self {
            now: Duration::ZERO,
            nodes: [node(A), node(B)],
            record: None,
            cut: [false; 2],
            writes: 0,
            late: 0,
            hold_policy: false,
            cold_start: ColdStart::Owner,
            rejoin: Rejoin::default(),
            promotions: vec![],
            boots: BTreeSet::new(),
            events: BTreeMap::new(),
            sequence: 0,
            permits: BTreeSet::new(),
            releases: vec![],
            forced: false,
        }
    }

    /// A pair that is PROTECTED: A runs, B is in sync.
    pub(super) fn protected() -> Self {
        Self::protected_with(Rejoin::default())
    }

    pub(super) fn protected_with(rejoin: Rejoin) -> Self {
        let mut world = Self { rejoin, ..Self::new() };
        world.start(A, Role::Primary);
        world.start(B, Role::Backup);
        world.run(ms(1500));
        assert_eq!(world.state(A), StateName::Protected);
        assert_eq!(world.state(B), StateName::InSync);
        world
    }

    pub(super) fn start(&mut self, at: usize, role: Role) {
        self.start_with(at, role, false);
    }

    pub(super) fn start_with(&mut self, at: usize, role: Role, force_cold_boot: bool) {
        assert!(self.nodes[at].core.is_none());
        self.sequence += 1;
        let me = node_ref(at, u128::from(self.sequence) + 1000);
        let config = CoreConfig {
            vm: VM,
            me: me.clone(),
            peer: node_ref(1 - at, 0).node,
            role,
            highest_generation: self.nodes[at].persisted,
            on_backup_loss: if self.hold_policy { OnBackupLoss::Hold } else { OnBackupLoss::Solo },
            cold_start: self.cold_start,
            rejoin: self.rejoin,
            force_cold_boot,
            timers: CoreTimers::default(),
        };
        let node = &mut self.nodes[at];
        node.core = Some(Core::new(config));
        node.me = me.clone();
        (node.guest, node.exit, node.gate) = (Guest::Off, None, Gate::Held);
        (node.epoch, node.released, node.committed, node.connection) = (0, 0, None, None);
        (node.base_sent, node.wake, node.frozen) = (false, None, false);
        self.after(ms(1), Event::Beat { node: at, incarnation: me.incarnation });
        self.after(EPOCH, Event::EndEpoch { node: at, incarnation: me.incarnation });
        self.input(at, Input::Started);
    }

    /// SIGKILL: the kernel closes the connections.
    pub(super) fn kill(&mut self, at: usize) {
        self.send(at, Message::Closed);
        let node = &mut self.nodes[at];
        (node.core, node.guest, node.connection, node.frozen) = (None, Guest::Off, None, false);
        node.buffered.clear();
    }

    /// Power loss: nothing is closed.
    pub(super) fn power_off(&mut self, at: usize) {
        let cut = std::mem::replace(&mut self.cut[at], true);
        self.kill(at);
        self.cut[at] = cut;
    }

    /// SIGSTOP and SIGCONT.
    pub(super) fn freeze(&mut self, at: usize, frozen: bool) {
        self.nodes[at].frozen = frozen;
        if !frozen {
            for event in std::mem::take(&mut self.nodes[at].buffered) {
                self.dispatch(event);
            }
        }
    }

    pub(super) fn command(&mut self, at: usize, command: Command) {
        if matches!(command, Command::ForceTakeover { .. }) {
            self.forced = true;
        }
        self.input(at, Input::Command { ticket: Ticket(1), command });
    }

    pub(super) fn state(&self, at: usize) -> StateName {
        self.nodes[at].core.as_ref().map_or(StateName::Ended, Core::state_name)
    }

    pub(super) fn view(&self, at: usize) -> View {
        self.nodes[at].core.as_ref().expect("alive").view(self.now)
    }

    pub(super) fn running(&self) -> Vec<usize> {
        [A, B].into_iter().filter(|at| matches!(self.nodes[*at].guest, Guest::Runs(_))).collect()
    }

    /// Output of the guest on this node leaves or will leave as soon as it is made and acked.
    pub(super) fn open(&self, at: usize) -> bool {
        matches!(self.nodes[at].guest, Guest::Runs(_)) && self.nodes[at].gate == Gate::Open
    }

    pub(super) fn run(&mut self, span: Duration) {
        let until = self.now + span;
        self.run_while(until, |_| true);
    }

    /// Runs until `done`, at most for `span`; says how long it took.
    pub(super) fn run_until(&mut self, span: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        let (from, until) = (self.now, self.now + span);
        self.run_while(until, |world| !done(world));
        done(self).then(|| self.now - from)
    }

    fn run_while(&mut self, until: Duration, go_on: impl Fn(&Self) -> bool) {
        while go_on(self) {
            let Some(entry) = self.events.first_entry() else { break };
            if entry.key().0 > until {
                break;
            }
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            self.dispatch(event);
        }
        if go_on(self) {
            self.now = until;
        }
    }

    fn after(&mut self, span: Duration, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + span, self.sequence), event);
    }

    fn send(&mut self, from: usize, message: Message) {
        if self.cut[from] {
            // A stream has no gaps: it stalls, and the shell of either end closes it after a while.
            let node = &self.nodes[from];
            if let (Some(connection), false) = (node.connection, matches!(message, Message::Heartbeat(..))) {
                let incarnation = node.me.incarnation;
                self.after(ms(1000), Event::Stalled { node: from, incarnation, connection });
            }
            return;
        }
        let node = &self.nodes[from];
        let generation = node.core.as_ref().map_or(Generation(0), |core| core.view(self.now).generation);
        let connection = node.connection.unwrap_or(0);
        let event = Event::Deliver { to: 1 - from, from: node.me.clone(), generation, connection, message };
        self.after(DELAY, event);
    }

    fn dispatch(&mut self, event: Event) {
        let (node, incarnation) = match &event {
            Event::Apply { expected, record } => return self.apply(*expected, record.clone()),
            Event::Deliver { to, .. } => (*to, None),
            Event::Answer { to: node, incarnation, .. }
            | Event::Beat { node, incarnation }
            | Event::EndEpoch { node, incarnation }
            | Event::BaseDone { node, incarnation, .. }
            | Event::Stalled { node, incarnation, .. }
            | Event::Wake { node, incarnation } => (*node, Some(*incarnation)),
        };
        if self.nodes[node].core.is_none() || incarnation.is_some_and(|of| of != self.nodes[node].me.incarnation) {
            return;
        }
        if self.nodes[node].frozen {
            return self.nodes[node].buffered.push(event);
        }
        match event {
            Event::Apply { .. } => {}
            Event::Deliver { from, generation, connection, message, .. } => {
                self.receive(node, from, generation, connection, message);
            }
            Event::Answer { op, answer, .. } => self.input(node, Input::Arbiter { op, answer }),
            Event::Beat { incarnation, .. } => self.beat(node, incarnation),
            Event::EndEpoch { incarnation, .. } => self.end_epoch(node, incarnation),
            Event::BaseDone { connection, .. } => self.base_done(node, connection),
            Event::Stalled { connection, .. } => {
                if self.nodes[node].connection == Some(connection) {
                    self.send(node, Message::Closed);
                    self.nodes[node].connection = None;
                    self.input(node, Input::LinkLost(LinkLoss::Local));
                }
            }
            Event::Wake { .. } => {
                self.nodes[node].wake = None;
                self.input(node, Input::Tick);
            }
        }
    }

    fn beat(&mut self, node: usize, incarnation: Incarnation) {
        let view = self.view(node);
        let available = matches!(view.state, StateName::Standby | StateName::InSync | StateName::TakingOver);
        let report =
            PeerReport { arbiter_age: view.arbiter_age, protected: view.owner && view.protected, asks: view.asks };
        self.send(node, Message::Heartbeat(report, available));
        self.after(HEARTBEAT, Event::Beat { node, incarnation });
    }

    fn end_epoch(&mut self, at: usize, incarnation: Incarnation) {
        self.after(EPOCH, Event::EndEpoch { node: at, incarnation });
        let node = &mut self.nodes[at];
        let Guest::Runs(generation) = node.guest else { return };
        node.epoch += 1;
        let epoch = node.epoch;
        if node.gate == Gate::Open {
            self.release(at, generation, epoch);
        }
        if self.nodes[at].connection.is_some() && self.nodes[at].base_sent {
            self.send(at, Message::Epoch(epoch));
        }
    }

    fn base_done(&mut self, at: usize, connection: u64) {
        if self.nodes[at].connection == Some(connection) {
            self.nodes[at].base_sent = true;
            let epoch = self.nodes[at].epoch;
            self.send(at, Message::BaseEnd(epoch));
        }
    }

    fn receive(&mut self, at: usize, from: NodeRef, generation: Generation, connection: u64, message: Message) {
        let mine = self.view(at).generation;
        if generation < mine && !matches!(message, Message::Heartbeat(..) | Message::Closed) {
            return;
        }
        if generation > mine {
            self.input(at, Input::HigherGenerationSeen(generation));
        }
        let same = self.nodes[at].connection == Some(connection);
        match message {
            Message::Heartbeat(report, available) => {
                self.input(at, Input::PeerHeard { peer: from.clone(), report: Some(report) });
                // The owner dials whoever would be a backup.
                if available
                    && self.nodes[at].core.is_some()
                    && self.view(at).owner
                    && self.nodes[at].connection.is_none()
                {
                    self.input(at, Input::BackupJoined { backup: from });
                }
            }
            Message::BaseBegin if !self.view(at).owner => {
                self.nodes[at].connection = Some(connection);
                self.nodes[at].committed = None;
                self.input(at, Input::BaseBegun { owner: from });
            }
            Message::BaseEnd(epoch) if same => {
                self.nodes[at].committed = Some(epoch);
                self.send(at, Message::BaseAck(epoch));
                self.input(at, Input::BaseCommitted { peer: from, epoch: Epoch(epoch) });
            }
            Message::Epoch(epoch) if same && self.nodes[at].committed == epoch.checked_sub(1) => {
                self.nodes[at].committed = Some(epoch);
                self.input(at, Input::Committed { epoch: Epoch(epoch) });
                self.send(at, Message::Ack(epoch));
            }
            Message::BaseAck(epoch) if same => {
                self.input(at, Input::BaseCommitted { peer: from, epoch: Epoch(epoch) });
            }
            Message::Ack(epoch) if same => self.acked(at, from, epoch),
            Message::Goodbye(reason) => self.input(at, Input::PeerGoodbye { peer: from, reason }),
            Message::Closed if same => {
                self.nodes[at].connection = None;
                self.input(at, Input::LinkLost(LinkLoss::PeerClosed));
            }
            _ => {}
        }
    }

    fn acked(&mut self, at: usize, from: NodeRef, epoch: u64) {
        self.input(at, Input::PeerHeard { peer: from.clone(), report: None });
        let node = &self.nodes[at];
        if node.gate == Gate::OnAck(from.clone()) {
            if let Guest::Runs(generation) | Guest::Paused(generation) = node.guest {
                self.release(at, generation, epoch);
            }
        } else if node.gate == Gate::Held && epoch > node.held_at {
            self.input(at, Input::ReleasedCovered { backup: from, epoch: Epoch(epoch) });
        }
        let ready = matches!(self.nodes[at].guest, Guest::Paused(_)) && epoch >= self.nodes[at].epoch;
        if ready && self.state(at) == StateName::SwitchingOver {
            self.input(at, Input::SwitchoverReady { epoch: Epoch(epoch) });
        }
    }

    fn release(&mut self, at: usize, generation: Generation, epoch: u64) {
        if epoch <= self.nodes[at].released {
            return;
        }
        self.nodes[at].released = epoch;
        self.releases.push((generation, epoch));
        for (promoted, from) in self.of_lineage(generation, &self.promotions) {
            assert!(
                promoted <= generation || epoch <= from || self.forced,
                "generation {generation} let out epoch {epoch} after generation {promoted} went on from epoch {from}"
            );
        }
    }

    pub(super) fn input(&mut self, at: usize, input: Input) {
        let now = self.now;
        let Some(core) = self.nodes[at].core.as_mut() else { return };
        let actions = core.handle(input, now);
        for action in actions {
            self.act(at, action);
        }
        self.check();
        let Some(core) = &self.nodes[at].core else { return };
        if let Some(deadline) = core.next_deadline(now) {
            assert!(deadline > now);
            if self.nodes[at].wake.is_none_or(|wake| deadline < wake) {
                self.nodes[at].wake = Some(deadline);
                let incarnation = self.nodes[at].me.incarnation;
                self.after(deadline - now, Event::Wake { node: at, incarnation });
            }
        }
    }

    fn act(&mut self, at: usize, action: Action) {
        let incarnation = self.nodes[at].me.incarnation;
        match action {
            Action::Arbiter { op, request } => self.request(at, op, request),
            Action::PersistGeneration(generation) => {
                assert!(generation >= self.nodes[at].persisted);
                self.nodes[at].persisted = generation;
            }
            Action::BootGuest(permit) => {
                self.boots.insert(permit.generation());
                self.run_guest(at, &permit, 0);
            }
            Action::Activate(permit) => {
                let from = self.nodes[at].committed.expect("G3: a hollow standby is never activated");
                self.send(at, Message::Closed);
                self.nodes[at].connection = None;
                self.promoted(&permit, from);
                self.run_guest(at, &permit, from);
            }
            Action::ResumeFenced(permit) => {
                assert!(matches!(self.nodes[at].guest, Guest::Paused(_)));
                let from = self.nodes[at].epoch;
                self.run_guest(at, &permit, from);
            }
            Action::OfferAsBackup | Action::AskPeer => {}
            Action::StartBase { .. } => self.start_base(at, incarnation),
            Action::DropBackup => {
                self.send(at, Message::Closed);
                self.nodes[at].connection = None;
            }
            Action::HoldOutput => self.hold(at),
            Action::OpenOutput => {
                self.nodes[at].gate = Gate::Open;
                if let Guest::Runs(generation) | Guest::Paused(generation) = self.nodes[at].guest {
                    let epoch = self.nodes[at].epoch;
                    self.release(at, generation, epoch);
                }
            }
            Action::TrustAcks { backup } => self.nodes[at].gate = Gate::OnAck(backup),
            Action::PauseGuest | Action::Fence { .. } | Action::BeginSwitchover => {
                if let Guest::Runs(generation) = self.nodes[at].guest {
                    self.nodes[at].guest = Guest::Paused(generation);
                }
                if matches!(action, Action::BeginSwitchover) {
                    self.nodes[at].epoch += 1;
                    let epoch = self.nodes[at].epoch;
                    self.send(at, Message::Epoch(epoch));
                }
            }
            Action::ResumeGuest => {
                let Guest::Paused(generation) = self.nodes[at].guest else { panic!("resumed what was not paused") };
                self.nodes[at].guest = Guest::Runs(generation);
            }
            Action::SayGoodbye(reason) => self.send(at, Message::Goodbye(reason)),
            Action::Reply { outcome, .. } => self.nodes[at].replies.push(outcome),
            Action::Announce { to, .. } => self.nodes[at].announced.push(to),
            Action::Alarm { reason, .. } => self.nodes[at].alarms.push(reason),
            // What it finds is the shell's to tell.
            Action::Verify(_) => {}
            Action::Rejoin => {
                self.nodes[at].rejoined += 1;
                self.kill(at);
                self.start(at, Role::Backup);
            }
            Action::Exit(code) => {
                self.nodes[at].exit = Some(code);
                self.kill(at);
            }
        }
    }

    fn start_base(&mut self, at: usize, incarnation: Incarnation) {
        self.sequence += 1;
        let connection = self.sequence;
        self.nodes[at].connection = Some(connection);
        self.nodes[at].base_sent = false;
        self.nodes[at].bases += 1;
        self.send(at, Message::BaseBegin);
        self.after(BASE, Event::BaseDone { node: at, incarnation, connection });
    }

    fn hold(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.held_at = node.epoch;
        if node.gate == Gate::Open {
            // Part of the epoch that is being executed is out already.
            node.held_at += 1;
            if let Guest::Runs(generation) = node.guest {
                let epoch = node.held_at;
                self.release(at, generation, epoch);
            }
        }
        self.nodes[at].gate = Gate::Held;
    }

    fn run_guest(&mut self, at: usize, permit: &crate::RunPermit, from: u64) {
        assert!(self.permits.insert(permit.generation()), "two permits for generation {}", permit.generation());
        self.nodes[at].guest = Guest::Runs(permit.generation());
        self.nodes[at].epoch = from;
        self.nodes[at].released = from;
    }

    /// Those that belong to the lineage of `generation`. An owner that stood still may let out what the backup acknowledged even after
    /// that backup took over, died and booted anew (R8 bounds how late): output of another lineage, to be held against that one alone.
    fn of_lineage(&self, generation: Generation, all: &[(Generation, u64)]) -> impl Iterator<Item = (Generation, u64)> {
        let lineage = |of: Generation| self.boots.range(..=of).next_back();
        all.iter().copied().filter(move |(of, _)| lineage(*of) == lineage(generation))
    }

    fn promoted(&mut self, permit: &crate::RunPermit, from: u64) {
        let generation = permit.generation();
        if !self.forced {
            for (released, epoch) in self.of_lineage(generation, &self.releases) {
                assert!(epoch <= from, "promoted from epoch {from}, but generation {released} let out epoch {epoch}");
            }
        }
        self.promotions.push((generation, from));
    }

    fn request(&mut self, at: usize, op: OpId, request: ArbiterRequest) {
        let service = self.nodes[at].service;
        let (answer, took) = match (request, service) {
            (ArbiterRequest::Read, Service::Down) => {
                (Answer::Read(Err(ArbiterError::Unreachable("down".into()))), ms(5))
            }
            (ArbiterRequest::Read, _) => (Answer::Read(Ok(self.record.clone())), ms(1)),
            (ArbiterRequest::Cas { .. }, Service::Down) => (Answer::Cas(CasOutcome::Failed("down".into())), ms(5)),
            (ArbiterRequest::Cas { expected, record }, Service::Good) => {
                (Answer::Cas(self.swap(expected, record)), ms(1))
            }
            (ArbiterRequest::Cas { expected, record }, Service::AnswerLost) => {
                self.apply(expected, record);
                (Answer::Cas(CasOutcome::Unknown("lost".into())), ms(5))
            }
            (ArbiterRequest::Cas { expected, record }, Service::Late(delay)) => {
                self.late += 1;
                self.after(delay, Event::Apply { expected, record });
                (Answer::Cas(CasOutcome::Unknown("lost".into())), ms(5))
            }
        };
        let incarnation = self.nodes[at].me.incarnation;
        self.after(took, Event::Answer { to: at, incarnation, op, answer });
    }

    fn apply(&mut self, expected: Option<Revision>, record: Record) {
        let _ = self.swap(expected, record);
    }

    fn swap(&mut self, expected: Option<Revision>, record: Record) -> CasOutcome {
        record.validate().unwrap();
        if self.record.as_ref().map(|stored| stored.revision) != expected {
            return CasOutcome::Conflict;
        }
        if let Some(stored) = &self.record {
            assert!(record.generation >= stored.record.generation, "generations never fall");
            if record.owner != stored.record.owner {
                assert!(record.generation > stored.record.generation, "I2: one owner per generation");
            }
            if matches!(record.reason, Reason::Takeover | Reason::Switchover) {
                assert_eq!(stored.record.in_sync.as_ref(), Some(&record.owner), "I6: only who is in sync takes over");
            }
        }
        self.writes += 1;
        let revision = Revision(expected.map_or(1, |revision| revision.0 + 1));
        self.record = Some(Versioned { revision, record });
        CasOutcome::Applied(revision)
    }

    /// Invariants that hold at every moment.
    fn check(&self) {
        for at in [A, B] {
            let node = &self.nodes[at];
            let Some(core) = &node.core else { continue };
            let view = core.view(self.now);
            assert_eq!(view.gate, node.gate, "the shell's gate is the core's gate");
            if let (true, true, Some(stored)) = (view.protected, view.owner, &self.record) {
                // G11: as long as nobody took over, the record names the backup that output waits for. (A lower generation: a rolled-back arbiter.)
                let named = stored.record.in_sync.clone().map(Gate::OnAck);
                assert!(stored.record.generation != view.generation || named == Some(view.gate), "falsely PROTECTED");
            }
        }
        // Two guests run with output open only if an operator vouched for it.
        let open: Vec<usize> = [A, B].into_iter().filter(|at| self.open(*at)).collect();
        assert!(open.len() < 2 || self.forced_alone(), "two guests run with output open");
    }

    fn forced_alone(&self) -> bool {
        self.nodes.iter().any(|node| node.core.as_ref().is_some_and(|core| core.view(self.now).blind))
    }
}
