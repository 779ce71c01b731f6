//! The side that owns the guest: carries what happens to [`course`] and carries out what it orders. Nothing is decided here.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, never, select};
use failover::decide::{Action, CommandOutcome, FenceReason, GuestEnd, LinkLoss, StateName, Ticket};
use failover::exit::ExitCode;
use failover::failpoint;
use replication_proto::{Epoch, Point, Pulse, Standing};
use vmm::MachineEvent;

use crate::dial::{self, Streams};
use crate::epoch::CheckpointError;
use crate::events;
use crate::host::{Ending, Flow, Host, HostEvent, wire_goodbye};
use crate::link::{Link, LinkEnd, LinkEvent};
use crate::pacer::Turn;
use crate::protect::Session;
use crate::pulse::{self, PulseHandle, PulseReport};
use crate::runner::{Runner, RunnerEvent};
use crate::stream::StreamEvent;

pub mod course;

use course::{Course, Event, Order};

/// What happens to this side.
#[derive(Debug)]
pub enum OwnerEvent {
    /// Both connections to the backup stand, or could not be made.
    Dialled(Session, io::Result<Streams>),
    /// From the data connection.
    Link(Session, LinkEvent),
    /// From the heartbeat connection.
    Pulse(Session, PulseReport),
    /// From the machine's thread.
    Runner(RunnerEvent),
}

/// Longest pause between two attempts to reach a backup. When a base may be copied to it is the decision core's business.
const DIAL_INTERVAL: Duration = Duration::from_millis(200);
/// How often the status is brought up to date when nothing happens.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// Events handled before time is looked at again.
const EVENTS_AT_ONCE: usize = 256;
/// How long a goodbye may take to reach the socket before the process ends.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(1);
/// How often the operator of a comparison hears how far it is.
const VERIFY_PROGRESS: Duration = Duration::from_millis(500);

/// What ended a wait.
enum Woken {
    Event(OwnerEvent),
    Guest(MachineEvent),
    GuestGone,
    Host(HostEvent),
    Nothing,
}

/// The connections of one session.
struct Connections {
    session: Session,
    link: Link,
    thread: JoinHandle<()>,
    pulse: PulseHandle,
    /// What the backup holds of an earlier life, once it accepted.
    standing: Standing,
}

/// The side that runs the guest.
pub struct Owner {
    host: Host,
    runner: Runner,
    course: Course,
    connections: Option<Connections>,
    /// Since when the guest stands still for a switchover.
    stopped_since: Option<Duration>,
    peer: SocketAddr,
    events: Receiver<OwnerEvent>,
    tell: Sender<OwnerEvent>,
    guest: Receiver<MachineEvent>,
    /// Who asked for the comparison that is under way, and when it was last told how far that is.
    verifying: Option<(Ticket, Duration)>,
}

impl Owner {
    /// Takes over a host and its runner. `last_epoch`: the epoch that the machine's state came from, 0 after a boot. `tell` and `events` are the two
    /// ends of one channel, on which the runner reports already.
    pub fn new(
        host: Host,
        runner: Runner,
        guest: Receiver<MachineEvent>,
        last_epoch: Epoch,
        (tell, events): (Sender<OwnerEvent>, Receiver<OwnerEvent>),
    ) -> Self {
        let peer = host.peer_address();
        let course = Course::new(host.config.timers.protect_retry.min(DIAL_INTERVAL), last_epoch);
        Self {
            host,
            runner,
            course,
            connections: None,
            stopped_since: None,
            verifying: None,
            peer,
            events,
            tell,
            guest,
        }
    }

    /// Runs until the decision core says that the process ends.
    pub fn run(mut self, pending: Vec<Action>) -> Ending {
        let orders = self.course.adopt(pending, self.host.clock.now());
        let mut flow = self.carry_out_all(orders);
        loop {
            if let Some(ending) = flow.ending() {
                return self.end(ending);
            }
            flow = self.step();
        }
    }

