//! `ftbench pause`: the pause of the product's own path beside its floor, in one run.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm::Tracking;

use super::figures::{Spread, median, ratio};
use super::floor::{Floor, Round};
use super::subject::{Sample, Subject};
use super::table::{Findings, Table, Target, short};
use super::{BenchError, host_description};

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.pause/2";
/// Rounds before the first that counts: buffers grow, pages are touched for the first time.
const WARM_UP: u32 = 10;
/// Most that a pause may be of its floor, by the median.
const RATIO: f64 = 1.3;
/// Most that its tail may be of the floor's.
const TAIL: f64 = 1.5;
/// Pages from which on a second vCPU, and more RAM, may cost no more than [`RATIO`].
const COMPARED_PAGES: u32 = 1000;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Grid {
    /// Pages that the guest dirties in an epoch.
    pub pages: Vec<u32>,
    /// Sizes of guest RAM, in bytes: the product's guest's and the floor's.
    pub memory_bytes: Vec<u64>,
    /// vCPUs of the machines.
    pub vcpus: Vec<u8>,
    /// Pauses for each combination in each run.
    pub samples: u32,
    /// Runs, each with machines of its own.
    pub runs: u32,
    /// What is done about pages that are written in every epoch.
    pub tracking: Tracking,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub hot_pages: bool,
    pub rows: Vec<Row>,
    pub comparisons: Vec<Comparison>,
}

/// One combination: medians over its runs, `max` is the largest of all. Times are in microseconds.
#[derive(Debug, Serialize, Deserialize)]
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
    pub reentry_us: Spread,
    pub pause_us: Spread,
    pub floor_kick_us: Spread,
    pub floor_state_us: Spread,
    pub floor_dirty_us: Spread,
    pub floor_copy_us: Spread,
    pub floor_whole_us: Spread,
    pub floor_reentry_us: Spread,
    pub floor_us: Spread,
    pub ratio_p50: f64,
    pub tail_ratio: f64,
    pub ratio_before_reentry_p50: f64,
    /// Median pause of each run.
    pub run_pause_p50_us: Vec<f64>,
    /// Median floor of each run.
    pub run_floor_p50_us: Vec<f64>,
}

/// The same pages with more RAM or more vCPUs: the median over the runs of the ratio of both medians.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Comparison {
    pub what: String,
    pub wanted_pages: u32,
    pub ratio_p50: f64,
    pub limit: Option<f64>,
}

/// One combination in one run.
struct Run {
    thin: u32,
    samples: Vec<Sample>,
    rounds: Vec<Round>,
}

#[derive(Clone, Copy)]
struct Case {
    memory_bytes: u64,
    vcpus: u8,
    pages: u32,
}

/// Measures the whole grid; `progress` is told of each combination before it begins.
///
/// # Errors
/// The first thing that goes wrong: no KVM, a guest that does not boot, a checkpoint that is not one.
pub fn run(grid: &Grid, kernel: &Path, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    let mut cases = Vec::new();
    for &vcpus in &grid.vcpus {
        for &memory_bytes in &grid.memory_bytes {
            cases.extend(grid.pages.iter().map(|&pages| Case { memory_bytes, vcpus, pages }));
        }
    }
    let mut runs: Vec<Vec<Run>> = cases.iter().map(|_| Vec::new()).collect();
    for number in 1..=grid.runs {
        for (case, runs) in cases.iter().zip(&mut runs) {
            let Case { memory_bytes, vcpus, pages } = case;
            let words = format!("{} MiB, {vcpus} vCPU, {pages} pages, {} pauses", memory_bytes >> 20, grid.samples);
            progress(&format!("run {number} of {}: {words}", grid.runs));
            runs.push(one(grid, kernel, *case)?);
        }
    }
    let rows: Vec<Row> = cases.iter().zip(&runs).map(|(case, runs)| summary(grid, *case, runs)).collect();
    let comparisons = compare(&rows);
    let hot_pages = grid.tracking == Tracking::HotPages;
    Ok(Report { schema: SCHEMA.into(), machine, hot_pages, rows, comparisons })
}

fn one(grid: &Grid, kernel: &Path, case: Case) -> Result<Run, BenchError> {
    let Case { memory_bytes, vcpus, pages } = case;
    let mut subject = Subject::start(kernel, vcpus, memory_bytes, pages, grid.tracking)?;
    let mut floor = Floor::start(vcpus, memory_bytes)?;
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
    Ok(Run { thin, samples, rounds })
}

