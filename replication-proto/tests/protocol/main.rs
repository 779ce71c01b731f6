//! Tests of the protocol through its public face.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod corpus;
mod disks;
mod golden;
mod negotiation;
mod pair;
mod pulse;
mod support;
