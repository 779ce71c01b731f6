//! `ftbench base`: how much of its speed the guest keeps while a base is copied, for each share of the time that the copy may take.

use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::figures::median;
use super::pairs::{Bench, Counted, Mode, order, rate};
use super::table::{Findings, Table, Target};
use super::{BenchError, host_description};
use crate::real::artifacts::Artifacts;
use crate::real::pair::START_LIMIT;
use crate::real::resp::Connection;
use crate::real::{Node, clock};

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.base/2";
/// How often the guest is asked what it has done.
const ASK_INTERVAL: Duration = Duration::from_millis(10);
/// How long its speed is measured before the base.
const BEFORE: Duration = Duration::from_secs(2);

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// `[protect] base_share`.
    pub shares: Vec<String>,
    /// Rounds, each with all shares.
    pub rounds: u32,
    /// Guest RAM as `pair.toml` has it.
    pub memory: String,
    /// Pages that the guest fills with data before.
    pub filled_pages: u32,
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub memory: String,
    pub filled_pages: u32,
    pub rows: Vec<Row>,
}

/// One share. Medians over its runs.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub base_share: String,
    pub guest_keeps_ratio: f64,
    pub base_seconds: f64,
    pub runs: Vec<Run>,
}

/// One base.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Run {
    pub before_units_per_second: f64,
    pub during_units_per_second: f64,
    pub guest_keeps_ratio: f64,
    pub base_seconds: f64,
}

/// Measures all shares in turn; `progress` is told of each run.
///
/// # Errors
/// The first thing that goes wrong.
pub fn run(plan: &Plan, artifacts: &Artifacts, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    let machine = host_description();
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); plan.shares.len()];
    for round in 1..=plan.rounds {
        for (share, runs) in plan.shares.iter().zip(&mut runs) {
            let run = one(plan, share, artifacts)?;
            let (keeps, seconds) = (run.guest_keeps_ratio * 100.0, run.base_seconds);
            progress(&format!("round {round}, base_share {share}: the guest keeps {keeps:.1} % for {seconds:.2} s"));
            runs.push(run);
        }
    }
    let rows = plan.shares.iter().zip(runs).map(|(share, runs)| Row {
        base_share: share.clone(),
        guest_keeps_ratio: median(runs.iter().map(|run| run.guest_keeps_ratio).collect()),
        base_seconds: median(runs.iter().map(|run| run.base_seconds).collect()),
        runs,
    });
    let (memory, filled_pages, rows) = (plan.memory.clone(), plan.filled_pages, rows.collect());
    Ok(Report { schema: SCHEMA.into(), machine, memory, filled_pages, rows })
}

fn one(plan: &Plan, share: &str, artifacts: &Artifacts) -> Result<Run, BenchError> {
    let extra = format!("[protect]\nbase_share = \"{share}\"\n");
    let mut bench = Bench::start(artifacts, &Mode::unprotected(), &plan.memory, &extra)?;
    let mut client = bench.connect()?;
    fill(&mut client, plan.filled_pages)?;
    order(&mut client, &["FT.WORK", "1"])?;
    let mut seen = vec![(clock::mono_us(), Counted::ask(&mut client)?)];
    thread::sleep(BEFORE);
    seen.push((clock::mono_us(), Counted::ask(&mut client)?));
    let since = clock::mono_us();
    bench.pair.start_backup(Node::B)?;
    let deadline = Instant::now() + START_LIMIT;
    let (began, ended) = loop {
        thread::sleep(ASK_INTERVAL);
        // While the base is copied output leaves at once.
        seen.push((clock::mono_us(), Counted::ask(&mut client)?));
        let events = bench.pair.events(Node::A, since)?;
        let entered = |state: &str| events.iter().find(|event| event.enters(state)).map(|event| event.mono_us);
        if let (Some(began), Some(ended)) = (entered("resync"), entered("protected")) {
            break (began, ended);
        }
        if Instant::now() >= deadline {
            return Err(BenchError::Wrong(format!("no base in {START_LIMIT:?}:\n{}", bench.pair.logs())));
        }
    };
    // Its speed from the first answer after the base began to the last before it ended.
    let during: Vec<_> = seen.iter().filter(|(at, _)| (began..=ended).contains(at)).collect();
    let (Some((first_at, first)), Some((last_at, last))) = (during.first(), during.last()) else {
        return Err(BenchError::Wrong("the base was too short for the guest to be asked".into()));
    };
    let units = |n: u64, us: u64| rate(n, Duration::from_micros(us));
    let before = units(seen[1].1.work_units - seen[0].1.work_units, seen[1].0 - seen[0].0);
    let speed = units(last.work_units - first.work_units, last_at - first_at);
    Ok(Run {
        before_units_per_second: before,
        during_units_per_second: speed,
        guest_keeps_ratio: speed / before,
        base_seconds: Duration::from_micros(ended - began).as_secs_f64(),
    })
}

/// Lets the guest write to so many pages, so that there is something to copy.
fn fill(client: &mut Connection, pages: u32) -> Result<(), BenchError> {
    let pages = u64::from(pages);
    order(client, &["FT.DIRTY", "200000", &pages.to_string()])?;
    let deadline = Instant::now() + START_LIMIT;
    while Counted::ask(client)?.pages_dirtied < pages {
        if Instant::now() >= deadline {
            return Err(BenchError::Wrong(format!("the guest did not write {pages} pages in {START_LIMIT:?}")));
        }
        thread::sleep(ASK_INTERVAL);
    }
    // The buffer stays, hardly anything is written to it any more.
    order(client, &["FT.DIRTY", "1"])
}

/// What the guest is to keep of its speed with the default share.
const KEEPS: f64 = 80.0;

impl Findings for Report {
    const NAME: &'static str = "base";

    fn tables(&self) -> Vec<Table> {
        let Self { machine, memory, filled_pages, .. } = self;
        let title =
            format!("a base of {memory}, {filled_pages} pages of it with data; medians of runs, in turn; {machine}");
        let mut table = Table::new(title, &["base_share", "guest keeps, %", "base, s"]);
        for row in &self.rows {
            let figures = [format!("{:.1}", row.guest_keeps_ratio * 100.0), format!("{:.2}", row.base_seconds)];
            table.row([row.base_share.clone()].into_iter().chain(figures).collect());
        }
        vec![table]
    }

    fn targets(&self) -> Vec<Target> {
        let keeps = |row: &Row| {
            let what = format!("guest keeps, %; base_share {}", row.base_share);
            Target::at_least(what, row.guest_keeps_ratio * 100.0, KEEPS)
        };
        self.rows.iter().map(keeps).collect()
    }
}
