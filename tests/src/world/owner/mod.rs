//! The side that owns the guest, in a simulated world: the real course, stream, checkpoint and gate, and in place of the runner's and the
//! link's threads this.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use failover::RunPermit;
use failover::config::CaptureStrategy;
use failover::decide::{Action, GuestEnd, Input, LinkLoss};
use failover::exit::ExitCode;
use primary::bulk::{BaseCopy, blocks_to_look_at};
use primary::capture::Capture;
use primary::capture::precopy::Precopied;
use primary::disk::{DiskCopy, OwnerDisks};
use primary::epoch::{Afterwards, Captured, EpochParts};
use primary::host::{EPOCHS_IN_FLIGHT, Flow, wire_goodbye};
use primary::mirror::Mirror;
use primary::owner::course::{Course, Event as Told, Order};
use primary::pacer::Pacer;
use primary::protect::Session;
use primary::setup::{facts, ram_layout};
use primary::stream::{Stream, StreamEvent};
use primary::verify::Verifier;
use replication_proto::{Comparable, Epoch, Point, SenderConfig, Standing};
use vmm::{Machine, PageBits, PausedVm, Throttle};

mod runner;

use super::Nanos;
use super::env::{Env, Event};
use super::guest::SimMachine;
use super::net::{ConnId, End, Packet};
use super::on_write::SimOnWrite;
use super::process::{Base, Beat, Ending};

/// What the runner's thread is doing.
enum Doing {
    /// The guest runs unprotected, or not at all.
    Nothing,
    /// The base of this epoch is being copied.
    Copying { session: Session, first: Epoch, memory: Option<BaseCopy>, disks: Option<DiskCopy>, few: bool },
    /// One checkpoint after another.
    Epochs { session: Session, pacer: Box<Pacer>, judged: Duration, phase: Phase },
    /// The guest is stopped; the link stays until a command needs it no longer.
    Stopped,
    /// The same, after the last checkpoint of a switchover: what still arrives for the guest is told to the backup.
    HandedOver,
}

/// Where the end of an epoch is.
enum Phase {
    /// The epoch goes on.
    Running,
    /// Pages were copied while the guest runs. The pause follows.
    Precopied(Precopied),
    /// Its pages are protected, and copied while the guest runs.
    Copying(Captured, Taking),
    /// The guest stands still until this epoch is committed.
    Waiting(Taking),
}

/// A checkpoint that is being taken.
#[derive(Clone, Copy)]
struct Taking {
    epoch: Epoch,
    began: Duration,
    waited_since: Option<Duration>,
    outputs: u32,
    afterwards: Afterwards,
    waits: bool,
}

/// One session's connections.
struct Link {
    session: Session,
    data: ConnId,
    stream: Stream,
    /// The link's thread has ended.
    closed: bool,
    beat: Beat,
    /// The epoch of the base, once it is being copied.
    first: Option<Epoch>,
    /// The last epoch that the backup acknowledged here.
    acked: Epoch,
    /// What the backup holds of an earlier life.
    standing: Standing,
}

/// The owner's part of a process.
pub struct OwnerPart {
    course: Course,
    machine: SimMachine,
    permit: Option<RunPermit>,
    stopped: bool,
    doing: Doing,
    last: Epoch,
    link: Option<Link>,
    inbox: VecDeque<Told>,
    parts: EpochParts,
    running_epoch: Epoch,
    /// When the runner's thread wakes next; what was planned before is void.
    runner_at: Option<Nanos>,
}

impl OwnerPart {
    /// A side that owns a machine which does not run yet.
    pub fn new(base: &Base, machine: SimMachine, last: Epoch) -> Self {
        let parts = EpochParts {
            gate: base.gate.clone(),
            arena: base.arena.clone(),
            mirror: std::sync::Arc::new(Mirror::default()),
            metrics: base.metrics.clone(),
            // The checkers compare memory themselves.
            ram_digest: false,
            tracking: base.tracking,
            base_share: 1.0,
            verifier: Arc::new(Verifier::new(Vec::new())),
            disks: base.disks.as_ref().map_or_else(|| Arc::new(OwnerDisks::none()), |disks| Arc::clone(&disks.owner)),
            capture: match base.capture {
                (CaptureStrategy::CopyOnWrite, precopy) => {
                    let strategy = SimOnWrite::new(machine.watch().clone(), machine.ram().clone());
                    Capture::with(Box::new(strategy), precopy)
                }
                (strategy, precopy) => Capture::new(strategy, precopy),
            },
        };
        Self {
            course: Course::new(base.retry, last),
            machine,
            permit: None,
            stopped: true,
            doing: Doing::Nothing,
            last,
            link: None,
            inbox: VecDeque::new(),
            parts,
            running_epoch: last.next(),
            runner_at: None,
        }
    }