    /// Waits for one event and handles it.
    fn step(&mut self) -> Flow {
        let deadline = self.course.deadline(&self.host.decider);
        let wait = self.host.falls_asleep(deadline, STATUS_INTERVAL);
        let arbiter = self.host.arbiter_answers().clone();
        let control = self.host.control_requests().clone();
        let woken = select! {
            recv(self.events) -> event => event.map_or(Woken::Nothing, Woken::Event),
            recv(self.guest) -> event => event.map_or(Woken::GuestGone, Woken::Guest),
            recv(arbiter) -> answer => answer.map_or(Woken::Nothing, |done| Woken::Host(HostEvent::Arbiter(done))),
            recv(control) -> request => request.map_or(Woken::Nothing, |asked| Woken::Host(HostEvent::Control(asked))),
            default(wait) => Woken::Nothing,
        };
        self.host.wakes_up();
        let mut flow = self.on_woken(woken);
        // All that has arrived counts before the time that passed: silence is judged last.
        for _ in 0..EVENTS_AT_ONCE {
            match (flow, self.events.try_recv()) {
                (Flow::GoOn, Ok(event)) => flow = self.on_event(event),
                _ => break,
            }
        }
        if flow != Flow::GoOn {
            return flow;
        }
        let flow = self.on_time();
        self.refresh_status();
        flow
    }

    fn on_woken(&mut self, woken: Woken) -> Flow {
        match woken {
            Woken::Event(event) => self.on_event(event),
            Woken::Guest(event) => self.on_guest(&event),
            Woken::GuestGone => {
                self.guest = never();
                Flow::GoOn
            }
            Woken::Host(event) => {
                let input = self.host.input_of(event);
                self.tell_course(Event::Input(input))
            }
            Woken::Nothing => Flow::GoOn,
        }
    }

    fn on_time(&mut self) -> Flow {
        if self.host.terminate_requested() {
            let stop = self.host.stop_command();
            let flow = self.tell_course(Event::Input(stop));
            if flow != Flow::GoOn {
                return flow;
            }
        }
        self.look_at_verify();
        let now = self.host.clock.now();
        let orders = self.course.on_time(self.runner.last_epoch(), &mut self.host.decider, now);
        self.carry_out_all(orders)
    }

    fn on_event(&mut self, event: OwnerEvent) -> Flow {
        match event {
            OwnerEvent::Dialled(session, streams) => self.on_dialled(session, streams),
            OwnerEvent::Link(session, event) => self.on_link(session, event),
            OwnerEvent::Pulse(session, report) => {
                if let PulseReport::Closed(end) = &report
                    && self.course.is_current(session)
                {
                    self.host.note_link(&format!("heartbeat: {end}"));
                }
                self.tell_course(Event::Pulse(session, report))
            }
            OwnerEvent::Runner(event) => self.on_runner(event),
        }
    }

    fn on_dialled(&mut self, session: Session, streams: io::Result<Streams>) -> Flow {
        if !self.course.is_current(session) {
            return Flow::GoOn;
        }
        match streams.and_then(|streams| self.connect(session, streams)) {
            Ok(connections) => {
                self.connections = Some(connections);
                self.tell_course(Event::Connected(session))
            }
            Err(error) => {
                self.host.note_link(&format!("connect {}: {error}", self.peer));
                self.tell_course(Event::NotConnected(session))
            }
        }
    }

    fn connect(&mut self, session: Session, streams: Streams) -> io::Result<Connections> {
        let (tell_link, tell_pulse) = (self.tell.clone(), self.tell.clone());
        let pulse = Pulse::new(self.host.identity(), self.host.config.timers.heartbeat, self.host.clock.now());
        let pulse = pulse::start(
            streams.heartbeat,
            pulse,
            &[],
            Arc::clone(&self.host.voice),
            self.host.clock.clone(),
            move |report| {
                // The owner may have ended.
                tell_pulse.send(OwnerEvent::Pulse(session, report)).ok();
            },
        )?;
        let (link, thread) = Link::start(
            streams.data,
            self.host.sender_config(),
            self.host.link_limits(),
            Arc::clone(&self.host.gate),
            Arc::clone(&self.host.metrics),
            move |event| {
                tell_link.send(OwnerEvent::Link(session, event)).ok();
            },
        )?;
        Ok(Connections { session, link, thread, pulse, standing: Standing::default() })
    }

