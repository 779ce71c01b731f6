//! What both sides' processes have in common: configuration, the decision core with its arbiter, the gate, status and events.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use vmm::Tracking;

use crossbeam::channel::Receiver;
use failover::arbiter::{ArbiterThread, Completed, NodeRef};
use failover::config::PairConfig;
use failover::control::ControlRequest;
use failover::decide::{Action, Command, GoodbyeReason, Input, StateName};
use failover::exit::ExitCode;
use failover::generation::StateDir;
use replication_proto::{Epoch, Facts, Identity, NodeName, RamLayout, Refuse, RefuseCode, SenderConfig};

use crate::announce::{announce, frames};
use crate::capture::Capture;
use crate::clock::Clock;
use crate::decider::{Decider, voice};
use crate::desk::{Desk, Scene};
use crate::disk::DiskSet;
use crate::epoch::EpochParts;
use crate::events::{Event, EventFile, monotonic_us};
use crate::link::LinkLimits;
use crate::metrics::Metrics;
use crate::mirror::Mirror;
use crate::output::Gate;
use crate::pulse::SharedVoice;
use crate::staging::Arena;
use crate::verify::Verifier;

/// Checkpoints on their way at one time, at most.
pub const EPOCHS_IN_FLIGHT: usize = failover::config::EPOCHS_IN_FLIGHT as usize;

/// Whether the process goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It does.
    GoOn,
    /// It ends with this code.
    Exit(ExitCode),
    /// It begins anew as a backup.
    Rejoin,
}

/// How the life of a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this code.
    Exit(ExitCode),
    /// Another one begins in its place, as a backup.
    Rejoin,
}

impl Flow {
    /// How the process ends, if it does.
    pub fn ending(self) -> Option<Ending> {
        match self {
            Self::GoOn => None,
            Self::Exit(code) => Some(Ending::Exit(code)),
            Self::Rejoin => Some(Ending::Rejoin),
        }
    }
}

/// What both sides' processes have in common.
pub struct Host {
    /// `pair.toml`.
    pub config: PairConfig,
    /// This process.
    pub me: NodeRef,
    /// Time.
    pub clock: Clock,
    /// Where outputs wait.
    pub gate: Arc<Gate>,
    /// Where pages are staged.
    pub arena: Arc<Arena>,
    /// Where inbound frames are told to.
    pub mirror: Arc<Mirror>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
    /// The machine's disks.
    pub disks: DiskSet,
    /// Both sides compared, when an operator asks.
    pub verifier: Arc<Verifier>,
    /// What happened when.
    pub events: EventFile,
    /// What heartbeats say.
    pub voice: SharedVoice,
    /// Who may run.
    pub decider: Decider,
    /// Status, control socket and health endpoint.
    pub desk: Desk,
    /// The guest's memory, as both sides must agree on it.
    pub ram: RamLayout,
    /// What else both sides must agree on.
    pub facts: Facts,
    /// The arbiter's thread.
    pub arbiter: ArbiterThread,
    /// What survives a restart.
    pub state_dir: StateDir,
    /// Set by SIGTERM and SIGINT.
    pub terminate: Arc<AtomicBool>,
    /// State of the link, for people.
    pub link_note: String,
}

/// What reaches a host from beside the link.
#[expect(clippy::large_enum_variant, reason = "a handful a second, each handled at once")]
#[derive(Debug)]
pub enum HostEvent {
    /// The arbiter answered.
    Arbiter(Completed),
    /// An operator asks.
    Control(ControlRequest),
}

impl Host {
    /// This node's name.
    pub fn node(&self) -> &NodeName {
        &self.me.node
    }

    /// Where the peer listens for replication.
    pub fn peer_address(&self) -> SocketAddr {
        self.config.peer_of(self.node()).expect("a pair has a peer").1.replication
    }

    /// What a checkpoint needs besides the machine.
    pub fn epoch_parts(&self) -> EpochParts {
        let capture = Capture::new(self.config.epoch.capture, self.config.epoch.precopy);
        self.metrics.captured(capture.status());
        EpochParts {
            gate: Arc::clone(&self.gate),
            arena: Arc::clone(&self.arena),
            mirror: Arc::clone(&self.mirror),
            metrics: Arc::clone(&self.metrics),
            ram_digest: self.config.epoch.ram_digest,
            tracking: if self.config.epoch.hot_pages { Tracking::HotPages } else { Tracking::Plain },
            base_share: self.config.protect.base_share.share(),
            verifier: Arc::clone(&self.verifier),
            disks: Arc::clone(&self.disks.owner),
            capture,
        }
    }