    /// The guest runs for the first time here, and what the decision core said along with the right to run is carried out.
    pub fn begin(&mut self, permit: RunPermit, rest: Vec<Action>, base: &mut Base, env: &mut Env) -> Ending {
        self.permit = Some(permit);
        self.run();
        env.at(env.now + 1_000_000, Event::Guest(base.who));
        if base.disks.is_some() {
            let at = env.now + env.guest_disk_interval();
            env.at(at, Event::GuestDisk(base.who));
        }
        let orders = self.course.adopt(rest, base.local(env.now));
        self.carry_out_all(orders, base, env)
    }

    /// The machine.
    pub fn machine(&self) -> &SimMachine {
        &self.machine
    }

    /// When the event loop has something to do, and the last committed epoch.
    pub fn rest(&self, base: &Base) -> (Option<Duration>, Epoch) {
        (self.course.deadline(&base.decider), self.course.committed())
    }

    /// The event loop's turn.
    pub fn turn(&mut self, base: &mut Base, inputs: Vec<Input>, env: &mut Env) -> Ending {
        let told: Vec<Told> = inputs.into_iter().map(Told::Input).chain(self.inbox.drain(..)).collect();
        for event in told {
            let ending = self.tell(event, base, env);
            if ending.is_some() {
                return ending;
            }
        }
        let now = base.local(env.now);
        let orders = self.course.on_time(self.last, &mut base.decider, now);
        self.carry_out_all(orders, base, env)
    }

    fn tell(&mut self, event: Told, base: &mut Base, env: &mut Env) -> Ending {
        let now = base.local(env.now);
        let orders = self.course.on(event, &mut base.decider, now);
        self.carry_out_all(orders, base, env)
    }

    // ---- what the threads around the event loop do -----------------------------------------------------------------------------------

    /// A connection was made, or could not be.
    pub fn dialled(&mut self, session: Session, conns: Option<(ConnId, ConnId)>, base: &mut Base, env: &mut Env) {
        let Some((data, pulse)) = conns else {
            self.inbox.push_back(Told::NotConnected(session));
            return base.rouse(env);
        };
        if !self.course.is_current(session) {
            env.hang_up(data, End::Caller);
            return env.hang_up(pulse, End::Caller);
        }
        let mut beat = Beat::new(pulse, End::Caller, base, env.now);
        beat.turn(None, base, env, &mut Vec::new());
        let config = SenderConfig {
            identity: base.decider.identity(),
            ram: ram_layout(&self.machine),
            disks: base.disk_sizes(),
            facts: facts(&self.machine),
            max_in_flight: EPOCHS_IN_FLIGHT + 1,
            compress_base: true,
            patches: true,
        };
        let stream = Stream::new(config, base.gate.clone(), base.metrics.clone());
        self.link = Some(Link {
            session,
            data,
            stream,
            closed: false,
            beat,
            first: None,
            acked: Epoch(0),
            standing: Standing::default(),
        });
        self.transmit(env);
        self.inbox.push_back(Told::Connected(session));
        base.rouse(env);
    }

