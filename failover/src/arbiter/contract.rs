//! What every arbiter must do, as a suite that each implementation's tests run against a fresh register.

use std::thread;

use replication_proto::{Generation, Incarnation, NodeName, VmId};

use super::{Arbiter, CasOutcome, NodeRef, RECORD_VERSION, Reason, Record, Revision};

/// A valid record; `number` tells it from others.
///
/// # Panics
/// Never: its names are constants.
pub fn sample(number: u64) -> Record {
    let node = |name: &str| NodeRef {
        node: NodeName::new(name).expect("a constant name"),
        incarnation: Incarnation(u128::from(number)),
    };
    Record {
        v: RECORD_VERSION,
        cluster_id: VmId(7),
        generation: Generation(number.max(1)),
        owner: node("a"),
        in_sync: Some(node("b")),
        reason: Reason::Protected,
        written_by: node("a"),
        note: format!("sample {number}"),
    }
}

/// Runs the whole suite. `open` gives handles of one register that is empty at first, as different processes would have them.
///
/// # Panics
/// When the implementation breaks the contract.
pub fn check<A: Arbiter + 'static>(open: impl Fn() -> A) {
    starts_empty_and_creates_once(&open);
    swaps_only_at_the_expected_revision(&open);
    every_handle_sees_the_latest(&open);
    exactly_one_of_many_wins(&open);
}

fn applied(outcome: &CasOutcome) -> Revision {
    match outcome {
        CasOutcome::Applied(revision) => *revision,
        other => panic!("expected a write, got {other:?}"),
    }
}

fn starts_empty_and_creates_once<A: Arbiter>(open: &impl Fn() -> A) {
    let (mut one, mut two) = (open(), open());
    assert_eq!(one.read(), Ok(None), "empty at first");
    assert_eq!(one.compare_and_swap(Some(Revision(1)), &sample(1)), CasOutcome::Conflict, "nothing to replace");
    let revision = applied(&one.compare_and_swap(None, &sample(1)));
    assert_eq!(two.compare_and_swap(None, &sample(2)), CasOutcome::Conflict, "created already");
    let read = two.read().expect("readable").expect("a record");
    assert_eq!((read.revision, read.record), (revision, sample(1)));
}

fn swaps_only_at_the_expected_revision<A: Arbiter>(open: &impl Fn() -> A) {
    let mut one = open();
    let old = one.read().expect("readable").expect("a record").revision;
    let new = applied(&one.compare_and_swap(Some(old), &sample(3)));
    assert!(new > old, "revisions grow");
    for wrong in [old, Revision(new.0 + 1), Revision(0), Revision(u64::MAX)] {
        assert_eq!(one.compare_and_swap(Some(wrong), &sample(4)), CasOutcome::Conflict, "{wrong}");
    }
    // The same content again is a write like any other: it moves the revision on.
    let bumped = applied(&one.compare_and_swap(Some(new), &sample(3)));
    assert!(bumped > new);
    assert_eq!(one.compare_and_swap(Some(new), &sample(5)), CasOutcome::Conflict);
    assert_eq!(one.read().expect("readable").expect("a record").record, sample(3), "conflicts change nothing");
}

fn every_handle_sees_the_latest<A: Arbiter>(open: &impl Fn() -> A) {
    let (mut one, mut two) = (open(), open());
    for number in 10..20 {
        let revision = two.read().expect("readable").expect("a record").revision;
        let written = applied(&one.compare_and_swap(Some(revision), &sample(number)));
        let read = two.read().expect("readable").expect("a record");
        assert_eq!((read.revision, read.record), (written, sample(number)));
        std::mem::swap(&mut one, &mut two);
    }
}

fn exactly_one_of_many_wins<A: Arbiter + 'static>(open: &impl Fn() -> A) {
    for round in 0..20_u64 {
        let start = open().read().expect("readable").expect("a record").revision;
        let contestants: Vec<_> = (0..4_u64)
            .map(|number| {
                let mut arbiter = open();
                thread::spawn(move || arbiter.compare_and_swap(Some(start), &sample(1000 + round * 10 + number)))
            })
            .collect();
        let outcomes: Vec<CasOutcome> =
            contestants.into_iter().map(|contestant| contestant.join().expect("no panic")).collect();
        let winners = outcomes.iter().filter(|outcome| matches!(outcome, CasOutcome::Applied(_))).count();
        assert_eq!(winners, 1, "round {round}: {outcomes:?}");
        assert!(outcomes.iter().all(|outcome| matches!(outcome, CasOutcome::Applied(_) | CasOutcome::Conflict)));
    }
}
