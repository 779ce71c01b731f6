//! Connections: bytes from smoltcp's sockets to requests, replies back.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::ops::Range;

use kv::database::{Fate, IO_ERROR};
use kv::{Args, Database, Machine, Out, Outcome, Parsed, Ran, Session, parse};
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
    pub(crate) database: Database,
    pub(crate) machine: M,
    args: Args,
    out: Out,
    /// Replies in `out` that wait.
    held: VecDeque<Held>,
    next_id: u64,
    requests: u64,
    port: u16,
}

/// A reply that must not leave before the log is durable up to a ticket, and where it lies in the output.
struct Held {
    bytes: Range<usize>,
    until: u64,
}

/// What the input of a connection may have.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Rest {
    /// No whole request.
    #[default]
    Part,
    /// Whole requests: enough was done for now.
    More,
    /// A whole request that the log has no room for yet.
    Stalled,
}

/// One socket, and the connection on it if there is one.
pub(crate) struct Connection {
    handle: SocketHandle,
    session: Option<Session>,
    /// The start of a request that has not come completely.
    input: Vec<u8>,
    /// No request ends before so many bytes.
    needed: usize,
    rest: Rest,
    /// Replies that the socket had no room for, or that wait, and how much of them it has taken since.
    output: Vec<u8>,
    sent: usize,
    held: VecDeque<Held>,
    /// The reply to the last request comes later.
    waiting: bool,
    closing: bool,
    last_active: i64,
}

impl Connection {
    fn reset(&mut self) {
        self.session = None;
        self.input = Vec::new();
        self.needed = 0;
        self.rest = Rest::Part;
        self.output = Vec::new();
        self.sent = 0;
        self.held = VecDeque::new();
        self.waiting = false;
        self.closing = false;
    }

    /// How much of the output may leave.
    fn released(&mut self, database: &Database) -> usize {
        while let Some(Held { bytes, until }) = self.held.front() {
            match database.fate(*until) {
                Fate::Waits => return bytes.start,
                Fate::Leaves => {}
                Fate::Failed => {
                    let bytes = bytes.clone();
                    self.replace(bytes);
                }
            }
            self.held.pop_front();
        }
        self.output.len()
    }

    /// Puts an error in the place of a reply.
    fn replace(&mut self, bytes: Range<usize>) {
        let more = IO_ERROR.len().saturating_sub(bytes.len());
        let less = bytes.len().saturating_sub(IO_ERROR.len());
        if self.output.try_reserve(more).is_err() {
            self.output.truncate(bytes.start);
            self.held.clear();
            self.closing = true;
            return;
        }
        self.output.splice(bytes, IO_ERROR.iter().copied());
        for held in &mut self.held {
            held.bytes = held.bytes.start + more - less..held.bytes.end + more - less;
        }
    }

