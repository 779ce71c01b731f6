//! The loop of real faults, by hand: `cargo faults -- --faults 200 --seed 1 --machine kvm --json out.json`.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use tests::real::MachineKind;
use tests::real::artifacts::Artifacts;
use tests::real::faults::{Kind, Options, Report, Round, run};
use tests::real::pair::DEFAULT_EPOCH;

/// Real processes, real faults, a guest under load from several clients: nothing may be lost, and never may two guests speak.
#[derive(Parser)]
struct Args {
    /// Number of faults
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    faults: u64,
    /// What everything is drawn from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of the first fault, to begin in the middle of a run
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// What runs the guest
    #[arg(long, value_enum, default_value = "kvm")]
    machine: Machine,
    /// What is in the pairs' `[epoch]`: an interval, or keys with values such as "latency=2ms capture=copy-on-write precopy=always"
    #[arg(long, default_value = DEFAULT_EPOCH)]
    epoch: String,
    /// Longest time that a fault lasts, in milliseconds
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(700..=60_000))]
    longest_ms: u64,
    /// Only faults of this kind (a word of the report, such as kill_owner)
    #[arg(long, value_parser = kind)]
    kind: Option<Kind>,
    /// Only double faults (true), or only single ones (false); a quarter are double when not given
    #[arg(long)]
    double: Option<bool>,
    /// Begins no further fault after so many minutes
    #[arg(long, value_name = "MINUTES")]
    limit: Option<u64>,
    /// Where the pairs' files are made; those of failures are kept
    #[arg(long)]
    files: Option<PathBuf>,
    /// Writes the report here, too
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Machine {
    Kvm,
    Model,
}

fn kind(word: &str) -> Result<Kind, String> {
    let known = || Kind::ALL.map(Kind::word).join(" ");
    Kind::ALL.into_iter().find(|kind| kind.word() == word).ok_or_else(|| format!("known are: {}", known()))
}

fn main() -> ExitCode {
    match faults(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ftfaults: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn faults(args: Args) -> anyhow::Result<bool> {
    let Args { faults, seed, first, machine, epoch, longest_ms, kind, double, limit, files, json } = args;
    let machine = match machine {
        Machine::Kvm => MachineKind::Kvm,
        Machine::Model => MachineKind::Model,
    };
    if let Some(dir) = &files {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let artifacts = Artifacts::build(machine, |step| eprintln!("{step}"))?;
    let until = limit.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let longest = Duration::from_millis(longest_ms);
    let options = Options { machine, epoch, seed, first, faults, longest, kind, double, files, until };
    let screen = Screen::new(faults);
    let report = run(&artifacts, &options, |round, report| screen.show(round, report))?;
    screen.end();
    print!("{}", report.table());
    for round in &report.long_gaps {
        println!("\nno answer for {} ms: round {}, {}", round.gap_us / 1_000, round.number, round.fault);
        round.trace.iter().for_each(|line| println!("  {line}"));
    }
    for failure in &report.failures {
        println!("\nFAILED {failure}");
    }
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(&path, text + "\n").with_context(|| path.display().to_string())?;
    }
    Ok(report.is_good())
}

/// A bar on a terminal, a line for each round elsewhere.
struct Screen {
    bar: Option<ProgressBar>,
    began: Instant,
}

impl Screen {
    fn new(faults: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:40} {pos}/{len} faults, {elapsed}, about {eta} left  {msg}");
            let bar = ProgressBar::new(faults);
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, began: Instant::now() }
    }

    fn show(&self, round: &Round, report: &Report) {
        let moved = if round.moved { ", moved" } else { "" };
        let quiet = if round.quiet { ", quiet" } else { "" };
        let outage = round.outage.map_or(String::new(), |row| format!(", OUTAGE {row:?}"));
        let text = format!(
            "{}: gap {} ms (one client {} ms), healed {} ms{moved}{quiet}{outage}",
            round.fault,
            round.gap_us / 1_000,
            round.client_gap_us / 1_000,
            round.healed_ms
        );
        match &self.bar {
            Some(bar) => {
                bar.inc(1);
                bar.set_message(format!("{} failures; {text}", report.failures.len()));
            }
            None => eprintln!("{:>6} s  {:>4}  {text}", self.began.elapsed().as_secs(), round.number),
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
