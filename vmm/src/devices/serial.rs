//! The serial console: vm-superio's UART between the guest, [`Outputs::console`] and a descriptor to read from.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState};

use super::host_io::{Doorbell, Pumped};
use super::irq::IrqLine;
use crate::machine::RestoreError;
use crate::outputs::Outputs;
use crate::section::SectionKind;
use crate::state::codec::{Decoder, Encoder, Malformed, Saved};

/// Bytes that the UART's receive FIFO holds.
const FIFO_SIZE: usize = 64;

/// The guest's bytes on their way out.
struct ConsoleWriter(Arc<dyn Outputs>);

impl io::Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.console(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the I/O thread when a full FIFO has room again.
struct RoomBell {
    bell: Doorbell,
    full: Arc<AtomicBool>,
}

impl SerialEvents for RoomBell {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.full.swap(false, Ordering::Relaxed) {
            self.bell.ring();
        }
    }
}

type Uart = Serial<IrqLine, RoomBell, ConsoleWriter>;

/// The serial console.
pub(crate) struct SerialPort {
    uart: Uart,
    irq: IrqLine,
    outputs: Arc<dyn Outputs>,
    bell: Doorbell,
    full: Arc<AtomicBool>,
    input: Option<OwnedFd>,
}

impl SerialPort {
    pub(crate) fn new(irq: IrqLine, outputs: Arc<dyn Outputs>, bell: Doorbell, input: Option<OwnedFd>) -> Self {
        let full = Arc::new(AtomicBool::new(false));
        let events = RoomBell { bell: bell.clone(), full: Arc::clone(&full) };
        let uart = Serial::with_events(irq.clone(), events, ConsoleWriter(Arc::clone(&outputs)));
        Self { uart, irq, outputs, bell, full, input }
    }

    /// What a person's keys arrive on.
    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn read(&mut self, register: u16) -> u8 {
        u8::try_from(register).map_or(0xff, |r| self.uart.read(r))
    }

    pub(crate) fn write(&mut self, register: u16, value: u8) {
        let Ok(register) = u8::try_from(register) else { return };
        if let Err(error) = self.uart.write(register, value) {
            // Neither the line nor the writer can fail; what is left is a full loop-back FIFO, which is the guest's affair.
            log::debug!("serial: {error}");
        }
    }

    /// Moves waiting input into the FIFO, as far as it has room.
    pub(crate) fn pump(&mut self) -> Pumped {
        let Some(input) = &self.input else { return Pumped::Idle };
        let room = self.uart.fifo_capacity();
        if room == 0 {
            self.full.store(true, Ordering::Relaxed);
            return Pumped::Idle;
        }
        let mut buffer = [0; FIFO_SIZE];
        let Some(space) = buffer.get_mut(..room) else { return Pumped::Idle };
        match read_ready(input.as_fd(), space) {
            Ok(0) => {
                self.input = None;
                Pumped::Idle
            }
            Ok(n) => {
                if let Err(error) = self.uart.enqueue_raw_bytes(space.get(..n).unwrap_or_default()) {
                    log::debug!("serial: {error}");
                }
                Pumped::More
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Pumped::Idle,
            Err(error) => {
                log::warn!("serial: input ends: {error}");
                self.input = None;
                Pumped::Idle
            }
        }
    }

    pub(crate) fn capture(&self) -> SerialStateV1 {
        SerialStateV1(self.uart.state())
    }

    pub(crate) fn restore(&mut self, saved: &SerialStateV1) -> Result<(), RestoreError> {
        let events = RoomBell { bell: self.bell.clone(), full: Arc::clone(&self.full) };
        let writer = ConsoleWriter(Arc::clone(&self.outputs));
        self.uart = Serial::from_state(&saved.0, self.irq.clone(), events, writer).map_err(|e| {
            RestoreError::Malformed { kind: SectionKind::SERIAL, reason: format!("refused by the UART: {e}") }
        })?;
        Ok(())
    }
}

/// Reads without blocking, whatever the mode of the descriptor, which may be shared with other processes.
fn read_ready(fd: BorrowedFd<'_>, into: &mut [u8]) -> rustix::io::Result<usize> {
    let mut ready = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    if rustix::event::poll(&mut ready, Some(&now))? == 0 {
        return Err(rustix::io::Errno::AGAIN);
    }
    rustix::io::read(fd, into)
}

/// The UART's registers and receive FIFO.
pub(crate) struct SerialStateV1(SerialState);

impl Saved for SerialStateV1 {
    const VERSION: u16 = 1;

    fn encode(&self, out: &mut Encoder) {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = &self.0;
        out.bytes(&[*baud_divisor_low, *baud_divisor_high, *interrupt_enable, *interrupt_identification]);
        out.bytes(&[*line_control, *line_status, *modem_control, *modem_status, *scratch]);
        let waiting = u8::try_from(in_buffer.len()).expect("the FIFO holds 64 bytes");
        out.u8(waiting);
        out.bytes(in_buffer);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let mut state = SerialState {
            baud_divisor_low: input.u8()?,
            baud_divisor_high: input.u8()?,
            interrupt_enable: input.u8()?,
            interrupt_identification: input.u8()?,
            line_control: input.u8()?,
            line_status: input.u8()?,
            modem_control: input.u8()?,
            modem_status: input.u8()?,
            scratch: input.u8()?,
            in_buffer: Vec::new(),
        };
        let waiting = usize::from(input.u8()?);
        if waiting > FIFO_SIZE {
            return Err(Malformed(format!("{waiting} bytes in a FIFO of {FIFO_SIZE}")));
        }
        state.in_buffer = input.bytes(waiting)?.to_vec();
        Ok(Self(state))
    }
}
