//! Operators' moves: pauses of protection, and a guest that is called back.

use std::time::Duration;

use super::super::*;
use super::world::{A, B, Guest, Service, World, ms};

const PAUSE: Duration = Duration::from_secs(600);

#[test]
fn a_pause_of_protection_ends_by_itself_or_by_protect() {
    let mut world = World::protected();
    world.command(B, Command::PauseProtection { length: PAUSE });
    assert!(matches!(world.nodes[B].replies[..], [CommandOutcome::Refused(_)]));
    world.command(A, Command::PauseProtection { length: PAUSE });
    assert!(matches!(world.nodes[A].replies[..], [CommandOutcome::Done(_)]));
    world.run(ms(500));
    assert!(world.open(A) && !world.view(A).protected);
    assert_eq!(world.view(A).reason, ReasonCode::ProtectionPaused);
    let left = world.view(A).protects_in.expect("it is a matter of time");
    assert!(left > Duration::from_secs(599) && left <= PAUSE, "{left:?}");
    assert_eq!(world.record.clone().unwrap().record.in_sync, None);
    world.run(PAUSE - ms(1000));
    assert_eq!(world.state(A), StateName::Solo);
    assert!(world.run_until(ms(4000), |world| world.state(A) == StateName::Protected).is_some());
    assert_eq!(world.view(A).protects_in, None);

    world.command(A, Command::PauseProtection { length: PAUSE });
    world.run(ms(500));
    world.command(A, Command::Protect);
    assert!(world.run_until(ms(4000), |world| world.state(A) == StateName::Protected).is_some());
}

#[test]
fn a_backup_in_sync_calls_the_guest_to_itself() {
    let mut world = World::protected();
    world.command(B, Command::Switchover);
    let took = world.run_until(ms(1000), |world| world.open(B)).expect("handed over");
    assert!(took <= ms(80), "{took:?}");
    assert!(matches!(world.nodes[B].replies[..], [CommandOutcome::Done(_)]), "{:?}", world.nodes[B].replies);
    let swapped = |world: &World| (world.state(B), world.state(A)) == (StateName::Protected, StateName::InSync);
    assert!(world.run_until(ms(4000), swapped).is_some());
    assert_eq!(world.running(), [B]);
    assert_eq!(world.nodes[A].rejoined, 1);
    // One order, one move.
    world.run(ms(10_000));
    assert_eq!(world.running(), [B]);
}

#[test]
fn a_guest_that_cannot_be_had_is_not_asked_for_for_ever() {
    let mut world = World::protected();
    // The owner does as it is asked, and this side cannot take over.
    world.nodes[B].service = Service::Down;
    world.command(B, Command::Switchover);
    world.run(ms(2000));
    assert_eq!(world.nodes[A].guest, Guest::Runs(replication_proto::Generation(1)), "given up, and not asked again");
    world.run(ms(6000));
    assert!(matches!(world.nodes[B].replies[..], [CommandOutcome::Refused(_)]), "{:?}", world.nodes[B].replies);
    assert!(!world.view(B).asks);
    assert_eq!(world.running(), [A]);

    let mut world = World::new();
    world.start(B, Role::Backup);
    world.run(ms(100));
    world.command(B, Command::Switchover);
    assert!(matches!(world.nodes[B].replies[..], [CommandOutcome::Refused(_)]), "not in sync");
}

/// Row 20: protection that is lost again and again is not begun anew before the connection has stood for a while.
#[test]
fn after_more_than_one_loss_a_connection_must_stand_before_the_next_base() {
    let mut world = World::protected();
    let mut lose_and_return = || {
        world.kill(B);
        world.run(ms(500));
        world.start(B, Role::Backup);
        world
            .run_until(Duration::from_secs(30), |world| world.state(A) == StateName::Protected)
            .expect("protected again")
    };
    let (first, second) = (lose_and_return(), lose_and_return());
    assert!(first < Duration::from_secs(2), "{first:?}");
    assert!(second >= Duration::from_secs(5) && second < Duration::from_secs(8), "{second:?}");
}
