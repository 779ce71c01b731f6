//! Virtio over MMIO: the transport once, and what each kind of device adds to it.

pub(crate) mod block;
pub(crate) mod mmio;
pub(crate) mod net;

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::Bytes;

use super::host_io::Pumped;
use crate::memory::TrackedMemory;
use crate::outputs::FramePort;
use crate::state::codec::Malformed;

/// The guest broke the rules of a queue. The device says NEEDS_RESET and does nothing more until it is reset.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue}: {reason}")]
pub(crate) struct BrokenQueue {
    pub(crate) queue: usize,
    pub(crate) reason: String,
}

impl BrokenQueue {
    pub(crate) fn new(queue: usize, reason: impl ToString) -> Self {
        Self { queue, reason: reason.to_string() }
    }
}

/// What a kind of device adds to the transport. All its state that a guest could notice is in the transport, but for requests
/// that it has taken from its queues and not given back: a kind that gets other state must add it to the saved type.
pub(crate) trait VirtioDevice: Send {
    /// The number that the specification gives this kind.
    fn device_id(&self) -> u32;
    /// Feature bits beyond `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;
    /// Greatest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];
    /// The configuration space.
    fn config(&self) -> &[u8];
    /// The driver accepted these features, all of them offered.
    fn negotiated(&mut self, features: u64);
    /// The guest kicked queue `index`. True when it got something back there.
    fn kicked(&mut self, index: usize, queues: &mut [Queue], ram: &TrackedMemory) -> Result<bool, BrokenQueue>;
    /// A turn of the host side: the queue that the guest got something back on, if any, and whether more waits.
    fn pump(&mut self, queues: &mut [Queue], ram: &TrackedMemory) -> Result<(Option<usize>, Pumped), BrokenQueue>;
    /// What to watch for input.
    fn host_port(&self) -> Option<&dyn FramePort>;
    /// Frames to deliver before any of the port's.
    fn queue_inbound(&mut self, frames: Vec<Vec<u8>>);
    /// The driver reset the device: nothing that it asked for before touches its memory after this returns.
    fn reset(&mut self);
    /// Heads of the chains that were taken from the queue and not given back, in order. Nobody may run the device.
    fn pending(&self) -> Vec<u16>;
    /// Takes such heads over from another device; they are submitted before anything new, at the first kick. On an error nothing has changed.
    fn restore_pending(&mut self, heads: &[u16], queues: &[Queue]) -> Result<(), Malformed>;
    /// The work of a device that has worker threads.
    fn work(&self) -> Option<Arc<block::Work>>;
}

/// Whether the driver wants to hear of a used buffer (`VRING_AVAIL_F_NO_INTERRUPT` is advice; without EVENT_IDX there is no more).
pub(crate) fn wants_interrupt(queue: &Queue, ram: &TrackedMemory) -> bool {
    const NO_INTERRUPT: u16 = 1;
    ram.read_obj::<u16>(vm_memory::GuestAddress(queue.avail_ring())).is_ok_and(|flags| flags & NO_INTERRUPT == 0)
}
