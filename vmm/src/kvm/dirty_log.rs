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

use crate::hot::{HotPages, Tracking};
use crate::machine::DirtyError;
use crate::memory::{GuestRam, RamRegion};
use crate::page_bits::{PageBits, WORD_PAGES};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// So many empty words in a row make two calls out of one: about what a call costs KVM in words that it looks at.
const GAP_WORDS: u64 = 512;

/// The log of one machine.
#[derive(Debug, Default)]
pub(super) struct DirtyLog {
    /// Reading clears nothing: what is cleared is told.
    manual: bool,
    tracking: Tracking,
    hot: HotPages,
    /// Where bitmaps are exchanged with KVM, as long as the largest slot's.
    bitmap: Vec<u64>,
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
        let words = |region: &RamRegion| usize::try_from(region.pages / WORD_PAGES).unwrap_or(usize::MAX);
        self.bitmap.resize(ram.regions().iter().map(words).max().unwrap_or(0), 0);
        if self.is_on() && tracking != Tracking::Off {
            let log = self.read(vm, ram)?;
            self.clear(vm, ram, &log)?;
        }
        self.hot.forget();
        self.tracking = tracking;
        Ok(())
    }

    /// The pages of a set. All their bits are cleared when this returns, but for those of hot pages, which only a stopped guest's set may have: they are
    /// in the next set, too.
    pub(super) fn take(&mut self, vm: &VmFd, ram: &GuestRam, stopped: bool) -> Result<PageBits, DirtyError> {
        let log = self.read(vm, ram)?;
        if !(stopped && self.tracking == Tracking::HotPages && self.manual) {
            self.clear(vm, ram, &log)?;
            return Ok(log);
        }
        let clear = self.hot.settle(&log);
        self.clear(vm, ram, &clear)?;
        Ok(log)
    }

    /// The pages of a set that is taken while the guest runs and its epoch has not ended. All their bits are cleared when this returns. Hot pages are left
    /// out, where the host can leave them.
    pub(super) fn take_cold(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<PageBits, DirtyError> {
        let log = self.read(vm, ram)?;
        let chosen = self.tracking == Tracking::HotPages && self.manual;
        let cold = if chosen { self.hot.cold(&log) } else { log };
        self.clear(vm, ram, &cold)?;
        Ok(cold)
    }

    /// All that is set, slot by slot: there is one for each region.
    fn read(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<PageBits, DirtyError> {
        let mut log = PageBits::default();
        for (slot, region) in (0u32..).zip(ram.regions()) {
            let words = usize::try_from(region.pages / WORD_PAGES).unwrap_or(usize::MAX);
            let bitmap = &mut self.bitmap[..words];
            let request = kvm_dirty_log {
                slot,
                __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
                ..Default::default()
            };
            // SAFETY: KVM writes one bit for each page of the slot, which is a whole number of words, as many as `bitmap` has.
            if unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &request) } != 0 {
                return Err(failed("KVM_GET_DIRTY_LOG"));
            }
            log.push_all(region.first, bitmap);
        }
        Ok(log)
    }

    /// Clears these bits and protects their pages again.
    fn clear(&mut self, vm: &VmFd, ram: &GuestRam, bits: &PageBits) -> Result<(), DirtyError> {
        if !self.manual {
            return Ok(());
        }
        let mut words = bits.words();
        for (slot, region) in (0u32..).zip(ram.regions()) {
            let (first, end) = (region.first.0 / WORD_PAGES, (region.first.0 + region.pages) / WORD_PAGES);
            let (mut own, rest) = words.split_at(words.partition_point(|(number, _)| *number < end));
            words = rest;
            while let Some((begin, _)) = own.first() {
                let far = |pair: &[(u64, u64)]| pair[1].0 - pair[0].0 > GAP_WORDS;
                let together = own.windows(2).position(far).map_or(own.len(), |last| last + 1);
                let (group, later) = own.split_at(together);
                own = later;
                self.clear_group(vm, slot, begin - first, group)?;
            }
        }
        Ok(())
    }

    /// Clears the bits of words of a slot that lie close together. `at`: the first one's place in the slot.
    fn clear_group(&mut self, vm: &VmFd, slot: u32, at: u64, group: &[(u64, u64)]) -> Result<(), DirtyError> {
        let (Some((begin, _)), Some((last, _))) = (group.first(), group.last()) else { return Ok(()) };
        let place = |number: u64| usize::try_from(number - begin).unwrap_or(usize::MAX);
        let bitmap = &mut self.bitmap[..=place(*last)];
        bitmap.fill(0);
        group.iter().for_each(|(number, bits)| bitmap[place(*number)] = *bits);
        let pages = (last - begin + 1) * WORD_PAGES;
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(pages).expect("a region has fewer than 2^32 pages"),
            first_page: at * WORD_PAGES,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_ptr().cast_mut().cast() },
        };
        // SAFETY: KVM reads `num_pages` bits of `bitmap`, which has them, and writes none.
        if unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) } != 0 {
            return Err(failed("KVM_CLEAR_DIRTY_LOG"));
        }
        Ok(())
    }
}

fn failed(call: &'static str) -> DirtyError {
    DirtyError { call, source: io::Error::last_os_error() }
}
