//! The parts of the demo guest that need no machine: the Redis protocol, the data set, the commands and the kernel
//! command line. Everything here is pure (time is an argument) and is tested on the host.
//!
//! Sizes that come from the network are reserved fallibly: a request that does not fit is answered with an error.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod cmdline;
pub mod command;
mod keys;
mod lists;
mod own;
pub mod resp;
mod server;
pub mod store;
mod strings;

pub use command::{Machine, Outcome, Session, execute};
pub use resp::{Args, Out, Parsed, parse};
pub use store::Store;
