//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use failover::config::parse_span;

/// Ask and command one process of a protected pair.
#[derive(Debug, Parser)]
#[command(name = "ftctl", version, about, after_help = "Exit codes: docs/exit-codes.md")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    #[command(subcommand)]
    pub(crate) action: Action,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct TargetArgs {
    /// The pair's configuration, with --node
    #[arg(long, global = true, value_name = "PAIR.TOML")]
    pub(crate) config: Option<PathBuf>,
    /// Which of the two nodes to ask
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// The control socket itself, instead of --config and --node
    #[arg(long, global = true, value_name = "PATH", conflicts_with_all = ["config", "node"])]
    pub(crate) socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Show the state; the exit code says it, too
    Status(StatusArgs),
    /// Move the guest to the other node: planned (ask the owner), or by force (ask the side that is to run)
    Failover(FailoverArgs),
    /// Switch the guest off (primary) or end the backup, in order
    Stop(WaitArgs),
    /// Take backups on again
    Protect(WaitArgs),
    /// Go on without a backup until `protect`
    Unprotect(WaitArgs),
    /// Go on without a backup for some time; it ends by itself, whatever becomes of this terminal
    PauseProtection(PauseArgs),
    /// Move the guest to the other node and back, and say how long it stood still each time (ask the owner)
    Drill(WaitArgs),
    /// Make a fenced side drop the guest that it keeps, and become the backup
    Rejoin(WaitArgs),
    /// Compare both sides page by page and block by block, while the pair stays protected (ask the owner)
    Verify(WaitArgs),
    /// Check the configuration
    #[command(subcommand)]
    Config(ConfigAction),
    /// Look at the arbiter's record
    #[command(subcommand)]
    Arbiter(ArbiterAction),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
    Prom,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_span(text)
}

#[derive(Debug, ClapArgs)]
pub(crate) struct StatusArgs {
    /// How to print it
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) output: Output,
    /// Print it again and again, twice a second, until interrupted
    #[arg(long, conflicts_with = "wait")]
    pub(crate) watch: bool,
    /// Wait for a state (a word of the `state` field, or `armed`), then print
    #[arg(long, value_name = "STATE")]
    pub(crate) wait: Option<String>,
    /// How long to wait
    #[arg(long, value_parser = duration, default_value = "60s", value_name = "TIME")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct FailoverArgs {
    /// Take over although the record does not allow it by itself. May lose what the backup has not committed
    #[arg(long, requires = "confirm")]
    pub(crate) force: bool,
    /// The VM's name, to confirm --force
    #[arg(long, value_name = "VM")]
    pub(crate) confirm: Option<String>,
    /// With --force: also when the arbiter does not answer. Two guests run if the other side is not off
    #[arg(long, requires = "force")]
    pub(crate) without_arbiter: bool,
    /// Wait until the pair is protected again, with the roles swapped (the default on a terminal). Interrupting this changes nothing
    #[arg(long, conflicts_with = "force")]
    pub(crate) wait: bool,
    /// Return as soon as the guest runs on the other node
    #[arg(long, conflicts_with = "wait")]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) common: WaitArgs,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct PauseArgs {
    /// How long, 1s to 7 days
    #[arg(long = "for", value_parser = duration, value_name = "TIME")]
    pub(crate) length: Duration,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct WaitArgs {
    /// Do not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
    /// Print one JSON object at the end instead of progress (schema ft.command/1)
    #[arg(long)]
    pub(crate) json: bool,
    /// How long to wait for the result
    #[arg(long, value_parser = duration, default_value = "60s", value_name = "TIME")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum ConfigAction {
    /// Check it, print it with every default, and what follows from the timers
    Check,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum ArbiterAction {
    /// Read the record, and print it with what is known of the place where it is
    Show {
        /// Print one JSON object (schema ft.arbiter/1)
        #[arg(long)]
        json: bool,
    },
}
