//! The VM-wide clock, and what guest time does over a takeover.
//!
//! A guest tells time from kvmclock, the TSC, the LAPIC timer and the PIT. Under
//! [`ClockPolicy::ResumeFromCheckpoint`](crate::ClockPolicy::ResumeFromCheckpoint):
//!
//! | source | after a restore |
//! |---|---|
//! | kvmclock | goes on from its value at the checkpoint: `KVM_SET_CLOCK` without `KVM_CLOCK_REALTIME` |
//! | TSC, where KVM honours a written TSC | goes on from its value at the checkpoint (`MSR_IA32_TSC`) |
//! | TSC, where it does not (fact `tsc.writable` is `no`) | is the host's own: jumps by the outage. A host whose TSC is behind the captured one is refused, because guest time must not run backwards |
//! | LAPIC timer | goes on with the count that was left |
//! | PIT | its current period starts anew |
//!
//! The guest's wall clock is thus late by the outage wherever the offset is honoured; NTP in the guest corrects it.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};
use kvm_ioctls::VmFd;

use super::codec::{Decoder, Encoder, Malformed, Saved};
use super::{host_capture, host_restore};
use crate::machine::{CaptureError, RestoreError};

/// kvmclock in nanoseconds, and for diagnosis when that was in the host's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClockStateV1 {
    /// kvmclock, ns since the machine was made.
    clock: u64,
    /// Which of the other fields the kernel filled in.
    flags: u32,
    /// The host's wall clock at the same instant, ns since 1970.
    realtime: u64,
    /// The host's TSC at the same instant.
    host_tsc: u64,
}

impl Saved for ClockStateV1 {
    const VERSION: u16 = 1;

    fn encode(&self, out: &mut Encoder) {
        let Self { clock, flags, realtime, host_tsc } = *self;
        out.u64(clock);
        out.u32(flags);
        out.u64(realtime);
        out.u64(host_tsc);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let state = Self { clock: input.u64()?, flags: input.u32()?, realtime: input.u64()?, host_tsc: input.u64()? };
        if state.flags & !(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC) != 0 {
            return Err(Malformed(format!("unknown clock flags {:#x}", state.flags)));
        }
        // The kernel computes with signed nanoseconds.
        if i64::try_from(state.clock).is_err() {
            return Err(Malformed(format!("clock of {} ns is out of range", state.clock)));
        }
        Ok(state)
    }
}

impl ClockStateV1 {
    /// Reads the clock.
    pub(crate) fn capture(vm: &VmFd) -> Result<Self, CaptureError> {
        let kvm_clock_data { clock, flags, pad0: _, realtime, host_tsc, pad: _ } =
            vm.get_clock().map_err(host_capture("clock, KVM_GET_CLOCK"))?;
        Ok(Self { clock, flags, realtime, host_tsc })
    }

    /// Lets the clock go on from the captured value.
    pub(crate) fn resume_from_checkpoint(&self, vm: &VmFd) -> Result<(), RestoreError> {
        let Self { clock, flags: _, realtime: _, host_tsc: _ } = *self;
        let data = kvm_clock_data { clock, ..Default::default() };
        vm.set_clock(&data).map_err(host_restore("clock, KVM_SET_CLOCK"))
    }

    /// kvmclock, ns.
    #[cfg(test)]
    pub(crate) fn nanoseconds(&self) -> u64 {
        self.clock
    }
}
