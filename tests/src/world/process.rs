//! One life of a process in a simulated world: the real state machines, and around them a shell that does what the real event loops, threads
//! and sockets do. What the real process does on several threads happens here in one, at times that the world draws.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use failover::arbiter::NodeRef;
use failover::config::{CaptureStrategy, Precopy};
use failover::decide::{Action, CoreConfig, Input, StateName};
use failover::exit::ExitCode;
use failover::status::StatusBoard;
use primary::clock::Clock;
use primary::decider::{Decider, voice};
use primary::host::Flow;
use primary::metrics::Metrics;
use primary::output::queue::QueueLimits;
use primary::output::{Gate, World as WayOut};
use primary::pacer::Rules;
use primary::pulse::{PulseEnd, PulseReport, Voice};
use primary::staging::Arena;
use replication_proto::{Epoch, Pulse};
use vmm::{Outputs, Tracking};

use super::env::{Env, Event};
use super::guest::{SimMachine, Utterance};
use super::net::{ConnId, End, Packet};
use super::owner::OwnerPart;
use super::storage::OpenDisks;
use super::waiter::WaiterPart;
use super::{Nanos, Who};

/// How often the status is brought up to date when nothing happens, as in the real event loops.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// What both parts of a process's life need.
pub struct Base {
    /// Which process.
    pub who: Who,
    /// The same, as the record names it.
    pub me: NodeRef,
    /// When it began, in world time.
    pub born: Nanos,
    /// The decision core.
    pub decider: Decider,
    /// The real gate.
    pub gate: Arc<Gate>,
    /// The real staging buffers.
    pub arena: Arc<Arena>,
    /// Where measurements go; nobody looks.
    pub metrics: Arc<Metrics>,
    /// What heartbeats say.
    pub voice: Voice,
    /// When epochs end, and what happens when link or backup cannot keep up.
    pub rules: Rules,
    /// What its machine does about hot pages.
    pub tracking: Tracking,
    /// How pages come out of its guest, and whether before the pause.
    pub capture: (CaptureStrategy, Precopy),
    /// Pause between attempts to connect.
    pub retry: Duration,
    /// Heartbeat interval.
    pub heartbeat: Duration,
    /// Machines of different skews do not fit together.
    pub skew: u64,
    /// How long the event loop may take to notice something.
    pub jitter: Nanos,
    /// The guest's disk, if it has one.
    pub disks: Option<OpenDisks>,
    spoken: Arc<Mutex<Vec<u64>>>,
    left: Arc<Mutex<Vec<Bytes>>>,
    clock: Arc<AtomicU64>,
    loop_at: Option<Nanos>,
    inbox_waits: bool,
}

/// Where the guest's outputs pass on their way into the real gate: the checkers hear them first.
struct Mouth {
    gate: Arc<Gate>,
    spoken: Arc<Mutex<Vec<u64>>>,
}

impl Outputs for Mouth {
    fn frame(&self, nic: u8, frame: &[u8]) {
        let said = Utterance::decode(frame).registers.history;
        self.spoken.lock().unwrap_or_else(PoisonError::into_inner).push(said);
        self.gate.frame(nic, frame);
    }

    fn console(&self, bytes: &[u8]) {
        self.gate.console(bytes);
    }
}

/// Where released outputs arrive.
struct Exit(Arc<Mutex<Vec<Bytes>>>);

impl WayOut for Exit {
    fn frame(&self, _nic: u8, frame: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Bytes::copy_from_slice(frame));
    }

    fn console(&self, _bytes: &[u8]) {}
}

/// How a process is configured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The decision core's part; each life has its own incarnation and generation in it.
    pub core: CoreConfig,
    /// When epochs end, and what happens when link or backup cannot keep up.
    pub rules: Rules,
    /// What its machine does about hot pages.
    pub tracking: Tracking,
    /// See [`Base::capture`].
    pub capture: (CaptureStrategy, Precopy),
    /// Heartbeat interval.
    pub heartbeat: Duration,
    /// See [`Base::skew`].
    pub skew: u64,
    /// See [`Base::jitter`].
    pub jitter: Nanos,
}

