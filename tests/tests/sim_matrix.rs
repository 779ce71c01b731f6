//! The 21 rows of the failure matrix, each on the simulator: the real decision cores, protocol, commits and gate of both sides in virtual time. The
//! checkers of `tests::check` watch every one of them.

use std::time::Duration;

use failover::decide::{Command, GuestEnd, StateName};
use replication_proto::{NodeName, VmId};
use tests::world::faults::{Fault, Way};
use tests::world::{Plan, World, node_name};

const A: usize = 0;
const B: usize = 1;

/// A protected and armed pair: A runs the guest.
struct Pair(World);

impl Pair {
    fn protected() -> Self {
        let mut pair = Self(World::new(Plan::calm(3), true));
        pair.until(2_000, "protected and armed", |w| {
            w.shows(A) == (true, true) && w.state(B) == Some(StateName::InSync)
        });
        pair
    }

    fn strike(&mut self, faults: &[Fault]) -> &mut Self {
        faults.iter().for_each(|fault| self.0.strike(fault.clone()));
        self
    }

    /// Goes on for so many milliseconds.
    fn run(&mut self, ms: u64) -> &mut Self {
        let until = self.0.now() + ms * 1_000_000;
        self.0.run_until(until);
        self.check();
        self
    }

    /// Goes on until `done`, and says after how many milliseconds that was.
    fn until(&mut self, limit: u64, what: &str, done: impl Fn(&World) -> bool) -> u64 {
        for ms in 0..limit {
            if done(&self.0) {
                return ms;
            }
            self.run(1);
        }
        let notes = self.0.env().notes().join("\n");
        panic!("not {what} within {limit} ms: {:?}\n{notes}", [self.0.state(A), self.0.state(B)]);
    }

    fn check(&mut self) {
        if let Some(violation) = self.0.env().ghost.violation().cloned() {
            let notes = self.0.env().notes().join("\n");
            panic!("{violation:?}\n{notes}");
        }
    }

    fn answers(&mut self) -> u64 {
        self.0.env().ghost.seen.answers
    }

    fn released(&mut self) -> u64 {
        self.0.env().ghost.seen.released
    }

    fn in_sync(&mut self) -> Option<NodeName> {
        self.0.env().register.record().and_then(|r| r.in_sync.as_ref().map(|b| b.node.clone()))
    }

    fn generation(&mut self) -> u64 {
        self.0.env().register.record().map_or(0, |r| r.generation.0)
    }

    /// Clients are answered, by a side that runs alone or protected.
    fn serves(&mut self, node: usize) {
        let before = self.answers();
        self.run(1_000);
        assert!(self.0.runs(node), "{:?}", self.0.state(node));
        assert!(self.answers() > before + 5, "clients are answered");
    }

    /// Everything is put right; the pair becomes whole.
    fn recovers(mut self) {
        self.0.recover();
        self.check();
    }
}

#[test]
fn matrix_row_01_link_cut_and_both_reach_the_arbiter() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Cut(A), Fault::Cut(B)]);
    let took = pair.until(1_000, "solo", |w| w.state(A) == Some(StateName::Solo));
    assert!(took <= 200, "output stalled for {took} ms");
    pair.serves(A);
    assert!(!pair.0.runs(B));
    assert_eq!((pair.in_sync(), pair.generation()), (None, 1));
    pair.recovers();
}

#[test]
fn matrix_row_02_the_primary_crashes() {
    for fault in [Fault::Kill(A), Fault::PowerOff(A)] {
        let mut pair = Pair::protected();
        pair.strike(&[fault]);
        let took = pair.until(1_000, "taken over", |w| w.runs(B));
        assert!(took <= 400, "{took} ms");
        pair.serves(B);
        assert_eq!(pair.generation(), 2);
        pair.recovers();
    }
}

#[test]
fn matrix_row_03_the_backup_crashes() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::PowerOff(B)]);
    let took = pair.until(1_000, "solo", |w| w.state(A) == Some(StateName::Solo));
    assert!(took <= 200, "output stalled for {took} ms");
    pair.serves(A);
    pair.recovers();
}

#[test]
fn matrix_row_04_the_arbiter_is_down_and_the_pair_is_well() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Arbiter(A, Way::Lost), Fault::Arbiter(B, Way::Lost)]);
    for _ in 0..5 {
        pair.serves(A);
        assert_eq!(pair.0.state(A), Some(StateName::Protected));
    }
    assert_eq!(pair.0.shows(A), (true, false), "protected and not armed");
    pair.strike(&[Fault::Arbiter(A, Way::Open), Fault::Arbiter(B, Way::Open)]);
    pair.until(3_000, "armed again", |w| w.shows(A) == (true, true));
    assert_eq!(pair.generation(), 1);
}

