//! Ports for Ethernet frames: a tap device, and a socket pair for tests in one process.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use crate::outputs::FramePort;

/// Why a tap could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be that of a network interface.
    #[error("{0:?} is not the name of a network interface: 1 to 15 letters, digits, '-', '_' or '.'")]
    Name(String),
    /// The host has no tap devices.
    #[error("this host has no /dev/net/tun: load the tun module")]
    NoTun(#[source] io::Error),
    /// This user may not.
    #[error(
        "no permission to open the tap {name}: run as root, or create it with `ip tuntap add {name} mode tap user NAME`"
    )]
    Permission {
        /// The interface.
        name: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Another process has it open.
    #[error("the tap {name} is in use by another process")]
    Busy {
        /// The interface.
        name: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// An interface of that name is no tap.
    #[error("{name} exists and is not a tap")]
    NotATap {
        /// The interface.
        name: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot open the tap {name}")]
    Host {
        /// The interface.
        name: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// One end of a tap device: each read is one frame in, each write one frame out. Never blocks.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens the tap `name`, which is created when it does not exist and this process may.
    pub fn open(name: &str) -> Result<Self, TapError> {
        if !is_interface_name(name) {
            return Err(TapError::Name(name.into()));
        }
        let file = open_tun().map_err(|source| match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => TapError::Permission { name: name.into(), source },
            _ => TapError::NoTun(source),
        })?;
        attach(&file, name).map_err(|source| {
            let name = name.to_owned();
            match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, source },
                Some(libc::EBUSY) => TapError::Busy { name, source },
                Some(libc::EINVAL) => TapError::NotATap { name, source },
                _ => TapError::Host { name, source },
            }
        })?;
        Ok(Self { file, name: name.into() })
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sends one frame. `WouldBlock` when the interface's queue is full, `Other` (EIO) when it is down.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send_whole((&self.file).write(frame), frame.len())
    }
}

impl FramePort for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        none_when_empty((&self.file).read(buffer))
    }
}

/// One end of a socket pair that carries frames like a cable.
#[derive(Debug)]
pub struct SocketPort(UnixDatagram);

impl SocketPort {
    /// Both ends of a cable.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = UnixDatagram::pair()?;
        a.set_nonblocking(true)?;
        b.set_nonblocking(true)?;
        Ok((Self(a), Self(b)))
    }

    /// Sends one frame. `WouldBlock` when the other end is full.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send_whole(self.0.send(frame), frame.len())
    }
}

impl FramePort for SocketPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        none_when_empty(self.0.recv(buffer))
    }
}

fn send_whole(sent: io::Result<usize>, length: usize) -> io::Result<()> {
    if sent? == length { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn none_when_empty(received: io::Result<usize>) -> io::Result<Option<usize>> {
    match received {
        Ok(n) => Ok(Some(n)),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Stricter than the kernel, which would also take control characters, and expands a `%d`.
fn is_interface_name(name: &str) -> bool {
    let fits = !name.is_empty() && name.len() < libc::IFNAMSIZ && name != "." && name != "..";
    fits && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

fn open_tun() -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")
}

#[expect(unsafe_code, reason = "the ioctl that names a tap")]
fn attach(file: &File, name: &str) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: `ifreq` is plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open, and the kernel reads and writes one `ifreq`.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tap_names_that_are_none_are_refused_before_anything_is_opened() {
        for name in ["", "a/b", "tap%d", "sixteen-letters-", "..", "tap 0", "tap\n"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn socket_port_keeps_frames_apart() {
        let (a, b) = SocketPort::pair().unwrap();
        let mut buffer = [0; 64];
        assert_eq!(b.receive(&mut buffer).unwrap(), None);
        a.send(&[1, 2, 3]).unwrap();
        a.send(&[4]).unwrap();
        assert_eq!(b.receive(&mut buffer).unwrap(), Some(3));
        assert_eq!(b.receive(&mut buffer).unwrap(), Some(1));
        assert_eq!(buffer[0], 4);
    }
}
