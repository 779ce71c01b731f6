//! The demo guest: a key-value server that is its own operating system. It speaks the Redis protocol over its own
//! drivers for virtio-net and virtio-blk, at CPL 3, and goes to CPL 0 for interrupts and for sleeping only.
#![no_std]
#![no_main]

extern crate alloc;

mod apic;
mod blk;
mod boot;
mod clock;
mod console;
mod dirty;
mod disks;
mod guest;
mod heap;
mod net;
mod pvh;
mod serve;
mod virtio;
mod work;

/// Entered from boot.s, with the address of the start information.
#[expect(unsafe_code, reason = "called by name from boot.s")]
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    boot::install_handlers();
    console::init();
    match guest::run(start_info) {
        Ok(never) => match never {},
        Err(error) => {
            console::println(format_args!("guest-kv: {error}"));
            boot::crash()
        }
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    console::println(format_args!("guest-kv: {info}"));
    boot::crash()
}
