//! The MMIO transport of virtio 1.x: registers, queues, status, interrupt.
//!
//! Everything here is written by the guest at will. A value that breaks a rule is ignored where the specification lets the
//! driver find out by reading back, and otherwise makes the device say NEEDS_RESET.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestAddress;

use super::block::Work;
use super::{BrokenQueue, VirtioDevice, wants_interrupt};
use crate::devices::host_io::Pumped;
use crate::devices::irq::IrqLine;
use crate::memory::TrackedMemory;
use crate::outputs::FramePort;
use crate::state::codec::{Decoder, Encoder, Malformed, Saved};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const TRANSPORT_VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"ftvm");
const CONFIG_SPACE: u64 = 0x100;
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;
const MAX_QUEUES: u8 = 8;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const ALL_STATUS: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;

/// Register offsets (virtio 1.2, 4.2.2).
mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
}

/// A virtio device behind MMIO registers.
pub(crate) struct VirtioMmio {
    irq: IrqLine,
    device: Box<dyn VirtioDevice>,
    queues: Vec<Queue>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    status: u32,
    /// A driver that breaks rules again and again must not fill the log.
    complained: bool,
}

impl VirtioMmio {
    pub(crate) fn new(irq: IrqLine, device: Box<dyn VirtioDevice>) -> Self {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| Queue::new(*size).expect("the sizes are constants, powers of two"))
            .collect();
        Self {
            irq,
            device,
            queues,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            interrupt_status: 0,
            status: 0,
            complained: false,
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// A read by the guest at `offset` into the device's page.
    pub(crate) fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(from) = offset.checked_sub(CONFIG_SPACE) {
            let from = usize::try_from(from).unwrap_or(usize::MAX);
            let config = self.device.config();
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = from.checked_add(i).and_then(|at| config.get(at)).copied().unwrap_or(0);
            }
            return;
        }
        let value = self.read_register(offset).to_le_bytes();
        match <&mut [u8; 4]>::try_from(data) {
            Ok(word) => *word = value,
            Err(_) => log::debug!("virtio: registers are read as 32-bit words, not so at {offset:#x}"),
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => TRANSPORT_VERSION,
            register::DEVICE_ID => self.device.device_id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            register::QUEUE_NUM_MAX => self.selected().map_or(0, |q| u32::from(q.max_size())),
            register::QUEUE_READY => self.selected().map_or(0, |q| u32::from(q.ready())),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            // No shared memory regions: their length reads as all ones.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            // The configuration never changes.
            register::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// A write by the guest at `offset` into the device's page.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8], ram: &TrackedMemory) {
        let Ok(word) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(word);
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => self.kicked(usize::try_from(value).unwrap_or(usize::MAX), ram),
            register::INTERRUPT_ACK => self.acknowledge(value),
            register::STATUS => self.set_status(value, ram),
            _ => self.configure_queue(offset, value, ram),
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(value) << shift;
    }

    fn configure_queue(&mut self, offset: u64, value: u32, ram: &TrackedMemory) {
        if self.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK && offset != register::QUEUE_READY {
            return;
        }
        let index = usize::try_from(self.queue_sel).unwrap_or(usize::MAX);
        let Some(queue) = self.queues.get_mut(index) else { return };
        // A queue that is ready was checked as it is.
        if queue.ready() && offset != register::QUEUE_READY {
            return;
        }
        let accepted = match offset {
            register::QUEUE_NUM => u16::try_from(value).is_ok_and(|size| queue.try_set_size(size).is_ok()),
            register::QUEUE_READY => {
                queue.set_ready(value == 1);
                // Rings outside RAM would make a state that no machine may restore.
                let valid = value == 0 || (self.status & FEATURES_OK != 0 && rings_are_valid(queue, ram));
                queue.set_ready(value == 1 && valid);
                valid
            }
            register::QUEUE_DESC_LOW => queue.try_set_desc_table_address(low(queue.desc_table(), value)).is_ok(),
            register::QUEUE_DESC_HIGH => queue.try_set_desc_table_address(high(queue.desc_table(), value)).is_ok(),
            register::QUEUE_DRIVER_LOW => queue.try_set_avail_ring_address(low(queue.avail_ring(), value)).is_ok(),
            register::QUEUE_DRIVER_HIGH => queue.try_set_avail_ring_address(high(queue.avail_ring(), value)).is_ok(),
            register::QUEUE_DEVICE_LOW => queue.try_set_used_ring_address(low(queue.used_ring(), value)).is_ok(),
            register::QUEUE_DEVICE_HIGH => queue.try_set_used_ring_address(high(queue.used_ring(), value)).is_ok(),
            _ => true,
        };
        if !accepted {
            self.broken(&BrokenQueue::new(index, format!("{value:#x} is no value for register {offset:#x}")));
        }
    }

