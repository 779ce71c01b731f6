//! PIC, IOAPIC and PIT: the parts of the chipset that live in the kernel.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;

use super::codec::{Decoder, Encoder, Malformed, Saved};
use super::{host_capture, host_restore};
use crate::machine::{CaptureError, RestoreError};

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Both PICs, the IOAPIC and the PIT as the kernel's ABI lays them out.
///
/// The phase of a running PIT count is not part of the kernel's state: after a restore the current period starts anew.
pub(crate) struct IrqchipStateV1 {
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl Saved for IrqchipStateV1 {
    const VERSION: u16 = 1;

    fn encode(&self, out: &mut Encoder) {
        let Self { chips, pit } = self;
        for chip in chips {
            out.abi(chip);
        }
        out.abi(pit);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let chips: [kvm_irqchip; 3] = [input.abi()?, input.abi()?, input.abi()?];
        let pit: kvm_pit_state2 = input.abi()?;
        for (chip, id) in chips.iter().zip(CHIPS) {
            if chip.chip_id != id || chip.pad != 0 {
                return Err(Malformed(format!("interrupt chip {} where {id} belongs", chip.chip_id)));
            }
        }
        Ok(Self { chips, pit })
    }
}

impl IrqchipStateV1 {
    /// Reads the chips. All vCPUs and devices must be stopped: an interrupt on its way changes them.
    pub(crate) fn capture(vm: &VmFd) -> Result<Self, CaptureError> {
        let mut chips = [kvm_irqchip::default(); 3];
        for (chip, id) in chips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip).map_err(host_capture("irqchip, KVM_GET_IRQCHIP"))?;
        }
        let pit = vm.get_pit2().map_err(host_capture("irqchip, KVM_GET_PIT2"))?;
        Ok(Self { chips, pit })
    }

    /// Writes the chips, then the PIT: a PIT that is set starts to tick, and its tick needs a PIC to go to.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), RestoreError> {
        let Self { chips, pit } = self;
        for chip in chips {
            vm.set_irqchip(chip).map_err(host_restore("irqchip, KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(pit).map_err(host_restore("irqchip, KVM_SET_PIT2"))
    }

    /// The bytes without what time alone changes in a stopped machine, for equality checks.
    #[cfg(test)]
    pub(crate) fn timeless(mut self) -> Vec<u8> {
        use zerocopy::IntoBytes;

        for channel in &mut self.pit.channels {
            channel.count_load_time = 0;
        }
        let mut out: Vec<u8> = self.chips.iter().flat_map(|c| c.as_bytes().to_vec()).collect();
        out.extend_from_slice(self.pit.as_bytes());
        out
    }
}
