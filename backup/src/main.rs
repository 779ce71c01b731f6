//! `ft-backup`: waits with a copy of the guest, and runs it when its primary is gone.

use std::path::PathBuf;
use std::process::ExitCode;

use backup::standby::Standby;
use backup::wait::Waiter;
use clap::Parser;
use failover::config::PairConfig;
use failover::decide::Role;
use failover::status::NodeRole;
use primary::host::Ending;
use primary::rejoin::become_backup;
use primary::setup::{Process, SetupError, build_machine, open_host};

/// Keeps a warm copy of a protected guest on this host.
#[derive(Parser)]
#[command(name = "ft-backup", version)]
struct Args {
    /// The configuration of the pair, the same file on both hosts.
    #[arg(long)]
    config: PathBuf,
    /// Which of its nodes this host is.
    #[arg(long)]
    node: String,
    /// Boot the guest if it turns out that both hosts lost it and the record names this node as its owner. `ft-primary` passes this on.
    #[arg(long, hide = true)]
    may_boot: bool,
}

pub(crate) fn main() -> ExitCode {
    failover::failpoint::begin();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_timestamp_micros()
        .init();
    match run(&Args::parse()) {
        Ok(code) => ExitCode::from(code.number()),
        Err(error) => {
            let code = error.exit_code();
            eprintln!("ft-backup: {:#}", anyhow::Error::from(error));
            ExitCode::from(code.number())
        }
    }
}

fn run(args: &Args) -> Result<failover::exit::ExitCode, SetupError> {
    let config = PairConfig::load(&args.config)?;
    let node = config.pick(&args.node)?;
    let process = Process::begin(&config, node, NodeRole::Backup)?;
    let built = build_machine(&config, &process)?;
    let role = if args.may_boot { Role::Primary } else { Role::Backup };
    let host = open_host(config, process, role, false, &built)?;
    match Waiter::start(host, Standby::new(built.machine), built.ports, built.waiting_disks)?.run() {
        Ending::Exit(code) => Ok(code),
        Ending::Rejoin => {
            Err(SetupError::Host { what: "to begin anew", source: become_backup(&args.config, &args.node, role) })
        }
    }
}
