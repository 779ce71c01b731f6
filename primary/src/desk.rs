//! The operator's desk: status board, control socket, health endpoint.

use std::collections::BTreeMap;
use std::time::Duration;

use crossbeam::channel::{Receiver, unbounded};
use failover::config::NodeSection;
use failover::control::{ControlRequest, ControlServer, ReplyHandle};
use failover::decide::{Command, CommandOutcome, Ticket, View};
use failover::health::HealthServer;
use failover::status::StatusBoard;
use replication_proto::Epoch;

use crate::metrics::Metrics;
use crate::output::Gate;
use crate::setup::SetupError;

/// Ticket of commands that no operator waits for.
const OWN_TICKET: Ticket = Ticket(0);

/// What operators see and say.
pub struct Desk {
    board: StatusBoard,
    requests: Receiver<ControlRequest>,
    open: BTreeMap<Ticket, ReplyHandle>,
    last_ticket: Ticket,
    /// The last request to the arbiter had no answer.
    arbiter_away: bool,
    /// For how long the guest stood still in the switchover whose answer is still owed.
    gap: Option<Duration>,
    _control: ControlServer,
    _health: Option<HealthServer>,
}

/// What a shell knows better than the decision core.
pub struct Scene<'a> {
    /// The last epoch that is committed.
    pub committed: Epoch,
    /// The last epoch that ended; of a standby, the last committed.
    pub ended: Epoch,
    /// Whether the data connection stands.
    pub connected: bool,
    /// State of the link, for people.
    pub link: &'a str,
    /// Where the peer is.
    pub peer: String,
    /// The arbiter, for people.
    pub arbiter: &'a str,
    /// Where outputs wait.
    pub gate: &'a Gate,
    /// What is measured.
    pub metrics: &'a Metrics,
    /// What went wrong with disks, for people.
    pub disks: Vec<String>,
}

/// How a warning about a disk begins.
const DISK_WARNING: &str = "trouble with a disk: ";

impl Desk {
    /// Opens the control socket and the health endpoint that `node` names.
    ///
    /// # Errors
    /// [`SetupError::Control`], [`SetupError::Listen`].
    pub fn open(board: StatusBoard, node: &NodeSection, vm: &str) -> Result<Self, SetupError> {
        let (commands, requests) = unbounded();
        // The event loop listens to the channel itself: nobody needs to be woken.
        let control = ControlServer::start(&node.control, vm, board.clone(), commands, || {})?;
        let health = match node.health {
            Some(address) => Some(
                HealthServer::start(address, board.clone()).map_err(|source| SetupError::Listen { address, source })?,
            ),
            None => None,
        };
        Ok(Self {
            board,
            requests,
            open: BTreeMap::new(),
            last_ticket: OWN_TICKET,
            arbiter_away: false,
            gap: None,
            _control: control,
            _health: health,
        })
    }

    /// Where operators' commands arrive.
    pub fn requests(&self) -> &Receiver<ControlRequest> {
        &self.requests
    }

    /// Takes a request in: its ticket, and what is asked.
    pub fn admit(&mut self, request: ControlRequest) -> (Ticket, Command) {
        let ControlRequest { command, reply, asked_by: (uid, pid) } = request;
        log::info!("operator (uid {uid}, pid {pid}): {command:?}");
        self.last_ticket = Ticket(self.last_ticket.0 + 1);
        self.open.insert(self.last_ticket, reply);
        (self.last_ticket, command)
    }

    /// The ticket of a command that no operator waits for.
    pub fn own_ticket(&self) -> Ticket {
        OWN_TICKET
    }

    /// Tells everybody who waits how far things are.
    pub fn progress(&self, text: &str) {
        self.open.values().for_each(|reply| reply.progress(text));
    }

    /// A switchover made the guest stand still for so long; its operator is told with the answer.
    pub fn note_gap(&mut self, gap: Duration) {
        self.gap = Some(gap);
        self.progress(&format!("the guest stood still for {:.1} ms", gap.as_secs_f64() * 1e3));
    }

    /// Answers an operator.
    pub fn reply(&mut self, ticket: Ticket, outcome: CommandOutcome) {
        log::info!("operator's command {}: {outcome:?}", ticket.0);
        if let Some(reply) = self.open.remove(&ticket) {
            reply.finish(outcome, self.gap.take());
        }
    }

    /// The arbiter took this long to answer, or not to answer, because of `trouble`.
    pub fn arbiter_answered(&mut self, took: Duration, trouble: Option<String>) {
        // It is asked again at once and often: where an outage begins and where it ends is enough for the log.
        match (&trouble, self.arbiter_away) {
            (Some(text), false) => log::warn!("arbiter: {text}"),
            (None, true) => log::info!("arbiter: answers again"),
            _ => {}
        }
        self.arbiter_away = trouble.is_some();
        self.board.update(|status| {
            status.arbiter.last_request_seconds = Some(took.as_secs_f64());
            status.counters.arbiter_errors += u64::from(trouble.is_some());
        });
    }

    /// Shows the state of things.
    pub fn show(&self, view: &View, scene: &Scene<'_>) {
        self.board.apply(view);
        let (held_bytes, held_frames) = scene.gate.held();
        let counters = scene.gate.counters();
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        self.board.update(|status| {
            status.epoch = scene.ended.0;
            status.lag_epochs = scene.ended.0.saturating_sub(scene.committed.0);
            status.link.up = scene.connected;
            scene.link.clone_into(&mut status.link.text);
            status.link.address.clone_from(&scene.peer);
            scene.arbiter.clone_into(&mut status.arbiter.place);
            status.output.held_bytes = count(held_bytes);
            status.output.held_frames = count(held_frames);
            status.output.released_frames_total = counters.released;
            status.output.dropped_frames_total = counters.dropped_late + counters.dropped_full + counters.discarded;
            scene.metrics.fill(&mut status.counters);
            scene.metrics.fill_resync(status);
            scene.metrics.fill_pacing(status);
            scene.metrics.fill_overload(status);
            scene.metrics.fill_capture(status);
            status.warnings.retain(|warning| !warning.starts_with(DISK_WARNING));
            status.warnings.extend(scene.disks.iter().map(|trouble| format!("{DISK_WARNING}{trouble}")));
        });
    }

    /// Something of the stream was wrong, by code.
    pub fn protocol_error(&self, code: &str) {
        self.board.update(|status| *status.counters.protocol_errors.entry(code.to_owned()).or_default() += 1);
    }

    /// This side took over, for this cause.
    pub fn took_over(&self, cause: &str) {
        self.board.update(|status| *status.counters.failovers.entry(cause.to_owned()).or_default() += 1);
    }

    /// The process is about to end.
    pub fn ending(&self) {
        self.board.ending();
    }
}
