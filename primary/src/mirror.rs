//! Inbound frames, told to the backup as they arrive.
//!
//! A request that reached the guest in an epoch that is never committed was delivered, for its sender's kernel, to a host that died:
//! the sender waits for its retransmission timeout, 200 ms and more, which is longer than a takeover. So the backup keeps a copy of each
//! inbound frame until the epoch in which it arrived is committed, and a new owner delivers what it kept. To the guest that is a network
//! that delivers late or twice, which every protocol above Ethernet allows for.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm::FramePort;

use crate::link::Link;

/// Where inbound frames are told to, while somebody wants to know.
#[derive(Default)]
pub struct Mirror {
    link: Mutex<Option<Link>>,
    /// What is mirrored, by network device.
    taps: Mutex<Vec<(u8, Arc<dyn FramePort>)>>,
    /// Read for each frame, without the lock.
    attached: AtomicBool,
}

impl Mirror {
    /// From now on frames are told over `link`.
    pub fn attach(&self, link: Link) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link);
        self.attached.store(true, Ordering::Release);
    }

    /// Nobody wants to know any more.
    pub fn detach(&self) {
        self.attached.store(false, Ordering::Release);
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// All ports that are mirrored, for somebody else than the machine to read.
    pub fn ports(self: &Arc<Self>) -> Vec<Arc<dyn FramePort>> {
        let taps = self.taps.lock().unwrap_or_else(PoisonError::into_inner);
        let port = |(nic, inner): &(u8, Arc<dyn FramePort>)| -> Arc<dyn FramePort> {
            Arc::new(MirroredPort { inner: Arc::clone(inner), nic: *nic, mirror: Arc::clone(self) })
        };
        taps.iter().map(port).collect()
    }

    fn tell(&self, nic: u8, frame: &[u8]) {
        if self.attached.load(Ordering::Acquire)
            && let Some(link) = &*self.link.lock().unwrap_or_else(PoisonError::into_inner)
        {
            link.inbound(nic, frame);
        }
    }
}

/// A port whose frames are mirrored.
pub struct MirroredPort {
    inner: Arc<dyn FramePort>,
    nic: u8,
    mirror: Arc<Mirror>,
}

impl MirroredPort {
    /// Mirrors what network device `nic` takes from `inner`.
    pub fn new(inner: Arc<dyn FramePort>, nic: u8, mirror: Arc<Mirror>) -> Self {
        mirror.taps.lock().unwrap_or_else(PoisonError::into_inner).push((nic, Arc::clone(&inner)));
        Self { inner, nic, mirror }
    }
}

impl FramePort for MirroredPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let length = self.inner.receive(buffer)?;
        if let Some(length) = length {
            self.mirror.tell(self.nic, &buffer[..length]);
        }
        Ok(length)
    }
}
