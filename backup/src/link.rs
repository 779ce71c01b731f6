//! The listening side of replication: accepts connections, greets them, receives checkpoints, commits and acknowledges them. The
//! only sockets of the backup, on one thread; heartbeat connections are handed on to threads of their own.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use primary::clock::Clock;
use replication_proto::Greeting;
use replication_proto::LinkError;
use replication_proto::{Channel, CheckpointKind, GoodbyeReason, RefuseCode};
use replication_proto::{Epoch, Generation, Identity};
use replication_proto::{Receiver, ReceiverConfig, ReceiverEvent};

use crate::commit::{CommitError, Commits, Holding};
use crate::inbound::Inbound;
use crate::inbox::{Destination, Inbox, InboxError, PageBatch};
use crate::standby::Applier;

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
    /// A compatible primary is connected.
    Opened(Identity),
    /// It begins a base: the standby is hollow.
    BaseBegun(Identity),
    /// The base is committed.
    BaseCommitted(Identity, Epoch),
    /// A further epoch is committed.
    Committed(Epoch),
    /// Bytes of the primary arrived.
    Heard(Identity),
    /// The primary leaves on purpose.
    Goodbye(Identity, GoodbyeReason),
    /// The data connection is gone.
    Closed(LinkEnd),
    /// Someone opened a heartbeat connection; what was read of it comes along.
    Heartbeat(std::net::TcpStream, Bytes),
}

/// Why a data connection ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkEnd {
    /// The primary's kernel closed it.
    #[error("closed by the primary")]
    EndOfFile,
    /// The network failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The primary broke the protocol.
    #[error("protocol: {0}")]
    Protocol(#[from] LinkError),
    /// A checkpoint was not what it claims to be.
    #[error("{0}")]
    Commit(#[from] CommitError),
    /// A checkpoint does not fit.
    #[error("{0}")]
    Inbox(#[from] InboxError),
    /// A primary of a higher generation took its place.
    #[error("displaced by a connection of a higher generation")]
    Displaced,
}

/// What the link thread shares with the rest of the process.
#[derive(Default)]
pub struct LinkShared {
    stopping: AtomicBool,
    applied_bytes: AtomicUsize,
    /// Highest generation known to this process.
    generation: AtomicU64,
    /// Connections that ended with a protocol error, strangers included.
    pub protocol_errors: AtomicU64,
}

/// Wakes the link thread: a checkpoint was applied, or it shall stop.
#[derive(Clone)]
pub struct LinkHandle {
    shared: Arc<LinkShared>,
    waker: Arc<Waker>,
}

/// The link's thread.
pub struct LinkThread {
    handle: LinkHandle,
    thread: JoinHandle<(Holding, Inbound)>,
}

/// A link that listens and has no thread yet.
pub struct LinkBuilder {
    listener: TcpListener,
    poll: Poll,
    handle: LinkHandle,
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
        Ok(Self { listener, poll, handle: LinkHandle { shared: Arc::default(), waker } })
    }

    /// For the applier, which must tell the link what it applied.
    pub fn handle(&self) -> LinkHandle {
        self.handle.clone()
    }

    /// Starts the thread. `tell` is called on it.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(
        self,
        config: ReceiverConfig,
        inbox: Inbox,
        commits: Commits,
        applier: Applier,
        clock: Clock,
        tell: impl Fn(LinkEvent) + Send + 'static,
    ) -> io::Result<LinkThread> {
        let Self { listener, poll, handle } = self;
        handle.shared.generation.store(config.identity.generation.0, Ordering::Release);
        let state = Server {
            listener,
            poll,
            waker: Arc::clone(&handle.waker),
            shared: Arc::clone(&handle.shared),
            config,
            inbox,
            inbound: Inbound::default(),
            commits,
            applier,
            clock,
            greetings: BTreeMap::new(),
            data: None,
            next_token: FIRST_CONNECTION,
            tell: Box::new(tell),
        };
        let thread = std::thread::Builder::new().name("ft-link".into()).spawn(move || state.run())?;
        Ok(LinkThread { handle, thread })
    }
}

