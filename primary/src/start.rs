//! From the first input until the decision core lets this process boot, wait, or end.

use std::time::Duration;

use crossbeam::channel::select;
use failover::RunPermit;
use failover::decide::{Action, Input};
use failover::exit::ExitCode;
use replication_proto::Epoch;

use crate::host::{Host, HostEvent};

/// How often a signal is looked for.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// What the decision core lets a starting process do.
#[derive(Debug)]
pub enum Start {
    /// Run the guest, then carry out the rest.
    Boot(RunPermit, Vec<Action>),
    /// Wait as the backup.
    OfferAsBackup,
    /// End.
    Exit(ExitCode),
}

/// Drives the decision core until it has decided what this process becomes.
pub fn await_start(host: &mut Host) -> Start {
    let mut actions = host.decide(Input::Started);
    loop {
        if let Some(start) = look(host, actions) {
            return start;
        }
        host.refresh_status(Epoch(0), Epoch(0), false);
        let wait = host.falls_asleep(None, SIGNAL_INTERVAL);
        let arbiter = host.arbiter_answers().clone();
        let control = host.control_requests().clone();
        let input = select! {
            recv(arbiter) -> answer => answer.ok().map(|completed| host.input_of(HostEvent::Arbiter(completed))),
            recv(control) -> request => request.ok().map(|request| host.input_of(HostEvent::Control(request))),
            default(wait) => None,
        };
        host.wakes_up();
        let input = match input {
            Some(input) => input,
            None if host.terminate_requested() => host.stop_command(),
            None => Input::Tick,
        };
        actions = host.decide(input);
    }
}

fn look(host: &mut Host, actions: Vec<Action>) -> Option<Start> {
    let mut actions = actions.into_iter();
    while let Some(action) = actions.next() {
        match host.carry_out(action, Epoch(0)) {
            None => {}
            Some(Action::BootGuest(permit)) => return Some(Start::Boot(permit, actions.collect())),
            Some(Action::OfferAsBackup) => return Some(Start::OfferAsBackup),
            Some(Action::Exit(code)) => return Some(Start::Exit(code)),
            // Nobody is connected yet.
            Some(Action::SayGoodbye(_)) => {}
            Some(other) => log::error!("an action that is not for a starting process: {other:?}"),
        }
    }
    None
}
