//! Random faults on both sides. The world checks every release, permit and write; afterwards everything is healed and the pair must recover.

use proptest::prelude::*;

use super::super::*;
use super::world::{A, B, Service, World, ms};

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill(usize),
    PowerOff(usize),
    Start(usize, bool),
    Freeze(usize, bool),
    Cut(usize, bool),
    Arbiter(usize, Service),
    Switchover(usize),
    Link(usize),
}

fn fault() -> impl Strategy<Value = Fault> {
    let side = 0..2_usize;
    prop_oneof![
        2 => side.clone().prop_map(Fault::Kill),
        1 => side.clone().prop_map(Fault::PowerOff),
        6 => (side.clone(), any::<bool>()).prop_map(|(at, primary)| Fault::Start(at, primary)),
        3 => (side.clone(), any::<bool>()).prop_map(|(at, on)| Fault::Freeze(at, on)),
        4 => (side.clone(), any::<bool>()).prop_map(|(at, on)| Fault::Cut(at, on)),
        4 => (side.clone(), prop_oneof![
            3 => Just(Service::Good),
            1 => Just(Service::Down),
            1 => Just(Service::AnswerLost),
            2 => (0..800_u64).prop_map(|late| Service::Late(ms(late))),
        ]).prop_map(|(at, service)| Fault::Arbiter(at, service)),
        1 => side.clone().prop_map(Fault::Switchover),
        1 => side.prop_map(Fault::Link),
    ]
}

fn inject(world: &mut World, fault: Fault) {
    let alive = |world: &World, at: usize| world.nodes[at].core.is_some();
    match fault {
        Fault::Kill(at) if alive(world, at) => world.kill(at),
        Fault::PowerOff(at) if alive(world, at) => world.power_off(at),
        Fault::Start(at, primary) if !alive(world, at) => {
            world.start(at, if primary { Role::Primary } else { Role::Backup });
        }
        Fault::Freeze(at, on) => world.freeze(at, on),
        Fault::Cut(at, on) => world.cut[at] = on,
        Fault::Arbiter(at, service) => world.nodes[at].service = service,
        Fault::Switchover(at) if alive(world, at) => world.command(at, Command::Switchover),
        Fault::Link(at) if alive(world, at) => world.input(at, Input::LinkLost(LinkLoss::PeerClosed)),
        _ => {}
    }
}

/// A slow arbiter and a nervous link: what rules R3 and R5 are about.
fn nervous() -> impl Strategy<Value = Fault> {
    let side = 0..2_usize;
    prop_oneof![
        3 => (side.clone(), any::<bool>()).prop_map(|(at, on)| Fault::Cut(at, on)),
        3 => (side.clone(), (0..600_u64)).prop_map(|(at, late)| Fault::Arbiter(at, Service::Late(ms(late)))),
        2 => side.clone().prop_map(|at| Fault::Arbiter(at, Service::Good)),
        1 => side.clone().prop_map(Fault::Link),
        1 => side.prop_map(Fault::Kill),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn lost_and_late_answers_of_the_arbiter_never_lose_an_output(
        faults in prop::collection::vec((0..300_u64, nervous()), 10..80),
    ) {
        let mut world = World::new();
        world.start(A, Role::Primary);
        world.run(ms(50));
        world.start(B, Role::Backup);
        for (wait, fault) in faults {
            world.run(ms(wait));
            inject(&mut world, fault);
            for at in [A, B] {
                inject(&mut world, Fault::Start(at, true));
            }
        }
        // The world itself checks every step; nothing late may be pending at its end.
        world.run(ms(3000));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn never_two_owners_never_a_lost_output_and_always_recovery(
        faults in prop::collection::vec((0..700_u64, fault()), 1..40),
    ) {
        let mut world = World::protected();
        for (wait, fault) in faults {
            world.run(ms(wait));
            inject(&mut world, fault);
        }
        // Heal everything: there must be one owner again, and a protected pair.
        world.cut = [false; 2];
        for at in [A, B] {
            world.nodes[at].service = Service::Good;
            world.freeze(at, false);
        }
        world.run(ms(2000));
        for at in [A, B] {
            // A fenced or stopped process ends and is started again, as a service manager would.
            if world.nodes[at].core.is_some() && world.state(at) == StateName::Fenced {
                world.kill(at);
            }
            if world.nodes[at].core.is_none() {
                world.start(at, Role::Primary);
            }
        }
        let protected = |world: &World| [A, B].iter().any(|at| world.state(*at) == StateName::Protected);
        world.run_until(ms(70_000), protected);
        for at in [A, B] {
            // A former backup that the record calls the owner does not boot: a person starts ft-primary there.
            if world.running().is_empty() && world.nodes[at].core.is_some() {
                world.kill(at);
                world.start(at, Role::Primary);
            }
        }
        world.run_until(ms(70_000), protected);
        world.run(ms(100));
        prop_assert_eq!(world.running().len(), 1, "{:?} {:?}", world.state(A), world.state(B));
        let owner = world.running()[0];
        prop_assert_eq!(world.state(owner), StateName::Protected);
        prop_assert_eq!(world.state(1 - owner), StateName::InSync);
    }
}
