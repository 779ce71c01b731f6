//! The side that owns the guest: carries what happens to the decision core and to the session's state machine, and carries out what
//! they answer. Nothing is decided here.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, never, select};
use failover::arbiter::NodeRef;
use failover::decide::{Action, FenceReason, GoodbyeReason, GuestEnd, Input, LinkLoss, StateName};
use failover::exit::ExitCode;
use replication_proto::Pulse;
use replication_proto::{Epoch, Identity};
use vmm::MachineEvent;

use crate::dial::{self, Streams};
use crate::events;
use crate::host::{Flow, Host, HostEvent, wire_goodbye};
use crate::link::{Link, LinkEnd, LinkEvent};
use crate::protect::{Protect, Session, Step};
use crate::pulse::{self, PulseHandle, PulseReport};
use crate::runner::{Runner, RunnerEvent};

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

/// How often the status is brought up to date when nothing happens.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// Events handled before time is looked at again.
const EVENTS_AT_ONCE: usize = 256;
/// Longest time without a commit while epochs wait for one.
const STALL_LIMIT: Duration = Duration::from_secs(5);
/// How long a goodbye may take to reach the socket before the process ends.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(1);

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
    backup: Option<NodeRef>,
    /// A goodbye is on its way; the link closes by itself after it.
    leaving: bool,
}

