//! Programs that show what the pair does.

pub mod demo;
