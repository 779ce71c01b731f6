//! Every named point of the real programs at which they may crash, stall or fail does so once, with a client at work: the guest survives or the
//! outage is one that the failure matrix names, nothing acknowledged is lost, never do two guests speak, status tells the truth, and the pair is
//! protected again afterwards.

use std::collections::BTreeSet;
use std::fs;

use failover::failpoint::Point;
use tests::points::{Action, Case, HEAD, Walked, cases, walk};
use tests::real::artifacts::Artifacts;
use tests::real::scene::{Scene, play_with};
use tests::real::{MachineKind, Result};

/// Pairs at one time: they mostly wait for timers.
const MODEL_PAIRS: usize = 4;
const KVM_PAIRS: usize = 2;
/// Shuffles the cases.
const SEED: u64 = 1;

#[test]
fn every_point_on_the_model_machine() {
    let chosen = chosen();
    let walked =
        on(MachineKind::Model, MODEL_PAIRS, |case| chosen.as_ref().is_none_or(|word| case.order().contains(word)));
    if chosen.is_none() {
        let all: BTreeSet<String> = Point::ALL.iter().map(|point| point.name().to_owned()).collect();
        assert_eq!(walked.passed, all, "points that no process ever passed, or that nobody knows");
    }
}

#[test]
fn the_points_that_safety_rests_on_on_kvm() {
    let chosen = chosen();
    on(MachineKind::Kvm, KVM_PAIRS, |case| {
        let wanted = chosen.as_ref().is_none_or(|word| case.order().contains(word));
        wanted && case.point.is_key() && matches!(case.action, Action::Crash | Action::Stop)
    });
}

/// `FT_POINTS=ack.` walks over the orders that contain this only.
fn chosen() -> Option<String> {
    std::env::var("FT_POINTS").ok().filter(|word| !word.is_empty())
}

fn on(machine: MachineKind, pairs: usize, wanted: impl Fn(&Case) -> bool) -> Walked {
    let mut walked = Walked::default();
    let test = |scene: &mut Scene| -> Result<()> {
        println!("{HEAD}");
        walked = walk(machine, scene.artifacts(), cases(SEED, wanted), pairs);
        Ok(())
    };
    play_with(machine, "failpoints", || Artifacts::build_failpoints(machine, |_| {}), test);
    let failures = &walked.failures;
    assert!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n\n"));
    walked
}

/// What is in a program that has failpoints, and in no other.
const NAMES: [&str; 4] = ["FAILPOINTS_DIR", "ack.received", "cas.takeover.before", "generation.fsync"];

/// Without the feature there is nothing of them in the programs; with it there is, so that the search is known to find them.
#[test]
fn ordinary_programs_have_no_failpoints() {
    let artifacts = Artifacts::build_failpoints(MachineKind::Model, |_| {}).unwrap();
    let plain = artifacts.bin.parent().unwrap();
    for program in ["ft-primary", "ft-backup"] {
        let count = |path| {
            let bytes = fs::read(path).unwrap();
            NAMES.iter().filter(|name| bytes.windows(name.len()).any(|window| window == name.as_bytes())).count()
        };
        assert_eq!(count(plain.join(program)), 0, "{program}");
        assert_eq!(count(artifacts.program(program)), NAMES.len(), "{program} with failpoints");
    }
}
