//! virtio-blk: the vCPU's thread hands requests over, worker threads carry them out.
//!
//! What the guest asked for and has not got back is the device's own state, as the heads of the chains in the order in which they came;
//! everything else about a request is in the guest's memory, and is read again after a restore.

mod request;
mod schedule;
mod work;

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;

use super::{BrokenQueue, VirtioDevice};
use crate::config::DiskConfig;
use crate::devices::host_io::Pumped;
use crate::disk::{Disk, DiskSerial, SECTOR_BYTES};
use crate::memory::TrackedMemory;
use crate::outputs::FramePort;
use crate::state::codec::{Encoder, Malformed};
use request::{Kind, Limits, MAX_ZERO_SECTORS, Request, S_OK, SEG_MAX, SIZE_MAX, scatter};
#[cfg(any(test, fuzzing))]
pub(crate) use work::Worker;
pub(crate) use work::{Work, Workers};

const REQUESTS: usize = 0;
const QUEUE_SIZES: [u16; 1] = [128];
const BLOCK_BYTES: u32 = 512;
const _: () = assert!(BLOCK_BYTES as u64 == SECTOR_BYTES);

/// A disk.
pub(crate) struct Block {
    serial: DiskSerial,
    limits: Limits,
    config: Vec<u8>,
    work: Arc<Work>,
    /// Heads that a restored device has yet to submit again, before anything new.
    restored: Vec<u16>,
}

impl Block {
    pub(crate) fn new(config: &DiskConfig, disk: Arc<dyn Disk>) -> Self {
        let DiskConfig { bytes, read_only, serial } = config;
        Self {
            serial: *serial,
            limits: Limits { bytes: *bytes, read_only: *read_only },
            config: config_space(*bytes),
            work: Arc::new(Work::new(disk, serial.to_string())),
            restored: Vec::new(),
        }
    }

    /// Takes a request over; true when it was answered at once.
    fn submit(&self, head: u16, queue: &mut Queue, ram: &TrackedMemory) -> Result<bool, BrokenQueue> {
        let request = Request::parse(head, queue, ram, self.limits).map_err(|e| BrokenQueue::new(REQUESTS, e))?;
        if let Some(access) = request.access() {
            return match self.work.push(access, request) {
                true => Ok(false),
                false => Err(BrokenQueue::new(REQUESTS, format!("request {head} is under way already"))),
            };
        }
        let (status, written) = match request.kind {
            Kind::Refused(status) => (status, 0),
            _ => (S_OK, self.write_serial(&request, ram)?),
        };
        give_back(queue, ram, &request, status, written.saturating_add(1))?;
        Ok(true)
    }

    fn write_serial(&self, request: &Request, ram: &TrackedMemory) -> Result<u32, BrokenQueue> {
        let room: usize = request.data.iter().map(|segment| segment.len).sum();
        let serial = self.serial.bytes();
        let serial = serial.get(..room.min(serial.len())).unwrap_or_default();
        scatter(ram, &request.data, 0, serial).map_err(|e| BrokenQueue::new(REQUESTS, e))?;
        Ok(u32::try_from(serial.len()).unwrap_or(0))
    }
}

fn give_back(
    queue: &mut Queue,
    ram: &TrackedMemory,
    request: &Request,
    status: u8,
    written: u32,
) -> Result<(), BrokenQueue> {
    ram.write_obj(status, request.status).map_err(|e| BrokenQueue::new(REQUESTS, e))?;
    queue.add_used(ram, request.head, written).map_err(|e| BrokenQueue::new(REQUESTS, e))
}

/// `struct virtio_blk_config` up to the fields of the features offered.
fn config_space(bytes: u64) -> Vec<u8> {
    let mut out = Encoder::default();
    out.u64(bytes / SECTOR_BYTES);
    out.u32(SIZE_MAX);
    out.u32(SEG_MAX);
    out.u32(0); // Geometry.
    out.u32(BLOCK_BYTES);
    out.u64(0); // Topology.
    out.u32(0); // Write-back, number of queues.
    out.u32(MAX_ZERO_SECTORS); // To discard.
    out.u32(1); // Ranges in one discard.
    out.u32(1); // Alignment of discards.
    out.u32(MAX_ZERO_SECTORS); // Of zeroes.
    out.u32(1); // Ranges in one request for zeroes.
    out.u32(1); // Zeroes may unmap.
    out.into_bytes()
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let all = 1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        let other = match self.limits.read_only {
            true => 1 << VIRTIO_BLK_F_RO,
            false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        all | other | 1 << VIRTIO_BLK_F_FLUSH
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn negotiated(&mut self, features: u64) {
        self.work.set_write_through(features & 1 << VIRTIO_BLK_F_FLUSH == 0);
    }

    fn kicked(&mut self, _: usize, queues: &mut [Queue], ram: &TrackedMemory) -> Result<bool, BrokenQueue> {
        let broken = |e: virtio_queue::Error| BrokenQueue::new(REQUESTS, e);
        let Some(queue) = queues.get_mut(REQUESTS) else { return Ok(false) };
        let mut answered = false;
        for head in std::mem::take(&mut self.restored) {
            answered |= self.submit(head, queue, ram)?;
        }
        let waiting = queue.avail_idx(ram, Ordering::Acquire).map_err(broken)? - Wrapping(queue.next_avail());
        if waiting.0 > queue.size() {
            return Err(broken(virtio_queue::Error::InvalidAvailRingIndex));
        }
        for _ in 0..waiting.0 {
            let Some(chain) = queue.iter(ram).map_err(broken)?.next() else { break };
            answered |= self.submit(chain.head_index(), queue, ram)?;
        }
        Ok(answered)
    }

    fn pump(&mut self, queues: &mut [Queue], ram: &TrackedMemory) -> Result<(Option<usize>, Pumped), BrokenQueue> {
        let Some(queue) = queues.get_mut(REQUESTS) else { return Ok((None, Pumped::Idle)) };
        let mut used = None;
        while let Some((done, request)) = self.work.next_done() {
            // A queue that the driver took back meanwhile has no place for an answer.
            if queue.ready() {
                give_back(queue, ram, &request, done.status, done.written)?;
                used = Some(REQUESTS);
            }
        }
        Ok((used, Pumped::Idle))
    }

    fn host_port(&self) -> Option<&dyn FramePort> {
        None
    }

    fn queue_inbound(&mut self, _: Vec<Vec<u8>>) {}

    fn reset(&mut self) {
        self.restored.clear();
        self.work.forget();
    }

    fn pending(&self) -> Vec<u16> {
        // Either of the two is empty: a restored device submits before it takes anything new.
        self.restored.iter().copied().chain(self.work.heads()).collect()
    }

    fn restore_pending(&mut self, heads: &[u16], queues: &[Queue]) -> Result<(), Malformed> {
        let size = queues.get(REQUESTS).map_or(0, QueueT::size);
        for (at, head) in heads.iter().enumerate() {
            if *head >= size || heads.iter().take(at).any(|earlier| earlier == head) {
                return Err(Malformed(format!("request {head} under way in a queue of {size}, or twice")));
            }
        }
        self.restored = heads.to_vec();
        Ok(())
    }

    fn work(&self) -> Option<Arc<Work>> {
        Some(Arc::clone(&self.work))
    }
}