fn summary(grid: &Grid, case: Case, runs: &[Run]) -> Row {
    let of = |part: fn(&Sample) -> Duration| {
        Spread::of_runs(runs.iter().map(|run| Spread::of_us(run.samples.iter().map(part))))
    };
    let floor = |part: fn(&Round) -> Duration| {
        Spread::of_runs(runs.iter().map(|run| Spread::of_us(run.rounds.iter().map(part))))
    };
    let count = |s: &Sample| f64::from(u32::try_from(s.pages).unwrap_or(u32::MAX));
    let both = |run: &Run| {
        let pause = Spread::of_us(run.samples.iter().map(|s| s.seen));
        (pause, Spread::of_us(run.rounds.iter().map(|r| r.whole + r.reentry)))
    };
    let pairs: Vec<(Spread, Spread)> = runs.iter().map(both).collect();
    let middle = |of: fn(&(Spread, Spread)) -> f64| median(pairs.iter().map(of).collect());
    let (whole_us, floor_whole_us) = (of(|s| s.pause.whole), floor(|r| r.whole));
    Row {
        memory_bytes: case.memory_bytes,
        vcpus: case.vcpus,
        samples: grid.samples,
        wanted_pages: case.pages,
        thin_epochs: runs.iter().map(|run| run.thin).sum(),
        dirty_pages: Spread::of_runs(runs.iter().map(|run| Spread::of(run.samples.iter().map(count).collect()))),
        stop_us: of(|s| s.pause.machine.stop.quiesce + s.pause.machine.stop.kick),
        seal_us: of(|s| s.pause.seal),
        capture_us: of(|s| s.pause.machine.capture),
        dirty_us: of(|s| s.pause.machine.dirty),
        stage_us: of(|s| s.pause.stage),
        resume_us: of(|s| s.pause.machine.resume),
        whole_us,
        reentry_us: of(|s| s.seen.saturating_sub(s.pause.whole)),
        pause_us: of(|s| s.seen),
        floor_kick_us: floor(|r| r.kick),
        floor_state_us: floor(|r| r.state),
        floor_dirty_us: floor(|r| r.dirty),
        floor_copy_us: floor(|r| r.copy),
        floor_whole_us,
        floor_reentry_us: floor(|r| r.reentry),
        floor_us: floor(|r| r.whole + r.reentry),
        ratio_p50: middle(|(pause, floor)| ratio(pause.p50, floor.p50)),
        tail_ratio: middle(|(pause, floor)| ratio(pause.tail(), floor.tail())),
        ratio_before_reentry_p50: ratio(whole_us.p50, floor_whole_us.p50),
        run_pause_p50_us: pairs.iter().map(|(pause, _)| pause.p50).collect(),
        run_floor_p50_us: pairs.iter().map(|(_, floor)| floor.p50).collect(),
    }
}

/// Every row with more RAM, or more vCPUs, beside the one with the least of it.
fn compare(rows: &[Row]) -> Vec<Comparison> {
    let mut found = Vec::new();
    let mut add = |what: String, more: &Row, less: &Row, limited: bool| {
        let ratios = more.run_pause_p50_us.iter().zip(&less.run_pause_p50_us).map(|(more, less)| ratio(*more, *less));
        let (ratio_p50, wanted_pages) = (median(ratios.collect()), more.wanted_pages);
        found.push(Comparison { what, wanted_pages, ratio_p50, limit: limited.then_some(RATIO) });
    };
    for more in rows {
        let same_pages = || rows.iter().filter(|row| row.wanted_pages == more.wanted_pages);
        let less = same_pages().filter(|row| row.vcpus == more.vcpus).min_by_key(|row| row.memory_bytes);
        if let Some(less) = less.filter(|less| less.memory_bytes < more.memory_bytes) {
            let (one, other) = (more.memory_bytes >> 20, less.memory_bytes >> 20);
            let what = format!("{one} MiB over {other} MiB, {} vCPU", more.vcpus);
            add(what, more, less, more.wanted_pages == COMPARED_PAGES);
        }
        let less = same_pages().filter(|row| row.memory_bytes == more.memory_bytes).min_by_key(|row| row.vcpus);
        if let Some(less) = less.filter(|less| less.vcpus < more.vcpus) {
            let what = format!("{} vCPUs over {}, {} MiB", more.vcpus, less.vcpus, more.memory_bytes >> 20);
            add(what, more, less, more.wanted_pages >= COMPARED_PAGES);
        }
    }
    found
}

impl Findings for Report {
    const NAME: &'static str = "pause";

