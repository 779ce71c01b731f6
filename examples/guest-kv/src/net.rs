//! virtio-net over virtio-mmio, modern or legacy, as a device of smoltcp.
//!
//! The rings are `virtio-drivers`'; the driver on top of them is our own, for the sake of exits: the device is kicked
//! once for a batch of frames and interrupts only when the guest is about to sleep.
#![expect(unsafe_code, reason = "memory shared with a device")]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;
use virtio_drivers::transport::mmio::MmioTransport;

use crate::virtio::{self, Identity};

const RX: u16 = 0;
const TX: u16 = 1;
const QUEUE: usize = 128;
/// Received buffers that are given back to the device before it is told: it cannot have run out before.
const REFILL_KICK: usize = QUEUE / 4;
const BUFFER: usize = 2048;
const FRAME: usize = 1514;
const FEATURE_MAC: u64 = 1 << 5;
/// Used if the device has no address: locally administered.
const DEFAULT_MAC: [u8; 6] = [0x02, 0x46, 0x54, 0, 0, 1];

/// A buffer for a frame and the header before it.
#[repr(C, align(2048))]
struct Buffer([u8; BUFFER]);

/// One direction: a ring, and the buffers that are in it or wait to be.
struct Ring {
    queue: VirtQueue<Identity, QUEUE>,
    buffers: Box<[Buffer]>,
    /// Which buffer the descriptor of that number carries.
    carried: [usize; QUEUE],
    /// Buffers added since the device was told.
    news: usize,
    frames: u64,
}

impl Ring {
    fn new(transport: &mut MmioTransport<'static>, index: u16) -> Result<Self, &'static str> {
        let queue = VirtQueue::new(transport, index, false, false).map_err(|_| "cannot set up a queue")?;
        let buffers = (0..QUEUE).map(|_| Buffer([0; BUFFER])).collect();
        Ok(Self { queue, buffers, carried: [0; QUEUE], news: 0, frames: 0 })
    }

    /// The descriptor that the device used next, and its buffer.
    fn used(&self) -> Option<(u16, usize)> {
        let token = self.queue.peek_used()?;
        Some((token, *self.carried.get(usize::from(token))?))
    }

    fn kick(&mut self, transport: &mut MmioTransport<'static>, index: u16) {
        self.news = 0;
        // The device's flag must be read after the ring was written.
        fence(Ordering::SeqCst);
        if self.queue.should_notify() {
            transport.notify(index);
        }
    }

    /// Lets the device interrupt, or not. On letting it, look at the ring once more before sleeping.
    fn set_interrupts(&mut self, on: bool) {
        self.queue.set_dev_notify(on);
        fence(Ordering::SeqCst);
    }
}

/// The receiving half, a token for one frame of which is lent to smoltcp.
struct Receiver {
    ring: Ring,
    header: usize,
}

impl Receiver {
    /// Gives a buffer to the device.
    fn add(&mut self, buffer: usize) {
        let Some(bytes) = self.ring.buffers.get_mut(buffer) else { return };
        // SAFETY: the buffer is not touched until the device has used it.
        if let Ok(token) = unsafe { self.ring.queue.add(&[], &mut [&mut bytes.0]) } {
            if let Some(carried) = self.ring.carried.get_mut(usize::from(token)) {
                *carried = buffer;
            }
            self.ring.news += 1;
        }
    }
}

/// The sending half.
struct Sender {
    ring: Ring,
    header: usize,
    free: Vec<usize>,
}

impl Sender {
    /// Takes back what the device has sent. True if there is room for a frame.
    fn reclaim(&mut self) -> bool {
        while let Some((token, buffer)) = self.ring.used() {
            let Some(bytes) = self.ring.buffers.get(buffer) else { break };
            let length = self.header + FRAME;
            let sent = bytes.0.get(..length).unwrap_or(&bytes.0);
            // SAFETY: this buffer was added under this token, and the device is done with it.
            if unsafe { self.ring.queue.pop_used(token, &[sent], &mut []) }.is_err() {
                break;
            }
            self.free.push(buffer);
        }
        !self.free.is_empty()
    }
}

/// A network device.
pub(crate) struct Net {
    transport: MmioTransport<'static>,
    receiver: Receiver,
    sender: Sender,
    mac: [u8; 6],
    legacy: bool,
}

impl Net {
    /// Starts a network device.
    ///
    /// # Errors
    /// It cannot be used.
    pub(crate) fn start(mut transport: MmioTransport<'static>) -> Result<Self, &'static str> {
        let offered = virtio::negotiate(&mut transport, FEATURE_MAC)?;
        let legacy = transport.requires_legacy_layout();
        let mut mac = DEFAULT_MAC;
        if offered & FEATURE_MAC != 0 {
            for (offset, byte) in mac.iter_mut().enumerate() {
                *byte = transport.read_config_space(offset).map_err(|_| "cannot read the address")?;
            }
        }
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err("the device's address is not that of one station");
        }
        let header = if legacy { 10 } else { 12 };
        let mut receiver = Receiver { ring: Ring::new(&mut transport, RX)?, header };
        let mut sender = Sender { ring: Ring::new(&mut transport, TX)?, header, free: Vec::new() };
        // The lowest on top: a stack keeps the few that are used the same.
        sender.free.extend((0..QUEUE).rev());
        sender.ring.set_interrupts(false);
        transport.finish_init();
        (0..QUEUE).for_each(|buffer| receiver.add(buffer));
        receiver.ring.kick(&mut transport, RX);
        Ok(Self { transport, receiver, sender, mac, legacy })
    }

