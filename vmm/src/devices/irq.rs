//! Interrupt lines into the kernel's chips.

use std::convert::Infallible;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_superio::Trigger;

/// One interrupt line. Its level is set synchronously: when the call returns, the chips have seen it.
#[derive(Clone)]
pub(crate) struct IrqLine {
    vm: Arc<VmFd>,
    number: u32,
}

impl IrqLine {
    pub(crate) fn new(vm: Arc<VmFd>, number: u32) -> Self {
        Self { vm, number }
    }

    /// Raises or lowers the line.
    pub(crate) fn set(&self, high: bool) {
        // The kernel refuses only a machine without chips, which BUILD never makes.
        if let Err(error) = self.vm.set_irq_line(self.number, high) {
            log::error!("KVM_IRQ_LINE for interrupt {} failed: {error}", self.number);
        }
    }
}

/// An ISA interrupt is an edge: the kernel's chips latch the rising one.
impl Trigger for IrqLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.set(true);
        self.set(false);
        Ok(())
    }
}
