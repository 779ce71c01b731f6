//! Interrupt lines into the kernel's chips.

use std::convert::Infallible;
use std::sync::Arc;
#[cfg(any(test, fuzzing))]
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::VmFd;
use vm_superio::Trigger;

/// One interrupt line. Its level is set synchronously: when the call returns, the chips have seen it.
#[derive(Clone)]
pub(crate) struct IrqLine {
    end: End,
    number: u32,
}

/// Where a line ends.
#[derive(Clone)]
enum End {
    Chips(Arc<VmFd>),
    /// In the hand of a test: devices without a machine.
    #[cfg(any(test, fuzzing))]
    Loose(Arc<AtomicBool>),
}

impl IrqLine {
    pub(crate) fn new(vm: Arc<VmFd>, number: u32) -> Self {
        Self { end: End::Chips(vm), number }
    }

    /// A line whose level is in `level`.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn loose(level: Arc<AtomicBool>) -> Self {
        Self { end: End::Loose(level), number: 0 }
    }

    /// Raises or lowers the line.
    pub(crate) fn set(&self, high: bool) {
        match &self.end {
            End::Chips(vm) => {
                // The kernel refuses only a machine without chips, which BUILD never makes.
                if let Err(error) = vm.set_irq_line(self.number, high) {
                    log::error!("KVM_IRQ_LINE for interrupt {} failed: {error}", self.number);
                }
            }
            #[cfg(any(test, fuzzing))]
            End::Loose(level) => level.store(high, Ordering::Relaxed),
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
