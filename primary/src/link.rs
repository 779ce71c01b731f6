//! The data connection to the backup: the only socket that carries guest state, on one thread that does nothing else. What the bytes mean is
//! [`crate::stream`]'s business.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, unbounded};
use failover::failpoint;
use mio::{Events, Interest, Poll, Token, Waker};
use replication_proto::{DiskChange, Epoch, GoodbyeReason, LinkError, PieceHashes, PiecesWanted, SenderConfig};

use crate::epoch::{CheckpointError, ROOM_PATIENCE, StagedCheckpoint};
use crate::metrics::Metrics;
use crate::outgoing::Outgoing;
use crate::output::Gate;
use crate::output::bell::Bell;
use crate::pacer::Reading;
use crate::staging::{Arena, StagedPages};
use crate::stream::{Stream, StreamEvent};
use crate::tcp_info::tcp_info;

const SOCKET: Token = Token(0);
const WAKE: Token = Token(1);
/// No further checkpoint is encoded while this many encoded bytes wait for the socket.
const ENCODED_BYTES_HIGH: usize = 8 << 20;
const READ_BUFFER_BYTES: usize = 64 << 10;
/// For `TCP_USER_TIMEOUT`.
const UNACKNOWLEDGED_MS: u32 = 5_000;
/// Inbound frames are not told while so many commands wait for the socket.
const INBOUND_WAITING_MAX: usize = 1_024;
/// After an inbound frame, others wait so long to be sent together, unless there is something else to send. What waits is lost with this
/// process, and a client that hears nothing of all that it sent since the last release sends it again only after 200 ms and more: five times
/// as long as a takeover.
const INBOUND_LINGER: Duration = Duration::from_micros(250);
/// So many do not wait.
const INBOUND_TOGETHER: usize = 64;
/// Pieces of disks wait before they are handed over while so many bytes of them are not encoded.
const DISK_BYTES_WAITING_MAX: usize = 8 << 20;

/// Bounds of a link.
#[derive(Clone, Copy, Debug)]
pub struct LinkLimits {
    /// Most checkpoints sent and not acknowledged; the next pause waits.
    pub epochs_in_flight: usize,
    /// Largest checkpoint that the backup takes, in bytes of pages (`limits.inbox`).
    pub checkpoint_bytes: usize,
}

