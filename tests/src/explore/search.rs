//! Breadth first, level by level, on as many threads as wanted. States are kept by fingerprint, traces by parent.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use failover::arbiter::Reason;
use failover::decide::StateName;
use replication_proto::mutant::Mutant;

use super::claims::check;
use super::mind::Memory;
use super::setup::{NODES, Setup};
use super::step::{Step, apply, steps};
use super::turn::Violation;
use super::world::{Node, Print, World};

/// States expanded between two merges.
const BATCH: usize = 1 << 15;

/// Fingerprints are hashes already.
#[derive(Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("fingerprints only")
    }

    fn write_u128(&mut self, print: u128) {
        let low = print & u128::from(u64::MAX);
        self.0 = u64::try_from(low).expect("64 bits");
    }
}

type Prints<V> = HashMap<Print, V, BuildHasherDefault<Fold>>;

/// Limits of a search, beside the configuration's.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Threads.
    pub threads: usize,
    /// Gives up after so many states.
    pub states: usize,
    /// Prints a line about every level.
    pub progress: bool,
    /// The rule that is broken, on every thread.
    pub mutant: Option<Mutant>,
    /// One of so many states is kept for [`super::heal`]; 0: none.
    pub sample: usize,
}

/// What a state may contain, and its test.
type Sight = (&'static str, fn(&World) -> bool);

/// All of them.
const SIGHTS: [Sight; 13] = [
    ("solo", |w| state(w, StateName::Solo)),
    ("resync", |w| state(w, StateName::Resync)),
    ("protected", |w| state(w, StateName::Protected)),
    ("in sync", |w| state(w, StateName::InSync)),
    ("contending", |w| state(w, StateName::Contending)),
    ("taking over", |w| state(w, StateName::TakingOver)),
    ("taken over", |w| reason(w, Reason::Takeover) && state(w, StateName::Solo)),
    ("switched over", |w| reason(w, Reason::Switchover) && state(w, StateName::Solo)),
    ("protected again", |w| state(w, StateName::Protected) && revision(w) > 3),
    ("fenced", |w| state(w, StateName::Fenced)),
    ("swapped", |w| w.owner(1).is_some() && state(w, StateName::Protected)),
    ("stopped", |w| reason(w, Reason::Stopped)),
    ("restarted", |w| NODES.into_iter().any(|node| w.process(node).is_some_and(|process| process.life > 1))),
];

fn state(world: &World, name: StateName) -> bool {
    NODES.into_iter().any(|node| world.process(node).is_some_and(|process| process.core.view.state == name))
}

fn reason(world: &World, reason: Reason) -> bool {
    world.register.as_ref().is_some_and(|stored| stored.record.reason == reason)
}

fn revision(world: &World) -> u64 {
    world.register.as_ref().map_or(0, |stored| stored.revision.0)
}

/// How a search ended.
#[derive(Debug)]
pub struct Outcome {
    /// Distinct states.
    pub states: usize,
    /// Steps taken from them.
    pub transitions: u64,
    /// Levels: the longest of all shortest traces.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
    /// Every reachable state was seen.
    pub complete: bool,
    /// States by what they contain, to show that the search was not vacuous.
    pub seen: BTreeMap<&'static str, u64>,
    /// A shortest trace to a violation, if there is one.
    pub found: Option<Found>,
    /// Some of the states.
    pub sample: Vec<World>,
}

/// A violation.
#[derive(Debug, Clone)]
pub struct Found {
    /// What must not have happened.
    pub violation: Violation,
    /// The steps that lead to it.
    pub trace: Vec<Step>,
}

/// A new state, and where it came from.
struct New {
    print: Print,
    world: World,
}

/// What one thread made of its share.
#[derive(Default)]
struct Share {
    /// By parent.
    new: Vec<(u32, Vec<New>)>,
    transitions: u64,
    found: Option<(u32, Option<Step>, Violation)>,
}

struct Search<'a> {
    setup: &'a Setup,
    limits: Limits,
    known: Prints<u32>,
    parents: Vec<u32>,
    nodes: Prints<Arc<Node>>,
    memories: Vec<Memory>,
    outcome: Outcome,
}

fn index(of: usize) -> u32 {
    u32::try_from(of).expect("fewer than four billion states")
}