impl Base {
    /// A process that was just started.
    pub fn new(who: Who, settings: Settings, board: &StatusBoard, now: Nanos, disks: Option<OpenDisks>) -> Self {
        let Settings { core, rules, tracking, capture, heartbeat, skew, jitter } = settings;
        let nanos = Arc::new(AtomicU64::new(0));
        let clock = Clock::simulated(Arc::clone(&nanos));
        let metrics = Arc::new(Metrics::new(board.clone()));
        let left = Arc::new(Mutex::new(Vec::new()));
        let limits = QueueLimits { bytes: 1 << 20, max_hold: Duration::from_secs(1) };
        let gate = Gate::new(limits, Arc::new(Exit(Arc::clone(&left))), clock, Arc::clone(&metrics));
        let (me, retry) = (core.me.clone(), core.timers.protect_retry);
        Self {
            who,
            me,
            born: now,
            decider: Decider::new(core),
            gate,
            arena: Arena::new(64 << 20),
            metrics,
            voice: Voice::default(),
            rules,
            tracking,
            capture,
            retry,
            heartbeat,
            skew,
            jitter,
            disks,
            spoken: Arc::default(),
            left,
            clock: nanos,
            loop_at: None,
            inbox_waits: false,
        }
    }

    /// A machine of this process that never ran.
    pub fn build_machine(&self) -> SimMachine {
        let mouth = Mouth { gate: Arc::clone(&self.gate), spoken: Arc::clone(&self.spoken) };
        SimMachine::build(Arc::new(mouth), self.skew, self.disks.as_ref().map(OpenDisks::for_machine))
    }

    /// Bytes of each disk.
    pub fn disk_sizes(&self) -> Vec<u64> {
        self.disks.as_ref().map_or_else(Vec::new, |disks| disks.owner.sizes())
    }

    /// Time since the process started.
    pub fn local(&self, now: Nanos) -> Duration {
        Duration::from_nanos(now - self.born)
    }

    /// The process's clock shows the world's time from now on.
    pub fn set_clock(&self, now: Nanos) {
        self.clock.store(now - self.born, Ordering::Relaxed);
    }

