//! The side that waits: carries what happens to [`course`] and carries out what it orders, until this side runs the guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::channel::{Receiver, Sender, select, unbounded};
use failover::RunPermit;
use failover::decide::{Action, Input, StateName};
use failover::exit::ExitCode;
use primary::dial::dial_heartbeat;
use primary::disk::set::Waiting as WaitingDisks;
use primary::events::Event as FileEvent;
use primary::host::{Ending, Host, HostEvent};
use primary::owner::{Owner, OwnerEvent};
use primary::pulse::{self, HeartbeatStream, PulseHandle, PulseReport};
use primary::runner::Runner;
use primary::setup::SetupError;
use primary::silent::SilentTaps;
use replication_proto::{DiskStanding, Epoch, Pulse, ReceiverConfig, ReceiverLimits, Standing};
use vmm::FramePort;

use crate::activate::{Activated, Waiting, activate};
use crate::commit::Commits;
use crate::disk::DiskKeeper;
use crate::inbox::Inbox;
use crate::intake::{Intake, IntakeEvent, LinkEnd, News};
use crate::link::{LinkBuilder, LinkEvent, LinkHandle};
use crate::standby::{AppliedNews, Standby};

pub mod course;

use course::{Course, Event, Order};

/// How often the status is brought up to date when nothing happens.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);
/// Events handled before time is looked at again.
const EVENTS_AT_ONCE: usize = 256;
/// Heartbeat connections kept at one time; of more, the oldest is closed.
const PULSES_MAX: usize = 4;
/// Most bytes of one checkpoint's sections: machine state and held frames.
const SECTION_BYTES_MAX: u64 = 16 << 20;

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

/// How the wait ends.
enum End {
    Exit(ExitCode),
    /// Run the committed state, then carry out the rest.
    Activate(RunPermit, Vec<Action>),
    /// Boot the guest anew, then carry out the rest.
    Boot(RunPermit, Vec<Action>),
}

/// What is left of a list of orders, for the owner that this side becomes.
fn actions_of(orders: impl Iterator<Item = Order>) -> Vec<Action> {
    orders
        .filter_map(|order| match order {
            Order::Do(action) => Some(action),
            Order::AskPeer | Order::EndAsMismatch => None,
        })
        .collect()
}

/// The side that waits.
pub struct Waiter {
    host: Host,
    waiting: Waiting,
    link: LinkHandle,
    pulses: Vec<PulseHandle>,
    course: Course,
    /// When the owner said that it hands the guest over, and for how long that had been standing still by then.
    still: Option<(Instant, Duration)>,
    /// The right to run is being asked for.
    contends: bool,
    events: Receiver<WaitEvent>,
    tell: Sender<WaitEvent>,
}

