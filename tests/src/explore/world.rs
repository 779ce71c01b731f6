//! One state of the explored world: two processes, the register, and what is under way between them.

use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

use failover::arbiter::{Record, Revision, Versioned};
use failover::decide::{Answer, ArbiterRequest, GoodbyeReason, Role};
use xxhash_rust::xxh3::Xxh3;

use super::ghost::Ghost;
use super::mind::Mind;
use super::owner::Owner;
use super::setup::{NODES, Setup};
use super::waiter::Waiter;

/// A fingerprint of a state: 128 bits, so that two states of the same fingerprint are not expected in a billion of them.
pub type Print = u128;

/// Fingerprints a value.
pub fn print_of(value: &impl Hash) -> Print {
    let mut hasher = Xxh3::new();
    value.hash(&mut hasher);
    hasher.digest128()
}

/// Where a request to the arbiter is. There is at most one in each process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Errand {
    /// None.
    None,
    /// Under way.
    Asked(Arc<ArbiterRequest>),
    /// Done; the answer is under way.
    Done(Arc<Answer>),
}

/// The half of a shell that differs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Shell {
    /// `primary::start`: the record has not been read yet, nobody listens.
    Starting,
    /// `backup::wait`.
    Waiter(Waiter),
    /// `primary::owner`.
    Owner(Owner),
}

/// A process.
#[derive(Debug, Clone, Hash)]
pub struct Process {
    /// Which life of its node.
    pub life: u8,
    /// As what it was started.
    pub role: Role,
    /// The real decision core.
    pub core: Printed<Mind>,
    /// Its request to the arbiter.
    pub errand: Errand,
    /// It may have written the record.
    pub wrote: bool,
    /// Everything else.
    pub shell: Shell,
}

/// A node: what survives its processes, and the process.
#[derive(Debug, Clone, Hash, Default)]
pub struct Node {
    /// Lives so far.
    pub lives: u8,
    /// The highest generation on its disk.
    pub persisted: u8,
    /// The process that runs.
    pub process: Option<Process>,
}

/// A value that many states share, with its fingerprint.
#[derive(Debug)]
pub struct Printed<T> {
    /// The value.
    pub value: Arc<T>,
    /// Its fingerprint.
    pub print: Print,
}

impl<T: Hash> Printed<T> {
    /// Fingerprints a value.
    pub fn new(value: T) -> Self {
        let print = print_of(&value);
        Self { value: Arc::new(value), print }
    }
}

impl<T> Clone for Printed<T> {
    fn clone(&self) -> Self {
        Self { value: Arc::clone(&self.value), print: self.print }
    }
}

impl<T> Hash for Printed<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

impl<T> Deref for Printed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

/// From the side that dialled to the side that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Down {
    /// A base begins.
    Begin,
    /// The base ends with this epoch.
    Base(u8),
    /// A further epoch, whole. With it: whether it was acknowledged already (a mutant).
    Epoch(u8, bool),
    /// A goodbye.
    Goodbye(GoodbyeReason),
}

/// From the side that listens to the side that dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Up {
    /// Compatible; with the generation that the listener knows.
    Accept(u8),
    /// Refused; with the generation that the listener knows.
    Refuse(u8),
    /// Committed up to here.
    Ack(u8),
}

/// What the listener made of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Far {
    /// It has not looked yet.
    Waiting,
    /// It is its data connection.
    Open,
    /// Over.
    Closed,
}

/// A data connection. Heartbeats run beside it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The node that dialled.
    pub from: usize,
    /// Which life of it.
    pub life: u8,
    /// Which life of the other node listens.
    pub listener: u8,
    /// The generation of the hello.
    pub generation: u8,
    /// The dialler's end is in use.
    pub near: bool,
    /// The listener's end.
    pub far: Far,
    /// In order.
    pub down: Vec<Down>,
    /// In order.
    pub up: Vec<Up>,
}

/// A heartbeat under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Beat {
    /// Whose.
    pub life: u8,
    /// The generation that it knew.
    pub generation: u8,
    /// It said that it is PROTECTED.
    pub protected: bool,
    /// It asked for the guest.
    pub asks: bool,
}

/// A write whose answer was given up as lost, and that may still be done.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Zombie {
    /// What it expects.
    pub expected: Option<Revision>,
    /// What it would write.
    pub record: Record,
}

/// A state.
#[derive(Debug, Clone, Hash)]
pub struct World {
    /// Both nodes.
    pub nodes: [Printed<Node>; 2],
    /// The arbiter's register.
    pub register: Printed<Option<Versioned>>,
    /// What the arbiter may be set back to.
    pub older: Vec<Printed<Option<Versioned>>>,
    /// Writes that may still land.
    pub zombies: Vec<Zombie>,
    /// Data connections, in the order in which they were made.
    pub connections: Vec<Connection>,
    /// The last heartbeat that each node put under way.
    pub beats: [Option<Beat>; 2],
    /// Commands, ends and rollbacks so far.
    pub orders: u8,
    /// Rollbacks so far.
    pub rollbacks: u8,
    /// What really happened.
    pub ghost: Ghost,
}

impl World {
    /// Both hosts are there, and nothing was ever started.
    pub fn new() -> Self {
        Self {
            nodes: NODES.map(|_| Printed::new(Node::default())),
            register: Printed::new(None),
            older: Vec::new(),
            zombies: Vec::new(),
            connections: Vec::new(),
            beats: [None; 2],
            orders: 0,
            rollbacks: 0,
            ghost: Ghost::default(),
        }
    }

    /// Its fingerprint.
    pub fn print(&self) -> Print {
        print_of(self)
    }

    /// The process of a node.
    pub fn process(&self, node: usize) -> Option<&Process> {
        self.nodes[node].process.as_ref()
    }

    /// The side of a node that waits.
    pub fn waiter(&self, node: usize) -> Option<&Waiter> {
        match &self.process(node)?.shell {
            Shell::Waiter(waiter) => Some(waiter),
            _ => None,
        }
    }

    /// The side of a node that owns the guest.
    pub fn owner(&self, node: usize) -> Option<&Owner> {
        match &self.process(node)?.shell {
            Shell::Owner(owner) => Some(owner),
            _ => None,
        }
    }

    /// Makes states equal that behave equally from now on.
    pub fn canonicalise(&mut self, setup: &Setup) {
        let revision = self.register.as_ref().map(|stored| stored.revision);
        if setup.rollbacks == 0 {
            // A revision never comes back.
            self.zombies.retain(|zombie| zombie.expected == revision);
        }
        self.zombies.sort_by_cached_key(print_of);
        self.connections.retain(|c| c.near || c.far != Far::Closed);
        for connection in &mut self.connections {
            if !connection.near {
                connection.up.clear();
            }
            if connection.far == Far::Closed {
                connection.down.clear();
            }
        }
        for node in NODES {
            if self.process(node).is_none() {
                // Heartbeats of a dead process that are under way are taken for lost or delivered before it died.
                self.beats[node] = self.beats[node].filter(|_| setup.late_beats);
            }
        }
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}
