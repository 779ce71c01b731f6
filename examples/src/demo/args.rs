//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use ::tests::real::MachineKind;
use ::tests::real::pair::DEFAULT_EPOCH;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use failover::config::{parse_size, parse_span};

/// A shorter pause of the arbiter need not be noticed: three probes in a row must be lost.
const SHORTEST_PAUSE: Duration = Duration::from_secs(4);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Starts a protected guest on two hosts in network namespaces, kills the primary under load, and shows that a client's
/// connection survives and nothing that it was told is lost.
#[derive(Debug, Parser)]
#[command(name = "cargo demo --", version)]
pub(super) struct Args {
    /// Also write the result as JSON (schema ft.demo/1). With --runs, the figures at the top are medians and `runs` has each run.
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// What the guest is made of; `model` needs no KVM.
    #[arg(long, value_enum, default_value_t = Machine::Kvm)]
    pub(super) machine: Machine,
    /// Time between two checkpoints (`25ms`), or what they are to achieve: `latency=2ms`, `overhead=10%`.
    #[arg(long, default_value = DEFAULT_EPOCH)]
    pub(super) epoch: String,
    /// Another guest that speaks Redis's protocol than the demo guest: a PVH ELF, or a directory that `examples/linux-guest/build` made.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["dirty_rate", "disk"])]
    pub(super) guest: Option<PathBuf>,
    /// Guest memory.
    #[arg(long, default_value = "256MiB")]
    pub(super) memory: String,
    /// Pages that the guest writes each second beside its work.
    #[arg(long, value_name = "PAGES/S", default_value_t = 0)]
    pub(super) dirty_rate: u32,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub(super) vcpus: u8,
    /// What dies: the process alone, or its host (its cables go dead first).
    #[arg(long, value_enum, default_value_t = Kill::Process)]
    pub(super) kill: Kill,
    /// Who decides who may run.
    #[arg(long, value_enum, default_value_t = Arbiter::File)]
    pub(super) arbiter: Arbiter,
    /// Before the kill: stop etcd (SIGSTOP) for this long while the pair is healthy, 4s to 60s.
    #[arg(long, value_name = "TIME", value_parser = pause_length)]
    pub(super) arbiter_pause: Option<Duration>,
    /// Runs one after the other, each with a kill at another moment.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) runs: u32,
    /// Instead of one kill: kill the side that runs, restart it, wait until the pair is protected and armed again, so many times on one connection.
    #[arg(long, value_name = "N", conflicts_with_all = ["runs", "kill", "arbiter_pause", "keep"], value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) chain: Option<u32>,
    /// With --chain: hand the guest over (`ftctl failover`) instead of killing.
    #[arg(long, requires = "chain")]
    pub(super) planned: bool,
    /// Give the guest a disk that both sides keep, and have every write on it before it is acknowledged; at the end of a chain both images are compared.
    #[arg(long, value_name = "SIZE", num_args = 0..=1, default_missing_value = "64MiB", value_parser = disk_size)]
    pub(super) disk: Option<u64>,
    /// Decides the values written and the moment of the kill; random if not given.
    #[arg(long)]
    pub(super) seed: Option<u64>,
    /// Writes that the client has under way at once on its connection.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub(super) window: u16,
    /// Kill nothing: leave the protected pair running to play with, until Ctrl-C.
    #[arg(long, conflicts_with_all = ["runs", "json", "kill", "arbiter_pause"])]
    pub(super) keep: bool,
}

fn disk_size(text: &str) -> Result<u64, String> {
    let bytes =
        parse_size(text).ok().filter(|bytes| bytes.is_multiple_of(4096) && (8 << 20..=64 << 30).contains(bytes));
    bytes.ok_or_else(|| "8MiB to 64GiB".into())
}

fn pause_length(text: &str) -> Result<Duration, String> {
    let length = parse_span(text)?;
    if (SHORTEST_PAUSE..=LONGEST_PAUSE).contains(&length) { Ok(length) } else { Err("4s to 60s".into()) }
}

impl Args {
    /// The process's arguments, with what clap cannot say by itself.
    pub(super) fn read() -> Result<Self, clap::Error> {
        let args = Self::try_parse()?;
        if args.arbiter_pause.is_some() && args.arbiter != Arbiter::Etcd {
            let text = "--arbiter-pause needs --arbiter etcd: a file cannot be paused";
            return Err(Self::command().error(ErrorKind::ArgumentConflict, text));
        }
        if args.guest.is_some() && args.machine == Machine::Model {
            let text = "--guest needs --machine kvm: the model boots nothing";
            return Err(Self::command().error(ErrorKind::ArgumentConflict, text));
        }
        Ok(args)
    }
}

/// Who decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Arbiter {
    /// A file that both processes see
    File,
    /// An etcd of the demo's own, in a namespace of its own
    Etcd,
}

impl Arbiter {
    /// For people and for the JSON report.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Etcd => "etcd",
        }
    }
}

/// See [`MachineKind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Machine {
    /// A KVM virtual machine that boots the demo guest
    Kvm,
    /// A machine modelled in software, with the same server in it
    Model,
}

impl From<Machine> for MachineKind {
    fn from(machine: Machine) -> Self {
        match machine {
            Machine::Kvm => Self::Kvm,
            Machine::Model => Self::Model,
        }
    }
}

/// What dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Kill {
    /// SIGKILL to the primary's process; its host's kernel closes its connections
    Process,
    /// Both cables of the primary's host are cut, then its process is killed: nobody hears anything
    Host,
}

impl Kill {
    /// For people and for the JSON report.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Host => "host",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn command_line_is_consistent() {
        super::Args::command().debug_assert();
    }
}
