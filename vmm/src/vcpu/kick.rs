//! Getting a vCPU out of guest mode from another thread.
#![expect(unsafe_code, reason = "a second mapping of kvm_run, and a signal handler")]

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::memory::PAGE_SIZE;

/// `kvm_run.immediate_exit` of one vCPU, through a mapping of its own: the vCPU's thread may hold a reference to the other.
///
/// While it is set, KVM_RUN completes the pending exit and then returns EINTR without entering the guest. That closes the race
/// that a signal alone leaves, which may arrive just before KVM_RUN.
pub(crate) struct ImmediateExit {
    page: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value alone and is only used through an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the first page of the vCPU's shared area.
    pub(crate) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing that Rust knows of.
        let page = unsafe { rustix::mm::mmap(null_mut(), PAGE_SIZE, protection, MapFlags::SHARED, fd, 0)? };
        let page = NonNull::new(page.cast::<u8>()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { page })
    }

    /// Sets or clears the flag.
    pub(crate) fn set(&self, on: bool) {
        // SAFETY: the page is mapped until drop and the offset lies inside it; the other side is the kernel, which reads a byte.
        let flag = unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit))) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: mapped in `of`, unmapped once, and nobody keeps a pointer.
        if let Err(error) = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), PAGE_SIZE) } {
            log::error!("cannot unmap a vCPU's page: {error}");
        }
    }
}

/// The real-time signal that interrupts KVM_RUN. Its handler does nothing: the interruption is all.
pub(crate) fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Installs the handler of [`kick_signal`], once for the process.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| register_signal_handler(kick_signal(), nothing).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}
