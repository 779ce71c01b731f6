//! `ft-primary`: boots the guest and protects it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use crossbeam::channel::unbounded;
use failover::config::PairConfig;
use failover::decide::Role;
use failover::status::NodeRole;
use primary::alone::run_alone;
use primary::host::{Ending, Host};
use primary::owner::{Owner, OwnerEvent};
use primary::rejoin::become_backup;
use primary::runner::Runner;
use primary::setup::{Process, SetupError, build_machine, open_host};
use primary::start::{Start, await_start};
use replication_proto::Epoch;

/// Runs the guest of a protected pair on this host.
#[derive(Parser)]
#[command(name = "ft-primary", version)]
struct Args {
    /// The configuration of the pair, the same file on both hosts.
    #[arg(long)]
    config: PathBuf,
    /// Which of its nodes this host is.
    #[arg(long)]
    node: String,
    /// Run the guest without any protection.
    #[arg(long)]
    alone: bool,
    /// Boot the guest anew although the record names a backup in sync: everything that only the other side has is lost.
    #[arg(long, conflicts_with = "alone")]
    force_cold_boot: bool,
}

pub(crate) fn main() -> ExitCode {
    failover::failpoint::begin();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_timestamp_micros()
        .init();
    match run(&Args::parse()) {
        Ok(code) => ExitCode::from(code.number()),
        Err(error) => {
            eprintln!("ft-primary: {error:#}");
            let code =
                error.downcast_ref::<SetupError>().map_or(failover::exit::ExitCode::Failure, SetupError::exit_code);
            ExitCode::from(code.number())
        }
    }
}

fn run(args: &Args) -> anyhow::Result<failover::exit::ExitCode> {
    let config = PairConfig::load(&args.config).map_err(SetupError::from)?;
    let node = config.pick(&args.node).map_err(SetupError::from)?;
    if args.alone {
        return Ok(run_alone(&config, node)?);
    }
    let process = Process::begin(&config, node, NodeRole::Primary)?;
    // Built and loaded before the arbiter is asked: what is wrong here should not cost anybody a generation.
    let mut built = build_machine(&config, &process)?;
    built.machine.load().map_err(SetupError::from)?;
    let mut host = open_host(config, process, Role::Primary, args.force_cold_boot, &built)?;
    let (permit, pending) = match await_start(&mut host) {
        Start::Boot(permit, pending) => (permit, pending),
        Start::OfferAsBackup => {
            log::info!("the record does not let this node boot the guest: it offers itself as the backup");
            drop(host);
            return Err(become_backup(&args.config, &args.node, Role::Primary).into());
        }
        Start::Exit(code) => return Ok(code),
    };
    let (tell, events) = unbounded();
    let guest = built.machine.events();
    let runner = start_runner(&host, built.machine, &tell)?;
    host.announce_guest().context("the guest could not be announced")?;
    runner.run(permit).context("the guest did not start")?;
    match Owner::new(host, runner, guest, Epoch(0), (tell, events)).run(pending) {
        Ending::Exit(code) => Ok(code),
        Ending::Rejoin => Err(become_backup(&args.config, &args.node, Role::Primary).into()),
    }
}

fn start_runner(
    host: &Host,
    machine: Box<dyn vmm::Machine>,
    tell: &crossbeam::channel::Sender<OwnerEvent>,
) -> anyhow::Result<Runner> {
    let parts = host.epoch_parts();
    let tell = tell.clone();
    let runner = Runner::start(machine, parts, Epoch(0), (&host.config).into(), host.clock.clone(), move |event| {
        // The owner may have ended.
        tell.send(OwnerEvent::Runner(event)).ok();
    });
    runner.context("the machine's thread did not start")
}
