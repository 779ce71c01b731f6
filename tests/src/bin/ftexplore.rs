//! Explores every state that a pair can reach within bounds. `ftexplore list` names the configurations.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tests::explore::disk::{self, Bounds};
use tests::explore::heal::heal;
use tests::explore::mind::Memory;
use tests::explore::search::{Limits, Outcome, search, summary, tell};
use tests::explore::setup::Setup;

/// Explores every state that a pair can reach within bounds.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The configurations.
    List,
    /// Explores configurations to the end; all that are for every day when none is named.
    Run(Run),
    /// Explores what may become of disks: writes, flushes, epochs, a takeover and power cuts.
    Disks {
        /// Which bounds; all that are for every day when none is named.
        names: Vec<String>,
        /// Gives up after so many states.
        #[arg(long, default_value_t = 10_000_000)]
        states: usize,
        /// In place of the bound: changes of the disk.
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..=9))]
        writes: Option<u8>,
        /// In place of the bound: epochs that end.
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..=9))]
        epochs: Option<u8>,
    },
    /// Breaks one rule after another and looks for it. Needs a build with the feature `mutants`.
    #[cfg(feature = "mutants")]
    Mutants {
        /// Which, by name; all when none is named.
        names: Vec<String>,
        /// Threads.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
        threads: u8,
        /// Gives a rule up after so many states.
        #[arg(long, default_value_t = 3_000_000)]
        states: usize,
        /// Prints each trace.
        #[arg(long)]
        traces: bool,
    },
}

#[derive(Parser)]
struct Run {
    /// Which.
    names: Vec<String>,
    /// Threads.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    threads: u8,
    /// Gives up after so many states.
    #[arg(long, default_value_t = 40_000_000)]
    states: usize,
    /// No line for each level.
    #[arg(long)]
    quiet: bool,
    /// Repairs one of so many states and looks whether the pair recovers; 0: none.
    #[arg(long, default_value_t = 0)]
    heal: usize,
    /// In place of the configuration's bound.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    epochs: Option<u8>,
    /// In place of the configuration's bound.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=9))]
    writes: Option<u64>,
}