    fn on_link(&mut self, session: Session, event: LinkEvent) -> Flow {
        if !self.course.is_current(session) {
            return Flow::GoOn;
        }
        match event {
            LinkEvent::Stream(event) => {
                self.note_stream(&event);
                if let (StreamEvent::Accepted(_, standing), Some(connections)) = (&event, &mut self.connections) {
                    connections.standing = standing.clone();
                }
                let covers = matches!(event, StreamEvent::Committed(epoch) if self.host.gate.covers_released(epoch));
                self.tell_course(Event::Stream { session, event, covers })
            }
            LinkEvent::Closed(end) => {
                if !self.course.is_leaving(session) {
                    self.note_end(&end);
                } else if let (LinkEnd::EndOfFile | LinkEnd::Io(_), Some(still)) = (&end, self.stood_still()) {
                    // The last thing that a new owner does before it runs the guest.
                    self.host.desk.note_gap(still);
                }
                let loss = match end {
                    LinkEnd::EndOfFile | LinkEnd::Io(_) => LinkLoss::PeerClosed,
                    LinkEnd::Closed | LinkEnd::Protocol(_) => LinkLoss::Local,
                };
                self.tell_course(Event::Closed(session, loss))
            }
        }
    }

    /// For how long the guest has been standing still for a switchover.
    fn stood_still(&self) -> Option<Duration> {
        self.stopped_since.map(|since| self.host.clock.now().saturating_sub(since))
    }

    fn note_stream(&mut self, event: &StreamEvent) {
        match event {
            StreamEvent::Accepted(..) => self.host.note_link("up"),
            StreamEvent::Refused { refuse, generation: _ } => self.host.note_refusal(refuse),
            StreamEvent::Goodbye(reason) => log::info!("the backup says goodbye: {reason}"),
            StreamEvent::Verified(epoch, found) => self.host.verifier.found(*epoch, found),
            StreamEvent::Durable(epoch) => {
                let generation = self.host.identity().generation;
                self.host.disks.owner.durable(Point { generation, epoch: *epoch }, self.host.clock.now());
            }
            StreamEvent::Committed(_) | StreamEvent::Heard | StreamEvent::Wanted(_) => {}
        }
    }

    fn note_end(&mut self, end: &LinkEnd) {
        self.host.note_link(&end.to_string());
        if let LinkEnd::Protocol(error) = end {
            self.host.desk.protocol_error(error.code());
        }
    }

    fn on_runner(&mut self, event: RunnerEvent) -> Flow {
        match event {
            RunnerEvent::BaseSent(epoch) => {
                log::info!("the base of epoch {epoch} is on its way");
                Flow::GoOn
            }
            RunnerEvent::FinalSent { epoch, since } => {
                self.stopped_since = Some(since);
                failpoint!(SwitchoverFinal);
                self.host.events.write(&events::Event::Stopped { epoch });
                self.tell_course(Event::FinalSent(epoch))
            }
            RunnerEvent::ProtectionFailed(error) => {
                self.host.note_link(&format!("protection ended: {error}"));
                let overloaded = matches!(error, CheckpointError::Overloaded { .. });
                let loss = if overloaded { LinkLoss::Overloaded } else { LinkLoss::Local };
                self.tell_course(Event::ProtectionFailed(loss))
            }
            RunnerEvent::Overload(turn) => {
                let policy = self.host.config.epoch.overload.word();
                self.host.events.write(&match turn {
                    Turn::Began(slow) => events::Event::OverloadBegan { slow: slow.word(), policy },
                    Turn::Ended(lasted) => events::Event::OverloadEnded { seconds: lasted.as_secs_f64() },
                });
                Flow::GoOn
            }
            RunnerEvent::MachineFailed(why) => {
                // It is this host that failed, not the guest: a backup in sync runs on. So nothing is recorded, and this process ends as in a crash.
                log::error!("the machine failed: {why}");
                self.host.events.write(&events::Event::GuestEnded { how: &format!("machine failed: {why}") });
                Flow::Exit(ExitCode::MachineFailed)
            }
        }
    }