    /// Something arrived on a connection.
    pub fn arrived(&mut self, conn: ConnId, packet: &Packet, base: &mut Base, env: &mut Env) {
        let Some(link) = &mut self.link else { return };
        if conn == link.beat.conn {
            let mut reports = Vec::new();
            match packet {
                Packet::Bytes(bytes) => link.beat.turn(Some(bytes), base, env, &mut reports),
                Packet::Fin => link.beat.eof(env, &mut reports),
            }
            let session = link.session;
            self.inbox.extend(reports.into_iter().map(|report| Told::Pulse(session, report)));
            return base.rouse(env);
        }
        if conn != link.data || link.closed {
            return;
        }
        match packet {
            Packet::Fin => self.close_link(LinkLoss::PeerClosed, base, env),
            Packet::Bytes(bytes) => {
                let (session, gate, inbox) = (link.session, &base.gate, &mut self.inbox);
                let Link { stream, acked, standing, .. } = link;
                let (mut answers, mut durable) = (Vec::new(), Vec::new());
                let handled = stream.handle_bytes(bytes, |event| {
                    let mut covers = false;
                    match &event {
                        StreamEvent::Committed(epoch) => {
                            *acked = *epoch;
                            gate.bell().committed(epoch.0);
                            covers = gate.covers_released(*epoch);
                        }
                        StreamEvent::Accepted(_, told) => *standing = told.clone(),
                        StreamEvent::Wanted(answer) => return answers.push(answer.clone()),
                        StreamEvent::Durable(epoch) => durable.push(*epoch),
                        _ => {}
                    }
                    inbox.push_back(Told::Stream { session, event, covers });
                });
                if let Doing::Copying { memory, disks, .. } = &mut self.doing {
                    for answer in &answers {
                        match (answer.of, &mut *memory, &mut *disks) {
                            (Comparable::Memory, Some(memory), _) => memory.answered(answer),
                            (Comparable::Disk(disk), _, Some(disks)) => disks.answered(disk, answer),
                            _ => {}
                        }
                    }
                }
                for epoch in durable {
                    let generation = base.decider.identity().generation;
                    if self.parts.disks.durable(Point { generation, epoch }, Duration::from_nanos(env.now)) {
                        let at = env.now + env.disk_delay();
                        env.at(at, Event::Tidy(base.who, generation, epoch));
                    }
                }
                base.rouse(env);
                match handled {
                    Ok(()) => {
                        self.transmit(env);
                        self.heed_bell(base, env);
                    }
                    Err(_) => {
                        env.ghost.seen.refusals += 1;
                        self.close_link(LinkLoss::Local, base, env);
                    }
                }
            }
        }
    }

    /// The network gave the connection up: what was sent stayed unacknowledged for too long.
    pub fn unacknowledged(&mut self, conn: ConnId, base: &mut Base, env: &mut Env) {
        if self.link.as_ref().is_some_and(|link| link.data == conn && !link.closed) {
            self.close_link(LinkLoss::PeerClosed, base, env);
        }
    }

    /// A heartbeat is due.
    pub fn beat(&mut self, conn: ConnId, base: &mut Base, env: &mut Env) {
        if let Some(link) = &mut self.link
            && link.beat.conn == conn
        {
            let mut reports = Vec::new();
            link.beat.turn(None, base, env, &mut reports);
            let session = link.session;
            if !reports.is_empty() {
                self.inbox.extend(reports.into_iter().map(|report| Told::Pulse(session, report)));
                base.rouse(env);
            }
        }
    }

    /// The link's thread ends.
    fn close_link(&mut self, loss: LinkLoss, base: &mut Base, env: &mut Env) {
        let Some(link) = &mut self.link else { return };
        if !std::mem::replace(&mut link.closed, true) {
            link.stream.give_up();
            env.hang_up(link.data, End::Caller);
            self.inbox.push_back(Told::Closed(link.session, loss));
            self.let_run_on();
            base.rouse(env);
        }
    }

    fn transmit(&mut self, env: &mut Env) {
        let Some(link) = self.link.as_mut().filter(|link| !link.closed) else { return };
        let mut out = Vec::new();
        while let Some(bytes) = link.stream.poll_transmit() {
            out.push(bytes);
        }
        link.stream.note_sent();
        env.send_stream(link.data, End::Caller, out);
    }

    /// A frame for the guest arrived on this host's tap.
    pub fn frame(&mut self, frame: &[u8], base: &mut Base, env: &mut Env) {
        if let Some(link) = self.link.as_mut().filter(|link| !link.closed)
            && matches!(self.doing, Doing::Epochs { .. } | Doing::HandedOver)
        {
            // An error shows again when the stream is used next.
            link.stream.inbound(self.running_epoch, 0, frame).ok();
            self.transmit(env);
        }
        base.set_clock(env.now);
        self.machine.receive(frame);
        base.flush(env);
        self.heed_bell(base, env);
    }

    /// The guest's own work.
    pub fn guest_works(&mut self, base: &mut Base, env: &mut Env) {
        if self.machine.is_running() {
            if !matches!(self.doing, Doing::Epochs { .. }) && !self.machine.throttle_in_force().is_none() {
                env.ghost.broken("G7", format!("{} is slowed and not protected", base.me));
            }
            base.set_clock(env.now);
            let (pages, speaks) = (env.dirty_pages(), env.rng.range(0, 4) == 0);
            self.machine.work(pages, speaks);
            base.flush(env);
            self.heed_bell(base, env);
        }
        let next = env.guest_interval();
        env.at(env.now + next, Event::Guest(base.who));
    }

