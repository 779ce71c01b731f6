//! The standby's disks: what is committed goes into the journal, and from there into the images.
//!
//! * [`flow`]: what may be added, synced, acknowledged and applied now; pure
//! * [`worker`]: carries that out on journal, images and maps
//! * [`turn`]: command by command, and what is told of it; pure but for the files
//! * [`sink`]: its thread, and what the rest of the backup says to it
//! * [`keeper`]: the link's handle on that thread
//!
//! Formats, recovery and the maps are in [`primary::disk`], because a process that boots the guest finds the same files.

pub mod flow;
pub mod keeper;
pub mod sink;
/// The same storage as in the primary's tests: it loses what was not synced.
#[cfg(test)]
#[path = "../../../primary/src/disk/testing.rs"]
pub mod testing;
pub mod turn;
pub mod worker;

pub use flow::{Flow, Order};
pub use keeper::DiskKeeper;
pub use primary::disk::{Journal, JournalError, Record};
pub use sink::DiskSink;
pub use turn::{Command, SinkEvent, Turn};
pub use worker::{Retire, SinkError, Worker};
