//! A deterministic simulator of the pair: the real protocol, state machines and decision cores of both sides on one thread, with virtual time, a
//! virtual network and arbiter, a tiny guest, two clients, and everything that can go wrong. One seed is one world, byte for byte.
//!
//! (The method is that of FoundationDB's simulation and TigerBeetle's VOPR: swarms of faults drawn from a seed, a phase in which anything may fail,
//! then one in which everything is well and the system must recover.)

use std::time::Duration;

use failover::arbiter::NodeRef;
use failover::config::EpochPace;
use failover::decide::{ColdStart, CoreConfig, CoreTimers, Input, Role, StateName, Ticket};
use failover::status::{Labels, NodeRole, StatusBoard};
use primary::pacer::Rules;
use replication_proto::{Incarnation, NodeName, Point, VmId};

mod clients;
pub mod env;
pub mod faults;
pub mod guest;
pub mod keeper;
pub mod net;
pub mod on_write;
pub mod owner;
pub mod plan;
pub mod process;
pub mod register;
pub mod storage;
mod strike;
pub mod twice;
pub mod waiter;

use clients::Client;
use env::{Env, Event};
use faults::{Fault, Kind};
use guest::CLIENTS;
use net::Delivery;
pub use plan::Plan;
use process::{Base, Part, Process, Settings};
use storage::{HostFiles, OpenDisks};
use waiter::WaiterPart;

use crate::check::{Seen, Violation};
use crate::real::rng::{Rng, mix};
use vmm::Tracking;

/// Nanoseconds of world time.
pub type Nanos = u64;

const MS: Nanos = 1_000_000;
const SECOND: Nanos = 1_000 * MS;
/// A connection on which something sent stays unacknowledged for so long is given up.
const UNACKNOWLEDGED: Nanos = 5 * SECOND;
/// How long a pair may take to be whole again when nothing fails any more.
const RECOVERY: Nanos = 120 * SECOND;
/// After so long, a person starts those processes again whose files failed.
const OPERATOR_PATIENCE: Nanos = 15 * SECOND;

/// One life of one node's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Who {
    /// Which node: 0 or 1.
    pub node: usize,
    /// Which life, counted over the world.
    pub life: u32,
}

/// Which program a node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    /// `ft-primary`.
    Primary,
    /// `ft-backup`; whether it may boot the guest after all.
    Backup { may_boot: bool },
}

struct Node {
    process: Option<Process>,
    board: StatusBoard,
    paused: bool,
    /// What a paused process has not noticed.
    deferred: Vec<Event>,
    skew: u64,
    program: Program,
}

/// What became of a world.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The first guarantee that was broken.
    pub violation: Option<Violation>,
    /// What happened, counted.
    pub seen: Seen,
    /// What happened, folded into one number.
    pub trace: u64,
    /// How many things happened.
    pub events: u64,
    /// What happened, in words, if words were asked for.
    pub notes: Vec<String>,
    /// World time when it ended.
    pub lasted: Duration,
}

/// A simulated world.
pub struct World {
    env: Env,
    nodes: [Node; 2],
    plan: Plan,
    clients: [Client; CLIENTS],
    lives: u32,
    tickets: u64,
    /// Whether further faults are drawn.
    failing: bool,
}

/// The names of the two nodes.
pub fn node_name(node: usize) -> NodeName {
    NodeName::new(["a", "b"][node]).expect("a short name")
}

fn board(node: usize) -> StatusBoard {
    let labels = Labels {
        vm: "sim".into(),
        vm_id: String::new(),
        machine: "sim",
        node: node_name(node).to_string(),
        peer: node_name(1 - node).to_string(),
        incarnation: Incarnation(0),
        pace: EpochPace::Fixed(Duration::from_millis(25)),
        output_limit: 1 << 20,
        insecure_link: false,
    };
    StatusBoard::new(&labels, NodeRole::Primary)
}

