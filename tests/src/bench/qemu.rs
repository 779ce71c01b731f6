//! `ftbench qemu`: the downtime of QEMU's live migration beside the pause of the product, with the same guest under the same load.
//!
//! QEMU says its downtime in whole milliseconds. The guest's own silence is finer: both QEMUs have their guest RAM in files that this process maps, too, and
//! samples of one word that the guest changes all the time ([`Pulse`]) tell when it stood still here and when it ran on there.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use serde_json::json;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory as _};
use vmm::Tracking;

use super::figures::{Spread, median, ratio};
use super::pairs::order;
use super::pulse::Pulse;
use super::qmp::Qmp;
use super::subject::{RATE, Subject};
use super::table::{Findings, Table, Target};
use super::{BenchError, host, host_description};
use crate::real::daemon::Daemon;
use crate::real::network::Network;
use crate::real::qemu::{Machine, command};
use crate::real::{Node, tools};

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.qemu/1";
/// RAM of the guest, in MiB: what [`command`] gives it.
const MEMORY_MIB: u64 = 256;
/// Pauses before the first that counts.
const WARM_UP: u32 = 10;
/// How long the guest dirties its pages before it is migrated.
const LOAD: Duration = Duration::from_secs(1);
/// How long a migration may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two samples of the guest's memory: seldom enough not to take a processor from QEMU.
const SAMPLE: Duration = Duration::from_micros(50);
/// Moments at which the guest's pulse is looked for, but for the first.
const PULSE_TRIES: u32 = 5;
/// How long the guest runs on before its samples are looked at.
const AFTERWARDS: Duration = Duration::from_millis(100);
/// As fast as memory: nothing is limited.
const BANDWIDTH: u64 = 100 << 30;
/// How many times our pause QEMU's downtime is to be at least.
const TIMES: f64 = 5.0;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Pages that the guest dirties over and over.
    pub pages: Vec<u32>,
    /// Migrations of each.
    pub runs: u32,
    /// Pauses beside each.
    pub samples: u32,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub qemu: String,
    pub memory_bytes: u64,
    pub rows: Vec<Row>,
}

/// One number of pages. Medians over its runs; ratios are the medians of each run's.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub wanted_pages: u32,
    pub pause_us: Spread,
    pub qemu_silence_us: Spread,
    pub qemu_downtime_ms: f64,
    pub silence_ratio: f64,
    pub downtime_ratio: f64,
    pub runs: Vec<Run>,
}

/// Some pauses and one migration.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Run {
    pub pause_us: Spread,
    pub qemu_silence_least_us: f64,
    pub qemu_silence_most_us: f64,
    pub qemu_downtime_ms: u64,
    pub qemu_downtime_limit_ms: u64,
    pub qemu_total_ms: u64,
    pub qemu_dirty_syncs: u64,
}

/// Measures; `progress` is told of each run. Needs root, for namespaces.
///
/// # Errors
/// The first thing that goes wrong.
pub fn run(plan: &Plan, image: &Path, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    tools::require("qemu-system-x86_64")?;
    let mut rows: Vec<Vec<Run>> = vec![Vec::new(); plan.pages.len()];
    for number in 1..=plan.runs {
        for (&pages, runs) in plan.pages.iter().zip(&mut rows) {
            let pause_us = pauses(plan, image, pages)?;
            let run = Run { pause_us, ..migrate(image, pages)? };
            progress(&format!(
                "run {number} of {}, {pages} pages: pause {:.0} us; QEMU silent for {:.0} to {:.0} us, says {} ms",
                plan.runs, pause_us.p50, run.qemu_silence_least_us, run.qemu_silence_most_us, run.qemu_downtime_ms
            ));
            runs.push(run);
        }
    }
    let rows = plan.pages.iter().zip(rows).map(|(&pages, runs)| row(pages, runs)).collect();
    let memory_bytes = MEMORY_MIB << 20;
    Ok(Report { schema: SCHEMA.into(), machine, qemu: version()?, memory_bytes, rows })
}

