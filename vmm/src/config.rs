//! What a machine is made of.

use std::path::PathBuf;
use std::sync::Arc;

use crate::disk::{Disk, DiskSerial, SECTOR_BYTES};
use crate::outputs::{FramePort, Outputs};

/// Greatest number of disks of a machine.
pub const MAX_DISKS: usize = 4;

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
    /// Disks, in the slots behind the network devices; at most [`MAX_DISKS`].
    pub disks: Vec<DiskConfig>,
}

/// One network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicConfig {
    /// The guest's address on this device.
    pub mac: [u8; 6],
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Size in bytes, a positive multiple of 512.
    pub bytes: u64,
    /// The guest may not change it.
    pub read_only: bool,
    /// What the guest reads as its serial number.
    pub serial: DiskSerial,
}

impl DiskConfig {
    /// What the other host must share of a disk.
    pub(crate) fn fact(&self) -> String {
        let Self { bytes, read_only, serial } = self;
        format!("blk {bytes} {} {serial}", if *read_only { "ro" } else { "rw" })
    }
}

/// Whether the disks of a machine's host side are those of its parts list; otherwise the reason.
pub(crate) fn check_disks(config: &MachineConfig, io: &MachineIo) -> Result<(), String> {
    if config.disks.len() > MAX_DISKS {
        return Err(format!("{} disks, at most {MAX_DISKS} are possible", config.disks.len()));
    }
    if io.disks.len() != config.disks.len() {
        return Err(format!("{} images for {} disks", io.disks.len(), config.disks.len()));
    }
    for (wanted, disk) in config.disks.iter().zip(&io.disks) {
        let DiskConfig { bytes, read_only, serial } = wanted;
        if *bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(format!("disk {serial}: {bytes} bytes are no positive multiple of {SECTOR_BYTES}"));
        }
        if disk.bytes() != *bytes {
            return Err(format!("disk {serial}: its image has {} bytes instead of {bytes}", disk.bytes()));
        }
        if disk.is_read_only() && !read_only {
            return Err(format!("disk {serial}: its image can only be read"));
        }
    }
    Ok(())
}

/// The host's side of a machine: live handles, never part of its state.
pub struct MachineIo {
    /// Where everything that the guest says goes.
    pub outputs: Arc<dyn Outputs>,
    /// Inbound frames, one port for each of [`MachineConfig::nics`].
    pub ports: Vec<Arc<dyn FramePort>>,
    /// What each of [`MachineConfig::disks`] does its work on.
    pub disks: Vec<Arc<dyn Disk>>,
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
