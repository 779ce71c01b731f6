//! A TCP client of the guest, with its own stack (smoltcp): no tap, no namespace, no root.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::Receiver;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};
use vmm::SocketPort;

const CLIENT_MAC: EthernetAddress = EthernetAddress([0x02, 0, 0, 0, 0, 0x01]);
const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
const GUEST_PORT: u16 = 6379;
const CLIENT_PORT: u16 = 40_001;
const BUFFER: usize = 16 << 10;
/// Longest wait for a frame before timers are looked at again.
const TICK: Duration = Duration::from_millis(20);

/// The cable as smoltcp sees it.
struct Cable {
    from_guest: Receiver<Vec<u8>>,
    to_guest: Arc<SocketPort>,
    /// A frame that was waited for.
    waiting: Option<Vec<u8>>,
}

struct Incoming(Vec<u8>);
struct Outgoing<'a>(&'a SocketPort);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        // A full cable drops, like any cable; TCP sends again.
        drop(self.0.send(&frame));
        result
    }
}

impl Device for Cable {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let frame = self.waiting.take().or_else(|| self.from_guest.try_recv().ok())?;
        Some((Incoming(frame), Outgoing(&self.to_guest)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(&self.to_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = 1514;
        caps
    }
}

/// A client that increments one key over one connection for ever and checks each answer.
pub struct Counter {
    count: Arc<AtomicU64>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), String>>>,
}

impl Counter {
    /// Starts the client; `prelude` is sent first, one command a line, each of which must be answered with `+` or `:`.
    ///
    /// # Panics
    /// When the host gives no thread.
    #[must_use]
    pub fn start(from_guest: Receiver<Vec<u8>>, to_guest: Arc<SocketPort>, prelude: Vec<String>) -> Self {
        let (count, ending) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let shared = (Arc::clone(&count), Arc::clone(&ending));
        let cable = Cable { from_guest, to_guest, waiting: None };
        let thread = std::thread::Builder::new()
            .name("client".into())
            .spawn(move || Client::new(cable).live(&prelude, &shared.0, &shared.1))
            .expect("a thread");
        Self { count, ending, thread: Some(thread) }
    }

    /// How far it has counted, every number answered by the guest in its turn.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Whether it still counts.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Ends the client.
    ///
    /// # Errors
    /// What it found wrong: an answer out of turn, a connection that broke.
    ///
    /// # Panics
    /// When the client did.
    pub fn finish(mut self) -> Result<u64, String> {
        self.ending.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("finished once");
        thread.join().expect("the client does not panic")?;
        Ok(self.count())
    }
}

/// Says these lines over one TCP connection to `port` of the guest, each once the one before was answered, and returns the answers.
///
/// # Errors
/// When they did not all come within `patience`, or the connection broke.
pub fn say(
    from_guest: Receiver<Vec<u8>>,
    to_guest: Arc<SocketPort>,
    port: u16,
    lines: &[&str],
    patience: Duration,
) -> Result<Vec<String>, String> {
    let mut client = Client::new(Cable { from_guest, to_guest, waiting: None });
    client.connect(port)?;
    let deadline = std::time::Instant::now() + patience;
    let late = || std::time::Instant::now() > deadline;
    let answer = |line: &&str| client.ask(line, late)?.ok_or_else(|| format!("no answer within {patience:?}"));
    lines.iter().map(answer).collect()
}

struct Client {
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    received: Vec<u8>,
}

impl Client {
    fn new(mut cable: Cable) -> Self {
        let mut config = Config::new(HardwareAddress::Ethernet(CLIENT_MAC));
        config.random_seed = 1;
        let mut interface = Interface::new(config, &mut cable, Instant::now());
        interface.update_ip_addrs(|all| {
            all.push(IpCidr::new(IpAddress::Ipv4(CLIENT_IP), 24)).expect("room for one address");
        });
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(tcp::Socket::new(buffer(), buffer()));
        Self { cable, interface, sockets, handle, received: Vec::new() }
    }

    fn live(mut self, prelude: &[String], count: &AtomicU64, ending: &AtomicBool) -> Result<(), String> {
        self.connect(GUEST_PORT)?;
        let ending = || ending.load(Ordering::SeqCst);
        for command in prelude {
            let Some(answer) = self.ask(command, ending)? else { return Ok(()) };
            if !answer.starts_with(['+', ':']) {
                return Err(format!("{command}: {answer}"));
            }
        }
        let mut expected = 1;
        while let Some(answer) = self.ask("INCR counter", ending)? {
            if answer != format!(":{expected}") {
                return Err(format!("the guest answered {answer} when the count was {expected}"));
            }
            count.store(expected, Ordering::SeqCst);
            expected += 1;
        }
        Ok(())
    }

    fn connect(&mut self, port: u16) -> Result<(), String> {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        socket.set_nagle_enabled(false);
        let to = (IpAddress::Ipv4(GUEST_IP), port);
        socket.connect(self.interface.context(), to, CLIENT_PORT).map_err(|e| format!("connect: {e}"))
    }

    /// Sends one inline command and waits for one line; `None` when the test ends meanwhile.
    fn ask(&mut self, command: &str, ending: impl Fn() -> bool) -> Result<Option<String>, String> {
        let line = format!("{command}\r\n").into_bytes();
        let mut sent = 0;
        while !ending() {
            self.interface.poll(Instant::now(), &mut self.cable, &mut self.sockets);
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
            if !socket.is_open() {
                return Err("the connection broke".into());
            }
            if sent < line.len() && socket.can_send() {
                sent += socket.send_slice(&line[sent..]).map_err(|e| format!("send: {e}"))?;
                continue;
            }
            while socket.can_recv() {
                let received = &mut self.received;
                let take = |bytes: &mut [u8]| (bytes.len(), received.extend_from_slice(bytes));
                socket.recv(take).map_err(|e| format!("receive: {e}"))?;
            }
            if let Some(end) = self.received.windows(2).position(|w| w == b"\r\n") {
                let answer = String::from_utf8_lossy(&self.received[..end]).into_owned();
                self.received.drain(..end + 2);
                return Ok(Some(answer));
            }
            self.wait();
        }
        Ok(None)
    }

    /// Waits for a frame, or for the next timer.
    fn wait(&mut self) {
        let timer = self.interface.poll_delay(Instant::now(), &self.sockets);
        let limit = timer.map_or(TICK, |d| Duration::from_micros(d.total_micros()).min(TICK));
        self.cable.waiting = self.cable.from_guest.recv_timeout(limit).ok();
    }
}
