//! `ftbench epochs`: how many checkpoints a second are held, and how much of its speed the guest keeps meanwhile. The vCPU has a processor of its own, everything
//! else has another one.

use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::figures::{Spread, median, ratio};
use super::pairs::{Bench, Checkpoints, Counted, Mode, order, rate};
use super::processors::{self, Threads, Used};
use super::table::{Findings, Table, Target};
use super::{BenchError, host_description};
use crate::real::Node;
use crate::real::artifacts::Artifacts;
use crate::real::status::Status;

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.epochs/2";
/// Before anything counts: buffers grow, each page was there once.
const WARM_UP: Duration = Duration::from_secs(2);
/// How often the owner is asked how many epochs are in flight.
const LOOK: Duration = Duration::from_secs(1);
/// Interval of the cases with a thousand a second, in microseconds: a little less than a millisecond, so that a thousand are held and not just missed.
const OFTEN_US: u32 = 950;
/// Interval of the case with forty a second.
const SELDOM_US: u32 = 25_000;

/// What the guest does, and how often it is checkpointed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Case {
    pub interval_us: u32,
    pub pages_per_epoch: u32,
    /// Pages of the buffer that they are in, one after another.
    pub buffer_pages: u32,
    pub in_flight_limit: u8,
}

impl Case {
    /// The three that have targets or stand beside one: 1,000 a second with always the same 100 pages, with other 100 pages each time, and 40 a second with the
    /// same 1,000 pages.
    pub const ALL: [Self; 3] = [
        Self { interval_us: OFTEN_US, pages_per_epoch: 100, buffer_pages: 100, in_flight_limit: 3 },
        Self { interval_us: OFTEN_US, pages_per_epoch: 100, buffer_pages: 16_384, in_flight_limit: 3 },
        Self { interval_us: SELDOM_US, pages_per_epoch: 1_000, buffer_pages: 1_000, in_flight_limit: 3 },
    ];

    /// What is asked for: checkpoints a second, and what the guest keeps of its speed.
    fn wanted(self) -> Option<(f64, f64)> {
        let same = self.buffer_pages == self.pages_per_epoch;
        match self.interval_us {
            OFTEN_US if same => Some((1_000.0, 0.80)),
            // The clock gives no more than one an interval, and one in a hundred may be late.
            SELDOM_US if same => Some((39.6, 0.97)),
            _ => None,
        }
    }

    fn name(self) -> String {
        let Self { interval_us, pages_per_epoch, buffer_pages, in_flight_limit: _ } = self;
        let same = if buffer_pages == pages_per_epoch { "the same".into() } else { format!("of {buffer_pages}") };
        format!("{pages_per_epoch} pages, {same}, every {interval_us} us")
    }

    fn pages_per_second(self) -> u32 {
        u32::try_from(u64::from(self.pages_per_epoch) * 1_000_000 / u64::from(self.interval_us)).unwrap_or(u32::MAX)
    }

    fn protected(self, hot_pages: bool) -> Mode {
        let Self { interval_us, in_flight_limit, .. } = self;
        Mode::protected(&format!("{interval_us}us in_flight={in_flight_limit} hot_pages={hot_pages}"))
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Each is measured unprotected and protected in each round.
    pub cases: Vec<Case>,
    /// Rounds.
    pub rounds: u32,
    /// How long the first is measured.
    pub span: Duration,
    /// How long the others are.
    pub other_span: Duration,
    /// Whether plain tracking, which protects all pages again, is measured beside that of hot pages.
    pub plain: bool,
    /// The processor of the vCPU.
    pub vcpu_processor: usize,
    /// That of everything else.
    pub other_processor: usize,
}

impl Plan {
    /// What stands beside the target needs no longer than the others.
    fn span_of(&self, span: Duration, hot_pages: bool) -> Duration {
        if hot_pages { span } else { span.min(self.other_span) }
    }
}

/// The result.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: String,
    pub machine: String,
    pub rows: Vec<Row>,
}

/// One case with one way of tracking. Medians over its rounds.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub case: Case,
    pub hot_pages: bool,
    pub seconds_per_run: f64,
    pub committed_per_second: f64,
    pub most_in_flight: u64,
    pub guest_keeps_ratio: f64,
    pub guest_keeps_unwaited_ratio: f64,
    pub other_processor_busy_ratio: f64,
    pub pause_us: Spread,
    pub rounds: Vec<Round>,
}

/// One case, without a backup and with one, one after the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Round {
    pub unprotected: Run,
    pub protected: Run,
}

/// One run. Ratios of processors are parts of the time of one.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Run {
    pub work_units_per_second: f64,
    pub work_units_per_unwaited_second: f64,
    pub dirtied_pages_per_second: f64,
    pub committed_per_second: f64,
    pub most_in_flight: u64,
    pub vcpu_ran_ratio: f64,
    pub vcpu_waited_ratio: f64,
    pub primary_ran_ratio: f64,
    pub backup_ran_ratio: f64,
    pub other_processor_busy_ratio: f64,
    pub vcpu_processor_busy_ratio: f64,
    pub checkpoints: Checkpoints,
}