    /// The guest's disk goes on with what it is at, or the guest asks it for something.
    pub fn guest_disk(&mut self, base: &mut Base, env: &mut Env) {
        if let Some((request, stamp)) = self.machine.next_request() {
            match self.machine.announce(request) {
                Ok(false) => {}
                Ok(true) => {
                    env.ghost.disk_tries(base.who, request, stamp);
                    let well = self.machine.carry_out(request, stamp).is_ok();
                    if well {
                        env.ghost.disk_did(base.who, request, stamp);
                    }
                    self.machine.complete(request, well);
                }
                Err(_) => self.machine.complete(request, false),
            }
            base.flush(env);
            self.heed_bell(base, env);
        }
        let at = env.now + env.guest_disk_interval();
        env.at(at, Event::GuestDisk(base.who));
    }

    /// The thread that clears bits of the disks' maps works.
    pub fn tidy(&self, point: Point) {
        self.parts.disks.tidy(point);
    }

    /// What is due before the first change of a disk is done before anybody waits for it.
    pub fn prepare(&self) {
        // An error shows when the guest changes something.
        self.parts.disks.first_change().prepare().ok();
    }

    /// The guest ends by itself.
    pub fn guest_ends(&mut self, end: GuestEnd, base: &mut Base, env: &mut Env) {
        if self.machine.is_running() {
            self.machine.shut_down();
            self.stopped = true;
            self.inbox.push_back(Told::GuestEnded(end));
            base.rouse(env);
        }
    }

    /// Protection cannot go on.
    fn fail(&mut self, why: &str, base: &mut Base, env: &mut Env) {
        env.note(|| format!("{} cannot protect: {why}", base.me));
        self.does(Doing::Nothing);
        self.parts.disks.end_log();
        self.close_link(LinkLoss::Local, base, env);
        self.inbox.push_back(Told::ProtectionFailed(LinkLoss::Local));
        base.rouse(env);
    }

    /// Something else is done from now on. A guest that waited for a commit waits no longer, and what was taken of an unfinished epoch is given back.
    fn does(&mut self, doing: Doing) {
        self.let_run_on();
        self.doing = doing;
        // Whatever could not keep up is no matter any more.
        self.machine.throttle(Throttle::NONE).expect("the simulated guest can be slowed");
    }

    /// Whether the guest stands still only until its epoch is committed.
    pub fn awaits_commit(&self) -> bool {
        matches!(self.doing, Doing::Epochs { phase: Phase::Waiting(_), .. })
    }

    /// A guest that waits for a commit runs on, unless it was stopped for another reason meanwhile.
    fn let_run_on(&mut self) {
        if let Doing::Epochs { phase: phase @ Phase::Waiting(_), .. } = &mut self.doing {
            *phase = Phase::Running;
            if !self.stopped && self.permit.is_some() {
                // A guest that has ended meanwhile stays so.
                self.machine.run().ok();
            }
        }
    }

    fn run(&mut self) {
        if matches!(self.doing, Doing::Stopped | Doing::HandedOver) {
            // The runner's thread is through with its link.
            self.parts.disks.end_log();
        }
        if self.permit.is_some() && self.machine.run().is_ok() {
            self.stopped = false;
        }
    }

    fn stop(&mut self) {
        if !self.stopped {
            if let Ok(paused) = PausedVm::pause(&mut self.machine) {
                paused.stay_stopped();
            }
            self.stopped = true;
        }
    }

    // ---- carrying out ------------------------------------------------------------------------------------------------------------

    fn carry_out_all(&mut self, orders: Vec<Order>, base: &mut Base, env: &mut Env) -> Ending {
        for order in orders {
            let ending = match order {
                Order::Do(action) => self.act(action, base, env),
                other => {
                    self.session_order(other, base, env);
                    None
                }
            };
            if ending.is_some() {
                return ending;
            }
        }
        None
    }