    /// Whether the device is of the legacy kind.
    pub(crate) fn is_legacy(&self) -> bool {
        self.legacy
    }

    /// The hardware address.
    pub(crate) fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Frames received and sent so far.
    pub(crate) fn frames(&self) -> (u64, u64) {
        (self.receiver.ring.frames, self.sender.ring.frames)
    }

    /// Tells the device what was added, where it needs to know.
    pub(crate) fn flush(&mut self) {
        if self.sender.ring.news > 0 {
            self.sender.ring.kick(&mut self.transport, TX);
        }
        if self.receiver.ring.news >= REFILL_KICK {
            self.receiver.ring.kick(&mut self.transport, RX);
        }
    }

    /// Lets the device interrupt, before a sleep. True if it has left something to do already.
    pub(crate) fn enable_interrupts(&mut self) -> bool {
        self.receiver.ring.set_interrupts(true);
        if self.sender.reclaim() {
            return self.receiver.ring.queue.can_pop();
        }
        // Without room to answer, frames are not received either: only room is a reason to wake up.
        self.sender.ring.set_interrupts(true);
        self.sender.reclaim()
    }

    /// Asks the device not to interrupt: its rings are looked at anyway.
    pub(crate) fn disable_interrupts(&mut self) {
        self.receiver.ring.set_interrupts(false);
        self.sender.ring.set_interrupts(false);
    }

    /// Whether there is no room to send.
    pub(crate) fn is_full(&mut self) -> bool {
        !self.sender.reclaim()
    }

    /// Whether all that was sent has left the ring.
    pub(crate) fn is_drained(&mut self) -> bool {
        self.sender.reclaim();
        self.sender.free.len() == QUEUE
    }
}

impl Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Transmit<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Transmit<'_>)> {
        let (token, buffer) = self.receiver.ring.used()?;
        if !self.sender.reclaim() {
            return None;
        }
        Some((Received { receiver: &mut self.receiver, token, buffer }, Transmit { sender: &mut self.sender }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmit<'_>> {
        self.sender.reclaim().then_some(Transmit { sender: &mut self.sender })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities
    }
}

/// A frame that the device has received.
pub(crate) struct Received<'a> {
    receiver: &'a mut Receiver,
    token: u16,
    buffer: usize,
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let header = self.receiver.header;
        let Some(bytes) = self.receiver.ring.buffers.get_mut(self.buffer) else { return f(&[]) };
        // SAFETY: this buffer was added under this token, and the device is done with it.
        let length = unsafe { self.receiver.ring.queue.pop_used(self.token, &[], &mut [&mut bytes.0]) };
        // What the device says is not believed beyond the buffer; an empty frame is ignored by smoltcp.
        let length = length.ok().and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
        let result = f(bytes.0.get(header..length).unwrap_or_default());
        self.receiver.ring.frames += 1;
        self.receiver.add(self.buffer);
        result
    }
}

/// Leave to send a frame.
pub(crate) struct Transmit<'a> {
    sender: &'a mut Sender,
}

impl TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let sender = self.sender;
        let header = sender.header;
        assert!(length <= FRAME, "smoltcp keeps to the MTU");
        let buffer = sender.free.pop().expect("a token is only given when a buffer is free");
        let bytes = &mut sender.ring.buffers[buffer].0;
        // No offloads: the header is all zeros.
        bytes[..header].fill(0);
        let result = f(&mut bytes[header..header + length]);
        // SAFETY: the buffer is not touched until the device has used it.
        match unsafe { sender.ring.queue.add(&[&bytes[..header + length]], &mut []) } {
            Ok(token) => {
                sender.ring.carried[usize::from(token)] = buffer;
                sender.ring.news += 1;
                sender.ring.frames += 1;
            }
            Err(_) => sender.free.push(buffer),
        }
        result
    }
}
