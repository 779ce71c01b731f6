//! Two cores, one arbiter, virtual time.

mod matrix;
mod random;
mod rules;
mod world;
