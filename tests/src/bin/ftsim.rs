//! `cargo sim`: many simulated worlds, each from its seed, on all cores.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use serde::Serialize;
use tests::check::Seen;
use tests::world::{Outcome, Plan, World, twice};

/// Simulates the pair: real protocol and decision cores, virtual time, network, arbiter and guest, and everything that can go wrong.
#[derive(Parser, Debug)]
#[command(name = "cargo sim", version)]
struct Args {
    /// How many worlds.
    #[arg(long, default_value_t = 1_000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// Worlds at one time; as many as there are cores unless told.
    #[arg(long)]
    threads: Option<usize>,
    /// Instead of drawn worlds: ordered pairs of faults at every step of a scripted run, every `STRIDE`-th of them.
    #[arg(long, value_name = "STRIDE")]
    double_faults: Option<usize>,
    /// Instead: breaks one rule of the pair after another, and fails unless a world notices each.
    #[cfg(feature = "mutants")]
    #[arg(long)]
    mutants: bool,
    /// With `--mutants`: only this one.
    #[cfg(feature = "mutants")]
    #[arg(long, value_name = "NAME", requires = "mutants")]
    only: Option<String>,
    /// Tells what happens in each world, line by line.
    #[arg(long)]
    trace: bool,
    /// Writes the figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
}

/// What a series showed.
#[derive(Debug, Serialize)]
struct Report {
    schema: &'static str,
    first_seed: u64,
    worlds: u64,
    world_seconds: f64,
    wall_seconds: f64,
    cpu_threads: usize,
    epochs: u64,
    epochs_per_second_and_thread: f64,
    commits: u64,
    bases: u64,
    frames_released: u64,
    answers: u64,
    takeovers: u64,
    boots: u64,
    fenced: u64,
    rejoined: u64,
    solo_for_loss: u64,
    protections: u64,
    refused_connections: u64,
    flushes: u64,
    disks_synchronised: u64,
    power_cuts_imagined: u64,
    overloads: u64,
    throttle_steps: u64,
    overloads_dropped: u64,
    violations: Vec<String>,
}

#[derive(Default)]
struct Sum {
    seen: Seen,
    lasted: Duration,
    violations: Vec<(u64, String)>,
}

fn main() -> anyhow::Result<ExitCode> {
    let mut args = Args::parse();
    #[cfg(feature = "mutants")]
    if args.mutants {
        return Ok(if mutants(&args) { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if let Some(stride) = args.double_faults {
        args.seeds = u64::try_from(twice::count().div_ceil(stride.max(1)))?;
    }
    let args = args;
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let threads = if args.trace { 1 } else { threads.max(1) };
    let began = Instant::now();
    let (next, sum, stop) = (AtomicU64::new(0), Mutex::new(Sum::default()), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| worlds(&args, &next, &sum, &stop));
        }
        scope.spawn(|| progress(&args, &next, &stop, began));
    });
    let mut sum = sum.into_inner().context("a world's thread panicked")?;
    sum.violations.sort();
    let report = report(&args, &sum, threads, began.elapsed());
    print(&report, &args);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?).with_context(|| path.display().to_string())?;
    }
    Ok(if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn worlds(args: &Args, next: &AtomicU64, sum: &Mutex<Sum>, stop: &AtomicBool) {
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= args.seeds {
            stop.store(true, Ordering::Relaxed);
            return;
        }
        let (name, replay) = name(args, number);
        // An assert of the pair that fires is a violation, too.
        let lived = std::panic::catch_unwind(|| live(args, number));
        let Ok(Outcome { violation, seen, notes, lasted, .. }) = lived else {
            let text = format!("{name}: a panic");
            eprintln!("VIOLATION {text}\n  replay: {replay}");
            sum.lock().expect("no thread panics").violations.push((number, text));
            continue;
        };
        notes.iter().for_each(|line| println!("{line}"));
        let mut sum = sum.lock().expect("no world panics");
        sum.seen.add(&seen);
        sum.lasted += lasted;
        if let Some(violation) = violation {
            let text = format!("{name}: {}: {}", violation.guarantee, violation.what);
            eprintln!("VIOLATION {text}\n  replay: {replay}");
            sum.violations.push((number, text));
        }
    }
}

