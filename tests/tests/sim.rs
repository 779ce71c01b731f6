//! The simulator: a million epochs with faults, replay byte for byte, and pairs of faults. `cargo sim` does the same on a larger scale.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use failover::config::Overload;
use primary::pacer::OverloadRules;
use tests::check::Seen;
use tests::world::{Outcome, Plan, World, twice};

/// Lives through worlds on all cores until `enough`, and returns what was seen.
fn swarm(live: impl Fn(u64) -> Option<Outcome> + Sync, enough: impl Fn(&Seen) -> bool + Sync) -> Seen {
    let (next, seen) = (AtomicU64::new(0), Mutex::new(Seen::default()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(outcome) = live(number) else { return };
                    assert_eq!(outcome.violation, None, "world {number}");
                    let mut seen = seen.lock().expect("no world panics under the lock");
                    seen.add(&outcome.seen);
                    if enough(&seen) {
                        return;
                    }
                }
            });
        }
    });
    seen.into_inner().expect("no world panics under the lock")
}

#[test]
fn a_million_epochs_with_faults() {
    let seen = swarm(|seed| Some(World::live(Plan::draw(seed), false)), |seen| seen.epochs >= 1_000_000);
    println!("{seen:?}");
    assert!(seen.epochs >= 1_000_000);
    // None of it was in vain.
    let Seen {
        commits, bases, released, answers, takeovers, boots, fenced, solos, protections, refusals, rejoins, ..
    } = seen;
    let counts = [commits, bases, released, answers, takeovers, boots, fenced, solos, protections, refusals, rejoins];
    assert!(counts.iter().all(|count| *count >= 10), "{counts:?}");
}

/// Where the link is too narrow for its guest: memory stays bounded and protection returns, whatever is done about it.
#[test]
fn narrow_links_under_each_policy() {
    for policy in [Overload::Lengthen, Overload::Throttle, Overload::Drop] {
        let live = |seed| {
            let plan = Plan { link_rate: 20_000 + seed * 5_000, length: 10_000_000_000, ..Plan::draw(7_000 + seed) };
            let overload = OverloadRules { policy, patience: Duration::from_secs(1), ..plan.overload };
            (seed < 24).then(|| World::live(Plan { overload, ..plan }, false))
        };
        let seen = swarm(live, |_| false);
        println!("{policy:?}: {seen:?}");
        assert!(seen.overloads >= 10 && seen.answers > 100, "{policy:?}: {seen:?}");
        assert_eq!((seen.throttles > 10, seen.dropped >= 5), (policy == Overload::Throttle, policy == Overload::Drop));
    }
}

#[test]
fn a_seed_is_a_world_byte_for_byte() {
    for seed in 500..520 {
        let [first, second] = [(); 2].map(|()| World::live(Plan::draw(seed), true));
        assert_eq!((first.trace, first.seen, first.events), (second.trace, second.seen, second.events), "seed {seed}");
        assert_eq!(first.notes, second.notes, "seed {seed}");
    }
    let other = World::live(Plan::draw(521), false);
    assert_ne!(other.trace, World::live(Plan::draw(522), false).trace);
}

#[test]
fn a_calm_world_stays_protected() {
    let mut world = World::new(Plan::calm(1), true);
    world.run_until(1_000_000_000);
    for second in 1..30 {
        world.run_until(second * 1_000_000_000);
        assert_eq!(world.shows(0), (true, true), "{:?}", world.env().notes());
    }
    let outcome = world.outcome();
    assert_eq!(outcome.violation, None);
    assert!(outcome.seen.commits > 1_000 && outcome.seen.answers > 500, "{:?}", outcome.seen);
}

/// Every ordered pair of faults at every step of a scripted run, a sample of them: a prime stride, so that every kind meets every step.
#[test]
fn pairs_of_faults() {
    let stride = 499;
    let count = twice::count() / stride;
    let live = |number| {
        let number = usize::try_from(number).unwrap() * stride;
        (number < twice::count()).then(|| {
            let scenario = twice::scenario(number);
            let outcome = twice::live(&scenario, false);
            assert_eq!(outcome.violation, None, "pair {number}: {scenario:?}");
            outcome
        })
    };
    let seen = swarm(live, |_| false);
    println!("{count} pairs: {seen:?}");
    assert!(seen.takeovers > 50 && seen.boots > u64::try_from(count).unwrap());
}
