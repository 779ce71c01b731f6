//! A replication wire that behaves badly: late, lossy, out of order, slow, or deaf in one direction. Not every kernel can do this by itself
//! (netem is often left out), so while a wire is bad, a thread carries its frames from one switch port to the other.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

use super::network::Network;
use super::rng::Rng;
use super::{Error, Node, Result, sys};

/// Largest frame: 64 KiB of segments that the sender left to its network card, and the headers.
const FRAME_MAX: usize = 66 << 10;
/// Bytes on their way in one direction, beyond which frames are dropped, as a switch would.
const QUEUE_BYTES_MAX: usize = 512 << 10;
/// Longest wait before the stop flag is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What a wire does to the frames of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Each frame takes this long, at least.
    pub delay: Duration,
    /// … and up to this much more. Later frames do not overtake because of it.
    pub jitter: Duration,
    /// Frames of a thousand that vanish.
    pub lost_permille: u64,
    /// Frames of a thousand that are overtaken by those sent up to 20 ms after them.
    pub overtaken_permille: u64,
    /// Bytes a second; 0 for as fast as it goes.
    pub rate: u64,
}

impl Shape {
    /// A good wire.
    pub const GOOD: Self =
        Self { delay: Duration::ZERO, jitter: Duration::ZERO, lost_permille: 0, overtaken_permille: 0, rate: 0 };
    /// Nothing arrives.
    pub const DEAD: Self = Self { lost_permille: 1_000, ..Self::GOOD };
}

/// What both directions do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shapes {
    /// To host a.
    pub to_a: Shape,
    /// To host b.
    pub to_b: Shape,
}

impl Shapes {
    /// The same both ways.
    #[must_use]
    pub fn both(shape: Shape) -> Self {
        Self { to_a: shape, to_b: shape }
    }

    /// One host hears nothing any more, and is heard.
    #[must_use]
    pub fn deaf(node: Node) -> Self {
        match node {
            Node::A => Self { to_a: Shape::DEAD, to_b: Shape::GOOD },
            Node::B => Self { to_a: Shape::GOOD, to_b: Shape::DEAD },
        }
    }
}

/// A bad wire in place. [`Shaper::finish`] puts the good one back.
pub struct Shaper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<u64>>,
}

impl Shaper {
    /// Takes the replication link out of its switch and carries its frames as `shapes` says.
    pub fn start(network: &Network, shapes: Shapes, seed: u64) -> Result<Self> {
        let opened = network.client().run(|| -> std::io::Result<_> {
            let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
            let open = |name| sys::PacketSocket::open(1)?.on_one_wire(name_to_index(&any, name)?);
            Ok((open("repl-a")?, open("repl-b")?))
        });
        let (a, b) = opened.map_err(Error::io("cannot open the replication wire"))?;
        network.client().ip("link set repl-a nomaster\nlink set repl-b nomaster\n")?;
        let stop = Arc::new(AtomicBool::new(false));
        let carry = {
            let stop = Arc::clone(&stop);
            move || {
                let mut rng = Rng::new(seed);
                let mut ways = [Way::new(shapes.to_b), Way::new(shapes.to_a)];
                let ports = [&a, &b];
                while !stop.load(Ordering::Acquire) {
                    carry(ports, &mut ways, &mut rng)?;
                }
                // What is still on its way arrives now: a wire that becomes good loses nothing.
                for (way, to) in ways.iter_mut().zip([&b, &a]) {
                    way.give(to, Instant::now() + Duration::from_secs(3_600));
                }
                Ok(ways.iter().map(|way| way.carried).sum())
            }
        };
        let thread =
            thread::Builder::new().name("shaper".into()).spawn(carry).map_err(Error::io("cannot start a thread"))?;
        Ok(Self { stop, thread })
    }

    /// Puts the good wire back. How many frames the bad one carried.
    ///
    /// # Panics
    /// If its thread panicked.
    pub fn finish(self, network: &Network) -> Result<u64> {
        self.stop.store(true, Ordering::Release);
        let carried = self.thread.join().expect("the shaper does not panic");
        network.client().ip("link set repl-a master repl\nlink set repl-b master repl\n")?;
        carried.map_err(Error::io("carrying frames of the replication wire"))
    }
}

/// One direction.
struct Way {
    shape: Shape,
    queue: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    queued_bytes: usize,
    /// When the last frame that kept its place is due.
    last_due: Instant,
    /// Until when the wire is busy with frames before, at its rate.
    busy_until: Instant,
    number: u64,
    carried: u64,
}

impl Way {
    fn new(shape: Shape) -> Self {
        let now = Instant::now();
        Self { shape, queue: BinaryHeap::new(), queued_bytes: 0, last_due: now, busy_until: now, number: 0, carried: 0 }
    }

    fn take(&mut self, frame: &[u8], now: Instant, rng: &mut Rng) {
        if rng.range(0, 1_000) < self.shape.lost_permille || self.queued_bytes + frame.len() > QUEUE_BYTES_MAX {
            return;
        }
        self.busy_until = self.busy_until.max(now);
        let micros = u64::try_from(frame.len()).unwrap_or(u64::MAX).saturating_mul(1_000_000);
        // No rate: the wire is never busy.
        self.busy_until += Duration::from_micros(micros.checked_div(self.shape.rate).unwrap_or(0));
        let jitter = match self.shape.jitter {
            Duration::ZERO => Duration::ZERO,
            most => rng.duration(Duration::ZERO, most),
        };
        let due = self.busy_until + self.shape.delay + jitter;
        let due = if rng.range(0, 1_000) < self.shape.overtaken_permille {
            due + rng.duration(Duration::ZERO, Duration::from_millis(20))
        } else {
            self.last_due = self.last_due.max(due);
            self.last_due
        };
        self.number += 1;
        self.queued_bytes += frame.len();
        self.queue.push(Reverse((due, self.number, frame.to_vec())));
    }

    fn give(&mut self, to: &sys::PacketSocket, now: Instant) {
        while self.queue.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
            let Some(Reverse((_, _, frame))) = self.queue.pop() else { return };
            self.queued_bytes -= frame.len();
            // A port that takes nothing loses frames, as every wire may.
            if to.send(&frame).is_ok() {
                self.carried += 1;
            }
        }
    }
}

/// Waits for frames or for one that is due; `ports` are of a and b, `ways` lead from a and from b.
fn carry(ports: [&sys::PacketSocket; 2], ways: &mut [Way; 2], rng: &mut Rng) -> std::io::Result<()> {
    let now = Instant::now();
    let due = ways.iter().filter_map(|way| way.queue.peek().map(|Reverse((due, ..))| *due)).min();
    let wait = due.map_or(LOOK, |due| due.saturating_duration_since(now).min(LOOK));
    let mut ready = ports.map(|port| PollFd::new(port, PollFlags::IN));
    let wait = Timespec::try_from(wait).map_err(std::io::Error::other)?;
    match poll(&mut ready, Some(&wait)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(e.into()),
    }
    let ready = ready.map(|port| port.revents().contains(PollFlags::IN));
    let mut buffer = vec![0; FRAME_MAX];
    for (from, way) in ways.iter_mut().enumerate() {
        if ready[from]
            && let Some(packet) = ports[from].receive(&mut buffer)?
        {
            way.take(&buffer[..packet.len], Instant::now(), rng);
        }
        way.give(ports[1 - from], Instant::now());
    }
    Ok(())
}
