//! The standby's disks: what is committed goes into the journal, and from there into the images.

mod keeper;

pub use keeper::DiskKeeper;
