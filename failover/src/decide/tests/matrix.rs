//! The rows of the failure matrix that this core decides, by number.

use std::time::Duration;

use replication_proto::{Generation, NodeName, VmId};

use super::super::*;
use super::world::{A, B, Guest, Service, World, ms};
use crate::exit::ExitCode;

fn record(world: &World) -> Record {
    world.record.clone().expect("a record").record
}

fn generation(world: &World) -> u64 {
    record(world).generation.0
}

fn cut_link(world: &mut World, cut: bool) {
    world.cut = [cut; 2];
}

#[test]
fn matrix_row_01_link_cut_both_reach_the_arbiter_the_vm_stays_where_it_is() {
    let mut world = World::protected();
    cut_link(&mut world, true);
    let stall = world.run_until(ms(1000), |world| world.open(A)).expect("solo");
    assert!(stall <= ms(200), "{stall:?}");
    world.run(ms(2000));
    assert_eq!((world.state(A), world.state(B)), (StateName::Solo, StateName::Standby));
    assert_eq!(world.running(), [A]);
    assert_eq!((generation(&world), record(&world).in_sync), (1, None));
    cut_link(&mut world, false);
    assert!(world.run_until(ms(3000), |world| world.state(A) == StateName::Protected).is_some(), "self-healing");
}

#[test]
fn matrix_row_02_primary_killed_or_powered_off_the_backup_takes_over() {
    for (powered_off, limit) in [(false, ms(40)), (true, ms(340))] {
        let mut world = World::protected();
        if powered_off {
            world.power_off(A)
        } else {
            world.kill(A)
        }
        let gap = world.run_until(ms(1000), |world| world.open(B)).expect("takeover");
        assert!(gap <= limit, "{gap:?}");
        assert_eq!(generation(&world), 2);
        assert_eq!(record(&world).reason, Reason::Takeover);
        assert_eq!(world.nodes[B].guest, Guest::Runs(Generation(2)));
    }
}

#[test]
fn matrix_row_03_backup_killed_the_primary_goes_on_alone() {
    let mut world = World::protected();
    world.kill(B);
    let stall = world.run_until(ms(1000), |world| world.open(A)).expect("solo");
    assert!(stall <= ms(200), "{stall:?}");
    assert_eq!(record(&world).reason, Reason::BackupLost);
}

#[test]
fn matrix_row_04_arbiter_down_pair_healthy_no_stall_but_not_armed() {
    let mut world = World::protected();
    world.run(ms(1500));
    assert!(world.view(A).armed && world.view(B).armed);
    (world.nodes[A].service, world.nodes[B].service) = (Service::Down, Service::Down);
    world.run(ms(20_000));
    assert_eq!((world.state(A), world.state(B)), (StateName::Protected, StateName::InSync));
    assert!(world.view(A).protected && !world.view(A).armed && !world.view(B).armed);
    (world.nodes[A].service, world.nodes[B].service) = (Service::Good, Service::Good);
    world.run(ms(1500));
    assert!(world.view(A).armed && world.view(B).armed);
}

#[test]
fn what_waited_while_this_side_slept_does_not_arm_it() {
    let mut world = World::protected();
    world.run(ms(1500));
    let view = |world: &World, slept: &Slept| world.nodes[A].core.as_ref().expect("alive").view_of(world.now, slept);
    let mut slept = Slept::default();
    slept.woke(world.now);
    assert!(world.view(A).armed && !view(&world, &slept).armed, "heartbeats may have waited");
    world.run(ms(100));
    assert!(!view(&world, &slept).armed);
    world.run(ms(200));
    assert!(view(&world, &slept).armed, "heard for longer than the peer may be silent");

    let awake = view(&world, &slept);
    slept.left_out(world.now, ms(700));
    let then = view(&world, &slept);
    assert_eq!(then.partner_age, awake.partner_age.map(|age| age + ms(700)));
    assert_eq!(then.arbiter_age, awake.arbiter_age.map(|age| age + ms(700)));
    (0..5).for_each(|_| slept.left_out(world.now, ms(700)));
    assert!(!view(&world, &slept).armed, "the arbiter's answer is older than it seems");
}

#[test]
fn an_answer_that_waited_while_this_side_slept_is_as_old_as_its_question() {
    let mut world = World::protected();
    let asked = world.run_until(ms(3_000), |world| world.view(B).arbiter_pending.is_some());
    assert!(asked.is_some(), "a probe");
    world.freeze(B, true);
    world.run(ms(8_000));
    world.nodes[B].service = Service::Down;
    world.freeze(B, false);
    world.run(ms(20));
    let age = world.view(B).arbiter_age.expect("it was reached before");
    assert!(age >= ms(8_000), "{age:?}");
}

