//! The side that waits: carries what happens to the decision core and carries out what it answers, until this side runs the guest.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use crossbeam::channel::{Receiver, Sender, select, unbounded};
use failover::RunPermit;
use failover::arbiter::NodeRef;
use failover::decide::{Action, Input, LinkLoss};
use failover::exit::ExitCode;
use primary::dial::dial_heartbeat;
use primary::events::Event;
use primary::host::{Flow, Host, HostEvent, core_goodbye};
use primary::owner::{Owner, OwnerEvent};
use primary::pulse::{self, HeartbeatStream, PulseHandle, PulseReport};
use primary::runner::Runner;
use primary::setup::SetupError;
use replication_proto::{Epoch, Identity, LinkError, Pulse, ReceiverConfig, ReceiverLimits, RefuseCode};
use vmm::FramePort;

use crate::activate::{Activated, Waiting, activate};
use crate::commit::Commits;
use crate::inbox::Inbox;
use crate::link::{LinkBuilder, LinkEnd, LinkEvent, LinkHandle};
use crate::silent::SilentTaps;
use crate::standby::Standby;

/// How often the status is brought up to date when nothing happens.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// Events handled before time is looked at again.
const EVENTS_AT_ONCE: usize = 256;
/// Heartbeat connections kept at one time; of more, the oldest is closed.
const PULSES_MAX: usize = 4;
/// Most bytes of one checkpoint's sections: machine state and held frames.
const SECTION_BYTES_MAX: u64 = 16 << 20;
/// How long after a failed attempt to ask the peer the next one is made.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// What happens to this side.
#[derive(Debug)]
pub enum WaitEvent {
    /// From the replication link.
    Link(LinkEvent),
    /// From a heartbeat connection.
    Pulse(PulseReport),
    /// A heartbeat connection that this side opened stands, or could not be made.
    Asked(std::io::Result<HeartbeatStream>),
}

/// The side that waits.
pub struct Waiter {
    host: Host,
    waiting: Waiting,
    link: LinkHandle,
    pulses: Vec<PulseHandle>,
    owner: Option<NodeRef>,
    committed: Epoch,
    /// When to ask the peer which process runs there; only while the decision core wants to know.
    ask_at: Option<Duration>,
    /// A primary of this VM has another machine, and this side holds nothing that would be lost with it.
    mismatch: bool,
    events: Receiver<WaitEvent>,
    tell: Sender<WaitEvent>,
}

