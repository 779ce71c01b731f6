//! The parts of the demo guest that need no machine: the Redis protocol, the data set, the commands and the kernel
//! command line, and the log on disk. Everything here is pure (time is an argument) and is tested on the host.
//!
//! Sizes that come from the network are reserved fallibly: a request that does not fit is answered with an error.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod cmdline;
pub mod command;
pub mod database;
mod disk;
pub mod histogram;
mod keys;
mod lists;
pub mod load;
pub mod log;
mod own;
pub mod resp;
mod server;
mod state;
pub mod store;
mod strings;

pub use command::{Machine, Outcome, Ran, Session, execute};
pub use database::{AppendFsync, Database};
pub use disk::DiskJob;
pub use resp::{Args, Out, Parsed, parse};
pub use store::Store;
