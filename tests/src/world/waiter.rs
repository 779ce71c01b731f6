//! The side that waits, in a simulated world: the real course and intake, and in place of the applier's, the link's and the taps' threads this.

use std::collections::VecDeque;
use std::time::Duration;

use backup::activate::{deliver, restore};
use backup::commit::{Commits, Committed, Holding};
use backup::inbox::{Inbox, PageBatch};
use backup::intake::{Intake, IntakeEvent, LinkEnd, News, Question};
use backup::standby::{StandbyMemory, compare};
use backup::wait::course::{Course, Event as Told, Order};
use bytes::Bytes;
use failover::RunPermit;
use failover::decide::{Action, Input, StateName};
use failover::exit::ExitCode;
use primary::host::Flow;
use primary::setup::{facts, ram_layout};
use replication_proto::mutant::{self, Mutant};
use replication_proto::{
    Channel, Comparable, Epoch, Greeting, Incarnation, PieceHashes, PiecesWanted, ReceiverConfig, ReceiverLimits,
    Standing,
};
use vmm::Machine;

use super::Nanos;
use super::env::{Env, Event};
use super::guest::SimMachine;
use super::keeper::{Keeper, Told as Disks};
use super::net::{ConnId, End, Packet};
use super::owner::OwnerPart;
use super::process::{Base, Beat, Ending, Part};

/// Frames kept by the silent tap.
const FRAMES_KEPT: usize = 256;
/// Heartbeat connections kept at one time.
const PULSES_MAX: usize = 4;
/// Bytes of a delta that a simulated backup takes.
const INBOX_BYTES: usize = 4 << 20;
/// Committed bytes that may wait to be applied.
const BACKLOG_BYTES: usize = 64 << 10;

enum Job {
    Hollow(PageBatch),
    Compare(Question, PieceHashes),
    Checkpoint(Committed),
}

/// The waiting part of a process.
pub struct WaiterPart {
    course: Course,
    intake: Intake,
    machine: SimMachine,
    keeper: Option<Keeper>,
    /// When the disks' thread wakes.
    disk_at: Option<Nanos>,
    /// What the link's thread will hear of the disks when it looks next.
    standing: Option<News>,
    /// Somebody decides who runs the guest.
    contends: bool,
    memory: StandbyMemory,
    jobs: VecDeque<Job>,
    /// The applier's thread sleeps until an event wakes it.
    applier_waits: bool,
    data: Option<ConnId>,
    /// Whose checkpoints arrive.
    owner: Option<Incarnation>,
    strangers: Vec<(ConnId, Greeting)>,
    pulses: Vec<Beat>,
    silent: VecDeque<Vec<u8>>,
    inbox: VecDeque<Told>,
}

impl WaiterPart {
    /// A side that listens and holds nothing.
    pub fn new(base: &mut Base) -> Self {
        let machine = base.build_machine();
        let waiting = base.disks.as_mut().and_then(|disks| disks.waiting.take().map(|w| (w, disks.journal_bytes)));
        let keeper = waiting.map(|((disks, journal), limit)| Keeper::new(disks, journal, limit));
        let standing = keeper.as_ref().map_or_else(Vec::new, Keeper::standing);
        let config = ReceiverConfig {
            identity: base.decider.identity(),
            ram: ram_layout(&machine),
            disks: base.disk_sizes(),
            standing: Standing { disks: standing, ..Standing::default() },
            facts: facts(&machine),
            limits: ReceiverLimits {
                max_epoch_pages: 1_024,
                max_epoch_section_bytes: 1 << 20,
                max_epoch_disk_bytes: 1 << 20,
            },
        };
        Self {
            course: Course::default(),
            intake: Intake::new(config, Inbox::new(INBOX_BYTES), Commits::new(BACKLOG_BYTES)),
            machine,
            keeper,
            disk_at: None,
            standing: None,
            contends: false,
            memory: StandbyMemory::default(),
            jobs: VecDeque::new(),
            applier_waits: false,
            data: None,
            owner: None,
            strangers: Vec::new(),
            pulses: Vec::new(),
            silent: VecDeque::new(),
            inbox: VecDeque::new(),
        }
    }

    /// When the event loop has something to do, and the last committed epoch.
    pub fn rest(&self) -> (Option<Duration>, Epoch) {
        (self.course.deadline(), self.course.committed())
    }

