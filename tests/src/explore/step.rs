//! What may happen next in a state, and what it leads to.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use failover::arbiter::{ArbiterError, CasOutcome, Reason, Record, Revision, Versioned};
use failover::decide::{Answer, ArbiterRequest, Command, GuestEnd, Input, LinkLoss, OpId, Role, StateName, Ticket};
use replication_proto::mutant::{Mutant, is};

use super::mind::{Memory, small};
use super::owner::{Gate, Runner};
use super::setup::{NODES, Setup, node_ref, of_ref};
use super::turn::{Flow, Turn, Violation};
use super::world::{Beat, Connection, Errand, Far, Printed, Shell, World, Zombie};

/// Something that may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A process is started.
    Start(usize, Role),
    /// A process is killed.
    Kill(usize),
    /// On this node, time passes until the core's next timer runs out.
    Time(usize),
    /// The arbiter carries a request out.
    Serve(usize),
    /// The answer arrives.
    Answer(usize),
    /// It was carried out, but the answer is lost.
    Lose(usize),
    /// It certainly is not carried out.
    Fail(usize),
    /// The answer is lost, and it may be carried out at any later time.
    Mislay(usize),
    /// A write whose answer was lost is carried out.
    Land(usize),
    /// A heartbeat is sent, and overtaken by nothing but later ones.
    Beat(usize),
    /// A heartbeat arrives.
    Hear(usize),
    /// The owner connects to the peer.
    Dial(usize),
    /// The listener takes a connection on.
    Accept(usize),
    /// It takes the next message.
    Down(usize),
    /// The dialler's link takes the next message.
    Up(usize),
    /// The listener's end of a connection is over.
    FarLost(usize),
    /// The dialler's end is over.
    NearLost(usize),
    /// The heartbeat connection of an owner's session is over.
    PulseLost(usize),
    /// An owner closes its session: no progress, or an epoch that does not fit.
    Close(usize),
    /// The loop takes the next event.
    Event(usize),
    /// The base or an epoch ends.
    EndEpoch(usize),
    /// The last checkpoint of a switchover.
    LastCheckpoint(usize),
    /// An operator's command, by its place in the configuration.
    Order(usize),
    /// The guest ends by itself.
    GuestEnds(usize, GuestEnd),
    /// The record is set back.
    RollBack(usize),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |node: &usize| if *node == 0 { "A" } else { "B" };
        match self {
            Self::Start(n, role) => write!(f, "{} starts as {role:?}", name(n)),
            Self::Kill(n) => write!(f, "{} is killed", name(n)),
            Self::Time(n) => write!(f, "time passes on {}", name(n)),
            Self::Serve(n) => write!(f, "the arbiter carries out {}'s request", name(n)),
            Self::Answer(n) => write!(f, "the arbiter's answer reaches {}", name(n)),
            Self::Lose(n) => write!(f, "the arbiter's answer to {} is lost; it was carried out", name(n)),
            Self::Fail(n) => write!(f, "{}'s request certainly fails", name(n)),
            Self::Mislay(n) => write!(f, "{}'s write gets no answer and may still land", name(n)),
            Self::Land(i) => write!(f, "late write {i} lands"),
            Self::Beat(n) => write!(f, "{} sends a heartbeat", name(n)),
            Self::Hear(n) => write!(f, "{} hears a heartbeat", name(n)),
            Self::Dial(n) => write!(f, "{} connects to its peer", name(n)),
            Self::Accept(i) => write!(f, "connection {i} is taken on"),
            Self::Down(i) => write!(f, "the backup takes a message of connection {i}"),
            Self::Up(i) => write!(f, "the owner takes a message of connection {i}"),
            Self::FarLost(i) => write!(f, "the backup's end of connection {i} is over"),
            Self::NearLost(i) => write!(f, "the owner's end of connection {i} is over"),
            Self::PulseLost(n) => write!(f, "{} loses its heartbeat connection", name(n)),
            Self::Close(n) => write!(f, "{} closes its session", name(n)),
            Self::Event(n) => write!(f, "{} takes an event", name(n)),
            Self::EndEpoch(n) => write!(f, "an epoch ends on {}", name(n)),
            Self::LastCheckpoint(n) => write!(f, "the last checkpoint is made on {}", name(n)),
            Self::Order(i) => write!(f, "command {i}"),
            Self::GuestEnds(n, end) => write!(f, "the guest on {} ends: {end:?}", name(n)),
            Self::RollBack(i) => write!(f, "the record is set back to version {i}"),
        }
    }
}

