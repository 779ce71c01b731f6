//! What the tests of the pair share.

pub mod real;