    /// World time at which the process's clock shows `local`.
    pub fn world_time(&self, local: Duration) -> Nanos {
        self.born.saturating_add(u64::try_from(local.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Something waits for the event loop: it wakes soon.
    pub fn rouse(&mut self, env: &mut Env) {
        if !self.inbox_waits {
            self.inbox_waits = true;
            let at = env.now + 2_000 + env.rng.range(0, self.jitter + 1);
            if self.loop_at.is_none_or(|planned| at < planned) {
                self.loop_at = Some(at);
                env.at(at, Event::Loop(self.who));
            }
        }
    }

    /// The event loop woke, unless that was planned and is void.
    pub fn wakes(&mut self, now: Nanos) -> bool {
        if self.loop_at != Some(now) {
            return false;
        }
        self.loop_at = None;
        self.inbox_waits = false;
        self.decider.wakes_up(self.local(now));
        true
    }

    /// A wake-up that came while the process was paused happens now.
    pub fn reschedule(&mut self, now: Nanos) {
        self.loop_at = Some(now);
    }

    /// The event loop has done everything and sleeps.
    pub fn sleeps(&mut self, other: Option<Duration>, committed: Epoch, env: &mut Env) {
        let local = self.local(env.now);
        let view = self.decider.view(local);
        self.voice = voice(&view, committed);
        let gated = self.gate.mode() == primary::output::queue::Mode::OnCommit;
        env.ghost.shows(self.who, &view, gated, env.register.record(), env.now);
        let wait = self.decider.falls_asleep(local, other, STATUS_INTERVAL);
        let at = env.now + u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX).max(1_000);
        self.loop_at = Some(at);
        env.at(at, Event::Loop(self.who));
    }

    /// What the guest said is known to the checkers, and what left reaches the LAN.
    pub fn flush(&mut self, env: &mut Env) {
        for history in std::mem::take(&mut *self.spoken.lock().unwrap_or_else(PoisonError::into_inner)) {
            env.ghost.said(self.who, history);
        }
        for frame in std::mem::take(&mut *self.left.lock().unwrap_or_else(PoisonError::into_inner)) {
            env.frame_left(self.who, frame);
        }
    }

    /// Carries out what is the same on both sides; hands back what is not.
    #[expect(clippy::result_large_err, reason = "not an error, and carried out at once")]
    pub fn carry_out(&mut self, action: Action, env: &mut Env) -> Result<Flow, Action> {
        match action {
            Action::Arbiter { op, request } => env.ask_arbiter(self.who, op, request),
            Action::PersistGeneration(generation) => {
                if !env.persist(self.who, generation) {
                    return Ok(Flow::Exit(ExitCode::Failure));
                }
            }
            Action::Announce { from, to, reason, generation } => {
                env.note(|| {
                    format!("{} {} -> {}: {} (generation {generation})", self.me, from.word(), to.word(), reason.text())
                });
                env.ghost.seen.fenced += u64::from(to == StateName::Fenced);
            }
            Action::Reply { ticket, outcome } => env.note(|| format!("{} answers {ticket:?}: {outcome:?}", self.me)),
            Action::Alarm { reason, text } => env.note(|| format!("{} ALARM {}: {text}", self.me, reason.text())),
            other => return Err(other),
        }
        Ok(Flow::GoOn)
    }
}

/// A heartbeat connection of this process.
pub struct Beat {
    /// The connection.
    pub conn: ConnId,
    /// Our end of it.
    pub end: End,
    pulse: Pulse,
    /// When it wakes by itself.
    wakes_at: Option<Duration>,
    ended: bool,
}

impl Beat {
    /// Heartbeats begin on a connection.
    pub fn new(conn: ConnId, end: End, base: &Base, now: Nanos) -> Self {
        let pulse = Pulse::new(base.decider.identity(), base.heartbeat, base.local(now));
        Self { conn, end, pulse, wakes_at: None, ended: false }
    }

    /// What the heartbeat thread does when it wakes; what it learnt is appended to `reports`.
    pub fn turn(&mut self, read: Option<&[u8]>, base: &Base, env: &mut Env, reports: &mut Vec<PulseReport>) {
        if self.ended {
            return;
        }
        let heard = read.map_or(Ok(()), |bytes| self.pulse.handle_bytes(bytes));
        while let Some(event) = self.pulse.poll_event() {
            reports.push(event.into());
        }
        let Voice { generation, body } = base.voice;
        self.pulse.set_body(body);
        let known = base.decider.identity().generation.max(generation);
        let raised = heard.and_then(|()| match self.pulse.raise_generation(known) {
            // The peer's heartbeat raised it already.
            Err(replication_proto::LinkError::ApiMisuse(_)) => Ok(()),
            other => other,
        });
        let local = base.local(env.now);
        while let Some(bytes) = self.pulse.poll_transmit(local) {
            env.send(self.conn, self.end, Packet::Bytes(bytes));
        }
        match raised {
            Ok(()) => {
                if let Some(at) = self.pulse.next_deadline()
                    && self.wakes_at != Some(at)
                {
                    self.wakes_at = Some(at);
                    env.at(base.world_time(at).max(env.now + 1_000), Event::Beat(base.who, self.conn));
                }
            }
            Err(error) => {
                env.ghost.seen.refusals += 1;
                self.close(env);
                reports.push(PulseReport::Closed(PulseEnd::Protocol(error)));
            }
        }
    }

    /// The peer's kernel closed the connection.
    pub fn eof(&mut self, env: &mut Env, reports: &mut Vec<PulseReport>) {
        if !self.ended {
            self.close(env);
            reports.push(PulseReport::Closed(PulseEnd::EndOfFile));
        }
    }

    /// This side closes it.
    pub fn close(&mut self, env: &mut Env) {
        if !self.ended {
            self.ended = true;
            env.hang_up(self.conn, self.end);
        }
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.ended
    }
}

/// Where a process is in its life.
#[expect(clippy::large_enum_variant, reason = "two of them in a world")]
pub enum Part {
    /// The record was not read yet.
    Starting(SimMachine),
    /// It waits as the backup.
    Waiting(WaiterPart),
    /// It owns the guest.
    Owner(OwnerPart),
    /// Between two of these.
    Nothing,
}

/// One life of a process.
pub struct Process {
    /// What does not change.
    pub base: Base,
    /// Where it is.
    pub part: Part,
    started: bool,
    answers: VecDeque<Input>,
}

/// What became of a process after an event.
pub type Ending = Option<ExitCode>;

impl Process {
    /// A process starts: its event loop runs for the first time soon.
    pub fn start(mut base: Base, env: &mut Env) -> Self {
        let machine = base.build_machine();
        base.rouse(env);
        Self { base, part: Part::Starting(machine), started: false, answers: VecDeque::new() }
    }

    /// An input for the decision core arrived from beside the link: the arbiter's answer, an operator's command.
    pub fn input(&mut self, input: Input, env: &mut Env) {
        self.answers.push_back(input);
        self.base.rouse(env);
    }

    /// The event loop's turn.
    pub fn turn(&mut self, env: &mut Env) -> Ending {
        if !self.base.wakes(env.now) {
            return None;
        }
        self.base.set_clock(env.now);
        let Self { base, part, started, answers } = self;
        let mut inputs: Vec<Input> = Vec::new();
        if !std::mem::replace(started, true) {
            inputs.push(Input::Started);
        }
        inputs.extend(answers.drain(..));
        let ending = match part {
            Part::Starting(_) => Self::turn_starting(base, part, inputs, env),
            Part::Waiting(_) => WaiterPart::turn(base, part, inputs, env),
            Part::Owner(owner) => owner.turn(base, inputs, env),
            Part::Nothing => unreachable!("a process is always somewhere"),
        };
        if ending.is_some() {
            return ending;
        }
        self.base.flush(env);
        let (deadline, committed) = match &self.part {
            Part::Waiting(waiter) => waiter.rest(),
            Part::Owner(owner) => owner.rest(&self.base),
            Part::Starting(_) | Part::Nothing => (None, Epoch(0)),
        };
        self.base.sleeps(deadline, committed, env);
        None
    }

    fn turn_starting(base: &mut Base, part: &mut Part, inputs: Vec<Input>, env: &mut Env) -> Ending {
        let inputs = inputs.into_iter().chain([Input::Tick]);
        let local = base.local(env.now);
        for input in inputs {
            let mut actions = base.decider.decide(input, local).into_iter();
            while let Some(action) = actions.next() {
                match base.carry_out(action, env) {
                    Ok(Flow::GoOn) => {}
                    Ok(Flow::Exit(code)) | Err(Action::Exit(code)) => return Some(code),
                    Err(Action::BootGuest(permit)) => {
                        let Part::Starting(mut machine) = std::mem::replace(part, Part::Nothing) else { return None };
                        machine.boot(env.next_boot());
                        let before = env.replaced(permit.generation());
                        env.ghost.boots(base.who, permit.generation().0, &machine, before.as_ref());
                        env.boots_from_disk(base.who);
                        let rest = actions.collect();
                        let mut owner = OwnerPart::new(base, machine, Epoch(0));
                        let ending = owner.begin(permit, rest, base, env);
                        *part = Part::Owner(owner);
                        return ending;
                    }
                    // As the real process does: it becomes another program, with a new incarnation.
                    Err(Action::OfferAsBackup) => {
                        env.become_backup(base.who);
                        return Some(ExitCode::Ok);
                    }
                    Err(Action::SayGoodbye(_)) => {}
                    Ok(Flow::Rejoin) => unreachable!("a starting process has nothing to give up"),
                    Err(other) => panic!("an action that is not for a starting process: {other:?}"),
                }
            }
        }
        None
    }

    /// Something arrived on a connection.
    pub fn arrived(&mut self, conn: ConnId, packet: &Packet, env: &mut Env) {
        self.base.set_clock(env.now);
        match &mut self.part {
            Part::Waiting(waiter) => waiter.arrived(conn, packet, &mut self.base, env),
            Part::Owner(owner) => owner.arrived(conn, packet, &mut self.base, env),
            Part::Starting(_) | Part::Nothing => {}
        }
        self.base.flush(env);
    }

    /// A heartbeat is due.
    pub fn beat(&mut self, conn: ConnId, env: &mut Env) {
        match &mut self.part {
            Part::Waiting(waiter) => waiter.beat(conn, &mut self.base, env),
            Part::Owner(owner) => owner.beat(conn, &mut self.base, env),
            Part::Starting(_) | Part::Nothing => {}
        }
    }

    /// Whether another process can connect to this one.
    pub fn listens(&self) -> bool {
        matches!(self.part, Part::Waiting(_))
    }

    /// The guest that this process runs, if it executes now.
    pub fn guest(&self) -> Option<&SimMachine> {
        match &self.part {
            Part::Owner(owner) => Some(owner.machine()).filter(|m| m.is_running()),
            _ => None,
        }
    }
}
