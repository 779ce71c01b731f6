//! The benchmark binary. Each subcommand prints a table and, with `--json`, writes one object.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use tests::bench::epochs::Case;
use tests::bench::pairs::Mode;
use tests::bench::table::Findings;
use tests::bench::{
    base, disk, epochs, failover, latency, linux, pause, processors, qemu, report, strategies, throughput, tracking,
    wire,
};
use tests::machine::demo_guest;
use tests::real::MachineKind;
use tests::real::artifacts::Artifacts;
use tests::real::pair::DEFAULT_EPOCH;
use vmm::Tracking;

/// A host of which more is used by others is not quiet.
const QUIET: f64 = 0.1;

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
        #[arg(long, value_delimiter = ',', default_value = "256MiB,8GiB", value_parser = memory)]
        memory: Vec<u64>,
        /// vCPUs of the machine.
        #[arg(long, value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u8).range(1..=2))]
        vcpus: Vec<u8>,
        /// Pauses for each combination in each run.
        #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        samples: u32,
        /// Runs, each with machines of its own.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        runs: u32,
        /// Protect all pages again after each epoch, hot ones too: `[epoch] hot_pages = false`.
        #[arg(long)]
        plain: bool,
        /// The demo guest's image; `FT_GUEST`, or built, when it is not given.
        #[arg(long)]
        guest: Option<PathBuf>,
    },
    /// The downtime of QEMU's live migration beside our pause, with the same guest under the same load. Needs QEMU, and root.
    Qemu {
        /// Pages that the guest dirties over and over.
        #[arg(long, value_delimiter = ',', default_value = "1000,10000", value_parser = clap::value_parser!(u32).range(1..=50_000))]
        pages: Vec<u32>,
        /// Migrations of each.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        runs: u32,
        /// Pauses beside each.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        samples: u32,
    },
    /// What it costs to know which pages were written: dirty log, manual clear, hot pages, dirty ring.
    Tracking {
        /// Pages that the guest writes in a round.
        #[arg(long, value_delimiter = ',', default_value = "100,1000,10000", value_parser = clap::value_parser!(u32).range(2..=50_000))]
        pages: Vec<u32>,
        /// Guest RAM.
        #[arg(long, default_value = "256MiB", value_parser = memory)]
        memory: u64,
        /// Rounds of each in each run.
        #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        samples: u32,
        /// Runs.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        runs: u32,
    },
    /// What a client waits for a reply.
    Latency {
        /// Epochs of a fixed length.
        #[arg(long, value_delimiter = ',', default_value = "25ms")]
        fixed: Vec<String>,
        /// Epochs that follow the work: `latency=2ms`, `overhead=10%`.
        #[arg(long, value_delimiter = ',', default_value = "latency=2ms,overhead=10%")]
        adaptive: Vec<String>,
        /// Rounds, each with every mode.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
        /// How long each mode is measured in a round.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        /// Pages that the guest dirties each second beside its replies.
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
        dirty_rate: u32,
    },
    /// How many requests a second `redis-benchmark` gets through.
    Throughput {
        /// Epochs of a fixed length.
        #[arg(long, value_delimiter = ',', default_value = "5ms,10ms,25ms,50ms,100ms")]
        fixed: Vec<String>,
        /// Epochs that follow the work: `latency=2ms`, `overhead=10%`.
        #[arg(long, value_delimiter = ',', default_value = "overhead=10%,latency=2ms")]
        adaptive: Vec<String>,
        /// Rounds, each with every mode.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
        /// Loads: connections x requests under way on each (`redis-benchmark -c` and `-P`).
        #[arg(long, value_delimiter = ',', default_value = "10x16,10x1,100x16")]
        loads: Vec<throughput::Load>,
        /// About how long each run takes.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
        seconds: u64,
    },
    /// The same with Linux and a Redis server in it as the guest.
    Linux {
        /// What `examples/linux-guest/build` made.
        #[arg(long, default_value = "target/linux-guest")]
        image: PathBuf,
        /// Epochs of a fixed length.
        #[arg(long, value_delimiter = ',', default_value = "25ms")]
        fixed: Vec<String>,
        /// Epochs that follow the work: `latency=2ms`, `overhead=10%`.
        #[arg(long, value_delimiter = ',', default_value = "overhead=10%")]
        adaptive: Vec<String>,
        /// Rounds, each with every mode and a boot for each.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
        /// Loads, as for `throughput`.
        #[arg(long, value_delimiter = ',', default_value = "10x16,10x1")]
        loads: Vec<throughput::Load>,
        /// About how long each run takes.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
        seconds: u64,
    },
    /// The ways to capture (`[epoch] capture`) side by side: pause, latency, throughput, at several rates of dirtying.
    Strategies {
        /// Values of `[epoch] capture`; with `+precopy` behind it, `precopy = "always"` as well.
        #[arg(
            long,
            value_delimiter = ',',
            default_value = "stop-and-copy,postponed,postponed+precopy,copy-on-write,auto"
        )]
        strategies: Vec<String>,
        /// Pages that the guest dirties each second.
        #[arg(long, value_delimiter = ',', default_value = "1000,10000,100000", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        rates: Vec<u32>,
        /// Pages that they are among.
        #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
        buffer_pages: u32,
        /// What else is in `[epoch]`, in words.
        #[arg(long, default_value = "overhead=10%")]
        epoch: String,
        /// How long a client's replies are measured, and then about how long `redis-benchmark` runs, with pipelines of 16.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
        seconds: u64,
        /// Rounds, each with everything.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
    },
    /// The gap that a client sees when the primary dies, split into its parts, over many kills (by `cargo demo`).
    Failover {
        /// Kills of each kind.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        runs: u32,
        /// What dies: the process, or its host.
        #[arg(long, value_delimiter = ',', default_value = "process,host")]
        kills: Vec<String>,
        /// Pages that the guest dirties each second beside its work.
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
        dirty_rate: u32,
        /// `[epoch]`, as the demo has it.
        #[arg(long, default_value = DEFAULT_EPOCH)]
        epoch: String,
    },
    /// Everything above and below, with tables and plots: what docs/performance.md shows. Takes an hour and a half.
    Report {
        /// Where results, tables and plots go.
        #[arg(long, default_value = "docs/figures")]
        out: PathBuf,
        /// Stored results: what has one there is not measured again.
        #[arg(long)]
        from: Option<PathBuf>,
        /// Only these subcommands.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// Small sizes, some minutes: to see whether everything works.
        #[arg(long)]
        quick: bool,
        /// A page with places for results, which are filled in anew: docs/performance.md.
        #[arg(long)]
        page: Option<PathBuf>,
    },
    /// How many checkpoints a second are held, and how much of its speed the guest keeps.
    Epochs {
        /// How long a thousand a second with always the same pages are measured.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        /// How long the other loads are.
        #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
        other_seconds: u64,
        /// Leave out `[epoch] hot_pages = false`, which protects all pages again.
        #[arg(long)]
        no_plain: bool,
        /// Rounds.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
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
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
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
        /// `[epoch]`, as the demo has it.
        #[arg(long, default_value = DEFAULT_EPOCH)]
        epoch: String,
        /// Only loads whose names contain this.
        #[arg(long, default_value = "")]
        only: String,
    },
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
    if let Ok(share) = processors::share_busy()
        && share > QUIET
    {
        eprintln!("others use {:.0} % of this host's processors: that will be measured, too", share * 100.0);
    }
    match what {
        What::Wire { pages, epochs, rounds } => {
            tell(&wire::run(&wire::Plan { pages, epochs, rounds }, progress)?, json)
        }
        What::Report { out, from, only, quick, page } => {
            let plan = report::Plan { out, from, only, quick, page };
            Ok(report::run(&plan, &std::env::current_exe()?, progress)?)
        }
        on_kvm => {
            // Before anything is built: nothing is measured without it.
            let kvm = Path::new("/dev/kvm");
            std::fs::File::options().read(true).write(true).open(kvm).context("no KVM on this host: /dev/kvm")?;
            with_machines(on_kvm, json)
        }
    }
}

