//! `ftbench latency`: what a client waits for a reply, unprotected, with fixed epochs and with such as follow the work, in turn.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::figures::{Percentile, Spread, curve, median};
use super::pairs::{Bench, Checkpoints, Mode, order, rate};
use super::table::{Findings, Table, Target};
use super::{BenchError, host_description};
use crate::real::artifacts::Artifacts;
use crate::real::resp::{Connection, Reply};

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.latency/2";
/// Replies before the first that counts: the load has begun, every page of its buffer was there once.
const WARM_UP: Duration = Duration::from_secs(1);

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// In this order in each round; the first is what the others are compared with.
    pub modes: Vec<Mode>,
    /// Rounds.
    pub rounds: u32,
    /// How long each mode is measured in a round.
    pub span: Duration,
    /// Pages that the guest dirties each second beside its replies.
    pub dirty_pages_per_second: u32,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub seconds_per_run: f64,
    pub dirty_pages_per_second: u32,
    pub rows: Vec<Row>,
}

/// One mode. Points are medians over its runs, `max` is the largest of all.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub mode: String,
    pub reply_us: Spread,
    pub added_p50_us: f64,
    pub added_p99_us: f64,
    /// Of all replies of all runs.
    pub curve_us: Vec<Percentile>,
    pub runs: Vec<Run>,
}

/// One mode in one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Run {
    pub replies: u64,
    pub replies_per_second: f64,
    pub reply_us: Spread,
    pub checkpoints: Checkpoints,
}

/// Measures all modes in turn; `progress` is told of each run.
///
/// # Errors
/// The first thing that goes wrong.
pub fn run(plan: &Plan, artifacts: &Artifacts, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    plan.modes.iter().try_for_each(|mode| mode.check(artifacts))?;
    let mut runs: Vec<(Vec<Run>, Vec<f64>)> = vec![Default::default(); plan.modes.len()];
    for round in 1..=plan.rounds {
        for (mode, (runs, waits)) in plan.modes.iter().zip(&mut runs) {
            let (run, replies) = one(plan, mode, artifacts)?;
            waits.extend(replies.iter().map(|reply| reply.as_secs_f64() * 1e6));
            let Spread { p50, p99, max } = run.reply_us;
            progress(&format!(
                "round {round}, {}: {} replies, p50 {p50:.0} p99 {p99:.0} max {max:.0} us",
                mode.name, run.replies
            ));
            runs.push(run);
        }
    }
    let spread = |runs: &[Run]| Spread::of_runs(runs.iter().map(|run| run.reply_us));
    let first = runs.first().map(|(runs, _)| spread(runs)).unwrap_or_default();
    let rows = plan.modes.iter().zip(runs).map(|(mode, (runs, waits))| {
        let reply_us = spread(&runs);
        let (added_p50_us, added_p99_us) = (reply_us.p50 - first.p50, reply_us.p99 - first.p99);
        Row { mode: mode.name.clone(), reply_us, added_p50_us, added_p99_us, curve_us: curve(waits), runs }
    });
    Ok(Report {
        schema: SCHEMA.into(),
        machine,
        seconds_per_run: plan.span.as_secs_f64(),
        dirty_pages_per_second: plan.dirty_pages_per_second,
        rows: rows.collect(),
    })
}

fn one(plan: &Plan, mode: &Mode, artifacts: &Artifacts) -> Result<(Run, Vec<Duration>), BenchError> {
    let bench = Bench::start(artifacts, mode, "128MiB", "")?;
    let mut client = bench.connect()?;
    order(&mut client, &["FT.DIRTY", &plan.dirty_pages_per_second.to_string(), "1000"])?;
    let replies = replies(&mut client, plan.span)?;
    let count = u64::try_from(replies.len()).unwrap_or(u64::MAX);
    let run = Run {
        replies: count,
        // One at a time: they took as long as the measurement.
        replies_per_second: rate(count, replies.iter().sum()),
        reply_us: Spread::of_us(replies.iter().copied()),
        checkpoints: Checkpoints::of(&bench.status()?),
    };
    Ok((run, replies))
}

/// What each of a client's replies took, one INCR at a time for so long, after a second that is not counted.
///
/// # Errors
/// The guest does not answer, or not with the number that is next.
pub fn replies(client: &mut Connection, span: Duration) -> Result<Vec<Duration>, BenchError> {
    let began = Instant::now();
    let (mut replies, mut measured, mut number) = (Vec::new(), None, 0);
    loop {
        let asked = Instant::now();
        let reply = client.call(&["INCR", "latency"]).map_err(super::host("INCR"))?;
        let now = Instant::now();
        number += 1;
        if reply != Reply::Integer(number) {
            return Err(BenchError::Wrong(format!("increment {number} was answered by {reply:?}")));
        }
        if asked - began < WARM_UP {
            continue;
        }
        let since = *measured.get_or_insert(asked);
        replies.push(now - asked);
        if now - since >= span {
            return Ok(replies);
        }
    }
}

/// Most that half of the replies may take longer than unprotected, in microseconds, where the target of a mode is a latency.
const ADDED_P50: f64 = 1_000.0;
/// Most that 99 of a hundred may take.
const P99: f64 = 3_000.0;

impl Findings for Report {
    const NAME: &'static str = "latency";

    fn tables(&self) -> Vec<Table> {
        let title = format!(
            "reply to one INCR at a time, us; {} pages dirtied a second; medians of {} runs of {} s, in turn; {}",
            self.dirty_pages_per_second,
            self.rows.first().map_or(0, |row| row.runs.len()),
            self.seconds_per_run,
            self.machine
        );
        let heads =
            ["", "p50", "p99", "max", "+p50", "+p99", "replies/s", "epochs/s", "commit", "pause", "transfer", "ack"];
        let mut table = Table::new(title, &heads);
        for row in &self.rows {
            let middle = |part: fn(&Run) -> f64| median(row.runs.iter().map(part).collect());
            let Spread { p50, p99, max } = row.reply_us;
            let figures = [
                p50,
                p99,
                max,
                row.added_p50_us,
                row.added_p99_us,
                middle(|r| r.replies_per_second),
                middle(|r| r.checkpoints.epochs_per_second),
                middle(|r| r.checkpoints.commit_us),
                middle(|r| r.checkpoints.pause_us.p50),
                middle(|r| r.checkpoints.transfer_us.p50),
                middle(|r| r.checkpoints.ack_us.p50),
            ];
            let figures = figures.iter().map(|figure| format!("{figure:.0}"));
            table.row([row.mode.clone()].into_iter().chain(figures).collect());
        }
        vec![table]
    }

    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for row in self.rows.iter().filter(|row| row.mode.starts_with("latency=")) {
            let name = &row.mode;
            targets.push(Target::at_most(format!("p50 over unprotected, us; {name}"), row.added_p50_us, ADDED_P50));
            targets.push(Target::at_most(format!("p99, us; {name}"), row.reply_us.p99, P99));
        }
        targets
    }
}
