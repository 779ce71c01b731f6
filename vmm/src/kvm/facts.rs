//! What the other host must share.

use kvm_bindings::CpuId;
use kvm_ioctls::{Cap, VmFd};

use super::cpuid;
use crate::config::{DiskConfig, Fact, MachineConfig};
use crate::devices::{MMIO_BASE, MMIO_SIZE, VIRTIO_IRQS};

/// Everything that facts are made of.
pub(super) struct Sources<'a> {
    pub(super) config: &'a MachineConfig,
    pub(super) vm: &'a VmFd,
    pub(super) cpuid: &'a CpuId,
    pub(super) msrs: &'a [u32],
    pub(super) tsc_khz: u32,
    pub(super) tsc_writable: Option<bool>,
}

/// The facts of a machine. Names that begin with `approx.` are compared with a tolerance, those with `info.` not at all.
pub(super) fn facts(sources: &Sources<'_>) -> Vec<Fact> {
    let Sources { config, vm, cpuid, msrs, tsc_khz, tsc_writable } = sources;
    let mut facts = vec![
        fact("machine", "kvm/1"),
        fact("ram.bytes", config.memory_bytes),
        fact("vcpus", config.vcpus),
        fact("device.serial", "0x3f8 irq 4"),
        fact("device.i8042", "0x60"),
        fact("device.power", "0x604"),
    ];
    let nics = config.nics.iter().map(|nic| {
        let [a, b, c, d, e, f] = nic.mac;
        format!("net {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    });
    let devices = nics.chain(config.disks.iter().map(DiskConfig::fact));
    for ((device, irq), slot) in devices.zip(VIRTIO_IRQS).zip(0u64..) {
        let address = MMIO_BASE + slot * MMIO_SIZE;
        facts.push(fact(&format!("device.virtio.{slot}"), format!("{device} at {address:#x} irq {irq}")));
    }
    for entry in cpuid.as_slice() {
        facts.push(leaf("cpuid", cpuid::comparable(entry)));
    }
    facts.extend(cpuid::of_host().into_iter().map(|l| leaf("host.cpuid", l)));
    let list: Vec<u8> = msrs.iter().flat_map(|m| m.to_le_bytes()).collect();
    facts.push(fact("msr.list", format!("{} of them, {:016x}", msrs.len(), fnv(&list))));
    facts.push(fact("approx.tsc_khz", tsc_khz));
    let writable = match tsc_writable {
        Some(true) => "yes",
        Some(false) => "no",
        None => "unknown",
    };
    facts.push(fact("tsc.writable", writable));
    for (name, cap) in [("xsave2", Cap::Xsave2), ("tsc_control", Cap::TscControl), ("adjust_clock", Cap::AdjustClock)] {
        facts.push(fact(&format!("kvm.cap.{name}"), vm.check_extension_int(cap)));
    }
    // Only for people: an unreadable answer is as good as any.
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    facts.push(fact("info.host_kernel", release.trim()));
    facts
}

fn fact(name: &str, value: impl ToString) -> Fact {
    Fact { name: name.into(), value: value.to_string() }
}

fn leaf(prefix: &str, (function, index, [eax, ebx, ecx, edx]): (u32, u32, [u32; 4])) -> Fact {
    fact(&format!("{prefix}.{function:08x}.{index:x}"), format!("{eax:08x} {ebx:08x} {ecx:08x} {edx:08x}"))
}

/// FNV-1a, 64 bits: tells lists apart, protects nothing.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}