#[test]
fn matrix_row_05_arbiter_down_and_primary_killed_nobody_runs_until_it_is_back() {
    let mut world = World::protected();
    world.nodes[B].service = Service::Down;
    world.kill(A);
    world.run(ms(5000));
    assert!(world.running().is_empty());
    assert_eq!(world.state(B), StateName::TakingOver);
    world.nodes[B].service = Service::Good;
    assert!(world.run_until(ms(200), |world| world.open(B)).is_some());
}

#[test]
fn matrix_row_06_arbiter_down_and_link_cut_output_is_held_and_service_comes_back() {
    let mut world = World::protected();
    (world.nodes[A].service, world.nodes[B].service) = (Service::Down, Service::Down);
    cut_link(&mut world, true);
    world.run(ms(500));
    assert!(!world.open(A) && !world.open(B));
    assert_eq!((world.state(A), world.state(B)), (StateName::Contending, StateName::TakingOver));
    // The link alone comes back while the stream still lives: protected as before, nothing was lost.
    cut_link(&mut world, false);
    world.run(ms(200));
    assert_eq!((world.state(A), world.state(B)), (StateName::Protected, StateName::InSync));
    assert_eq!(world.running(), [A]);
    // For longer than the stream lives: held until the arbiter is back.
    cut_link(&mut world, true);
    world.run(ms(5000));
    assert!(!world.open(A) && !world.open(B));
    (world.nodes[A].service, world.nodes[B].service) = (Service::Good, Service::Good);
    assert!(world.run_until(ms(200), |world| world.open(A) || world.open(B)).is_some());
}

#[test]
fn matrix_row_07_primary_cut_from_the_arbiter_goes_on_and_loses_a_later_contest() {
    let mut world = World::protected();
    world.nodes[A].service = Service::Down;
    world.run(ms(5000));
    assert_eq!(world.state(A), StateName::Protected);
    assert!(world.view(A).armed, "a takeover would be granted");
    cut_link(&mut world, true);
    world.run(ms(1000));
    assert!(world.open(B) && !world.open(A), "B wins");
    world.nodes[A].service = Service::Good;
    world.run(ms(200));
    assert_eq!(world.state(A), StateName::Fenced);
}

#[test]
fn matrix_row_08_backup_cut_from_the_arbiter_is_not_armed_and_the_primary_may_go_solo() {
    let mut world = World::protected();
    world.nodes[B].service = Service::Down;
    world.run(ms(5000));
    assert!(world.view(A).protected && !world.view(A).armed && !world.view(B).armed);
    cut_link(&mut world, true);
    world.run(ms(500));
    assert!(world.open(A));
    assert_eq!(world.running(), [A]);
}

#[test]
fn matrix_row_09_isolated_primary_holds_then_halts_and_the_backup_takes_over() {
    let mut world = World::protected();
    cut_link(&mut world, true);
    world.nodes[A].service = Service::Down;
    world.run(ms(2000));
    assert!(world.open(B) && !world.open(A));
    assert_eq!(world.state(A), StateName::Contending);
    world.run(ms(10_000));
    assert_eq!(world.state(A), StateName::Fenced);
    assert_eq!(world.nodes[A].guest, Guest::Paused(Generation(1)));
    world.run(Duration::from_secs(600));
    assert_eq!(world.nodes[A].exit, Some(ExitCode::Isolated));
}

#[test]
fn matrix_row_10_backup_to_primary_lost_the_primary_goes_solo() {
    let mut world = World::protected();
    world.cut[B] = true;
    world.run(ms(2000));
    assert!(world.open(A));
    assert_eq!((world.state(A), world.state(B)), (StateName::Solo, StateName::Standby));
    assert_eq!(record(&world).in_sync, None);
}

#[test]
fn matrix_row_11_primary_to_backup_lost_the_backup_takes_over_and_the_primary_is_fenced() {
    let mut world = World::protected();
    world.cut[A] = true;
    // Acks stop as well, but heartbeats of B go on.
    world.run(ms(1000));
    assert!(world.open(B));
    assert_eq!(world.state(A), StateName::Fenced);
    assert_eq!(world.nodes[A].guest, Guest::Paused(Generation(1)));
}