impl World {
    /// A world at its beginning. `noted`: what happens is kept in words.
    pub fn new(plan: Plan, noted: bool) -> Self {
        let mut env = Env::new(Rng::new(plan.seed), noted);
        env.hosts = plan.disk.then(|| [HostFiles::new(), HostFiles::new()]);
        env.disk_rng = Rng::new(mix(plan.seed ^ 0xd15c_0002));
        env.conditions.split_packet = 16;
        env.conditions.slow_packet = if plan.seed.is_multiple_of(4) { 64 } else { 0 };
        env.conditions.link_rate = plan.link_rate;
        env.conditions.keep_old_packets = plan.kinds.contains(&Kind::Replay);
        let node = |node, program| Node {
            process: None,
            board: board(node),
            paused: false,
            deferred: Vec::new(),
            skew: 0,
            program,
        };
        let nodes = [node(0, Program::Primary), node(1, Program::Backup { may_boot: false })];
        let mut world =
            Self { env, nodes, plan, clients: [Client::new(); CLIENTS], lives: 0, tickets: 0, failing: true };
        world.env.at(0, Event::Start(0));
        let later = world.env.rng.range(0, 50 * MS);
        world.env.at(later, Event::Start(1));
        for client in 0..CLIENTS {
            world.client_at(client, 10 * MS);
        }
        world.env.at(SECOND, Event::GiveUp);
        world
    }

    /// Lives through a whole world: first anything may fail, then everything is put right and must be well.
    pub fn live(plan: Plan, noted: bool) -> Outcome {
        let mut world = Self::new(plan, noted);
        world.plan_fault();
        world.run_until(world.plan.length);
        if world.plan.recovers && world.env.ghost.violation().is_none() {
            world.recover();
        }
        world.outcome()
    }

    /// What became of it.
    pub fn outcome(mut self) -> Outcome {
        Outcome {
            violation: self.env.ghost.violation().cloned(),
            seen: self.env.ghost.seen,
            trace: mix(self.env.trace() ^ self.env.ghost.seen.released),
            events: self.env.happened(),
            notes: self.env.notes(),
            lasted: Duration::from_nanos(self.env.now),
        }
    }

    /// Goes on until world time `until`, or until a guarantee is broken.
    pub fn run_until(&mut self, until: Nanos) {
        while self.env.ghost.violation().is_none() {
            match self.env.next(until) {
                Some(event) => self.happen(event),
                None => return,
            }
        }
    }

    /// The next so many things happen, or fewer until a guarantee is broken.
    pub fn run_events(&mut self, count: usize) {
        for _ in 0..count {
            if self.env.ghost.violation().is_some() {
                return;
            }
            if let Some(event) = self.env.next(Nanos::MAX) {
                self.happen(event);
            }
        }
    }

    /// World time.
    pub fn now(&self) -> Nanos {
        self.env.now
    }

    /// What is shared.
    pub fn env(&mut self) -> &mut Env {
        &mut self.env
    }

    /// The state of a node's decision core, if its process lives.
    pub fn state(&self, node: usize) -> Option<StateName> {
        self.nodes[node].process.as_ref().map(|p| p.base.decider.state())
    }

    /// Whether a node shows (protected, armed).
    pub fn shows(&self, node: usize) -> (bool, bool) {
        self.nodes[node].process.as_ref().map_or((false, false), |p| {
            let view = p.base.decider.view(p.base.local(self.env.now));
            (view.protected, view.armed)
        })
    }

    /// Whether the guest executes on a node.
    pub fn runs(&self, node: usize) -> bool {
        self.nodes[node].process.as_ref().is_some_and(|p| p.guest().is_some())
    }

    /// Everything is put right: from here on the pair must become whole again, and clients be answered.
    pub fn recover(&mut self) {
        self.failing = false;
        self.env.note(|| "everything is put right".into());
        self.heal();
        let deadline = self.env.now + RECOVERY;
        let mut operator_at = Some(self.env.now + OPERATOR_PATIENCE);
        while self.env.now < deadline && self.env.ghost.violation().is_none() {
            let before = self.env.ghost.seen.answers;
            self.run_until(self.env.now + 250 * MS);
            if self.is_whole() && self.env.ghost.seen.answers > before {
                return;
            }
            if operator_at.take_if(|at| *at <= self.env.now).is_some() {
                self.start_failed_again();
            }
        }
        if self.env.ghost.violation().is_none() && !self.env.register.rolled_back {
            let states = [self.state(0), self.state(1)];
            let record = self.env.register.record().cloned();
            self.env.ghost.broken("liveness", format!("not whole again: {states:?}, {record:?}"));
        }
    }

    /// A process that saw a sync fail never trusts that file again: a person starts it anew.
    fn start_failed_again(&mut self) {
        for node in 0..2 {
            if self.env.hosts.as_ref().is_some_and(|hosts| hosts[node].supply.has_failed()) {
                self.strike(Fault::Kill(node));
            }
        }
    }

    fn is_whole(&self) -> bool {
        let lives = |node: usize| {
            let part = self.nodes[node].process.as_ref().map(|process| &process.part);
            matches!(part, Some(Part::Owner(owner)) if owner.machine().is_running() || owner.awaits_commit())
        };
        (0..2).any(|node| lives(node) && self.shows(node) == (true, true))
    }

