//! Taps that listen and say nothing. Frames for the guest that arrive while nobody runs it are kept, the newest of them, and delivered
//! on activation: one lost frame costs its sender a retransmission timeout, more than the takeover.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vmm::FramePort;

/// Frames kept for each network device; of more, the oldest are dropped.
const FRAMES_KEPT: usize = 256;
/// Largest frame that a tap delivers.
const FRAME_BYTES_MAX: usize = 65_550;

/// The listening thread of all taps.
pub struct SilentTaps {
    stop: Arc<OwnedFd>,
    handle: JoinHandle<Vec<VecDeque<Vec<u8>>>>,
}

impl SilentTaps {
    /// Starts to listen on `ports`.
    ///
    /// # Errors
    /// No event descriptor or thread could be made.
    pub fn listen(ports: Vec<Arc<dyn FramePort>>) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let handle =
            std::thread::Builder::new().name("ft-silent-tap".into()).spawn(move || keep_newest(&ports, &stopped))?;
        Ok(Self { stop, handle })
    }

    /// Stops listening; the frames kept, for each network device.
    pub fn stop(self) -> Vec<(u8, Vec<Vec<u8>>)> {
        // An eventfd takes a one whenever its counter has room.
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).expect("an eventfd takes a one");
        let kept = self.handle.join().expect("the listening thread does not panic");
        (0u8..).zip(kept).map(|(nic, frames)| (nic, frames.into())).collect()
    }
}

fn keep_newest(ports: &[Arc<dyn FramePort>], stop: &OwnedFd) -> Vec<VecDeque<Vec<u8>>> {
    let mut kept = vec![VecDeque::new(); ports.len()];
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    loop {
        let mut fds: Vec<PollFd<'_>> =
            ports.iter().map(|p| PollFd::from_borrowed_fd(p.as_fd(), PollFlags::IN)).collect();
        fds.push(PollFd::new(stop, PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::warn!("the silent taps cannot be watched: {error}");
                return kept;
            }
        }
        let stopping = fds.last().is_some_and(|fd| !fd.revents().is_empty());
        for (port, frames) in ports.iter().zip(&mut kept) {
            take_waiting(&**port, frames, &mut buffer);
        }
        if stopping {
            return kept;
        }
    }
}

fn take_waiting(port: &dyn FramePort, frames: &mut VecDeque<Vec<u8>>, buffer: &mut [u8]) {
    // Bounded, so that a flood cannot keep an activation waiting.
    for _ in 0..FRAMES_KEPT {
        match port.receive(buffer) {
            Ok(Some(length)) => {
                if frames.len() == FRAMES_KEPT {
                    frames.pop_front();
                }
                frames.push_back(buffer[..length].to_vec());
            }
            Ok(None) => return,
            Err(error) => {
                log::debug!("a silent tap: {error}");
                return;
            }
        }
    }
}
