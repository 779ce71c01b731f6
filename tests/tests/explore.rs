//! The exhaustive explorer, as far as it fits into every day: small configurations to their end.

use tests::explore::disk::{self, Bounds};
use tests::explore::heal::heal;
use tests::explore::mind::Memory;
use tests::explore::search::{Limits, Outcome, search, tell};
use tests::explore::setup::Setup;

/// One of so many states is repaired.
const SAMPLE: usize = 499;

fn named(name: &str) -> Setup {
    Setup::named(name).expect("a configuration of this name")
}

fn explored(name: &str) -> Outcome {
    explored_as(&named(name))
}

fn explored_as(setup: &Setup) -> Outcome {
    let name = setup.name;
    let limits = Limits { threads: 1, states: 2_000_000, progress: false, mutant: None, sample: SAMPLE };
    let outcome = search(setup, limits);
    if let Some(found) = &outcome.found {
        panic!("{name}: {}", tell(setup, found));
    }
    assert!(outcome.complete, "{name}: more than {} states", limits.states);
    println!(
        "{name}: {} states, {} steps, {:?}: {:?}",
        outcome.states, outcome.transitions, outcome.took, outcome.seen
    );
    let mut memory = Memory::default();
    for world in &outcome.sample {
        if let Err(stuck) = heal(setup, &mut memory, world) {
            panic!("{name}: {stuck}");
        }
    }
    outcome
}

/// The search was not vacuous: there are states that contain all of these.
fn contains(outcome: &Outcome, sights: &[&str]) {
    for sight in sights {
        assert!(outcome.seen.get(sight).is_some_and(|count| *count > 0), "no state is {sight}: {:?}", outcome.seen);
    }
}

#[test]
fn connections_break_and_processes_die() {
    let outcome = explored("calm");
    contains(&outcome, &["solo", "resync", "protected", "in sync", "contending", "taken over", "fenced"]);
    assert!(outcome.states >= 150_000, "{} states", outcome.states);
}

#[test]
fn heartbeats_arrive_late() {
    contains(&explored("beats"), &["protected", "taken over", "fenced"]);
}

#[test]
fn a_side_that_handed_the_guest_over_becomes_the_backup() {
    contains(&explored("rejoin"), &["switched over", "taken over", "fenced", "swapped"]);
}

#[test]
fn a_side_that_reached_nobody_keeps_its_guest_until_it_learns_who_runs() {
    contains(&explored("isolated"), &["solo", "taken over", "fenced", "restarted"]);
}

#[test]
fn the_record_is_set_back() {
    let outcome = explored("rollback");
    contains(&outcome, &["protected", "taken over", "restarted", "fenced"]);
    assert!(outcome.states >= 200_000, "{} states", outcome.states);
}

#[test]
fn answers_of_the_arbiter_are_lost_and_writes_land_late() {
    contains(&explored("late"), &["protected", "taken over", "fenced", "contending"]);
}

#[test]
fn operators_command_and_guests_end() {
    let outcome = explored_as(&Setup { epochs: 2, ..named("orders") });
    contains(&outcome, &["stopped", "protected", "taken over", "fenced"]);
    assert!(outcome.states >= 400_000, "{} states", outcome.states);
}

#[test]
fn processes_are_started_again() {
    let outcome = explored("lives");
    contains(&outcome, &["restarted", "protected", "taken over", "fenced"]);
    assert!(outcome.states >= 700_000, "{} states", outcome.states);
}

/// Disks: the machinery is the real one, and the power fails at every change of every file.
fn explored_disks(name: &str) -> disk::search::Outcome {
    let bounds = Bounds::named(name).expect("bounds of this name");
    let outcome = disk::search::search(bounds, 2_000_000, false);
    if let Some((trace, violation)) = &outcome.found {
        panic!("{name}: {}{violation}", disk::search::tell(trace));
    }
    assert!(outcome.complete, "{name}: too many states");
    println!("{name}: {} states, {} steps, {:?}", outcome.states, outcome.transitions, outcome.seen);
    outcome
}

fn shows(outcome: &disk::search::Outcome, sights: &[&str]) {
    for sight in sights {
        assert!(outcome.seen.get(sight).is_some_and(|count| *count > 0), "no state is {sight}: {:?}", outcome.seen);
    }
}

/// As far as the first 20,000 states; to the end it takes many minutes (docs/testing.md).
#[test]
fn a_flush_that_was_told_of_outlives_a_power_cut_of_either_host() {
    let outcome = disk::search::search(Bounds::named("flush").expect("bounds"), 20_000, false);
    if let Some((trace, violation)) = &outcome.found {
        panic!("{}{violation}", disk::search::tell(trace));
    }
    shows(&outcome, &["in sync", "output held", "told of stable storage", "taken over", "power cut"]);
}

#[test]
fn a_former_owner_s_disk_becomes_its_successor_s() {
    shows(
        &explored_disks("return"),
        &["in sync", "taken over", "protected after a takeover", "told of stable storage"],
    );
}

#[test]
fn the_power_fails_twice() {
    shows(&explored_disks("dark"), &["in sync", "taken over", "power cut", "booted anew"]);
}