    fn heal(&mut self) {
        self.env.conditions.heal();
        for files in self.env.hosts.iter().flatten() {
            files.supply.set_trouble(None);
            files.supply.restore();
        }
        for node in 0..2 {
            self.strike(Fault::Mend(node));
            self.strike(Fault::Slow(node, 0));
            self.strike(Fault::Skew(node, 0));
            if self.nodes[node].paused {
                self.env.at(self.env.now, Event::Resume(node));
            }
            self.env.at(self.env.now + MS, Event::Start(node));
            // A pause ends by itself. Worlds without drawn faults are struck by hand, with anything.
            if self.plan.kinds.is_empty() || self.plan.kinds.contains(&Kind::Unprotect) {
                self.strike(Fault::Command(node, failover::decide::Command::Protect));
            }
        }
    }

    fn plan_fault(&mut self) {
        if self.plan.kinds.is_empty() || !self.failing {
            return;
        }
        let begins = self.env.now + self.env.rng.range(self.plan.pause / 8, self.plan.pause * 2);
        let kind =
            self.plan.kinds[usize::try_from(self.env.rng.range(0, self.plan.kinds.len() as u64)).expect("small")];
        for (after, fault) in kind.draw(&mut self.env.rng) {
            self.env.at(begins + after, Event::Fault(fault));
        }
        self.env.at(begins, Event::Fault(Fault::Command(2, failover::decide::Command::Protect)));
    }

    // ---- what happens ------------------------------------------------------------------------------------------------------------