fn row(wanted_pages: u32, runs: Vec<Run>) -> Row {
    let middle = |of: fn(&Run) -> f64| median(runs.iter().map(of).collect());
    let downtime = |run: &Run| run.qemu_downtime_ms as f64;
    Row {
        wanted_pages,
        pause_us: Spread::of_runs(runs.iter().map(|run| run.pause_us)),
        qemu_silence_us: Spread::of(runs.iter().map(|run| run.qemu_silence_least_us).collect()),
        qemu_downtime_ms: middle(downtime),
        silence_ratio: middle(|run| ratio(run.qemu_silence_least_us, run.pause_us.p50)),
        downtime_ratio: middle(|run| ratio(run.qemu_downtime_ms as f64 * 1e3, run.pause_us.p50)),
        runs,
    }
}

fn version() -> Result<String, BenchError> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output().map_err(host("qemu-system-x86_64"))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

/// Pauses of the product with the same guest, load and RAM.
fn pauses(plan: &Plan, image: &Path, pages: u32) -> Result<Spread, BenchError> {
    let mut subject = Subject::start(image, 1, MEMORY_MIB << 20, pages, Tracking::HotPages)?;
    let mut seen = Vec::new();
    for _ in 0..WARM_UP {
        subject.checkpoint()?;
    }
    while seen.len() < plan.samples as usize {
        let sample = subject.checkpoint()?;
        // As in `pause`: an epoch in which the guest had no processor is none of this size.
        if sample.pages >= usize::try_from(pages).unwrap_or(usize::MAX) / 2 {
            seen.push(sample.seen);
        }
    }
    Ok(Spread::of_us(seen.into_iter()))
}

/// Guest RAM of a QEMU, in a file of memory that this process has, too.
struct SharedRam {
    file: File,
    map: MmapRegion,
}

impl SharedRam {
    fn new() -> Result<Self, BenchError> {
        let bytes = MEMORY_MIB << 20;
        let memfd = rustix::fs::memfd_create("qemu-ram", MemfdFlags::CLOEXEC).map_err(host("memfd_create"))?;
        rustix::fs::ftruncate(&memfd, bytes).map_err(host("ftruncate"))?;
        let file = File::from(memfd);
        let also = file.try_clone().map_err(host("dup"))?;
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        let map = MmapRegion::from_file(FileOffset::new(also, 0), size)
            .map_err(|error| BenchError::Wrong(format!("QEMU's memory: {error}")))?;
        Ok(Self { file, map })
    }

    /// What makes a QEMU use it, with a monitor at `monitor`.
    fn command(&self, image: &Path, monitor: &Path) -> Command {
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd());
        let mut command = command(image, "", &[]);
        command.args(["-machine", "memory-backend=ram", "-object"]);
        command.arg(format!("memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={path},share=on"));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        command
    }

    fn word(&self, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let word =
            self.map.as_volatile_slice().get_atomic_ref::<AtomicU64>(at).map(|word| word.load(Ordering::Relaxed));
        word.expect("an aligned word of the mapping")
    }

    /// As in [`Subject`]: more than once, because on a busy host the guest may not have run.
    fn find_pulse(&self) -> Result<Pulse, BenchError> {
        let mut tries = 0..PULSE_TRIES;
        loop {
            match Pulse::find(&self.changing()?, |at| self.word(at)) {
                Err(_) if tries.next().is_some() => {}
                found => return found,
            }
        }
    }

    /// Words that differ from one moment to the next. Reads the file, whose holes so stay holes.
    fn changing(&self) -> Result<Vec<u64>, BenchError> {
        let mut before = vec![0; self.map.len()];
        self.file.read_exact_at(&mut before, 0).map_err(host("QEMU's memory"))?;
        let mut after = vec![0; self.map.len()];
        self.file.read_exact_at(&mut after, 0).map_err(host("QEMU's memory"))?;
        let words = before.as_chunks::<8>().0.iter().zip(after.as_chunks::<8>().0);
        Ok((0..).step_by(8).zip(words).filter(|(_, (old, new))| old != new).map(|(at, _)| at).collect())
    }
}