/// The name of the `number`-th world, and the command that lives through it again.
fn name(args: &Args, number: u64) -> (String, String) {
    let at = args.first_seed + number;
    match args.double_faults {
        None => (format!("seed {at}"), format!("cargo sim -- --seeds 1 --first-seed {at} --trace")),
        Some(stride) => {
            let at = at * stride as u64;
            let all = twice::count();
            (format!("pair {at}"), format!("cargo sim -- --double-faults {all} --first-seed {at} --trace"))
        }
    }
}

fn live(args: &Args, number: u64) -> Outcome {
    let at = args.first_seed + number;
    match args.double_faults {
        None => World::live(Plan::draw(at), args.trace),
        // A stride over everything replays one pair, by its number.
        Some(stride) if stride >= twice::count() => {
            twice::live(&twice::scenario(usize::try_from(at).unwrap_or(0)), args.trace)
        }
        Some(stride) => twice::live(&twice::scenario(usize::try_from(at).unwrap_or(0) * stride), args.trace),
    }
}

/// The rules that live where the explorer does not look, in the stream and around memory, and a few that both catch; each with a seed that noticed it
/// once and is tried first, and whether its guests have a disk. (`IsolatedRejoins` is the explorer's: 3,000 worlds did not notice it.)
#[cfg(feature = "mutants")]
const BROKEN: [(replication_proto::mutant::Mutant, u64, bool); 19] = {
    use replication_proto::mutant::Mutant;
    [
        (Mutant::RetireOnSend, 3, false),
        (Mutant::GateOpensOnLinkLoss, 3, false),
        (Mutant::AckGenerationUnchecked, 85, false),
        (Mutant::AckOfAnyIncarnation, 54, false),
        (Mutant::DirtyClearedAfterCopy, 4, false),
        (Mutant::DeltaIntoStandby, 320, true),
        (Mutant::AckAfterPromotion, 117, false),
        (Mutant::SoloWithoutCas, 0, false),
        (Mutant::TakeoverWithoutCas, 3, false),
        (Mutant::InSyncBeforeHolding, 0, false),
        (Mutant::UncertainSyncIsFailure, 1024, false),
        (Mutant::PauseForEver, 16, false),
        (Mutant::AckBeforeStable, 0, true),
        (Mutant::BitAfterWrite, 18, true),
        (Mutant::BaseBeforeImage, 0, true),
        (Mutant::ReturnersBitsIgnored, 44, true),
        (Mutant::PrecopiedPageKept, 8, false),
        (Mutant::PrecopyRetired, 4, false),
        (Mutant::WrittenBeforeCopied, 962, false),
    ]
};

/// Breaks one rule after another. True when every one was noticed.
#[cfg(feature = "mutants")]
fn mutants(args: &Args) -> bool {
    use replication_proto::mutant::activate;
    std::panic::set_hook(Box::new(|_| {}));
    let (mut survivors, mut tried) = (0, 0);
    for (mutant, hint, disk) in BROKEN {
        if args.only.as_ref().is_some_and(|only| *only != format!("{mutant:?}")) {
            continue;
        }
        tried += 1;
        let began = Instant::now();
        activate(Some(mutant));
        let seeds = std::iter::once(hint).chain(args.first_seed..args.first_seed + args.seeds);
        let caught = seeds.into_iter().find_map(|seed| {
            let lived = std::panic::catch_unwind(|| World::live(Plan::draw(seed).with_disk(disk), false));
            match lived {
                Err(_) => Some((seed, 0, "an assert of the pair".to_owned())),
                Ok(outcome) => {
                    outcome.violation.map(|v| (seed, outcome.events, format!("{}: {}", v.guarantee, v.what)))
                }
            }
        });
        activate(None);
        let seconds = began.elapsed().as_secs_f64();
        match caught {
            Some((seed, events, what)) => {
                println!("caught    {mutant:?} in {seconds:.1} s: seed {seed}, event {events}: {what}");
            }
            None => {
                survivors += 1;
                println!("SURVIVED  {mutant:?}: {} worlds, {seconds:.1} s", args.seeds);
            }
        }
    }
    println!("{survivors} of {tried} broken rules survived");
    survivors == 0 && tried > 0
}

