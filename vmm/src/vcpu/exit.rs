//! What a vCPU does when it leaves the guest.
#![expect(unsafe_code, reason = "kvm_run is a union that the exit reason selects")]

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_vcpu_events};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::Devices;
use crate::machine::MachineEvent;

/// What comes after an exit.
pub(super) enum After {
    /// Enter the guest again.
    GoOn,
    /// The machine has ended.
    End(MachineEvent),
    /// KVM gave up on an instruction: [`help_out`] may know it.
    Stuck,
}

/// Carries out one exit.
pub(super) fn handle(vcpu: u8, exit: VcpuExit<'_>, devices: &Devices) -> After {
    let crashed = |reason: String| After::End(MachineEvent::Crashed { vcpu, reason });
    match exit {
        VcpuExit::IoIn(port, data) => devices.port_in(port, data),
        VcpuExit::IoOut(port, data) => {
            if let Some(event) = devices.port_out(port, data) {
                return After::End(event);
            }
        }
        VcpuExit::MmioRead(address, data) => devices.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => devices.mmio_write(address, data),
        // With the interrupt controller in the kernel, a halt waits there; should one come out, it was woken.
        VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_) => {}
        VcpuExit::Shutdown => return crashed("triple fault".into()),
        VcpuExit::InternalError => return After::Stuck,
        VcpuExit::FailEntry(reason, cpu) => {
            return crashed(format!("the processor refused to enter the guest: {reason:#x} on CPU {cpu}"));
        }
        other => return crashed(format!("exit that this machine does not know: {other:?}")),
    }
    After::GoOn
}

/// A last resort after an internal error: an `int3` at CPL 0, which KVM without hardware virtualisation cannot emulate, is
/// delivered as the exception that it is. `Err` with KVM's words for anything else.
pub(super) fn help_out(fd: &mut VcpuFd, devices: &Devices) -> Result<(), String> {
    const INT3: u8 = 0xcc;
    const BREAKPOINT: u8 = 3;
    // SAFETY: KVM filled this member of the union before it returned KVM_EXIT_INTERNAL_ERROR.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX).min(internal.data.len());
    let words = format!("internal error {}, data {:x?}", internal.suberror, &internal.data[..count]);
    let call = |name: &str, e: vmm_sys_util::errno::Error| format!("{words}; {name}: {e}");

    let mut regs = fd.get_regs().map_err(|e| call("KVM_GET_REGS", e))?;
    let at = fd.translate_gva(regs.rip).map_err(|e| call("KVM_TRANSLATE", e))?;
    let words_at = format!("{words} at {:#x}", regs.rip);
    if internal.suberror != KVM_INTERNAL_ERROR_EMULATION || at.valid == 0 {
        return Err(words_at);
    }
    match devices.ram.tracked().read_obj::<u8>(GuestAddress(at.physical_address)) {
        Ok(INT3) => {}
        _ => return Err(words_at),
    }
    regs.rip = regs.rip.wrapping_add(1);
    fd.set_regs(&regs).map_err(|e| call("KVM_SET_REGS", e))?;
    let mut events: kvm_vcpu_events = fd.get_vcpu_events().map_err(|e| call("KVM_GET_VCPU_EVENTS", e))?;
    events.exception.injected = 1;
    events.exception.nr = BREAKPOINT;
    events.exception.has_error_code = 0;
    fd.set_vcpu_events(&events).map_err(|e| call("KVM_SET_VCPU_EVENTS", e))
}