#[test]
fn matrix_row_05_the_arbiter_is_down_and_the_primary_crashes() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Arbiter(A, Way::Lost), Fault::Arbiter(B, Way::Lost), Fault::PowerOff(A)]).run(5_000);
    assert!(!pair.0.runs(B), "nobody runs without the arbiter");
    pair.strike(&[Fault::Arbiter(B, Way::Open)]);
    pair.until(3_000, "taken over", |w| w.runs(B));
    pair.recovers();
}

#[test]
fn matrix_row_06_the_arbiter_is_down_and_the_link_is_cut() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Arbiter(A, Way::Lost), Fault::Arbiter(B, Way::Lost), Fault::Cut(A), Fault::Cut(B)]);
    pair.run(400);
    let before = pair.released();
    pair.run(4_000);
    assert_eq!(pair.released(), before, "output is held");
    assert!(!pair.0.runs(B));
    pair.recovers();
}

#[test]
fn matrix_row_07_the_primary_is_cut_from_the_arbiter_only() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Arbiter(A, Way::Lost)]).run(5_000);
    assert_eq!(pair.0.state(A), Some(StateName::Protected));
    pair.strike(&[Fault::Cut(A), Fault::Cut(B)]);
    pair.until(1_000, "taken over", |w| w.runs(B) && w.state(B) == Some(StateName::Solo));
    pair.serves(B);
    pair.recovers();
}

#[test]
fn matrix_row_08_the_backup_is_cut_from_the_arbiter_only() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Arbiter(B, Way::Lost)]).run(6_000);
    assert_eq!(pair.0.shows(A), (true, false), "protected and not armed");
    pair.strike(&[Fault::Cut(A), Fault::Cut(B)]);
    pair.until(1_000, "solo", |w| w.state(A) == Some(StateName::Solo));
    assert!(!pair.0.runs(B));
    pair.recovers();
}

#[test]
fn matrix_row_09_the_primary_is_isolated_from_all() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Cut(A), Fault::Cut(B), Fault::Arbiter(A, Way::Lost)]);
    pair.until(1_000, "taken over", |w| w.runs(B));
    let took = pair.until(30_000, "fenced", |w| w.state(A) == Some(StateName::Fenced));
    assert!((9_000..11_000).contains(&took), "it halts at the isolation timer: {took} ms");
    assert!(!pair.0.runs(A));
    pair.recovers();
}

#[test]
fn matrix_row_10_only_the_way_from_the_backup_is_lost() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Cut(B)]);
    let took = pair.until(1_000, "solo", |w| w.state(A) == Some(StateName::Solo));
    assert!(took <= 200, "{took} ms");
    pair.serves(A);
    assert!(!pair.0.runs(B));
    pair.recovers();
}

#[test]
fn matrix_row_11_only_the_way_from_the_primary_is_lost() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Cut(A)]);
    pair.until(1_000, "taken over", |w| w.runs(B));
    pair.until(3_000, "fenced", |w| w.state(A) == Some(StateName::Fenced));
    pair.serves(B);
    pair.recovers();
}

#[test]
fn matrix_row_12_the_primary_is_paused() {
    for pause in [100, 400, 2_000, 60_000] {
        let mut pair = Pair::protected();
        pair.strike(&[Fault::Pause(A, pause * 1_000_000)]);
        pair.run(pause + 1_500);
        let running = [pair.0.runs(A), pair.0.runs(B)];
        assert!(running[A] != running[B], "after {pause} ms: {running:?}");
        assert_eq!(running[B], pause >= 400, "after {pause} ms");
        pair.recovers();
    }
}

#[test]
fn matrix_row_13_the_backup_is_paused() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Pause(B, 3_000_000_000)]);
    pair.until(1_000, "solo", |w| w.state(A) == Some(StateName::Solo));
    pair.serves(A);
    pair.run(4_000);
    pair.until(10_000, "protected again", |w| w.shows(A) == (true, true));
    assert_eq!(pair.generation(), 1);
}

#[test]
fn matrix_row_14_a_swap_is_applied_and_its_answer_lost() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Arbiter(A, Way::Deaf), Fault::PowerOff(B)]).run(1_500);
    assert_eq!(pair.in_sync(), None, "it was applied");
    assert_ne!(pair.0.state(A), Some(StateName::Solo), "nobody told");
    pair.strike(&[Fault::Arbiter(A, Way::Open)]);
    pair.until(3_000, "solo", |w| w.state(A) == Some(StateName::Solo));
    pair.recovers();

    let mut pair = Pair::protected();
    pair.strike(&[Fault::Arbiter(B, Way::Deaf), Fault::PowerOff(A)]).run(1_500);
    assert_eq!(pair.generation(), 2, "it was applied");
    assert!(!pair.0.runs(B), "nobody told");
    pair.strike(&[Fault::Arbiter(B, Way::Open)]);
    pair.until(3_000, "taken over", |w| w.runs(B));
    assert_eq!(pair.generation(), 2);
    pair.recovers();
}

