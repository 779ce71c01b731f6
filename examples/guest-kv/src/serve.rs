//! Connections: bytes from smoltcp's sockets to requests, replies back.

use alloc::vec::Vec;

use kv::{Args, Machine, Out, Outcome, Parsed, Session, Store, execute, parse};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Duration;

/// Connections at once. Twice what a client with 50 connections needs: while output is held back, the ones that it has
/// just closed are still closing when it opens the next.
const SOCKETS: usize = 128;
/// Sockets that should listen, if there are connections which are over: as many can be opened in one go.
const SPARE: usize = crate::guest::INGRESS_BATCH;
/// Bytes of a socket's buffer, each way.
const SOCKET_BUFFER: usize = 64 << 10;
/// Bytes that the buffers of all sockets take.
pub(crate) const BUFFERS: usize = SOCKETS * 2 * SOCKET_BUFFER;
/// Replies of one connection are collected up to so many bytes before they are sent.
const BATCH: usize = 128 << 10;
/// Memory of the reply buffer, in bytes, that is kept.
const OUT_KEPT: usize = 2 * BATCH;
/// How long a peer may take to answer while a connection is opened or closed.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// A connection that was silent for so long gives way when there is no socket left to listen, in microseconds.
const EVICTABLE: i64 = 60_000_000;

/// What all connections share.
pub(crate) struct Server<M> {
    pub(crate) store: Store,
    pub(crate) machine: M,
    args: Args,
    out: Out,
    next_id: u64,
    requests: u64,
    port: u16,
}

/// One socket, and the connection on it if there is one.
pub(crate) struct Connection {
    handle: SocketHandle,
    session: Option<Session>,
    /// The start of a request that has not come completely.
    input: Vec<u8>,
    /// No request ends before so many bytes.
    needed: usize,
    /// Replies that the socket had no room for, and how much of them it has taken since.
    output: Vec<u8>,
    sent: usize,
    closing: bool,
    last_active: i64,
}

impl Connection {
    fn reset(&mut self) {
        self.session = None;
        self.input = Vec::new();
        self.needed = 0;
        self.output = Vec::new();
        self.sent = 0;
        self.closing = false;
    }

    /// Hands replies to the socket. True if none are left.
    fn send_rest(&mut self, socket: &mut Socket<'_>) -> bool {
        if let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            self.sent += socket.send_slice(rest).unwrap_or(0);
        }
        if self.sent < self.output.len() {
            return false;
        }
        self.output = Vec::new();
        self.sent = 0;
        true
    }
}

/// Makes the sockets, not yet listening. `memory` is for their buffers, [`BUFFERS`] bytes.
pub(crate) fn connections(sockets: &mut SocketSet<'static>, memory: &'static mut [u8]) -> Vec<Connection> {
    let mut connections = Vec::new();
    for pair in memory.chunks_exact_mut(2 * SOCKET_BUFFER) {
        let (receive, send) = pair.split_at_mut(SOCKET_BUFFER);
        let mut socket = Socket::new(SocketBuffer::new(receive), SocketBuffer::new(send));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        connections.push(Connection {
            handle: sockets.add(socket),
            session: None,
            input: Vec::new(),
            needed: 0,
            output: Vec::new(),
            sent: 0,
            closing: false,
            last_active: 0,
        });
    }
    connections
}

/// Clients that are connected.
pub(crate) fn connected(connections: &[Connection]) -> usize {
    connections.iter().filter(|connection| connection.session.is_some()).count()
}

impl<M: Machine> Server<M> {
    pub(crate) fn new(store: Store, machine: M, port: u16) -> Self {
        Self { store, machine, args: Args::new(), out: Out::new(), next_id: 1, requests: 0, port }
    }

    /// Requests carried out so far.
    pub(crate) fn requests(&self) -> u64 {
        self.requests
    }

    /// Serves all connections once. True if some of them have more to do at once.
    pub(crate) fn serve(&mut self, connections: &mut [Connection], sockets: &mut SocketSet<'_>, now: i64) -> bool {
        let mut busy = false;
        let mut listening = 0;
        for connection in connections.iter_mut() {
            let socket = sockets.get_mut::<Socket<'_>>(connection.handle);
            busy |= self.serve_one(connection, socket, now);
            listening += usize::from(socket.is_listening());
        }
        for connection in connections.iter_mut() {
            if listening >= SPARE {
                break;
            }
            let socket = sockets.get_mut::<Socket<'_>>(connection.handle);
            // Such a socket only guards against stray packets of a connection that is over.
            if socket.state() == State::TimeWait {
                socket.abort();
                self.listen(connection, socket);
                listening += 1;
            }
        }
        if listening == 0 {
            make_room(connections, sockets, now);
        }
        busy
    }

    fn listen(&self, connection: &mut Connection, socket: &mut Socket<'_>) {
        connection.reset();
        socket.set_timeout(Some(HANDSHAKE));
        // Fails for port 0 only, which the command line cannot give.
        let _ = socket.listen(self.port);
    }