    /// The event loop's turn.
    pub fn turn(base: &mut Base, part: &mut Part, inputs: Vec<Input>, env: &mut Env) -> Ending {
        let Part::Waiting(waiter) = part else { return None };
        let told: Vec<Told> = inputs.into_iter().map(Told::Input).chain(waiter.inbox.drain(..)).collect();
        for event in told {
            let Part::Waiting(waiter) = part else { return None };
            let now = base.local(env.now);
            let orders = waiter.course.on(event, &mut base.decider, now);
            if let Some(ending) = Self::carry_out_all(base, part, orders, env) {
                return ending;
            }
        }
        let Part::Waiting(waiter) = part else { return None };
        let now = base.local(env.now);
        let orders = waiter.course.on_time(&mut base.decider, now);
        if let Some(ending) = Self::carry_out_all(base, part, orders, env) {
            return ending;
        }
        if let Part::Waiting(waiter) = part {
            let contends = base.decider.state() == StateName::TakingOver;
            if !std::mem::replace(&mut waiter.contends, contends) && contends {
                waiter.hurry_disks();
            }
            let raised = waiter.intake.raise_generation(base.decider.identity().generation);
            waiter.settle(raised, base, env);
        }
        None
    }

    /// `Some`: nothing else is told here; with it, how the process ended, if it did.
    fn carry_out_all(base: &mut Base, part: &mut Part, orders: Vec<Order>, env: &mut Env) -> Option<Ending> {
        let mut rest = orders.into_iter();
        while let Some(order) = rest.next() {
            match order {
                Order::AskPeer => env.ask_peer(base.who),
                Order::EndAsMismatch => return Some(Some(ExitCode::MachineMismatch)),
                Order::Do(action) => match base.carry_out(action, env) {
                    Ok(Flow::GoOn) | Err(Action::OfferAsBackup) => {}
                    Ok(Flow::Exit(code)) | Err(Action::Exit(code)) => return Some(Some(code)),
                    Ok(Flow::Rejoin) => unreachable!("a side that waits has nothing to give up"),
                    Err(Action::Activate(permit)) => {
                        return Some(Self::activate(base, part, permit, actions_of(rest), env));
                    }
                    Err(Action::BootGuest(permit)) => {
                        return Some(Self::boot(base, part, permit, actions_of(rest), env));
                    }
                    Err(other) => panic!("an action that is not for a side that waits: {other:?}"),
                },
            }
        }
        None
    }

    /// As `backup::activate` does, with the same pieces in the same order.
    fn activate(base: &mut Base, part: &mut Part, permit: RunPermit, rest: Vec<Action>, env: &mut Env) -> Ending {
        let Part::Waiting(mut waiter) = std::mem::replace(part, Part::Nothing) else { return None };
        waiter.apply_all();
        let holding = waiter.intake.holding();
        let disk_point = match waiter.keeper.take().map(|keeper| keeper.finish(base.local(env.now))) {
            None => None,
            Some(Ok(retire)) => {
                let point = retire.point();
                let disks = base.disks.as_ref().expect("disks that were kept");
                disks.before_first_change(move || retire.run());
                Some(point.epoch)
            }
            Some(Err(error)) => {
                // Its permit is spent: the guest of this side is lost.
                env.note(|| format!("{} cannot be activated: {error}", base.me));
                waiter.leave(env);
                return Some(ExitCode::Failure);
            }
        };
        let memory = std::mem::take(&mut waiter.memory);
        if mutant::is(Mutant::AckAfterPromotion) {
            // What still arrives is committed and acknowledged, and never applied.
            env.linger(&mut waiter, base);
        }
        waiter.leave(env);
        let Self { intake, mut machine, silent, .. } = waiter;
        let (_, inbound) = intake.close();
        let Some(applied) = memory.into_applied() else {
            env.ghost.broken("G3", format!("{} was activated and is hollow", base.me));
            return Some(ExitCode::Failure);
        };
        let epoch = applied.epoch;
        if holding != Holding::Whole(epoch) {
            env.ghost.broken("G3", format!("{} holds {holding:?}, its memory is that of {epoch}", base.me));
            return Some(ExitCode::Failure);
        }
        if disk_point.is_some_and(|point| point != epoch) {
            env.ghost.broken("image", format!("{} holds disks of {disk_point:?}, memory of {epoch}", base.me));
        }
        let held = restore(&mut machine, holding, applied).expect("a state of this machine");
        let before = env.replaced(permit.generation());
        env.ghost.takes_over(base.who, permit.generation().0, epoch.0, &machine, before.as_ref());
        if let Some(image) = env.image(base.who.node) {
            env.ghost.disk_goes_on(base.who, &image);
            let soon = env.now + env.disk_delay();
            env.at(soon, Event::Prepare(base.who));
        }
        env.ghost.inspected(&machine);
        base.gate.hold();
        base.gate.adopt_speakers(held.speakers.clone());
        env.lan_learns(base.who);
        held.frames.iter().for_each(|(nic, frame)| base.gate.send_for_guest(*nic, frame));
        base.flush(env);
        deliver(&mut machine, &inbound, vec![(0, silent.into())]);
        let mut owner = OwnerPart::new(base, machine, epoch);
        let ending = owner.begin(permit, rest, base, env);
        *part = Part::Owner(owner);
        ending
    }