/// The side that runs the guest.
pub struct Owner {
    host: Host,
    runner: Runner,
    protect: Protect,
    connections: Option<Connections>,
    peer: SocketAddr,
    events: Receiver<OwnerEvent>,
    tell: Sender<OwnerEvent>,
    guest: Receiver<MachineEvent>,
    /// The last epoch that the backup committed.
    committed: Epoch,
    /// When it did, or when there was nothing to commit.
    progress_at: Duration,
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
        let protect = Protect::new(host.config.timers.protect_retry, last_epoch);
        Self {
            host,
            runner,
            protect,
            connections: None,
            peer,
            events,
            tell,
            guest,
            committed: last_epoch,
            progress_at: Duration::ZERO,
        }
    }

    /// Runs until the decision core says that the process ends.
    pub fn run(mut self, pending: Vec<Action>) -> ExitCode {
        let mut flow = self.carry_out_all(pending);
        loop {
            if let Flow::Exit(code) = flow {
                return self.end(code);
            }
            flow = self.step();
        }
    }

    /// Waits for one event and handles it.
    fn step(&mut self) -> Flow {
        let wait = self.host.falls_asleep(self.protect.deadline(), STATUS_INTERVAL);
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
        if let Flow::Exit(_) = flow {
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
                self.decide(input)
            }
            Woken::Nothing => Flow::GoOn,
        }
    }

    fn on_time(&mut self) -> Flow {
        // Only a side that runs the guest, and means to, looks for a backup.
        let state = self.host.core.state_name();
        if state.runs()
            && state != StateName::SwitchingOver
            && let Some(step) = self.protect.tick(self.host.clock.now())
            && let Flow::Exit(code) = self.take(step)
        {
            return Flow::Exit(code);
        }
        if let Flow::Exit(code) = self.watch_progress() {
            return Flow::Exit(code);
        }
        if self.host.terminate_requested() {
            let stop = self.host.stop_command();
            return self.decide(stop);
        }
        self.decide(Input::Tick)
    }

    /// A backup that lives and commits nothing would hold the guest's output for ever: heartbeats say nothing about the stream.
    fn watch_progress(&mut self) -> Flow {
        let now = self.host.clock.now();
        if !self.protect.base_committed() || self.runner.last_epoch() <= self.committed {
            self.progress_at = now;
            return Flow::GoOn;
        }
        match self.protect.session() {
            Some(session) if now.saturating_sub(self.progress_at) >= STALL_LIMIT => {
                self.host.note_link("the backup has committed nothing for too long");
                self.lost(session, LinkLoss::Local)
            }
            _ => Flow::GoOn,
        }
    }

    fn on_event(&mut self, event: OwnerEvent) -> Flow {
        match event {
            OwnerEvent::Dialled(session, streams) => self.on_dialled(session, streams),
            OwnerEvent::Link(session, event) => self.on_link(session, event),
            OwnerEvent::Pulse(session, report) => self.on_pulse(session, report),
            OwnerEvent::Runner(event) => self.on_runner(event),
        }
    }

    fn on_dialled(&mut self, session: Session, streams: io::Result<Streams>) -> Flow {
        if self.protect.session() != Some(session) {
            return Flow::GoOn;
        }
        match streams.and_then(|streams| self.connect(session, streams)) {
            Ok(connections) => {
                self.connections = Some(connections);
                Flow::GoOn
            }
            Err(error) => {
                self.host.note_link(&format!("connect {}: {error}", self.peer));
                self.lost(session, LinkLoss::Local)
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
            self.host.clock,
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
        Ok(Connections { session, link, thread, pulse, backup: None, leaving: false })
    }

    fn on_link(&mut self, session: Session, event: LinkEvent) -> Flow {
        if self.protect.session() != Some(session) {
            return Flow::GoOn;
        }
        match event {
            LinkEvent::Accepted(peer) => self.on_accepted(session, &peer),
            LinkEvent::Refused { refuse, generation } => {
                self.host.note_refusal(&refuse);
                match self.decide(Input::HigherGenerationSeen(generation)) {
                    Flow::GoOn => self.lost(session, LinkLoss::Local),
                    exit @ Flow::Exit(_) => exit,
                }
            }
            LinkEvent::Committed(epoch) => {
                self.committed = self.committed.max(epoch);
                self.progress_at = self.host.clock.now();
                let covers = self.host.gate.covers_released(epoch);
                let steps = self.protect.committed(session, epoch, covers);
                self.take_all(steps)
            }
            LinkEvent::Heard => self.heard(session),
            LinkEvent::Goodbye(reason) => {
                log::info!("the backup says goodbye: {reason}");
                match self.connections.as_ref().and_then(|c| c.backup.clone()) {
                    Some(peer) => self.decide(Input::PeerGoodbye { peer, reason: GoodbyeReason::Leaving }),
                    None => Flow::GoOn,
                }
            }
            // After a goodbye the link closes by itself, and the decision core waits for what the backup makes of it.
            LinkEvent::Closed(_) if self.connections.as_ref().is_some_and(|c| c.session == session && c.leaving) => {
                match self.protect.drop_backup(self.host.clock.now()) {
                    Some(step) => self.take(step),
                    None => Flow::GoOn,
                }
            }
            LinkEvent::Closed(end) => {
                self.host.note_link(&end.to_string());
                if let LinkEnd::Protocol(error) = &end {
                    self.host.desk.protocol_error(error.code());
                }
                let loss = match end {
                    LinkEnd::EndOfFile | LinkEnd::Io(_) => LinkLoss::PeerClosed,
                    LinkEnd::Closed | LinkEnd::Protocol(_) => LinkLoss::Local,
                };
                self.lost(session, loss)
            }
        }
    }

    fn on_accepted(&mut self, session: Session, peer: &Identity) -> Flow {
        let backup = NodeRef { node: peer.node.clone(), incarnation: peer.incarnation };
        if let Some(connections) = &mut self.connections {
            connections.backup = Some(backup.clone());
        }
        self.host.note_link("up");
        match self.protect.accepted(session, backup) {
            Some(step) => self.take(step),
            None => Flow::GoOn,
        }
    }

    fn on_pulse(&mut self, session: Session, report: PulseReport) -> Flow {
        if self.protect.session() != Some(session) {
            return Flow::GoOn;
        }
        match report {
            PulseReport::Heard { peer, body } => {
                if let Flow::Exit(code) = self.decide(Input::HigherGenerationSeen(peer.generation)) {
                    return Flow::Exit(code);
                }
                let input = self.host.heard(&peer, Some(&body));
                self.decide(input)
            }
            PulseReport::Generation(generation) => self.decide(Input::HigherGenerationSeen(generation)),
            PulseReport::Goodbye(_) => Flow::GoOn,
            PulseReport::Closed(end) => {
                self.host.note_link(&format!("heartbeat: {end}"));
                self.lost(session, LinkLoss::PeerClosed)
            }
        }
    }

    fn heard(&mut self, session: Session) -> Flow {
        let backup = self.connections.as_ref().filter(|c| c.session == session).and_then(|c| c.backup.clone());
        match backup {
            Some(peer) => self.decide(Input::PeerHeard { peer, report: None }),
            None => Flow::GoOn,
        }
    }

    fn on_runner(&mut self, event: RunnerEvent) -> Flow {
        match event {
            RunnerEvent::BaseSent(epoch) => {
                log::info!("the base of epoch {epoch} is on its way");
                Flow::GoOn
            }
            RunnerEvent::FinalSent(epoch) => match self.protect.final_sent(epoch) {
                Some(step) => self.take(step),
                None => Flow::GoOn,
            },
            RunnerEvent::ProtectionFailed(error) => {
                self.host.note_link(&format!("protection ended: {error}"));
                match self.protect.session() {
                    Some(session) => self.lost(session, LinkLoss::Local),
                    None => Flow::GoOn,
                }
            }
            RunnerEvent::MachineFailed(why) => {
                log::error!("the machine failed: {why}");
                self.decide(Input::GuestEnded(GuestEnd::Crashed))
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
        self.decide(Input::GuestEnded(end))
    }

    fn lost(&mut self, session: Session, loss: LinkLoss) -> Flow {
        let steps = self.protect.lost(session, loss, self.host.clock.now());
        self.take_all(steps)
    }

    // ---- carrying out ------------------------------------------------------------------------------------------------------------

    fn take_all(&mut self, steps: Vec<Step>) -> Flow {
        for step in steps {
            if let Flow::Exit(code) = self.take(step) {
                return Flow::Exit(code);
            }
        }
        Flow::GoOn
    }

    fn take(&mut self, step: Step) -> Flow {
        match step {
            Step::Dial(session) => {
                let tell = self.tell.clone();
                let dialled = dial::dial(self.peer, move |streams| {
                    tell.send(OwnerEvent::Dialled(session, streams)).ok();
                });
                match dialled {
                    Ok(()) => Flow::GoOn,
                    Err(error) => {
                        log::warn!("no thread to connect with: {error}");
                        self.lost(session, LinkLoss::Local)
                    }
                }
            }
            Step::SendBase { session, first } => {
                if let Some(connections) = self.connections.as_ref().filter(|c| c.session == session) {
                    self.runner.protect(connections.link.clone(), first);
                }
                Flow::GoOn
            }
            Step::Close(session) => {
                self.close(session);
                Flow::GoOn
            }
            Step::Decide(input) => self.decide(input),
        }
    }

    /// Ends the connections of a session. When this returns, the runner seals no epoch any more and every un-acknowledged dirty set has
    /// gone back to the ledger.
    fn close(&mut self, session: Session) {
        let Some(connections) = self.connections.take_if(|c| c.session == session) else { return };
        connections.link.close();
        connections.pulse.close();
        match self.runner.unprotect() {
            Ok(last) => self.protect.epoch_used(last),
            Err(error) => log::error!("{error}"),
        }
        connections.thread.join().ok();
    }

    fn decide(&mut self, input: Input) -> Flow {
        let actions = self.host.decide(input);
        self.carry_out_all(actions)
    }

    fn carry_out_all(&mut self, actions: Vec<Action>) -> Flow {
        for action in actions {
            let Some(action) = self.host.carry_out(action, self.committed) else { continue };
            if let Flow::Exit(code) = self.carry_out(action) {
                return Flow::Exit(code);
            }
        }
        Flow::GoOn
    }

    fn carry_out(&mut self, action: Action) -> Flow {
        match action {
            Action::StartBase { backup } => match self.protect.start_base(&backup) {
                Some(step) => return self.take(step),
                None => log::warn!("the backup left before its base could begin"),
            },
            Action::DropBackup => {
                if let Some(step) = self.protect.drop_backup(self.host.clock.now()) {
                    return self.take(step);
                }
            }
            Action::HoldOutput => {
                self.host.gate.hold();
                self.protect.outputs_held();
            }
            Action::OpenOutput => self.host.gate.open(),
            Action::TrustAcks { backup: _ } => self.host.gate.release_on_commit(),
            Action::PauseGuest => {
                if let Err(error) = self.runner.pause() {
                    log::error!("the guest could not be stopped: {error}");
                }
            }
            Action::ResumeGuest => {
                if let Err(error) = self.runner.resume() {
                    return self.on_runner(RunnerEvent::MachineFailed(error.to_string()));
                }
            }
            Action::Fence { reason } => self.fence(reason),
            Action::ResumeFenced(permit) => {
                if let Err(error) = self.runner.run(permit) {
                    return self.on_runner(RunnerEvent::MachineFailed(error.to_string()));
                }
            }
            Action::BeginSwitchover => self.runner.final_checkpoint(),
            Action::SayGoodbye(reason) => self.say_goodbye(reason),
            Action::Exit(code) => return Flow::Exit(code),
            other => log::error!("an action that is not for a side that runs the guest: {other:?}"),
        }
        Flow::GoOn
    }

    fn fence(&mut self, reason: FenceReason) {
        log::warn!("fenced: {reason:?}; the guest is paused and its memory kept");
        self.host.gate.silence();
        if let Some(session) = self.protect.session() {
            self.protect.drop_backup(self.host.clock.now());
            self.close(session);
        }
        if let Err(error) = self.runner.freeze() {
            log::error!("the guest could not be stopped: {error}");
        }
    }

    fn say_goodbye(&mut self, reason: GoodbyeReason) {
        if let Some(connections) = &mut self.connections {
            connections.link.goodbye(wire_goodbye(reason));
            connections.leaving = true;
        }
    }

    fn refresh_status(&mut self) {
        let ended = self.runner.last_epoch().max(self.committed);
        self.host.refresh_status(self.committed, ended, self.connections.is_some());
    }

    /// Ends in order: what was said on the link is on its way, the machine's threads are gone.
    fn end(mut self, code: ExitCode) -> ExitCode {
        self.refresh_status();
        self.host.desk.ending();
        if let Some(connections) = self.connections.take() {
            if connections.leaving {
                self.await_last_words(connections.session);
            }
            connections.link.close();
            connections.pulse.close();
        }
        self.runner.shut_down();
        code
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