    /// The guest's MAC addresses, by network device.
    pub fn macs(&self) -> Vec<[u8; 6]> {
        vec![self.config.vm.mac().0]
    }

    /// The guest will run here: switches learn its place by its MAC addresses, before it is known which addresses it speaks from.
    pub fn claim_place(&self) {
        self.gate.hold();
        frames(&self.macs(), &[]).iter().for_each(|(nic, frame)| self.gate.send_for_guest(*nic, frame));
    }

    /// The guest is about to run here, wherever it ran before: what it says is kept until the decision core says what becomes of it, and the LAN
    /// learns its place. A guest that waits to be spoken to would otherwise never be found by a switch that remembers the other port.
    ///
    /// # Errors
    /// No thread could be started to repeat the announcement.
    pub fn announce_guest(&self) -> std::io::Result<()> {
        self.gate.hold();
        announce(&self.gate, &self.macs(), &self.gate.speakers())
    }

    /// Who this process is, under the highest generation that it knows.
    pub fn identity(&self) -> Identity {
        self.decider.identity()
    }

    /// How this side speaks on a data connection.
    pub fn sender_config(&self) -> SenderConfig {
        SenderConfig {
            identity: self.identity(),
            ram: self.ram.clone(),
            disks: self.disks.owner.sizes(),
            facts: self.facts.clone(),
            // One more than the runner lets be on its way, because the base counts too.
            max_in_flight: EPOCHS_IN_FLIGHT + 1,
            compress_base: true,
            patches: self.config.link.patches,
        }
    }

    /// Bounds of a link.
    pub fn link_limits(&self) -> LinkLimits {
        let checkpoint_bytes = usize::try_from(self.config.limits.inbox).unwrap_or(usize::MAX);
        LinkLimits { epochs_in_flight: usize::from(self.config.epoch.in_flight), checkpoint_bytes }
    }

    /// Where the arbiter's answers arrive.
    pub fn arbiter_answers(&self) -> &Receiver<Completed> {
        self.arbiter.answers()
    }

    /// Where operators' commands arrive.
    pub fn control_requests(&self) -> &Receiver<ControlRequest> {
        self.desk.requests()
    }

    /// Whether SIGTERM or SIGINT came. True once.
    pub fn terminate_requested(&self) -> bool {
        self.terminate.swap(false, Ordering::AcqRel)
    }

    /// An ordered stop on nobody's behalf but the service manager's.
    pub fn stop_command(&mut self) -> Input {
        Input::Command { ticket: self.desk.own_ticket(), command: Command::Stop }
    }

    /// What an event means to the decision core.
    pub fn input_of(&mut self, event: HostEvent) -> Input {
        match event {
            HostEvent::Arbiter(completed) => {
                self.desk.arbiter_answered(completed.took, completed.trouble());
                let Completed { op, answer, took: _ } = completed;
                Input::Arbiter { op, answer }
            }
            HostEvent::Control(request) => {
                let (ticket, command) = self.desk.admit(request);
                Input::Command { ticket, command }
            }
        }
    }

    /// How long an event loop may sleep: until the core's next deadline or `other` (on this process's clock), but at most `most`.
    pub fn falls_asleep(&mut self, other: Option<Duration>, most: Duration) -> Duration {
        self.decider.falls_asleep(self.clock.now(), other, most)
    }

    /// The event loop is awake again.
    pub fn wakes_up(&mut self) {
        if let Some(late) = self.decider.wakes_up(self.clock.now()) {
            log::warn!("this process did not run for {late:?}; the peer is not held to blame for it");
        }
    }

    /// Hands an input to the decision core.
    pub fn decide(&mut self, input: Input) -> Vec<Action> {
        self.decider.decide(input, self.clock.now())
    }

