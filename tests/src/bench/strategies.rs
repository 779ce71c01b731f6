//! `ftbench strategies`: the ways to capture a checkpoint (`[epoch] capture`) side by side: pause, what a client waits, and what it gets through, at several
//! rates of dirtying.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::figures::{Spread, median, ratio};
use super::latency::replies;
use super::pairs::{Bench, Checkpoints, Mode, order};
use super::table::{Findings, Table};
use super::{BenchError, host_description, throughput};
use crate::real::artifacts::Artifacts;

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.strategies/1";
/// What a name of [`Plan::strategies`] ends with when the copy before the pause is always made.
const PRECOPY: &str = "+precopy";
/// What `redis-benchmark` does.
const LOAD: throughput::Load = throughput::Load { connections: 10, pipeline: 16 };

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Values of `[epoch] capture`; with `+precopy` behind it, `precopy = "always"` as well. What they are compared with comes first: no backup at all.
    pub strategies: Vec<String>,
    /// Pages that the guest dirties each second.
    pub dirty_rates: Vec<u32>,
    /// Pages that they are among.
    pub buffer_pages: u32,
    /// What else is in `[epoch]`.
    pub epoch: String,
    /// How long a client's replies are measured, and then about how long `redis-benchmark` runs.
    pub span: Duration,
    /// Rounds, each with everything.
    pub rounds: u32,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub epoch: String,
    pub buffer_pages: u32,
    pub seconds_per_run: f64,
    pub rows: Vec<Row>,
}

/// One strategy at one rate. Medians over its runs, `max` is the largest of all.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub strategy: String,
    pub dirty_pages_per_second: u32,
    pub pause_us: Spread,
    pub reply_us: Spread,
    pub requests_per_second: f64,
    pub ratio_to_unprotected: f64,
    pub epochs_per_second: f64,
    pub guest_lost_ratio: f64,
    pub runs: Vec<Run>,
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Run {
    pub reply_us: Spread,
    pub requests_per_second: f64,
    pub checkpoints: Checkpoints,
}

/// Nobody's backup, then each strategy.
fn modes(plan: &Plan) -> Vec<Mode> {
    let protected = |strategy: &String| {
        let words = match strategy.strip_suffix(PRECOPY) {
            Some(capture) => format!("{} capture={capture} precopy=always", plan.epoch),
            None => format!("{} capture={strategy}", plan.epoch),
        };
        Mode { name: strategy.clone(), epoch: Some(words) }
    };
    std::iter::once(Mode::unprotected()).chain(plan.strategies.iter().map(protected)).collect()
}

/// Measures everything in turn; `progress` is told of each run.
///
/// # Errors
/// This build does not know a strategy; else the first thing that goes wrong.
pub fn run(plan: &Plan, artifacts: &Artifacts, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    let modes = modes(plan);
    modes.iter().try_for_each(|mode| mode.check(artifacts))?;
    let cases: Vec<(u32, &Mode)> =
        plan.dirty_rates.iter().flat_map(|rate| modes.iter().map(|mode| (*rate, mode))).collect();
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); cases.len()];
    for round in 1..=plan.rounds {
        for ((rate, mode), runs) in cases.iter().zip(&mut runs) {
            let run = one(plan, *rate, mode, artifacts)?;
            progress(&format!(
                "round {round} of {}, {rate} pages/s, {}: pause p50 {:.0} us, reply p50 {:.0} us, {:.0} requests/s",
                plan.rounds, mode.name, run.checkpoints.pause_us.p50, run.reply_us.p50, run.requests_per_second
            ));
            runs.push(run);
        }
    }
    let rows = cases.iter().zip(runs).map(|((rate, mode), runs)| row(*rate, mode, runs)).collect();
    Ok(Report {
        schema: SCHEMA.into(),
        machine,
        epoch: plan.epoch.clone(),
        buffer_pages: plan.buffer_pages,
        seconds_per_run: plan.span.as_secs_f64(),
        rows: compared(rows),
    })
}

