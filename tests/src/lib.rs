//! What the tests of the pair share.

pub mod machine;
pub mod real;