    fn boot(base: &mut Base, part: &mut Part, permit: RunPermit, rest: Vec<Action>, env: &mut Env) -> Ending {
        let Part::Waiting(mut waiter) = std::mem::replace(part, Part::Nothing) else { return None };
        waiter.leave(env);
        match waiter.keeper.take().map(|keeper| keeper.finish_for_boot(base.local(env.now))).transpose() {
            Ok(retire) => {
                if let (Some(disks), Some(retire)) = (&base.disks, retire.flatten()) {
                    disks.before_first_change(move || retire.run());
                }
            }
            Err(error) => {
                env.note(|| format!("{} cannot boot: {error}", base.me));
                return Some(ExitCode::Failure);
            }
        }
        let mut machine = waiter.machine;
        machine.boot(env.next_boot());
        let before = env.replaced(permit.generation());
        env.ghost.boots(base.who, permit.generation().0, &machine, before.as_ref());
        env.boots_from_disk(base.who);
        let mut owner = OwnerPart::new(base, machine, Epoch(0));
        let ending = owner.begin(permit, rest, base, env);
        *part = Part::Owner(owner);
        ending
    }

    /// Every connection of this side is closed.
    pub fn leave(&mut self, env: &mut Env) {
        self.pulses.iter_mut().for_each(|beat| beat.close(env));
        if let Some(data) = self.data.take() {
            env.hang_up(data, End::Callee);
        }
        for (conn, _) in self.strangers.drain(..) {
            env.hang_up(conn, End::Callee);
        }
    }

    // ---- connections -------------------------------------------------------------------------------------------------------------

    /// Somebody connected.
    pub fn connected(&mut self, conn: ConnId) {
        self.strangers.push((conn, Greeting::new()));
    }

    /// A heartbeat connection that this side wanted stands, or could not be made.
    pub fn asked(&mut self, conn: Option<ConnId>, base: &mut Base, env: &mut Env) {
        match conn {
            Some(conn) => self.take_pulse(conn, End::Caller, None, base, env),
            None => {
                self.inbox.push_back(Told::NobodyThere);
                base.rouse(env);
            }
        }
    }

    /// Something arrived on a connection.
    pub fn arrived(&mut self, conn: ConnId, packet: &Packet, base: &mut Base, env: &mut Env) {
        self.hear_standing();
        if let Some(at) = self.strangers.iter().position(|(c, _)| *c == conn) {
            return self.greet(at, packet, base, env);
        }
        if self.data == Some(conn) {
            let served = match packet {
                Packet::Bytes(bytes) => self.intake.handle_bytes(bytes),
                Packet::Fin => self.intake.handle_eof(),
            };
            return self.settle(served, base, env);
        }
        let Some(beat) = self.pulses.iter_mut().find(|beat| beat.conn == conn) else { return };
        let mut reports = Vec::new();
        match packet {
            Packet::Bytes(bytes) => beat.turn(Some(bytes), base, env, &mut reports),
            Packet::Fin => beat.eof(env, &mut reports),
        }
        self.pulses.retain(|beat| !beat.is_over());
        self.inbox.extend(reports.into_iter().map(Told::Pulse));
        base.rouse(env);
    }

    fn greet(&mut self, at: usize, packet: &Packet, base: &mut Base, env: &mut Env) {
        let (conn, mut greeting) = self.strangers.remove(at);
        let Packet::Bytes(bytes) = packet else { return env.hang_up(conn, End::Callee) };
        let caller = match greeting.handle_bytes(bytes) {
            Ok(None) => return self.strangers.push((conn, greeting)),
            Err(_) => {
                env.ghost.seen.refusals += 1;
                return env.hang_up(conn, End::Callee);
            }
            Ok(Some(caller)) => (caller.channel, caller.peer.clone()),
        };
        let read = greeting.into_bytes();
        match caller {
            (Channel::Heartbeat, _) => self.take_pulse(conn, End::Callee, Some(&read), base, env),
            (Channel::Data, peer) if self.intake.admits(&peer) => {
                if let Some(data) = self.data {
                    self.end_data(LinkEnd::Displaced, base, env);
                    env.hang_up(data, End::Callee);
                }
                self.data = Some(conn);
                let known = base.decider.identity().generation;
                let served = self.intake.raise_generation(known).and_then(|()| {
                    self.intake.open();
                    self.intake.handle_bytes(&read)
                });
                self.settle(served, base, env);
            }
            (Channel::Data, _) => {
                env.send_stream(conn, End::Callee, self.intake.turn_away());
                env.hang_up(conn, End::Callee);
            }
        }
    }