/// All that may happen in a state, in a fixed order.
pub fn steps(setup: &Setup, world: &World) -> Vec<Step> {
    let mut found = Vec::with_capacity(32);
    for node in NODES {
        of_process(setup, world, node, &mut found);
        of_owner(setup, world, node, &mut found);
    }
    for (index, connection) in world.connections.iter().enumerate() {
        of_connection(setup, world, index, connection, &mut found);
    }
    found.extend(
        (0..world.zombies.len()).filter(|i| may_write(setup, world, world.zombies[*i].expected)).map(Step::Land),
    );
    if world.orders < setup.orders {
        let alive = |(_, (node, _)): &(usize, &(usize, Command))| world.process(*node).is_some();
        found.extend(setup.commands.iter().enumerate().filter(alive).map(|(index, _)| Step::Order(index)));
        if world.rollbacks < setup.rollbacks {
            found.extend((0..world.older.len()).map(Step::RollBack));
        }
    }
    found
}

fn of_process(setup: &Setup, world: &World, node: usize, found: &mut Vec<Step>) {
    let Some(process) = world.process(node) else {
        if world.nodes[node].lives < setup.lives[node] {
            found.extend(setup.roles[node].iter().map(|role| Step::Start(node, *role)));
        }
        return;
    };
    if setup.kills {
        found.push(Step::Kill(node));
    }
    if process.core.deadline.is_some() {
        found.push(Step::Time(node));
    }
    match &process.errand {
        Errand::None => {}
        Errand::Asked(request) => {
            let write = match request.as_ref() {
                ArbiterRequest::Read => None,
                ArbiterRequest::Cas { expected, .. } => Some(*expected),
            };
            let conflicts = write.is_some_and(|expected| expected != revision(world));
            if write.is_none_or(|expected| conflicts || may_write(setup, world, expected)) {
                found.push(Step::Serve(node));
            }
            if setup.arbiter_fails {
                found.push(Step::Fail(node));
            }
            if write.is_some() && !conflicts && world.zombies.len() < setup.zombies {
                found.push(Step::Mislay(node));
            }
        }
        Errand::Done(answer) => {
            found.push(Step::Answer(node));
            if setup.zombies > 0 && matches!(**answer, Answer::Cas(CasOutcome::Applied(_))) {
                found.push(Step::Lose(node));
            }
        }
    }
    if setup.late_beats && beat_of(world, node).is_some_and(|beat| world.beats[node] != Some(beat)) {
        found.push(Step::Beat(node));
    }
    if heard_by(setup, world, node).is_some() {
        found.push(Step::Hear(node));
    }
    let waits = match &process.shell {
        Shell::Starting => false,
        Shell::Waiter(waiter) => !waiter.events.is_empty(),
        Shell::Owner(owner) => !owner.events.is_empty(),
    };
    if waits {
        found.push(Step::Event(node));
    }
}

fn of_owner(setup: &Setup, world: &World, node: usize, found: &mut Vec<Step>) {
    let (Some(process), Some(owner)) = (world.process(node), world.owner(node)) else { return };
    let state = process.core.view.state;
    let connected = world.connections.iter().find(|c| c.from == node && c.near);
    let wants = state.runs() && state != StateName::SwitchingOver && owner.protect.session().is_none();
    // Every base that is begun uses an epoch's number.
    if wants && connected.is_none() && owner.last < setup.epochs && world.waiter(1 - node).is_some() {
        found.push(Step::Dial(node));
    }
    if owner.protect.session().is_some() {
        if setup.cuts && owner.leaving {
            found.push(Step::PulseLost(node));
        }
        if setup.cuts {
            found.push(Step::Close(node));
        }
    }
    let in_flight = owner.sealed.saturating_sub(owner.committed.unwrap_or(0).max(owner.released));
    let more = match owner.runner {
        Runner::Base(first) => first <= setup.epochs,
        Runner::Epochs => owner.last < setup.epochs && in_flight < setup.in_flight.max(1),
        Runner::Idle | Runner::Kept => false,
    };
    if more && owner.runs && owner.gate != Gate::Silent {
        found.push(Step::EndEpoch(node));
    }
    if owner.last_asked && owner.last < setup.epochs {
        found.push(Step::LastCheckpoint(node));
    }
    if owner.runs && world.orders < setup.orders {
        found.extend(setup.ends.iter().map(|end| Step::GuestEnds(node, *end)));
    }
}

