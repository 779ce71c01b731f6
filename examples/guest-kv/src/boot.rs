//! The border to CPL 0: the assembly stub, the tables that it shares with the payload, and what the payload may ask of
//! the processor.
#![expect(unsafe_code, reason = "privileged tables, port I/O and memory shared with interrupt handlers")]

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

global_asm!(include_str!("boot.s"), options(att_syntax));
global_asm!(include_str!("memory.s"), options(att_syntax));

/// Inputs of the I/O APIC that devices may use.
pub(crate) const IRQS: usize = 24;
/// Interrupt vector of I/O APIC input 0.
pub(crate) const IRQ_VECTOR: u8 = 0x30;
/// Interrupt vector of the local APIC's timer.
pub(crate) const TIMER_VECTOR: u8 = 0x50;
/// Interrupt vector of spurious interrupts.
pub(crate) const SPURIOUS_VECTOR: u8 = 0xff;

/// Interrupt gate, present, DPL 0, in the kernel's code segment.
const GATE: u64 = (0x8e00 << 32) | (0x08 << 16);

#[repr(C, align(16))]
struct Idt(UnsafeCell<[[u64; 2]; 256]>);

// SAFETY: written by one thread of execution only, before interrupts are unmasked, or to crash.
unsafe impl Sync for Idt {}

unsafe extern "C" {
    static ft_events: AtomicU32;
    static ft_seen: AtomicU32;
    static ft_timer_count: AtomicU64;
    static ft_irq_base: [AtomicU64; IRQS];
    static ft_irq_count: [AtomicU64; IRQS];
    static ft_idt: Idt;
    static ft_exceptions: [u64; 32];
    static ft_irqs: [u64; IRQS];
    static ft_timer: u64;
    static ft_spurious: u64;
    static __image_end: u8;
}

/// The first address after the image and its stack.
pub(crate) fn image_end() -> u64 {
    (&raw const __image_end).addr() as u64
}

/// Fills in the IDT. Before this, an exception is a triple fault.
pub(crate) fn install_handlers() {
    let gate = |handler: u64| [(handler & 0xffff) | GATE | ((handler & 0xffff_0000) << 32), handler >> 32];
    // SAFETY: the statics are defined in boot.s with these types; nothing else uses the IDT yet.
    unsafe {
        let idt = &mut *ft_idt.0.get();
        for (entry, handler) in idt.iter_mut().zip(ft_exceptions) {
            *entry = gate(handler);
        }
        for (entry, handler) in idt.iter_mut().skip(usize::from(IRQ_VECTOR)).zip(ft_irqs) {
            *entry = gate(handler);
        }
        idt[usize::from(TIMER_VECTOR)] = gate(ft_timer);
        idt[usize::from(SPURIOUS_VECTOR)] = gate(ft_spurious);
    }
}

/// Makes the handler of I/O APIC input `irq` acknowledge the virtio-mmio device at `address`. False if there is no such
/// input.
pub(crate) fn set_device(irq: u32, address: u32) -> bool {
    // SAFETY: defined in boot.s with this type.
    let bases = unsafe { &ft_irq_base };
    let base = usize::try_from(irq).ok().and_then(|irq| bases.get(irq));
    base.map(|base| base.store(u64::from(address), Ordering::Relaxed)).is_some()
}

/// A number that every interrupt changes.
pub(crate) fn events() -> u32 {
    // SAFETY: defined in boot.s with this type.
    unsafe { ft_events.load(Ordering::SeqCst) }
}

/// Interrupts of the timer so far.
pub(crate) fn timer_interrupts() -> u64 {
    // SAFETY: defined in boot.s with this type.
    unsafe { ft_timer_count.load(Ordering::Relaxed) }
}

/// Interrupts of all devices so far.
pub(crate) fn device_interrupts() -> u64 {
    // SAFETY: defined in boot.s with this type.
    unsafe { ft_irq_count.iter().map(|count| count.load(Ordering::Relaxed)).sum() }
}

/// Halts until an interrupt, unless there was one since [`events`] returned `seen`.
pub(crate) fn wait(seen: u32) {
    // SAFETY: defined in boot.s with this type; hlt enters the handler there, which keeps all registers and steps over
    // the instruction.
    unsafe {
        ft_seen.store(seen, Ordering::SeqCst);
        asm!("hlt");
    }
}

/// Reads the time stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: RDTSC has no effect on memory, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes a byte to an I/O port.
pub(crate) fn outb(port: u16, value: u8) {
    // SAFETY: devices that could write to memory behind the compiler's back are not behind ports here.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte from an I/O port.
pub(crate) fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as for `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

/// Switches the machine off (the PM1a control register of an ACPI-less VMM), or stays halted for ever.
pub(crate) fn power_off() -> ! {
    // SAFETY: as for `outb`.
    unsafe { asm!("out dx, ax", in("dx") 0x604u16, in("ax") 0x2000u16, options(nomem, nostack, preserves_flags)) }
    loop {
        wait(events());
    }
}

/// A triple fault: the one reset that every VMM understands.
pub(crate) fn crash() -> ! {
    // SAFETY: the machine does not live to see the consequences.
    unsafe {
        (*ft_idt.0.get()).fill([0; 2]);
        asm!("ud2", options(noreturn))
    }
}

/// Entered from boot.s, on the payload's stack, for an exception that nothing handles.
#[unsafe(no_mangle)]
extern "C" fn guest_exception(vector: u64, code: u64, address: u64, fault_address: u64) -> ! {
    crate::console::println(format_args!(
        "guest-kv: exception {vector} code {code:#x} at {address:#x}, CR2 {fault_address:#x}"
    ));
    crash()
}

/// The compiled `core` names these although nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// See [`rust_eh_personality`].
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    crash()
}
