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
pub const SCHEMA: &str = "ft.bench.throughput/2";
/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(300);
/// Connections, as `redis-benchmark -c`.
const CONNECTIONS: &str = "10";

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In this order in each round; the first is what the others are compared with.
    pub modes: Vec<Mode>,
    /// Rounds.
    pub rounds: u32,
    /// Requests that each connection has on their way at once, with the number of requests of a run.
    pub loads: Vec<(u32, u32)>,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub rows: Vec<Row>,
}

/// One mode under one load. Medians over its runs.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub mode: String,
    pub pipeline: u32,
    pub requests: u32,
    pub requests_per_second: f64,
    pub ratio_to_first: f64,
    pub reply_us: Spread,
    pub runs: Vec<Run>,
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Run {
    pub requests_per_second: f64,
    pub reply_us: Spread,
    pub checkpoints: Checkpoints,
}

/// Measures all modes in turn; `progress` is told of each run.
///
/// # Errors
/// The first thing that goes wrong.
pub fn run(plan: &Plan, artifacts: &Artifacts, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    tools::require("redis-benchmark")?;
    let mut runs = vec![vec![Vec::new(); plan.loads.len()]; plan.modes.len()];
    for round in 1..=plan.rounds {
        for (mode, runs) in plan.modes.iter().zip(&mut runs) {
            let bench = Bench::start(artifacts, mode, "256MiB", "")?;
            for (&(pipeline, requests), runs) in plan.loads.iter().zip(runs) {
                let run = one(&bench, pipeline, requests)?;
                let rate = run.requests_per_second;
                progress(&format!("round {round}, {}, pipeline {pipeline}: {rate:.0} requests/s", mode.name));
                runs.push(run);
            }
        }
    }
    let middle = |runs: &[Run]| median(runs.iter().map(|run| run.requests_per_second).collect());
    let first: Vec<f64> = runs.first().into_iter().flatten().map(|runs| middle(runs)).collect();
    let mut rows = Vec::new();
    for (mode, runs) in plan.modes.iter().zip(runs) {
        for ((&(pipeline, requests), runs), first) in plan.loads.iter().zip(runs).zip(&first) {
            let requests_per_second = middle(&runs);
            let (mode, ratio_to_first) = (mode.name.clone(), ratio(requests_per_second, *first));
            let reply_us = Spread::of_runs(runs.iter().map(|run| run.reply_us));
            rows.push(Row { mode, pipeline, requests, requests_per_second, ratio_to_first, reply_us, runs });
        }
    }
    Ok(Report { schema: SCHEMA.into(), machine: host_description(), rows })
}

/// One run of `redis-benchmark`.
///
/// # Errors
/// It failed, or the state of the pair changed meanwhile.
pub fn one(bench: &Bench, pipeline: u32, requests: u32) -> Result<Run, BenchError> {
    let words = [GUEST_PORT.to_string(), requests.to_string(), pipeline.to_string()];
    let [port, requests, pipeline] = words.each_ref().map(String::as_str);
    let words = [
        "-h",
        GUEST_IP,
        "-p",
        port,
        "-t",
        "set",
        "-n",
        requests,
        "-P",
        pipeline,
        "-c",
        CONNECTIONS,
        "-r",
        "10000",
        "--csv",
    ];
    let said = bench.pair.run_client("redis-benchmark", &words, LIMIT)?.success("redis-benchmark")?;
    let (requests_per_second, reply_us) =
        parse(&said).ok_or_else(|| BenchError::Wrong(format!("redis-benchmark said {said:?}")))?;
    Ok(Run { requests_per_second, reply_us, checkpoints: Checkpoints::of(&bench.status()?) })
}

/// `"SET","rps","avg","min","p50","p95","p99","max"`, times in milliseconds, after a line with the names.
fn parse(csv: &str) -> Option<(f64, Spread)> {
    let line = csv.lines().find(|line| line.starts_with("\"SET\""))?;
    let fields: Vec<f64> = line.split(',').skip(1).filter_map(|field| field.trim_matches('"').parse().ok()).collect();
    let [rate, _average, _least, p50, _p95, p99, max] = fields.as_slice() else { return None };
    Some((*rate, Spread { p50: p50 * 1e3, p99: p99 * 1e3, max: max * 1e3 }))
}

/// What a guest is to keep of its requests a second with pipelines of [`TARGET_PIPELINE`], where the target of a mode is an overhead.
const KEEPS: f64 = 0.7;
/// Requests on their way on each connection in the load that has a target.
const TARGET_PIPELINE: u32 = 16;

impl Findings for Report {
    const NAME: &'static str = "throughput";

    fn tables(&self) -> Vec<Table> {
        let title = format!(
            "redis-benchmark SET, {CONNECTIONS} connections; medians of {} runs, in turn; {}",
            self.rows.first().map_or(0, |row| row.runs.len()),
            self.machine
        );
        let heads = ["", "pipeline", "requests/s", "ratio", "p50 us", "p99 us", "max us", "epochs/s", "pause p50 us"];
        let mut table = Table::new(title, &heads);
        for row in &self.rows {
            let middle = |part: fn(&Run) -> f64| median(row.runs.iter().map(part).collect());
            let mut cells = vec![
                row.mode.clone(),
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
        let auto = |row: &&Row| row.mode.starts_with("overhead=") && row.pipeline == TARGET_PIPELINE;
        let target = |row: &Row| {
            let what = format!("requests/s over unprotected; {}, pipeline {}", row.mode, row.pipeline);
            Target::at_least(what, row.ratio_to_first, KEEPS)
        };
        self.rows.iter().filter(auto).map(target).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_redis_benchmark_says() {
        let said = "\"test\",\"rps\",\"avg_latency_ms\"\n\"SET\",\"2000.50\",\"0.4\",\"0.1\",\"0.5\",\"0.9\",\"1.5\",\"7.25\"\n";
        let (rate, reply) = parse(said).unwrap();
        assert_eq!((rate, reply.p50, reply.p99, reply.max), (2000.5, 500.0, 1500.0, 7250.0));
        assert!(parse("\"SET\",\"1\"\n").is_none() && parse("").is_none());
    }
}
