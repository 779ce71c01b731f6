//! Breadth first. The machinery under test cannot be copied: every state is lived through again from the beginning.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use replication_proto::mutant::Mutant;

use super::op::{Op, Step};
use super::world::{Choice, Violation, World, following};
use super::{Bounds, HUNTED};
use crate::explore::mutants::activate;
use crate::explore::search::said;

/// What a search came to.
#[derive(Debug)]
pub struct Outcome {
    /// Every state within the bounds was reached, and none is wrong.
    pub complete: bool,
    /// States.
    pub states: usize,
    /// Steps, those to states that were known included.
    pub transitions: usize,
    /// Files that were looked at as a power cut left them.
    pub looked: u64,
    /// Steps to the last state.
    pub depth: usize,
    /// States that show something.
    pub seen: BTreeMap<&'static str, u64>,
    /// A shortest way to a violation.
    pub found: Option<(Vec<Step>, Violation)>,
    /// Time.
    pub took: Duration,
}

struct Search {
    bounds: Bounds,
    known: HashSet<u128>,
    /// The step to each state and the state before it.
    steps: Vec<(u32, Step)>,
    next: Vec<u32>,
    outcome: Outcome,
}

const ROOT: u32 = u32::MAX;

/// All of it, or until more than `states` are known or something is wrong. `progress`: a line about every level.
pub fn search(bounds: Bounds, states: usize, progress: bool) -> Outcome {
    let began = Instant::now();
    let outcome = Outcome {
        complete: false,
        states: 1,
        transitions: 0,
        looked: 0,
        depth: 0,
        seen: BTreeMap::new(),
        found: None,
        took: Duration::ZERO,
    };
    let mut search = Search { bounds, known: HashSet::new(), steps: Vec::new(), next: Vec::new(), outcome };
    search.known.insert(World::new(bounds).print());
    let mut level = vec![ROOT];
    while !level.is_empty() && search.outcome.states <= states && search.outcome.found.is_none() {
        search.outcome.depth += 1;
        for at in level {
            search.expand(at);
            if search.outcome.found.is_some() {
                break;
            }
        }
        level = std::mem::take(&mut search.next);
        if progress {
            let (depth, known) = (search.outcome.depth, search.outcome.states);
            eprintln!("  {depth:>3}: {} new, {known} states, {:.0} s", level.len(), began.elapsed().as_secs_f64());
        }
    }
    let mut outcome = search.outcome;
    outcome.complete = outcome.found.is_none() && outcome.states <= states;
    outcome.took = began.elapsed();
    outcome
}

impl Search {
    fn path(&self, mut at: u32) -> Vec<Step> {
        let mut path = Vec::new();
        while at != ROOT {
            let (before, step) = &self.steps[at as usize];
            path.push(step.clone());
            at = *before;
        }
        path.reverse();
        path
    }

    fn lived(&self, path: &[Step]) -> World {
        let mut world = World::new(self.bounds);
        for step in path {
            world.perform(step).expect("what went well before goes well again");
        }
        world
    }

    fn expand(&mut self, at: u32) {
        let path = self.path(at);
        let world = self.lived(&path);
        for op in world.ops() {
            let plain = Step { op, cut: None, kept: Vec::new() };
            if matches!(op, Op::Cut(_)) {
                self.all_outcomes(at, &path, plain);
            } else {
                let Some(spent) = self.take(at, &path, plain).map(|(_, spent)| spent) else { return };
                if !world.may_cut() {
                    continue;
                }
                for (node, changes) in spent.into_iter().enumerate() {
                    for change in 0..changes {
                        let step = Step { op, cut: Some((node, change)), kept: Vec::new() };
                        self.all_outcomes(at, &path, step);
                    }
                }
            }
            if self.outcome.found.is_some() {
                return;
            }
        }
    }

    /// A step with a power cut, for everything that the cut may leave: counted up like the digits of a number.
    fn all_outcomes(&mut self, at: u32, path: &[Step], mut step: Step) {
        loop {
            let Some((chosen, _)) = self.take(at, path, step.clone()) else { return };
            let Some(kept) = following(&chosen) else { return };
            step.kept = kept;
        }
    }

    /// One step from a state. Hands back what a power cut chose, and how many changes of files there were on each host; `None`: something is wrong.
    fn take(&mut self, at: u32, path: &[Step], step: Step) -> Option<(Vec<Choice>, [u64; 2])> {
        let mut world = self.lived(path);
        let before = world.spent();
        let done = catch_unwind(AssertUnwindSafe(|| world.perform(&step)));
        let done = done.unwrap_or_else(|cause| Err(format!("an assert of the pair: {}", said(&*cause))));
        self.outcome.transitions += 1;
        self.outcome.looked += world.looked;
        if let Err(violation) = done {
            let trace = path.iter().cloned().chain([step]).collect();
            self.outcome.found = Some((trace, violation));
            return None;
        }
        if self.known.insert(world.print()) {
            self.outcome.states += 1;
            world.sights().into_iter().for_each(|sight| *self.outcome.seen.entry(sight).or_insert(0) += 1);
            let number = u32::try_from(self.steps.len()).expect("fewer states");
            self.steps.push((at, step));
            self.next.push(number);
        }
        let after = world.spent();
        Some((std::mem::take(&mut world.chosen), [after[0] - before[0], after[1] - before[1]]))
    }
}

/// A trace, in words.
pub fn tell(trace: &[Step]) -> String {
    let line = |(number, step): (usize, &Step)| {
        let cut = step.cut.map_or(String::new(), |(node, change)| {
            format!("; the power of {} fails within change {change} of its files", ["A", "B"][node])
        });
        let kept = if step.kept.is_empty() { String::new() } else { format!(", keeps {:?}", step.kept) };
        format!("{:>3} {}{cut}{kept}\n", number + 1, step.op)
    };
    trace.iter().enumerate().map(line).collect()
}

/// Explores with one rule broken until that is noticed.
///
/// # Panics
/// In a build without the feature `mutants`, and for a rule that is not in [`HUNTED`].
pub fn hunt(mutant: Mutant, states: usize) -> (Bounds, Outcome) {
    let (_, name) = HUNTED.into_iter().find(|(hunted, _)| *hunted == mutant).expect("a rule of disks");
    let bounds = Bounds::named(name).expect("bounds of this name");
    activate(Some(mutant));
    let outcome = search(bounds, states, false);
    activate(None);
    (bounds, outcome)
}
