//! What processor the guest sees, and what processor this host has.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use vmm_sys_util::errno;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const ECX_HYPERVISOR: u32 = 1 << 31;
const ECX_TSC_DEADLINE: u32 = 1 << 24;

/// The KVM paravirtual features that a captured machine carries along exactly: the clock (bits 0, 3, 24) and no delay on
/// port 0x80 (bit 1). The others keep state in guest memory that KVM writes behind everybody's back (steal time,
/// asynchronous page faults, EOI) or are hypercalls that some KVMs lack (interprocessor interrupts, TLB flush).
const KVM_FEATURES_KEPT: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 24;

/// The CPUID of vCPU `index` of `vcpus`, from what KVM supports.
pub(super) fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let apic_id = u32::from(index);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx = entry.ebx & 0x0000_ffff | apic_id << 24 | u32::from(vcpus) << 16;
                entry.ecx |= ECX_HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
            }
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => entry.edx = apic_id,
            LEAF_KVM_FEATURES => entry.eax &= KVM_FEATURES_KEPT,
            LEAF_AMD_TOPOLOGY => entry.eax = apic_id,
            _ => {}
        }
    }
    cpuid
}

/// What KVM can give to a guest.
pub(super) fn supported(kvm: &Kvm) -> Result<CpuId, errno::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// Leaf, subleaf and registers without what differs from one core of a host to the next.
pub(super) fn comparable(entry: &kvm_cpuid_entry2) -> (u32, u32, [u32; 4]) {
    let kvm_cpuid_entry2 { function, index, flags: _, eax, ebx, ecx, edx, padding: _ } = *entry;
    (function, index, without_core_ids(function, [eax, ebx, ecx, edx]))
}

/// The host processor's own leaves: guests of some KVMs see these whatever they were given.
pub(super) fn of_host() -> Vec<(u32, u32, [u32; 4])> {
    let mut leaves = Vec::new();
    for first in [0u32, 0x8000_0000] {
        let last = std::arch::x86_64::__cpuid(first).eax.min(first + 0x40);
        for leaf in first..=last {
            let subleaves = match leaf {
                0x7 => 2,
                0xd => 3,
                _ => 1,
            };
            for subleaf in 0..subleaves {
                let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
                let registers = without_core_ids(leaf, [r.eax, r.ebx, r.ecx, r.edx]);
                if registers != [0; 4] {
                    leaves.push((leaf, subleaf, registers));
                }
            }
        }
    }
    leaves
}

/// Masks the number of the core that CPUID ran on, and what depends on what the kernel enabled for one process.
fn without_core_ids(leaf: u32, [eax, mut ebx, mut ecx, mut edx]: [u32; 4]) -> [u32; 4] {
    let mut eax = eax;
    match leaf {
        LEAF_FEATURES => {
            ebx &= 0x00ff_ffff;
            // OSXSAVE mirrors CR4 of whoever asks.
            ecx &= !(1 << 27);
        }
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => edx = 0,
        LEAF_AMD_TOPOLOGY => {
            eax = 0;
            ebx &= !0xff;
            ecx &= !0xff;
        }
        // The size of the area for what is enabled now.
        0xd => ebx = 0,
        _ => {}
    }
    [eax, ebx, ecx, edx]
}
