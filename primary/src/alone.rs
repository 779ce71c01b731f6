//! `--alone`: a guest without any protection, for comparisons and for images that are none of ours. No record, no peer, no right to run to be
//! had: nothing of this host's pair may be running.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use failover::config::PairConfig;
use failover::exit::ExitCode;
use failover::status::NodeRole;
use replication_proto::NodeName;
use vmm::MachineEvent;

use crate::setup::{Built, Process, SetupError, build_machine};

/// How often a signal is looked for.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// Runs the guest until it ends or a signal comes.
///
/// # Errors
/// See [`SetupError`].
pub fn run_alone(config: &PairConfig, node: NodeName) -> Result<ExitCode, SetupError> {
    let host = |what| move |source| SetupError::Host { what, source };
    let process = Process::begin(config, node, NodeRole::Primary)?;
    let Built { mut machine, gate, .. } = build_machine(config, &process)?;
    let terminate = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&terminate)).map_err(host("the signal handlers"))?;
    }
    machine.load()?;
    let events = machine.events();
    gate.open();
    machine.run().map_err(|error| SetupError::Host { what: "the guest", source: std::io::Error::other(error) })?;
    log::warn!("the guest runs alone: nothing protects it");
    let code = loop {
        if terminate.load(Ordering::Acquire) {
            break ExitCode::Ok;
        }
        match events.recv_timeout(SIGNAL_INTERVAL) {
            Ok(MachineEvent::PoweredOff) => break ExitCode::Ok,
            Ok(MachineEvent::Reset) => break ExitCode::GuestReset,
            Ok(MachineEvent::Crashed { vcpu, reason }) => {
                log::error!("the guest crashed: vCPU {vcpu}: {reason}");
                break ExitCode::GuestCrashed;
            }
            Err(_) => {}
        }
    };
    machine.shut_down();
    Ok(code)
}
