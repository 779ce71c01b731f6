//! `ftbench failover`: the gap that a client sees when the primary dies, split into its parts, over many kills. The kills are the demo's: it is run, and what it reports
//! is read.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::figures::Spread;
use super::table::{Findings, Table};
use super::{BenchError, host, host_description};

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.failover/1";
/// The parts, in the order in which they happen, and their sum as the client saw it.
const PARTS: [&str; 5] = ["detect", "arbitrate", "activate", "first_reply", "gap"];

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Kills of each kind.
    pub runs: u32,
    /// What dies, as the demo's `--kill` has it.
    pub kills: Vec<String>,
    /// Pages that the guest dirties each second beside its work.
    pub dirty_rate: u32,
    /// `[epoch]`, as the demo's `--epoch` has it.
    pub epoch: String,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub epoch: String,
    pub dirty_pages_per_second: u32,
    pub rows: Vec<Row>,
}

/// One kind of kill.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub kill: String,
    pub runs: usize,
    pub acked_writes: u64,
    pub lost_acked_writes: u64,
    pub detect_ms: Spread,
    pub arbitrate_ms: Spread,
    pub activate_ms: Spread,
    pub first_reply_ms: Spread,
    pub gap_ms: Spread,
}

/// Kills and reads what came of it; the demo tells its progress itself. `demo` is the demo's program.
///
/// # Errors
/// The demo failed: something was lost, or could not be measured.
pub fn run(plan: &Plan, demo: &Path, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    let dir = tempfile::tempdir().map_err(host("a directory"))?;
    let mut rows = Vec::new();
    for kill in &plan.kills {
        progress(&format!("{} kills of a primary's {kill}", plan.runs));
        let json = dir.path().join(format!("{kill}.json"));
        let document = kills(plan, kill, demo, &json)?;
        rows.push(row(kill, &document)?);
    }
    let (epoch, dirty_pages_per_second) = (plan.epoch.clone(), plan.dirty_rate);
    Ok(Report { schema: SCHEMA.into(), machine, epoch, dirty_pages_per_second, rows })
}

fn kills(plan: &Plan, kill: &str, demo: &Path, json: &PathBuf) -> Result<Value, BenchError> {
    let mut command = Command::new(demo);
    command.args(["--runs", &plan.runs.to_string(), "--kill", kill, "--epoch", &plan.epoch]);
    command.args(["--dirty-rate", &plan.dirty_rate.to_string(), "--json"]).arg(json);
    // Its lines are for people, as are ours; standard output is for the table.
    command.stdin(Stdio::null()).stdout(Stdio::from(std::io::stderr()));
    let status = command.status().map_err(host("the demo"))?;
    if !status.success() {
        return Err(BenchError::Wrong(format!("the demo failed: {status}")));
    }
    let text = std::fs::read_to_string(json).map_err(host("the demo's report"))?;
    serde_json::from_str(&text).map_err(|error| BenchError::Wrong(format!("the demo's report: {error}")))
}

fn row(kill: &str, document: &Value) -> Result<Row, BenchError> {
    let wrong = |what: &str| BenchError::Wrong(format!("the demo's report has no {what}"));
    if document["schema"] != "ft.demo/1" {
        return Err(wrong("schema ft.demo/1"));
    }
    // One run is reported alone.
    let only = std::slice::from_ref(document);
    let runs = document["runs"].as_array().map_or(only, Vec::as_slice);
    let mut spreads = Vec::new();
    for part in PARTS {
        let values: Option<Vec<f64>> = runs.iter().map(|run| run["failover_ms"][part].as_f64()).collect();
        spreads.push(Spread::of(values.ok_or_else(|| wrong(part))?));
    }
    let &[detect_ms, arbitrate_ms, activate_ms, first_reply_ms, gap_ms] = spreads.as_slice() else {
        return Err(wrong("parts"));
    };
    let number = |field: &str| document[field].as_u64().ok_or_else(|| wrong(field));
    Ok(Row {
        kill: kill.to_owned(),
        runs: runs.len(),
        acked_writes: number("acked_writes")?,
        lost_acked_writes: number("lost_acked_writes")?,
        detect_ms,
        arbitrate_ms,
        activate_ms,
        first_reply_ms,
        gap_ms,
    })
}

impl Findings for Report {
    const NAME: &'static str = "failover";

    fn tables(&self) -> Vec<Table> {
        let Self { machine, epoch, dirty_pages_per_second: rate, rows, .. } = self;
        let title = format!(
            "gap that a client sees when the primary dies, ms; [epoch] {epoch}; {rate} pages dirtied a second; {machine}"
        );
        let mut table = Table::new(title, &["what dies", "part", "kills", "p50", "p99", "max", "writes lost"]);
        for row in rows {
            let parts = [row.detect_ms, row.arbitrate_ms, row.activate_ms, row.first_reply_ms, row.gap_ms];
            for (name, spread) in PARTS.iter().zip(parts) {
                let mut cells = vec![row.kill.clone(), name.replace('_', " "), row.runs.to_string()];
                cells.extend(spread.cells());
                cells.push(format!("{} of {}", row.lost_acked_writes, row.acked_writes));
                table.row(cells);
            }
        }
        vec![table]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_demo_s_report_is_read() {
        let run = |gap: f64| json!({"failover_ms": {"detect": 1.0, "arbitrate": 2.0, "activate": 3.0, "first_reply": 4.0, "gap": gap}});
        let many = json!({"schema": "ft.demo/1", "acked_writes": 7, "lost_acked_writes": 0, "runs": [run(10.0), run(30.0), run(20.0)]});
        let found = row("process", &many).unwrap();
        assert_eq!((found.runs, found.gap_ms.p50, found.gap_ms.max, found.detect_ms.p50), (3, 20.0, 30.0, 1.0));
        let mut one = run(5.0);
        one["schema"] = json!("ft.demo/1");
        (one["acked_writes"], one["lost_acked_writes"]) = (json!(1), json!(0));
        assert_eq!(row("host", &one).unwrap().gap_ms.max, 5.0);
        one["failover_ms"]["gap"] = Value::Null;
        assert!(row("host", &one).is_err() && row("host", &json!({})).is_err());
    }
}
