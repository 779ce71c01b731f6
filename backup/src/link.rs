//! The listening side of replication: accepts connections and greets them. The only sockets of the backup, on one thread; heartbeat connections
//! are handed on to threads of their own. What the bytes of the data connection mean is [`crate::intake`]'s business.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use failover::failpoint;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use primary::clock::Clock;
use replication_proto::{Channel, Comparable, Generation, Greeting, Identity, LinkError};

use crate::commit::Holding;
use crate::disk::DiskKeeper;
use crate::inbound::Inbound;
use crate::intake::{Intake, IntakeEvent, LinkEnd, News};
use crate::standby::{Applier, take_disk_hashes};

const LISTENER: Token = Token(0);
const WAKE: Token = Token(1);
const FIRST_CONNECTION: usize = 2;
/// Strangers that may be greeting at one time; of more, the oldest is closed.
const GREETINGS_MAX: usize = 16;
/// A connection that has not said a whole hello within this time is closed.
const GREETING_PATIENCE: Duration = Duration::from_secs(2);
const READ_BUFFER_BYTES: usize = 256 << 10;
/// After so many reads of a stream that never runs dry, other connections get their turn.
const READS_AT_ONCE: usize = 64;

/// What the link tells its owner.
#[derive(Debug)]
pub enum LinkEvent {
    /// Something came of the primary's bytes; never one of the events that are for the applier.
    Intake(IntakeEvent),
    /// Someone opened a heartbeat connection; what was read of it comes along.
    Heartbeat(std::net::TcpStream, Bytes),
}

/// What the link thread shares with the rest of the process.
#[derive(Default)]
pub struct LinkShared {
    stopping: AtomicBool,
    /// Nothing may be committed or acknowledged any more.
    sealing: AtomicBool,
    /// Highest generation known to this process.
    generation: AtomicU64,
    /// Connections that ended with a protocol error, strangers included.
    pub protocol_errors: AtomicU64,
}

/// A way to tell the link thread something.
#[derive(Clone)]
pub struct LinkHandle {
    shared: Arc<LinkShared>,
    news: Sender<News>,
    waker: Arc<Waker>,
}

/// The link's thread.
pub struct LinkThread {
    handle: LinkHandle,
    sealed: Receiver<Holding>,
    thread: JoinHandle<(Holding, Inbound)>,
}

/// A link that listens and has no thread yet.
pub struct LinkBuilder {
    listener: TcpListener,
    poll: Poll,
    handle: LinkHandle,
    news: Receiver<News>,
}

impl LinkBuilder {
    /// Listens on `address`.
    ///
    /// # Errors
    /// The address is in use, or not ours.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let mut listener = TcpListener::bind(address)?;
        let poll = Poll::new()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let (told, news) = unbounded();
        Ok(Self { listener, poll, handle: LinkHandle { shared: Arc::default(), news: told, waker }, news })
    }

    /// For those who carry out commits and must tell the link so.
    pub fn handle(&self) -> LinkHandle {
        self.handle.clone()
    }

    /// Starts the thread. `tell` is called on it.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(
        self,
        intake: Intake,
        keepers: (Applier, DiskKeeper),
        clock: Clock,
        tell: impl Fn(LinkEvent) + Send + 'static,
    ) -> io::Result<LinkThread> {
        let Self { listener, poll, handle, news } = self;
        let (tell_sealed, sealed) = bounded(1);
        let state = Server {
            tell_sealed: Some(tell_sealed),
            listener,
            poll,
            waker: Arc::clone(&handle.waker),
            shared: Arc::clone(&handle.shared),
            news,
            intake,
            keepers: Some(keepers),
            clock,
            greetings: BTreeMap::new(),
            data: None,
            next_token: FIRST_CONNECTION,
            tell: Box::new(tell),
        };
        let thread = std::thread::Builder::new().name("ft-link".into()).spawn(move || state.run())?;
        Ok(LinkThread { handle, sealed, thread })
    }
}