#[test]
fn matrix_row_15_the_backup_restarts_before_anybody_notices() {
    let mut pair = Pair::protected();
    let before = pair.0.env().register.record().cloned();
    pair.strike(&[Fault::Kill(B)]);
    pair.until(10_000, "protected by the new process", |w| w.shows(A) == (true, true) && w.now() > 3_000_000_000);
    let after = pair.0.env().register.record().cloned();
    assert_ne!(before.unwrap().in_sync, after.unwrap().in_sync, "another incarnation");
    assert_eq!(pair.generation(), 1);
}

#[test]
fn matrix_row_16_both_hosts_lose_their_power() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::PowerOff(A), Fault::PowerOff(B)]).run(1_000);
    pair.strike(&[Fault::PowerOn(A), Fault::PowerOn(B)]);
    pair.until(15_000, "booted by its owner", |w| w.runs(A) && w.shows(A) == (true, true));
    assert_eq!(pair.generation(), 2);
}

#[test]
fn matrix_row_17_solo_and_then_a_crash() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Cut(A), Fault::Cut(B)]).run(1_000);
    assert_eq!(pair.0.state(A), Some(StateName::Solo));
    pair.strike(&[Fault::PowerOff(A), Fault::Mend(A), Fault::Mend(B)]).run(10_000);
    assert!(!pair.0.runs(B), "it does not hold what was let out");
    assert_eq!(pair.0.state(B), Some(StateName::Standby));
}

#[test]
fn matrix_row_18_the_arbiter_is_restored_from_a_backup() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Kill(A)]);
    pair.until(20_000, "protected by the other side", |w| w.runs(B) && w.shows(B) == (true, true));
    pair.strike(&[Fault::RollBack(3)]).run(6_000);
    assert_eq!(pair.0.state(B), Some(StateName::Protected), "the pair goes on");
    assert_eq!(pair.0.shows(B), (true, false), "and is not armed");
    pair.serves(B);
}

#[test]
fn matrix_row_19_the_record_is_somebody_elses() {
    let mut pair = Pair::protected();
    let mut record = pair.0.env().register.record().cloned().unwrap();
    record.cluster_id = VmId(0x99);
    pair.0.env().register.usurp(record);
    pair.strike(&[Fault::Kill(B)]).run(5_000);
    assert!(!pair.0.runs(B));
    assert_ne!(pair.0.state(A), Some(StateName::Solo), "nothing is concluded from it");
    let before = pair.released();
    pair.run(2_000);
    assert_eq!(pair.released(), before, "output is held");
}

#[test]
fn matrix_row_20_the_link_flaps() {
    let mut pair = Pair::protected();
    let before = pair.0.env().ghost.seen;
    for _ in 0..50 {
        pair.strike(&[Fault::Cut(A), Fault::Cut(B)]).run(250);
        pair.strike(&[Fault::Mend(A), Fault::Mend(B)]).run(50);
    }
    let after = pair.0.env().ghost.seen;
    let swaps = after.solos + after.protections - before.solos - before.protections;
    assert!(swaps <= 20, "{swaps} swaps in 15 s of flapping");
    assert!(pair.0.runs(A) != pair.0.runs(B));
    pair.recovers();
}

#[test]
fn matrix_row_21_the_winner_dies_before_it_goes_live() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Cut(A)]);
    while pair.0.env().register.record().is_some_and(|r| r.owner.node == node_name(A)) {
        pair.0.run_events(1);
    }
    assert!(!pair.0.runs(B), "it won and does not know it");
    pair.strike(&[Fault::PowerOff(B)]).run(3_000);
    assert_eq!(pair.0.state(A), Some(StateName::Fenced), "halted, its memory kept");
    assert!(!pair.0.runs(A));
}

/// Not a row: what the stop rule promises.
#[test]
fn a_guest_that_was_switched_off_stays_off() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::GuestEnds(GuestEnd::PoweredOff)]).run(400);
    assert!(!pair.0.runs(A) && !pair.0.runs(B));
    pair.strike(&[Fault::PowerOff(A)]).run(3_000);
    assert!(!pair.0.runs(B), "nobody resurrects it");
}

/// Found by the failpoint `cas.switchover.before=crash`: the guest stood still for five seconds.
#[test]
fn a_backup_that_dies_in_a_switchover_costs_a_second_not_five() {
    let mut pair = Pair::protected();
    pair.strike(&[Fault::Arbiter(B, Way::Lost), Fault::Command(A, Command::Switchover)]);
    pair.until(1_000, "handed over", |w| w.state(A) == Some(StateName::SwitchingOver) && !w.runs(A));
    pair.strike(&[Fault::PowerOff(B)]);
    let took = pair.until(4_000, "running again", |w| w.runs(A) && w.state(A) == Some(StateName::Solo));
    assert!(took <= 1_500, "{took} ms");
    pair.serves(A);
    pair.recovers();
}

#[test]
fn time_in_these_worlds_costs_nothing() {
    let began = std::time::Instant::now();
    let mut pair = Pair::protected();
    pair.run(60_000);
    assert!(began.elapsed() < Duration::from_secs(60), "a minute of two sides took {:?}", began.elapsed());
}