fn of_connection(setup: &Setup, world: &World, index: usize, connection: &Connection, found: &mut Vec<Step>) {
    let Connection { from, near, far, down, up, .. } = connection;
    let listens = world.waiter(1 - from).is_some();
    match far {
        // What never was taken on is forgotten with the caller.
        Far::Waiting if listens => found.push(if *near { Step::Accept(index) } else { Step::FarLost(index) }),
        Far::Open if listens || is(Mutant::AckAfterPromotion) => {
            if !down.is_empty() {
                found.push(Step::Down(index));
            }
            if listens && (setup.cuts || (!near && down.is_empty())) {
                found.push(Step::FarLost(index));
            }
        }
        _ => {}
    }
    if *near {
        if !up.is_empty() {
            found.push(Step::Up(index));
        }
        let leaves = world.owner(*from).is_some_and(|owner| owner.leaving);
        if setup.cuts || (*far == Far::Closed && up.is_empty()) || leaves {
            found.push(Step::NearLost(index));
        }
    }
}

fn revision(world: &World) -> Option<Revision> {
    world.register.as_ref().map(|stored| stored.revision)
}

fn may_write(setup: &Setup, world: &World, expected: Option<Revision>) -> bool {
    expected == revision(world) && expected.map_or(0, |revision| revision.0) < setup.writes
}

/// What a node's heartbeat says now.
fn beat_of(world: &World, node: usize) -> Option<Beat> {
    let process = world.process(node)?;
    if matches!(process.shell, Shell::Starting) {
        return None;
    }
    let view = &process.core.view;
    let protected = view.owner && view.protected;
    Some(Beat { life: process.life, generation: small(view.generation.0), protected, asks: view.asks })
}

/// The heartbeat that may arrive now.
fn heard_by(setup: &Setup, world: &World, node: usize) -> Option<Beat> {
    let beat = if setup.late_beats { world.beats[1 - node]? } else { beat_of(world, 1 - node)? };
    let process = world.process(node)?;
    let knows = process.core.view.generation.0;
    let connected = match &process.shell {
        Shell::Starting => false,
        // From the owner, or from whom the core asked after.
        Shell::Waiter(_) => true,
        // Over the heartbeat connection of its session.
        Shell::Owner(_) => world.connections.iter().any(|c| c.from == node && c.near && c.listener == beat.life),
    };
    (connected && u64::from(beat.generation) >= knows).then_some(beat)
}

/// Carries a step out. With `logging`, the second part says what happened inside.
///
/// # Errors
/// See [`Violation`].
pub fn apply(
    setup: &Setup,
    memory: &mut Memory,
    world: &World,
    step: Step,
    logging: bool,
) -> Result<(World, Vec<String>), (Violation, Vec<String>)> {
    match step {
        Step::Serve(node) => plain(world, |next| serve(setup, next, node)),
        Step::Land(index) => plain(world, |next| {
            let Zombie { expected, record } = next.zombies.remove(index);
            write(setup, next, expected, record).map(drop)
        }),
        Step::Beat(node) => plain(world, |next| {
            next.beats[node] = beat_of(next, node);
            Ok(())
        }),
        Step::RollBack(index) => plain(world, |next| {
            next.register = next.older[index].clone();
            (next.orders, next.rollbacks) = (next.orders + 1, next.rollbacks + 1);
            (next.ghost.rolled_back, next.ghost.forced) = (true, true);
            Ok(())
        }),
        _ => {
            let mut turn = Turn::new(setup, memory, world, actor(setup, world, step), logging);
            match act(&mut turn, step) {
                Ok(()) => Ok(turn.end()),
                Err(violation) => Err((violation, turn.log.unwrap_or_default())),
            }
        }
    }
    .map(|(mut world, log)| {
        world.canonicalise(setup);
        (world, log)
    })
}

fn plain(
    world: &World,
    change: impl FnOnce(&mut World) -> Result<(), Violation>,
) -> Result<(World, Vec<String>), (Violation, Vec<String>)> {
    let mut next = world.clone();
    change(&mut next).map_err(|violation| (violation, Vec::new()))?;
    Ok((next, Vec::new()))
}

/// Whose turn a step is.
fn actor(setup: &Setup, world: &World, step: Step) -> usize {
    match step {
        Step::Start(node, _)
        | Step::Kill(node)
        | Step::Time(node)
        | Step::Serve(node)
        | Step::Answer(node)
        | Step::Lose(node)
        | Step::Fail(node)
        | Step::Mislay(node)
        | Step::Beat(node)
        | Step::Hear(node)
        | Step::Dial(node)
        | Step::PulseLost(node)
        | Step::Close(node)
        | Step::Event(node)
        | Step::EndEpoch(node)
        | Step::LastCheckpoint(node)
        | Step::GuestEnds(node, _) => node,
        Step::Accept(index) | Step::Down(index) | Step::FarLost(index) => 1 - world.connections[index].from,
        Step::Up(index) | Step::NearLost(index) => world.connections[index].from,
        Step::Order(index) => setup.commands[index].0,
        Step::Land(_) | Step::RollBack(_) => unreachable!("nobody's turn"),
    }
}

