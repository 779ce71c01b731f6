//! `ftbench report`: everything, one after the other, each in a process of its own (some pin their threads), and what docs/performance.md shows of it: JSON, tables, plots.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde::de::DeserializeOwned;

use super::plots;
use super::table::{Findings, of_targets};
use super::{
    BenchError, base, disk, epochs, failover, host, latency, linux, pause, qemu, strategies, throughput, tracking, wire,
};

/// A file that says in so many lines what was measured.
const TABLES: &str = "tables.md";

/// One subcommand as the report runs it.
#[derive(Clone, Copy, Debug)]
struct Step {
    name: &'static str,
    /// For figures that are quoted.
    full: &'static str,
    /// For a look whether everything works.
    quick: &'static str,
    render: Render,
}

/// Reads a result and gives its pages: all tables, the first of them with the targets; and draws its plots.
type Render = fn(&Path, &Path) -> Result<Rendered, BenchError>;

struct Rendered {
    all: String,
    short: String,
    /// Title of the chart, if there is one.
    chart: Option<String>,
}

const STEPS: [Step; 12] = [
    Step {
        name: pause::Report::NAME,
        full: "--runs 5 --samples 200",
        quick: "--runs 1 --samples 20 --pages 100,1000 --memory 256MiB,512MiB",
        render: |json, out| rendered(json, out, Some(|report: &pause::Report| plots::pause(report))),
    },
    Step {
        name: qemu::Report::NAME,
        full: "--runs 5",
        quick: "--runs 1 --samples 20 --pages 1000",
        render: |json, out| rendered::<qemu::Report>(json, out, None),
    },
    Step {
        name: tracking::Report::NAME,
        full: "--runs 5",
        quick: "--runs 1 --samples 20 --pages 100,1000",
        render: |json, out| rendered(json, out, Some(|report: &tracking::Report| plots::tracking(report))),
    },
    Step {
        name: epochs::Report::NAME,
        full: "--rounds 5 --seconds 60 --other-seconds 15",
        quick: "--rounds 1 --seconds 3 --other-seconds 2",
        render: |json, out| rendered::<epochs::Report>(json, out, None),
    },
    Step {
        name: latency::Report::NAME,
        full: "--rounds 5 --seconds 10",
        quick: "--rounds 1 --seconds 2",
        render: |json, out| rendered(json, out, Some(|report: &latency::Report| plots::latency(report))),
    },
    Step {
        name: throughput::Report::NAME,
        full: "--rounds 5",
        quick: "--rounds 1 --seconds 1 --fixed 10ms,25ms,100ms",
        render: |json, out| rendered(json, out, Some(|report: &throughput::Report| plots::throughput(report))),
    },
    Step {
        name: linux::Report::NAME,
        full: "--rounds 5",
        quick: "--rounds 1 --seconds 1",
        render: |json, out| rendered::<linux::Report>(json, out, None),
    },
    Step {
        name: strategies::Report::NAME,
        full: "--rounds 5",
        quick: "--rounds 1 --seconds 1 --rates 1000,10000",
        render: |json, out| rendered(json, out, Some(|report: &strategies::Report| plots::strategies(report))),
    },
    Step {
        name: wire::Report::NAME,
        full: "--rounds 5",
        quick: "--rounds 1 --epochs 20",
        render: |json, out| rendered(json, out, Some(|report: &wire::Report| plots::wire(report))),
    },
    Step {
        name: failover::Report::NAME,
        full: "--runs 20",
        quick: "--runs 1",
        render: |json, out| rendered::<failover::Report>(json, out, None),
    },
    Step {
        name: base::Report::NAME,
        full: "--rounds 5",
        quick: "--rounds 1 --memory 256MiB --filled-pages 20000",
        render: |json, out| rendered::<base::Report>(json, out, None),
    },
    Step {
        name: disk::Report::NAME,
        full: "--runs 5",
        quick: "--runs 1 --seconds 1 --disk 16MiB",
        render: |json, out| rendered::<disk::Report>(json, out, None),
    },
];

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where results, tables and plots go.
    pub out: PathBuf,
    /// Stored results: what has one there is not measured.
    pub from: Option<PathBuf>,
    /// Only these subcommands; all when there are none.
    pub only: Vec<String>,
    /// Small sizes: nothing of it is a figure.
    pub quick: bool,
    /// A page with places for results, which are filled in anew.
    pub page: Option<PathBuf>,
}

