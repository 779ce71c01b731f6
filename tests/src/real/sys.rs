//! The few calls for which no safe wrapper exists.
#![expect(unsafe_code, reason = "unshare, pre_exec and packet sockets have no safe interface")]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Gives the calling thread a new, empty network namespace.
pub(super) fn unshare_net() -> io::Result<()> {
    // SAFETY: the flag changes which network interfaces this thread sees; it does not touch the descriptor table or memory.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Gives the calling thread a list of mounts of its own, and with it a root and working directory of its own.
pub(super) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: the flag changes what paths mean to this thread; it does not touch the descriptor table or memory.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?)
}

/// Makes the child die (SIGKILL) when the thread that starts it ends, for whatever cause.
pub(super) fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let arm = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died between the fork and the line above; then nobody would ever send the signal.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::Error::other("the parent has died")) }
    };
    // SAFETY: between fork and exec only two system calls are made; the error path, which may allocate, leads to an exit.
    unsafe { command.pre_exec(arm) };
}

/// `SIOCGSTAMPNS` of `asm-generic/sockios.h`, the form for 64-bit times.
const SIOCGSTAMPNS: libc::Ioctl = 0x8907;
/// `PACKET_VNET_HDR` of `linux/if_packet.h`.
const PACKET_VNET_HDR: i32 = 15;

/// A socket that sees every frame coming in on any interface of the calling thread's namespace, in order.
pub(super) struct PacketSocket(OwnedFd);

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where and what of one frame.
pub(super) struct Packet {
    /// Index of the interface on which it came in.
    pub(super) interface: u32,
    /// Bytes of it that fit into the buffer.
    pub(super) len: usize,
}

impl PacketSocket {
    /// Opens the socket, with `timeout_ms` as the longest time that [`Self::receive`] waits.
    pub(super) fn open(timeout_ms: u32) -> io::Result<Self> {
        let every_protocol = i32::from(u16::try_from(libc::ETH_P_ALL).expect("a 16-bit number").to_be());
        // SAFETY: no pointers are passed; the descriptor is checked before it is owned.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, every_protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just returned this descriptor and nobody else knows it.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        socket.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1_i32)?;
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(16_i32 << 20))?;
        let timeout =
            libc::timeval { tv_sec: i64::from(timeout_ms / 1_000), tv_usec: i64::from(timeout_ms % 1_000) * 1_000 };
        socket.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout)?;
        Ok(socket)
    }

    /// Narrows the socket to one interface, and makes each frame carry the kernel's notes on its checksum and segments in front, both
    /// ways: so that frames which a sender left half finished for its network card can be passed on as they are.
    pub(super) fn on_one_wire(self, interface: u32) -> io::Result<Self> {
        self.set(libc::SOL_PACKET, PACKET_VNET_HDR, &1_i32)?;
        // SAFETY: all-zero is a valid `sockaddr_ll`.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = u16::try_from(libc::AF_PACKET).expect("a small constant");
        to.sll_protocol = u16::try_from(libc::ETH_P_ALL).expect("a 16-bit number").to_be();
        to.sll_ifindex = i32::try_from(interface).map_err(io::Error::other)?;
        let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).expect("an address's size");
        // SAFETY: the address is valid for reads of the length given.
        let result = unsafe { libc::bind(self.0.as_raw_fd(), (&raw const to).cast(), len) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // Between its making and its binding the socket heard every interface.
        let mut strays = 0;
        while strays < 1_000 && self.receive(&mut [0; 64])?.is_some() {
            strays += 1;
        }
        Ok(self)
    }

    /// Sends what [`Self::receive`] of such a socket gave.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the buffer is valid for reads of its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        let len = libc::socklen_t::try_from(size_of::<T>()).expect("an option's size");
        // SAFETY: `value` is valid for `len` bytes for the duration of the call.
        let result =
            unsafe { libc::setsockopt(self.0.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), len) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// How long ago the frame that was received last had come in: a busy host may let us wait for the processor.
    pub(super) fn age(&self) -> Duration {
        // SAFETY: all-zero is a valid `timespec`.
        let mut stamp: libc::timespec = unsafe { std::mem::zeroed() };
        // SAFETY: this request writes one `timespec`.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), SIOCGSTAMPNS, &raw mut stamp) };
        let parts = (u64::try_from(stamp.tv_sec), u32::try_from(stamp.tv_nsec));
        match parts {
            (Ok(seconds), Ok(nanos)) if result == 0 => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                since.saturating_sub(Duration::new(seconds, nanos))
            }
            // The first question only makes the kernel begin to stamp.
            _ => Duration::ZERO,
        }
    }

    /// The next frame, `None` when none came in time.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Packet>> {
        // SAFETY: all-zero is a valid `sockaddr_ll`.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut from_len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).expect("an address's size");
        // SAFETY: the buffer and the address are valid for writes of the lengths given.
        let got = unsafe {
            libc::recvfrom(
                self.0.as_raw_fd(),
                buffer.as_mut_ptr().cast::<c_void>(),
                buffer.len(),
                0,
                (&raw mut from).cast(),
                &raw mut from_len,
            )
        };
        match usize::try_from(got) {
            Ok(len) => Ok(Some(Packet { interface: u32::try_from(from.sll_ifindex).unwrap_or(0), len })),
            Err(_) => match io::Error::last_os_error() {
                // An interface that goes down says so once; it may come back.
                e if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::NetworkDown
                ) =>
                {
                    Ok(None)
                }
                e => Err(e),
            },
        }
    }
}
