//! A witness on the guest LAN: which host sent frames in the guest's name, and when.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

use super::network::{GUEST_MAC, Network, Wire};
use super::{Error, Node, Result, clock, sys};

/// One frame that carried the guest's address as its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// When it was read, microseconds of [`clock::mono_us`]. The order of frames is exact, their time is not.
    pub at_us: u64,
    /// The host whose cable it came from.
    pub from: Node,
    /// Its `EtherType`: 0x0800 is IPv4, 0x0806 ARP, 0x8035 RARP.
    pub ether_type: u16,
}

/// A witness at work.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Seen>>>,
}

impl Watch {
    /// Begins to watch both hosts' ports of the guest LAN.
    pub fn start(network: &Network) -> Result<Self> {
        let (socket, node_of) = lan_ports(network)?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new()
            .name("watch".into())
            .spawn({
                let stop = Arc::clone(&stop);
                move || watch(&socket, node_of, &stop)
            })
            .map_err(Error::io("cannot start a thread"))?;
        Ok(Self { stop, thread })
    }

    /// Ends watching; the frames in the order in which they came.
    ///
    /// # Panics
    /// If the watching thread panicked.
    pub fn finish(self) -> Result<Vec<Seen>> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("the watch does not panic")
    }
}

/// A socket that sees what comes out of both hosts' cables on the guest LAN, and which host an interface's number belongs to.
pub(super) fn lan_ports(
    network: &Network,
) -> Result<(sys::PacketSocket, impl Fn(u32) -> Option<Node> + Send + 'static)> {
    let opened = network.client().run(|| -> std::io::Result<_> {
        let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        let a = name_to_index(&any, Wire::Lan(Node::A).port())?;
        let b = name_to_index(&any, Wire::Lan(Node::B).port())?;
        Ok((sys::PacketSocket::open(20)?, a, b))
    });
    let (socket, a, b) = opened.map_err(Error::io("cannot watch the guest LAN"))?;
    let node_of = move |interface: u32| match interface {
        i if i == a => Some(Node::A),
        i if i == b => Some(Node::B),
        _ => None,
    };
    Ok((socket, node_of))
}

fn watch(socket: &sys::PacketSocket, node_of: impl Fn(u32) -> Option<Node>, stop: &AtomicBool) -> Result<Vec<Seen>> {
    let mut seen = Vec::new();
    let mut header = [0_u8; 14];
    let mut until = None;
    loop {
        if until.is_none() && stop.load(Ordering::Acquire) {
            // What was on the wire when the caller asked is still in the socket's queue.
            until = Some(Instant::now() + Duration::from_millis(100));
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            return Ok(seen);
        }
        let packet = socket.receive(&mut header).map_err(Error::io("watching the guest LAN"))?;
        let Some(packet) = packet else {
            continue;
        };
        if packet.len == header.len()
            && header[6..12] == GUEST_MAC
            && let Some(from) = node_of(packet.interface)
        {
            let ether_type = u16::from_be_bytes([header[12], header[13]]);
            seen.push(Seen { at_us: clock::mono_us(), from, ether_type });
        }
    }
}

/// Whether the guest's frames came from one host and later from the other: how often they changed sides.
#[must_use]
pub fn changes(seen: &[Seen]) -> usize {
    seen.windows(2).filter(|pair| pair[0].from != pair[1].from).count()
}