/// Measures and writes everything. A subcommand that fails does not keep the others from being measured.
///
/// # Errors
/// Some failed, after all were tried; the names are in the error. Or nothing could be written.
pub fn run(plan: &Plan, ftbench: &Path, mut progress: impl FnMut(&str)) -> Result<(), BenchError> {
    if let Some(unknown) = plan.only.iter().find(|name| !STEPS.iter().any(|step| step.name == **name)) {
        let names = STEPS.map(|step| step.name).join(", ");
        return Err(BenchError::Wrong(format!("there is no {unknown:?}: {names}")));
    }
    fs::create_dir_all(&plan.out).map_err(host("the directory of results"))?;
    let chosen = |step: &&Step| plan.only.is_empty() || plan.only.iter().any(|name| name == step.name);
    let mut failed = Vec::new();
    for step in STEPS.iter().filter(chosen) {
        let json = plan.out.join(format!("{}.json", step.name));
        let stored = plan.from.as_ref().map(|dir| dir.join(format!("{}.json", step.name)));
        if let Some(stored) = stored.filter(|stored| stored.is_file()) {
            if stored != json {
                fs::copy(&stored, &json).map_err(host("a stored result"))?;
            }
            progress(&format!("{}: stored", step.name));
            continue;
        }
        let began = Instant::now();
        match measure(step, plan.quick, ftbench, &json) {
            Ok(()) => progress(&format!("{}: {:.0} s", step.name, began.elapsed().as_secs_f64())),
            Err(error) => {
                progress(&format!("{}: FAILED: {error}", step.name));
                failed.push(step.name);
            }
        }
    }
    write(plan, &mut failed, &mut progress)?;
    if failed.is_empty() { Ok(()) } else { Err(BenchError::Wrong(format!("no figures of {}", failed.join(", ")))) }
}

fn measure(step: &Step, quick: bool, ftbench: &Path, json: &Path) -> Result<(), BenchError> {
    // A result of another day beside those of today says nothing.
    match fs::remove_file(json) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(host("an old result")(error)),
        _ => {}
    }
    let words = if quick { step.quick } else { step.full };
    let mut command = Command::new(ftbench);
    command.arg(step.name).args(words.split_whitespace()).arg("--json").arg(json);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.status().map_err(host("ftbench"))?;
    if status.success() { Ok(()) } else { Err(BenchError::Wrong(format!("ftbench {} {words}: {status}", step.name))) }
}

/// Tables, plots and the page, from the results that are there.
fn write(plan: &Plan, failed: &mut Vec<&'static str>, progress: &mut impl FnMut(&str)) -> Result<(), BenchError> {
    let mut tables = String::from(
        "# Tables\n\nMade by `cargo ftbench report`; [performance.md](../performance.md) says how each was measured.\n",
    );
    let page = plan.page.as_ref().map(|path| fs::read_to_string(path).map_err(host("the page"))).transpose()?;
    let mut page = page.unwrap_or_default();
    // As the page names them: by their way from it, where there is one.
    let dir = plan.page.as_deref().and_then(Path::parent).and_then(|dir| plan.out.strip_prefix(dir).ok());
    let beside = format!("{}/", dir.unwrap_or(&plan.out).display());
    for step in &STEPS {
        let json = plan.out.join(format!("{}.json", step.name));
        if !json.is_file() {
            continue;
        }
        match (step.render)(&json, &plan.out) {
            Ok(Rendered { all, short, chart }) => {
                let image = |dir: &str| {
                    chart.as_ref().map_or_else(String::new, |title| format!("![{title}]({dir}{}.png)\n\n", step.name))
                };
                tables.push_str(&format!("\n## `{}`\n\n{}{}\n", step.name, image(""), all.trim_end()));
                page = filled(&page, step.name, &format!("{}{short}", image(&beside)));
            }
            Err(error) => {
                progress(&format!("{}: FAILED: {error}", step.name));
                failed.push(step.name);
            }
        }
    }
    fs::write(plan.out.join(TABLES), tables).map_err(host("the tables"))?;
    if let Some(path) = &plan.page {
        fs::write(path, page).map_err(host("the page"))?;
    }
    Ok(())
}