/// Measures all cases in turn; `progress` is told of each run.
///
/// # Errors
/// The first thing that goes wrong.
pub fn run(plan: &Plan, artifacts: &Artifacts, mut progress: impl FnMut(&str)) -> Result<Report, BenchError> {
    // Before all threads of this process are on one processor, which is then all that it sees.
    let machine = host_description();
    processors::pin(std::process::id(), Threads::Others, plan.other_processor)?;
    let ways: &[bool] = if plan.plain { &[true, false] } else { &[true] };
    let spans = std::iter::once(plan.span).chain(std::iter::repeat(plan.other_span));
    let cases: Vec<(Case, Duration)> = plan.cases.iter().copied().zip(spans).collect();
    for (case, _) in &cases {
        ways.iter().try_for_each(|hot_pages| case.protected(*hot_pages).check(artifacts))?;
    }
    let mut rounds: Vec<Vec<Vec<Round>>> = vec![vec![Vec::new(); ways.len()]; cases.len()];
    for number in 1..=plan.rounds {
        for ((case, span), rounds) in cases.iter().zip(&mut rounds) {
            let unprotected = one(plan, *case, *span, &Mode::unprotected(), artifacts)?;
            for (hot_pages, rounds) in ways.iter().zip(rounds) {
                let protected =
                    one(plan, *case, plan.span_of(*span, *hot_pages), &case.protected(*hot_pages), artifacts)?;
                let round = Round { unprotected, protected };
                progress(&format!(
                    "round {number} of {}, {}, {}: {:.0} checkpoints/s, the guest keeps {:.1} %",
                    plan.rounds,
                    case.name(),
                    way(*hot_pages),
                    protected.committed_per_second,
                    round.keeps() * 100.0
                ));
                rounds.push(round);
            }
        }
    }
    let mut rows = Vec::new();
    for ((case, span), rounds) in cases.into_iter().zip(rounds) {
        for (hot_pages, rounds) in ways.iter().zip(rounds) {
            rows.push(row(case, *hot_pages, plan.span_of(span, *hot_pages), rounds));
        }
    }
    Ok(Report { schema: SCHEMA.into(), machine, rows })
}

fn way(hot_pages: bool) -> &'static str {
    if hot_pages { "hot pages" } else { "plain" }
}

fn row(case: Case, hot_pages: bool, span: Duration, rounds: Vec<Round>) -> Row {
    let middle = |part: fn(&Round) -> f64| median(rounds.iter().map(part).collect());
    Row {
        case,
        hot_pages,
        seconds_per_run: span.as_secs_f64(),
        committed_per_second: middle(|round| round.protected.committed_per_second),
        most_in_flight: rounds.iter().map(|round| round.protected.most_in_flight).max().unwrap_or(0),
        guest_keeps_ratio: middle(Round::keeps),
        guest_keeps_unwaited_ratio: middle(Round::keeps_unwaited),
        other_processor_busy_ratio: middle(|round| round.protected.other_processor_busy_ratio),
        pause_us: Spread::of_runs(rounds.iter().map(|round| round.protected.checkpoints.pause_us)),
        rounds,
    }
}

impl Round {
    fn keeps(&self) -> f64 {
        ratio(self.protected.work_units_per_second, self.unprotected.work_units_per_second)
    }

    /// The same without the time in which the vCPU had no processor: on a host that others use, what they took is not protection's doing.
    fn keeps_unwaited(&self) -> f64 {
        ratio(self.protected.work_units_per_unwaited_second, self.unprotected.work_units_per_unwaited_second)
    }
}

fn committed(status: &Status) -> u64 {
    let number = |field| status.number(field).unwrap_or_default();
    number("epoch").saturating_sub(number("lag_epochs"))
}

/// What is read before and after.
struct Moment {
    at: Instant,
    counted: Counted,
    committed: u64,
    vcpus: Used,
    primary: Used,
    backup: Used,
    busy: [Duration; 2],
}

