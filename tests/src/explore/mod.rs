//! The exhaustive explorer: every state that two real decision cores, two real session machines and one record can reach within small bounds, whatever
//! is lost, late, done twice or killed in between.
//!
//! In reading order:
//! * [`setup`]: which faults and commands there are, and the bounds; the named configurations
//! * [`world`]: one state: two processes, the arbiter's register, the connections between them
//! * [`ghost`]: what really happened, kept apart from the cores, and what must never happen
//! * [`mind`]: the real core, driven
//! * [`turn`]: one step of one process
//! * [`owner`], [`waiter`]: the two shells, modelled; they carry events to the real machines and carry out what those answer, as
//!   `primary::owner` and `backup::wait` do
//! * [`step`]: what may happen next
//! * [`claims`]: what must hold in every state
//! * [`search`]: breadth first, so that a trace to a violation is a shortest one
//! * [`heal`]: from states of the search on, with everything repaired: the pair must recover
//! * [`mutants`]: the same with one rule broken; each must be found
//! * [`disk`]: another world, of disks: their real machinery, and a power cut at any moment

pub mod claims;
pub mod disk;
pub mod ghost;
pub mod heal;
pub mod mind;
pub mod mutants;
pub mod owner;
pub mod search;
pub mod setup;
pub mod step;
pub mod turn;
pub mod waiter;
pub mod world;