    fn happen(&mut self, event: Event) {
        if let Some(node) = event.node(&self.env.net)
            && self.nodes[node].paused
        {
            self.nodes[node].deferred.push(event);
            return;
        }
        self.handle(event);
        for node in 0..2 {
            if self.env.is_dark(node) {
                self.power_off(node);
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Loop(who) => self.turn(who),
            Event::Deliver(conn, end) => self.deliver(conn, end),
            Event::Beat(who, conn) => self.with(who, |process, env| process.beat(conn, env)),
            Event::Runner(who, session) => self.with_owner(who, |owner, base, env| owner.runner(session, base, env)),
            Event::Applier(who) => self.with_waiter(who, |waiter, base, env| waiter.applier(base, env)),
            Event::Guest(who) => self.with_owner(who, |owner, base, env| owner.guest_works(base, env)),
            Event::GuestDisk(who) => self.with_owner(who, |owner, base, env| owner.guest_disk(base, env)),
            Event::Disk(who) => self.with_waiter(who, |waiter, base, env| waiter.disk(base, env)),
            Event::Tidy(who, generation, epoch) => {
                self.with_owner(who, |owner, _, _| owner.tidy(Point { generation, epoch }));
            }
            Event::Prepare(who) => self.with_owner(who, |owner, _, _| owner.prepare()),
            Event::Dialled(who, session) => self.dialled(who, session),
            Event::Asked(who) => self.asked(who),
            Event::Serve(who, op, request, fate) => self.env.serve(who, op, &request, fate),
            Event::Answered(who, op, answer) => self.answered(who, op, *answer),
            Event::Frame(node, frame) => self.frame(node, &frame),
            Event::Heard(frame) => self.client_hears(&frame),
            Event::Client(client) => self.client_asks(client),
            // A marker: the next fault is drawn when this one begins.
            Event::Fault(Fault::Command(2, _)) => self.plan_fault(),
            Event::Fault(fault) => {
                if self.failing {
                    self.strike(fault);
                }
            }
            Event::Start(node) => self.start(node),
            Event::Resume(node) => self.resume(node),
            Event::GiveUp => self.give_up(),
        }
    }

    fn with(&mut self, who: Who, act: impl FnOnce(&mut Process, &mut Env)) {
        if let Some(process) = self.nodes[who.node].process.as_mut().filter(|p| p.base.who == who) {
            act(process, &mut self.env);
        }
    }

    fn with_owner(&mut self, who: Who, act: impl FnOnce(&mut owner::OwnerPart, &mut Base, &mut Env)) {
        self.with(who, |process, env| {
            if let Part::Owner(owner) = &mut process.part {
                process.base.set_clock(env.now);
                act(owner, &mut process.base, env);
            }
        });
    }

    fn with_waiter(&mut self, who: Who, act: impl FnOnce(&mut WaiterPart, &mut Base, &mut Env)) {
        self.with(who, |process, env| {
            if let Part::Waiting(waiter) = &mut process.part {
                process.base.set_clock(env.now);
                act(waiter, &mut process.base, env);
            }
        });
    }

    fn turn(&mut self, who: Who) {
        let mut ending = None;
        self.with(who, |process, env| ending = process.turn(env));
        if let Some(code) = ending {
            self.env.note(|| format!("{} ends: {code:?}", node_name(who.node)));
            self.end(who.node);
            let execs = std::mem::take(&mut self.env.wants_backup[who.node]);
            // What this process might have become, the next one may become, too.
            let may_boot = self.nodes[who.node].program != Program::Backup { may_boot: false };
            self.nodes[who.node].program = if execs { Program::Backup { may_boot } } else { Program::Primary };
            let after = if execs { 5 * MS } else { self.env.rng.range(500, 3_000) * MS };
            self.env.at(self.env.now + after, Event::Start(who.node));
        }
    }

    fn deliver(&mut self, conn: net::ConnId, end: net::End) {
        let Some(who) = self.env.net.who(conn, end) else { return };
        let Delivery::Arrived(packet) = self.env.net.deliver(conn, end, self.env.now) else { return };
        let lives = self.nodes[who.node].process.as_ref().is_some_and(|p| p.base.who == who);
        if lives {
            self.with(who, |process, env| process.arrived(conn, &packet, env));
        } else if self.env.conditions.host_up[who.node] {
            // The process is gone and its host lives: the kernel resets the connection.
            self.env.hang_up(conn, end);
        }
    }

    fn dialled(&mut self, who: Who, session: primary::protect::Session) {
        let peer = 1 - who.node;
        let conns = self.callee(peer).map(|callee| {
            let pulse = self.env.net.connect(who, callee);
            (self.env.net.connect(who, callee), pulse)
        });
        if let Some((data, pulse)) = conns
            && let Some(Process { part: Part::Waiting(waiter), .. }) = &mut self.nodes[peer].process
        {
            waiter.connected(pulse);
            waiter.connected(data);
        }
        self.with_owner(who, |owner, base, env| owner.dialled(session, conns, base, env));
    }

    fn asked(&mut self, who: Who) {
        let peer = 1 - who.node;
        let conn = self.callee(peer).map(|callee| self.env.net.connect(who, callee));
        if let Some(conn) = conn
            && let Some(Process { part: Part::Waiting(waiter), .. }) = &mut self.nodes[peer].process
        {
            waiter.connected(conn);
        }
        self.with_waiter(who, |waiter, base, env| waiter.asked(conn, base, env));
    }

    /// The process of `node`, if somebody can connect to it now.
    fn callee(&self, node: usize) -> Option<Who> {
        if self.env.net.cut[0] || self.env.net.cut[1] || !self.env.conditions.host_up[node] {
            return None;
        }
        self.nodes[node].process.as_ref().filter(|p| p.listens()).map(|p| p.base.who)
    }

    fn answered(&mut self, who: Who, op: failover::decide::OpId, answer: failover::decide::Answer) {
        use failover::decide::Answer;
        let usable = match &answer {
            Answer::Read(read) => read.is_ok(),
            Answer::Cas(outcome) => matches!(outcome, failover::arbiter::CasOutcome::Applied(_)),
        };
        if usable {
            self.env.ghost.arbiter_answered(who, self.env.now);
        }
        self.with(who, |process, env| process.input(Input::Arbiter { op, answer }, env));
    }

    fn frame(&mut self, node: usize, frame: &[u8]) {
        let Some(process) = &mut self.nodes[node].process else { return };
        process.base.set_clock(self.env.now);
        match &mut process.part {
            Part::Owner(owner) => owner.frame(frame, &mut process.base, &mut self.env),
            Part::Waiting(waiter) => waiter.frame(frame),
            Part::Starting(_) | Part::Nothing => {}
        }
    }

    // ---- lives -------------------------------------------------------------------------------------------------------------------

    fn start(&mut self, node: usize) {
        if self.nodes[node].process.is_some() || !self.env.conditions.host_up[node] {
            return;
        }
        self.lives += 1;
        let who = Who { node, life: self.lives };
        let incarnation =
            Incarnation(u128::from(mix(self.plan.seed ^ u64::from(self.lives) << 32)) << 32 | u128::from(self.lives));
        let me = NodeRef { node: node_name(node), incarnation };
        let Ok(disks) = self.open_disks(node, incarnation) else {
            return self.env.at(self.env.now + 500 * MS, Event::Start(node));
        };
        self.env.born(who, incarnation);
        self.env.ghost.born(who, &me);
        let program = self.nodes[node].program;
        self.env.note(|| format!("{me} starts: {program:?}"));
        let base = Base::new(who, self.settings(node, me), &self.nodes[node].board, self.env.now, disks);
        let mut process = Process::start(base, &mut self.env);
        if let Program::Backup { .. } = program {
            process.part = Part::Waiting(WaiterPart::new(&mut process.base));
        }
        self.nodes[node].process = Some(process);
    }

    /// Opens the disks of a process that starts, if the guest has any. An error: it ends at once.
    fn open_disks(&mut self, node: usize, me: Incarnation) -> Result<Option<OpenDisks>, ()> {
        let Some(hosts) = &self.env.hosts else { return Ok(None) };
        let well = hosts[node].supply.is_well();
        hosts[node].evict(&mut self.env.disk_rng);
        hosts[node].open(me).map(Some).map_err(|why| {
            self.env.note(|| format!("{} cannot use its disks: {why}", node_name(node)));
            if well && !self.env.is_dark(node) {
                self.env.ghost.broken("files", format!("host {node} cannot use its disks: {why}"));
            }
        })
    }

    fn settings(&self, node: usize, me: NodeRef) -> Settings {
        let role = match self.nodes[node].program {
            Program::Primary | Program::Backup { may_boot: true } => Role::Primary,
            Program::Backup { may_boot: false } => Role::Backup,
        };
        let timers = CoreTimers {
            protect_retry: self.plan.retry,
            fenced_keep: Duration::from_secs(5),
            handed_over_keep: Duration::from_secs(3),
            ..CoreTimers::default()
        };
        let core = CoreConfig {
            vm: VmId(0x51),
            me,
            peer: node_name(1 - node),
            role,
            highest_generation: self.env.persisted[node],
            on_backup_loss: self.plan.on_backup_loss,
            cold_start: ColdStart::Owner,
            rejoin: self.plan.rejoin,
            force_cold_boot: false,
            timers,
        };
        let heartbeat = Duration::from_millis(20);
        let (rules, jitter, skew) =
            (Rules { pace: self.plan.pace, overload: self.plan.overload }, self.plan.jitter, self.nodes[node].skew);
        // Where hot pages are in every epoch, a page that is forgotten is found later or never: half of the worlds are without.
        let tracking = if mix(self.plan.seed ^ 0x407).is_multiple_of(2) { Tracking::HotPages } else { Tracking::Plain };
        let capture = (self.plan.capture, self.plan.precopy);
        Settings { core, rules, tracking, capture, heartbeat, skew, jitter }
    }

    /// The process of a node is gone, in order or not; its kernel closes what it had open.
    fn end(&mut self, node: usize) {
        if let Some(mut process) = self.nodes[node].process.take() {
            match &mut process.part {
                Part::Owner(owner) => owner.end(&mut self.env),
                Part::Waiting(waiter) => waiter.leave(&mut self.env),
                Part::Starting(_) | Part::Nothing => {}
            }
            let who = process.base.who;
            for (conn, end) in self.env.net.of(who) {
                self.env.hang_up(conn, end);
            }
            self.env.ghost.died(who, self.env.now);
        }
        self.nodes[node].paused = false;
        self.nodes[node].deferred.clear();
    }

    fn resume(&mut self, node: usize) {
        if std::mem::take(&mut self.nodes[node].paused) {
            self.env.note(|| format!("{} goes on", node_name(node)));
            let now = self.env.now;
            for event in std::mem::take(&mut self.nodes[node].deferred) {
                let event = match event {
                    Event::Loop(who) => {
                        self.with(who, |process, _| process.base.reschedule(now));
                        Event::Loop(who)
                    }
                    other => other,
                };
                self.env.at(now, event);
            }
        }
    }

    fn give_up(&mut self) {
        for (conn, end) in self.env.net.unacknowledged(self.env.now, UNACKNOWLEDGED) {
            if let Some(who) = self.env.net.who(conn, end)
                && !self.nodes[who.node].paused
            {
                self.with(who, |process, env| match &mut process.part {
                    Part::Owner(owner) => owner.unacknowledged(conn, &mut process.base, env),
                    Part::Waiting(waiter) => waiter.unacknowledged(conn, &mut process.base, env),
                    Part::Starting(_) | Part::Nothing => {}
                });
            }
        }
        self.env.at(self.env.now + SECOND, Event::GiveUp);
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }
}