    fn set_status(&mut self, value: u32, ram: &TrackedMemory) {
        if value == 0 {
            return self.reset();
        }
        let mut wanted = value & (ALL_STATUS & !NEEDS_RESET);
        // Status bits are only ever added; FEATURES_OK stays off when the features do not suit, and the driver reads that back.
        let fits = self.driver_features & !self.offered() == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if wanted & FEATURES_OK != 0 && self.status & FEATURES_OK == 0 && !fits {
            wanted &= !FEATURES_OK;
        }
        let before = self.status;
        self.status |= wanted;
        if self.status & FEATURES_OK == 0 {
            self.status &= !DRIVER_OK;
        } else if before & FEATURES_OK == 0 {
            self.device.negotiated(self.driver_features);
        }
        if before & DRIVER_OK == 0 && self.status & DRIVER_OK != 0 {
            self.kick_all(ram);
        }
    }

    fn reset(&mut self) {
        self.queues.iter_mut().for_each(QueueT::reset);
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.status = 0;
        self.acknowledge(u32::MAX);
        self.device.reset();
    }

    fn acknowledge(&mut self, bits: u32) {
        let before = self.interrupt_status;
        self.interrupt_status &= !bits;
        if before != 0 && self.interrupt_status == 0 {
            self.irq.set(false);
        }
    }

    fn interrupt(&mut self, bit: u32) {
        let before = self.interrupt_status;
        self.interrupt_status |= bit;
        if before == 0 {
            self.irq.set(true);
        }
    }

    fn is_live(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }

    fn broken(&mut self, error: &BrokenQueue) {
        let level = if std::mem::replace(&mut self.complained, true) { log::Level::Debug } else { log::Level::Warn };
        log::log!(level, "virtio device {}: {error}; it needs a reset", self.device.device_id());
        self.status |= NEEDS_RESET;
        if self.status & DRIVER_OK != 0 {
            self.interrupt(INTERRUPT_CONFIG);
        }
    }

    /// The guest put something into queue `index`.
    fn kicked(&mut self, index: usize, ram: &TrackedMemory) {
        if !self.is_live() || !self.queues.get(index).is_some_and(QueueT::ready) {
            return;
        }
        match self.device.kicked(index, &mut self.queues, ram) {
            Ok(true) => self.notify_used(index, ram),
            Ok(false) => {}
            Err(error) => self.broken(&error),
        }
    }

    fn notify_used(&mut self, index: usize, ram: &TrackedMemory) {
        if self.queues.get(index).is_some_and(|q| wants_interrupt(q, ram)) {
            self.interrupt(INTERRUPT_USED);
        }
    }

    fn kick_all(&mut self, ram: &TrackedMemory) {
        for index in 0..self.queues.len() {
            self.kicked(index, ram);
        }
    }

    /// A turn of the host side.
    pub(crate) fn pump(&mut self, ram: &TrackedMemory) -> Pumped {
        if !self.is_live() {
            return Pumped::Idle;
        }
        match self.device.pump(&mut self.queues, ram) {
            Ok((used, pumped)) => {
                if let Some(index) = used {
                    self.notify_used(index, ram);
                }
                pumped
            }
            Err(error) => {
                self.broken(&error);
                Pumped::Idle
            }
        }
    }

    /// Before the first run after a restore: neither the level of the line nor a kick on its way is part of the state.
    pub(crate) fn resume_after_restore(&mut self, ram: &TrackedMemory) {
        if self.interrupt_status != 0 {
            self.irq.set(false);
            self.irq.set(true);
        }
        self.kick_all(ram);
    }

    /// The work of a device that has worker threads.
    pub(crate) fn work(&self) -> Option<Arc<Work>> {
        self.device.work()
    }

    /// Heads of the requests that were not given back.
    #[cfg(test)]
    pub(crate) fn pending(&self) -> Vec<u16> {
        self.device.pending()
    }

    pub(crate) fn host_port(&self) -> Option<&dyn FramePort> {
        self.device.host_port()
    }

    pub(crate) fn queue_inbound(&mut self, frames: Vec<Vec<u8>>) {
        self.device.queue_inbound(frames);
    }

