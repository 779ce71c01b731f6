//! Loading a PVH ELF (a Linux `vmlinux` is one), its initrd and command line, and the state that it starts in.
//!
//! | address | what |
//! |---|---|
//! | 0x6000 | start info |
//! | 0x6040 | module list (the initrd) |
//! | 0x7000 | memory map |
//! | 0x20000 | command line |
//! | from the ELF | kernel, usually at 1 MiB or above |
//! | top of low RAM | initrd |

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{Elf, Error as LoaderError, KernelLoader, load_cmdline};
use vm_memory::{Bytes, GuestAddress};

use crate::config::MachineConfig;
use crate::devices::{MMIO_BASE, MMIO_SIZE, VIRTIO_IRQS};
use crate::machine::BootError;
use crate::memory::{GuestRam, PAGE_SHIFT, PAGE_SIZE};

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
/// What Linux reads of a command line, with the zero at its end.
const CMDLINE_MAX: usize = 2048;
/// RAM below the BIOS area, and above it.
const LOW_END: u64 = 0x9_fc00;
const HIGH_START: u64 = 0x10_0000;
const START_MAGIC: u32 = 0x336e_c578;
const MEMMAP_RAM: u32 = 1;

/// Puts everything into RAM and vCPU 0 into its start state.
pub(crate) fn load(config: &MachineConfig, ram: &GuestRam, vcpu: &VcpuFd) -> Result<(), BootError> {
    let (entry, kernel_end) = load_kernel(&config.kernel, ram)?;
    let initrd = match &config.initrd {
        Some(path) => Some(load_initrd(path, ram, kernel_end)?),
        None => None,
    };
    write_cmdline(config, ram)?;
    write_start_info(ram, initrd)?;
    set_start_state(vcpu, entry)
}

fn load_kernel(path: &Path, ram: &GuestRam) -> Result<(u64, u64), BootError> {
    let image = |reason: String| BootError::Image { path: path.to_owned(), reason };
    let read = |source| BootError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read)?;
    if !file.metadata().map_err(read)?.is_file() {
        return Err(image("not a regular file".into()));
    }
    if is_bzimage(&mut file).map_err(read)? {
        return Err(image("a compressed kernel (bzImage); give the vmlinux that it was made from".into()));
    }
    let loaded = Elf::load(ram.tracked(), None, &mut file, None).map_err(|e| match e {
        LoaderError::Elf(linux_loader::loader::elf::Error::ReadKernelImage) => {
            image("a segment is cut short, or does not fit into guest memory at the address that it asks for".into())
        }
        other => image(format!("{other}; a 64-bit ELF file with a PVH note is needed")),
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(image("it has no PVH note (for Linux: build with CONFIG_PVH=y and take vmlinux)".into()));
    };
    Ok((entry.0, loaded.kernel_end))
}

fn is_bzimage(file: &mut File) -> std::io::Result<bool> {
    const MAGIC_AT: u64 = 0x202;
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(MAGIC_AT))?;
    let read = file.take(4).read(&mut magic)?;
    Ok(read == magic.len() && magic == *b"HdrS")
}

/// The end of RAM below the device hole.
fn low_ram_end(ram: &GuestRam) -> u64 {
    ram.regions().first().map_or(0, |r| (r.first.0 + r.pages) << PAGE_SHIFT)
}

/// Puts the initrd to the end of low RAM, where it is in nobody's way; address and length.
fn load_initrd(path: &Path, ram: &GuestRam, kernel_end: u64) -> Result<(u64, u64), BootError> {
    let read = |source| BootError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    let free = low_ram_end(ram).saturating_sub(kernel_end.max(HIGH_START));
    let page = u64::try_from(PAGE_SIZE).unwrap_or(u64::MAX);
    if length.saturating_add(page) > free {
        let reason = format!("{length} bytes, and {free} are free behind the kernel");
        return Err(BootError::TooLarge { what: "the initrd", reason });
    }
    let at = (low_ram_end(ram) - length) & !(page - 1);
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    while done < length {
        let n = file.read(&mut buffer).map_err(read)?;
        let chunk = buffer.get(..n).unwrap_or_default();
        if chunk.is_empty() {
            return Err(read(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let room = usize::try_from(length - done).unwrap_or(usize::MAX);
        let chunk = chunk.get(..n.min(room)).unwrap_or_default();
        ram.tracked()
            .write_slice(chunk, GuestAddress(at + done))
            .map_err(|e| BootError::TooLarge { what: "the initrd", reason: e.to_string() })?;
        done += u64::try_from(chunk.len()).unwrap_or(u64::MAX);
    }
    Ok((at, length))
}

fn write_cmdline(config: &MachineConfig, ram: &GuestRam) -> Result<(), BootError> {
    let wrong = |e: &dyn std::fmt::Display| BootError::TooLarge {
        what: "the kernel command line",
        reason: format!("{e} (at most {CMDLINE_MAX} bytes of printable ASCII, with the words for the devices)"),
    };
    let mut words = Cmdline::new(CMDLINE_MAX).map_err(|e| wrong(&e))?;
    if !config.cmdline.is_empty() {
        words.insert_str(&config.cmdline).map_err(|e| wrong(&e))?;
    }
    let devices = config.nics.len() + config.disks.len();
    for (irq, slot) in VIRTIO_IRQS.into_iter().take(devices).zip(0u64..) {
        let address = MMIO_BASE + slot * MMIO_SIZE;
        words.insert_str(format!("virtio_mmio.device=4K@{address:#x}:{irq}")).map_err(|e| wrong(&e))?;
    }
    load_cmdline(ram.tracked(), GuestAddress(CMDLINE), &words).map_err(|e| wrong(&e))
}

fn write_start_info(ram: &GuestRam, initrd: Option<(u64, u64)>) -> Result<(), BootError> {
    let area = |addr, end: u64| hvm_memmap_table_entry { addr, size: end - addr, type_: MEMMAP_RAM, reserved: 0 };
    let mut map = vec![area(0, LOW_END), area(HIGH_START, low_ram_end(ram))];
    map.extend(ram.regions().iter().skip(1).map(|r| {
        let start = r.first.address().0;
        area(start, start + (r.pages << PAGE_SHIFT))
    }));
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        params.set_modules(&[module], GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram.tracked())
        .map_err(|e| BootError::TooLarge { what: "the start information", reason: e.to_string() })
}

/// The state that the PVH boot protocol asks for: 32-bit protected mode, flat segments, paging off, EBX at the start info.
fn set_start_state(vcpu: &VcpuFd, entry: u64) -> Result<(), BootError> {
    const CR0_PROTECTED: u64 = 1;
    const CR0_EXTENSION_TYPE: u64 = 1 << 4;
    const RFLAGS_RESERVED: u64 = 2;
    const CODE: u8 = 0xb;
    const DATA: u8 = 0x3;
    const BUSY_TSS: u8 = 0xb;

    let host = |call| move |e: vmm_sys_util::errno::Error| BootError::Host { call, source: e.into() };
    let flat = |type_, selector| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().map_err(host("KVM_GET_SREGS"))?;
    sregs.cs = flat(CODE, 0x8);
    let data = flat(DATA, 0x10);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: BUSY_TSS, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    sregs.cr4 = 0;
    vcpu.set_sregs(&sregs).map_err(host("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: entry, rbx: START_INFO, rflags: RFLAGS_RESERVED, ..Default::default() };
    vcpu.set_regs(&regs).map_err(host("KVM_SET_REGS"))
}