/// The word at one moment, in both guests.
#[derive(Clone, Copy, Debug)]
struct Sampled {
    at: Duration,
    here: u64,
    there: u64,
}

/// One migration of a guest that dirties so many pages; without our own figures.
fn migrate(image: &Path, pages: u32) -> Result<Run, BenchError> {
    let network = Network::new()?;
    let dir = tempfile::tempdir().map_err(host("a directory"))?;
    let path = |name: &str| dir.path().join(name);
    let (from, to) = (SharedRam::new()?, SharedRam::new()?);
    let (from_monitor, to_monitor, stream) = (path("from.qmp"), path("to.qmp"), path("stream"));
    let mut machine = Machine::boot(&network, from.command(image, &from_monitor), &path("from.log"))?;
    let mut waiting = to.command(image, &to_monitor);
    waiting.arg("-incoming").arg(format!("unix:{}", stream.display()));
    let mut there = Daemon::start(Node::B, network.host(Node::B), waiting, &path("to.log"))?;
    order(&mut machine.connection, &["FT.WORK", "1"])?;
    order(&mut machine.connection, &["FT.DIRTY", &RATE.to_string(), &pages.to_string()])?;
    std::thread::sleep(LOAD);
    let pulse = from.find_pulse()?;
    let mut source = Qmp::connect(&from_monitor)?;
    // Ready to take the stream.
    drop(Qmp::connect(&to_monitor)?);
    // Time enough for the pages that are dirty all the time, and no more: a guest that is stopped while much is left is silent for longer.
    let limit = 10 + u64::from(pages) / 100;
    source.execute("migrate-set-parameters", json!({ "downtime-limit": limit, "max-bandwidth": BANDWIDTH }))?;
    let done = AtomicBool::new(false);
    let (said, samples) = std::thread::scope(|scope| {
        let sampling = scope.spawn(|| sample(&from, &to, pulse, &done));
        let said = migration(&mut source, &stream);
        std::thread::sleep(AFTERWARDS);
        done.store(true, Ordering::SeqCst);
        (said, sampling.join())
    });
    there.check()?;
    let (said, samples) = (said?, samples.map_err(|_| BenchError::Wrong("the sampling thread failed".into()))?);
    let silence = silence(&samples);
    let (least, most) = silence.ok_or_else(|| BenchError::Wrong("the guest was not seen to run on there".into()))?;
    let number = |field: &str| said[field].as_u64().unwrap_or_default();
    Ok(Run {
        pause_us: Spread::default(),
        qemu_silence_least_us: least.as_secs_f64() * 1e6,
        qemu_silence_most_us: most.as_secs_f64() * 1e6,
        qemu_downtime_ms: number("downtime"),
        qemu_downtime_limit_ms: limit,
        qemu_total_ms: number("total-time"),
        qemu_dirty_syncs: said["ram"]["dirty-sync-count"].as_u64().unwrap_or_default(),
    })
}

