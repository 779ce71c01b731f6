//! From states of a search on, with everything repaired and everything done in turn: the pair must recover by itself, or by what a service manager
//! and, where the documentation says so, a person does.

use failover::decide::{Role, StateName};

use super::claims::check;
use super::mind::Memory;
use super::owner::{Gate, Runner};
use super::search::{guarded, summary};
use super::setup::{LIVES_MAX, NODES, NUMBER_MAX, Setup};
use super::step::{Step, steps};
use super::world::{Far, Shell, World};

/// Steps after which a pair that has not recovered never will.
const PATIENCE: usize = 600;
/// Steps that a report names.
const LAST_STEPS: usize = 40;
/// Rounds in which only time passed, after which a person looks.
const IDLE_ROUNDS: usize = 8;

/// How a pair recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Recovery {
    /// One side runs and is PROTECTED by the other.
    Protected,
    /// One side runs, and an operator told it to take no backup.
    Alone,
    /// As `Protected`, after a person started the recorded owner's node as a primary: its process waited as a backup.
    ByPerson,
    /// The arbiter was set back: nobody may go on by itself.
    RolledBack,
}

/// A configuration without faults and with room to recover in.
fn repaired(setup: &Setup) -> Setup {
    Setup {
        lives: [LIVES_MAX; 2],
        roles: [vec![Role::Primary], vec![Role::Primary]],
        epochs: NUMBER_MAX - 1,
        writes: u64::MAX,
        zombies: 0,
        arbiter_fails: false,
        cuts: false,
        late_beats: false,
        kills: false,
        commands: Vec::new(),
        ends: Vec::new(),
        rollbacks: 0,
        orders: 0,
        ..setup.clone()
    }
}

/// Repairs everything and goes on fairly.
///
/// # Errors
/// A violation on the way, or a pair that does not recover; the text says where it stands.
pub fn heal(setup: &Setup, memory: &mut Memory, from: &World) -> Result<Recovery, String> {
    let setup = repaired(setup);
    let mut world = from.clone();
    // What is still under way is lost; that it lands is for the search.
    world.zombies.clear();
    world.canonicalise(&setup);
    if world.ghost.rolled_back {
        return Ok(Recovery::RolledBack);
    }
    let (mut idle, mut person) = (0, false);
    let mut way = Vec::new();
    for _ in 0..PATIENCE {
        if let Some(recovery) = recovered(&world) {
            return Ok(if person { Recovery::ByPerson } else { recovery });
        }
        if let Some(next) = progress(&setup, memory, &world)? {
            way.push(next.0.to_string());
            (world, idle) = (next.1, 0);
            continue;
        }
        idle += 1;
        let mut next = None;
        for node in NODES {
            let Some(process) = world.process(node) else { continue };
            let fenced = process.core.view.state == StateName::Fenced;
            let waits = matches!(process.shell, Shell::Waiter(_));
            person |= idle > IDLE_ROUNDS && waits;
            if fenced || (idle > IDLE_ROUNDS && waits && process.life < LIVES_MAX) {
                next = Some(Step::Kill(node));
                break;
            }
        }
        let now = next.map_or_else(|| time(&world), |step| vec![step]);
        for step in now {
            way.push(step.to_string());
            world = taken(&setup, memory, &world, step)?;
        }
        if next.is_some() {
            idle = 0;
        }
    }
    way.drain(..way.len().saturating_sub(LAST_STEPS));
    Err(format!("the pair does not recover: {}; last: {}", summary(&world), way.join(", ")))
}

fn recovered(world: &World) -> Option<Recovery> {
    let mut running = NODES.into_iter().filter(|node| world.owner(*node).is_some_and(|owner| owner.runs));
    let (owner, none) = (running.next()?, running.next());
    let state = world.process(owner)?.core.view.state;
    let peer = world.process(1 - owner).map(|process| process.core.view.state);
    match (none, state, peer) {
        (None, StateName::Protected, Some(StateName::InSync)) => Some(Recovery::Protected),
        (None, StateName::Solo, Some(_)) if world.orders > 0 && world.owner(owner)?.gate == Gate::Open => {
            let joined =
                world.connections.iter().any(|c| c.from == owner && c.near && c.up.is_empty() && c.far == Far::Open);
            joined.then_some(Recovery::Alone)
        }
        _ => None,
    }
}

fn taken(setup: &Setup, memory: &mut Memory, world: &World, step: Step) -> Result<World, String> {
    let after = guarded(setup, memory, world, step).map_err(|violation| format!("{step}: {violation}"))?;
    check(&after).map_err(|violation| format!("{step}: {violation}"))?;
    Ok(after)
}

/// The first thing that is due and changes something.
fn progress(setup: &Setup, memory: &mut Memory, world: &World) -> Result<Option<(Step, World)>, String> {
    let before = world.print();
    for step in steps(setup, world).into_iter().filter(|step| due(world, *step)) {
        let after = taken(setup, memory, world, step)?;
        if after.print() != before {
            return Ok(Some((step, after)));
        }
    }
    Ok(None)
}

/// Whether something happens by itself when nothing is wrong.
fn due(world: &World, step: Step) -> bool {
    match step {
        Step::Start(..)
        | Step::Serve(_)
        | Step::Answer(_)
        | Step::Hear(_)
        | Step::Dial(_)
        | Step::Accept(_)
        | Step::Down(_)
        | Step::Up(_)
        | Step::FarLost(_)
        | Step::Event(_)
        | Step::LastCheckpoint(_) => true,
        // After its last word, once that has arrived.
        Step::NearLost(index) => world.connections[index].down.is_empty(),
        // As many as somebody waits for.
        Step::EndEpoch(node) => world.owner(node).is_some_and(|owner| {
            matches!(owner.runner, Runner::Base(_)) || (owner.gate == Gate::Held && owner.covering.is_none())
        }),
        _ => false,
    }
}

fn time(world: &World) -> Vec<Step> {
    let runs = |node: &usize| world.process(*node).is_some_and(|process| process.core.deadline.is_some());
    NODES.into_iter().filter(runs).map(Step::Time).collect()
}