/// What needs no pair of processes.
fn with_machines(what: What, json: Option<PathBuf>) -> anyhow::Result<()> {
    match what {
        What::Pause { pages, memory, vcpus, samples, runs, plain, guest } => {
            let tracking = if plain { Tracking::Plain } else { Tracking::HotPages };
            let grid = pause::Grid { pages, memory_bytes: memory, vcpus, samples, runs, tracking };
            tell(&pause::run(&grid, &guest.unwrap_or_else(demo_guest), progress)?, json)
        }
        What::Qemu { pages, runs, samples } => {
            tell(&qemu::run(&qemu::Plan { pages, runs, samples }, &demo_guest(), progress)?, json)
        }
        What::Tracking { pages, memory, samples, runs } => {
            let plan = tracking::Plan { pages, memory_bytes: memory, samples, runs };
            tell(&tracking::run(&plan, progress)?, json)
        }
        What::Disk { runs, seconds, disk, epoch, only } => {
            let plan = disk::Plan { runs, seconds, disk_bytes: disk, epoch, only };
            tell(&disk::run(&plan, progress)?, json)
        }
        with_a_pair => with_pairs(with_a_pair, &Artifacts::build(MachineKind::Kvm, progress)?, json),
    }
}

/// What needs the programs.
fn with_pairs(what: What, built: &Artifacts, json: Option<PathBuf>) -> anyhow::Result<()> {
    let span = Duration::from_secs;
    match what {
        What::Latency { fixed, adaptive, rounds, seconds, dirty_rate } => {
            let modes = Mode::compared(&fixed, &adaptive);
            let plan = latency::Plan { modes, rounds, span: span(seconds), dirty_pages_per_second: dirty_rate };
            tell(&latency::run(&plan, built, progress)?, json)
        }
        What::Throughput { fixed, adaptive, rounds, loads, seconds } => {
            let plan =
                throughput::Plan { modes: Mode::compared(&fixed, &adaptive), rounds, loads, span: span(seconds) };
            tell(&throughput::run(&plan, built, progress)?, json)
        }
        What::Linux { image, fixed, adaptive, rounds, loads, seconds } => {
            let plan =
                throughput::Plan { modes: Mode::compared(&fixed, &adaptive), rounds, loads, span: span(seconds) };
            tell(&linux::run(&plan, built, &image, progress)?, json)
        }
        What::Strategies { strategies, rates, buffer_pages, epoch, seconds, rounds } => {
            let (span, dirty_rates) = (span(seconds), rates);
            let plan = strategies::Plan { strategies, dirty_rates, buffer_pages, epoch, span, rounds };
            tell(&strategies::run(&plan, built, progress)?, json)
        }
        What::Failover { runs, kills, dirty_rate, epoch } => {
            let plan = failover::Plan { runs, kills, dirty_rate, epoch };
            tell(&failover::run(&plan, &built.build_demo()?, progress)?, json)
        }
        What::Epochs { seconds, other_seconds, no_plain, rounds, vcpu_processor, other_processor } => {
            let plan = epochs::Plan {
                cases: Case::ALL.to_vec(),
                rounds,
                span: span(seconds),
                other_span: span(other_seconds),
                plain: !no_plain,
                vcpu_processor,
                other_processor,
            };
            tell(&epochs::run(&plan, built, progress)?, json)
        }
        What::Base { shares, rounds, memory, filled_pages } => {
            let plan = base::Plan { shares, rounds, memory, filled_pages };
            tell(&base::run(&plan, built, progress)?, json)
        }
        What::Pause { .. }
        | What::Qemu { .. }
        | What::Tracking { .. }
        | What::Disk { .. }
        | What::Wire { .. }
        | What::Report { .. } => unreachable!("measured without a pair"),
    }
}

/// Plain lines, as standard output is for the table.
fn progress(line: &str) {
    eprintln!("{line}");
}

fn tell(found: &impl Findings, json: Option<PathBuf>) -> anyhow::Result<()> {
    print!("{}", found.text());
    let Some(path) = json else { return Ok(()) };
    let text = serde_json::to_string_pretty(&found.document()?)?;
    std::fs::write(&path, text + "\n").with_context(|| path.display().to_string())
}
