//! `ftbench throughput`: `redis-benchmark` against the guest, unprotected, with fixed epochs and with such as follow the work, in turn.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::figures::{Spread, median, ratio};
use super::pairs::{Bench, Checkpoints, Mode};
use super::table::{Findings, Table, Target};
use super::{BenchError, host_description};
use crate::real::artifacts::Artifacts;
use crate::real::network::{GUEST_IP, GUEST_PORT};
use crate::real::tools;

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.throughput/3";
/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(300);
/// Requests of the trial before a run, for each that ten connections have on their way at once: twenty round trips.
const TRIAL: u32 = 200;

/// A load of `redis-benchmark`, which has no more requests on their way than these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Connections (`-c`).
    pub connections: u32,
    /// Requests that each has on its way at once (`-P`).
    pub pipeline: u32,
}

impl std::str::FromStr for Load {
    type Err = String;

    /// `CONNECTIONSxPIPELINE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('x').and_then(|(c, p)| Some((c.parse().ok()?, p.parse().ok()?)));
        match numbers {
            Some((connections @ 1..=128, pipeline @ 1..=1_000)) => Ok(Self { connections, pipeline }),
            _ => Err(format!(
                "{text:?} is no load: connections (to 128) x requests under way on each (to 1000), as in 10x16"
            )),
        }
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In this order in each round; the first is what the others are compared with.
    pub modes: Vec<Mode>,
    /// Rounds.
    pub rounds: u32,
    /// Loads.
    pub loads: Vec<Load>,
    /// About how long each run takes.
    pub span: Duration,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub seconds_per_run: f64,
    pub rows: Vec<Row>,
}

/// One mode under one load. Medians over its runs.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub mode: String,
    pub connections: u32,
    pub pipeline: u32,
    pub requests_per_second: f64,
    pub ratio_to_first: f64,
    pub reply_us: Spread,
    pub runs: Vec<Run>,
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Run {
    pub requests: u32,
    pub requests_per_second: f64,
    pub reply_us: Spread,
    pub checkpoints: Checkpoints,
}

/// Measures all modes in turn; `progress` is told of each run.
///
/// # Errors
/// The first thing that goes wrong.
pub fn run(plan: &Plan, artifacts: &Artifacts, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    tools::require("redis-benchmark")?;
    plan.modes.iter().try_for_each(|mode| mode.check(artifacts))?;
    let mut runs = vec![vec![Vec::new(); plan.loads.len()]; plan.modes.len()];
    for round in 1..=plan.rounds {
        for (mode, runs) in plan.modes.iter().zip(&mut runs) {
            let bench = Bench::start(artifacts, mode, "256MiB", "")?;
            for (&load, runs) in plan.loads.iter().zip(runs) {
                let run = one(&bench, load, plan.span)?;
                let (rate, Load { connections, pipeline }) = (run.requests_per_second, load);
                progress(&format!(
                    "round {round}, {}, -c {connections} -P {pipeline}: {rate:.0} requests/s",
                    mode.name
                ));
                runs.push(run);
            }
        }
    }
    let middle = |runs: &[Run]| median(runs.iter().map(|run| run.requests_per_second).collect());
    let first: Vec<f64> = runs.first().into_iter().flatten().map(|runs| middle(runs)).collect();
    let mut rows = Vec::new();
    for (mode, runs) in plan.modes.iter().zip(runs) {
        for ((&Load { connections, pipeline }, runs), first) in plan.loads.iter().zip(runs).zip(&first) {
            let requests_per_second = middle(&runs);
            let (mode, ratio_to_first) = (mode.name.clone(), ratio(requests_per_second, *first));
            let reply_us = Spread::of_runs(runs.iter().map(|run| run.reply_us));
            rows.push(Row { mode, connections, pipeline, requests_per_second, ratio_to_first, reply_us, runs });
        }
    }
    let seconds_per_run = plan.span.as_secs_f64();
    Ok(Report { schema: SCHEMA.into(), machine, seconds_per_run, rows })
}

