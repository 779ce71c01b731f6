//! A walk over every failpoint of the real programs: at each, in each of its moments, the process crashes, stalls or fails while a client writes;
//! afterwards an operator does what the documentation tells him to, and everything that was promised is checked.
//!
//! * [`orders`]: how a running process is told where to fail, and what it says of it
//! * [`ground`]: a pair that is used for one case after another
//! * [`stage`]: how each moment is brought about
//! * [`operator`]: what a person does until the pair is protected again
//! * [`verdict`]: what must hold afterwards

pub mod ground;
pub mod operator;
pub mod orders;
pub mod stage;
pub mod verdict;

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use failover::failpoint::{Moment, Point, Side};

use crate::real::artifacts::Artifacts;
use crate::real::rng::Rng;
use crate::real::{Error, MachineKind, Result};

use ground::Ground;

/// How long a pause or a stop lasts: longer than the takeover timer.
pub const STALL: Duration = Duration::from_millis(1_000);

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// The process is gone.
    Crash,
    /// One thread stands still for [`STALL`].
    Pause,
    /// The whole process does.
    Stop,
    /// The operation returns its error.
    Fail,
}

impl Action {
    /// As in an order.
    fn order(self) -> String {
        match self {
            Self::Crash => "crash".into(),
            Self::Pause => format!("pause:{}", STALL.as_millis()),
            Self::Stop => "stop".into(),
            Self::Fail => "error".into(),
        }
    }

    /// As in the table.
    fn word(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Pause => "pause",
            Self::Stop => "stop",
            Self::Fail => "error",
        }
    }
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Where.
    pub point: Point,
    /// Whose process.
    pub side: Side,
    /// When.
    pub moment: Moment,
    /// What.
    pub action: Action,
    /// On which pass.
    pub pass: u64,
}

impl Case {
    /// As the process is told.
    #[must_use]
    pub fn order(&self) -> String {
        let pass = if self.pass == 1 { String::new() } else { format!("@{}", self.pass) };
        format!("{}={}{pass}", self.point.name(), self.action.order())
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FAILPOINTS={} on the {:?} in {:?}", self.order(), self.side, self.moment)
    }
}

/// What became of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nobody had to do anything.
    Unnoticed,
    /// The owner went on alone, and took a backup on again.
    Solo,
    /// The other side took over.
    Takeover,
    /// An outage that ended when an operator forced the side that was left to run: nothing lost.
    Forced,
    /// An outage with both copies gone, as the failure matrix says; booted anew.
    Lost,
    /// Switched off in order; nobody resurrected it.
    Off,
    /// It had not run before; it runs now.
    Booted,
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// The fault.
    pub case: Case,
    /// What became of it.
    pub outcome: Outcome,
    /// The longest silence of the guest that ended after the fault, as the client saw it, in microseconds. `None`: its connection did not outlive the guest.
    pub gap_us: Option<u64>,
    /// Acknowledged writes that were read back.
    pub writes: usize,
    /// Frames of the former owner after the takeover: of epochs acknowledged before it.
    pub late_frames: usize,
    /// The first attempt met a host too busy to be judged.
    pub again: bool,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, outcome, gap_us, writes, late_frames, again } = self;
        let gap = gap_us.map_or("-".into(), |us| format!("{}", us / 1_000));
        let (side, moment) = (format!("{:?}", case.side), format!("{:?}", case.moment));
        let late = if *late_frames > 0 { format!("  {late_frames} late frames") } else { String::new() };
        let again = if *again { "  (second attempt)" } else { "" };
        write!(
            f,
            "{:20} {side:8} {moment:11} {:6} {:10} {gap:>6} {writes:>6}{late}{again}",
            case.point.name(),
            case.action.word(),
            format!("{outcome:?}"),
        )
    }
}

/// The head of the table.
pub const HEAD: &str = "point                side     moment      action outcome    gap ms writes";

/// Every fault that makes sense at the points that `wanted` accepts, in an order that `seed` shuffles.
#[must_use]
pub fn cases(seed: u64, wanted: impl Fn(&Case) -> bool) -> Vec<Case> {
    let mut rng = Rng::new(seed);
    let mut all = Vec::new();
    for &point in Point::ALL {
        for &(side, moment) in point.passed_by() {
            for action in [Action::Crash, Action::Pause, Action::Stop, Action::Fail] {
                let sensible = match action {
                    Action::Fail => point.can_fail(),
                    Action::Stop => point.is_key(),
                    Action::Crash | Action::Pause => true,
                };
                let pass = if moment == Moment::Epochs { rng.range(1, 4) } else { 1 };
                let case = Case { point, side, moment, action, pass };
                if sensible && wanted(&case) {
                    all.push((rng.next_u64(), case));
                }
            }
        }
    }
    all.sort_by_key(|(key, _)| *key);
    all.into_iter().map(|(_, case)| case).collect()
}

/// What a walk found.
#[derive(Debug, Default)]
pub struct Walked {
    /// The table, in the order in which cases ended.
    pub rows: Vec<Row>,
    /// Every case that did not end as it must, and why.
    pub failures: Vec<String>,
    /// Names of all points that any process passed.
    pub passed: BTreeSet<String>,
}

/// Walks over `cases` on so many pairs at a time.
///
/// # Panics
/// If a worker panics.
#[must_use]
pub fn walk(machine: MachineKind, artifacts: &Artifacts, cases: Vec<Case>, pairs: usize) -> Walked {
    let queue = Mutex::new(VecDeque::from(cases));
    let found = Mutex::new(Walked::default());
    thread::scope(|scope| {
        for _ in 0..pairs {
            scope.spawn(|| work(machine, artifacts, &queue, &found));
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn work(machine: MachineKind, artifacts: &Artifacts, queue: &Mutex<VecDeque<Case>>, found: &Mutex<Walked>) {
    let mut ground: Option<Ground> = None;
    loop {
        let Some(case) = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() else { break };
        let played = attempt(machine, artifacts, &mut ground, case, false);
        // A host too busy for the pair's timers adds a fault of its own; once more tells the two apart.
        let played = match played {
            Err(Error::Busy { .. }) => attempt(machine, artifacts, &mut ground, case, true),
            other => other,
        };
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        match played {
            Ok(row) => {
                println!("{row}");
                found.rows.push(row);
            }
            Err(e) => {
                println!("{case}: FAILED");
                found.failures.push(format!("{case}: {e}"));
            }
        }
        if let Some(ground) = &ground {
            found.passed.extend(ground.passed());
        }
    }
}

/// Plays one case; a pair that it did not leave whole is not used again.
fn attempt(
    machine: MachineKind,
    artifacts: &Artifacts,
    slot: &mut Option<Ground>,
    case: Case,
    again: bool,
) -> Result<Row> {
    let mut ground = match slot.take() {
        Some(ground) => ground,
        None => Ground::open(machine, artifacts)?,
    };
    match stage::play(&mut ground, case) {
        Ok(row) => {
            *slot = Some(ground);
            Ok(Row { again, ..row })
        }
        Err(e @ Error::Busy { .. }) if !again => Err(e),
        Err(e) => {
            ground.keep_files();
            let logs = ground.logs();
            Err(e.with_detail(&logs))
        }
    }
}