fn one(plan: &Plan, case: Case, span: Duration, mode: &Mode, artifacts: &Artifacts) -> Result<Run, BenchError> {
    let mut bench = Bench::start(artifacts, mode, "256MiB", "")?;
    let primary = bench.pair.daemon(Node::A).id();
    let backup = mode.epoch.is_some().then(|| bench.pair.daemon(Node::B).id());
    processors::pin(primary, Threads::Vcpus, plan.vcpu_processor)?;
    for process in backup.into_iter().chain([primary]) {
        processors::pin(process, Threads::Others, plan.other_processor)?;
    }
    let mut client = bench.connect()?;
    order(&mut client, &["FT.DIRTY", &case.pages_per_second().to_string(), &case.buffer_pages.to_string()])?;
    order(&mut client, &["FT.WORK", "1"])?;
    thread::sleep(WARM_UP);
    let mut look = || -> Result<(Moment, Status), BenchError> {
        let status = bench.status()?;
        let used = |process: u32| Used::of(process, Threads::Others);
        let moment = Moment {
            at: Instant::now(),
            counted: Counted::ask(&mut client)?,
            committed: committed(&status),
            vcpus: Used::of(primary, Threads::Vcpus)?,
            primary: used(primary)?,
            backup: backup.map_or(Ok(Used::default()), used)?,
            busy: [processors::busy(plan.vcpu_processor)?, processors::busy(plan.other_processor)?],
        };
        Ok((moment, status))
    };
    let (before, _) = look()?;
    let mut most_in_flight = 0;
    while let Some(left) = span.checked_sub(before.at.elapsed()).filter(|left| !left.is_zero()) {
        thread::sleep(left.min(LOOK));
        most_in_flight = most_in_flight.max(bench.status()?.number("lag_epochs").unwrap_or_default());
    }
    let (after, status) = look()?;
    let span = after.at - before.at;
    let part = |time: Duration| time.as_secs_f64() / span.as_secs_f64();
    let vcpus = after.vcpus.since(before.vcpus);
    let speed = after.counted.speed_since(&before.counted);
    let waited = part(vcpus.waited).min(1.0);
    Ok(Run {
        work_units_per_second: speed,
        work_units_per_unwaited_second: if waited < 1.0 { speed / (1.0 - waited) } else { 0.0 },
        dirtied_pages_per_second: after.counted.pages_since(&before.counted),
        committed_per_second: rate(after.committed - before.committed, span),
        most_in_flight,
        vcpu_ran_ratio: part(vcpus.ran),
        vcpu_waited_ratio: part(vcpus.waited),
        primary_ran_ratio: part(after.primary.since(before.primary).ran),
        backup_ran_ratio: part(after.backup.since(before.backup).ran),
        other_processor_busy_ratio: part(after.busy[1].saturating_sub(before.busy[1])),
        vcpu_processor_busy_ratio: part(after.busy[0].saturating_sub(before.busy[0])),
        checkpoints: Checkpoints::of(&status),
    })
}

impl Findings for Report {
    const NAME: &'static str = "epochs";

    fn tables(&self) -> Vec<Table> {
        let title = format!(
            "what the guest keeps of its speed, its vCPU alone on a processor and everything else on another; medians of {} rounds; {}",
            self.rows.first().map_or(0, |row| row.rounds.len()),
            self.machine
        );
        let heads = [
            "",
            "tracking",
            "s",
            "committed/s",
            "in flight",
            "keeps, %",
            "unwaited, %",
            "other CPU, %",
            "pause p50 us",
            "p99",
        ];
        let mut table = Table::new(title, &heads);
        for row in &self.rows {
            table.row(vec![
                row.case.name(),
                way(row.hot_pages).into(),
                format!("{:.0}", row.seconds_per_run),
                format!("{:.0}", row.committed_per_second),
                row.most_in_flight.to_string(),
                format!("{:.1}", row.guest_keeps_ratio * 100.0),
                format!("{:.1}", row.guest_keeps_unwaited_ratio * 100.0),
                format!("{:.0}", row.other_processor_busy_ratio * 100.0),
                format!("{:.0}", row.pause_us.p50),
                format!("{:.0}", row.pause_us.p99),
            ]);
        }
        vec![table, self.loads()]
    }

    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for row in self.rows.iter().filter(|row| row.hot_pages) {
            let Some((committed, keeps)) = row.case.wanted() else { continue };
            let (name, most) = (row.case.name(), u32::try_from(row.most_in_flight).unwrap_or(u32::MAX));
            targets.push(Target::at_least(format!("committed/s; {name}"), row.committed_per_second, committed));
            let limit = f64::from(row.case.in_flight_limit);
            targets.push(Target::at_most(format!("epochs in flight; {name}"), f64::from(most), limit));
            targets.push(Target::at_least(format!("guest keeps; {name}"), row.guest_keeps_ratio, keeps));
        }
        targets
    }
}

impl Report {
    /// Who used the processors.
    fn loads(&self) -> Table {
        let heads = ["", "tracking", "vCPU ran", "waited", "primary", "backup", "other CPU", "unprotected", "pages/s"];
        let mut table = Table::new("processor time, in % of one processor", &heads);
        for row in &self.rows {
            let middle =
                |part: fn(&Run) -> f64| median(row.rounds.iter().map(|round| part(&round.protected)).collect());
            let alone =
                |part: fn(&Run) -> f64| median(row.rounds.iter().map(|round| part(&round.unprotected)).collect());
            let shares = [
                middle(|run| run.vcpu_ran_ratio),
                middle(|run| run.vcpu_waited_ratio),
                middle(|run| run.primary_ran_ratio),
                middle(|run| run.backup_ran_ratio),
                middle(|run| run.other_processor_busy_ratio),
                alone(|run| run.other_processor_busy_ratio),
            ];
            let mut cells = vec![row.case.name(), way(row.hot_pages).into()];
            cells.extend(shares.iter().map(|share| format!("{:.1}", share * 100.0)));
            cells.push(format!("{:.0}", middle(|run| run.dirtied_pages_per_second)));
            table.row(cells);
        }
        table
    }
}