/// What the link tells its owner.
#[derive(Debug)]
pub enum LinkEvent {
    /// Something came of the backup's bytes.
    Stream(StreamEvent),
    /// The connection is gone; un-acknowledged dirty sets went back to the ledger.
    Closed(LinkEnd),
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkEnd {
    /// We closed it.
    #[error("closed by this side")]
    Closed,
    /// The peer's kernel closed it: its process ended.
    #[error("closed by the peer")]
    EndOfFile,
    /// The network failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer broke the protocol, or this side misused it.
    #[error("protocol: {0}")]
    Protocol(#[from] LinkError),
}

enum Command {
    BeginBase(Epoch),
    BasePages(StagedPages),
    Ask(PieceHashes),
    DiskPiece(DiskChange),
    EndBase(StagedCheckpoint),
    Checkpoint(StagedCheckpoint),
    Inbound { epoch: Epoch, nic: u8, frame: Bytes },
    Goodbye(GoodbyeReason, String),
}

/// A handle on the link's thread.
#[derive(Clone)]
pub struct Link {
    commands: Sender<Command>,
    waker: Arc<Waker>,
    shared: Arc<Shared>,
    answers: Receiver<PiecesWanted>,
    limits: LinkLimits,
    /// The same socket, to ask the kernel about it.
    socket: Arc<TcpStream>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Shared {
    in_flight: Mutex<InFlight>,
    freed: Condvar,
    closed: AtomicBool,
    /// Bytes that are encoded and that the socket has not taken.
    encoded: AtomicUsize,
    /// The epoch that inbound frames belong to.
    running: AtomicU64,
    /// We want no more of this connection, whatever still waits to be sent.
    abandoned: AtomicBool,
    /// The thread has been woken for an inbound frame and looks for more by itself before long.
    lingers: AtomicBool,
}

/// What was handed over and is not done with.
#[derive(Default)]
struct InFlight {
    /// Checkpoints that are not acknowledged.
    epochs: usize,
    /// Bytes of disks that are not encoded.
    disk_bytes: usize,
}

impl Link {
    /// Takes over a fresh connection and starts the link's thread, which greets the backup at once. `tell` is called on that thread.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking or polled, or no thread could be started.
    pub fn start(
        socket: TcpStream,
        protocol: SenderConfig,
        limits: LinkLimits,
        gate: Arc<Gate>,
        metrics: Arc<Metrics>,
        tell: impl Fn(LinkEvent) + Send + 'static,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        // Data that the peer's kernel does not acknowledge for this long will not arrive: heartbeats alone would hide it.
        rustix::net::sockopt::set_tcp_user_timeout(&socket, UNACKNOWLEDGED_MS)?;
        let asked = Arc::new(socket.try_clone()?);
        let mut socket = mio::net::TcpStream::from_std(socket);
        let poll = Poll::new()?;
        poll.registry().register(&mut socket, SOCKET, Interest::READABLE | Interest::WRITABLE)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let (commands, inbox) = unbounded();
        let shared = Arc::new(Shared::default());
        let (answered, answers) = unbounded();
        let bell = Arc::clone(gate.bell());
        let counted = Arc::clone(&metrics);
        let thread = LinkThread {
            socket,
            poll,
            stream: Stream::new(protocol, gate, Arc::clone(&metrics)),
            commands: inbox,
            outgoing: Outgoing::default(),
            closing: false,
            lingers_until: None,
            shared: Arc::clone(&shared),
            bell,
            answered,
            metrics,
            tell: Box::new(tell),
        };
        let handle = std::thread::Builder::new().name("ft-link".into()).spawn(move || thread.run())?;
        Ok((Self { commands, waker, shared, answers, limits, socket: asked, metrics: counted }, handle))
    }

    /// How far the connection is with what it was given.
    pub fn reading(&self, arena: &Arena) -> Reading {
        // Without an answer nothing is known of the kernel's part; what waits on this side is seen all the same.
        let kernel = tcp_info(&*self.socket).unwrap_or_default();
        let here = self.shared.encoded.load(Ordering::Relaxed) + arena.in_flight();
        Reading {
            sent_bytes: self.metrics.wire_bytes.load(Ordering::Relaxed).saturating_sub(kernel.not_sent.into()),
            unsent_bytes: here + usize::try_from(kernel.not_sent).unwrap_or(0),
            on_its_way: kernel.unacked > 0,
            busy: kernel.busy,
            unread: kernel.window_closed,
        }
    }

    /// Most checkpoints sent and not acknowledged.
    pub fn epochs_in_flight_most(&self) -> usize {
        self.limits.epochs_in_flight
    }

    /// Waits until a further checkpoint may be in flight.
    ///
    /// # Errors
    /// [`CheckpointError::LinkLost`] as soon as the link is gone.
    pub fn wait_for_room(&self, arena: &Arena) -> Result<(), CheckpointError> {
        loop {
            self.check_open()?;
            let in_flight = self.shared.lock();
            let (in_flight, _) = self
                .shared
                .freed
                .wait_timeout_while(in_flight, ROOM_PATIENCE, |n| n.epochs >= self.limits.epochs_in_flight)
                .unwrap_or_else(PoisonError::into_inner);
            let room = in_flight.epochs < self.limits.epochs_in_flight;
            drop(in_flight);
            if room && arena.wait_for_room(ROOM_PATIENCE) {
                return self.check_open();
            }
        }
    }

    /// Refuses a checkpoint of so many bytes that the backup could not hold.
    ///
    /// # Errors
    /// [`CheckpointError::TooLarge`].
    pub fn check_size(&self, epoch: Epoch, bytes: usize) -> Result<(), CheckpointError> {
        let limit = self.limits.checkpoint_bytes;
        if bytes > limit { Err(CheckpointError::TooLarge { epoch, bytes, limit }) } else { Ok(()) }
    }

    /// Hands a checkpoint over for sending.
    ///
    /// # Errors
    /// [`CheckpointError::LinkLost`]; the checkpoint's dirty set has gone back to the ledger.
    pub fn send(&self, checkpoint: StagedCheckpoint) -> Result<(), CheckpointError> {
        self.shared.lock().epochs += 1;
        self.command(Command::Checkpoint(checkpoint))
    }

    /// Begins the base: all of RAM, as of `epoch` once it is ended.
    ///
    /// # Errors
    /// [`CheckpointError::LinkLost`].
    pub fn begin_base(&self, epoch: Epoch) -> Result<(), CheckpointError> {
        self.command(Command::BeginBase(epoch))
    }

    /// Sends pages of the base. A page may come again: the later copy counts.
    ///
    /// # Errors
    /// [`CheckpointError::LinkLost`].
    pub fn base_pages(&self, pages: StagedPages) -> Result<(), CheckpointError> {
        self.command(Command::BasePages(pages))
    }

    /// Asks, within the base, which pieces differ at the backup; the answer is [`Link::next_answer`].
    ///
    /// # Errors
    /// [`CheckpointError::LinkLost`].
    pub fn ask(&self, hashes: PieceHashes) -> Result<(), CheckpointError> {
        self.command(Command::Ask(hashes))
    }

    /// Sends a piece of a disk within the base, once there is room for it. A later one, or a later change, counts.
    ///
    /// # Errors
    /// [`CheckpointError::LinkLost`].
    pub fn disk_piece(&self, piece: DiskChange) -> Result<(), CheckpointError> {
        loop {
            self.check_open()?;
            let in_flight = self.shared.lock();
            let (mut in_flight, _) = self
                .shared
                .freed
                .wait_timeout_while(in_flight, ROOM_PATIENCE, |n| n.disk_bytes >= DISK_BYTES_WAITING_MAX)
                .unwrap_or_else(PoisonError::into_inner);
            if in_flight.disk_bytes < DISK_BYTES_WAITING_MAX {
                in_flight.disk_bytes += piece.weight();
                drop(in_flight);
                return self.command(Command::DiskPiece(piece));
            }
        }
    }

    /// The next answer to what was asked, in the order of the questions. Waits for `patience` at most.
    ///
    /// # Errors
    /// [`CheckpointError::LinkLost`] as soon as the link is gone.
    pub fn next_answer(&self, patience: Duration) -> Result<Option<PiecesWanted>, CheckpointError> {
        self.check_open()?;
        match receive_within(&self.answers, patience) {
            Ok(answer) => Ok(Some(answer)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(CheckpointError::LinkLost),
        }
    }

    /// Ends the base with a checkpoint.
    ///
    /// # Errors
    /// [`CheckpointError::LinkLost`].
    pub fn end_base(&self, checkpoint: StagedCheckpoint) -> Result<(), CheckpointError> {
        self.shared.lock().epochs += 1;
        self.command(Command::EndBase(checkpoint))
    }

    /// From now on inbound frames belong to `epoch`. Set before the pause that ends the epoch before, so that a frame is never counted into an
    /// epoch that ended without it.
    pub fn epoch_begins(&self, epoch: Epoch) {
        self.shared.running.store(epoch.0, Ordering::Release);
    }

    /// Tells the backup of an inbound frame: the first one, and the first after outputs were released, at once; those that follow closely,
    /// together. While the link is behind, frames are left to retransmission.
    pub fn inbound(&self, nic: u8, frame: &[u8]) {
        failpoint!(InboundSend => return);
        let waiting = self.commands.len();
        if waiting >= INBOUND_WAITING_MAX {
            return;
        }
        let epoch = Epoch(self.shared.running.load(Ordering::Acquire));
        // An error here and below means that the link is gone, and nobody wants to know.
        self.commands.send(Command::Inbound { epoch, nic, frame: Bytes::copy_from_slice(frame) }).ok();
        if !self.shared.lingers.swap(true, Ordering::SeqCst) || waiting >= INBOUND_TOGETHER {
            self.waker.wake().ok();
        }
    }

    /// Tells the backup why this side leaves, and closes once that is on its way; before a switchover it stays, for frames that come too late.
    pub fn goodbye(&self, reason: GoodbyeReason, text: String) {
        // An error means that the link is gone already, which is what a goodbye wants.
        self.command(Command::Goodbye(reason, text)).ok();
    }

    /// Closes the connection at once, whatever still waits to be sent.
    pub fn close(&self) {
        self.shared.abandoned.store(true, Ordering::Release);
        // An error means that the thread has ended.
        self.waker.wake().ok();
    }

    /// Whether the connection stands.
    pub fn is_open(&self) -> bool {
        !self.shared.closed.load(Ordering::Acquire)
    }

    fn check_open(&self) -> Result<(), CheckpointError> {
        if self.is_open() { Ok(()) } else { Err(CheckpointError::LinkLost) }
    }

    fn command(&self, command: Command) -> Result<(), CheckpointError> {
        self.commands.send(command).map_err(|_| CheckpointError::LinkLost)?;
        self.waker.wake().map_err(|_| CheckpointError::LinkLost)?;
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, InFlight> {
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct LinkThread {
    socket: mio::net::TcpStream,
    poll: Poll,
    stream: Stream,
    commands: Receiver<Command>,
    /// What the socket is taking.
    outgoing: Outgoing,
    closing: bool,
    /// Inbound frames are sent together until then.
    lingers_until: Option<Instant>,
    shared: Arc<Shared>,
    /// Rung when a commit arrived.
    bell: Arc<Bell>,
    /// Answers go to whoever copies the base, and to nobody else.
    answered: Sender<PiecesWanted>,
    metrics: Arc<Metrics>,
    tell: Box<dyn Fn(LinkEvent) + Send>,
}

impl LinkThread {
    fn run(mut self) {
        let end = match self.drive() {
            Ok(end) | Err(end) => end,
        };
        // Nobody may wait for a link that is gone, and every set that was not acknowledged goes back to the ledger first.
        self.stream.give_up();
        self.shared.closed.store(true, Ordering::Release);
        self.shared.freed.notify_all();
        self.socket.shutdown(Shutdown::Both).ok();
        (self.tell)(LinkEvent::Closed(end));
    }

    fn drive(&mut self) -> Result<LinkEnd, LinkEnd> {
        let mut ready = Events::with_capacity(4);
        let mut buffer = vec![0; READ_BUFFER_BYTES];
        loop {
            // Acknowledgements first: outputs wait for them.
            self.receive(&mut buffer)?;
            let all_sent = self.transmit()?;
            let encoded = self.stream.queued_bytes() + self.outgoing.len();
            self.shared.encoded.store(encoded, Ordering::Relaxed);
            if self.shared.abandoned.load(Ordering::Acquire) || (self.closing && all_sent) {
                return Ok(LinkEnd::Closed);
            }
            // While the socket is full, a little more may be encoded ahead.
            if (all_sent || self.stream.queued_bytes() < ENCODED_BYTES_HIGH) && self.take_command()? {
                continue;
            }
            let linger = self.lingers();
            if linger == Some(Duration::ZERO) {
                // Who told of a frame before this did not wake us: one more look.
                self.shared.lingers.store(false, Ordering::SeqCst);
                continue;
            }
            match self.poll.poll(&mut ready, linger) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => other?,
            }
        }
    }

    /// For how long nobody wakes us for an inbound frame; `None`: whoever tells of the next one does.
    fn lingers(&mut self) -> Option<Duration> {
        if !self.shared.lingers.load(Ordering::SeqCst) {
            self.lingers_until = None;
            return None;
        }
        let now = Instant::now();
        let until = *self.lingers_until.get_or_insert(now + INBOUND_LINGER);
        Some(until.saturating_duration_since(now))
    }

    /// Reads and handles all that has arrived.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<(), LinkEnd> {
        loop {
            match self.socket.read(buffer) {
                Ok(0) => return Err(LinkEnd::EndOfFile),
                Ok(n) => {
                    let before = self.stream.in_flight();
                    let mut committed = None;
                    let Self { stream, tell, answered, .. } = self;
                    let handled = stream.handle_bytes(&buffer[..n], |event| match event {
                        // Nobody copies a base any more if it fails.
                        StreamEvent::Wanted(answer) => drop(answered.send(answer)),
                        event => {
                            if let StreamEvent::Committed(epoch) = &event {
                                committed = Some(*epoch);
                            }
                            tell(LinkEvent::Stream(event));
                        }
                    });
                    self.note_freed(before);
                    if let Some(epoch) = committed {
                        self.bell.committed(epoch.0);
                        // The first frame after a release goes at once: from it on the conversation can be taken up.
                        self.shared.lingers.store(false, Ordering::SeqCst);
                    }
                    handled?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Checkpoints were acknowledged: whoever waits for room has it.
    fn note_freed(&self, before: usize) {
        let freed = before - self.stream.in_flight();
        if freed > 0 {
            self.shared.lock().epochs -= freed;
            self.shared.freed.notify_all();
        }
    }

    /// Writes until the socket is full (false) or nothing waits (true).
    fn transmit(&mut self) -> Result<bool, LinkEnd> {
        let Self { socket, stream, outgoing, metrics, .. } = self;
        loop {
            outgoing.fill(|| stream.poll_transmit());
            if outgoing.is_empty() {
                stream.note_sent();
                return Ok(true);
            }
            match outgoing.write_to(socket) {
                Ok(n) => {
                    metrics.wire_bytes.fetch_add(u64::try_from(n).unwrap_or(0), Ordering::Relaxed);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Encodes what waits first in the channel; false when nothing waits.
    fn take_command(&mut self) -> Result<bool, LinkEnd> {
        match self.commands.try_recv() {
            Ok(Command::BeginBase(epoch)) => self.stream.begin_base(epoch)?,
            Ok(Command::BasePages(pages)) => self.stream.pages(&pages)?,
            Ok(Command::Ask(hashes)) => self.stream.hashes(&hashes)?,
            Ok(Command::DiskPiece(piece)) => {
                self.stream.disk_piece(&piece)?;
                self.shared.lock().disk_bytes -= piece.weight();
                self.shared.freed.notify_all();
            }
            Ok(Command::EndBase(checkpoint)) => self.stream.end(checkpoint)?,
            Ok(Command::Checkpoint(checkpoint)) => {
                failpoint!(SendBegin => return Err(failpoint::injected().into()));
                self.stream.checkpoint(checkpoint)?;
            }
            Ok(Command::Inbound { epoch, nic, frame }) => {
                self.stream.inbound(epoch, nic, &frame)?;
            }
            Ok(Command::Goodbye(reason, text)) => {
                failpoint!(Goodbye => return Err(failpoint::injected().into()));
                self.stream.goodbye(reason, &text)?;
                // After a switchover, what reaches this side too late still has to get across.
                self.closing = reason != GoodbyeReason::Switchover;
            }
            Err(TryRecvError::Disconnected) => return Err(LinkEnd::Closed),
            Err(TryRecvError::Empty) => return Ok(false),
        }
        Ok(true)
    }
}

/// What is in a channel, or comes within this time. Waiting in a channel begins with giving the processor up a few times, even when the time is zero: on a busy host
/// each of these costs milliseconds.
///
/// # Errors
/// As `recv_timeout`.
pub fn receive_within<T>(from: &Receiver<T>, patience: Duration) -> Result<T, RecvTimeoutError> {
    match from.try_recv() {
        Ok(next) => Ok(next),
        Err(TryRecvError::Disconnected) => Err(RecvTimeoutError::Disconnected),
        Err(TryRecvError::Empty) if patience.is_zero() => Err(RecvTimeoutError::Timeout),
        Err(TryRecvError::Empty) => from.recv_timeout(patience),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_received_without_patience() {
        let (tell, told) = unbounded();
        assert_eq!(receive_within(&told, Duration::ZERO), Err(RecvTimeoutError::Timeout));
        tell.send(1).expect("it is open");
        assert_eq!(receive_within(&told, Duration::ZERO), Ok(1));
        let later = std::thread::spawn(move || tell.send(2));
        assert_eq!(receive_within(&told, Duration::from_secs(60)), Ok(2));
        later.join().expect("it ends").expect("it is open");
        for patience in [Duration::ZERO, Duration::from_secs(60)] {
            assert_eq!(receive_within(&told, patience), Err(RecvTimeoutError::Disconnected));
        }
    }
}