fn rendered<R: Findings + DeserializeOwned>(
    json: &Path,
    out: &Path,
    chart: Option<fn(&R) -> super::chart::Chart>,
) -> Result<Rendered, BenchError> {
    let text = fs::read_to_string(json).map_err(host("a result"))?;
    let report: R = serde_json::from_str(&text)
        .map_err(|error| BenchError::Wrong(format!("{} is of another version: {error}", json.display())))?;
    let chart = chart.map(|chart| chart(&report));
    let drawn = chart.as_ref().map_or(Ok(false), |chart| plots::draw(chart, out, R::NAME))?;
    let chart = chart.filter(|_| drawn).map(|chart| chart.title);
    let mut short: String = report.tables().first().map(super::table::Table::markdown).unwrap_or_default();
    if let Some(targets) = of_targets(&report.targets()) {
        short = format!("{short}\n{}", targets.markdown());
    }
    Ok(Rendered { all: report.markdown(), short, chart })
}

/// The page with this text between the marks of a subcommand; as it was when it has none.
fn filled(page: &str, name: &str, text: &str) -> String {
    let (begin, end) = (format!("<!-- results: {name} -->\n"), "<!-- end of results -->");
    let Some((before, rest)) = page.split_once(&begin) else { return page.to_owned() };
    let Some((_, after)) = rest.split_once(end) else { return page.to_owned() };
    format!("{before}{begin}\n{}\n\n{end}{after}", text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_put_between_their_marks() {
        let page = "a\n<!-- results: wire -->\nold\n<!-- end of results -->\nb\n<!-- results: pause -->\n<!-- end of results -->\n";
        let once = filled(page, "wire", "new\n");
        assert_eq!(
            once,
            "a\n<!-- results: wire -->\n\nnew\n\n<!-- end of results -->\nb\n<!-- results: pause -->\n<!-- end of results -->\n"
        );
        assert_eq!(filled(&once, "wire", "new"), once, "the same again changes nothing");
        assert_eq!(filled(page, "disk", "new"), page);
    }

    #[test]
    fn stored_results_are_shown_and_what_is_none_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir(&from).unwrap();
        let line = |change, patches, wire_ratio| wire::Line {
            change,
            patches,
            wire_ratio,
            cpu_us_per_page: 2.0,
            commit_us: super::super::figures::Spread::default(),
        };
        let lines = vec![line(wire::Change::Line, true, 0.02), line(wire::Change::Whole, true, 1.5)];
        let report = wire::Report { schema: wire::SCHEMA.into(), machine: "m".into(), pages: 10, lines };
        fs::write(from.join("wire.json"), report.document().unwrap().to_string()).unwrap();
        fs::write(from.join("base.json"), "{}").unwrap();
        let page = dir.path().join("page.md");
        fs::write(&page, "<!-- results: wire -->\n<!-- end of results -->\n").unwrap();
        let out = dir.path().join("out");
        let only = vec!["wire".into(), "base".into()];
        let plan = Plan { out: out.clone(), from: Some(from), only, quick: true, page: Some(page.clone()) };
        let error = run(&plan, Path::new("/nonexistent"), |_| {}).unwrap_err();
        assert_eq!(error.to_string(), "no figures of base");
        let tables = fs::read_to_string(out.join(TABLES)).unwrap();
        assert!(tables.contains("## `wire`") && tables.contains("NOT MET") && tables.contains("64 bytes in one place"));
        assert!(
            fs::read_to_string(&page)
                .unwrap()
                .contains("| wire / pages; every byte, at random | 1.50 | <= 1.02 | NOT MET |")
        );
        assert!(out.join("wire.png").is_file() && fs::read_to_string(&page).unwrap().contains("](out/wire.png)"));
        let unknown = Plan { only: vec!["speed".into()], ..plan };
        assert!(run(&unknown, Path::new("/nonexistent"), |_| {}).unwrap_err().to_string().contains("no \"speed\""));
    }
}
