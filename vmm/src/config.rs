//! What a machine is made of.

use std::path::PathBuf;
use std::sync::Arc;

use crate::outputs::{FramePort, Outputs};

/// The parts list of a machine. Both hosts build from equal lists; [`crate::Machine::facts`] is how they find out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 or 2.
    pub vcpus: u8,
    /// Guest RAM in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// PVH ELF image, a Linux `vmlinux` included.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line; `virtio_mmio.device=` words are added by the machine.
    pub cmdline: String,
    /// Network devices, in slot order.
    pub nics: Vec<NicConfig>,
}

/// One network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicConfig {
    /// The guest's address on this device.
    pub mac: [u8; 6],
}

/// The host's side of a machine: live handles, never part of its state.
pub struct MachineIo {
    /// Where everything that the guest says goes.
    pub outputs: Arc<dyn Outputs>,
    /// Inbound frames, one port for each of [`MachineConfig::nics`].
    pub ports: Vec<Arc<dyn FramePort>>,
    /// Bytes typed at the serial console: a descriptor to read from.
    pub console_input: Option<std::os::fd::OwnedFd>,
}

/// What guest time does over a takeover. On every policy it never runs backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockPolicy {
    /// Guest clocks go on from the checkpoint: the outage did not happen for the guest. Where the host's KVM does not honour
    /// a TSC offset (see [`Fact`] `tsc.writable`), the TSC goes on from the host's own and so jumps by the outage.
    ResumeFromCheckpoint,
}

/// One property of a machine and its host that the other side must share, as a name and a value for people to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// Dotted name, for example `cpuid.00000001` or `ram.bytes`.
    pub name: String,
    /// Printable value; equal values mean compatible.
    pub value: String,
}
