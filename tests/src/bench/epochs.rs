//! `ftbench epochs`: how many checkpoints a second are held, and how much of its speed the guest keeps meanwhile. The vCPU has a processor of its own, everything
//! else has another one.

use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::figures::{Spread, median};
use super::pairs::{Bench, Checkpoints, Counted, Mode, order, rate};
use super::processors::{self, Threads, Used};
use super::{BenchError, host_description};
use crate::real::Node;
use crate::real::artifacts::Artifacts;
use crate::real::status::Status;

/// Version of the JSON form.
pub const SCHEMA: &str = "ft.bench.epochs/1";
/// Before anything counts: buffers grow, each page was there once.
const WARM_UP: Duration = Duration::from_secs(2);

/// What the guest does, and how often it is checkpointed.
#[derive(Clone, Copy, Debug, Serialize)]
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
        Self { interval_us: 1_000, pages_per_epoch: 100, buffer_pages: 100, in_flight_limit: 3 },
        Self { interval_us: 1_000, pages_per_epoch: 100, buffer_pages: 16_384, in_flight_limit: 3 },
        Self { interval_us: 25_000, pages_per_epoch: 1_000, buffer_pages: 1_000, in_flight_limit: 3 },
    ];

    fn pages_per_second(self) -> u32 {
        u32::try_from(u64::from(self.pages_per_epoch) * 1_000_000 / u64::from(self.interval_us)).unwrap_or(u32::MAX)
    }

    fn protected(self) -> Mode {
        Mode::protected(&format!("{}us in_flight={}", self.interval_us, self.in_flight_limit))
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Each is measured unprotected and protected in each round.
    pub cases: Vec<Case>,
    /// Rounds.
    pub rounds: u32,
    /// How long each is measured.
    pub span: Duration,
    /// The processor of the vCPU.
    pub vcpu_processor: usize,
    /// That of everything else.
    pub other_processor: usize,
}

/// The result.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Report {
    pub schema: &'static str,
    pub machine: String,
    pub seconds_per_run: f64,
    pub rows: Vec<Row>,
}

/// One case. Medians over its rounds.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Row {
    pub case: Case,
    pub committed_per_second: f64,
    pub guest_keeps_ratio: f64,
    pub guest_keeps_unwaited_ratio: f64,
    pub rounds: Vec<Round>,
}

/// One case, both ways, one after the other.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Round {
    pub unprotected: Run,
    pub protected: Run,
}

/// One run. Ratios of processors are parts of the time of one.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "the names of the JSON form; docs/performance.md says what each is")]
pub struct Run {
    pub work_units_per_second: f64,
    pub work_units_per_unwaited_second: f64,
    pub dirtied_pages_per_second: f64,
    pub committed_per_second: f64,
    pub lag_epochs: u64,
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
    processors::pin(std::process::id(), Threads::Others, plan.other_processor)?;
    let mut rounds: Vec<Vec<Round>> = vec![Vec::new(); plan.cases.len()];
    for number in 1..=plan.rounds {
        for (case, rounds) in plan.cases.iter().zip(&mut rounds) {
            let unprotected = one(plan, *case, &Mode::unprotected(), artifacts)?;
            let protected = one(plan, *case, &case.protected(), artifacts)?;
            let round = Round { unprotected, protected };
            progress(&format!(
                "round {number}, {} pages of {} every {} us: {:.0} checkpoints/s, the guest keeps {:.1} % ({:.1} % without what it waited for its processor)",
                case.pages_per_epoch,
                case.buffer_pages,
                case.interval_us,
                protected.committed_per_second,
                round.keeps() * 100.0,
                round.keeps_unwaited() * 100.0
            ));
            rounds.push(round);
        }
    }
    let rows = plan.cases.iter().zip(rounds).map(|(case, rounds)| {
        let middle = |part: fn(&Round) -> f64| median(rounds.iter().map(part).collect());
        Row {
            case: *case,
            committed_per_second: middle(|round| round.protected.committed_per_second),
            guest_keeps_ratio: middle(Round::keeps),
            guest_keeps_unwaited_ratio: middle(Round::keeps_unwaited),
            rounds,
        }
    });
    let rows = rows.collect();
    Ok(Report { schema: SCHEMA, machine: host_description(), seconds_per_run: plan.span.as_secs_f64(), rows })
}

impl Round {
    fn keeps(&self) -> f64 {
        self.protected.work_units_per_second / self.unprotected.work_units_per_second
    }

    /// The same without the time in which the vCPU had no processor: on a host that others use, what they took is not protection's doing.
    fn keeps_unwaited(&self) -> f64 {
        self.protected.work_units_per_unwaited_second / self.unprotected.work_units_per_unwaited_second
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

fn one(plan: &Plan, case: Case, mode: &Mode, artifacts: &Artifacts) -> Result<Run, BenchError> {
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
    thread::sleep(plan.span);
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
        lag_epochs: status.number("lag_epochs").unwrap_or_default(),
        vcpu_ran_ratio: part(vcpus.ran),
        vcpu_waited_ratio: part(vcpus.waited),
        primary_ran_ratio: part(after.primary.since(before.primary).ran),
        backup_ran_ratio: part(after.backup.since(before.backup).ran),
        other_processor_busy_ratio: part(after.busy[1].saturating_sub(before.busy[1])),
        vcpu_processor_busy_ratio: part(after.busy[0].saturating_sub(before.busy[0])),
        checkpoints: Checkpoints::of(&status),
    })
}

impl Report {
    /// The table for people.
    ///
    /// # Panics
    /// Never: a string can be written to.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = format!("medians of rounds of {} s each way; {}\n", self.seconds_per_run, self.machine);
        for row in &self.rows {
            let middle =
                |part: fn(&Run) -> f64| median(row.rounds.iter().map(|round| part(&round.protected)).collect());
            let unprotected = |part: fn(&Run) -> f64| median(row.rounds.iter().map(|r| part(&r.unprotected)).collect());
            let pause = Spread::of_runs(row.rounds.iter().map(|round| round.protected.checkpoints.pause_us));
            let Case { interval_us, pages_per_epoch, buffer_pages, in_flight_limit } = row.case;
            let per_cent = [
                ("guest keeps", row.guest_keeps_ratio),
                ("  without its waits for a processor", row.guest_keeps_unwaited_ratio),
                ("vCPU ran / waited", middle(|r| r.vcpu_ran_ratio)),
                ("", middle(|r| r.vcpu_waited_ratio)),
                ("  unprotected: waited", unprotected(|r| r.vcpu_waited_ratio)),
                ("other threads of the primary", middle(|r| r.primary_ran_ratio)),
                ("backup", middle(|r| r.backup_ran_ratio)),
                ("other processor busy", middle(|r| r.other_processor_busy_ratio)),
                ("  unprotected", unprotected(|r| r.other_processor_busy_ratio)),
            ];
            writeln!(out, "\n{pages_per_epoch} pages of {buffer_pages} every {interval_us} us, at most {in_flight_limit} in flight").expect("a string");
            writeln!(out, "{:>36} {:>9.0}", "committed/s", row.committed_per_second).expect("a string");
            writeln!(out, "{:>36} {:>9.0}", "pages dirtied/s", middle(|r| r.dirtied_pages_per_second))
                .expect("a string");
            writeln!(out, "{:>36} {:>9.0} {:.0} {:.0}", "pause p50 p99 max, us", pause.p50, pause.p99, pause.max)
                .expect("a string");
            for (name, ratio) in per_cent {
                writeln!(out, "{name:>36} {:>8.1}%", ratio * 100.0).expect("a string");
            }
        }
        out
    }
}
