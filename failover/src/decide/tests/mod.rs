//! Two cores, one arbiter, virtual time.

mod matrix;
mod moves;
mod random;
mod rejoin;
mod rules;
mod world;
