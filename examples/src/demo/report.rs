//! The result as JSON, schema `ft.demo/1`.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tests::real::MachineKind;
use tests::real::pause::ArbiterPause;
use tests::real::status::Points;

use super::error::DemoError;
use super::outcome::{Frames, Outcome, ms_between};
use super::summary::{distributions, percentile};

/// Writes the report of one run or of many.
pub(super) fn write(path: &Path, outcomes: &[Outcome]) -> Result<(), DemoError> {
    let mut text = serde_json::to_string_pretty(&report(outcomes)).expect("plain values only");
    text.push('\n');
    fs::write(path, text).map_err(|source| DemoError::Report { path: path.to_path_buf(), source })
}

fn report(outcomes: &[Outcome]) -> Value {
    let runs: Vec<Value> = outcomes.iter().map(one).collect();
    let [only] = runs.as_slice() else {
        return many(outcomes, runs);
    };
    only.clone()
}

fn one(outcome: &Outcome) -> Value {
    let parts: Map<String, Value> =
        outcome.parts().named().map(|(name, ms)| (name.to_owned(), rounded(ms))).into_iter().collect();
    json!({
        "schema": "ft.demo/1",
        "machine": MachineKind::from(outcome.machine).as_str(),
        "kill": outcome.kill.as_str(),
        "arbiter": outcome.arbiter.as_str(),
        "arbiter_pause": outcome.pause.as_ref().map(|seen| pause(outcome, seen)),
        "seed": outcome.seed,
        "passed": outcome.passed(),
        "acked_writes": outcome.report.acks.len(),
        "lost_acked_writes": outcome.report.lost(),
        "wrong_values": outcome.report.wrong(),
        "connection_survived": outcome.connection_survived(),
        "failover_ms": parts,
        "process_gone_ms": outcome.moments.gone_us.map(|at| rounded(ms_between(outcome.moments.killed_us, at))),
        "frames": outcome.frames.map(|Frames { resent, delivered }| json!({ "said_again": resent, "delivered_again": delivered })),
        "epochs": outcome.before.epochs,
        "pause_us": points(outcome.before.pause_us),
        "hold_ms": points(outcome.before.hold_ms),
    })
}

/// What clients and the status saw of the arbiter's pause.
fn pause(outcome: &Outcome, seen: &ArbiterPause) -> Value {
    let since = |at: u64| rounded(ms_between(seen.from_us, at));
    let [a, b] = seen.not_armed_us.map(|at| at.map_or(Value::Null, since));
    json!({
        "length_ms": rounded(seen.length().as_secs_f64() * 1e3),
        "longest_gap_ms": rounded(seen.longest_gap(&outcome.report.acks).as_secs_f64() * 1e3),
        "longest_gap_before_ms": rounded(outcome.gap_before(seen).as_secs_f64() * 1e3),
        "not_armed_after_ms": { "a": a, "b": b },
        "armed_again_after_ms": since(seen.armed_again_us),
        "left_protection_for": seen.left_for,
    })
}

/// Sums and medians over all runs, beside each run's own report.
fn many(outcomes: &[Outcome], runs: Vec<Value>) -> Value {
    let Some(first) = outcomes.first() else {
        return json!({"schema": "ft.demo/1", "passed": false, "runs": []});
    };
    let mut medians = Map::new();
    let mut spread = Map::new();
    for (name, values) in distributions(outcomes) {
        let at = |percent| rounded(percentile(&values, percent));
        medians.insert(name.to_owned(), at(50));
        spread.insert(name.to_owned(), json!({"p50": at(50), "p99": at(99), "max": at(100)}));
    }
    let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(of).sum::<u64>();
    json!({
        "schema": "ft.demo/1",
        "machine": MachineKind::from(first.machine).as_str(),
        "kill": first.kill.as_str(),
        "arbiter": first.arbiter.as_str(),
        "passed": outcomes.iter().all(Outcome::passed),
        "acked_writes": outcomes.iter().map(|o| o.report.acks.len()).sum::<usize>(),
        "lost_acked_writes": sum(|o| o.report.lost()),
        "wrong_values": sum(|o| o.report.wrong()),
        "connection_survived": outcomes.iter().all(Outcome::connection_survived),
        "failover_ms": medians,
        "failover_ms_distribution": spread,
        "epochs": sum(|o| o.before.epochs.unwrap_or(0)),
        "pause_us": worst(outcomes, |o| o.before.pause_us),
        "hold_ms": worst(outcomes, |o| o.before.hold_ms),
        "runs": runs,
    })
}

/// The largest of each point over all runs.
fn worst(outcomes: &[Outcome], of: fn(&Outcome) -> Option<Points>) -> Value {
    let worse = |a: Points, b: Points| Points { p50: a.p50.max(b.p50), p99: a.p99.max(b.p99), max: a.max.max(b.max) };
    points(outcomes.iter().filter_map(of).reduce(worse))
}

fn points(points: Option<Points>) -> Value {
    points.map_or(Value::Null, |p| json!({"p50": rounded(p.p50), "p99": rounded(p.p99), "max": rounded(p.max)}))
}

/// Three digits after the point; null for what never happened.
fn rounded(value: f64) -> Value {
    serde_json::Number::from_f64((value * 1_000.0).round() / 1_000.0).map_or(Value::Null, Value::Number)
}