impl LinkHandle {
    /// Tells the link's thread something.
    pub fn tell(&self, news: News) {
        // It fails only when the thread has ended, and then nobody wants to know.
        self.news.send(news).ok();
        self.wake();
    }

    /// A higher generation became known: primaries of lower ones are refused.
    pub fn raise_generation(&self, generation: Generation) {
        if self.shared.generation.fetch_max(generation.0, Ordering::AcqRel) < generation.0 {
            self.wake();
        }
    }

    /// Protocol errors so far.
    pub fn protocol_errors(&self) -> u64 {
        self.shared.protocol_errors.load(Ordering::Relaxed)
    }

    fn wake(&self) {
        // It fails only when the thread's poll is gone.
        self.waker.wake().ok();
    }
}

impl LinkThread {
    /// A handle on the thread.
    pub fn handle(&self) -> LinkHandle {
        self.handle.clone()
    }

    /// When this returns, nothing is committed or acknowledged any more and the incomplete epoch is dropped. Frames that still reach the side that ran the
    /// guest are taken until [`Self::close`].
    pub fn seal(&self) -> Holding {
        self.handle.shared.sealing.store(true, Ordering::Release);
        self.handle.wake();
        // The thread seals before it ends, whatever ends it.
        self.sealed.recv().expect("the link thread does not panic")
    }

    /// Ends the thread, and commits with it. Hands over the frames that reached the guest after the last commit.
    pub fn close(self) -> (Holding, Inbound) {
        self.handle.shared.stopping.store(true, Ordering::Release);
        self.handle.wake();
        self.thread.join().expect("the link thread does not panic")
    }
}

struct Stranger {
    stream: TcpStream,
    greeting: Greeting,
    since: Duration,
}

/// The socket of the data connection.
struct Data {
    stream: TcpStream,
    token: Token,
    writing: Bytes,
}

struct Server {
    /// Taken when commits have ended.
    tell_sealed: Option<Sender<Holding>>,
    listener: TcpListener,
    poll: Poll,
    waker: Arc<Waker>,
    shared: Arc<LinkShared>,
    news: Receiver<News>,
    intake: Intake,
    /// Who carries commits out; taken when those have ended.
    keepers: Option<(Applier, DiskKeeper)>,
    clock: Clock,
    greetings: BTreeMap<Token, Stranger>,
    data: Option<Data>,
    next_token: usize,
    tell: Box<dyn Fn(LinkEvent) + Send>,
}

