//! What the drivers of all virtio-mmio devices share.
#![expect(unsafe_code, reason = "memory shared with a device")]

use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr::{NonNull, with_exposed_provenance_mut};

use kv::cmdline::MmioDevice;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

const FEATURE_ANY_LAYOUT: u64 = 1 << 27;
const FEATURE_VERSION_1: u64 = 1 << 32;

/// Memory for virtio-drivers: physical addresses are virtual addresses.
pub(crate) struct Identity;

// SAFETY: the memory is that of the global allocator, zeroed, aligned to pages and exclusive; all of it is mapped onto
// itself, so that sharing needs nothing.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let Ok(layout) = Layout::from_size_align(pages * 4096, 4096) else { return (0, NonNull::dangling()) };
        // SAFETY: no caller asks for zero pages.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(memory) => (memory.as_ptr().expose_provenance() as PhysAddr, memory),
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        let Ok(layout) = Layout::from_size_align(pages * 4096, 4096) else { return -1 };
        // SAFETY: the caller got it from `dma_alloc`, which used this layout.
        unsafe { dealloc(memory.as_ptr(), layout) };
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        let address = usize::try_from(address).unwrap_or(0);
        NonNull::new(with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr().expose_provenance() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// The registers of a device; `None` if there is none at this address.
///
/// # Safety
/// There are virtio-mmio registers at this address, which nobody else uses.
pub(crate) unsafe fn transport(device: MmioDevice) -> Option<MmioTransport<'static>> {
    let (address, size) = (usize::try_from(device.address).ok()?, usize::try_from(device.size).ok()?);
    let registers = NonNull::new(with_exposed_provenance_mut(address))?;
    // SAFETY: the caller's promise.
    unsafe { MmioTransport::new(registers, size) }.ok()
}

/// Resets a device and agrees with it on features, as far as it offers those that are `wanted`. What it offers is returned; its queues
/// are to be set up next.
///
/// # Errors
/// It cannot be used.
pub(crate) fn negotiate(transport: &mut MmioTransport<'static>, wanted: u64) -> Result<u64, &'static str> {
    transport.set_status(DeviceStatus::empty());
    transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
    let legacy = transport.requires_legacy_layout();
    let offered = transport.read_device_features();
    if !legacy && offered & FEATURE_VERSION_1 == 0 {
        return Err("a modern device without VIRTIO_F_VERSION_1");
    }
    let wanted = wanted | if legacy { FEATURE_ANY_LAYOUT } else { FEATURE_VERSION_1 };
    transport.write_driver_features(offered & wanted);
    transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK);
    if !legacy && !transport.get_status().contains(DeviceStatus::FEATURES_OK) {
        return Err("the device refused the features");
    }
    transport.set_guest_page_size(4096);
    Ok(offered)
}