    fn on_guest(&mut self, event: &MachineEvent) -> Flow {
        let (end, how) = match event {
            MachineEvent::PoweredOff => (GuestEnd::PoweredOff, "powered_off".to_owned()),
            MachineEvent::Reset => (GuestEnd::Reset, "reset".to_owned()),
            MachineEvent::Crashed { vcpu, reason } => (GuestEnd::Crashed, format!("crashed: vCPU {vcpu}: {reason}")),
        };
        self.host.events.write(&events::Event::GuestEnded { how: &how });
        self.tell_course(Event::GuestEnded(end))
    }

    // ---- carrying out ------------------------------------------------------------------------------------------------------------

    fn tell_course(&mut self, event: Event) -> Flow {
        let now = self.host.clock.now();
        let orders = self.course.on(event, &mut self.host.decider, now);
        self.carry_out_all(orders)
    }

    fn carry_out_all(&mut self, orders: Vec<Order>) -> Flow {
        for order in orders {
            let flow = self.carry_out(order);
            if flow != Flow::GoOn {
                return flow;
            }
        }
        Flow::GoOn
    }

    fn carry_out(&mut self, order: Order) -> Flow {
        match order {
            Order::Do(action) => return self.act(action),
            Order::Dial(session) => return self.dial(session),
            Order::SendBase { session, first } => {
                if let Some(connections) = self.connections.as_ref().filter(|c| c.session == session) {
                    self.runner.protect(connections.link.clone(), first, connections.standing.clone());
                }
            }
            Order::Close(session) => self.close(session),
            Order::Freeze => {
                if let Err(error) = self.runner.freeze() {
                    log::error!("the guest could not be stopped: {error}");
                }
                failpoint!(FenceFrozen);
            }
            Order::Goodbye(session, reason) => {
                if let Some(connections) = self.connections.as_ref().filter(|c| c.session == session) {
                    let text = self.stood_still().map_or(String::new(), |still| still.as_micros().to_string());
                    connections.link.goodbye(wire_goodbye(reason), text);
                }
            }
        }
        Flow::GoOn
    }

    fn act(&mut self, action: Action) -> Flow {
        let Some(action) = self.host.carry_out(action, self.course.committed()) else { return Flow::GoOn };
        match action {
            Action::HoldOutput => {
                failpoint!(GateHold);
                self.host.gate.hold();
            }
            Action::OpenOutput => {
                failpoint!(GateOpen);
                self.host.gate.open();
                failpoint!(GateOpened);
            }
            Action::TrustAcks { backup: _ } => {
                failpoint!(GateTrust);
                self.host.gate.release_on_commit();
                failpoint!(GateTrusted);
            }
            Action::PauseGuest => {
                if let Err(error) = self.runner.pause() {
                    log::error!("the guest could not be stopped: {error}");
                }
            }
            Action::ResumeGuest => {
                self.stopped_since = None;
                if let Err(error) = self.runner.resume() {
                    return self.on_runner(RunnerEvent::MachineFailed(error.to_string()));
                }
            }
            Action::Fence { reason } => self.silence(reason),
            Action::ResumeFenced(permit) => {
                if let Err(error) = self.host.announce_guest() {
                    log::warn!("the guest is announced only once: {error}");
                }
                if let Err(error) = self.runner.run(permit) {
                    return self.on_runner(RunnerEvent::MachineFailed(error.to_string()));
                }
            }
            Action::BeginSwitchover => {
                failpoint!(SwitchoverBegin);
                self.runner.final_checkpoint();
            }
            Action::Verify(ticket) => self.begin_verify(ticket),
            Action::Exit(code) => return Flow::Exit(code),
            Action::Rejoin => return Flow::Rejoin,
            other => log::error!("an action that is not for a side that runs the guest: {other:?}"),
        }
        Flow::GoOn
    }

