//! The local APIC and the I/O APIC.
#![expect(unsafe_code, reason = "memory-mapped registers")]

use core::ptr::with_exposed_provenance_mut;

use crate::boot::{IRQ_VECTOR, IRQS, SPURIOUS_VECTOR, TIMER_VECTOR};

const LOCAL: usize = 0xfee0_0000;
const ID: usize = LOCAL + 0x20;
const TASK_PRIORITY: usize = LOCAL + 0x80;
const SPURIOUS: usize = LOCAL + 0xf0;
const TIMER: usize = LOCAL + 0x320;
const LINT0: usize = LOCAL + 0x350;
const TIMER_INITIAL: usize = LOCAL + 0x380;
const TIMER_CURRENT: usize = LOCAL + 0x390;
const TIMER_DIVIDE: usize = LOCAL + 0x3e0;
const MASKED: u32 = 1 << 16;

/// The timer counts once in so many periods of its bus: 32 bits of it are then 68 s under KVM.
pub(crate) const TIMER_DIVIDER: u64 = 16;
const DIVIDE_BY_16: u32 = 3;

const IO: usize = 0xfec0_0000;
const IO_SELECT: usize = IO;
const IO_WINDOW: usize = IO + 0x10;

fn write(register: usize, value: u32) {
    // SAFETY: only called with the registers above, which are mapped and always there.
    unsafe { with_exposed_provenance_mut::<u32>(register).write_volatile(value) }
}

fn read(register: usize) -> u32 {
    // SAFETY: only called with the registers above, which are mapped and always there.
    unsafe { with_exposed_provenance_mut::<u32>(register).read_volatile() }
}

/// Switches the local APIC on, its timer in one-shot mode and not running.
pub(crate) fn init() {
    write(TASK_PRIORITY, 0);
    write(LINT0, MASKED);
    write(SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
    write(TIMER_DIVIDE, DIVIDE_BY_16);
    write(TIMER, u32::from(TIMER_VECTOR));
}

/// Starts the timer: an interrupt after so many ticks; 0 stops it.
pub(crate) fn start_timer(ticks: u32) {
    write(TIMER_INITIAL, ticks);
}

/// Ticks until the timer's interrupt.
pub(crate) fn timer_remaining() -> u32 {
    read(TIMER_CURRENT)
}

/// Routes an input of the I/O APIC to this processor: edge-triggered, active high. False if there is no such input.
pub(crate) fn route(irq: u32) -> bool {
    let Some(vector) = u8::try_from(irq).ok().filter(|irq| usize::from(*irq) < IRQS).map(|irq| IRQ_VECTOR + irq) else {
        return false;
    };
    let redirection = 0x10 + 2 * irq;
    write(IO_SELECT, redirection + 1);
    write(IO_WINDOW, read(ID) & 0xff00_0000);
    write(IO_SELECT, redirection);
    write(IO_WINDOW, u32::from(vector));
    true
}
