//! What the tests of the pair share.

pub mod bench;
pub mod check;
pub mod explore;
pub mod fuzz;
pub mod history;
pub mod machine;
pub mod points;
pub mod real;
pub mod world;