fn act(turn: &mut Turn<'_>, step: Step) -> Result<(), Violation> {
    match step {
        Step::Start(_, role) => turn.start(role),
        Step::Kill(_) => {
            turn.die();
            Ok(())
        }
        Step::Time(_) => {
            turn.late = true;
            round(turn, Vec::new())
        }
        Step::Answer(_) | Step::Lose(_) | Step::Fail(_) | Step::Mislay(_) => answer(turn, step),
        Step::Hear(node) => {
            let beat = heard_by(turn.setup, &turn.world, node).expect("a heartbeat is under way");
            let inputs = turn.inputs_of_beat(beat);
            round(turn, inputs)
        }
        Step::Dial(_) => dial(turn),
        Step::Accept(index) => turn.accept(index),
        Step::Down(index) => turn.take_down(index),
        Step::Up(index) => turn.take_up(index),
        Step::FarLost(index) if turn.world.connections[index].far == Far::Waiting => {
            turn.world.connections[index].far = Far::Closed;
            Ok(())
        }
        Step::FarLost(index) => turn.far_end_lost(index),
        Step::NearLost(index) => turn.near_end_lost(index),
        Step::PulseLost(_) => turn.session_lost(LinkLoss::PeerClosed),
        Step::Close(_) => turn.session_lost(LinkLoss::Local),
        Step::Event(_) => match turn.process().shell {
            Shell::Waiter(_) => turn.waiter_event().map(drop),
            _ => turn.owner_event().map(drop),
        },
        Step::EndEpoch(_) => turn.end_epoch(),
        Step::LastCheckpoint(_) => {
            turn.last_checkpoint()?;
            turn.told_owner()
        }
        Step::Order(index) => {
            turn.world.orders += 1;
            let (_, command) = turn.setup.commands[index];
            if matches!(command, Command::ForceTakeover { without_arbiter: true }) {
                (turn.world.ghost.forced, turn.world.ghost.blind) = (true, true);
            }
            round(turn, vec![Input::Command { ticket: Ticket(1), command }])
        }
        Step::GuestEnds(_, end) => {
            turn.world.orders += 1;
            turn.guest_ended(end)
        }
        Step::Serve(_) | Step::Land(_) | Step::Beat(_) | Step::RollBack(_) => unreachable!("nobody's turn"),
    }
}

/// A round of whichever loop runs.
fn round(turn: &mut Turn<'_>, inputs: Vec<Input>) -> Result<(), Violation> {
    let flow = match turn.process().shell {
        Shell::Starting => {
            let inputs = if inputs.is_empty() { vec![Input::Tick] } else { inputs };
            for input in inputs {
                if turn.decide(input)? == Flow::Left {
                    return Ok(());
                }
            }
            Flow::GoOn
        }
        Shell::Waiter(_) => turn.waiter_round(inputs)?,
        Shell::Owner(_) => turn.owner_round(inputs)?,
    };
    if flow == Flow::GoOn && matches!(turn.process().shell, Shell::Owner(_)) {
        turn.told_owner()?;
    }
    Ok(())
}

fn dial(turn: &mut Turn<'_>) -> Result<(), Violation> {
    let (at, generation) = (turn.at, turn.generation());
    let life = turn.process().life;
    let step = turn.owner().protect.tick(Duration::ZERO);
    if step.is_none() {
        return Err("the session's machine does not dial".to_owned());
    }
    let listener = turn.world.process(1 - at).expect("somebody listens").life;
    // Of several that wait, the listener would take the last; the one before is over for its caller, too.
    turn.world.connections.retain(|c| c.from != at || c.far != Far::Waiting);
    let (down, up) = (Vec::new(), Vec::new());
    turn.world.connections.push(Connection {
        from: at,
        life,
        listener,
        generation,
        near: true,
        far: Far::Waiting,
        down,
        up,
    });
    Ok(())
}

