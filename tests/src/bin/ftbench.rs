//! The benchmark binary. Each subcommand prints a table and, with `--json`, writes one object.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use serde::Serialize;
use tests::bench::{disk, pause};
use tests::machine::demo_guest;

/// Measures the system on this host.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
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
        /// The demo guest's image; `FT_GUEST`, or built, when it is not given.
        #[arg(long)]
        guest: Option<PathBuf>,
        /// Writes the result here, too.
        #[arg(long)]
        json: Option<PathBuf>,
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
        /// Writes the result here, too.
        #[arg(long)]
        json: Option<PathBuf>,
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
    match measure(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ftbench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(Args { what }: Args) -> anyhow::Result<()> {
    // Before anything is built: nothing is measured without it.
    let kvm = Path::new("/dev/kvm");
    std::fs::File::options().read(true).write(true).open(kvm).context("no KVM on this host: /dev/kvm")?;
    let progress = |line: &str| eprintln!("{line}");
    match what {
        What::Pause { pages, memory, samples, vcpus, guest, json } => {
            let kernel = guest.unwrap_or_else(demo_guest);
            let grid = pause::Grid { pages, memory_bytes: memory, samples, vcpus };
            let report = pause::run(&grid, &kernel, progress)?;
            say(&report.table(), &report, json.as_deref())
        }
        What::Disk { runs, seconds, disk, epoch, only, json } => {
            let plan = disk::Plan { runs, seconds, disk_bytes: disk, epoch, only };
            let report = disk::run(&plan, progress)?;
            say(&report.table(), &report, json.as_deref())
        }
    }
}

fn say(table: &str, report: &impl Serialize, json: Option<&Path>) -> anyhow::Result<()> {
    print!("{table}");
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(report)?;
        std::fs::write(path, text + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(())
}