    fn tables(&self) -> Vec<Table> {
        let heads = ["memory, vCPUs, pages", "pause", "p99", "max", "floor", "p99", "max", "pause/floor", "tail/tail"];
        let title = format!(
            "pause until the guest was seen to run, beside its floor, us; medians of {} runs; {}",
            self.rows.first().map_or(0, |row| row.run_pause_p50_us.len()),
            self.machine
        );
        let mut all = Table::new(title, &heads);
        for row in &self.rows {
            let mut cells = vec![row.name()];
            cells.extend(row.pause_us.cells());
            cells.extend(row.floor_us.cells());
            cells.extend([row.ratio_p50, row.tail_ratio].map(|ratio| format!("{ratio:.2}")));
            all.row(cells);
        }
        let mut tables = vec![all];
        if !self.comparisons.is_empty() {
            let mut table = Table::new("the same pages, p50 by p50", &["", "pages", "ratio"]);
            for Comparison { what, wanted_pages, ratio_p50, limit: _ } in &self.comparisons {
                table.row(vec![what.clone(), wanted_pages.to_string(), format!("{ratio_p50:.2}")]);
            }
            tables.push(table);
        }
        tables.extend(self.rows.iter().map(Row::parts));
        tables
    }

    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for row in &self.rows {
            let name = row.name();
            targets.push(Target::at_most(format!("pause / floor, p50; {name}"), row.ratio_p50, RATIO));
            targets.push(Target::at_most(format!("p99/p50 of both; {name}"), row.tail_ratio, TAIL));
        }
        for Comparison { what, wanted_pages, ratio_p50, limit } in &self.comparisons {
            let target = |limit| Target::at_most(format!("{what}; {wanted_pages} pages"), *ratio_p50, limit);
            targets.extend(limit.map(target));
        }
        targets
    }
}

impl Row {
    fn name(&self) -> String {
        format!("{} MiB, {}, {}", self.memory_bytes >> 20, self.vcpus, self.wanted_pages)
    }

    fn parts(&self) -> Table {
        let title = format!(
            "parts, us; {} MiB, {} vCPU, {} pages wanted, {} to {} dirty (p50, max); {} pauses a run, {} thin epochs left out",
            self.memory_bytes >> 20,
            self.vcpus,
            self.wanted_pages,
            short(self.dirty_pages.p50),
            short(self.dirty_pages.max),
            self.samples,
            self.thin_epochs
        );
        let mut table = Table::new(title, &["", "p50", "p99", "max"]);
        for (name, spread) in self.lines() {
            let mut cells = vec![name.to_owned()];
            cells.extend(spread.cells());
            table.row(cells);
        }
        table.row(vec!["pause/floor".into(), format!("{:.2}", self.ratio_p50), String::new(), String::new()]);
        let before = format!("{:.2}", self.ratio_before_reentry_p50);
        table.row(vec!["whole/whole".into(), before, String::new(), String::new()]);
        table
    }

    fn lines(&self) -> [(&'static str, Spread); 15] {
        [
            ("stop", self.stop_us),
            ("seal", self.seal_us),
            ("capture", self.capture_us),
            ("dirty", self.dirty_us),
            ("stage", self.stage_us),
            ("resume", self.resume_us),
            ("whole", self.whole_us),
            ("until it runs", self.reentry_us),
            ("pause", self.pause_us),
            ("floor: kick", self.floor_kick_us),
            ("state", self.floor_state_us),
            ("dirty log", self.floor_dirty_us),
            ("copy", self.floor_copy_us),
            ("re-entry", self.floor_reentry_us),
            ("floor", self.floor_us),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(memory_bytes: u64, vcpus: u8, pages: u32, pauses: &[f64]) -> Row {
        let nothing = summary(
            &Grid {
                pages: Vec::new(),
                memory_bytes: Vec::new(),
                vcpus: Vec::new(),
                samples: 0,
                runs: 0,
                tracking: Tracking::Plain,
            },
            Case { memory_bytes, vcpus, pages },
            &[],
        );
        Row { run_pause_p50_us: pauses.to_vec(), ..nothing }
    }

    #[test]
    fn more_is_compared_with_the_least_run_by_run() {
        let (little, much) = (256 << 20, 8 << 30);
        let rows = [
            row(little, 1, 100, &[1.0, 1.0, 1.0]),
            row(little, 1, 1000, &[1.0, 10.0, 2.0]),
            row(much, 1, 1000, &[2.0, 11.0, 3.0]),
            row(little, 2, 1000, &[1.2, 30.0, 3.0]),
            row(little, 2, 100, &[5.0, 5.0, 5.0]),
        ];
        let found = compare(&rows);
        let figures: Vec<_> = found.iter().map(|c| (c.wanted_pages, c.ratio_p50, c.limit)).collect();
        assert_eq!(figures, [(1000, 1.5, Some(RATIO)), (1000, 1.5, Some(RATIO)), (100, 5.0, None)]);
        assert!(found[0].what.starts_with("8192 MiB over 256 MiB") && found[1].what.starts_with("2 vCPUs over 1"));
    }
}