    fn take_pulse(&mut self, conn: ConnId, end: End, read: Option<&Bytes>, base: &mut Base, env: &mut Env) {
        if self.pulses.len() == PULSES_MAX {
            self.pulses.remove(0).close(env);
        }
        let mut beat = Beat::new(conn, end, base, env.now);
        let mut reports = Vec::new();
        beat.turn(read.map(|bytes| &bytes[..]), base, env, &mut reports);
        if !beat.is_over() {
            self.pulses.push(beat);
        }
        self.inbox.extend(reports.into_iter().map(Told::Pulse));
        base.rouse(env);
    }

    /// A heartbeat is due.
    pub fn beat(&mut self, conn: ConnId, base: &mut Base, env: &mut Env) {
        let Some(beat) = self.pulses.iter_mut().find(|beat| beat.conn == conn) else { return };
        let mut reports = Vec::new();
        beat.turn(None, base, env, &mut reports);
        if !reports.is_empty() {
            self.inbox.extend(reports.into_iter().map(Told::Pulse));
            base.rouse(env);
        }
    }

    /// The network gave the connection up.
    pub fn unacknowledged(&mut self, conn: ConnId, base: &mut Base, env: &mut Env) {
        if self.data == Some(conn) {
            let error = std::io::Error::from(std::io::ErrorKind::TimedOut);
            self.settle(Err(LinkEnd::Io(error)), base, env);
        }
    }

    /// What came of the intake is passed on, and a connection that is over is ended.
    fn settle(&mut self, served: Result<(), LinkEnd>, base: &mut Base, env: &mut Env) {
        self.pass_on(base, env);
        self.transmit(env);
        if let Err(end) = served {
            self.end_data(end, base, env);
        }
    }

    fn end_data(&mut self, end: LinkEnd, base: &mut Base, env: &mut Env) {
        env.ghost.seen.refusals += u64::from(!matches!(end, LinkEnd::EndOfFile | LinkEnd::Io(_) | LinkEnd::Displaced));
        if self.intake.is_connected() {
            self.intake.end(end);
            self.hurry_disks();
            self.standing = self.keeper.as_ref().map(|keeper| News::Standing(keeper.standing()));
            self.transmit(env);
        }
        if let Some(data) = self.data.take() {
            env.hang_up(data, End::Callee);
        }
        self.pass_on(base, env);
    }

    /// The connection that displaced another is greeted before: what it is told then is older.
    fn hear_standing(&mut self) {
        if let Some(news) = self.standing.take() {
            self.intake.hear(news).expect("no connection ends by that");
        }
    }

