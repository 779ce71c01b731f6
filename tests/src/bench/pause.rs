//! `ftbench pause`: the pause of the product's own path beside its floor, in one run.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use super::figures::Spread;
use super::floor::{Floor, Round};
use super::subject::{Sample, Subject};
use super::{BenchError, host_description};
use vmm::Tracking;

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.pause/1";
/// Rounds before the first that counts: buffers grow, pages are touched for the first time.
const WARM_UP: u32 = 10;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Grid {
    /// Pages that the guest dirties in an epoch.
    pub pages: Vec<u32>,
    /// Sizes of guest RAM, in bytes.
    pub memory_bytes: Vec<u64>,
    /// Pauses for each combination.
    pub samples: u32,
    /// vCPUs of the machine.
    pub vcpus: u8,
    /// What is done about pages that are written in every epoch.
    pub tracking: Tracking,
}

/// The result of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// Processors and kernel of the host.
    pub machine: String,
    /// One for each combination.
    pub rows: Vec<Row>,
}

/// One combination. Times are in microseconds.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub memory_bytes: u64,
    pub vcpus: u8,
    pub samples: u32,
    pub wanted_pages: u32,
    pub thin_epochs: u32,
    pub dirty_pages: Spread,
    pub stop_us: Spread,
    pub seal_us: Spread,
    pub capture_us: Spread,
    pub dirty_us: Spread,
    pub stage_us: Spread,
    pub resume_us: Spread,
    pub whole_us: Spread,
    pub floor_kick_us: Spread,
    pub floor_state_us: Spread,
    pub floor_dirty_us: Spread,
    pub floor_copy_us: Spread,
    pub floor_reentry_us: Spread,
    pub floor_us: Spread,
    pub ratio_p50: f64,
}

/// Measures the whole grid; `progress` is told of each row before it begins.
///
/// # Errors
/// The first thing that goes wrong: no KVM, a guest that does not boot, a checkpoint that is not one.
pub fn run(grid: &Grid, kernel: &Path, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let mut rows = Vec::new();
    for &memory_bytes in &grid.memory_bytes {
        for &pages in &grid.pages {
            progress(&format!("{} MiB, {pages} pages, {} pauses", memory_bytes >> 20, grid.samples));
            rows.push(row(grid, kernel, memory_bytes, pages)?);
        }
    }
    Ok(Report { schema: SCHEMA, machine: host_description(), rows })
}

fn row(grid: &Grid, kernel: &Path, memory_bytes: u64, pages: u32) -> Result<Row, BenchError> {
    let mut subject = Subject::start(kernel, grid.vcpus, memory_bytes, pages, grid.tracking)?;
    let mut floor = Floor::start(grid.vcpus, memory_bytes)?;
    let (mut samples, mut rounds, mut thin, mut n) = (Vec::new(), Vec::new(), 0, 0);
    while n < WARM_UP + grid.samples {
        // One pause of each in turn, for the same number of pages: what disturbs the host disturbs both.
        let sample = subject.checkpoint()?;
        if sample.pages < usize::try_from(pages).unwrap_or(usize::MAX) / 2 + 2 {
            // The guest got too little processor time to do its round: no pause of the size that is asked for.
            thin += 1;
            if thin > WARM_UP + grid.samples {
                return Err(BenchError::Wrong(format!("the guest does not get to dirty {pages} pages an epoch")));
            }
            continue;
        }
        let round = subject.while_stopped(|| floor.round(sample.pages))?;
        if n >= WARM_UP {
            samples.push(sample);
            rounds.push(round);
        }
        n += 1;
    }
    assert_eq!((samples.len(), rounds.len()), (grid.samples as usize, grid.samples as usize), "pauses in pairs");
    Ok(Row { thin_epochs: thin, ..summary(grid, memory_bytes, pages, &samples, &rounds) })
}

fn summary(grid: &Grid, memory_bytes: u64, wanted_pages: u32, samples: &[Sample], rounds: &[Round]) -> Row {
    let of = |part: fn(&Sample) -> std::time::Duration| Spread::of_us(samples.iter().map(part));
    let floor = |part: fn(&Round) -> std::time::Duration| Spread::of_us(rounds.iter().map(part));
    let count = |s: &Sample| f64::from(u32::try_from(s.pages).unwrap_or(u32::MAX));
    let (whole_us, floor_us) = (of(|s| s.pause.whole), floor(|r| r.whole));
    Row {
        memory_bytes,
        vcpus: grid.vcpus,
        samples: grid.samples,
        wanted_pages,
        thin_epochs: 0,
        dirty_pages: Spread::of(samples.iter().map(count).collect()),
        stop_us: of(|s| s.pause.machine.stop.quiesce + s.pause.machine.stop.kick),
        seal_us: of(|s| s.pause.seal),
        capture_us: of(|s| s.pause.machine.capture),
        dirty_us: of(|s| s.pause.machine.dirty),
        stage_us: of(|s| s.pause.stage),
        resume_us: of(|s| s.pause.machine.resume),
        whole_us,
        floor_kick_us: floor(|r| r.kick),
        floor_state_us: floor(|r| r.state),
        floor_dirty_us: floor(|r| r.dirty),
        floor_copy_us: floor(|r| r.copy),
        floor_reentry_us: floor(|r| r.reentry),
        floor_us,
        ratio_p50: whole_us.p50 / floor_us.p50,
    }
}

impl Report {
    /// The table for people.
    ///
    /// # Panics
    /// Never: a string can be written to.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = format!("pause of the product and its floor, us; {}\n", self.machine);
        for row in &self.rows {
            let Spread { p50, p99, max } = row.dirty_pages;
            let (memory, vcpus, samples) = (row.memory_bytes >> 20, row.vcpus, row.samples);
            writeln!(out, "\n{memory} MiB, {vcpus} vCPU, {samples} pauses ({} thin epochs left out); dirty pages p50 {p50} p99 {p99} max {max}", row.thin_epochs)
                .expect("a string");
            writeln!(out, "{:>16} {:>10} {:>10} {:>10}", "", "p50", "p99", "max").expect("a string");
            for (name, spread) in row.lines() {
                let Spread { p50, p99, max } = spread;
                writeln!(out, "{name:>16} {p50:>10.1} {p99:>10.1} {max:>10.1}").expect("a string");
            }
            writeln!(out, "{:>16} {:>10.2}", "whole/floor", row.ratio_p50).expect("a string");
        }
        out
    }
}

impl Row {
    fn lines(&self) -> [(&'static str, Spread); 13] {
        [
            ("stop", self.stop_us),
            ("seal", self.seal_us),
            ("capture", self.capture_us),
            ("dirty", self.dirty_us),
            ("stage", self.stage_us),
            ("resume", self.resume_us),
            ("whole", self.whole_us),
            ("floor: kick", self.floor_kick_us),
            ("state", self.floor_state_us),
            ("dirty log", self.floor_dirty_us),
            ("copy", self.floor_copy_us),
            ("floor", self.floor_us),
            ("(re-entry)", self.floor_reentry_us),
        ]
    }
}
