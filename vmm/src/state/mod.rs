//! Reading and writing machine state: which parts, in which order, and why.
//!
//! # Order of a capture
//!
//! 1. The host side of devices is parked (disks' workers between two pieces of a request), then every vCPU leaves guest mode
//!    and completes its last exit. Only then is anything read: completing an exit runs device code, which writes guest memory
//!    and raises interrupts.
//! 2. Each vCPU, by its own thread: `MP_STATE` first (reading it may deliver an INIT or SIPI that waits in the LAPIC, which
//!    changes registers and LAPIC), then registers and events in one KVM_RUN, then LAPIC and MSRs, none of which changes what was
//!    read before. (Firecracker's `arch/x86_64/vcpu.rs` has the same constraints.)
//! 3. PIC, IOAPIC, PIT and the clock, by the thread that paused.
//! 4. Serial port and virtio devices, which nobody runs now.
//! 5. The dirty log, after all of that (by [`crate::PausedVm`]): any of the calls above may write guest memory.
//!
//! # Order of a restore
//!
//! 1. RAM, by the caller: device state is checked against it.
//! 2. Each vCPU: `MP_STATE`, registers, `SREGS` (which carries the APIC base) before LAPIC, LAPIC before MSRs (a
//!    `TSC_DEADLINE` needs the timer mode of the LAPIC), all MSRs before the deferred ones (`TSC_DEADLINE` is compared with
//!    the TSC), `VCPU_EVENTS` last, because setting registers clears pending exceptions.
//! 3. PIC and IOAPIC after the LAPICs that they deliver to, PIT after the PIC, the clock last, so that little time passes
//!    between the clock's start and the guest's.
//! 4. Serial port and virtio devices: the serial port raises its interrupt when its state says so, which needs the chips.
//! 5. At the first run: each virtio device with a pending interrupt lowers and raises its line, and every queue counts as
//!    kicked. Neither the kernel's idea of a line's level nor a kick that was on its way is part of the state. A disk's requests that had
//!    been taken from the ring and not given back are submitted again, in their order, before what is new there.
//!
//! # What differs between two captures of one stopped machine
//!
//! MSRs 0x10 (TSC) and the KVM time MSRs' source, the current count of the LAPIC timer (offset 0x390), `count_load_time` of the PIT,
//! the clock section. Equality checks leave out exactly these.

pub(crate) mod clock;
pub(crate) mod codec;
pub(crate) mod irqchip;
pub(crate) mod vcpu;

use vmm_sys_util::errno;

use crate::machine::{CaptureError, RestoreError};

/// Makes a [`CaptureError`] of a failed call.
pub(crate) fn host_capture(what: &str) -> impl FnOnce(errno::Error) -> CaptureError + '_ {
    move |e| CaptureError::Host { what: what.to_owned(), source: e.into() }
}

/// Makes a [`RestoreError`] of a failed call.
pub(crate) fn host_restore(what: &str) -> impl FnOnce(errno::Error) -> RestoreError + '_ {
    move |e| RestoreError::Host { what: what.to_owned(), source: e.into() }
}
