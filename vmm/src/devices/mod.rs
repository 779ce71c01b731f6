//! Everything that the guest reaches by port or by address outside RAM, and that is not in the kernel.
//!
//! | where | what | interrupt |
//! |---|---|---|
//! | ports 0x3f8 to 0x3ff | serial console | 4 |
//! | ports 0x60, 0x64 | keyboard controller, of which only the reset line is left | |
//! | port 0x604 | power: a 16-bit write of 0x2000 switches off | |
//! | 0xd000_0000 + slot × 0x1000 | virtio-mmio, one page a device | 5, 6, 7, 9, 10, 11 by slot |

pub(crate) mod host_io;
pub(crate) mod irq;
pub(crate) mod serial;
pub(crate) mod virtio;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::machine::{CaptureError, MachineEvent, RestoreError};
use crate::memory::GuestRam;
use crate::section::{Section, SectionKind};
use crate::state::codec::Saved;
use serial::SerialPort;
use virtio::mmio::VirtioMmio;

/// Where virtio-mmio devices begin.
pub(crate) const MMIO_BASE: u64 = 0xd000_0000;
/// Address space of one virtio-mmio device.
pub(crate) const MMIO_SIZE: u64 = 0x1000;
/// Interrupt lines by slot: those of the PIC that nothing else here uses, because a guest without ACPI has no others.
pub(crate) const VIRTIO_IRQS: [u32; 6] = [5, 6, 7, 9, 10, 11];

const SERIAL_PORTS: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
const POWER_PORT: u16 = 0x604;
const POWER_OFF: [u8; 2] = 0x2000u16.to_le_bytes();
/// The keyboard controller keeps nothing: an empty section says so.
const I8042_VERSION: u16 = 1;

/// The devices of one machine. Each has a lock of its own; no thread holds two.
pub(crate) struct Devices {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) serial: Mutex<SerialPort>,
    /// By slot.
    pub(crate) virtio: Vec<Mutex<VirtioMmio>>,
}

/// Locks a device. A thread that panicked inside it took the process's invariants with it, but the state is plain data.
pub(crate) fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Devices {
    /// A read from a port. Ports that nobody answers read as all ones, as on a PC.
    pub(crate) fn port_in(&self, port: u16, data: &mut [u8]) {
        if SERIAL_PORTS.contains(&port) {
            let mut serial = lock(&self.serial);
            for byte in data {
                *byte = serial.read(port - SERIAL_PORTS.start());
            }
        } else if port == I8042_COMMAND {
            data.fill(0);
        } else {
            data.fill(0xff);
        }
    }

    /// A write to a port; the event when it ends the machine.
    pub(crate) fn port_out(&self, port: u16, data: &[u8]) -> Option<MachineEvent> {
        if SERIAL_PORTS.contains(&port) {
            let mut serial = lock(&self.serial);
            for byte in data {
                serial.write(port - SERIAL_PORTS.start(), *byte);
            }
        } else if port == I8042_COMMAND && data.first() == Some(&I8042_RESET) {
            return Some(MachineEvent::Reset);
        } else if port == POWER_PORT && data == POWER_OFF {
            return Some(MachineEvent::PoweredOff);
        }
        None
    }

    /// A read outside RAM. Addresses that nobody answers read as all ones.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.virtio_at(address) {
            Some((device, offset)) => lock(device).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write outside RAM.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.virtio_at(address) {
            lock(device).write(offset, data, self.ram.tracked());
        }
    }

    fn virtio_at(&self, address: u64) -> Option<(&Mutex<VirtioMmio>, u64)> {
        let from_base = address.checked_sub(MMIO_BASE)?;
        let slot = usize::try_from(from_base / MMIO_SIZE).ok()?;
        Some((self.virtio.get(slot)?, from_base % MMIO_SIZE))
    }

    /// The kinds of section that [`Devices::capture`] gives and [`Devices::restore`] needs, ascending.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = SectionKind> + '_ {
        [SectionKind::SERIAL, SectionKind::I8042]
            .into_iter()
            .chain((0u8..).zip(&self.virtio).map(|(slot, _)| SectionKind::virtio(slot)))
    }

    /// One section for each device. Nobody may run them.
    pub(crate) fn capture(&self) -> Result<Vec<Section>, CaptureError> {
        let mut sections = vec![
            lock(&self.serial).capture().to_section(SectionKind::SERIAL),
            Section { kind: SectionKind::I8042, version: I8042_VERSION, bytes: Vec::new() },
        ];
        for (slot, device) in (0u8..).zip(&self.virtio) {
            sections.push(lock(device).capture().to_section(SectionKind::virtio(slot)));
        }
        Ok(sections)
    }

    /// Puts one section into its device.
    pub(crate) fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let kind = section.kind;
        if kind == SectionKind::SERIAL {
            return lock(&self.serial).restore(&Saved::from_section(section)?);
        }
        if kind == SectionKind::I8042 {
            if section.version != I8042_VERSION {
                return Err(RestoreError::Version { kind, got: section.version, reads: I8042_VERSION });
            }
            if !section.bytes.is_empty() {
                return Err(RestoreError::Malformed { kind, reason: "the keyboard controller has no state".into() });
            }
            return Ok(());
        }
        let device = (0u8..).zip(&self.virtio).find(|(slot, _)| SectionKind::virtio(*slot) == kind);
        let (_, device) = device.ok_or(RestoreError::Unexpected(kind))?;
        let saved = Saved::from_section(section)?;
        lock(device).restore(&saved, self.ram.tracked()).map_err(|e| e.of(kind))
    }
}
