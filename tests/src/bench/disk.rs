//! `ftbench disk`: a guest's disk with and without a backup, in turn, on one real pair: same process, same image, same host.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::figures::Spread;
use super::table::{Findings, Table};
use super::{BenchError, host_description};
use crate::real::artifacts::Artifacts;
use crate::real::load::LoadReport;
use crate::real::pair::{Pair, PairOptions};
use crate::real::resp::Connection;
use crate::real::{Error, MachineKind, Node, clock};

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.disk/1";
/// How long the guest may take to be protected, or to run alone.
const PATIENCE: Duration = Duration::from_secs(120);
/// Attempts at one run, when protection is lost in it.
const ATTEMPTS: u32 = 3;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Runs of each load, with and without a backup in turn.
    pub runs: u32,
    /// How long each takes.
    pub seconds: u32,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// `[epoch]` in words, as [`PairOptions::epoch`].
    pub epoch: String,
    /// Loads whose names contain this.
    pub only: String,
}

/// A load: what it is called, and its words after the time.
#[derive(Clone, Copy, Debug)]
struct Load {
    name: &'static str,
    pattern: &'static str,
    words: &'static [&'static str],
}

const LOADS: [Load; 7] = [
    Load { name: "random reads, 4 KiB", pattern: "randread", words: &["4096", "1"] },
    Load { name: "random reads, 4 KiB, 8 at once", pattern: "randread", words: &["4096", "8"] },
    Load { name: "random writes, 4 KiB", pattern: "randwrite", words: &["4096", "1"] },
    Load { name: "random writes, 4 KiB, 8 at once", pattern: "randwrite", words: &["4096", "8"] },
    Load { name: "random writes, 4 KiB, a flush after each", pattern: "randwrite", words: &["4096", "1", "fsync=1"] },
    Load {
        name: "random writes, 4 KiB, 8 at once, a flush after 32",
        pattern: "randwrite",
        words: &["4096", "8", "fsync=32"],
    },
    Load { name: "writes in order, 64 KiB, 4 at once", pattern: "seqwrite", words: &["65536", "4"] },
];

/// The result.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// Processors and kernel of the host.
    pub machine: String,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// `[epoch]` in words.
    pub epoch: String,
    /// Runs of each load in each mode.
    pub runs: u32,
    /// Seconds of each.
    pub seconds: u32,
    /// One for each load.
    pub rows: Vec<Row>,
}

/// One load.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    /// What the guest does.
    pub load: String,
    /// While it runs alone.
    pub solo: Side,
    /// While each change and each flush goes to the backup.
    pub protected: Side,
    /// Median over the runs of protected IOPS by those of the run alone beside it.
    pub iops_ratio_median: f64,
    /// The least of them.
    pub iops_ratio_least: f64,
    /// The greatest.
    pub iops_ratio_greatest: f64,
    /// Runs that were done again, because protection was lost in them.
    pub repeated: u32,
}

/// One load in one mode. Of each percentile the median over the runs; of the longest, the longest.
#[derive(Debug, Serialize, Deserialize)]
pub struct Side {
    /// Reads or writes a second.
    pub iops_median: f64,
    /// Of a read or write, by the guest's clock.
    pub latency_us: Spread,
    /// Of a flush; zero when there are none.
    pub flush_us: Spread,
    /// Requests that the disk refused.
    pub errors: u64,
}

/// The two modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Solo,
    Protected,
}

/// Measures; `progress` is told of each run before it begins. Needs root, for namespaces.
///
/// # Errors
/// The first thing that goes wrong.
pub fn run(plan: &Plan, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    let loads: Vec<Load> = LOADS.into_iter().filter(|load| load.name.contains(&plan.only)).collect();
    if loads.is_empty() {
        let names = LOADS.map(|load| load.name).join("; ");
        return Err(BenchError::Wrong(format!("no load is called {:?}: {names}", plan.only)));
    }
    let artifacts = Artifacts::build(MachineKind::Kvm, &mut progress)?;
    let options = PairOptions {
        memory: "128MiB".into(),
        epoch: plan.epoch.clone(),
        disks: vec![plan.disk_bytes],
        // What is measured is not how soon a busy host's backup is given up.
        extra: "[timers]\nsolo = \"4s\"\ntakeover = \"8s\"\nprotect_retry = \"100ms\"\n".into(),
        ..PairOptions::new(MachineKind::Kvm)
    };
    let mut pair = Pair::prepare(artifacts, &options)?;
    pair.start_protected()?;
    let patience = PATIENCE + Duration::from_secs(plan.seconds.into());
    let mut guest = Connection::open(pair.network().client(), patience)?;
    let mut samples: Vec<Vec<[LoadReport; 2]>> = vec![Vec::new(); loads.len()];
    let mut repeated = vec![0; loads.len()];
    // The first is not counted: the image gets its blocks.
    for run in 0..=plan.runs {
        progress(&format!("run {run} of {}{}", plan.runs, if run == 0 { " (not counted)" } else { "" }));
        let mut of_mode = [Vec::new(), Vec::new()];
        // Each mode is the first one as often as the other.
        let order = if run % 2 == 0 { [Mode::Solo, Mode::Protected] } else { [Mode::Protected, Mode::Solo] };
        for mode in order {
            let reports = in_mode(&mut pair, &mut guest, (mode, plan.seconds), &loads, &mut repeated)?;
            of_mode[usize::from(mode == Mode::Protected)] = reports;
        }
        let [solo, protected] = of_mode;
        if run > 0 {
            for (samples, pair) in samples.iter_mut().zip(solo.into_iter().zip(protected)) {
                samples.push(pair.into());
            }
        }
    }
    let rows = loads.iter().zip(&samples).zip(repeated).map(|((load, samples), repeated)| row(load, samples, repeated));
    Ok(Report {
        schema: SCHEMA.into(),
        machine,
        disk_bytes: plan.disk_bytes,
        epoch: plan.epoch.clone(),
        runs: plan.runs,
        seconds: plan.seconds,
        rows: rows.collect(),
    })
}

