//! What the kernel knows of a connection: how much of what was written is still here, and whether it is the peer that does not read.
#![expect(unsafe_code, reason = "there is no safe interface to TCP_INFO")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// The part of the kernel's `struct tcp_info` that is of interest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Segments sent and not acknowledged.
    pub unacked: u32,
    /// Bytes written and never sent.
    pub not_sent: u32,
    /// For how long, in its life, the connection had something to send.
    pub busy: Duration,
    /// For how much of that the peer's window was closed.
    pub window_closed: Duration,
}

/// Offsets in `struct tcp_info` (linux/tcp.h), which only ever grows at its end.
const UNACKED_AT: usize = 24;
const NOT_SENT_AT: usize = 144;
const BUSY_AT: usize = 168;
const WINDOW_CLOSED_AT: usize = 176;
/// With all of these in it (Linux 4.10).
const LENGTH_LEAST: usize = 184;

/// Asks the kernel.
///
/// # Errors
/// The kernel's; [`io::ErrorKind::Unsupported`] from one that is too old.
pub fn tcp_info(socket: impl AsFd) -> io::Result<TcpInfo> {
    let mut buffer = [0_u8; 256];
    let mut length = libc::socklen_t::try_from(buffer.len()).unwrap_or(0);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open while `socket` is borrowed; the kernel writes at most `length` bytes into the buffer, which has as many, and then
    // how many into `length`.
    let failed =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, buffer.as_mut_ptr().cast(), &raw mut length) }
            != 0;
    if failed {
        return Err(io::Error::last_os_error());
    }
    if usize::try_from(length).unwrap_or(0) < LENGTH_LEAST {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let number = |at: usize| u32::from_ne_bytes(std::array::from_fn(|n| buffer[at + n]));
    let micros = |at: usize| Duration::from_micros(u64::from_ne_bytes(std::array::from_fn(|n| buffer[at + n])));
    Ok(TcpInfo {
        unacked: number(UNACKED_AT),
        not_sent: number(NOT_SENT_AT),
        busy: micros(BUSY_AT),
        window_closed: micros(WINDOW_CLOSED_AT),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_peer_that_does_not_read_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_theirs, _) = listener.accept().unwrap();
        let idle = tcp_info(&ours).unwrap();
        assert_eq!((idle.unacked, idle.not_sent, idle.window_closed), (0, 0, Duration::ZERO));
        ours.set_nonblocking(true).unwrap();
        while ours.write(&[0; 1 << 16]).is_ok() {}
        let began = std::time::Instant::now();
        loop {
            let full = tcp_info(&ours).unwrap();
            if full.not_sent > 0 && full.window_closed > Duration::from_millis(5) && full.busy >= full.window_closed {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{full:?}");
            std::thread::yield_now();
        }
    }
}