/// One run of `redis-benchmark` that takes about so long: a short one before tells how many requests these are.
///
/// # Errors
/// It failed, or the state of the pair changed meanwhile.
pub fn one(bench: &Bench, load: Load, span: Duration) -> Result<Run, BenchError> {
    let trial = TRIAL * load.pipeline * load.connections.div_ceil(10);
    let (rate, _) = lay(bench, load, trial)?;
    let requests = requests_in(rate, span).max(trial);
    let (requests_per_second, reply_us) = lay(bench, load, requests)?;
    Ok(Run { requests, requests_per_second, reply_us, checkpoints: Checkpoints::of(&bench.status()?) })
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thousands to some millions")]
fn requests_in(rate: f64, span: Duration) -> u32 {
    (rate * span.as_secs_f64()).round() as u32
}

fn lay(bench: &Bench, Load { connections, pipeline }: Load, requests: u32) -> Result<(f64, Spread), BenchError> {
    let numbers = [u32::from(GUEST_PORT), connections, pipeline, requests].map(|number| number.to_string());
    let [port, connections, pipeline, requests] = &numbers;
    let to = ["-h", GUEST_IP, "-p", port, "-t", "set", "-r", "10000", "--csv"];
    let words: Vec<&str> = to.into_iter().chain(["-n", requests, "-c", connections, "-P", pipeline]).collect();
    let said = bench.pair.run_client("redis-benchmark", &words, LIMIT)?.success("redis-benchmark")?;
    parse(&said).ok_or_else(|| BenchError::Wrong(format!("redis-benchmark said {said:?}")))
}

/// `"SET","rps","avg","min","p50","p95","p99","max"`, times in milliseconds, after a line with the names.
fn parse(csv: &str) -> Option<(f64, Spread)> {
    let line = csv.lines().find(|line| line.starts_with("\"SET\""))?;
    let fields: Vec<f64> = line.split(',').skip(1).filter_map(|field| field.trim_matches('"').parse().ok()).collect();
    let [rate, _average, _least, p50, _p95, p99, max] = fields.as_slice() else { return None };
    Some((*rate, Spread { p50: p50 * 1e3, p99: p99 * 1e3, max: max * 1e3 }))
}

/// What a guest is to keep of its requests a second under [`TARGET_LOAD`], where the target of a mode is an overhead.
const KEEPS: f64 = 0.7;
/// The load that has a target.
const TARGET_LOAD: Load = Load { connections: 10, pipeline: 16 };

impl Findings for Report {
    const NAME: &'static str = "throughput";

    fn tables(&self) -> Vec<Table> {
        let title = format!(
            "redis-benchmark SET; medians of {} runs of about {} s, in turn; {}",
            self.rows.first().map_or(0, |row| row.runs.len()),
            self.seconds_per_run,
            self.machine
        );
        let heads = ["", "-c", "-P", "requests/s", "ratio", "p50 us", "p99 us", "max us", "epochs/s", "pause p50 us"];
        let mut table = Table::new(title, &heads);
        for row in &self.rows {
            let middle = |part: fn(&Run) -> f64| median(row.runs.iter().map(part).collect());
            let mut cells = vec![
                row.mode.clone(),
                row.connections.to_string(),
                row.pipeline.to_string(),
                format!("{:.0}", row.requests_per_second),
                format!("{:.2}", row.ratio_to_first),
            ];
            let Spread { p50, p99, max } = row.reply_us;
            let rest =
                [p50, p99, max, middle(|r| r.checkpoints.epochs_per_second), middle(|r| r.checkpoints.pause_us.p50)];
            cells.extend(rest.iter().map(|figure| format!("{figure:.0}")));
            table.row(cells);
        }
        vec![table]
    }

    fn targets(&self) -> Vec<Target> {
        let auto = |row: &&Row| {
            let load = Load { connections: row.connections, pipeline: row.pipeline };
            row.mode.starts_with("overhead=") && load == TARGET_LOAD
        };
        let target = |row: &Row| {
            let what = format!("requests/s over unprotected; {}, -c {} -P {}", row.mode, row.connections, row.pipeline);
            Target::at_least(what, row.ratio_to_first, KEEPS)
        };
        self.rows.iter().filter(auto).map(target).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_in_words() {
        assert_eq!("10x16".parse(), Ok(TARGET_LOAD));
        for wrong in ["", "10", "x", "0x1", "1x0", "129x1", "1x1001", "10x16x1"] {
            assert!(wrong.parse::<Load>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_redis_benchmark_says() {
        let said = "\"test\",\"rps\",\"avg_latency_ms\"\n\"SET\",\"2000.50\",\"0.4\",\"0.1\",\"0.5\",\"0.9\",\"1.5\",\"7.25\"\n";
        let (rate, reply) = parse(said).unwrap();
        assert_eq!((rate, reply.p50, reply.p99, reply.max), (2000.5, 500.0, 1500.0, 7250.0));
        assert!(parse("\"SET\",\"1\"\n").is_none() && parse("").is_none());
    }
}