#[test]
fn matrix_row_12_primary_stopped_for_any_time_releases_nothing_new_and_is_fenced() {
    for pause in [100, 160, 290, 310, 400, 1000, 60_000] {
        let mut world = World::protected();
        world.freeze(A, true);
        world.run(ms(pause));
        world.freeze(A, false);
        world.run(ms(2000));
        if world.promotions.iter().any(|(generation, _)| *generation == Generation(2)) {
            assert_eq!(world.state(A), StateName::Fenced, "after {pause} ms");
            assert_eq!(world.running(), [B]);
        } else {
            assert!(pause < 300);
            assert_eq!(world.running(), [A]);
        }
    }
}

#[test]
fn matrix_row_13_backup_stopped_resyncs_when_it_is_back() {
    for pause in [100, 200, 400, 60_000] {
        let mut world = World::protected();
        world.freeze(B, true);
        world.run(ms(pause));
        if pause >= 200 {
            assert!(world.open(A), "after {pause} ms");
        }
        world.freeze(B, false);
        world.run(ms(5000));
        assert_eq!(world.running(), [A]);
        assert_eq!((world.state(A), world.state(B)), (StateName::Protected, StateName::InSync), "after {pause} ms");
    }
}

#[test]
fn matrix_row_14_an_answer_of_the_arbiter_is_lost() {
    for service in [Service::AnswerLost, Service::Late(ms(3)), Service::Late(ms(40)), Service::Late(ms(700))] {
        // The owner's solo write.
        let mut world = World::protected();
        world.nodes[A].service = service;
        cut_link(&mut world, true);
        world.run(ms(300));
        world.nodes[A].service = Service::Good;
        world.run(ms(2000));
        // Where the arbiter is slower than the takeover timer, the backup may win instead.
        let winner = if service == Service::Late(ms(700)) { B } else { A };
        assert_eq!(world.running(), [winner], "{service:?}");
        assert!(world.open(winner), "{service:?}");
        // The backup's takeover.
        let mut world = World::protected();
        world.nodes[B].service = service;
        world.kill(A);
        world.run(ms(100));
        world.nodes[B].service = Service::Good;
        world.run(ms(2000));
        assert!(world.open(B), "{service:?}");
        assert_eq!(generation(&world), 2);
        // The owner's write that brings the backup in sync.
        let mut world = World::new();
        world.start(A, Role::Primary);
        world.run(ms(100));
        world.nodes[A].service = service;
        world.start(B, Role::Backup);
        world.run(ms(500));
        world.nodes[A].service = Service::Good;
        world.run(ms(3000));
        assert_eq!((world.state(A), world.state(B)), (StateName::Protected, StateName::InSync), "{service:?}");
    }
}

#[test]
fn matrix_row_15_backup_restarts_at_once_its_new_life_cannot_take_over() {
    let mut world = World::protected();
    world.power_off(B);
    world.start(B, Role::Backup);
    world.run(ms(100));
    // The owner noticed the new incarnation well before its timer; should it die now, nobody takes over from nothing.
    assert!(world.open(A));
    world.kill(A);
    world.run(ms(3000));
    assert!(world.running().is_empty());
    assert_eq!(world.state(B), StateName::Standby);
}

#[test]
fn matrix_row_16_both_hosts_lose_power_only_the_owner_boots_and_only_by_policy() {
    let mut world = World::protected();
    world.power_off(A);
    world.power_off(B);
    // B alone never boots, and A alone waits for B: B might be about to take over.
    world.start(A, Role::Primary);
    world.run(ms(2000));
    assert_eq!(world.state(A), StateName::Standby);
    world.start(B, Role::Backup);
    assert!(world.run_until(ms(3000), |world| world.running() == [A]).is_some());
    assert_eq!((generation(&world), record(&world).reason), (2, Reason::ColdStart));
    assert!(world.run_until(ms(3000), |world| world.state(A) == StateName::Protected).is_some());

    let mut world = World::protected();
    world.cold_start = ColdStart::Never;
    world.power_off(A);
    world.power_off(B);
    world.start(A, Role::Primary);
    world.start(B, Role::Backup);
    world.run(ms(5000));
    assert!(world.running().is_empty());
    world.kill(A);
    world.start_with(A, Role::Primary, true);
    assert!(world.run_until(ms(1000), |world| world.running() == [A]).is_some(), "an operator said so");
}

#[test]
fn matrix_row_17_solo_primary_dies_the_backup_refuses_and_force_works() {
    let mut world = World::protected();
    cut_link(&mut world, true);
    world.run(ms(1000));
    assert!(world.open(A));
    world.kill(A);
    world.run(ms(5000));
    assert!(world.running().is_empty());
    assert_eq!(world.view(B).reason, ReasonCode::TakeoverRefused);
    world.command(B, Command::ForceTakeover { without_arbiter: false });
    world.run(ms(100));
    assert_eq!(world.running(), [B]);
    assert_eq!((generation(&world), record(&world).reason), (2, Reason::Forced));
    assert!(matches!(world.nodes[B].replies[..], [CommandOutcome::Done(_)]));
}

