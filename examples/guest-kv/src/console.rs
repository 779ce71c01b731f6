//! The serial console, COM1, polled.

use core::fmt::{self, Write};

use crate::boot::{inb, outb};

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const LINE_STATUS: u16 = DATA + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// Bytes that the transmitter takes once it is empty.
const FIFO: usize = 16;
/// Polls before a byte is sent whether or not the transmitter says that it is ready: a broken console must not stop the
/// guest.
const POLLS: usize = 10_000;

/// Makes the port ready: 8N1, FIFOs on, no interrupts.
pub(crate) fn init() {
    for (port, value) in
        [(INTERRUPT_ENABLE, 0), (LINE_CONTROL, 0x80), (DATA, 1), (INTERRUPT_ENABLE, 0), (LINE_CONTROL, 3)]
    {
        outb(port, value);
    }
    outb(FIFO_CONTROL, 7);
}

/// Writes a line.
pub(crate) fn println(line: fmt::Arguments<'_>) {
    let mut port = Port { room: 0 };
    // Port::write_str does not fail; a Display that does costs the rest of the line.
    let _ = port.write_fmt(line);
    let _ = port.write_str("\n");
    // Gone before the machine is, if this was its last line.
    port.drain();
}

struct Port {
    room: usize,
}

impl Port {
    fn drain(&mut self) {
        let _ = (0..POLLS).find(|_| inb(LINE_STATUS) & TRANSMITTER_EMPTY != 0);
        self.room = FIFO;
    }

    fn put(&mut self, byte: u8) {
        if self.room == 0 {
            self.drain();
        }
        self.room -= 1;
        outb(DATA, byte);
    }
}

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}