    /// Hands replies to the socket. True if none are left.
    fn send_rest(&mut self, socket: &mut Socket<'_>, database: &Database) -> bool {
        let released = self.released(database);
        if let Some(rest) = self.output.get(self.sent..released).filter(|rest| !rest.is_empty()) {
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
            rest: Rest::Part,
            output: Vec::new(),
            sent: 0,
            held: VecDeque::new(),
            waiting: false,
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

/// Gives the reply that a connection waits for; it may be gone.
pub(crate) fn answer(connections: &mut [Connection], session: u64, reply: Vec<u8>) {
    let waits = |connection: &&mut Connection| {
        connection.waiting && connection.session.as_ref().is_some_and(|known| known.id == session)
    };
    let Some(connection) = connections.iter_mut().find(waits) else { return };
    connection.waiting = false;
    if connection.output.is_empty() {
        connection.output = reply;
    } else if connection.output.try_reserve(reply.len()).is_ok() {
        connection.output.extend_from_slice(&reply);
    } else {
        connection.closing = true;
    }
}

impl<M: Machine> Server<M> {
    pub(crate) fn new(database: Database, machine: M, port: u16) -> Self {
        let (args, out, held) = (Args::new(), Out::new(), VecDeque::new());
        Self { database, machine, args, out, held, next_id: 1, requests: 0, port }
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
        let sent = connection.send_rest(socket, &self.database);
        let more = |connection: &Connection, socket: &Socket<'_>| socket.can_recv() || connection.rest != Rest::Part;
        if sent && !connection.closing && !connection.waiting && more(connection, socket) {
            connection.last_active = now;
            self.receive(connection, socket);
            // What is stalled is tried again when the disk has done something.
            let idle = connection.waiting || connection.closing || connection.rest == Rest::Stalled;
            busy = more(connection, socket) && connection.output.is_empty() && !idle;
        }
        let over = socket.state() == State::CloseWait && !more(connection, socket) && !connection.waiting;
        if (connection.closing || over) && connection.output.is_empty() {
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
            // What is left may well be whole, and stays where it is.
            if connection.closing || connection.waiting || connection.rest != Rest::Part {
                return;
            }
        }
        if socket.can_recv() && !self.move_input(connection, socket) {
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

    /// Moves what the socket has received to the connection. False if it does not fit in memory.
    fn move_input(&self, connection: &mut Connection, socket: &mut Socket<'_>) -> bool {
        let moved = socket.recv(|bytes| {
            let fits = connection.input.try_reserve(bytes.len()).is_ok();
            if fits {
                connection.input.extend_from_slice(bytes);
            }
            (bytes.len(), fits)
        });
        moved != Ok(false)
    }

    /// Carries out the requests at the start of `bytes`.
    fn requests_in(&mut self, bytes: &[u8], session: &Session) -> Progress {
        let mut progress = Progress::default();
        while let Some(rest) = bytes.get(progress.used..).filter(|rest| !rest.is_empty()) {
            if self.out.bytes().len() >= BATCH {
                progress.rest = Rest::More;
                break;
            }
            match parse(rest, &mut self.args) {
                Ok(Parsed::Request(length)) => {
                    let start = self.out.bytes().len();
                    let Ran { outcome, until } =
                        self.database.run(&mut self.machine, session, rest, &self.args, &mut self.out);
                    if outcome == Outcome::Stall {
                        progress.rest = Rest::Stalled;
                        break;
                    }
                    self.requests += 1;
                    progress.used += length;
                    let held = self.hold(start, until);
                    progress.close = outcome == Outcome::Close || self.out.failed() || !held;
                    if outcome == Outcome::Wait {
                        (progress.waits, progress.rest) = (true, Rest::More);
                        break;
                    }
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

    /// Notes that the reply from `start` on waits, if it does. False if there is no memory for that.
    fn hold(&mut self, start: usize, until: u64) -> bool {
        if self.database.fate(until) == Fate::Leaves {
            return true;
        }
        if self.held.try_reserve(1).is_err() {
            // The reply must not leave, and those before it cannot be told apart from it any more.
            self.held.clear();
            self.out.take();
            return false;
        }
        self.held.push_back(Held { bytes: start..self.out.bytes().len(), until });
        true
    }

    /// Sends the replies, or as much as the socket takes; the rest waits in the connection.
    fn send(&mut self, connection: &mut Connection, socket: &mut Socket<'_>, progress: &Progress) {
        connection.rest = progress.rest;
        connection.waiting = progress.waits;
        if !self.held.is_empty() {
            connection.closing |= progress.close;
            connection.held = core::mem::take(&mut self.held);
            connection.output = self.out.take();
            connection.send_rest(socket, &self.database);
            return;
        }
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
    /// What is left.
    rest: Rest,
    /// The reply to the last request comes later.
    waits: bool,
    /// The connection is to be closed.
    close: bool,
}

/// Nobody can connect: the connection that was silent for longest has to go, if that is long.
fn make_room(connections: &[Connection], sockets: &mut SocketSet<'_>, now: i64) {
    let silent = |connection: &&Connection| {
        connection.session.is_some() && !connection.waiting && now - connection.last_active > EVICTABLE
    };
    let candidate = connections.iter().filter(silent).min_by_key(|connection| connection.last_active);
    if let Some(handle) = candidate.map(|connection| connection.handle) {
        sockets.get_mut::<Socket<'_>>(handle).abort();
    }
}
