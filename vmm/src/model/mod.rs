//! A machine without KVM behind the same trait.
//!
//! Its guest is a small appliance in safe Rust: Ethernet, ARP, ICMP echo, a TCP server and a store that speaks RESP, a
//! background load that dirties pages, a UDP beacon, disks with a log of its data set on the first. All of its state is in guest RAM and in one section of registers:
//! RAM and section put into a freshly built machine go on exactly where they were taken. Everything above `vmm` runs on it
//! where there is no `/dev/kvm`, and an ordinary client cannot tell.
//!
//! * [`ModelMachine`]: the [`crate::Machine`], one vCPU thread around the program
//! * [`ModelProgram`]: the program alone, without thread or clock, for simulators: same RAM, registers, time and frames in,
//!   same RAM, registers and frames out
//! * [`ProgramOptions`]: its command line

mod bus;
mod commands;
mod disk_commands;
mod disks;
mod layout;
mod log;
mod machine;
mod options;
mod program;
mod registers;
mod resp;
mod server;
mod store;
mod tcb;
mod tcp;
#[cfg(test)]
mod tests_disk;
mod wire;

pub use disks::Announcement;
pub use machine::{ModelBuildError, ModelMachine};
pub use options::{BadWord, ProgramOptions};
pub use program::{End, ModelProgram, ProgramError, Step};