fn answer(turn: &mut Turn<'_>, step: Step) -> Result<(), Violation> {
    let errand = std::mem::replace(&mut turn.process().errand, Errand::None);
    let unknown = || Answer::Cas(CasOutcome::Unknown(String::new()));
    let answer = match (step, errand) {
        (Step::Answer(_), Errand::Done(answer)) => answer.as_ref().clone(),
        (Step::Lose(_), Errand::Done(_)) => unknown(),
        (Step::Fail(_), Errand::Asked(request)) => match request.as_ref() {
            ArbiterRequest::Read => Answer::Read(Err(ArbiterError::Unreachable(String::new()))),
            ArbiterRequest::Cas { .. } => Answer::Cas(CasOutcome::Failed(String::new())),
        },
        (Step::Mislay(_), Errand::Asked(request)) => {
            if let ArbiterRequest::Cas { expected, record } = request.as_ref() {
                turn.world.zombies.push(Zombie { expected: *expected, record: record.clone() });
            }
            unknown()
        }
        (step, errand) => panic!("{step:?} of {errand:?}"),
    };
    let refused = match &answer {
        Answer::Read(Ok(Some(read)))
            if small(read.record.generation.0) < turn.node.persisted
                && turn.process().core.view.record.as_ref() != Some(read) =>
        {
            Some(read.clone())
        }
        _ => None,
    };
    round(turn, vec![Input::Arbiter { op: OpId(0), answer }])?;
    match (refused, &turn.node.process) {
        (Some(read), Some(process)) if process.core.view.record.as_ref() == Some(&read) => Err(format!(
            "R7: a record of generation {} is believed, {} was seen",
            read.record.generation, turn.node.persisted
        )),
        _ => Ok(()),
    }
}

// ---- the arbiter ---------------------------------------------------------------------------------------------------------------------

fn serve(setup: &Setup, world: &mut World, node: usize) -> Result<(), Violation> {
    let Some(Errand::Asked(request)) = world.process(node).map(|process| process.errand.clone()) else {
        panic!("nothing to serve")
    };
    let answer = match request.as_ref() {
        ArbiterRequest::Read => Answer::Read(Ok(world.register.value.as_ref().clone())),
        ArbiterRequest::Cas { expected, record } => Answer::Cas(write(setup, world, *expected, record.clone())?),
    };
    let mut changed = world.nodes[node].value.as_ref().clone();
    changed.process.as_mut().expect("it asked").errand = Errand::Done(Arc::new(answer));
    world.nodes[node] = Printed::new(changed);
    Ok(())
}

/// One compare-and-swap, and what must be true of it whoever made it.
fn write(
    setup: &Setup,
    world: &mut World,
    expected: Option<Revision>,
    record: Record,
) -> Result<CasOutcome, Violation> {
    if expected != revision(world) {
        return Ok(CasOutcome::Conflict);
    }
    record.validate().map_err(|error| format!("the record is {error}"))?;
    if let Some(stored) = world.register.as_ref() {
        check_write(world, &stored.record, &record)?;
    }
    if record.reason == Reason::Forced {
        world.ghost.forced = true;
    }
    let before = world.register.clone();
    if setup.rollbacks > 0 && before.is_some() {
        world.older.push(before);
    }
    let revision = Revision(expected.map_or(1, |revision| revision.0 + 1));
    world.register = Printed::new(Some(Versioned { revision, record }));
    Ok(CasOutcome::Applied(revision))
}

fn check_write(world: &World, stored: &Record, record: &Record) -> Result<(), Violation> {
    if record.generation < stored.generation && !world.ghost.forced {
        return Err(format!("G2: generation {} is followed by {}", stored.generation, record.generation));
    }
    if record.owner != stored.owner && record.generation <= stored.generation {
        return Err(format!("G2: two owners of generation {}", record.generation));
    }
    if matches!(record.reason, Reason::Takeover | Reason::Switchover) && stored.in_sync.as_ref() != Some(&record.owner)
    {
        return Err(format!("R4: {} takes over, in sync was {:?}", record.owner, stored.in_sync));
    }
    if let (Reason::ColdStart | Reason::Created, Some(backup)) = (record.reason, &stored.in_sync) {
        let (node, life) = of_ref(backup);
        let lives = world.process(node).is_some_and(|process| process.life == life);
        if lives && world.waiter(node).is_some_and(|waiter| waiter.holding.is_some()) {
            return Err(format!("start rule: {} boots although {backup} is in sync and alive", record.owner));
        }
    }
    Ok(())
}

/// The reference of the process that lives on a node.
pub fn living(world: &World, node: usize) -> Option<failover::arbiter::NodeRef> {
    world.process(node).map(|process| node_ref(node, process.life))
}