impl Server {
    fn run(mut self) -> (Holding, Inbound) {
        let mut ready = Events::with_capacity(64);
        let mut buffer = vec![0; READ_BUFFER_BYTES];
        while !self.shared.stopping.load(Ordering::Acquire) {
            let patience = (!self.greetings.is_empty()).then_some(GREETING_PATIENCE / 4);
            match self.poll.poll(&mut ready, patience) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    log::error!("the replication link cannot be polled: {e}");
                    break;
                }
                Ok(()) => {}
            }
            if self.shared.sealing.load(Ordering::Acquire) {
                self.seal();
            }
            for event in &ready {
                match event.token() {
                    LISTENER => self.accept(),
                    WAKE => {}
                    token if self.greetings.contains_key(&token) => self.greet(token, &mut buffer),
                    _ => {}
                }
            }
            self.serve_data(&mut buffer);
            self.close_slow_strangers();
        }
        self.seal();
        self.intake.close()
    }

    /// Rule R2: nothing is acknowledged once the takeover is known here.
    fn seal(&mut self) {
        if let Some(tell) = self.tell_sealed.take() {
            let holding = self.intake.seal();
            self.pass_on();
            // They are done as soon as they have carried out what they were told.
            self.keepers = None;
            // Nobody waits for it when the whole link ends.
            tell.send(holding).ok();
        }
    }

    /// Whether something more important than the primary's bytes waits.
    fn is_called_off(&self) -> bool {
        let sealing = self.tell_sealed.is_some() && self.shared.sealing.load(Ordering::Acquire);
        sealing || self.shared.stopping.load(Ordering::Acquire)
    }

    // ---- strangers ---------------------------------------------------------------------------------------------------------------

    fn accept(&mut self) {
        loop {
            let (mut stream, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    log::warn!("a connection could not be accepted: {e}");
                    return;
                }
            };
            let token = Token(self.next_token);
            self.next_token += 1;
            if let Err(e) = self.poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE) {
                log::warn!("a connection from {from} could not be watched: {e}");
                continue;
            }
            if self.greetings.len() >= GREETINGS_MAX {
                self.greetings.pop_first();
            }
            self.greetings.insert(token, Stranger { stream, greeting: Greeting::new(), since: self.clock.now() });
        }
    }

    fn greet(&mut self, token: Token, buffer: &mut [u8]) {
        let Some(mut stranger) = self.greetings.remove(&token) else { return };
        loop {
            match stranger.stream.read(buffer) {
                Ok(n) if n > 0 => match stranger.greeting.handle_bytes(&buffer[..n]) {
                    Ok(None) => {}
                    Ok(Some(caller)) => {
                        let caller = (caller.channel, caller.peer.clone());
                        return self.introduce(stranger, token, caller);
                    }
                    Err(error) => return self.count(&error),
                },
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.greetings.insert(token, stranger);
                    return;
                }
                // It left, or its connection failed: nobody to answer.
                Ok(_) | Err(_) => return,
            }
        }
    }

    fn introduce(&mut self, stranger: Stranger, token: Token, (channel, peer): (Channel, Identity)) {
        let Stranger { mut stream, greeting, since: _ } = stranger;
        let read = greeting.into_bytes();
        match channel {
            Channel::Heartbeat => {
                if self.poll.registry().deregister(&mut stream).is_ok() {
                    (self.tell)(LinkEvent::Heartbeat(stream.into(), read));
                }
            }
            Channel::Data => self.open_data(stream, token, &peer, &read),
        }
    }

    fn close_slow_strangers(&mut self) {
        let now = self.clock.now();
        self.greetings.retain(|_, stranger| now.saturating_sub(stranger.since) < GREETING_PATIENCE);
    }

    fn count(&self, error: &LinkError) {
        self.shared.protocol_errors.fetch_add(1, Ordering::Relaxed);
        log::warn!("a connection was closed: {} ({})", error, error.code());
    }

    // ---- the data connection -----------------------------------------------------------------------------------------------------

    fn open_data(&mut self, stream: TcpStream, token: Token, peer: &Identity, read: &[u8]) {
        let mut data = Data { stream, token, writing: Bytes::new() };
        if !self.intake.admits(peer) {
            // A refusal is the last word; whether it arrives is the stranger's concern.
            data.write_all(self.intake.turn_away().into_iter()).ok();
            return;
        }
        if self.data.is_some() {
            self.end_data(LinkEnd::Displaced);
        }
        let known = Generation(self.shared.generation.load(Ordering::Acquire));
        self.data = Some(data);
        let served = self.intake.raise_generation(known).and_then(|()| {
            self.intake.open();
            self.intake.handle_bytes(read)
        });
        self.settle(served);
    }

    fn serve_data(&mut self, buffer: &mut [u8]) {
        let served = self.receive(buffer);
        self.settle(served);
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<(), LinkEnd> {
        while let Ok(news) = self.news.try_recv() {
            self.intake.hear(news)?;
        }
        for _ in 0..READS_AT_ONCE {
            self.transmit()?;
            if self.is_called_off() {
                break;
            }
            let Some(data) = &mut self.data else { return Ok(()) };
            self.intake.raise_generation(Generation(self.shared.generation.load(Ordering::Acquire)))?;
            match data.stream.read(buffer) {
                Ok(0) => self.intake.handle_eof()?,
                Ok(n) => {
                    let handled = self.intake.handle_bytes(&buffer[..n]);
                    self.pass_on();
                    handled?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        // More may wait: look after everybody else first. (The poll is edge-triggered and would not say it again.)
        self.waker.wake()?;
        Ok(())
    }

    /// Passes on what came of it, and ends the connection if it is over.
    fn settle(&mut self, served: Result<(), LinkEnd>) {
        self.pass_on();
        if let Err(end) = served.and_then(|()| self.transmit()) {
            self.end_data(end);
        }
    }

    fn pass_on(&mut self) {
        while let Some(event) = self.intake.poll_event() {
            // Nothing is committed any more, and who carried it out is waited for.
            let Some((applier, disks)) = &mut self.keepers else { continue };
            match event {
                IntakeEvent::ApplyHollow(pages) => applier.apply_hollow(pages),
                IntakeEvent::Compare(question, ask) => match ask.of {
                    Comparable::Memory => applier.compare(question, ask),
                    Comparable::Disk(_) => disks.compare(question, ask),
                },
                IntakeEvent::ApplyHollowDisk(change) => disks.apply_hollow(change),
                IntakeEvent::Apply(mut committed, point) => {
                    let changes = std::mem::take(&mut committed.disk);
                    disks.apply(point, committed.kind, changes);
                    if let Some(hashes) = take_disk_hashes(&mut committed) {
                        disks.verify(point.epoch, hashes);
                    }
                    applier.apply(committed);
                }
                IntakeEvent::BaseBegun(peer) => {
                    disks.begin_base();
                    (self.tell)(LinkEvent::Intake(IntakeEvent::BaseBegun(peer)));
                }
                IntakeEvent::Opened(peer) => {
                    self.shared.generation.fetch_max(peer.generation.0, Ordering::AcqRel);
                    (self.tell)(LinkEvent::Intake(IntakeEvent::Opened(peer)));
                }
                other => (self.tell)(LinkEvent::Intake(other)),
            }
        }
    }

    fn transmit(&mut self) -> Result<(), LinkEnd> {
        let Self { data: Some(data), intake, .. } = self else { return Ok(()) };
        data.write_all(std::iter::from_fn(|| intake.poll_transmit()))?;
        Ok(())
    }

    fn end_data(&mut self, end: LinkEnd) {
        match &end {
            LinkEnd::Protocol(error) => self.count(error),
            LinkEnd::Commit(_) | LinkEnd::Inbox(_) => {
                self.shared.protocol_errors.fetch_add(1, Ordering::Relaxed);
            }
            LinkEnd::EndOfFile | LinkEnd::Io(_) | LinkEnd::Displaced | LinkEnd::Disk(_) => {}
        }
        if let Some(data) = &self.data {
            log::info!("data connection {}: {end}", data.token.0);
        }
        self.intake.end(end);
        if let Some((_, disks)) = &mut self.keepers {
            // The primary may be dead: what a takeover would have to wait for begins now.
            disks.hurry();
            disks.tell_standing();
        }
        // The last word, if there is one, goes out as far as the socket takes it.
        self.transmit().ok();
        if let Some(mut data) = self.data.take() {
            self.forget(&mut data.stream);
        }
        self.pass_on();
    }

    fn forget(&self, stream: &mut TcpStream) {
        deregister(self.poll.registry(), stream);
        stream.shutdown(Shutdown::Both).ok();
    }
}

fn deregister(registry: &Registry, stream: &mut TcpStream) {
    if let Err(error) = registry.deregister(stream) {
        log::debug!("a connection was not watched any more: {error}");
    }
}

impl Data {
    /// Writes until the socket is full or nothing waits.
    fn write_all(&mut self, mut frames: impl Iterator<Item = Bytes>) -> io::Result<()> {
        loop {
            if self.writing.is_empty() {
                match frames.next() {
                    Some(frame) => self.writing = frame,
                    None => return Ok(()),
                }
            }
            match self.stream.write(&self.writing) {
                Ok(n) => {
                    drop(self.writing.split_to(n));
                    failpoint!(AckSent => return Err(failpoint::injected()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}