fn one(plan: &Plan, dirty_rate: u32, mode: &Mode, artifacts: &Artifacts) -> Result<Run, BenchError> {
    let bench = Bench::start(artifacts, mode, "256MiB", "")?;
    let mut client = bench.connect()?;
    order(&mut client, &["FT.DIRTY", &dirty_rate.to_string(), &plan.buffer_pages.to_string()])?;
    let waits = replies(&mut client, plan.span)?;
    // Before the second load, which dirties pages of its own.
    let checkpoints = Checkpoints::of(&bench.status()?);
    let throughput::Run { requests_per_second, .. } = throughput::one(&bench, LOAD, plan.span)?;
    Ok(Run { reply_us: Spread::of_us(waits.into_iter()), requests_per_second, checkpoints })
}

fn row(dirty_pages_per_second: u32, mode: &Mode, runs: Vec<Run>) -> Row {
    let middle = |part: fn(&Run) -> f64| median(runs.iter().map(part).collect());
    Row {
        strategy: mode.name.clone(),
        dirty_pages_per_second,
        pause_us: Spread::of_runs(runs.iter().map(|run| run.checkpoints.pause_us)),
        reply_us: Spread::of_runs(runs.iter().map(|run| run.reply_us)),
        requests_per_second: middle(|run| run.requests_per_second),
        ratio_to_unprotected: 0.0,
        epochs_per_second: middle(|run| run.checkpoints.epochs_per_second),
        guest_lost_ratio: middle(|run| run.checkpoints.guest_lost_ratio),
        runs,
    }
}

/// Fills in each row's ratio to the first of its rate.
fn compared(mut rows: Vec<Row>) -> Vec<Row> {
    let mut first = (0, 0.0);
    for row in &mut rows {
        if row.dirty_pages_per_second != first.0 {
            first = (row.dirty_pages_per_second, row.requests_per_second);
        }
        row.ratio_to_unprotected = ratio(row.requests_per_second, first.1);
    }
    rows
}

impl Findings for Report {
    const NAME: &'static str = "strategies";

    fn tables(&self) -> Vec<Table> {
        let title = format!(
            "ways to capture, [epoch] {}; pages dirtied among {}; pauses by the owner's own figures; one INCR at a time; redis-benchmark SET with -c {} -P {}; \
             medians of {} runs, in turn; {}",
            self.epoch,
            self.buffer_pages,
            LOAD.connections,
            LOAD.pipeline,
            self.rows.first().map_or(0, |row| row.runs.len()),
            self.machine
        );
        let heads = [
            "capture",
            "pages/s",
            "pause p50 us",
            "p99",
            "max",
            "reply p50 us",
            "p99",
            "max",
            "requests/s",
            "ratio",
            "epochs/s",
        ];
        let mut table = Table::new(title, &heads);
        for row in &self.rows {
            let mut cells = vec![row.strategy.clone(), row.dirty_pages_per_second.to_string()];
            let spreads = [row.pause_us, row.reply_us];
            cells.extend(spreads.iter().flat_map(|s| [s.p50, s.p99, s.max]).map(|figure| format!("{figure:.0}")));
            cells.extend([
                format!("{:.0}", row.requests_per_second),
                format!("{:.2}", row.ratio_to_unprotected),
                format!("{:.0}", row.epochs_per_second),
            ]);
            table.row(cells);
        }
        vec![table]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strategies_are_words_of_the_configuration() {
        let plan = Plan {
            strategies: vec!["stop-and-copy".into(), "postponed+precopy".into()],
            dirty_rates: vec![1],
            buffer_pages: 1,
            epoch: "25ms".into(),
            span: Duration::from_secs(1),
            rounds: 1,
        };
        let words: Vec<_> = modes(&plan).into_iter().map(|mode| (mode.name, mode.epoch.unwrap_or_default())).collect();
        let told: Vec<_> = words.iter().map(|(name, epoch)| (name.as_str(), epoch.as_str())).collect();
        let wanted = [
            ("unprotected", ""),
            ("stop-and-copy", "25ms capture=stop-and-copy"),
            ("postponed+precopy", "25ms capture=postponed precopy=always"),
        ];
        assert_eq!(told, wanted);
    }
}
