//! What the VMM hands over at the start: the command line and the map of memory (Xen's `hvm_start_info`).
#![expect(unsafe_code, reason = "reads the structures that the VMM left in memory")]

use core::ptr::with_exposed_provenance;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
/// Only the lowest 4 GiB are mapped.
const MAPPED: u64 = 1 << 32;
/// Longest command line in bytes.
const MAX_LINE: usize = 4096;
/// Most entries of the memory map that are looked at.
const MAX_ENTRIES: u32 = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// What was handed over, copied out: the heap may then have the memory that it lay in.
pub(crate) struct Handover {
    line: [u8; MAX_LINE],
    length: usize,
    /// Start and size in bytes of the largest piece of RAM after the image.
    pub(crate) ram: (u64, u64),
}

impl Handover {
    /// The command line, up to the first byte that is not UTF-8.
    pub(crate) fn command_line(&self) -> &str {
        let line = self.line.get(..self.length).unwrap_or_default();
        match core::str::from_utf8(line) {
            Ok(text) => text,
            Err(error) => line.get(..error.valid_up_to()).and_then(|part| str::from_utf8(part).ok()).unwrap_or(""),
        }
    }
}

/// A value at a physical address, if all of it is mapped.
fn read<T: Copy>(address: u64) -> Option<T> {
    let end = address.checked_add(u64::try_from(size_of::<T>()).ok()?)?;
    if address == 0 || end > MAPPED {
        return None;
    }
    // SAFETY: mapped, as was just checked; the types read are plain integers, of which any bytes are a value.
    Some(unsafe { with_exposed_provenance::<T>(usize::try_from(address).ok()?).read_unaligned() })
}

/// Reads the start information at `address`.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn read_handover(address: u64, image_end: u64) -> Result<Handover, &'static str> {
    let info = read::<StartInfo>(address).filter(|info| info.magic == MAGIC).ok_or("no PVH start information")?;
    if info.version == 0 || info.memory_map_entries == 0 {
        return Err("the VMM gave no memory map");
    }
    let mut ram = (0, 0);
    for index in 0..info.memory_map_entries.min(MAX_ENTRIES) {
        let offset = u64::from(index) * u64::try_from(size_of::<MapEntry>()).unwrap_or(0);
        let at = info.memory_map.checked_add(offset);
        let entry = at.and_then(read::<MapEntry>).ok_or("the memory map lies outside of memory")?;
        let start = entry.address.max(image_end).next_multiple_of(4096);
        let end = entry.address.saturating_add(entry.size).min(MAPPED);
        if entry.kind == RAM && start < end && end - start > ram.1 {
            ram = (start, end - start);
        }
    }
    let mut handover = Handover { line: [0; MAX_LINE], length: 0, ram };
    if info.command_line != 0 {
        for (offset, byte) in (0..).zip(handover.line.iter_mut()) {
            let at = info.command_line.checked_add(offset);
            *byte = at.and_then(read::<u8>).ok_or("the command line lies outside of memory")?;
            if *byte == 0 {
                break;
            }
            handover.length += 1;
        }
    }
    Ok(handover)
}