    fn begin_verify(&mut self, ticket: Ticket) {
        if self.verifying.is_some() {
            let outcome = CommandOutcome::Refused("a comparison is under way: wait for it".into());
            return self.host.desk.reply(ticket, outcome);
        }
        self.host.verifier.start(&self.host.ram);
        self.verifying = Some((ticket, self.host.clock.now()));
    }

    /// Tells the operator of a comparison how far it is, and answers when it is done or cannot be.
    fn look_at_verify(&mut self) {
        let Some((ticket, said)) = self.verifying else { return };
        let now = self.host.clock.now();
        let (findings, done) = self.host.verifier.findings().unwrap_or_default();
        let is_protected = self.host.decider.state() == StateName::Protected;
        if done || !is_protected {
            self.verifying = None;
            self.host.verifier.stop();
            self.host.desk.reply(ticket, if done { findings.outcome() } else { findings.broken_off() });
        } else if now.saturating_sub(said) >= VERIFY_PROGRESS {
            self.verifying = Some((ticket, now));
            self.host.desk.progress(&findings.progress());
        }
    }

    fn silence(&self, reason: FenceReason) {
        log::warn!("fenced: {reason:?}; the guest is paused and its memory kept");
        failpoint!(FenceBegin);
        self.host.gate.silence();
    }

    fn dial(&mut self, session: Session) -> Flow {
        let tell = self.tell.clone();
        let dialled = dial::dial(self.peer, move |streams| {
            tell.send(OwnerEvent::Dialled(session, streams)).ok();
        });
        match dialled {
            Ok(()) => Flow::GoOn,
            Err(error) => {
                log::warn!("no thread to connect with: {error}");
                self.tell_course(Event::NotConnected(session))
            }
        }
    }

    /// Ends the connections of a session. When this returns, the runner seals no epoch any more and every un-acknowledged dirty set has
    /// gone back to the ledger.
    fn close(&mut self, session: Session) {
        let Some(connections) = self.connections.take_if(|c| c.session == session) else { return };
        connections.link.close();
        connections.pulse.close();
        match self.runner.unprotect() {
            Ok(last) => self.course.epoch_used(last),
            Err(error) => log::error!("{error}"),
        }
        connections.thread.join().ok();
    }

    fn refresh_status(&mut self) {
        let committed = self.course.committed();
        let ended = self.runner.last_epoch().max(committed);
        self.host.refresh_status(committed, ended, self.connections.is_some());
    }

    /// Ends in order: what was said on the link is on its way, the machine's threads are gone.
    fn end(mut self, ending: Ending) -> Ending {
        self.refresh_status();
        self.host.desk.ending();
        if let Some(connections) = self.connections.take() {
            if self.course.is_leaving(connections.session) {
                self.await_last_words(connections.session);
            }
            connections.link.close();
            connections.pulse.close();
        }
        failpoint!(Exit);
        self.runner.shut_down();
        ending
    }

    /// Waits until the link has sent its goodbye and closed.
    fn await_last_words(&self, session: Session) {
        let deadline = self.host.clock.instant(self.host.clock.now() + GOODBYE_PATIENCE);
        while let Ok(event) = self.events.recv_deadline(deadline) {
            if matches!(event, OwnerEvent::Link(of, LinkEvent::Closed(_)) if of == session) {
                return;
            }
        }
    }
}