/// Explores all that the configuration allows.
pub fn search(setup: &Setup, limits: Limits) -> Outcome {
    let outcome = Outcome {
        states: 0,
        transitions: 0,
        depth: 0,
        took: Duration::ZERO,
        complete: false,
        seen: BTreeMap::new(),
        found: None,
        sample: Vec::new(),
    };
    let (known, nodes) = (Prints::default(), Prints::default());
    let memories = (0..limits.threads.max(1)).map(|_| Memory::default()).collect();
    super::mutants::activate(limits.mutant);
    Search { setup, limits, known, parents: Vec::new(), nodes, memories, outcome }.run()
}

impl Search<'_> {
    fn run(mut self) -> Outcome {
        let began = Instant::now();
        let mut frontier = Vec::new();
        let world = World::new();
        self.take(u32::MAX, New { print: world.print(), world }, &mut frontier);
        while !frontier.is_empty() && self.outcome.found.is_none() && self.parents.len() < self.limits.states {
            let mut next = Vec::new();
            let mut level = frontier.into_iter();
            while self.outcome.found.is_none() && self.parents.len() < self.limits.states {
                let batch: Vec<(u32, World)> = level.by_ref().take(BATCH).collect();
                if batch.is_empty() {
                    break;
                }
                self.expand(&batch, &mut next);
            }
            frontier = next;
            self.outcome.depth += 1;
            if self.limits.progress {
                let (states, seconds) = (self.parents.len(), began.elapsed().as_secs_f64());
                println!(
                    "  level {:>3}: {states:>9} states, {:>8} new, {:>10} steps, {seconds:>6.1} s, {} node states",
                    self.outcome.depth,
                    frontier.len(),
                    self.outcome.transitions,
                    self.nodes.len()
                );
            }
        }
        self.outcome.states = self.parents.len();
        self.outcome.complete = frontier.is_empty() && self.outcome.found.is_none();
        self.outcome.took = began.elapsed();
        self.outcome
    }

    /// Expands a batch on all threads, then takes what is new in the order of its parents: the result does not depend on the threads.
    fn expand(&mut self, batch: &[(u32, World)], next: &mut Vec<(u32, World)>) {
        let each = batch.len().div_ceil(self.limits.threads).max(1);
        let (setup, known, mutant) = (self.setup, &self.known, self.limits.mutant);
        let shares: Vec<Share> = std::thread::scope(|scope| {
            let threads: Vec<_> = batch
                .chunks(each)
                .zip(&mut self.memories)
                .map(|(chunk, memory)| scope.spawn(move || expand_chunk(setup, known, mutant, memory, chunk)))
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("an explorer's thread does not panic")).collect()
        });
        for share in shares {
            self.outcome.transitions += share.transitions;
            for (parent, new) in share.new {
                for new in new {
                    self.take(parent, new, next);
                }
            }
            if let (Some((parent, step, violation)), None) = (share.found, &self.outcome.found) {
                let trace = self.trace(parent, step);
                self.outcome.found = Some(Found { violation, trace });
            }
        }
    }

    fn take(&mut self, parent: u32, New { print, mut world }: New, next: &mut Vec<(u32, World)>) {
        if self.known.contains_key(&print) {
            return;
        }
        let number = index(self.parents.len());
        self.known.insert(print, number);
        self.parents.push(parent);
        for shared in &mut world.nodes {
            shared.value = Arc::clone(self.nodes.entry(shared.print).or_insert_with(|| Arc::clone(&shared.value)));
        }
        for (name, test) in SIGHTS {
            *self.outcome.seen.entry(name).or_default() += u64::from(test(&world));
        }
        if self.limits.sample > 0 && self.parents.len().is_multiple_of(self.limits.sample) {
            self.outcome.sample.push(world.clone());
        }
        next.push((number, world));
    }

    /// The steps from the beginning to a state, and one more: found again by going the same way.
    fn trace(&self, state: u32, last: Option<Step>) -> Vec<Step> {
        let mut path = vec![state];
        while let Some(&parent) = self.parents.get(usize::try_from(path[path.len() - 1]).expect("an index")) {
            if parent == u32::MAX {
                break;
            }
            path.push(parent);
        }
        path.reverse();
        let (mut world, mut trace, mut memory) = (World::new(), Vec::new(), Memory::default());
        for wanted in &path[1..] {
            let all = steps(self.setup, &world).into_iter();
            let (step, after) = all
                .filter_map(|step| guarded(self.setup, &mut memory, &world, step).ok().map(|after| (step, after)))
                .find(|(_, after)| self.known.get(&after.print()) == Some(wanted))
                .expect("the way that was found once is found again");
            trace.push(step);
            world = after;
        }
        trace.extend(last);
        trace
    }
}