#[test]
fn matrix_row_17_restarted_owner_boots_by_policy_only() {
    let mut world = World::new();
    world.start(A, Role::Primary);
    world.run(ms(500));
    world.kill(A);
    world.start(A, Role::Primary);
    world.run(ms(500));
    assert_eq!(world.nodes[A].guest, Guest::Runs(Generation(2)));
    world.kill(A);
    world.cold_start = ColdStart::Never;
    world.start(A, Role::Primary);
    world.run(ms(500));
    assert_eq!(world.nodes[A].exit, Some(ExitCode::ColdStartRefused));
}

#[test]
fn matrix_row_18_arbiter_restored_to_an_older_record_is_refused_loudly() {
    // Of a lower generation.
    let mut world = World::protected();
    let old = world.record.clone().unwrap();
    world.kill(A);
    world.run(ms(1000));
    world.start(A, Role::Backup);
    world.run(ms(3000));
    assert_eq!(world.state(B), StateName::Protected);
    world.record = Some(old.clone());
    world.run(ms(3000));
    assert_eq!((world.state(A), world.state(B)), (StateName::InSync, StateName::Protected), "the pair goes on");
    assert!(!world.view(A).armed && !world.view(B).armed);
    assert_eq!(world.nodes[B].alarms, [ReasonCode::ArbiterRolledBack]);
    assert_eq!(world.nodes[A].alarms, [ReasonCode::ArbiterRolledBack]);
    // A new process on either side refuses to act on it.
    world.kill(B);
    world.run(ms(1000));
    assert!(world.running().is_empty());
    world.start(B, Role::Primary);
    world.run(ms(100));
    assert_eq!(world.nodes[B].exit, Some(ExitCode::ArbiterRolledBack));
    // Of the same generation: A is solo, the old record says that B is in sync.
    let mut world = World::protected();
    let old = world.record.clone();
    cut_link(&mut world, true);
    world.run(ms(2000));
    assert!(world.open(A));
    world.record = old;
    world.run(ms(5000));
    assert_eq!(world.running(), [A]);
    assert!(world.nodes[B].alarms.contains(&ReasonCode::ArbiterRolledBack));
}

#[test]
fn matrix_row_19_a_foreign_record_ends_the_process() {
    let foreign = |change: fn(&mut Record)| {
        let mut world = World::new();
        world.start(A, Role::Primary);
        world.run(ms(100));
        world.kill(A);
        change(&mut world.record.as_mut().unwrap().record);
        world.start(A, Role::Primary);
        world.start(B, Role::Backup);
        world.run(ms(100));
        assert_eq!(world.nodes[A].exit, Some(ExitCode::ArbiterForeign));
        assert_eq!(world.nodes[B].exit, Some(ExitCode::ArbiterForeign));
    };
    foreign(|record| record.cluster_id = VmId(1));
    foreign(|record| record.owner.node = NodeName::new("c").unwrap());
}

#[test]
fn matrix_row_20_a_flapping_link_causes_few_base_copies_and_few_writes() {
    let mut world = World::protected();
    let before = (world.writes, world.nodes[A].bases);
    for _ in 0..300 {
        cut_link(&mut world, true);
        world.run(ms(170));
        cut_link(&mut world, false);
        world.run(ms(30));
    }
    let (writes, bases) = (world.writes - before.0, world.nodes[A].bases - before.1);
    assert!(writes <= 12 && bases <= 8, "{writes} writes, {bases} base copies in a minute");
    assert_eq!(world.running(), [A]);
    world.run(ms(130_000));
    assert_eq!(world.state(A), StateName::Protected);
}

#[test]
fn matrix_row_21_the_winner_dies_at_once_the_fenced_guest_is_kept_and_can_be_forced() {
    let mut world = World::protected();
    world.freeze(A, true);
    assert!(world.run_until(ms(1000), |world| world.open(B)).is_some());
    world.kill(B);
    world.freeze(A, false);
    world.run(ms(5000));
    assert_eq!(world.state(A), StateName::Fenced);
    assert_eq!(world.nodes[A].guest, Guest::Paused(Generation(1)));
    assert_eq!(world.nodes[A].exit, None);
    world.command(A, Command::ForceTakeover { without_arbiter: false });
    world.run(ms(100));
    assert_eq!(world.nodes[A].guest, Guest::Runs(Generation(3)));
}
