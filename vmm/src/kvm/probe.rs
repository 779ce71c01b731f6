//! Asks a scratch machine what documentation cannot say about this host's KVM.
#![expect(unsafe_code, reason = "a memory slot")]

use std::sync::OnceLock;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::errno;

use crate::memory::{GuestRam, RAM_GRANULE};
use crate::state::vcpu::MSR_TSC;

/// Whether a guest sees the TSC that was written into its `MSR_IA32_TSC`. Asked once for the process; `None` when the scratch
/// machine did not work.
///
/// Reading the MSR back is no answer: a KVM that runs guests natively keeps the written value in its books and shows the guest the
/// host's counter.
pub(super) fn tsc_is_writable(kvm: &Kvm) -> Option<bool> {
    static ANSWER: OnceLock<Option<bool>> = OnceLock::new();
    *ANSWER.get_or_init(|| match guest_reads_tsc(kvm) {
        Ok(answer) => answer,
        Err(error) => {
            log::warn!("cannot tell whether this KVM honours a written TSC: {error}");
            None
        }
    })
}

fn guest_reads_tsc(kvm: &Kvm) -> Result<Option<bool>, errno::Error> {
    /// `rdtsc; hlt`
    const CODE: [u8; 3] = [0x0f, 0x31, 0xf4];
    const AT: u64 = 0x1000;
    /// Twelve days at 1 GHz: no host's own counter is near by accident and in the way of no arithmetic.
    const AHEAD: u64 = 1 << 50;
    const RFLAGS_RESERVED: u64 = 2;

    let Ok(ram) = GuestRam::new(RAM_GRANULE) else { return Ok(None) };
    let memory = ram.tracked();
    let (Ok(host), Ok(())) = (memory.get_host_address(GuestAddress(0)), memory.write_slice(&CODE, GuestAddress(AT)))
    else {
        return Ok(None);
    };
    let vm = kvm.create_vm()?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: RAM_GRANULE,
        userspace_addr: u64::try_from(host.addr()).unwrap_or(0),
    };
    // SAFETY: `ram` outlives `vm`, and its one region is RAM_GRANULE bytes long.
    unsafe { vm.set_user_memory_region(slot)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: AT, rflags: RFLAGS_RESERVED, ..Default::default() })?;

    let mut msr = [kvm_msr_entry { index: MSR_TSC, ..Default::default() }];
    let Ok(mut list) = Msrs::from_entries(&msr) else { return Ok(None) };
    vcpu.get_msrs(&mut list)?;
    let before = list.as_slice().first().map_or(0, |e| e.data);
    let [entry] = &mut msr;
    entry.data = before.wrapping_add(AHEAD);
    let Ok(list) = Msrs::from_entries(&msr) else { return Ok(None) };
    if vcpu.set_msrs(&list)? != 1 {
        return Ok(Some(false));
    }
    match vcpu.run()? {
        VcpuExit::Hlt => {}
        other => {
            log::warn!("the scratch machine answered {other:?}");
            return Ok(None);
        }
    }
    let regs = vcpu.get_regs()?;
    let seen = regs.rdx << 32 | regs.rax & u64::from(u32::MAX);
    Ok(Some(seen.wrapping_sub(before) >= AHEAD / 2))
}

/// The host's TSC, which is also the guest's where it is not writable.
pub(super) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and nothing forbids it in user mode on Linux unless a process asks for that.
    unsafe { std::arch::x86_64::_rdtsc() }
}