impl LinkHandle {
    /// The applier put this many committed bytes into the standby's memory: acknowledgements may be due.
    pub fn applied(&self, bytes: usize) {
        self.shared.applied_bytes.fetch_add(bytes, Ordering::AcqRel);
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

    /// Ends the thread: when this returns, nothing is committed or acknowledged any more and the incomplete epoch is dropped. Hands over the frames that
    /// reached the guest after the last commit.
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

struct Data {
    stream: TcpStream,
    token: Token,
    protocol: Receiver,
    peer: Option<Identity>,
    writing: Bytes,
}

struct Server {
    listener: TcpListener,
    poll: Poll,
    waker: Arc<Waker>,
    shared: Arc<LinkShared>,
    config: ReceiverConfig,
    inbox: Inbox,
    inbound: Inbound,
    commits: Commits,
    applier: Applier,
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
            self.note_applied();
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
        // Rule R2: nothing is acknowledged once the takeover is known here.
        let holding = self.commits.close();
        self.inbox.drop_incomplete();
        (holding, self.inbound)
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

    /// Takes a data connection on. While one is in use, only a higher generation may displace it, or the same process coming again.
    fn open_data(&mut self, stream: TcpStream, token: Token, peer: &Identity, read: &[u8]) {
        let mut config = self.config.clone();
        config.identity.generation = Generation(self.shared.generation.load(Ordering::Acquire));
        let mut data = Data { stream, token, protocol: Receiver::new(config), peer: None, writing: Bytes::new() };
        let busy = self.data.as_ref().and_then(|current| current.peer.as_ref()).is_some_and(|current| {
            peer.generation < current.generation
                || (peer.generation == current.generation && peer.incarnation != current.incarnation)
        });
        if busy {
            // A refusal is the last word; whether it arrives is the stranger's concern.
            data.protocol.refuse(RefuseCode::Busy, "another primary is connected").ok();
            data.transmit().ok();
            return;
        }
        if self.data.is_some() {
            self.end_data(LinkEnd::Displaced);
        }
        let fed = data.protocol.handle_bytes(read);
        self.data = Some(data);
        let served = fed.map_err(LinkEnd::from).and_then(|()| self.take_events());
        if let Err(end) = served {
            self.end_data(end);
        }
    }

    fn serve_data(&mut self, buffer: &mut [u8]) {
        if self.data.is_none() {
            return;
        }
        if let Err(end) = self.receive(buffer) {
            self.end_data(end);
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<(), LinkEnd> {
        for _ in 0..READS_AT_ONCE {
            self.send_acks()?;
            let Some(data) = &mut self.data else { return Ok(()) };
            if self.shared.stopping.load(Ordering::Acquire) {
                return Ok(());
            }
            let known = Generation(self.shared.generation.load(Ordering::Acquire));
            if known > data.protocol.generation() {
                data.protocol.raise_generation(known)?;
            }
            match data.stream.read(buffer) {
                Ok(0) => {
                    data.protocol.handle_eof()?;
                    return Err(LinkEnd::EndOfFile);
                }
                Ok(n) => {
                    data.protocol.handle_bytes(&buffer[..n])?;
                    self.take_events()?;
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

    fn take_events(&mut self) -> Result<(), LinkEnd> {
        while let Some(data) = &mut self.data {
            let Some(event) = data.protocol.poll_event()? else { break };
            self.on_event(event)?;
        }
        if let Some(peer) = self.data.as_ref().and_then(|d| d.peer.clone()) {
            (self.tell)(LinkEvent::Heard(peer));
        }
        self.send_acks()
    }

    fn on_event(&mut self, event: ReceiverEvent) -> Result<(), LinkEnd> {
        let peer = self.data.as_ref().and_then(|d| d.peer.clone());
        match (event, peer) {
            (ReceiverEvent::Opened { peer }, _) => {
                self.shared.generation.fetch_max(peer.generation.0, Ordering::AcqRel);
                if let Some(data) = &mut self.data {
                    data.peer = Some(peer.clone());
                }
                (self.tell)(LinkEvent::Opened(peer));
            }
            (ReceiverEvent::Begin { epoch, kind }, Some(peer)) => {
                self.inbox.begin(epoch, kind)?;
                if kind == CheckpointKind::Base {
                    self.commits.begin_base();
                    self.inbound.clear();
                    (self.tell)(LinkEvent::BaseBegun(peer));
                }
            }
            (ReceiverEvent::Pages { indexes, bytes }, _) => {
                if let Destination::Hollow(batch) = self.inbox.pages(PageBatch { indexes, bytes })? {
                    self.applier.apply_hollow(batch);
                }
            }
            (ReceiverEvent::Section { kind, version, bytes }, _) => self.inbox.section(kind, version, &bytes)?,
            (ReceiverEvent::End(end), Some(peer)) => {
                let committed = self.commits.commit(self.inbox.take()?, &end)?;
                self.inbound.committed(end.epoch);
                self.applier.apply(committed);
                (self.tell)(match end.kind {
                    CheckpointKind::Base => LinkEvent::BaseCommitted(peer, end.epoch),
                    CheckpointKind::Delta => LinkEvent::Committed(end.epoch),
                });
            }
            (ReceiverEvent::Inbound { epoch, nic, frame }, _) => self.inbound.keep(epoch, nic, &frame),
            (ReceiverEvent::Goodbye(goodbye), Some(peer)) => (self.tell)(LinkEvent::Goodbye(peer, goodbye.reason)),
            (other, None) => unreachable!("the receiver opens first: {other:?}"),
        }
        Ok(())
    }

    fn note_applied(&mut self) {
        let bytes = self.shared.applied_bytes.swap(0, Ordering::AcqRel);
        self.commits.applied(bytes);
    }

    fn send_acks(&mut self) -> Result<(), LinkEnd> {
        let Some(data) = &mut self.data else { return Ok(()) };
        for epoch in self.commits.acks_due() {
            data.protocol.ack(epoch)?;
        }
        data.transmit()?;
        Ok(())
    }

    fn end_data(&mut self, end: LinkEnd) {
        if let LinkEnd::Protocol(error) = &end {
            self.count(error);
        }
        let refusal = match &end {
            LinkEnd::Commit(error) => Some((RefuseCode::Misbehaved, error.to_string())),
            LinkEnd::Inbox(error) => Some((RefuseCode::Overload, error.to_string())),
            _ => None,
        };
        self.inbox.drop_incomplete();
        self.commits.connection_lost();
        if let Some(mut data) = self.data.take() {
            if let Some((code, text)) = refusal {
                self.shared.protocol_errors.fetch_add(1, Ordering::Relaxed);
                data.protocol.refuse(code, &text).ok();
            }
            // The last word, if there is one, goes out as far as the socket takes it.
            data.transmit().ok();
            self.forget(&mut data.stream);
            log::info!("data connection {}: {end}", data.token.0);
        }
        (self.tell)(LinkEvent::Closed(end));
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
    fn transmit(&mut self) -> io::Result<()> {
        loop {
            if self.writing.is_empty() {
                match self.protocol.poll_transmit() {
                    Some(frame) => self.writing = frame,
                    None => return Ok(()),
                }
            }
            match self.stream.write(&self.writing) {
                Ok(n) => drop(self.writing.split_to(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}
