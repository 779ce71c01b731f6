//! The primary's side of disks: what must be on stable storage before a change, what travels with an epoch, and what is remembered of it all
//! across restarts and power cuts.
//!
//! In reading order:
//! * [`replicated`]: the disk that the machine works on: image, then map and log
//! * [`log`]: changes of the running epoch, bounded, sealed with it
//! * [`map`]: which blocks may differ from a known state of the VM; **invariant M** is there. [`book`] is its pure half, [`header`] and
//!   [`blocks`] are its formats
//! * [`owner`]: all disks of a machine that runs
//! * [`copy`]: what of them is sent with a base; pure but for the reading
//! * [`set`]: all of it opened, as a process finds it
//! * [`journal`]: the backup's write-ahead file; it is here because a process that boots the guest may find one, too
//! * [`recover`]: what a process does first with images, maps and journal that it finds
//! * [`open`]: where the files are; with failpoints, [`volatile`] loses at SIGKILL what was not synced, and [`failing`] fails on order

pub mod blocks;
pub mod book;
pub mod copy;
#[cfg(feature = "failpoints")]
pub mod failing;
pub mod header;
pub mod journal;
pub mod log;
pub mod map;
pub mod open;
pub mod owner;
pub mod recover;
pub mod replicated;
pub mod set;
#[cfg(any(test, feature = "failpoints"))]
pub mod testing;
#[cfg(any(test, feature = "failpoints"))]
pub mod volatile;

pub use replication_proto::limits::{MAX_DISK_CHANGE_BYTES, MAX_DISK_ZERO_BYTES};
pub use replication_proto::{DiskChange, DiskChanges, DiskContent, Epoch, Generation, Point};

pub use blocks::{BLOCK_BYTES, BlockSet, BlockSetError};
pub use copy::{DiskCopy, DiskStep, differing};
pub use header::DiskIdentity;
pub use journal::{Journal, JournalError, Record};
pub use log::DiskLog;
pub use map::{DirtyMap, MapError};
pub use open::{DiskError, open_image, open_storage};
pub use owner::OwnerDisks;
pub use recover::recover;
pub use replicated::{Alarm, DiskFailure, FirstChange, ReplicatedDisk};
pub use set::{DiskSet, Opened};
