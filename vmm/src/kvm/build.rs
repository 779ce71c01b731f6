//! Making a machine out of its parts list.
#![expect(unsafe_code, reason = "memory slots")]

use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_bindings::{KVM_API_VERSION, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryError};
use vmm_sys_util::errno;

use super::{cpuid, facts, probe};
use crate::config::{Fact, MachineConfig, MachineIo, check_disks};
use crate::devices::host_io::{Gate, HostIo};
use crate::devices::irq::IrqLine;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::virtio::net::Net;
use crate::devices::{Devices, VIRTIO_IRQS};
use crate::memory::{GuestRam, PAGE_SHIFT, RamError};
use crate::state::vcpu::{MSR_TSC, supported_msrs};
use crate::vcpu::Vcpu;
use crate::vcpu::kick::install_kick_handler;

/// Greatest number of vCPUs.
const MAX_VCPUS: u8 = 2;
const SERIAL_IRQ: u32 = 4;
/// Three pages that Intel processors want, in the device hole.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page that Intel processors want, before the above.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// There is no /dev/kvm.
    #[error(
        "this host has no /dev/kvm: load the kvm_intel or kvm_amd module, or switch virtualisation on in the firmware"
    )]
    NoKvm(#[source] std::io::Error),
    /// /dev/kvm may not be opened.
    #[error("no permission to open /dev/kvm: add this user to the group that owns it")]
    KvmPermission(#[source] std::io::Error),
    /// The kernel's KVM is of another kind.
    #[error("/dev/kvm speaks API version {got}, this program {KVM_API_VERSION}")]
    KvmVersion {
        /// What the kernel says.
        got: i32,
    },
    /// The kernel's KVM lacks something.
    #[error("this host's KVM lacks {0}: a newer kernel is needed")]
    MissingCapability(&'static str),
    /// The parts list cannot be built.
    #[error("the machine's configuration is wrong: {0}")]
    Config(String),
    /// Guest RAM could not be had.
    #[error("no memory for the guest")]
    Memory(#[from] RamError),
    /// A call to the host failed.
    #[error("the host refused {call}")]
    Host {
        /// The call.
        call: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

fn host(call: &'static str) -> impl FnOnce(errno::Error) -> BuildError {
    move |e| BuildError::Host { call, source: e.into() }
}

/// The parts of a machine that never ran.
pub(super) struct Parts {
    pub(super) ram: Arc<GuestRam>,
    pub(super) vm: Arc<VmFd>,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) devices: Arc<Devices>,
    pub(super) host_io: HostIo,
    pub(super) gate: Arc<Gate>,
    pub(super) msrs: Vec<u32>,
    pub(super) facts: Vec<Fact>,
    pub(super) tsc_writable: Option<bool>,
}

/// Builds everything in the order in which KVM wants it: chips before vCPUs, CPUID before MSRs.
pub(super) fn build(config: &MachineConfig, io: MachineIo) -> Result<Parts, BuildError> {
    check(config, &io)?;
    install_kick_handler().map_err(|source| BuildError::Host { call: "sigaction", source })?;
    let kvm = open_kvm()?;
    let vm = Arc::new(kvm.create_vm().map_err(host("KVM_CREATE_VM"))?);
    vm.set_tss_address(TSS_ADDRESS).map_err(host("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip().map_err(host("KVM_CREATE_IRQCHIP"))?;
    // The speaker's port 0x61 gates the PIT's counter 2, with which kernels measure the TSC.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(host("KVM_CREATE_PIT2"))?;

    let ram = Arc::new(GuestRam::new(config.memory_bytes)?);
    set_memory_slots(&vm, &ram, false).map_err(host("KVM_SET_USER_MEMORY_REGION"))?;

    let supported = cpuid::supported(&kvm).map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_deadline = vm.check_extension(Cap::TscDeadlineTimer);
    let mut vcpus = (0..config.vcpus)
        .map(|index| Vcpu::new(&vm, index, &cpuid::for_vcpu(&supported, index, config.vcpus, tsc_deadline)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(host("KVM_CREATE_VCPU or KVM_SET_CPUID2"))?;
    let listed = kvm.get_msr_index_list().map_err(host("KVM_GET_MSR_INDEX_LIST"))?;
    let msrs = vcpus.first().map_or_else(Vec::new, |v| supported_msrs(&v.fd, listed.as_slice()));
    if !msrs.contains(&MSR_TSC) {
        return Err(BuildError::MissingCapability("MSR_IA32_TSC"));
    }
    vcpus.iter_mut().for_each(|v| v.set_msr_list(&msrs));

    let host_io = HostIo::new().map_err(|source| BuildError::Host { call: "epoll_create", source })?;
    let devices = Arc::new(make_devices(config, io, &vm, &ram, &host_io));
    let tsc_writable = probe::tsc_is_writable(&kvm);
    let facts = facts::facts(&facts::Sources {
        config,
        vm: &vm,
        cpuid: &cpuid::for_vcpu(&supported, 0, config.vcpus, tsc_deadline),
        msrs: &msrs,
        tsc_khz: vcpus.first().map_or(0, Vcpu::tsc_khz),
        tsc_writable,
    });
    Ok(Parts { ram, vm, vcpus, devices, host_io, gate: Arc::new(Gate::default()), msrs, facts, tsc_writable })
}

fn check(config: &MachineConfig, io: &MachineIo) -> Result<(), BuildError> {
    if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
        return Err(BuildError::Config(format!("{} vCPUs, this machine has 1 to {MAX_VCPUS}", config.vcpus)));
    }
    let (slots, most) = (config.nics.len() + config.disks.len(), VIRTIO_IRQS.len());
    if slots > most {
        return Err(BuildError::Config(format!("{slots} network devices and disks, at most {most} are possible")));
    }
    if io.ports.len() != config.nics.len() {
        let (ports, nics) = (io.ports.len(), config.nics.len());
        return Err(BuildError::Config(format!("{ports} frame ports for {nics} network devices")));
    }
    check_disks(config, io).map_err(BuildError::Config)?;
    match config.nics.iter().find(|nic| nic.mac[0] & 1 != 0 || nic.mac == [0; 6]) {
        Some(nic) => Err(BuildError::Config(format!("{:02x?} is not the address of one station", nic.mac))),
        None => Ok(()),
    }
}

fn open_kvm() -> Result<Kvm, BuildError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => BuildError::NoKvm(e.into()),
        libc::EACCES | libc::EPERM => BuildError::KvmPermission(e.into()),
        _ => BuildError::Host { call: "open /dev/kvm", source: e.into() },
    })?;
    let got = kvm.get_api_version();
    if u32::try_from(got) != Ok(KVM_API_VERSION) {
        return Err(BuildError::KvmVersion { got });
    }
    const NEEDED: [(Cap, &str); 15] = [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Pit2, "KVM_CAP_PIT2"),
        (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
        (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
        (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
        (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
        (Cap::MpState, "KVM_CAP_MP_STATE"),
        (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
        (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
        (Cap::Xsave, "KVM_CAP_XSAVE"),
        (Cap::Xcrs, "KVM_CAP_XCRS"),
        (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
    ];
    match NEEDED.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(BuildError::MissingCapability(name)),
        None => Ok(kvm),
    }
}

/// Gives each region of RAM to the guest, as the slot of its number; with or without a log of writes.
pub(super) fn set_memory_slots(vm: &VmFd, ram: &GuestRam, log_writes: bool) -> Result<(), errno::Error> {
    for (slot, region) in (0u32..).zip(ram.regions()) {
        let start = region.first.address();
        let address =
            ram.tracked().get_host_address(start).map_err(|_: GuestMemoryError| errno::Error::new(libc::EFAULT))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: if log_writes { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: start.0,
            memory_size: region.pages << PAGE_SHIFT,
            userspace_addr: u64::try_from(address.addr()).map_err(|_| errno::Error::new(libc::EFAULT))?,
        };
        // SAFETY: the mapping of `ram` is as long as the region says, and the machine keeps `ram` for as long as `vm`.
        unsafe { vm.set_user_memory_region(region)? };
    }
    Ok(())
}

fn make_devices(
    config: &MachineConfig,
    io: MachineIo,
    vm: &Arc<VmFd>,
    ram: &Arc<GuestRam>,
    host_io: &HostIo,
) -> Devices {
    let MachineIo { outputs, ports, disks, console_input } = io;
    let line = |number| IrqLine::new(Arc::clone(vm), number);
    let serial = SerialPort::new(line(SERIAL_IRQ), Arc::clone(&outputs), host_io.bell(), console_input);
    let nics = config.nics.iter().zip(ports).zip(0u8..).map(|((nic, port), number)| {
        Box::new(Net::new(number, nic.mac, Arc::clone(&outputs), port, host_io.bell())) as Box<dyn VirtioDevice>
    });
    let disks = config.disks.iter().zip(disks).map(|(parts, disk)| Box::new(Block::new(parts, disk)) as _);
    let virtio = nics.chain(disks).zip(VIRTIO_IRQS).map(|(device, irq)| Mutex::new(VirtioMmio::new(line(irq), device)));
    Devices { ram: Arc::clone(ram), serial: Mutex::new(serial), virtio: virtio.collect() }
}
