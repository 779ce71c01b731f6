//! The heap: all RAM below 4 GiB that the memory map gives in one piece.
#![expect(unsafe_code, reason = "an allocator")]

use core::alloc::{GlobalAlloc, Layout};

use talc::DefaultBinning;
use talc::cell::TalcCell;
use talc::source::Manual;

struct Heap(TalcCell<Manual, DefaultBinning>);

// SAFETY: there is one processor, and interrupt handlers do not allocate.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(TalcCell::new(Manual));

// SAFETY: each call is handed on as it is.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.0.realloc(pointer, layout, size) }
    }
}

/// Gives the heap its memory. False if that is too little.
///
/// # Safety
/// Nothing else uses this memory, and it is mapped.
pub(crate) unsafe fn claim(start: u64, size: u64) -> bool {
    let (Ok(start), Ok(size)) = (usize::try_from(start), usize::try_from(size)) else { return false };
    // SAFETY: the caller's promise.
    unsafe { HEAP.0.claim(core::ptr::with_exposed_provenance_mut(start), size) }.is_some()
}

/// Memory outside of the heap, as it is. Nothing touches it, so that pages which are never used stay clean.
///
/// # Safety
/// Nothing else uses this memory, now or later, and it is mapped.
pub(crate) unsafe fn reserve(start: u64, size: usize) -> Option<&'static mut [u8]> {
    let start = usize::try_from(start).ok().filter(|start| *start != 0)?;
    // SAFETY: the caller's promise; bytes of RAM are initialised, to whatever it may be.
    Some(unsafe { core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(start), size) })
}

/// Bytes that are allocated.
pub(crate) fn used() -> usize {
    HEAP.0.counters().allocated_bytes
}
