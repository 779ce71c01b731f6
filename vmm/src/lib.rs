//! The machine: a guest that can be built, booted, stopped exactly, captured, restored and run again.
//!
//! This crate knows KVM and devices. It knows no peer, no epoch number and no socket: whoever protects a machine does so through
//! [`machine::Machine`], which two machines implement, [`kvm::KvmMachine`] and [`model::ModelMachine`] (for hosts without KVM,
//! and for tests). Modules in reading order:
//!
//! * [`config`]: what a machine is made of; both hosts build the same one
//! * [`memory`]: guest RAM, page by page
//! * [`page_bits`]: sets of pages
//! * [`dirty`]: which pages were written, and how the answer survives a failure
//! * [`write_protect`]: pages that the guest may not write for a while
//! * [`section`]: one versioned piece of machine state
//! * [`disk`]: what a block device does its work on
//! * [`outputs`]: where everything externally visible leaves, and where frames come in
//! * [`machine`]: the trait
//! * [`pause`]: the guard without which nothing can be captured
//! * [`throttle`]: how much a guest is slowed that writes more than can be followed
//! * [`kvm`]: the machine on KVM, put together from the private modules `vcpu` (threads, exits, stopping), `state` (reading and
//!   writing machine state, in which order and why), `devices` and `boot`
//! * [`model`]: the machine without KVM
//! * [`tap`]: ports for frames: a tap device, a socket pair

mod boot;
pub mod config;
mod devices;
pub mod dirty;
pub mod disk;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod hot;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod model;
pub mod outputs;
mod own_writes;
pub mod page_bits;
pub mod pause;
pub mod section;
mod state;
pub mod tap;
pub mod throttle;
mod vcpu;
pub mod write_protect;

pub use config::{ClockPolicy, DiskConfig, Fact, MAX_DISKS, MachineConfig, MachineIo, NicConfig};
pub use dirty::{DirtyLedger, DirtySet};
pub use disk::{ByteRange, Disk, DiskImage, DiskSerial, FileStorage, ImageError, Storage};
pub use hot::Tracking;
pub use kvm::{BuildError, KvmMachine};
pub use machine::{Machine, MachineEvent};
pub use memory::{GuestRam, PAGE_SIZE, PageNo};
pub use model::{Announcement, ModelBuildError, ModelMachine, ModelProgram};
pub use outputs::{FramePort, Outputs};
pub use page_bits::PageBits;
pub use pause::{PauseTimings, PausedVm};
pub use section::{Section, SectionKind};
pub use tap::{SocketPort, Tap, TapError};
pub use throttle::Throttle;
