//! virtio-blk over virtio-mmio, modern or legacy: many requests under way, flushes among them.
//!
//! Like the network's, the driver on top of `virtio-drivers`' ring is our own: the crate's takes a flush only when nothing else is
//! under way, and waits for it.
#![expect(unsafe_code, reason = "memory shared with a device")]

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use kv::log::{Blocks, IoFailed, SECTOR};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;
use virtio_drivers::transport::mmio::MmioTransport;

use crate::boot;
use crate::disks::Tag;
use crate::virtio::{self, Identity};

const REQUESTS: u16 = 0;
const QUEUE: usize = 128;
/// Requests under way: each takes three descriptors at most.
const SLOTS: usize = QUEUE / 3;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
    Flush,
}

/// A request that the device has done.
pub(crate) struct Finished {
    pub(crate) tag: Tag,
    pub(crate) data: Vec<u8>,
    pub(crate) result: Result<(), IoFailed>,
}

/// A request under way.
struct Slot {
    op: Op,
    header: [u8; 16],
    data: Vec<u8>,
    status: [u8; 1],
    tag: Tag,
}

/// A disk.
pub(crate) struct Blk {
    transport: MmioTransport<'static>,
    queue: VirtQueue<Identity, QUEUE>,
    slots: Box<[Slot]>,
    free: Vec<usize>,
    /// Which slot the descriptor of that number belongs to.
    carried: [usize; QUEUE],
    /// Flushes of a device that has no cache: done as soon as they are asked for.
    instant: VecDeque<Tag>,
    news: bool,
    sectors: u64,
    read_only: bool,
    has_cache: bool,
}

impl Blk {
    /// Starts a block device.
    ///
    /// # Errors
    /// It cannot be used.
    pub(crate) fn start(mut transport: MmioTransport<'static>) -> Result<Self, &'static str> {
        let offered = virtio::negotiate(&mut transport, FEATURE_READ_ONLY | FEATURE_FLUSH)?;
        let size = transport.read_consistent(|| {
            let [low, high] = [transport.read_config_space::<u32>(0)?, transport.read_config_space::<u32>(4)?];
            Ok(u64::from(low) | (u64::from(high) << 32))
        });
        let sectors = size.map_err(|_| "cannot read the size of a disk")?;
        let queue = VirtQueue::new(&mut transport, REQUESTS, false, false).map_err(|_| "cannot set up a queue")?;
        transport.finish_init();
        let slot = || Slot { op: Op::Flush, header: [0; 16], data: Vec::new(), status: [0], tag: Tag::Boot };
        Ok(Self {
            transport,
            queue,
            slots: (0..SLOTS).map(|_| slot()).collect(),
            free: (0..SLOTS).rev().collect(),
            carried: [0; QUEUE],
            instant: VecDeque::new(),
            news: false,
            sectors,
            read_only: offered & FEATURE_READ_ONLY != 0,
            has_cache: offered & FEATURE_FLUSH != 0,
        })
    }

    /// Its size in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether there is room for a request.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether requests are under way.
    pub(crate) fn is_busy(&self) -> bool {
        self.free.len() < SLOTS || !self.instant.is_empty()
    }

    /// Begins a request; there is room for it. `data` is what to write, or where to read to: whole sectors, none for a flush.
    /// The device is told by [`Self::kick`].
    pub(crate) fn submit(&mut self, op: Op, sector: u64, data: Vec<u8>, tag: Tag) {
        if op == Op::Flush && !self.has_cache {
            self.instant.push_back(tag);
            return;
        }
        let index = self.free.pop().expect("the caller asked for room");
        let slot = &mut self.slots[index];
        let kind: u32 = match op {
            Op::Read => 0,
            Op::Write => 1,
            Op::Flush => 4,
        };
        slot.header[..4].copy_from_slice(&kind.to_le_bytes());
        slot.header[8..].copy_from_slice(&sector.to_le_bytes());
        // No device writes this.
        slot.status = [0xff];
        (slot.op, slot.data, slot.tag) = (op, data, tag);
        let Slot { header, data, status, .. } = slot;
        // SAFETY: the slot is not touched until the device has used it, and never moves.
        let token = unsafe {
            match op {
                Op::Read => self.queue.add(&[header], &mut [data, status]),
                Op::Write => self.queue.add(&[header, data], &mut [status]),
                Op::Flush => self.queue.add(&[header], &mut [status]),
            }
        };
        let token = token.expect("there are three descriptors for each slot");
        self.carried[usize::from(token)] = index;
        self.news = true;
    }

    /// Tells the device what was added.
    pub(crate) fn kick(&mut self) {
        if core::mem::take(&mut self.news) {
            // The device's flag must be read after the ring was written.
            fence(Ordering::SeqCst);
            if self.queue.should_notify() {
                self.transport.notify(REQUESTS);
            }
        }
    }

    /// The next request that is done.
    pub(crate) fn finished(&mut self) -> Option<Finished> {
        if let Some(tag) = self.instant.pop_front() {
            return Some(Finished { tag, data: Vec::new(), result: Ok(()) });
        }
        let token = self.queue.peek_used()?;
        let index = *self.carried.get(usize::from(token))?;
        let Slot { op, header, data, status, tag } = self.slots.get_mut(index)?;
        // SAFETY: these buffers were added under this token, and the device is done with them.
        let popped = unsafe {
            match op {
                Op::Read => self.queue.pop_used(token, &[header], &mut [data, status]),
                Op::Write => self.queue.pop_used(token, &[header, data], &mut [status]),
                Op::Flush => self.queue.pop_used(token, &[header], &mut [status]),
            }
        };
        popped.ok()?;
        // SAFETY: a byte that we own; the compiler does not know that the device wrote to it.
        let status = unsafe { status.as_ptr().read_volatile() };
        let (tag, data) = (*tag, core::mem::take(data));
        self.free.push(index);
        Some(Finished { tag, data, result: if status == 0 { Ok(()) } else { Err(IoFailed) } })
    }

    /// Lets the device interrupt, or not. True if it has something already that is done.
    pub(crate) fn set_interrupts(&mut self, on: bool) -> bool {
        self.queue.set_dev_notify(on);
        fence(Ordering::SeqCst);
        self.queue.can_pop()
    }
}

/// Before the loop runs: one request at a time, slept for.
impl Blocks for &mut Blk {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn read(&mut self, sector: u64, into: &mut [u8]) -> Result<(), IoFailed> {
        let end = sector.checked_add((into.len() / SECTOR) as u64).ok_or(IoFailed)?;
        let mut data = Vec::new();
        if end > self.sectors || data.try_reserve_exact(into.len()).is_err() {
            return Err(IoFailed);
        }
        data.resize(into.len(), 0);
        self.submit(Op::Read, sector, data, Tag::Boot);
        self.set_interrupts(true);
        self.kick();
        let finished = loop {
            let seen = boot::events();
            if let Some(finished) = self.finished() {
                break finished;
            }
            boot::wait(seen);
        };
        finished.result?;
        into.copy_from_slice(&finished.data);
        Ok(())
    }
}
