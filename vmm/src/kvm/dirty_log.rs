//! KVM's log of dirty pages: reading it, and choosing what is cleared in it.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` reading clears nothing and protects nothing, so that hot pages can be left out; without it, reading does both.
#![expect(unsafe_code, reason = "two ioctls of which the library offers half, and which take pointers to bitmaps")]

use std::io;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

use crate::hot::{HotPages, PageBits, Tracking};
use crate::machine::DirtyError;
use crate::memory::GuestRam;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Pages of one word of a bitmap; KVM clears in multiples of it.
const WORD_PAGES: usize = 64;

/// The log of one machine.
#[derive(Debug, Default)]
pub(super) struct DirtyLog {
    /// Reading clears nothing: what is cleared is told.
    manual: bool,
    tracking: Tracking,
    hot: HotPages,
}

impl DirtyLog {
    /// A log that is off. Asks the host whether bits can be cleared one by one.
    pub(super) fn new(vm: &VmFd) -> Self {
        let offered = vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
        let cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args: [1, 0, 0, 0], ..Default::default() };
        let manual = offered > 0 && vm.enable_cap(&cap).is_ok();
        Self { manual, ..Self::default() }
    }

    pub(super) fn is_on(&self) -> bool {
        self.tracking != Tracking::Off
    }

    /// What the slots' flags now say. A log that was on begins anew.
    pub(super) fn switch(&mut self, tracking: Tracking, vm: &VmFd, ram: &GuestRam) -> Result<(), DirtyError> {
        if self.is_on() && tracking != Tracking::Off {
            let log = read(vm, ram)?;
            self.clear(vm, &log)?;
        }
        self.hot.forget();
        self.tracking = tracking;
        Ok(())
    }

    /// The pages of a set. All their bits are cleared when this returns, but for those of hot pages, which only a stopped guest's set may have: they are
    /// in the next set, too.
    pub(super) fn take(&mut self, vm: &VmFd, ram: &GuestRam, stopped: bool) -> Result<PageBits, DirtyError> {
        let log = read(vm, ram)?;
        if !(stopped && self.tracking == Tracking::HotPages && self.manual) {
            self.clear(vm, &log)?;
            return Ok(log);
        }
        let clear = self.hot.settle(&log);
        self.clear(vm, &clear)?;
        Ok(log)
    }

    /// The pages of a set that is taken while the guest runs and its epoch has not ended. All their bits are cleared when this returns. Hot pages are left
    /// out, where the host can leave them.
    pub(super) fn take_cold(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<PageBits, DirtyError> {
        let log = read(vm, ram)?;
        let chosen = self.tracking == Tracking::HotPages && self.manual;
        let cold = if chosen { self.hot.cold(&log) } else { log };
        self.clear(vm, &cold)?;
        Ok(cold)
    }

    fn clear(&self, vm: &VmFd, bits: &PageBits) -> Result<(), DirtyError> {
        if !self.manual {
            return Ok(());
        }
        for (slot, words) in (0u32..).zip(bits) {
            clear(vm, slot, words)?;
        }
        Ok(())
    }
}

fn failed(call: &'static str) -> DirtyError {
    DirtyError { call, source: io::Error::last_os_error() }
}

/// All that is set, slot by slot: there is one for each region.
fn read(vm: &VmFd, ram: &GuestRam) -> Result<PageBits, DirtyError> {
    let mut log: PageBits = Vec::with_capacity(ram.regions().len());
    for (slot, region) in (0u32..).zip(ram.regions()) {
        let mut words = vec![0; usize::try_from(region.pages).unwrap_or(usize::MAX).div_ceil(WORD_PAGES)];
        let request = kvm_dirty_log {
            slot,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
            ..Default::default()
        };
        // SAFETY: KVM writes one bit for each page of the slot, rounded up to words, which is how long `words` is.
        if unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &request) } != 0 {
            return Err(failed("KVM_GET_DIRTY_LOG"));
        }
        log.push(words);
    }
    Ok(log)
}

/// Clears these bits and protects their pages again; from the first word with one to the last.
fn clear(vm: &VmFd, slot: u32, words: &[u64]) -> Result<(), DirtyError> {
    let Some(first) = words.iter().position(|word| *word != 0) else { return Ok(()) };
    let last = words.iter().rposition(|word| *word != 0).unwrap_or(first);
    let part = &words[first..=last];
    let wide = |words: usize| u64::try_from(words * WORD_PAGES).unwrap_or(u64::MAX);
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: u32::try_from(wide(part.len())).expect("a region has fewer than 2^32 pages"),
        first_page: wide(first),
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: part.as_ptr().cast_mut().cast() },
    };
    // SAFETY: KVM reads `num_pages` bits of `part`, which has them, and writes none.
    if unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) } != 0 {
        return Err(failed("KVM_CLEAR_DIRTY_LOG"));
    }
    Ok(())
}
