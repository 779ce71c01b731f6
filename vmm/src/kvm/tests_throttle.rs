//! A guest that is slowed: by as much as asked for, and not in the way of a pause.

use vm_memory::{Bytes, GuestAddress};

use super::testing::{Bench, COUNTER_AT, COUNTING, eventually, loaded, no_kvm};
use super::*;
use crate::pause::PausedVm;
use std::time::Duration;

fn counter(machine: &KvmMachine) -> u32 {
    machine.ram.tracked().read_obj(GuestAddress(COUNTER_AT)).unwrap()
}

/// How far the guest counts in a moment under this throttle.
fn counted(bench: &mut Bench, throttle: Throttle) -> u32 {
    bench.machine.throttle(throttle).unwrap();
    // The first slice may be one of running or of resting.
    std::thread::sleep(Duration::from_millis(20));
    let before = counter(&bench.machine);
    std::thread::sleep(Duration::from_millis(100));
    counter(&bench.machine) - before
}

#[test]
fn a_throttled_guest_gets_its_part_of_the_time() {
    if no_kvm() {
        return;
    }
    let mut bench = loaded(COUNTING, 1);
    bench.machine.run().unwrap();
    eventually("the guest counts", || counter(&bench.machine) > 1000);
    let (mut free, mut slowed) = (0, u32::MAX);
    for _ in 0..5 {
        free = free.max(counted(&mut bench, Throttle::NONE));
        slowed = slowed.min(counted(&mut bench, Throttle::percent(90)));
    }
    // A tenth is what it should be, in the best of some moments: on a busy host any may have waited for a processor.
    assert!(slowed < free / 4, "{slowed} slowed, {free} not");
    bench.machine.throttle(Throttle::NONE).unwrap();
    let before = counter(&bench.machine);
    eventually("the guest counts on", || counter(&bench.machine) > before);
}

#[test]
fn a_resting_guest_stops_at_once_and_goes_on_resting_afterwards() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        let mut bench = loaded(COUNTING, vcpus);
        bench.machine.run().unwrap();
        eventually("the guest counts", || counter(&bench.machine) > 1000);
        let rest = Throttle::MOST.rest_after(Throttle::MOST.run());
        let (mut free, mut slowed, mut stops) = (0, f64::MAX, Vec::new());
        for _ in 0..5 {
            free = free.max(counted(&mut bench, Throttle::NONE));
            bench.machine.throttle(Throttle::MOST).unwrap();
            let (before, began) = (counter(&bench.machine), Instant::now());
            // As epochs that are much shorter than a rest.
            for _ in 0..25 {
                std::thread::sleep(Duration::from_millis(4));
                let began = Instant::now();
                let paused = PausedVm::pause(&mut bench.machine).unwrap();
                stops.push(began.elapsed());
                drop(paused);
            }
            let counted = f64::from(counter(&bench.machine) - before);
            slowed = slowed.min(counted / began.elapsed().as_secs_f64() / 10.0);
        }
        // A hundredth is what it should be; if each pause ended a rest it would be an eighth.
        assert!(slowed < f64::from(free) / 10.0, "pauses undo the rests: {slowed} in 100 ms, {free} unslowed");
        stops.sort_unstable();
        assert!(stops[stops.len() / 2] < rest / 4, "a stop waits for the end of a rest: {stops:?}");
        let before = counter(&bench.machine);
        eventually("it still counts", || counter(&bench.machine) > before);
    }
}

#[test]
fn throttles_come_and_go_around_a_thousand_stops() {
    if no_kvm() {
        return;
    }
    let mut bench = loaded(COUNTING, 2);
    bench.machine.throttle(Throttle::MOST).unwrap();
    bench.machine.run().unwrap();
    for round in 0..1000_u32 {
        let percent = [0, 50, 99, 1][usize::try_from(round / 3 % 4).unwrap()];
        bench.machine.throttle(Throttle::percent(percent)).unwrap();
        drop(PausedVm::pause(&mut bench.machine).unwrap());
    }
    bench.machine.throttle(Throttle::MOST).unwrap();
    let before = counter(&bench.machine);
    eventually("the guest counts on", || counter(&bench.machine) > before);
    bench.machine.shut_down();
    bench.machine.throttle(Throttle::MOST).unwrap();
}
