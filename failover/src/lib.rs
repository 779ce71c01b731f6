//! Who may run: the pure decision core, its arbiters, and what operators see of it.
//!
//! [`decide`] is the core, the same on both sides. Around it: [`arbiter`] (the record and its compare-and-swap), [`generation`] (what survives a
//! restart), [`config`] (`pair.toml`), [`status`], [`control`] (the unix socket of `ftctl`), [`health`] (HTTP for probes and metrics), [`text`] (quoting what
//! others said), and [`failpoint`] (places where tests let the programs fail).

#![forbid(unsafe_code)]

pub mod arbiter;
pub mod config;
pub mod control;
pub mod decide;
mod detector;
pub mod exit;
pub mod failpoint;
pub mod generation;
pub mod health;
pub mod permit;
pub mod reason;
pub mod status;
pub mod text;

pub use detector::{Detector, Evidence};
pub use permit::RunPermit;