impl Waiter {
    /// Starts to listen, on the replication address and on the silent taps.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn start(
        host: Host,
        standby: Standby,
        ports: Vec<Arc<dyn FramePort>>,
        disks: Option<WaitingDisks>,
    ) -> Result<Self, SetupError> {
        let failed = |what| move |source| SetupError::Host { what, source };
        let address = host.config.node(host.node()).expect("this node").replication;
        let link = LinkBuilder::bind(address).map_err(|source| SetupError::Listen { address, source })?;
        let news = link.handle();
        let (applier, applier_thread) = standby
            .start_applier(move |applied| {
                news.tell(match applied {
                    AppliedNews::Bytes(bytes) => News::Applied(bytes),
                    AppliedNews::Compared(question, answer) => News::Compared(question, answer),
                    AppliedNews::Verified(epoch, found) => News::Verified(epoch, found),
                });
            })
            .map_err(failed("the applier's thread"))?;
        let disks =
            DiskKeeper::start(disks, host.config.limits.journal, link.handle()).map_err(failed("the disks' thread"))?;
        let (tell, events) = unbounded();
        let limit = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let limits = &host.config.limits;
        let told = tell.clone();
        let thread = link
            .start(
                Intake::new(
                    receiver_config(&host, disks.standing()),
                    Inbox::new(limit(limits.inbox.saturating_add(SECTION_BYTES_MAX))),
                    Commits::new(limit(limits.backlog)),
                ),
                (applier, disks.clone()),
                host.clock.clone(),
                move |event| {
                    // The owner of this channel may have ended.
                    told.send(WaitEvent::Link(event)).ok();
                },
            )
            .map_err(failed("the link's thread"))?;
        let taps = SilentTaps::listen(ports).map_err(failed("the silent taps"))?;
        let link = thread.handle();
        let waiting = Waiting { link: thread, applier: applier_thread, disks, standby, taps };
        Ok(Self {
            host,
            waiting,
            link,
            pulses: Vec::new(),
            course: Course::default(),
            still: None,
            contends: false,
            events,
            tell,
        })
    }

    /// Waits until this side runs the guest, and then runs it; until the decision core says that the process ends.
    pub fn run(mut self) -> Ending {
        let mut end = self.tell_course(Event::Input(Input::Started));
        loop {
            end = match end {
                Some(End::Exit(code)) => return Ending::Exit(code),
                Some(End::Activate(permit, rest)) => return self.become_owner(permit, rest),
                Some(End::Boot(permit, rest)) => return self.boot(permit, rest),
                None => self.step(),
            };
        }
    }

    /// Waits for one event and handles it, and all that has arrived with it.
    fn step(&mut self) -> Option<End> {
        let wait = self.host.falls_asleep(self.course.deadline(), STATUS_INTERVAL);
        let arbiter = self.host.arbiter_answers().clone();
        let control = self.host.control_requests().clone();
        let mut end = select! {
            recv(self.events) -> event => {
                self.host.wakes_up();
                event.ok().and_then(|event| self.on_event(event))
            }
            recv(arbiter) -> answer => {
                self.host.wakes_up();
                answer.ok().and_then(|done| self.on_host(HostEvent::Arbiter(done)))
            }
            recv(control) -> request => {
                self.host.wakes_up();
                request.ok().and_then(|request| self.on_host(HostEvent::Control(request)))
            }
            default(wait) => {
                self.host.wakes_up();
                None
            }
        };
        // All that has arrived counts before the time that passed: silence is judged last.
        for _ in 0..EVENTS_AT_ONCE {
            match (&end, self.events.try_recv()) {
                (None, Ok(event)) => end = self.on_event(event),
                _ => break,
            }
        }
        let end = end.or_else(|| self.on_time());
        let contends = self.host.decider.state() == StateName::TakingOver;
        if !std::mem::replace(&mut self.contends, contends) && contends {
            self.waiting.disks.hurry();
        }
        if end.is_none() {
            // Of a side that is about to run, the activation closes the link.
            self.link.raise_generation(self.host.identity().generation);
        }
        let committed = self.course.committed();
        self.host.refresh_status(committed, committed, self.course.is_connected());
        end
    }

    fn on_time(&mut self) -> Option<End> {
        if self.host.terminate_requested() {
            let stop = self.host.stop_command();
            if let Some(end) = self.tell_course(Event::Input(stop)) {
                return Some(end);
            }
        }
        let orders = self.course.on_time(&mut self.host.decider, self.host.clock.now());
        self.carry_out_all(orders)
    }

    fn on_host(&mut self, event: HostEvent) -> Option<End> {
        let input = self.host.input_of(event);
        self.tell_course(Event::Input(input))
    }

    fn on_event(&mut self, event: WaitEvent) -> Option<End> {
        match event {
            WaitEvent::Link(LinkEvent::Intake(event)) => {
                self.note_link(&event);
                self.tell_course(Event::Intake(event))
            }
            WaitEvent::Link(LinkEvent::Heartbeat(stream, read)) => {
                self.take_pulse(stream, &read);
                None
            }
            WaitEvent::Pulse(report) => self.tell_course(Event::Pulse(report)),
            WaitEvent::Asked(Ok(stream)) => {
                self.take_pulse(stream, &Bytes::new());
                None
            }
            WaitEvent::Asked(Err(error)) => {
                log::debug!("the peer does not answer: {error}");
                self.tell_course(Event::NobodyThere)
            }
        }
    }

    fn note_link(&mut self, event: &IntakeEvent) {
        match event {
            IntakeEvent::Opened(_) => self.host.note_link("up"),
            IntakeEvent::Spoilt(why) => self.host.disks.owner.alarm().note(why.clone()),
            IntakeEvent::Closed(end) => {
                self.host.note_link(&end.to_string());
                if let LinkEnd::Disk(why) = end {
                    self.host.disks.owner.alarm().note(why.clone());
                }
                if let LinkEnd::Protocol(error) = end {
                    self.host.desk.protocol_error(error.code());
                }
            }
            IntakeEvent::Goodbye(_, goodbye) => {
                // How long the guest has been standing still, as the owner says.
                self.still = goodbye.text.parse().ok().map(|us| (Instant::now(), Duration::from_micros(us)));
            }
            _ => {}
        }
    }

    fn take_pulse(&mut self, stream: HeartbeatStream, read: &Bytes) {
        let pulse = Pulse::new(self.host.identity(), self.host.config.timers.heartbeat, self.host.clock.now());
        let tell = self.tell.clone();
        let voice = Arc::clone(&self.host.voice);
        let started = pulse::start(stream, pulse, read, voice, self.host.clock.clone(), move |report| {
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

    // ---- carrying out ------------------------------------------------------------------------------------------------------------

    fn tell_course(&mut self, event: Event) -> Option<End> {
        let orders = self.course.on(event, &mut self.host.decider, self.host.clock.now());
        self.carry_out_all(orders)
    }

    fn carry_out_all(&mut self, orders: Vec<Order>) -> Option<End> {
        let mut rest = orders.into_iter();
        while let Some(order) = rest.next() {
            match order {
                Order::Do(action) => {
                    let Some(action) = self.host.carry_out(action, self.course.committed()) else { continue };
                    match action {
                        Action::Activate(permit) => return Some(End::Activate(permit, actions_of(rest))),
                        Action::BootGuest(permit) => return Some(End::Boot(permit, actions_of(rest))),
                        Action::OfferAsBackup => log::info!("listening for the owner"),
                        Action::Exit(code) => return Some(End::Exit(code)),
                        other => log::error!("an action that is not for a side that waits: {other:?}"),
                    }
                }
                Order::AskPeer => self.ask_peer(),
                Order::EndAsMismatch => {
                    log::error!("this machine is not the primary's, and this standby holds nothing: it ends");
                    return Some(End::Exit(ExitCode::MachineMismatch));
                }
            }
        }
        None
    }

    fn ask_peer(&mut self) {
        let tell = self.tell.clone();
        let asked = dial_heartbeat(self.host.peer_address(), move |stream| {
            tell.send(WaitEvent::Asked(stream)).ok();
        });
        if let Err(error) = asked {
            log::warn!("no thread to ask the peer with: {error}");
            self.tell.send(WaitEvent::Asked(Err(error))).ok();
        }
    }

    // ---- the end of the wait -----------------------------------------------------------------------------------------------------

    fn become_owner(self, permit: RunPermit, pending: Vec<Action>) -> Ending {
        let Self { mut host, waiting, pulses, still, .. } = self;
        pulses.iter().for_each(PulseHandle::close);
        let guest = waiting.standby.machine().events();
        let (tell, events) = unbounded();
        let told = tell.clone();
        let activated = activate(permit, waiting, &host, move |event| {
            told.send(OwnerEvent::Runner(event)).ok();
        });
        match activated {
            Ok(Activated { runner, epoch, resent, delivered, ram_digest, took }) => {
                let activate_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                let ram_digest = ram_digest.map(|digest| format!("{digest:032x}"));
                if let Some((heard, still)) = still {
                    host.desk.note_gap(still + heard.elapsed());
                }
                host.events.write(&FileEvent::Activated { activate_us, epoch, resent, delivered, ram_digest });
                Owner::new(host, runner, guest, epoch, (tell, events)).run(pending)
            }
            Err(error) => {
                log::error!("the standby could not be activated: {:#}", anyhow::Error::from(error));
                Ending::Exit(ExitCode::Failure)
            }
        }
    }

    /// Both hosts lost the guest, and the record lets this one boot it anew.
    fn boot(self, permit: RunPermit, pending: Vec<Action>) -> Ending {
        let Self { host, waiting, pulses, .. } = self;
        pulses.iter().for_each(PulseHandle::close);
        let Waiting { link, applier, disks, standby, taps } = waiting;
        link.close();
        applier.finish();
        // Images and maps are as a later synchronisation will find them; the guest boots on what they hold.
        if let Err(error) = disks.settle_for_boot(&host.disks) {
            log::error!("{error}");
            return Ending::Exit(ExitCode::DiskUnusable);
        }
        taps.stop();
        let mut machine = standby.into_machine();
        if let Err(error) = machine.load() {
            log::error!("{error}");
            return Ending::Exit(ExitCode::KernelUnusable);
        }
        let guest = machine.events();
        let (tell, events) = unbounded();
        let told = tell.clone();
        let parts = host.epoch_parts();
        let runner = Runner::start(machine, parts, Epoch(0), (&host.config).into(), host.clock.clone(), move |event| {
            told.send(OwnerEvent::Runner(event)).ok();
        });
        let ran = runner.map_err(anyhow::Error::from).and_then(|runner| {
            host.announce_guest()?;
            runner.run(permit)?;
            Ok(runner)
        });
        match ran {
            Ok(runner) => Owner::new(host, runner, guest, Epoch(0), (tell, events)).run(pending),
            Err(error) => {
                log::error!("the guest did not start: {error:#}");
                Ending::Exit(ExitCode::Failure)
            }
        }
    }
}

fn receiver_config(host: &Host, disks: Vec<DiskStanding>) -> ReceiverConfig {
    let page = u64::try_from(vmm::PAGE_SIZE).unwrap_or(4096);
    ReceiverConfig {
        identity: host.identity(),
        ram: host.ram.clone(),
        disks: host.disks.owner.sizes(),
        standing: Standing { warm_memory: false, disks },
        facts: host.facts.clone(),
        limits: ReceiverLimits {
            max_epoch_pages: host.config.limits.inbox / page,
            max_epoch_section_bytes: SECTION_BYTES_MAX,
            max_epoch_disk_bytes: host.config.limits.inbox,
        },
    }
}