impl Waiter {
    /// Starts to listen, on the replication address and on the silent taps.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn start(host: Host, standby: Standby, ports: Vec<Arc<dyn FramePort>>) -> Result<Self, SetupError> {
        let failed = |what| move |source| SetupError::Host { what, source };
        let address = host.config.node(host.node()).expect("this node").replication;
        let link = LinkBuilder::bind(address).map_err(|source| SetupError::Listen { address, source })?;
        let applied = link.handle();
        let (applier, applier_thread) =
            standby.start_applier(move |bytes| applied.applied(bytes)).map_err(failed("the applier's thread"))?;
        let (tell, events) = unbounded();
        let limit = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let limits = &host.config.limits;
        let told = tell.clone();
        let thread = link
            .start(
                receiver_config(&host),
                Inbox::new(limit(limits.inbox.saturating_add(SECTION_BYTES_MAX))),
                Commits::new(limit(limits.backlog)),
                applier,
                host.clock,
                move |event| {
                    // The owner of this channel may have ended.
                    told.send(WaitEvent::Link(event)).ok();
                },
            )
            .map_err(failed("the link's thread"))?;
        let taps = SilentTaps::listen(ports).map_err(failed("the silent taps"))?;
        let link = thread.handle();
        let waiting = Waiting { link: thread, applier: applier_thread, standby, taps };
        Ok(Self {
            host,
            waiting,
            link,
            pulses: Vec::new(),
            owner: None,
            committed: Epoch(0),
            ask_at: None,
            mismatch: false,
            events,
            tell,
        })
    }

    /// Waits until this side runs the guest, and then runs it; until the decision core says that the process ends.
    pub fn run(mut self) -> ExitCode {
        let mut actions = self.host.decide(Input::Started);
        loop {
            let mut rest = actions.into_iter();
            while let Some(action) = rest.next() {
                let Some(action) = self.host.carry_out(action, self.committed) else { continue };
                match action {
                    Action::Activate(permit) => return self.become_owner(permit, rest.collect()),
                    Action::BootGuest(permit) => return self.boot(permit, rest.collect()),
                    other => {
                        if let Flow::Exit(code) = self.carry_out(other) {
                            return code;
                        }
                    }
                }
            }
            if self.mismatch {
                return ExitCode::MachineMismatch;
            }
            actions = self.step();
        }
    }

    /// Waits for one event and hands it to the decision core.
    fn step(&mut self) -> Vec<Action> {
        let wait = self.host.falls_asleep(self.ask_at, STATUS_INTERVAL);
        let arbiter = self.host.arbiter_answers().clone();
        let control = self.host.control_requests().clone();
        let mut inputs = select! {
            recv(self.events) -> event => event.map(|event| self.inputs_of(event)).unwrap_or_default(),
            recv(arbiter) -> answer => {
                answer.map(|done| vec![self.host.input_of(HostEvent::Arbiter(done))]).unwrap_or_default()
            }
            recv(control) -> request => {
                request.map(|request| vec![self.host.input_of(HostEvent::Control(request))]).unwrap_or_default()
            }
            default(wait) => Vec::new(),
        };
        self.host.wakes_up();
        // All that has arrived counts before the time that passed: silence is judged last.
        for _ in 0..EVENTS_AT_ONCE {
            match self.events.try_recv() {
                Ok(event) => inputs.extend(self.inputs_of(event)),
                Err(_) => break,
            }
        }
        let mut actions: Vec<Action> = inputs.into_iter().flat_map(|input| self.host.decide(input)).collect();
        if self.host.terminate_requested() {
            let stop = self.host.stop_command();
            actions.extend(self.host.decide(stop));
        }
        actions.extend(self.host.decide(Input::Tick));
        self.ask_if_due();
        self.link.raise_generation(self.host.identity().generation);
        self.host.refresh_status(self.committed, self.committed, self.owner.is_some());
        actions
    }

    fn inputs_of(&mut self, event: WaitEvent) -> Vec<Input> {
        match event {
            WaitEvent::Link(event) => self.link_inputs(event),
            WaitEvent::Pulse(PulseReport::Heard { peer, body }) => {
                vec![Input::HigherGenerationSeen(peer.generation), self.host.heard(&peer, Some(&body))]
            }
            WaitEvent::Pulse(PulseReport::Generation(generation)) => vec![Input::HigherGenerationSeen(generation)],
            WaitEvent::Pulse(PulseReport::Goodbye(reason)) => {
                let goodbye = |peer| Input::PeerGoodbye { peer, reason: core_goodbye(reason) };
                self.owner.clone().map(goodbye).into_iter().collect()
            }
            WaitEvent::Pulse(PulseReport::Closed(end)) => {
                log::info!("heartbeat connection: {end}");
                Vec::new()
            }
            WaitEvent::Asked(Ok(stream)) => {
                self.take_pulse(stream, &Bytes::new());
                Vec::new()
            }
            WaitEvent::Asked(Err(error)) => {
                log::debug!("the peer does not answer: {error}");
                self.ask_at = Some(self.host.clock.now() + ASK_INTERVAL);
                Vec::new()
            }
        }
    }

    fn link_inputs(&mut self, event: LinkEvent) -> Vec<Input> {
        let node_of = |peer: &Identity| NodeRef { node: peer.node.clone(), incarnation: peer.incarnation };
        match event {
            LinkEvent::Opened(peer) => {
                self.host.note_link("up");
                self.owner = Some(node_of(&peer));
                self.ask_at = None;
                vec![Input::HigherGenerationSeen(peer.generation), self.host.heard(&peer, None)]
            }
            LinkEvent::BaseBegun(peer) => vec![Input::BaseBegun { owner: node_of(&peer) }],
            LinkEvent::BaseCommitted(peer, epoch) => {
                self.committed = epoch;
                vec![Input::BaseCommitted { peer: node_of(&peer), epoch }]
            }
            LinkEvent::Committed(epoch) => {
                self.committed = epoch;
                vec![Input::Committed { epoch }]
            }
            LinkEvent::Heard(peer) => vec![self.host.heard(&peer, None)],
            LinkEvent::Goodbye(peer, reason) => {
                vec![Input::PeerGoodbye { peer: node_of(&peer), reason: core_goodbye(reason) }]
            }
            LinkEvent::Closed(end) => {
                self.host.note_link(&end.to_string());
                self.owner = None;
                self.note_end(&end);
                let loss = match end {
                    LinkEnd::EndOfFile | LinkEnd::Io(_) => LinkLoss::PeerClosed,
                    LinkEnd::Protocol(_) | LinkEnd::Commit(_) | LinkEnd::Inbox(_) | LinkEnd::Displaced => {
                        LinkLoss::Local
                    }
                };
                vec![Input::LinkLost(loss)]
            }
            LinkEvent::Heartbeat(stream, read) => {
                self.take_pulse(stream, &read);
                Vec::new()
            }
        }
    }

    /// A hollow standby whose machine is another one than the primary's will never be of use: it ends and says so, once.
    fn note_end(&mut self, end: &LinkEnd) {
        let LinkEnd::Protocol(error) = end else { return };
        self.host.desk.protocol_error(error.code());
        if let LinkError::Incompatible(incompatible) = error
            && matches!(
                incompatible.code,
                RefuseCode::Ram | RefuseCode::Facts | RefuseCode::Version | RefuseCode::Features
            )
            && self.committed == Epoch(0)
        {
            log::error!("this machine is not the primary's: {incompatible}");
            self.mismatch = true;
        }
    }

    fn take_pulse(&mut self, stream: HeartbeatStream, read: &Bytes) {
        let pulse = Pulse::new(self.host.identity(), self.host.config.timers.heartbeat, self.host.clock.now());
        let tell = self.tell.clone();
        let voice = Arc::clone(&self.host.voice);
        let started = pulse::start(stream, pulse, read, voice, self.host.clock, move |report| {
            tell.send(WaitEvent::Pulse(report)).ok();
        });
        match started {
            Ok(handle) => {
                if self.pulses.len() == PULSES_MAX {
                    self.pulses.remove(0).close();
                }
                self.pulses.push(handle);
            }
            Err(error) => log::warn!("a heartbeat connection could not be taken on: {error}"),
        }
    }

    fn ask_if_due(&mut self) {
        let now = self.host.clock.now();
        if self.ask_at.take_if(|at| now >= *at).is_some() {
            let tell = self.tell.clone();
            let asked = dial_heartbeat(self.host.peer_address(), move |stream| {
                tell.send(WaitEvent::Asked(stream)).ok();
            });
            if let Err(error) = asked {
                log::warn!("no thread to ask the peer with: {error}");
                self.ask_at = Some(now + ASK_INTERVAL);
            }
        }
    }

    fn carry_out(&mut self, action: Action) -> Flow {
        match action {
            Action::OfferAsBackup => log::info!("listening for the owner"),
            Action::AskPeer => self.ask_at = Some(self.host.clock.now()),
            // Nothing of a standby is ever let out.
            Action::HoldOutput | Action::DropBackup | Action::SayGoodbye(_) => {}
            Action::Exit(code) => return Flow::Exit(code),
            other => log::error!("an action that is not for a side that waits: {other:?}"),
        }
        Flow::GoOn
    }

    // ---- the end of the wait -----------------------------------------------------------------------------------------------------

    fn become_owner(self, permit: RunPermit, pending: Vec<Action>) -> ExitCode {
        let Self { host, waiting, pulses, .. } = self;
        pulses.iter().for_each(PulseHandle::close);
        let guest = waiting.standby.machine().events();
        let (tell, events) = unbounded();
        let told = tell.clone();
        let activated = activate(permit, waiting, &host, move |event| {
            told.send(OwnerEvent::Runner(event)).ok();
        });
        match activated {
            Ok(Activated { runner, epoch, resent, took }) => {
                let activate_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                host.events.write(&Event::Activated { activate_us, epoch, resent });
                Owner::new(host, runner, guest, epoch, (tell, events)).run(pending)
            }
            Err(error) => {
                log::error!("the standby could not be activated: {:#}", anyhow::Error::from(error));
                ExitCode::Failure
            }
        }
    }

    /// Both hosts lost the guest, and the record lets this one boot it anew.
    fn boot(self, permit: RunPermit, pending: Vec<Action>) -> ExitCode {
        let Self { host, waiting, pulses, .. } = self;
        pulses.iter().for_each(PulseHandle::close);
        let Waiting { link, applier, standby, taps } = waiting;
        link.close();
        applier.finish();
        taps.stop();
        let mut machine = standby.into_machine();
        if let Err(error) = machine.load() {
            log::error!("{error}");
            return ExitCode::KernelUnusable;
        }
        let guest = machine.events();
        let (tell, events) = unbounded();
        let told = tell.clone();
        let parts = host.epoch_parts();
        let runner = Runner::start(machine, parts, Epoch(0), host.config.epoch.interval, host.clock, move |event| {
            told.send(OwnerEvent::Runner(event)).ok();
        });
        let ran = runner.map_err(anyhow::Error::from).and_then(|runner| {
            runner.run(permit)?;
            Ok(runner)
        });
        match ran {
            Ok(runner) => Owner::new(host, runner, guest, Epoch(0), (tell, events)).run(pending),
            Err(error) => {
                log::error!("the guest did not start: {error:#}");
                ExitCode::Failure
            }
        }
    }
}

fn receiver_config(host: &Host) -> ReceiverConfig {
    let page = u64::try_from(vmm::PAGE_SIZE).unwrap_or(4096);
    ReceiverConfig {
        identity: host.identity(),
        ram: host.ram.clone(),
        facts: host.facts.clone(),
        limits: ReceiverLimits {
            max_epoch_pages: host.config.limits.inbox / page,
            max_epoch_section_bytes: SECTION_BYTES_MAX,
        },
    }
}
