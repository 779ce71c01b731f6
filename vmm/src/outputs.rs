//! Where everything externally visible leaves the machine, and where frames come in.

use std::io;
use std::os::fd::BorrowedFd;

/// The one way out. Devices hand over each byte here, on the thread that runs them, and never write to the world themselves.
///
/// Implementations must not block: a held frame is queued, not waited for.
pub trait Outputs: Send + Sync {
    /// The guest sent an Ethernet frame (no virtio header) on network device `nic`.
    fn frame(&self, nic: u8, frame: &[u8]);
    /// The guest wrote to its serial console.
    fn console(&self, bytes: &[u8]);
}

/// Where inbound Ethernet frames come from: a tap, or a socket pair in tests.
pub trait FramePort: Send + Sync {
    /// A descriptor that becomes readable when a frame waits.
    fn as_fd(&self) -> BorrowedFd<'_>;
    /// Takes one waiting frame into `buffer`; its length, or `None` when nothing waits. Never blocks.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>>;
}
