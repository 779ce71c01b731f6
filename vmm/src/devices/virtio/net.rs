//! virtio-net: frames out on the vCPU's thread, frames in on the I/O thread.
//!
//! Without offloads, mergeable buffers and control queue. Its saved state is the transport's: a frame is either still on the
//! host's side, where it may be lost like any frame, or in the guest's memory.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::block::Work;
use super::{BrokenQueue, VirtioDevice};
use crate::devices::host_io::{Doorbell, Pumped};
use crate::memory::TrackedMemory;
use crate::outputs::{FramePort, Outputs};
use crate::state::codec::Malformed;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// `virtio_net_hdr_v1`, which every frame carries once VERSION_1 is negotiated.
const HEADER: usize = 12;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;
const MAX_FRAME: usize = 65_536;
/// Frames delivered in one turn: some tens of microseconds, which is what closing the gate may wait.
const FRAMES_A_TURN: usize = 16;

/// A network card.
pub(crate) struct Net {
    nic: u8,
    mac: [u8; 6],
    outputs: Arc<dyn Outputs>,
    port: Arc<dyn FramePort>,
    bell: Doorbell,
    /// Frames to deliver before the port's.
    inbound: VecDeque<Vec<u8>>,
    /// The guest had no buffer (or no driver): the next kick of the receive queue rings the bell.
    stalled: bool,
    /// Header and frame, in either direction.
    buffer: Vec<u8>,
}

impl Net {
    pub(crate) fn new(
        nic: u8,
        mac: [u8; 6],
        outputs: Arc<dyn Outputs>,
        port: Arc<dyn FramePort>,
        bell: Doorbell,
    ) -> Self {
        let buffer = vec![0; HEADER + MAX_FRAME];
        Self { nic, mac, outputs, port, bell, inbound: VecDeque::new(), stalled: true, buffer }
    }

    /// Sends what the guest queued; true when at least one buffer was given back.
    fn transmit(&mut self, queue: &mut Queue, ram: &TrackedMemory) -> Result<bool, BrokenQueue> {
        let broken = |e: virtio_queue::Error| BrokenQueue::new(TX, e);
        // What another vCPU adds meanwhile comes with a kick of its own, so one look at the ring is enough, and bounded.
        let waiting = queue.avail_idx(ram, Ordering::Acquire).map_err(broken)? - Wrapping(queue.next_avail());
        let heads = waiting.0;
        if heads > queue.size() {
            return Err(broken(virtio_queue::Error::InvalidAvailRingIndex));
        }
        for _ in 0..heads {
            let Some(chain) = queue.iter(ram).map_err(broken)?.next() else { break };
            let head = chain.head_index();
            let mut reader = chain.reader(ram).map_err(broken)?;
            let length = reader.available_bytes();
            if length < HEADER {
                return Err(BrokenQueue::new(TX, format!("a frame of {length} bytes has no room for its header")));
            }
            match self.buffer.get_mut(..length) {
                Some(space) => {
                    reader.read_exact(space).map_err(|e| BrokenQueue::new(TX, e))?;
                    let (_, frame) = space.split_at(HEADER);
                    self.outputs.frame(self.nic, frame);
                }
                None => log::debug!("nic {}: a frame of {length} bytes is dropped", self.nic),
            }
            queue.add_used(ram, head, 0).map_err(broken)?;
        }
        Ok(heads > 0)
    }

    /// Takes the next waiting frame into the buffer, behind the header; its length.
    fn next_frame(&mut self) -> Option<usize> {
        let (header, space) = self.buffer.split_at_mut(HEADER);
        header.fill(0);
        if let Some(one) = header.get_mut(NUM_BUFFERS) {
            *one = 1;
        }
        if let Some(frame) = self.inbound.pop_front() {
            let length = frame.len().min(space.len());
            space[..length].copy_from_slice(&frame[..length]);
            return Some(length);
        }
        match self.port.receive(space) {
            Ok(length) => length,
            Err(error) => {
                log::debug!("nic {}: receive failed: {error}", self.nic);
                None
            }
        }
    }

    /// Delivers up to a turn's worth of frames.
    fn receive(&mut self, queue: &mut Queue, ram: &TrackedMemory) -> Result<(bool, Pumped), BrokenQueue> {
        let broken = |e: virtio_queue::Error| BrokenQueue::new(RX, e);
        let mut delivered = false;
        for _ in 0..FRAMES_A_TURN {
            // The buffer first: a frame that was taken from the port has nowhere to go back to.
            let Some(chain) = queue.iter(ram).map_err(broken)?.next() else {
                self.stalled = true;
                return Ok((delivered, Pumped::Idle));
            };
            let Some(length) = self.next_frame() else {
                queue.go_to_previous_position();
                return Ok((delivered, Pumped::Idle));
            };
            let head = chain.head_index();
            let mut writer = chain.writer(ram).map_err(broken)?;
            let total = HEADER + length;
            if writer.available_bytes() < total {
                log::debug!("nic {}: a frame of {length} bytes does not fit into the guest's buffer", self.nic);
                queue.go_to_previous_position();
                continue;
            }
            writer.write_all(&self.buffer[..total]).map_err(|e| BrokenQueue::new(RX, e))?;
            let used = u32::try_from(total).map_err(|e| BrokenQueue::new(RX, e))?;
            queue.add_used(ram, head, used).map_err(broken)?;
            delivered = true;
        }
        Ok((delivered, Pumped::More))
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.mac
    }

    fn negotiated(&mut self, _: u64) {}

    fn kicked(&mut self, index: usize, queues: &mut [Queue], ram: &TrackedMemory) -> Result<bool, BrokenQueue> {
        match queues.get_mut(index) {
            Some(queue) if index == TX => self.transmit(queue, ram),
            _ => {
                if std::mem::take(&mut self.stalled) {
                    self.bell.ring();
                }
                Ok(false)
            }
        }
    }

    fn pump(&mut self, queues: &mut [Queue], ram: &TrackedMemory) -> Result<(Option<usize>, Pumped), BrokenQueue> {
        let Some(queue) = queues.get_mut(RX).filter(|queue| queue.ready()) else { return Ok((None, Pumped::Idle)) };
        let (delivered, pumped) = self.receive(queue, ram)?;
        Ok((delivered.then_some(RX), pumped))
    }

    fn host_port(&self) -> Option<&dyn FramePort> {
        Some(self.port.as_ref())
    }

    fn queue_inbound(&mut self, frames: Vec<Vec<u8>>) {
        self.inbound.extend(frames);
    }

    fn reset(&mut self) {
        self.stalled = true;
    }

    fn pending(&self) -> Vec<u16> {
        Vec::new()
    }

    fn restore_pending(&mut self, heads: &[u16], _: &[Queue]) -> Result<(), Malformed> {
        if heads.is_empty() { Ok(()) } else { Err(Malformed::new("a network device with requests under way")) }
    }

    fn work(&self) -> Option<Arc<Work>> {
        None
    }
}