    fn hurry_disks(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            keeper.hurry();
        }
    }

    fn transmit(&mut self, env: &mut Env) {
        let Some(data) = self.data else { return };
        let out: Vec<Bytes> = std::iter::from_fn(|| self.intake.poll_transmit()).collect();
        env.send_stream(data, End::Callee, out);
    }

    fn pass_on(&mut self, base: &mut Base, env: &mut Env) {
        while let Some(event) = self.intake.poll_event() {
            match event {
                IntakeEvent::ApplyHollow(pages) => self.jobs.push_back(Job::Hollow(pages)),
                IntakeEvent::Apply(mut committed, point) => {
                    let changes = std::mem::take(&mut committed.disk);
                    if let Some(keeper) = &mut self.keeper {
                        keeper.apply(point, committed.kind, changes);
                    }
                    self.jobs.push_back(Job::Checkpoint(committed));
                }
                IntakeEvent::Compare(question, ask) => match (&mut self.keeper, ask.of) {
                    (Some(keeper), Comparable::Disk(_)) => keeper.compare(question, ask),
                    _ => self.jobs.push_back(Job::Compare(question, ask)),
                },
                IntakeEvent::ApplyHollowDisk(change) => {
                    if let Some(keeper) = &mut self.keeper {
                        keeper.apply_hollow(change);
                    }
                }
                told => {
                    match &told {
                        IntakeEvent::BaseBegun(peer) => {
                            self.owner = Some(peer.incarnation);
                            if let Some(keeper) = &mut self.keeper {
                                keeper.begin_base();
                            }
                            env.ghost.hollow(base.who);
                        }
                        IntakeEvent::BaseCommitted(_, epoch) => self.note_commit(*epoch, true, base, env),
                        IntakeEvent::Committed(epoch) => self.note_commit(*epoch, false, base, env),
                        _ => {}
                    }
                    self.inbox.push_back(Told::Intake(told));
                }
            }
        }
        if !self.inbox.is_empty() {
            base.rouse(env);
        }
        self.rouse_disk(base, env);
        if !self.jobs.is_empty() && !self.applier_waits {
            self.applier_waits = true;
            let delay = env.applier_delay();
            if delay == 0 { self.applier(base, env) } else { env.at(env.now + delay, Event::Applier(base.who)) }
        }
    }

    fn note_commit(&self, epoch: Epoch, is_base: bool, base: &Base, env: &mut Env) {
        let owner = self.owner.and_then(|incarnation| env.life_of(incarnation));
        match owner {
            Some(owner) => env.ghost.committed(base.who, owner, epoch.0, is_base),
            None => env.ghost.broken("G10", format!("{} committed epoch {epoch} of nobody", base.me)),
        }
    }

    /// The applier's thread works off what waits.
    pub fn applier(&mut self, base: &mut Base, env: &mut Env) {
        self.applier_waits = false;
        let (bytes, answers) = self.apply_all();
        let mut served = self.intake.hear(News::Applied(bytes));
        for (question, answer) in answers {
            served = served.and_then(|()| self.intake.hear(News::Compared(question, answer)));
        }
        self.settle(served, base, env);
    }

    /// The disks' thread wakes when it has something to do.
    fn rouse_disk(&mut self, base: &Base, env: &mut Env) {
        let now = base.local(env.now);
        let Some(patience) = self.keeper.as_ref().and_then(|keeper| keeper.patience(now)) else { return };
        let at = base.world_time(now + patience) + env.disk_delay();
        if self.disk_at.is_none_or(|planned| planned > at) {
            self.disk_at = Some(at);
            env.at(at, Event::Disk(base.who));
        }
    }

    /// The disks' thread works.
    pub fn disk(&mut self, base: &mut Base, env: &mut Env) {
        // After a pause of the process it is later than was planned.
        if self.disk_at.is_none_or(|at| at > env.now) {
            return;
        }
        self.disk_at = None;
        let Some(keeper) = &mut self.keeper else { return };
        let mut told = Vec::new();
        for _ in 0..4 {
            keeper.turn(base.local(env.now), &mut told);
            if told.iter().any(|told| matches!(told, Disks::Based(_))) {
                // The image is compared as it is now.
                break;
            }
        }
        let mut served = Ok(());
        for told in told {
            if served.is_err() {
                // The thread of the link looks again after it has ended the connection.
                self.settle(std::mem::replace(&mut served, Ok(())), base, env);
            }
            match told {
                Disks::News(news) => {
                    if let News::DiskFailed { why, lost } = &news {
                        env.note(|| format!("{}: {why}; something is lost: {lost}", base.me));
                    }
                    served = self.intake.hear(news);
                }
                Disks::Based(point) => {
                    // Whoever is connected by now: the base may be that of an owner before.
                    if let Some(image) = env.image(base.who.node) {
                        env.ghost.disk_based(base.who, point.generation.0, point.epoch.0, &image);
                    }
                }
            }
        }
        self.settle(served, base, env);
    }

    fn apply_all(&mut self) -> (usize, Vec<(Question, PiecesWanted)>) {
        let (mut bytes, mut answers) = (0, Vec::new());
        while let Some(job) = self.jobs.pop_front() {
            match job {
                Job::Hollow(batch) => self.memory.apply_hollow(self.machine.ram(), &batch),
                Job::Compare(question, ask) => answers.push((question, compare(self.machine.ram(), &ask))),
                Job::Checkpoint(committed) => bytes += self.memory.apply(self.machine.ram(), committed),
            }
        }
        (bytes, answers)
    }

    /// A frame for the guest arrived on this host's tap, which nobody runs here.
    pub fn frame(&mut self, frame: &[u8]) {
        if self.silent.len() == FRAMES_KEPT {
            self.silent.pop_front();
        }
        self.silent.push_back(frame.to_vec());
    }
}

fn actions_of(orders: impl Iterator<Item = Order>) -> Vec<Action> {
    orders
        .filter_map(|order| match order {
            Order::Do(action) => Some(action),
            Order::AskPeer | Order::EndAsMismatch => None,
        })
        .collect()
}
