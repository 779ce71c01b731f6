//! The checkpoint stream: epochs, pages and sections on the wire. Bytes and events in, bytes and events out; no I/O, no clock, no thread,
//! no randomness.

#![forbid(unsafe_code)]

pub mod ids;

pub use ids::{Epoch, Generation, IdError, Identity, Incarnation, NodeName, PageIndex, VmId};
