//! What must hold in every state.

use failover::decide::{Gate as CoreGate, View};

use super::owner::{Gate, Owner};
use super::setup::{NODES, node_ref, of_ref};
use super::step::living;
use super::turn::Violation;
use super::world::{Shell, World};

/// Checks a state.
///
/// # Errors
/// See [`Violation`].
pub fn check(world: &World) -> Result<(), Violation> {
    record_is_covered(world)?;
    for node in NODES {
        let Some(process) = world.process(node) else { continue };
        let view = &process.core.view;
        match &process.shell {
            Shell::Owner(owner) => owner_claims(world, node, owner, view)?,
            Shell::Waiter(_) => waiter_claims(world, node, view)?,
            Shell::Starting if view.protected || view.armed || view.owner => {
                return Err("G11: a starting process claims something".to_owned());
            }
            Shell::Starting => {}
        }
    }
    Ok(())
}

/// Whoever the record names could take over this moment, and holds all that was ever let out.
fn record_is_covered(world: &World) -> Result<(), Violation> {
    if world.ghost.forced {
        return Ok(());
    }
    let Some(stored) = world.register.as_ref() else { return Ok(()) };
    let Some(backup) = &stored.record.in_sync else { return Ok(()) };
    let (node, life) = of_ref(backup);
    let Some(image) = world.ghost.committed(node, life) else {
        return Err(format!("the record names {backup}, which never committed anything"));
    };
    if let Some(epoch) = world.ghost.missing_in(image) {
        return Err(format!("the record names {backup}, which holds {image:?}; output of epoch {epoch} was let out"));
    }
    let owner = world.owner(of_ref(&stored.record.owner).0);
    if owner.is_some_and(|owner| owner.runs && owner.gate == Gate::Open)
        && living(world, of_ref(&stored.record.owner).0).as_ref() == Some(&stored.record.owner)
    {
        return Err(format!("R5: the record names {backup} while the owner's output is open"));
    }
    match world.waiter(node) {
        Some(waiter) if living(world, node).as_ref() == Some(backup) && waiter.holding.is_none() => {
            Err(format!("G3: the record names {backup}, which is hollow"))
        }
        _ => Ok(()),
    }
}

fn owner_claims(world: &World, node: usize, owner: &Owner, view: &View) -> Result<(), Violation> {
    let same = match (&view.gate, owner.gate) {
        (CoreGate::Held, Gate::Held | Gate::Silent) | (CoreGate::Open, Gate::Open) => true,
        (CoreGate::OnAck(backup), Gate::OnCommit) => {
            owner.backup.is_none_or(|life| *backup == node_ref(1 - node, life))
        }
        _ => false,
    };
    if !same {
        return Err(format!("the core believes the gate {:?}, it is {:?}", view.gate, owner.gate));
    }
    if view.owner && u64::from(owner.generation) != view.generation.0 {
        return Err(format!("the core runs in generation {}, the permit is for {}", view.generation, owner.generation));
    }
    if !view.owner && owner.runs && owner.gate != Gate::Silent && owner.gate != Gate::Held {
        return Err("G2: a guest runs and speaks without the right to".to_owned());
    }
    if (view.protected || view.armed) && !world.ghost.rolled_back {
        let CoreGate::OnAck(backup) = &view.gate else {
            return Err(format!("G11: PROTECTED while the gate is {:?}", owner.gate));
        };
        let Some(stored) = world.register.as_ref() else { return Err("G11: PROTECTED without a record".to_owned()) };
        let superseded = stored.record.generation > view.generation;
        if !superseded && stored.record.in_sync.as_ref() != Some(backup) {
            return Err(format!("G11: PROTECTED by {backup}, the record names {:?}", stored.record.in_sync));
        }
    }
    Ok(())
}

fn waiter_claims(world: &World, node: usize, view: &View) -> Result<(), Violation> {
    if view.owner {
        return Err("G2: a standby believes that it owns the guest".to_owned());
    }
    if !view.armed || world.ghost.rolled_back {
        return Ok(());
    }
    let stored = world.register.as_ref().map(|stored| &stored.record);
    let me = living(world, node);
    // A write by force may have made it the owner without its knowledge yet.
    let granted = stored.is_some_and(|record| record.in_sync == me || Some(&record.owner) == me.as_ref())
        && me.as_ref().is_some_and(|me| world.ghost.committed(node, of_ref(me).1).is_some());
    // What the owner said may be older than what it did since.
    let still = world.process(1 - node).is_some_and(|peer| {
        let said = &peer.core.view;
        said.owner && said.protected && view.partner.as_ref() == Some(&node_ref(1 - node, peer.life))
    });
    if still && !granted {
        return Err(format!("G11: ARMED, but a takeover of {me:?} would not be granted: {stored:?}"));
    }
    Ok(())
}
