//! What becomes of a side that lost the right to run.

use std::time::Duration;

use replication_proto::Generation;

use super::super::*;
use super::world::{A, B, Guest, Service, World, ms};
use crate::exit::ExitCode;

fn superseded(rejoin: Rejoin) -> World {
    let mut world = World::protected_with(rejoin);
    world.freeze(A, true);
    assert!(world.run_until(ms(1000), |world| world.open(B)).is_some());
    world.freeze(A, false);
    world
}

/// The pair is whole, with the roles swapped.
fn is_swapped(world: &World) -> bool {
    world.state(B) == StateName::Protected && world.state(A) == StateName::InSync && world.running() == [B]
}

#[test]
fn after_a_switchover_the_roles_are_swapped_and_the_pair_is_protected_again() {
    for rejoin in [Rejoin::AfterKeep, Rejoin::AtOnce] {
        let mut world = World::protected_with(rejoin);
        world.command(A, Command::Switchover);
        assert!(world.run_until(ms(3000), is_swapped).is_some(), "{rejoin:?}");
        assert_eq!((world.nodes[A].rejoined, world.nodes[A].exit), (1, None));
        // And back.
        world.command(B, Command::Switchover);
        assert!(world.run_until(ms(3000), |world| world.state(A) == StateName::Protected).is_some());
        assert_eq!(world.running(), [A]);
    }
}

#[test]
fn a_side_that_must_not_rejoin_ends_when_its_guest_was_kept() {
    let mut world = World::protected_with(Rejoin::Never);
    world.command(A, Command::Switchover);
    world.run(ms(11_000));
    assert_eq!(world.nodes[A].exit, Some(ExitCode::HandedOver));
    let mut world = superseded(Rejoin::Never);
    world.run(Duration::from_secs(599));
    assert_eq!(world.state(A), StateName::Fenced);
    world.run(ms(2000));
    assert_eq!((world.nodes[A].rejoined, world.nodes[A].exit), (0, Some(ExitCode::Fenced)));
}

#[test]
fn a_superseded_side_keeps_its_guest_and_then_becomes_the_backup() {
    let mut world = superseded(Rejoin::AfterKeep);
    world.run(Duration::from_secs(599));
    assert_eq!(world.state(A), StateName::Fenced);
    assert_eq!(world.nodes[A].guest, Guest::Paused(Generation(1)));
    assert!(world.run_until(ms(5000), is_swapped).is_some());
    assert_eq!(world.nodes[A].rejoined, 1);

    let mut world = superseded(Rejoin::AtOnce);
    assert!(world.run_until(ms(4000), is_swapped).is_some());
}

#[test]
fn an_operator_makes_a_fenced_side_rejoin_at_once_whatever_the_policy_is() {
    for rejoin in [Rejoin::AfterKeep, Rejoin::Never] {
        let mut world = superseded(rejoin);
        world.run(ms(2000));
        assert_eq!(world.state(A), StateName::Fenced);
        world.command(A, Command::Rejoin);
        assert!(matches!(world.nodes[A].replies[..], [CommandOutcome::Done(_)]));
        assert!(world.run_until(ms(4000), is_swapped).is_some());
    }
    let mut world = World::protected();
    for at in [A, B] {
        world.command(at, Command::Rejoin);
        assert!(matches!(world.nodes[at].replies[..], [CommandOutcome::Refused(_)]));
    }
    assert_eq!(world.running(), [A]);
}

#[test]
fn a_side_that_halted_because_it_reached_nobody_keeps_what_may_be_the_only_copy() {
    // The arbiter is away and the backup dies: nobody else has the guest, and nobody can say so.
    let mut world = World::protected_with(Rejoin::AtOnce);
    (world.nodes[A].service, world.nodes[B].service) = (Service::Down, Service::Down);
    world.kill(B);
    world.run(Duration::from_secs(60));
    assert_eq!(world.state(A), StateName::Fenced);
    world.command(A, Command::Rejoin);
    assert!(matches!(world.nodes[A].replies[..], [CommandOutcome::Refused(_)]));
    // Not when the record can be read again, either: it names this side.
    world.nodes[A].service = Service::Good;
    world.run(Duration::from_secs(60));
    assert_eq!(world.nodes[A].guest, Guest::Paused(Generation(1)));
    world.command(A, Command::ForceTakeover { without_arbiter: false });
    world.run(ms(100));
    assert_eq!(world.nodes[A].guest, Guest::Runs(Generation(2)));
}

#[test]
fn a_side_that_halted_because_it_reached_nobody_learns_that_the_other_one_runs() {
    let mut world = World::protected_with(Rejoin::AfterKeep);
    world.cut = [true; 2];
    world.nodes[A].service = Service::Down;
    world.run(Duration::from_secs(300));
    assert_eq!((world.state(A), world.running()), (StateName::Fenced, vec![B]));
    world.cut = [false; 2];
    world.nodes[A].service = Service::Good;
    // Its guest is kept for the whole time once more: that it is out of date is known only now.
    world.run(Duration::from_secs(590));
    assert_eq!((world.state(A), world.view(A).reason), (StateName::Fenced, ReasonCode::Superseded));
    assert!(world.run_until(Duration::from_secs(20), is_swapped).is_some());
}
