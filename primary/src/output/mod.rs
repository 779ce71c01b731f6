//! The output gate: nothing that the guest says in an epoch leaves before that epoch is committed.
//!
//! * [`queue`]: which outputs wait for which epoch, and when they may leave. Pure.
//! * [`gate`]: the same behind a lock, with the way out attached.
//! * [`bell`]: tells whoever ends epochs that an output waits.
//! * [`held`]: held frames as bytes, so that they can travel with their epoch.
//! * [`world`]: the way out: taps and console.
//! * [`speakers`]: which addresses the guest speaks from, for the new owner's announcement.

pub mod bell;
pub mod gate;
pub mod held;
pub mod queue;
pub mod speakers;
pub mod world;

pub use gate::Gate;
pub use world::World;
