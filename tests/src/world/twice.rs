//! Every ordered pair of faults at every step of one scripted run: start, protection, epochs under load. What swarms find by chance, this finds
//! by counting.

use failover::decide::{Command, GuestEnd};

use super::faults::{Fault, Way};
use super::{MS, Outcome, Plan, World};

/// How long both faults may work before everything is put right.
const WORKING: super::Nanos = 700 * MS;

/// The faults of which pairs are made.
pub fn kinds() -> Vec<Fault> {
    let of_node = |node| {
        [
            Fault::Cut(node),
            Fault::Slow(node, 120 * MS),
            Fault::Kill(node),
            Fault::PowerOff(node),
            Fault::Pause(node, 60 * MS),
            Fault::Pause(node, 450 * MS),
            Fault::Arbiter(node, Way::Refused),
            Fault::Arbiter(node, Way::Lost),
            Fault::Arbiter(node, Way::Lossy),
            Fault::Arbiter(node, Way::Deaf),
            Fault::Command(node, Command::Switchover),
            Fault::Command(node, Command::Stop),
            Fault::Command(node, Command::Unprotect),
            Fault::DiskFull(node, true),
        ]
    };
    let mut kinds: Vec<Fault> = (0..2).flat_map(of_node).collect();
    kinds.extend([
        Fault::Reset,
        Fault::Truncate,
        Fault::FlipBit,
        Fault::Replay,
        Fault::ArbiterSlow(400 * MS),
        Fault::GuestEnds(GuestEnd::PoweredOff),
        Fault::SlowApplier(true),
        Fault::Storm(true),
    ]);
    kinds
}

/// The steps of the script at which the first fault may strike: from the first event until a few epochs after protection.
pub const STEPS: usize = 260;
/// How many events later the second fault may strike.
pub const LATER: [usize; 5] = [0, 2, 9, 40, 150];

/// One scenario.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The step at which the first fault strikes.
    pub step: usize,
    /// The first fault.
    pub first: Fault,
    /// How many events later the second strikes.
    pub later: usize,
    /// The second fault.
    pub second: Fault,
}

/// How many scenarios there are.
pub fn count() -> usize {
    STEPS * LATER.len() * kinds().len() * kinds().len()
}

/// The scenario of a number below [`count`].
pub fn scenario(number: usize) -> Scenario {
    let kinds = kinds();
    let (rest, second) = (number / kinds.len(), number % kinds.len());
    let (rest, first) = (rest / kinds.len(), rest % kinds.len());
    let (step, later) = (rest / LATER.len(), LATER[rest % LATER.len()]);
    Scenario { step, first: kinds[first].clone(), later, second: kinds[second].clone() }
}

/// Lives through a scenario. `noted`: what happens is kept in words.
pub fn live(scenario: &Scenario, noted: bool) -> Outcome {
    let mut world = World::new(Plan::calm(7), noted);
    world.env().conditions.keep_old_packets = true;
    world.run_events(scenario.step);
    world.strike(scenario.first.clone());
    world.run_events(scenario.later);
    world.strike(scenario.second.clone());
    let until = world.now() + WORKING;
    world.run_until(until);
    world.recover();
    world.outcome()
}