    pub(crate) fn capture(&self) -> VirtioStateV2 {
        VirtioStateV2 {
            device_id: self.device.device_id(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt_status,
            status: self.status,
            queues: self.queues.iter().map(Queue::state).collect(),
            pending: self.device.pending(),
        }
    }

    /// Takes a saved state after checking it against this device and against RAM, which must be there already.
    pub(crate) fn restore(&mut self, saved: &VirtioStateV2, ram: &TrackedMemory) -> Result<(), Malformed> {
        let VirtioStateV2 {
            device_id,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            interrupt_status,
            status,
            queues,
            pending,
        } = saved;
        if *device_id != self.device.device_id() {
            return Err(Malformed(format!("virtio device {device_id} where {} belongs", self.device.device_id())));
        }
        if *status & !ALL_STATUS != 0 || *interrupt_status & !(INTERRUPT_USED | INTERRUPT_CONFIG) != 0 {
            return Err(Malformed(format!("status {status:#x} or interrupt status {interrupt_status:#x} unknown")));
        }
        if *status & FEATURES_OK != 0 && driver_features & !self.offered() != 0 {
            return Err(Malformed(format!("features {driver_features:#x} were never offered")));
        }
        if queues.len() != self.queues.len() {
            return Err(Malformed(format!("{} queues instead of {}", queues.len(), self.queues.len())));
        }
        let restored = queues
            .iter()
            .zip(&self.queues)
            .map(|(state, own)| restore_queue(*state, own.max_size(), ram))
            .collect::<Result<Vec<_>, _>>()?;
        self.device.restore_pending(pending, &restored)?;
        if *status & FEATURES_OK != 0 {
            self.device.negotiated(*driver_features);
        }
        self.queues = restored;
        self.device_features_sel = *device_features_sel;
        self.driver_features_sel = *driver_features_sel;
        self.driver_features = *driver_features;
        self.queue_sel = *queue_sel;
        self.interrupt_status = *interrupt_status;
        self.status = *status;
        Ok(())
    }
}

fn restore_queue(state: QueueState, max_size: u16, ram: &TrackedMemory) -> Result<Queue, Malformed> {
    if state.max_size != max_size {
        return Err(Malformed(format!("queue of at most {} entries instead of {max_size}", state.max_size)));
    }
    if state.event_idx_enabled {
        return Err(Malformed::new("queue with EVENT_IDX, which was never offered"));
    }
    let queue = Queue::try_from(state).map_err(|e| Malformed(format!("queue: {e}")))?;
    if queue.ready() && !rings_are_valid(&queue, ram) {
        return Err(Malformed::new("queue whose rings are not in RAM"));
    }
    Ok(queue)
}

/// Whether a queue that is ready lies in RAM, and not at address 0, where no driver puts it and the library does not look.
fn rings_are_valid(queue: &Queue, ram: &TrackedMemory) -> bool {
    queue.avail_ring() != 0 && queue.is_valid(ram)
}

fn half(features: u64, select: u32) -> u32 {
    let bytes = features.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn low(address: u64, value: u32) -> GuestAddress {
    GuestAddress(address & !u64::from(u32::MAX) | u64::from(value))
}

fn high(address: u64, value: u32) -> GuestAddress {
    GuestAddress(address & u64::from(u32::MAX) | u64::from(value) << 32)
}

/// Registers and queues. The rings themselves are in the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VirtioStateV2 {
    device_id: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    status: u32,
    queues: Vec<QueueState>,
    /// Heads of the requests that were taken from the first queue and not given back, in order.
    pending: Vec<u16>,
}

impl Saved for VirtioStateV2 {
    const VERSION: u16 = 2;

    fn encode(&self, out: &mut Encoder) {
        let Self {
            device_id,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            interrupt_status,
            status,
            queues,
            pending,
        } = self;
        out.u32(*device_id);
        out.u32(*device_features_sel);
        out.u32(*driver_features_sel);
        out.u64(*driver_features);
        out.u32(*queue_sel);
        out.u32(*interrupt_status);
        out.u32(*status);
        out.u8(u8::try_from(queues.len()).expect("no kind of device has more than MAX_QUEUES"));
        for queue in queues {
            let QueueState {
                max_size,
                next_avail,
                next_used,
                event_idx_enabled,
                size,
                ready,
                desc_table,
                avail_ring,
                used_ring,
            } = *queue;
            for v in [max_size, next_avail, next_used, size] {
                out.u16(v);
            }
            out.u8(u8::from(event_idx_enabled));
            out.u8(u8::from(ready));
            for v in [desc_table, avail_ring, used_ring] {
                out.u64(v);
            }
        }
        out.u16(u16::try_from(pending.len()).expect("no more than a queue has entries"));
        pending.iter().for_each(|head| out.u16(*head));
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let mut state = Self {
            device_id: input.u32()?,
            device_features_sel: input.u32()?,
            driver_features_sel: input.u32()?,
            driver_features: input.u64()?,
            queue_sel: input.u32()?,
            interrupt_status: input.u32()?,
            status: input.u32()?,
            queues: Vec::new(),
            pending: Vec::new(),
        };
        let count = input.u8()?;
        if count > MAX_QUEUES {
            return Err(Malformed(format!("{count} queues, at most {MAX_QUEUES} are believed")));
        }
        for _ in 0..count {
            let (max_size, next_avail, next_used, size) = (input.u16()?, input.u16()?, input.u16()?, input.u16()?);
            let (event_idx_enabled, ready) = (input.flag()?, input.flag()?);
            let (desc_table, avail_ring, used_ring) = (input.u64()?, input.u64()?, input.u64()?);
            state.queues.push(QueueState {
                max_size,
                next_avail,
                next_used,
                event_idx_enabled,
                size,
                ready,
                desc_table,
                avail_ring,
                used_ring,
            });
        }
        // Each is in the input: no length is believed.
        for _ in 0..input.u16()? {
            state.pending.push(input.u16()?);
        }
        Ok(state)
    }
}