fn progress(args: &Args, next: &AtomicU64, stop: &AtomicBool, began: Instant) {
    use std::io::IsTerminal;
    let bar = std::io::stderr().is_terminal().then(|| indicatif::ProgressBar::new(args.seeds));
    let mut told = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        std::thread::park_timeout(Duration::from_millis(200));
        let done = next.load(Ordering::Relaxed).min(args.seeds);
        match &bar {
            Some(bar) => bar.set_position(done),
            None if told.elapsed() >= Duration::from_secs(30) => {
                told = Instant::now();
                eprintln!("{done} of {} worlds after {:.0} s", args.seeds, began.elapsed().as_secs_f64());
            }
            None => {}
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

fn report(args: &Args, sum: &Sum, threads: usize, wall: Duration) -> Report {
    let Seen {
        epochs,
        commits,
        bases,
        released,
        answers,
        takeovers,
        boots,
        fenced,
        solos,
        protections,
        refusals,
        rejoins,
        flushes,
        disk_bases,
        exams,
        overloads,
        throttles,
        dropped,
    } = sum.seen;
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = epochs as f64 / wall.as_secs_f64() / threads as f64;
    Report {
        schema: "ft.sim/1",
        first_seed: args.first_seed,
        worlds: args.seeds,
        world_seconds: sum.lasted.as_secs_f64(),
        wall_seconds: wall.as_secs_f64(),
        cpu_threads: threads,
        epochs,
        epochs_per_second_and_thread: rate,
        commits,
        bases,
        frames_released: released,
        answers,
        takeovers,
        boots,
        fenced,
        rejoined: rejoins,
        solo_for_loss: solos,
        protections,
        refused_connections: refusals,
        flushes,
        disks_synchronised: disk_bases,
        power_cuts_imagined: exams,
        overloads,
        throttle_steps: throttles,
        overloads_dropped: dropped,
        violations: sum.violations.iter().map(|(_, text)| text.clone()).collect(),
    }
}

fn print(report: &Report, args: &Args) {
    println!(
        "{} worlds from seed {}, {:.0} s of their time in {:.1} s on {} threads",
        report.worlds, args.first_seed, report.world_seconds, report.wall_seconds, report.cpu_threads
    );
    let lines = [
        ("epochs", report.epochs),
        ("commits", report.commits),
        ("bases committed", report.bases),
        ("frames let out", report.frames_released),
        ("answers to clients", report.answers),
        ("takeovers", report.takeovers),
        ("boots", report.boots),
        ("sides fenced", report.fenced),
        ("rejoined as backup", report.rejoined),
        ("solo after a loss", report.solo_for_loss),
        ("protections", report.protections),
        ("connections refused", report.refused_connections),
        ("flushes", report.flushes),
        ("disks synchronised", report.disks_synchronised),
        ("power cuts imagined", report.power_cuts_imagined),
        ("overloads", report.overloads),
        ("throttle steps", report.throttle_steps),
        ("dropped for overload", report.overloads_dropped),
    ];
    for (name, count) in lines {
        println!("  {name:<20} {count:>12}");
    }
    println!("  {:<20} {:>12.0}", "epochs/s and thread", report.epochs_per_second_and_thread);
    println!("{} violations", report.violations.len());
}