    /// Carries out what is the same on both sides; hands back what is not. `committed`: the last committed epoch, for the event file.
    pub fn carry_out(&mut self, action: Action, committed: Epoch) -> Option<Action> {
        match action {
            Action::Arbiter { op, request } => self.arbiter.request(op, request),
            Action::PersistGeneration(generation) => {
                if let Err(error) = self.state_dir.persist(generation) {
                    // Going on would forget what was seen: a rolled-back arbiter could then grant an old right again.
                    log::error!("{error}");
                    return Some(Action::Exit(error.exit_code()));
                }
            }
            Action::Reply { ticket, outcome } => self.desk.reply(ticket, outcome),
            Action::Announce { from, to, reason, generation } => {
                self.note_suspicion(to);
                self.desk.progress(&format!("{} → {}: {}", from.word(), to.word(), reason.text()));
                let (from, to, reason) = (from.word(), to.word(), reason.code());
                self.events.write(&Event::State { from, to, reason, generation, epoch: committed });
            }
            Action::Alarm { reason, text } => {
                log::error!("{}: {text}", reason.text());
                self.events.write(&Event::Alarm { reason: reason.code(), text: &text });
            }
            other => {
                self.note_grant(&other);
                return Some(other);
            }
        }
        None
    }

    fn note_suspicion(&self, to: StateName) {
        if matches!(to, StateName::Contending | StateName::TakingOver) {
            let silent = self.decider.view(self.clock.now()).partner_age.unwrap_or_default();
            let silent = u64::try_from(silent.as_micros()).unwrap_or(u64::MAX);
            self.events.write(&Event::PeerQuiet { last_heard_us: monotonic_us().saturating_sub(silent) });
        }
    }

    fn note_grant(&self, action: &Action) {
        let (right, generation) = match action {
            Action::BootGuest(permit) => ("boot", permit.generation()),
            Action::Activate(permit) => ("takeover", permit.generation()),
            Action::ResumeFenced(permit) => ("resume", permit.generation()),
            Action::OpenOutput => ("solo", self.identity().generation),
            Action::TrustAcks { .. } => ("protected", self.identity().generation),
            _ => return,
        };
        self.events.write(&Event::Granted { generation, right });
    }

    /// Remembers the state of the link for the status.
    pub fn note_link(&mut self, note: &str) {
        if self.link_note != note {
            log::info!("link: {note}");
            note.clone_into(&mut self.link_note);
        }
    }

    /// The peer refused this side.
    pub fn note_refusal(&mut self, refuse: &Refuse) {
        let differences: Vec<String> = refuse.differences.iter().map(ToString::to_string).collect();
        let note = format!("refused by the peer ({}): {} {}", refuse.code, refuse.text, differences.join("; "));
        if self.link_note != note {
            log::error!("{note}");
            self.link_note = note;
        }
        if refuse.code == RefuseCode::Disk {
            // The link comes up again at once, with nothing to say; what is the matter stays.
            self.disks.owner.alarm().note(format!("the other side's: {}", refuse.text));
        }
    }

    /// Brings heartbeats and the status up to date. `committed`: the last committed epoch, `ended`: the last that was begun to be sent.
    pub fn refresh_status(&mut self, committed: Epoch, ended: Epoch, connected: bool) {
        let view = self.decider.view(self.clock.now());
        *self.voice.lock().unwrap_or_else(PoisonError::into_inner) = voice(&view, committed);
        let scene = Scene {
            committed,
            ended,
            connected,
            link: &self.link_note,
            peer: self.peer_address().to_string(),
            arbiter: &self.arbiter.describe(),
            gate: &self.gate,
            metrics: &self.metrics,
            disks: self.disks.owner.alarm().warnings(),
        };
        self.desk.show(&view, &scene);
    }
}

/// The wire's word for a goodbye.
pub fn wire_goodbye(reason: GoodbyeReason) -> replication_proto::GoodbyeReason {
    match reason {
        GoodbyeReason::Stopped => replication_proto::GoodbyeReason::Stopped,
        GoodbyeReason::Switchover => replication_proto::GoodbyeReason::Switchover,
        GoodbyeReason::Leaving => replication_proto::GoodbyeReason::Restarting,
    }
}

/// The decision core's word for a goodbye from the wire.
pub fn core_goodbye(reason: replication_proto::GoodbyeReason) -> GoodbyeReason {
    match reason {
        replication_proto::GoodbyeReason::Stopped => GoodbyeReason::Stopped,
        replication_proto::GoodbyeReason::Switchover => GoodbyeReason::Switchover,
        _ => GoodbyeReason::Leaving,
    }
}
