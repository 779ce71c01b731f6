//! The pair as real processes: two hosts and a client in network namespaces of their own, real kills, a real TCP client.
//!
//! The demo and the tests of the pair share this. Nothing here is ever named in the file system or in the host's network:
//! namespaces are anonymous and live as long as a process is in them, and every child dies with the thread that started it. So
//! even a SIGKILL of the caller leaves neither a process nor an interface behind.

pub mod artifacts;
pub mod client;
pub mod clock;
pub mod counters;
pub mod crash;
pub mod daemon;
mod error;
pub mod etcd;
pub mod events;
pub mod faults;
pub mod lineage;
pub mod load;
pub mod netns;
pub mod network;
pub mod pair;
pub mod pause;
pub mod qemu;
pub mod resp;
pub mod rng;
pub mod scene;
pub mod shaper;
pub mod status;
mod sys;
pub mod tools;
pub mod watch;

pub use error::{Error, Result};

use std::fmt;

/// What the guest is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineKind {
    /// A KVM virtual machine that boots the demo guest.
    Kvm,
    /// The model machine, for hosts without `/dev/kvm`.
    Model,
}

impl MachineKind {
    /// The word of `pair.toml` and of command lines.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Model => "model",
        }
    }
}

impl fmt::Display for MachineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One of the two hosts, by its name in `pair.toml`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The host on which the guest boots.
    A,
    /// The host that stands by at first.
    B,
}

impl Node {
    /// Both, in order.
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    /// The name in `pair.toml`, in interface names and in directories.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// The other host.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