    fn session_order(&mut self, order: Order, base: &mut Base, env: &mut Env) {
        match order {
            Order::Dial(session) => env.dial(base.who, session),
            Order::SendBase { session, first } => {
                assert!(first > self.last, "epoch {first} begins a base after {}", self.last);
                self.last = first;
                let Some(link) = self.link.as_mut().filter(|l| l.session == session && !l.closed) else { return };
                let mut disks = None;
                if base.disks.is_some() {
                    if !self.parts.disks.still_ours().unwrap_or(false) {
                        return self.fail("a map is not ours", base, env);
                    }
                    self.parts.disks.begin_log(first);
                    let blocks = blocks_to_look_at(&self.parts.disks, &link.standing);
                    disks = Some(DiskCopy::begin(&*self.parts.disks, &blocks));
                }
                let begun = link.stream.begin_base(first);
                link.first = Some(first);
                let memory = disks.is_none().then(|| {
                    BaseCopy::begin(&mut self.machine, self.parts.tracking, link.standing.warm_memory)
                        .expect("the simulated dirty log can be switched on")
                });
                self.does(Doing::Copying { session, first, memory, disks, few: false });
                // What was planned for another session wakes nobody in this one.
                self.runner_at = None;
                if begun.is_err() {
                    return self.fail("the stream is over", base, env);
                }
                self.schedule(base, env);
            }
            Order::Close(session) => {
                if let Some(mut link) = self.link.take_if(|l| l.session == session) {
                    if !link.closed {
                        link.stream.give_up();
                        env.hang_up(link.data, End::Caller);
                    }
                    link.beat.close(env);
                    self.does(Doing::Nothing);
                    self.check_dirty(&link, base, env);
                    self.parts.disks.end_log();
                    self.course.epoch_used(self.last);
                }
            }
            Order::Freeze => {
                self.permit = None;
                self.stop();
            }
            Order::Goodbye(session, reason) => {
                if let Some(link) = self.link.as_mut().filter(|l| l.session == session && !l.closed) {
                    link.stream.goodbye(wire_goodbye(reason), "").ok();
                    self.transmit(env);
                    // After a switchover, what reaches this side too late still has to get across.
                    if reason != failover::decide::GoodbyeReason::Switchover {
                        self.close_link(LinkLoss::Local, base, env);
                    }
                }
            }
            Order::Do(_) => unreachable!("carried out elsewhere"),
        }
    }

    /// What the backup never acknowledged waits in the ledger.
    fn check_dirty(&self, link: &Link, base: &Base, env: &mut Env) {
        if let Some(first) = link.first {
            // Dropped again at once: it gives its pages back.
            let owed = self.machine.ledger().take(PageBits::default()).iter().fold(0, |bits, page| bits | 1 << page.0);
            env.ghost.disconnected(base.who, first.0, link.acked.0, owed);
        }
    }

    fn act(&mut self, action: Action, base: &mut Base, env: &mut Env) -> Ending {
        let action = match base.carry_out(action, env) {
            Ok(Flow::GoOn) => return None,
            Ok(Flow::Exit(code)) => return Some(code),
            Ok(Flow::Rejoin) => unreachable!("an action of its own"),
            Err(action) => action,
        };
        match action {
            Action::HoldOutput => {
                base.gate.hold();
                self.heed_bell(base, env);
            }
            Action::OpenOutput => base.gate.open(),
            Action::TrustAcks { backup: _ } => base.gate.release_on_commit(),
            Action::PauseGuest => {
                self.finish_copying(base, env);
                self.stop();
                if matches!(self.doing, Doing::Epochs { .. }) {
                    self.does(Doing::Stopped);
                }
            }
            Action::ResumeGuest => {
                self.run();
                // As the runner's thread, whose link ends with an order that is none of the link's.
                if matches!(self.doing, Doing::Epochs { .. } | Doing::Stopped | Doing::HandedOver) {
                    self.does(Doing::Nothing);
                    self.parts.disks.end_log();
                    self.close_link(LinkLoss::Local, base, env);
                    base.rouse(env);
                }
            }
            Action::Fence { reason: _ } => base.gate.silence(),
            Action::ResumeFenced(permit) => {
                env.ghost.resumes(base.who, permit.generation().0);
                self.permit = Some(permit);
                self.run();
            }
            Action::BeginSwitchover => match &self.doing {
                Doing::Epochs { .. } => {
                    self.finish_copying(base, env);
                    self.end_epoch(Afterwards::StaysStopped, base, env);
                }
                _ => env.note(|| "a last checkpoint came too late for its link".into()),
            },
            Action::Exit(code) => return Some(code),
            // As the real process does: it becomes the other program, with a new incarnation.
            Action::Rejoin => {
                env.drops_guest(&base.me);
                env.become_backup(base.who);
                return Some(ExitCode::Ok);
            }
            other => panic!("an action that is not for a side that runs the guest: {other:?}"),
        }
        base.flush(env);
        None
    }

    /// The process ends: what was said is on its way.
    pub fn end(&mut self, env: &mut Env) {
        if let Some(link) = &mut self.link {
            if !link.closed {
                env.hang_up(link.data, End::Caller);
            }
            link.beat.close(env);
        }
    }
}