/// All loads in one mode, each for so many seconds.
fn in_mode(
    pair: &mut Pair,
    guest: &mut Connection,
    (mode, seconds): (Mode, u32),
    loads: &[Load],
    repeated: &mut [u32],
) -> Result<Vec<LoadReport>, BenchError> {
    enter(pair, mode)?;
    let time = format!("{seconds}s");
    let mut reports = Vec::new();
    for (load, repeated) in loads.iter().zip(repeated) {
        let words: Vec<&str> = [load.pattern, &time].into_iter().chain(load.words.iter().copied()).collect();
        let mut attempts = 0;
        loop {
            let since = clock::mono_us();
            let report = LoadReport::run(guest, &words).map_err(Error::io("FT.DISK"))?;
            if pair.events(Node::A, since)?.iter().all(|event| event.event != "state") {
                reports.push(report);
                break;
            }
            (attempts, *repeated) = (attempts + 1, *repeated + 1);
            if attempts == ATTEMPTS {
                return Err(BenchError::Wrong(format!("the pair does not stay {mode:?} under {}", load.name)));
            }
            enter(pair, mode)?;
        }
    }
    Ok(reports)
}

fn enter(pair: &mut Pair, mode: Mode) -> Result<(), BenchError> {
    let word = if mode == Mode::Solo { "unprotect" } else { "protect" };
    pair.ftctl(Node::A, &[word, "--yes"])?.success("ftctl")?;
    match mode {
        Mode::Solo => Ok(pair.wait_state(Node::A, "solo", PATIENCE)?),
        Mode::Protected => Ok(pair.wait_protected(Node::A, PATIENCE)?),
    }
}

fn row(load: &Load, samples: &[[LoadReport; 2]], repeated: u32) -> Row {
    let iops = |report: &LoadReport| f64::from(u32::try_from(report.iops).unwrap_or(u32::MAX));
    let ratios: Vec<f64> = samples.iter().map(|[solo, protected]| iops(protected) / iops(solo).max(1.0)).collect();
    let [solo, protected] = [0, 1].map(|mode| {
        let reports: Vec<&LoadReport> = samples.iter().filter_map(|modes| modes.get(mode)).collect();
        Side {
            iops_median: Spread::of(reports.iter().map(|report| iops(report)).collect()).p50,
            latency_us: spread(&reports, |r| [r.p50, r.p99, r.max]),
            flush_us: spread(&reports, |r| [r.flush_p50, r.flush_p99, r.flush_max]),
            errors: reports.iter().map(|report| report.errors).sum(),
        }
    });
    Row {
        load: load.name.into(),
        solo,
        protected,
        iops_ratio_median: Spread::of(ratios.clone()).p50,
        iops_ratio_least: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        iops_ratio_greatest: ratios.iter().copied().fold(0.0, f64::max),
        repeated,
    }
}

/// Percentiles cannot be added up: the median of each over the runs.
fn spread(reports: &[&LoadReport], part: fn(&LoadReport) -> [Duration; 3]) -> Spread {
    let [p50, p99, max] =
        [0, 1, 2].map(|n| Spread::of_us(reports.iter().filter_map(|report| part(report).get(n).copied())));
    Spread { p50: p50.p50, p99: p99.p50, max: max.max }
}

impl Findings for Report {
    const NAME: &'static str = "disk";

    fn tables(&self) -> Vec<Table> {
        let Self { machine, disk_bytes, epoch, runs, seconds, .. } = self;
        let title = format!(
            "a disk of {} MiB without (solo) and with a backup (protected), [epoch] {epoch}; {runs} runs of {seconds} s in turn, medians; {machine}",
            disk_bytes >> 20
        );
        let heads = [
            "load",
            "solo IOPS",
            "protected",
            "ratio",
            "least",
            "most",
            "request p50 us",
            "protected",
            "flush p50 us",
            "protected",
        ];
        let mut table = Table::new(title, &heads);
        for row in &self.rows {
            let whole = |figure: f64| format!("{figure:.0}");
            let two = |figure: f64| format!("{figure:.2}");
            table.row(vec![
                row.load.clone(),
                whole(row.solo.iops_median),
                whole(row.protected.iops_median),
                two(row.iops_ratio_median),
                two(row.iops_ratio_least),
                two(row.iops_ratio_greatest),
                whole(row.solo.latency_us.p50),
                whole(row.protected.latency_us.p50),
                whole(row.solo.flush_us.p50),
                whole(row.protected.flush_us.p50),
            ]);
        }
        vec![table]
    }
}
