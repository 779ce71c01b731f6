//! The benchmark binary. Each subcommand prints a table and, with `--json`, writes one object.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use tests::bench::epochs::Case;
use tests::bench::pairs::Mode;
use tests::bench::{base, disk, epochs, latency, pause, throughput, wire};
use tests::machine::demo_guest;
use tests::real::MachineKind;
use tests::real::artifacts::Artifacts;
use vmm::Tracking;

/// Measures the system on this host.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
    /// Writes the result here, too.
    #[arg(long, global = true)]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum What {
    /// The pause of a checkpoint, part by part, beside the least that it can cost.
    Pause {
        /// Pages that the guest dirties in an epoch.
        #[arg(long, value_delimiter = ',', default_value = "100,1000,10000", value_parser = clap::value_parser!(u32).range(1..))]
        pages: Vec<u32>,
        /// Sizes of guest RAM.
        #[arg(long, value_delimiter = ',', default_value = "256MiB", value_parser = memory)]
        memory: Vec<u64>,
        /// Pauses for each combination.
        #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        samples: u32,
        /// vCPUs of the machine.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
        vcpus: u8,
        /// Protect all pages again after each epoch, hot ones too: `[epoch] hot_pages = false`.
        #[arg(long)]
        plain: bool,
        /// The demo guest's image; `FT_GUEST`, or built, when it is not given.
        #[arg(long)]
        guest: Option<PathBuf>,
    },
    /// What a client waits for a reply.
    Latency {
        #[command(flatten)]
        modes: Modes,
        /// How long each mode is measured in a round.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        /// Pages that the guest dirties each second beside its replies.
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
        dirty_rate: u32,
    },
    /// How many requests a second `redis-benchmark` gets through.
    Throughput {
        #[command(flatten)]
        modes: Modes,
        /// Requests of a run with pipelines of 16; a tenth of it without.
        #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(100..))]
        requests: u32,
    },
    /// How many checkpoints a second are held, and how much of its speed the guest keeps.
    Epochs {
        /// How long each is measured.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        /// Rounds.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
        /// The processor of the guest's vCPU.
        #[arg(long, default_value_t = 0)]
        vcpu_processor: usize,
        /// The processor of everything else.
        #[arg(long, default_value_t = 1)]
        other_processor: usize,
    },
    /// How much of its speed the guest keeps while a base is copied.
    Base {
        /// Shares of the time that the copy may take.
        #[arg(long, value_delimiter = ',', default_value = "100%,50%,25%")]
        shares: Vec<String>,
        /// Rounds.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
        /// Guest RAM.
        #[arg(long, default_value = "512MiB")]
        memory: String,
        /// Pages of it that are filled before.
        #[arg(long, default_value_t = 90_000, value_parser = clap::value_parser!(u32).range(1..))]
        filled_pages: u32,
    },
    /// What checkpoints cost on the wire and in processor time, by what changed in their pages. Needs no KVM.
    Wire {
        /// Pages in each checkpoint.
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=16_384))]
        pages: u32,
        /// Checkpoints in each run.
        #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        epochs: u32,
        /// Runs of each line.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
    },
    /// What a disk does with and without a backup, in turn on one real pair in namespaces. Needs root.
    Disk {
        /// Runs of each load in each mode.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        runs: u32,
        /// Seconds of each.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=3600))]
        seconds: u32,
        /// Size of the disk.
        #[arg(long, default_value = "256MiB", value_parser = memory)]
        disk: u64,
        /// Time between two checkpoints, as in `pair.toml`.
        #[arg(long, default_value = "25ms")]
        epoch: String,
        /// Only loads whose names contain this.
        #[arg(long, default_value = "")]
        only: String,
    },
}

/// What is compared with a guest that nobody protects.
#[derive(Args)]
struct Modes {
    /// Epochs of a fixed length.
    #[arg(long, default_value = "25ms")]
    fixed: String,
    /// Epochs that follow the work: `latency=2ms`, `overhead=10%`.
    #[arg(long, default_value = "latency=2ms")]
    adaptive: String,
    /// Rounds, each with every mode.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

fn memory(text: &str) -> Result<u64, String> {
    let units = [("MiB", 20), ("GiB", 30)];
    let found = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)));
    let (number, shift) = found.ok_or("a size in MiB or GiB is wanted, such as 256MiB")?;
    let number: u64 = number.parse().map_err(|e| format!("{number:?}: {e}"))?;
    number.checked_mul(1 << shift).filter(|n| *n > 0).ok_or_else(|| "not a size of memory".into())
}

fn main() -> ExitCode {
    match measure(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ftbench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(Cli { what, json }: Cli) -> anyhow::Result<()> {
    let progress = |line: &str| eprintln!("{line}");
    if let What::Wire { pages, epochs, rounds } = what {
        let report = wire::run(&wire::Plan { pages, epochs, rounds }, progress)?;
        return tell(&report.table(), &report, json);
    }
    // Before anything is built: nothing is measured without it.
    let kvm = Path::new("/dev/kvm");
    std::fs::File::options().read(true).write(true).open(kvm).context("no KVM on this host: /dev/kvm")?;
    let built = || Artifacts::build(MachineKind::Kvm, progress);
    let span = Duration::from_secs;
    match what {
        What::Pause { pages, memory, samples, vcpus, plain, guest } => {
            let tracking = if plain { Tracking::Plain } else { Tracking::HotPages };
            let grid = pause::Grid { pages, memory_bytes: memory, samples, vcpus, tracking };
            let report = pause::run(&grid, &guest.unwrap_or_else(demo_guest), progress)?;
            tell(&report.table(), &report, json)
        }
        What::Latency { modes: Modes { fixed, adaptive, rounds }, seconds, dirty_rate } => {
            let modes = Mode::compared(&fixed, &adaptive);
            let plan = latency::Plan { modes, rounds, span: span(seconds), dirty_pages_per_second: dirty_rate };
            let report = latency::run(&plan, &built()?, progress)?;
            tell(&report.table(), &report, json)
        }
        What::Throughput { modes: Modes { fixed, adaptive, rounds }, requests } => {
            let loads = vec![(16, requests), (1, requests / 10)];
            let plan = throughput::Plan { modes: Mode::compared(&fixed, &adaptive), rounds, loads };
            let report = throughput::run(&plan, &built()?, progress)?;
            tell(&report.table(), &report, json)
        }
        What::Epochs { seconds, rounds, vcpu_processor, other_processor } => {
            let cases = Case::ALL.to_vec();
            let plan = epochs::Plan { cases, rounds, span: span(seconds), vcpu_processor, other_processor };
            let report = epochs::run(&plan, &built()?, progress)?;
            tell(&report.table(), &report, json)
        }
        What::Base { shares, rounds, memory, filled_pages } => {
            let plan = base::Plan { shares, rounds, memory, filled_pages };
            let report = base::run(&plan, &built()?, progress)?;
            tell(&report.table(), &report, json)
        }
        What::Wire { .. } => unreachable!("measured above"),
        What::Disk { runs, seconds, disk, epoch, only } => {
            let plan = disk::Plan { runs, seconds, disk_bytes: disk, epoch, only };
            let report = disk::run(&plan, progress)?;
            tell(&report.table(), &report, json)
        }
    }
}

fn tell(table: &str, report: &impl Serialize, json: Option<PathBuf>) -> anyhow::Result<()> {
    print!("{table}");
    let Some(path) = json else { return Ok(()) };
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(&path, text + "\n").with_context(|| path.display().to_string())
}