fn main() -> ExitCode {
    // Assertions of the cores are caught and shown as violations.
    std::panic::set_hook(Box::new(|_| {}));
    let good = match Args::parse().what {
        What::List => {
            Setup::all().iter().for_each(|setup| println!("{:<12} {}", setup.name, setup.about));
            Bounds::all().iter().for_each(|bounds| println!("disks {:<6} {}", bounds.name, bounds.about));
            true
        }
        What::Run(asked) => run(&asked),
        What::Disks { names, states, writes, epochs } => disks(&names, states, (writes, epochs)),
        #[cfg(feature = "mutants")]
        What::Mutants { names, threads, states, traces } => hunts(&names, usize::from(threads), states, traces),
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn disks(names: &[String], states: usize, (writes, epochs): (Option<u8>, Option<u8>)) -> bool {
    let mut good = true;
    let wanted =
        |bounds: &Bounds| if names.is_empty() { bounds.daily } else { names.iter().any(|name| name == bounds.name) };
    for mut bounds in Bounds::all().into_iter().filter(wanted) {
        bounds.writes = writes.unwrap_or(bounds.writes);
        bounds.epochs = epochs.unwrap_or(bounds.epochs);
        println!("{bounds:?}");
        let outcome = disk::search::search(bounds, states, true);
        println!(
            "{}: {} states, {} steps, {} power cuts looked at, depth {}, {:.1} s, {}",
            bounds.name,
            outcome.states,
            outcome.transitions,
            outcome.looked,
            outcome.depth,
            outcome.took.as_secs_f64(),
            if outcome.complete { "complete, 0 violations" } else { "NOT complete" }
        );
        println!("  states with: {:?}", outcome.seen);
        if let Some((trace, violation)) = &outcome.found {
            println!("{}  {violation}", disk::search::tell(trace));
        }
        good &= outcome.complete;
    }
    good
}

fn run(asked: &Run) -> bool {
    let all = Setup::all();
    if let Some(unknown) = asked.names.iter().find(|name| all.iter().all(|setup| setup.name != **name)) {
        eprintln!("ftexplore: no configuration {unknown}");
        return false;
    }
    let wanted = |setup: &Setup| {
        if asked.names.is_empty() { setup.daily } else { asked.names.iter().any(|name| name == setup.name) }
    };
    let mut good = true;
    for mut setup in all.into_iter().filter(wanted) {
        setup.epochs = asked.epochs.unwrap_or(setup.epochs);
        setup.writes = asked.writes.unwrap_or(setup.writes);
        println!("{}: {}", setup.name, setup.about);
        let limits = Limits {
            threads: usize::from(asked.threads),
            states: asked.states,
            progress: !asked.quiet,
            mutant: None,
            sample: asked.heal,
        };
        let outcome = search(&setup, limits);
        report(&setup, &outcome);
        good &= outcome.complete && recover(&setup, &outcome);
    }
    good
}

fn report(setup: &Setup, outcome: &Outcome) {
    let seconds = outcome.took.as_secs_f64();
    println!(
        "{}: {} states, {} steps, depth {}, {seconds:.1} s, {} MiB, {}",
        setup.name,
        outcome.states,
        outcome.transitions,
        outcome.depth,
        peak_mebibytes(),
        if outcome.complete { "complete, 0 violations" } else { "NOT complete" }
    );
    let seen: Vec<String> = outcome.seen.iter().map(|(name, count)| format!("{name} {count}")).collect();
    println!("  states with: {}", seen.join(", "));
    if let Some(found) = &outcome.found {
        println!("{}", tell(setup, found));
    }
}

/// The most memory that this process ever had, as the kernel counts it; 0 where it does not say.
fn peak_mebibytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    peak.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}

fn recover(setup: &Setup, outcome: &Outcome) -> bool {
    let (mut memory, mut counts, mut stuck) = (Memory::default(), BTreeMap::new(), 0_u64);
    for world in &outcome.sample {
        match heal(setup, &mut memory, world) {
            Ok(recovery) => *counts.entry(recovery).or_insert(0_u64) += 1,
            Err(text) => {
                stuck += 1;
                if stuck <= 3 {
                    println!("  from {}\n    {text}", summary(world));
                }
            }
        }
    }
    if !outcome.sample.is_empty() {
        println!("  repaired {} of the states: {counts:?}, stuck {stuck}", outcome.sample.len());
    }
    stuck == 0
}

#[cfg(feature = "mutants")]
fn hunts(names: &[String], threads: usize, states: usize, traces: bool) -> bool {
    use tests::explore::mutants::{HUNTED, hunt};
    let limits = Limits { threads, states, progress: false, mutant: None, sample: 0 };
    let mut survivors = 0;
    for (mutant, _) in HUNTED {
        let name = format!("{mutant:?}");
        if !names.is_empty() && !names.contains(&name) {
            continue;
        }
        let hunt = hunt(mutant, limits);
        let seconds = hunt.took.as_secs_f64();
        match &hunt.found {
            Some(found) => {
                let (steps, states, place) = (found.trace.len(), hunt.states, hunt.setup.name);
                println!(
                    "{name:<26} {steps:>3} steps {states:>8} states {seconds:>6.1} s  {place}: {}",
                    found.violation
                );
                if traces {
                    replication_proto::mutant::activate(Some(mutant));
                    println!("{}", tell(&hunt.setup, found));
                    replication_proto::mutant::activate(None);
                }
            }
            None => {
                survivors += 1;
                println!("{name:<26} SURVIVES {} states of {}, {seconds:.1} s", hunt.states, hunt.setup.name);
            }
        }
    }
    survivors += hunt_in_disks(names, states, traces);
    println!("{survivors} survive");
    survivors == 0
}

/// The same for the rules of disks.
#[cfg(feature = "mutants")]
fn hunt_in_disks(names: &[String], states: usize, traces: bool) -> usize {
    let mut survivors = 0;
    for (mutant, _) in disk::HUNTED {
        let name = format!("{mutant:?}");
        if !names.is_empty() && !names.contains(&name) {
            continue;
        }
        let (bounds, outcome) = disk::search::hunt(mutant, states);
        let (seconds, states) = (outcome.took.as_secs_f64(), outcome.states);
        let Some((trace, violation)) = &outcome.found else {
            survivors += 1;
            println!("{name:<26} SURVIVES {states} states of disks {}, {seconds:.1} s", bounds.name);
            continue;
        };
        println!(
            "{name:<26} {:>3} steps {states:>8} states {seconds:>6.1} s  disks {}: {violation}",
            trace.len(),
            bounds.name
        );
        if traces {
            println!("{}", disk::search::tell(trace));
        }
    }
    survivors
}