    fn serve_one(&mut self, connection: &mut Connection, socket: &mut Socket<'_>, now: i64) -> bool {
        match socket.state() {
            State::Listen | State::SynReceived => return false,
            State::Closed => {
                self.listen(connection, socket);
                return false;
            }
            State::Established | State::CloseWait => {}
            // Closed by us: only smoltcp has something to do.
            _ => return false,
        }
        if connection.session.is_none() {
            connection.session = Some(Session { id: self.next_id });
            connection.last_active = now;
            self.next_id += 1;
            // A timeout would also end connections that are merely idle.
            socket.set_timeout(None);
        }
        let mut busy = false;
        if connection.send_rest(socket) && !connection.closing && socket.can_recv() {
            connection.last_active = now;
            self.receive(connection, socket);
            busy = socket.can_recv() && connection.output.is_empty() && !connection.closing;
        }
        let finished = connection.closing || (socket.state() == State::CloseWait && !socket.can_recv());
        if finished && connection.output.is_empty() {
            socket.set_timeout(Some(HANDSHAKE));
            socket.close();
        }
        busy
    }

    /// Takes what the socket has received, in place where whole requests are there in one piece.
    fn receive(&mut self, connection: &mut Connection, socket: &mut Socket<'_>) {
        let session = connection.session.unwrap_or_default();
        if connection.input.is_empty() {
            let result = socket.recv(|bytes| {
                let progress = self.requests_in(bytes, &session);
                (progress.used, progress)
            });
            let Ok(progress) = result else { return };
            self.send(connection, socket, &progress);
            // More requests than one batch: what is left may well be whole, and stays where it is.
            if connection.closing || progress.full {
                return;
            }
        }
        let moved = socket.recv(|bytes| {
            let fits = connection.input.try_reserve(bytes.len()).is_ok();
            if fits {
                connection.input.extend_from_slice(bytes);
            }
            (bytes.len(), fits)
        });
        if moved == Ok(false) {
            self.out.error("OOM request does not fit in memory");
            self.send(connection, socket, &Progress { close: true, ..Progress::default() });
            return;
        }
        if connection.input.len() < connection.needed {
            return;
        }
        let input = core::mem::take(&mut connection.input);
        let progress = self.requests_in(&input, &session);
        connection.needed = progress.needed;
        connection.input = input;
        if progress.used >= connection.input.len() {
            connection.input = Vec::new();
        } else {
            connection.input.drain(..progress.used);
        }
        self.send(connection, socket, &progress);
    }

    /// Carries out the requests at the start of `bytes`.
    fn requests_in(&mut self, bytes: &[u8], session: &Session) -> Progress {
        let mut progress = Progress::default();
        while let Some(rest) = bytes.get(progress.used..).filter(|rest| !rest.is_empty()) {
            if self.out.bytes().len() >= BATCH {
                progress.full = true;
                break;
            }
            match parse(rest, &mut self.args) {
                Ok(Parsed::Request(length)) => {
                    self.requests += 1;
                    let (store, machine) = (&mut self.store, &mut self.machine);
                    let outcome = execute(store, machine, session, rest, &self.args, &mut self.out);
                    progress.used += length;
                    progress.close = outcome == Outcome::Close || self.out.failed();
                }
                Ok(Parsed::NeedsBytes(needed)) => {
                    progress.needed = needed;
                    break;
                }
                Err(error) => {
                    self.out.error(error.message());
                    progress.close = true;
                }
            }
            if progress.close {
                // What follows is not looked at.
                progress.used = bytes.len();
                break;
            }
        }
        progress
    }

    /// Sends the replies, or as much as the socket takes; the rest waits in the connection.
    fn send(&mut self, connection: &mut Connection, socket: &mut Socket<'_>, progress: &Progress) {
        let taken = socket.send_slice(self.out.bytes()).unwrap_or(0);
        connection.closing |= progress.close;
        if taken < self.out.bytes().len() {
            // The buffer itself moves: where memory is short, a copy might not fit.
            connection.output = self.out.take();
            connection.sent = taken;
        }
        self.out.clear(OUT_KEPT);
    }
}

/// How far the requests in a buffer were carried out.
#[derive(Debug, Default, Clone, Copy)]
struct Progress {
    /// Bytes that are done with.
    used: usize,
    /// The rest holds no whole request before it has so many bytes.
    needed: usize,
    /// There may be whole requests in the rest: enough was done for now.
    full: bool,
    /// The connection is to be closed.
    close: bool,
}

/// Nobody can connect: the connection that was silent for longest has to go, if that is long.
fn make_room(connections: &[Connection], sockets: &mut SocketSet<'_>, now: i64) {
    let silent = |connection: &&Connection| connection.session.is_some() && now - connection.last_active > EVICTABLE;
    let candidate = connections.iter().filter(silent).min_by_key(|connection| connection.last_active);
    if let Some(handle) = candidate.map(|connection| connection.handle) {
        sockets.get_mut::<Socket<'_>>(handle).abort();
    }
}
