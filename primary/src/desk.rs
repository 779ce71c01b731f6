//! The operator's desk: status board, control socket, health endpoint.

use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};
use failover::decide::{Command, CommandOutcome, Ticket, View};
use replication_proto::Epoch;

use crate::metrics::Metrics;
use crate::output::Gate;
use crate::staging::Arena;

/// Ticket of commands that no operator waits for.
const OWN_TICKET: Ticket = Ticket(0);

/// What operators see and say.
pub struct Desk {
    requests: Receiver<(Ticket, Command)>,
    _keep: Sender<(Ticket, Command)>,
}

impl Desk {
    /// A desk.
    pub fn open() -> Self {
        let (keep, requests) = unbounded();
        Self { requests, _keep: keep }
    }

    /// Where operators' commands arrive.
    pub fn requests(&self) -> &Receiver<(Ticket, Command)> {
        &self.requests
    }

    /// The ticket of a command that no operator waits for.
    pub fn own_ticket(&self) -> Ticket {
        OWN_TICKET
    }

    /// The arbiter took this long to answer.
    pub fn arbiter_took(&mut self, _took: Duration) {}

    /// Answers an operator.
    pub fn reply(&mut self, ticket: Ticket, outcome: CommandOutcome) {
        log::info!("ticket {}: {outcome:?}", ticket.0);
    }

    /// Shows the state of things.
    #[expect(clippy::too_many_arguments, reason = "being written")]
    pub fn show(
        &mut self,
        _view: &View,
        _now: Duration,
        _committed: Epoch,
        _connected: bool,
        _note: &str,
        _gate: &Gate,
        _arena: &Arena,
        _metrics: &Metrics,
    ) {
    }
}