fn expand_chunk(
    setup: &Setup,
    known: &Prints<u32>,
    mutant: Option<Mutant>,
    memory: &mut Memory,
    chunk: &[(u32, World)],
) -> Share {
    super::mutants::activate(mutant);
    let mut share = Share::default();
    let mut here: Prints<()> = Prints::default();
    for (number, world) in chunk {
        let mut new = Vec::new();
        for step in steps(setup, world) {
            share.transitions += 1;
            match guarded(setup, memory, world, step) {
                Ok(after) => {
                    let print = after.print();
                    if known.contains_key(&print) || here.insert(print, ()).is_some() {
                        continue;
                    }
                    if let Err(violation) = check(&after) {
                        share.found = Some((*number, Some(step), violation));
                        share.new.push((*number, new));
                        return share;
                    }
                    new.push(New { print, world: after });
                }
                Err(violation) => {
                    share.found = Some((*number, Some(step), violation));
                    share.new.push((*number, new));
                    return share;
                }
            }
        }
        share.new.push((*number, new));
    }
    share
}

/// Carries a step out; an assertion that fails is a violation, too.
///
/// # Errors
/// See [`Violation`].
pub fn guarded(setup: &Setup, memory: &mut Memory, world: &World, step: Step) -> Result<World, Violation> {
    match catch_unwind(AssertUnwindSafe(|| apply(setup, memory, world, step, false))) {
        Ok(done) => done.map(|(after, _)| after).map_err(|(violation, _)| violation),
        Err(panic) => Err(format!("assertion: {}", said(panic.as_ref()))),
    }
}

/// What a panic said.
pub(super) fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_else(|| "a panic".to_owned())
}

/// A trace in words: who did what, what the core was told and what it answered.
pub fn tell(setup: &Setup, found: &Found) -> String {
    let mut lines = vec![format!("violation after {} steps: {}", found.trace.len(), found.violation)];
    let (mut world, mut memory) = (World::new(), Memory::default());
    for (number, step) in found.trace.iter().enumerate() {
        lines.push(format!("{:>3}. {step}", number + 1));
        let done = catch_unwind(AssertUnwindSafe(|| apply(setup, &mut memory, &world, *step, true)));
        match done {
            Ok(Ok((after, log))) => {
                lines.extend(log);
                world = after;
            }
            Ok(Err((violation, log))) => {
                lines.extend(log);
                lines.push(format!("  ** {violation}"));
            }
            Err(panic) => lines.push(format!("  ** assertion: {}", said(panic.as_ref()))),
        }
        lines.push(format!("     {}", summary(&world)));
    }
    lines.join("\n")
}

/// One line about a state.
pub fn summary(world: &World) -> String {
    let node = |node: usize| match world.process(node) {
        None => "off".to_owned(),
        Some(process) => {
            let view = &process.core.view;
            let gate = world.owner(node).map_or(String::new(), |o| format!(" gate {:?} sealed {}", o.gate, o.sealed));
            let holds = world
                .waiter(node)
                .map_or(String::new(), |w| format!(" holds {:?}", w.holding.map(|i| (i.generation, i.epoch))));
            format!("{} life {} gen {}{gate}{holds}", process.core.view.state.word(), process.life, view.generation)
        }
    };
    let record = world.register.as_ref().map_or("none".to_owned(), |stored| {
        let in_sync = stored
            .record
            .in_sync
            .as_ref()
            .map_or("-".to_owned(), |to| format!("{}{}", to.node, super::setup::of_ref(to).1));
        let (owner, life) = (&stored.record.owner.node, super::setup::of_ref(&stored.record.owner).1);
        format!(
            "r{} gen {} owner {owner}{life} in sync {in_sync} ({})",
            stored.revision,
            stored.record.generation,
            stored.record.reason.word()
        )
    });
    format!("A: {} | B: {} | record: {record}", node(0), node(1))
}