/// Migrates and waits for the end; what QEMU then says about it.
fn migration(source: &mut Qmp, stream: &Path) -> Result<serde_json::Value, BenchError> {
    source.execute("migrate", json!({ "uri": format!("unix:{}", stream.display()) }))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = source.execute("query-migrate", json!({}))?;
        match said["status"].as_str() {
            Some("completed") => return Ok(said),
            Some("failed" | "cancelled") => return Err(BenchError::Wrong(format!("QEMU's migration: {said}"))),
            _ if Instant::now() >= deadline => {
                return Err(BenchError::Wrong(format!("QEMU's migration does not end within {PATIENCE:?}: {said}")));
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn sample(from: &SharedRam, to: &SharedRam, pulse: Pulse, done: &AtomicBool) -> Vec<Sampled> {
    let (began, mut samples) = (Instant::now(), Vec::new());
    while !done.load(Ordering::SeqCst) {
        let at = began.elapsed();
        samples.push(Sampled { at, here: from.word(pulse.0), there: to.word(pulse.0) });
        std::thread::sleep(SAMPLE);
    }
    samples
}

/// For how long the guest stood: at least, and at most.
fn silence(samples: &[Sampled]) -> Option<(Duration, Duration)> {
    let stopped = samples.windows(2).rposition(|pair| pair[0].here != pair[1].here)? + 1;
    let (last, after) = (samples.last()?.here, samples.get(stopped..)?);
    // There, the word changes when its page arrives, perhaps more than once; in the end it has its last value from here. The guest runs when it has another one.
    let runs = match after.iter().position(|sample| sample.there == last) {
        Some(arrived) => arrived + after.get(arrived..)?.iter().position(|sample| sample.there != last)?,
        // It ran on before that was seen: since the word changes from each sample to the next.
        None => {
            let changes = |four: &[Sampled]| four.windows(2).all(|pair| pair[0].there != pair[1].there);
            after.windows(4).position(changes)? + 1
        }
    };
    let runs = stopped + runs;
    let at = |index: usize| samples.get(index).map(|sample| sample.at);
    Some((at(runs - 1)?.saturating_sub(at(stopped)?), at(runs)?.saturating_sub(at(stopped - 1)?)))
}

impl Findings for Report {
    const NAME: &'static str = "qemu";

    fn tables(&self) -> Vec<Table> {
        let title = format!(
            "our pause beside the downtime of QEMU's live migration, {} MiB, 1 vCPU; medians of {} runs; {}; {}",
            self.memory_bytes >> 20,
            self.rows.first().map_or(0, |row| row.runs.len()),
            self.qemu,
            self.machine
        );
        let heads = ["pages", "pause p50 us", "p99", "QEMU silent us", "max", "ratio", "QEMU says ms", "ratio"];
        let mut table = Table::new(title, &heads);
        for row in &self.rows {
            table.row(vec![
                row.wanted_pages.to_string(),
                format!("{:.0}", row.pause_us.p50),
                format!("{:.0}", row.pause_us.p99),
                format!("{:.0}", row.qemu_silence_us.p50),
                format!("{:.0}", row.qemu_silence_us.max),
                format!("{:.1}", row.silence_ratio),
                format!("{:.0}", row.qemu_downtime_ms),
                format!("{:.1}", row.downtime_ratio),
            ]);
        }
        vec![table]
    }

    fn targets(&self) -> Vec<Target> {
        let both = |row: &Row| {
            let pages = row.wanted_pages;
            [
                Target::at_least(format!("QEMU's silence / our pause, p50; {pages} pages"), row.silence_ratio, TIMES),
                Target::at_least(format!("QEMU's downtime / our pause, p50; {pages} pages"), row.downtime_ratio, TIMES),
            ]
        };
        self.rows.iter().flat_map(both).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(here: &[u64], there: &[u64]) -> Vec<Sampled> {
        let at = |n: u32| Duration::from_micros(100) * n;
        (0..).zip(here.iter().zip(there)).map(|(n, (&here, &there))| Sampled { at: at(n), here, there }).collect()
    }

    #[test]
    fn silence_is_from_the_last_change_here_to_the_first_run_there() {
        // Stands from the fourth on, arrives there in the seventh, runs from the ninth.
        let here = [1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4];
        let there = [0, 0, 2, 2, 2, 3, 4, 4, 5, 6, 7, 8];
        let us = Duration::from_micros;
        assert_eq!(silence(&samples(&here, &there)), Some((us(400), us(600))));
        // It ran on before it was seen to have arrived.
        let there = [0, 0, 2, 2, 2, 2, 2, 5, 6, 7, 8, 9];
        assert_eq!(silence(&samples(&here, &there)), Some((us(300), us(500))));
        // It never did.
        assert_eq!(silence(&samples(&here, &[4; 12])), None);
        assert_eq!(silence(&[]), None);
    }
}
