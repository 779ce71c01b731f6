//! One versioned piece of machine state.

/// Who a section belongs to. The upper byte is the class, the lower byte the instance (vCPU number, slot of a device).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionKind(pub u16);

impl SectionKind {
    /// One vCPU, by number.
    pub const fn vcpu(n: u8) -> Self {
        Self(0x0100 | n as u16)
    }
    /// PIC, IOAPIC and PIT.
    pub const IRQCHIP: Self = Self(0x0200);
    /// The VM-wide clock.
    pub const CLOCK: Self = Self(0x0300);
    /// The serial console.
    pub const SERIAL: Self = Self(0x0400);
    /// The keyboard controller (reset line).
    pub const I8042: Self = Self(0x0500);
    /// One virtio device, by slot.
    pub const fn virtio(slot: u8) -> Self {
        Self(0x0600 | slot as u16)
    }
    /// The model machine's processor.
    pub const MODEL: Self = Self(0x0700);
    /// First kind that `vmm` never uses: the layers above number their own sections from here.
    pub const FIRST_FOREIGN: Self = Self(0xF000);
}

/// A piece of machine state: bytes whose meaning `(kind, version)` fixes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Whose state.
    pub kind: SectionKind,
    /// Version of the encoding of `bytes`.
    pub version: u16,
    /// Encoded state, little-endian.
    pub bytes: Vec<u8>,
}
