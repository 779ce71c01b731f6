//! The model machine's program alone, in virtual time: against a TCP of other make (smoltcp) over a wire that loses, doubles
//! and reorders, with a gate and kills as in a real pair; against itself; and against RAM and segments that nobody would send.
//!
//! `FT_CHECKPOINTS` sets the number of checkpoints of each seed (1,000), `FT_SEED` the first seed.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::Arc;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpAddress, IpCidr, IpProtocol, Ipv4Packet,
    Ipv4Repr, TcpPacket, TcpSeqNumber,
};
use tests::machine::shadow::Shadow;
use tests::real::rng::Rng;
use vmm::model::{End, ModelProgram, ProgramOptions, Step};
use vmm::{DirtyLedger, GuestRam, PageNo, Section};

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x10];
const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const PORT: u16 = 6379;
const RAM: u64 = 4 << 20;
const MICROSECOND: u64 = 1_000;
const SECOND: u64 = 1_000_000_000;
/// How far virtual time moves at once.
const TICK: u64 = 250 * MICROSECOND;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name}={v:?} is not a number")))
}

fn program(cmdline: &str) -> ModelProgram {
    let ram = Arc::new(GuestRam::new(RAM).expect("4 MiB"));
    let options = ProgramOptions::parse(cmdline).expect("a right command line");
    ModelProgram::new(ram, GUEST_MAC, &options).expect("a program that fits")
}

// The wire.

/// One direction of a cable, as bad as a cable can be.
struct Wire {
    rng: Rng,
    /// Of a thousand frames, how many are lost, and how many come twice.
    bad: u64,
    flying: Vec<(u64, Vec<u8>)>,
}

impl Wire {
    fn new(seed: u64, bad: u64) -> Self {
        Self { rng: Rng::new(seed), bad, flying: Vec::new() }
    }

    fn send(&mut self, now: u64, frame: &[u8]) {
        if self.rng.range(0, 1000) < self.bad {
            return;
        }
        let copies = if self.rng.range(0, 1000) < self.bad { 2 } else { 1 };
        for _ in 0..copies {
            // A few take so long that others overtake them.
            let slow = if self.rng.range(0, 1000) < self.bad { self.rng.range(0, 3000) } else { 0 };
            self.flying.push((now + (50 + slow) * MICROSECOND, frame.to_vec()));
        }
    }

    fn arrived(&mut self, now: u64) -> Vec<Vec<u8>> {
        let (mut arrived, flying): (Vec<_>, _) = self.flying.drain(..).partition(|(at, _)| *at <= now);
        self.flying = flying;
        arrived.sort_by_key(|(at, _)| *at);
        arrived.into_iter().map(|(_, frame)| frame).collect()
    }
}

// The client.

#[derive(Default)]
struct Port {
    inbound: VecDeque<Vec<u8>>,
    outbound: Vec<Vec<u8>>,
}

struct Incoming(Vec<u8>);
struct Outgoing<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push(frame);
        result
    }
}

impl Device for Port {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        Some((Incoming(self.inbound.pop_front()?), Outgoing(&mut self.outbound)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.outbound))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = 1514;
        caps
    }
}

fn instant(now: u64) -> Instant {
    Instant::from_micros(i64::try_from(now / MICROSECOND).expect("virtual time is short"))
}

/// What the requests so far must have been answered with.
#[derive(Default)]
struct Model {
    strings: HashMap<u64, Vec<u8>>,
    lists: HashMap<u64, VecDeque<Vec<u8>>>,
}

fn request(words: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        bytes.extend(bulk(word));
    }
    bytes
}

fn bulk(word: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", word.len()).as_bytes(), word, b"\r\n"].concat()
}

fn bulk_or_null(word: Option<&Vec<u8>>) -> Vec<u8> {
    word.map_or_else(|| b"$-1\r\n".to_vec(), |word| bulk(word))
}

impl Model {
    /// A random request and its answer.
    fn next(&mut self, rng: &mut Rng) -> (Vec<u8>, Vec<u8>) {
        let number = rng.range(0, 20);
        let (string, list) = (format!("s{number}").into_bytes(), format!("l{number}").into_bytes());
        let length = if rng.range(0, 20) == 0 { rng.range(0, 20_000) } else { rng.range(0, 300) };
        let value: Vec<u8> = (0..length).map(|_| rng.next_u64().to_le_bytes()[0]).collect();
        match rng.range(0, 7) {
            0 => {
                let request = request(&[b"SET", &string, &value]);
                self.strings.insert(number, value);
                (request, b"+OK\r\n".to_vec())
            }
            1 => (request(&[b"GET", &string]), bulk_or_null(self.strings.get(&number))),
            2 => (request(&[b"ECHO", &value]), bulk(&value)),
            3 => {
                let old = self.strings.remove(&number);
                (request(&[b"DEL", &string]), format!(":{}\r\n", u8::from(old.is_some())).into_bytes())
            }
            4 => {
                let list_now = self.lists.entry(number).or_default();
                list_now.push_front(value.clone());
                (request(&[b"LPUSH", &list, &value]), format!(":{}\r\n", list_now.len()).into_bytes())
            }
            5 => {
                let popped = self.lists.get_mut(&number).and_then(VecDeque::pop_back);
                (request(&[b"RPOP", &list]), bulk_or_null(popped.as_ref()))
            }
            _ => (b"PING\r\n".to_vec(), b"+PONG\r\n".to_vec()),
        }
    }
}

/// A client on one connection that has several requests on the way, and compares every byte that comes back.
struct Client {
    port: Port,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    rng: Rng,
    model: Model,
    to_send: VecDeque<u8>,
    expected: VecDeque<u8>,
    received: u64,
    /// Asks no further.
    done: bool,
    /// Instead of being compared, answers are kept here.
    heard: Option<Vec<u8>>,
}

impl Client {
    fn new(seed: u64) -> Self {
        let mut port = Port::default();
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(CLIENT_MAC)));
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut port, Instant::ZERO);
        interface.update_ip_addrs(|all| all.push(IpCidr::new(IpAddress::Ipv4(CLIENT_IP), 24)).expect("room for one"));
        let buffer = || tcp::SocketBuffer::new(vec![0; 32 << 10]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let local = 40_000 + u16::try_from(seed % 1000).expect("below 1000");
        socket.connect(interface.context(), (IpAddress::Ipv4(GUEST_IP), PORT), local).expect("a fresh socket");
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        let (model, to_send, expected) = (Model::default(), VecDeque::new(), VecDeque::new());
        let rng = Rng::new(seed);
        Self { port, interface, sockets, handle, rng, model, to_send, expected, received: 0, done: false, heard: None }
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// One turn: frames in, requests out, answers compared; the frames to send.
    fn turn(&mut self, now: u64, inbound: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        self.port.inbound.extend(inbound);
        self.interface.poll(instant(now), &mut self.port, &mut self.sockets);
        while !self.done && self.to_send.len() < 4096 && self.expected.len() < 60_000 {
            let (request, answer) = self.model.next(&mut self.rng);
            self.to_send.extend(request);
            self.expected.extend(answer);
        }
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if socket.can_send() {
            let sent = socket.send_slice(self.to_send.make_contiguous()).expect("an open connection");
            self.to_send.drain(..sent);
        }
        while socket.can_recv() {
            let (expected, heard) = (&mut self.expected, &mut self.heard);
            let received = socket.recv(|bytes| {
                if let Some(heard) = heard {
                    heard.extend_from_slice(bytes);
                    return (bytes.len(), bytes.len() as u64);
                }
                let wanted: Vec<u8> = expected.drain(..bytes.len().min(expected.len())).collect();
                assert_eq!(bytes, wanted, "a wrong answer");
                (bytes.len(), bytes.len() as u64)
            });
            self.received += received.expect("an open connection");
        }
        self.interface.poll(instant(now), &mut self.port, &mut self.sockets);
        std::mem::take(&mut self.port.outbound)
    }
}

// The pair.

/// A guest behind a gate, its shadow, and what a backup would have.
struct Pair {
    cmdline: String,
    program: ModelProgram,
    ledger: Arc<DirtyLedger>,
    shadow: Shadow,
    committed: Section,
    held: Vec<Vec<u8>>,
    /// Virtual time minus guest time.
    offset: u64,
}

impl Pair {
    fn new(cmdline: &str) -> Self {
        let program = program(cmdline);
        let (ledger, shadow) = (DirtyLedger::new(), Shadow::zeroed(program.ram()));
        let committed = program.capture();
        Self { cmdline: cmdline.into(), program, ledger, shadow, committed, held: Vec::new(), offset: 0 }
    }

    fn step(&mut self, now: u64, inbound: &[Vec<u8>]) {
        let Step { frames, end, .. } = self.program.step(now - self.offset, inbound);
        assert_eq!(end, None);
        self.held.extend(frames);
    }

    /// Ends an epoch: what was held may go.
    fn checkpoint(&mut self, compare: bool) -> Vec<Vec<u8>> {
        let dirty = self.program.take_dirty(&self.ledger);
        self.shadow.apply(&dirty, self.program.ram());
        dirty.retire();
        if compare {
            assert_eq!(self.shadow.differing(self.program.ram()), [], "pages missing from the dirty set");
        }
        self.committed = self.program.capture();
        std::mem::take(&mut self.held)
    }

    /// The primary dies, and the backup goes on from the last checkpoint.
    fn kill(&mut self, now: u64) {
        self.program = program(&self.cmdline);
        self.shadow.write_to(self.program.ram());
        self.program.restore(&self.committed).expect("an equal machine");
        assert_eq!(self.program.capture(), self.committed);
        self.ledger = DirtyLedger::new();
        self.program.take_dirty(&self.ledger).retire();
        self.held.clear();
        self.offset = now - self.program.now();
    }
}

/// Runs a session and returns how many times the guest was killed.
fn session(seed: u64, bad: u64, checkpoints: u64, kill_of_hundred: u64) -> (u64, u64) {
    let mut pair = Pair::new(&format!("seed={seed} dirty=2000,50 beacon=40"));
    let mut client = Client::new(seed);
    let (mut out, mut back) = (Wire::new(seed + 1, bad), Wire::new(seed + 2, bad));
    let mut rng = Rng::new(seed + 3);
    let (mut now, mut epoch_end, mut kill_at, mut kills, mut epochs) = (0, 0, None, 0, 0);
    let deadline = checkpoints * 20_000 * MICROSECOND + 600 * SECOND;
    while epochs < checkpoints || !client.expected.is_empty() || client.socket().state() == tcp::State::Established {
        assert!(
            now < deadline,
            "seed {seed}: stuck in {:?}, {} bytes missing",
            client.socket().state(),
            client.expected.len()
        );
        now += TICK;
        pair.step(now, &out.arrived(now));
        if kill_at.is_some_and(|at| now >= at) {
            pair.kill(now);
            (kills, kill_at) = (kills + 1, None);
        } else if now >= epoch_end {
            for frame in pair.checkpoint(epochs < checkpoints) {
                back.send(now, &frame);
            }
            epochs += 1;
            epoch_end = now + rng.range(1, 10) * 1000 * MICROSECOND;
            if rng.range(0, 100) < kill_of_hundred && epochs < checkpoints {
                kill_at = Some(rng.range(now, epoch_end));
            }
        }
        for frame in client.turn(now, back.arrived(now)) {
            out.send(now, &frame);
        }
        client.done |= epochs >= checkpoints;
        if client.done && client.to_send.is_empty() && client.expected.is_empty() {
            client.socket().close();
        }
    }
    // Both ends agree that it is over.
    assert!(matches!(
        client.socket().state(),
        tcp::State::TimeWait | tcp::State::Closed | tcp::State::FinWait2 | tcp::State::FinWait1
    ));
    while client.socket().state() != tcp::State::Closed {
        assert!(now < deadline, "seed {seed}: the connection does not close");
        now += 20 * TICK;
        pair.step(now, &out.arrived(now));
        pair.checkpoint(false).iter().for_each(|frame| back.send(now, frame));
        client.turn(now, back.arrived(now)).iter().for_each(|frame| out.send(now, frame));
    }
    (kills, client.received)
}

#[test]
fn a_clean_wire_carries_everything() {
    let (_, received) = session(from_env("FT_SEED", 100), 0, 300, 0);
    assert!(received > 200_000, "{received} bytes");
}

#[test]
fn a_connection_survives_loss_and_kills_without_a_wrong_byte() {
    let (first, checkpoints) = (from_env("FT_SEED", 1), from_env("FT_CHECKPOINTS", 1_000));
    for seed in first..first + 3 {
        let (kills, received) = session(seed, 10, checkpoints, 5);
        println!("seed {seed}: {checkpoints} checkpoints, {kills} kills, {received} bytes compared");
        assert!(kills > checkpoints / 50, "{kills} kills");
        assert!(received > checkpoints * 5, "{received} bytes");
    }
}

/// Sends some bytes on a new connection and closes its own half; what comes back until the server has closed its half too.
fn talk(bytes: &[u8]) -> Vec<u8> {
    let mut program = program("");
    let mut client = Client::new(5);
    client.done = true;
    client.to_send.extend(bytes);
    client.heard = Some(Vec::new());
    let (mut out, mut back) = (Wire::new(1, 0), Wire::new(2, 0));
    let mut now = 0;
    while client.socket().may_recv() || now < SECOND {
        assert!(now < 60 * SECOND, "the server does not close");
        now += TICK;
        let step = program.step(now, &out.arrived(now));
        assert_eq!(step.end, None);
        step.frames.iter().for_each(|frame| back.send(now, frame));
        client.turn(now, back.arrived(now)).iter().for_each(|frame| out.send(now, frame));
        if client.to_send.is_empty() {
            client.socket().close();
        }
    }
    client.heard.unwrap_or_default()
}

#[test]
fn the_server_closes_when_it_should_and_answers_before_that() {
    assert_eq!(talk(b"PING\r\nPI"), b"+PONG\r\n", "half a request of a peer that is gone");
    assert_eq!(talk(b"PING\r\nQUIT\r\nPING\r\n"), b"+PONG\r\n+OK\r\n");
    assert_eq!(talk(b"*1\r\n$200000\r\n"), b"-ERR Protocol error: invalid bulk length\r\n");
    let too_big = [&b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$131072\r\n"[..], &[b'x'; 140_000]].concat();
    assert_eq!(talk(&too_big), b"-ERR Protocol error: too big request\r\n");
}

/// Replies of many times the ring's size, and ones that never fit.
#[test]
fn replies_wait_for_room() {
    let value = vec![b'v'; 60_000];
    let mut requests = request(&[b"SET", b"k", &value]);
    let mut wanted = b"+OK\r\n".to_vec();
    for _ in 0..40 {
        requests.extend(request(&[b"GET", b"k"]));
        wanted.extend(bulk(&value));
        requests.extend(request(&[b"MGET", b"k", b"k"]));
        wanted.extend([b"*2\r\n".to_vec(), bulk(&value), bulk(&value)].concat());
        requests.extend(request(&[b"MGET", b"k", b"k", b"k"]));
        wanted.extend(b"-ERR the reply is too long for this machine\r\n");
    }
    assert!(talk(&requests) == wanted, "{} bytes of replies", wanted.len());
}

// The program against itself.

/// The inputs of a session, to be had again.
fn record(seed: u64, ticks: u64) -> Vec<(u64, Vec<Vec<u8>>)> {
    let mut program = program("dirty=3000,64 beacon=7");
    let mut client = Client::new(seed);
    let (mut out, mut back) = (Wire::new(seed + 1, 20), Wire::new(seed + 2, 20));
    let mut inputs = Vec::new();
    for now in (1..=ticks).map(|n| n * TICK) {
        let inbound = out.arrived(now);
        let step = program.step(now, &inbound);
        inputs.push((now, inbound));
        step.frames.iter().for_each(|frame| back.send(now, frame));
        client.turn(now, back.arrived(now)).iter().for_each(|frame| out.send(now, frame));
    }
    assert!(client.received > 10_000, "{} bytes", client.received);
    inputs
}

fn assert_equal(a: &ModelProgram, b: &ModelProgram) {
    assert_eq!(a.capture(), b.capture());
    let (mut x, mut y) = ([0; 4096], [0; 4096]);
    for page in a.ram().pages() {
        a.ram().copy_out(page, &mut x).expect("RAM");
        b.ram().copy_out(page, &mut y).expect("RAM");
        assert_eq!(x, y, "{page:?}");
    }
}

#[test]
fn two_programs_with_one_past_have_one_future() {
    let inputs = record(7, 4000);
    let (mut a, mut b) = (program("dirty=3000,64 beacon=7"), program("dirty=3000,64 beacon=7"));
    let mut spoke = 0;
    for (n, (now, inbound)) in inputs.iter().enumerate() {
        let step = a.step(*now, inbound);
        spoke += step.frames.len();
        assert_eq!(step, b.step(*now, inbound), "step {n}");
        if n % 250 == 0 {
            assert_equal(&a, &b);
        }
    }
    assert_equal(&a, &b);
    assert!(spoke > 100);
    let mut other = program("dirty=3000,64 beacon=7 seed=2");
    for (now, inbound) in &inputs {
        other.step(*now, inbound);
    }
    assert_ne!(a.capture(), other.capture(), "the seed counts");
}

/// RAM comes from a peer: whatever is in it, the program goes on or crashes as a guest does, and never as Rust does.
#[test]
fn no_contents_of_ram_panic() {
    const START: usize = 2000;
    let inputs = record(8, 2200);
    let mut healthy = program("dirty=3000,64");
    for (now, inbound) in &inputs[..START] {
        assert_eq!(healthy.step(*now, inbound).end, None);
    }
    let section = healthy.capture();
    let mut shadow = Shadow::zeroed(healthy.ram());
    shadow.copy_all(healthy.ram());
    let used: Vec<PageNo> = {
        let ledger = DirtyLedger::new();
        let dirty = healthy.take_dirty(&ledger);
        let pages = dirty.iter().collect();
        dirty.retire();
        pages
    };
    let mut rng = Rng::new(9);
    let (mut crashed, mut went_on) = (0, 0);
    for round in 0..600 {
        let mut program = program("dirty=3000,64");
        shadow.write_to(program.ram());
        spoil(&program, &used, &mut rng, round);
        program.restore(&section).expect("registers of this machine");
        let end = inputs[START..].iter().find_map(|(now, inbound)| program.step(*now, inbound).end);
        match end {
            Some(End::Crashed(_)) => crashed += 1,
            Some(End::PoweredOff) => panic!("nobody asked for that"),
            None => went_on += 1,
        }
    }
    println!("{crashed} crashed, {went_on} went on");
    assert!(crashed > 100 && went_on > 100);
}

/// Writes junk to a few places of pages that the program has used; more often than not to those that hold its structures.
fn spoil(program: &ModelProgram, used: &[PageNo], rng: &mut Rng, round: u64) {
    let mut page = [0; 4096];
    for _ in 0..1 + round % 16 {
        let last = if rng.range(0, 2) == 0 { 4.min(used.len()) } else { used.len() };
        let at = used[usize::try_from(rng.range(0, last as u64)).expect("an index")];
        program.ram().copy_out(at, &mut page).expect("RAM");
        // Words in use matter more than the empty rest of a page.
        let words: Vec<_> = (0..4096).step_by(8).filter(|at| page[*at..at + 8] != [0; 8]).collect();
        let Some(start) = words.get(usize::try_from(rng.range(0, 1 + words.len() as u64)).expect("an index")) else {
            continue;
        };
        let start = *start;
        let junk = match rng.range(0, 4) {
            0 => rng.next_u64(),
            1 => u64::MAX,
            2 => rng.range(0, RAM),
            _ => u64::from_le_bytes(page[start..start + 8].try_into().expect("eight bytes")) ^ (1 << rng.range(0, 64)),
        };
        page[start..start + 8].copy_from_slice(&junk.to_le_bytes());
        program.ram().copy_in(at, &page).expect("RAM");
    }
}

/// A segment with right checksums and anything else wrong.
fn odd_segment(rng: &mut Rng) -> Vec<u8> {
    let payload = vec![b'*'; usize::try_from(rng.range(0, 100)).expect("short")];
    let mut frame = vec![0; 14 + 20 + 20 + payload.len()];
    let mut ethernet = EthernetFrame::new_unchecked(&mut frame[..]);
    ethernet.set_dst_addr(EthernetAddress(GUEST_MAC));
    ethernet.set_src_addr(EthernetAddress(CLIENT_MAC));
    ethernet.set_ethertype(EthernetProtocol::Ipv4);
    let ip = Ipv4Repr {
        src_addr: CLIENT_IP,
        dst_addr: GUEST_IP,
        next_header: IpProtocol::Tcp,
        payload_len: 20 + payload.len(),
        hop_limit: 64,
    };
    let mut packet = Ipv4Packet::new_unchecked(ethernet.payload_mut());
    ip.emit(&mut packet, &ChecksumCapabilities::default());
    let mut tcp = TcpPacket::new_unchecked(packet.payload_mut());
    let number = |rng: &mut Rng| {
        let bits = if rng.range(0, 2) == 0 { 2 } else { u64::from(u32::MAX) };
        TcpSeqNumber(i32::from_le_bytes(u32::try_from(rng.range(0, bits)).expect("32 bits").to_le_bytes()))
    };
    tcp.set_src_port(u16::try_from(rng.range(1, 8)).expect("16 bits"));
    tcp.set_dst_port(if rng.range(0, 20) == 0 { 1 } else { PORT });
    tcp.set_seq_number(number(rng));
    tcp.set_ack_number(number(rng));
    tcp.set_window_len(u16::try_from(rng.range(0, 3) * 1000).expect("16 bits"));
    tcp.set_header_len(20);
    let bit = |rng: &mut Rng| rng.range(0, 2) == 0;
    tcp.set_syn(bit(rng));
    tcp.set_ack(bit(rng));
    tcp.set_fin(bit(rng) && bit(rng));
    tcp.set_rst(bit(rng) && bit(rng) && bit(rng));
    tcp.payload_mut().copy_from_slice(&payload);
    tcp.fill_checksum(&IpAddress::Ipv4(CLIENT_IP), &IpAddress::Ipv4(GUEST_IP));
    frame
}

/// A host that sends nonsense from several ports does no harm: afterwards a client is served.
#[test]
fn no_segment_panics_and_service_goes_on() {
    let mut rng = Rng::new(11);
    let mut program = program("");
    let mut now = 0;
    let mut answers = 0;
    for _ in 0..20_000 {
        now += rng.range(0, 4000) * MICROSECOND;
        let burst: Vec<_> = (0..rng.range(1, 8)).map(|_| odd_segment(&mut rng)).collect();
        let step = program.step(now, &burst);
        assert_eq!(step.end, None);
        answers += step.frames.len();
    }
    assert!(answers > 10_000);
    let mut client = Client::new(12);
    let (mut out, mut back) = (Wire::new(1, 0), Wire::new(2, 0));
    let limit = now + 120 * SECOND;
    while client.received < 10_000 {
        assert!(now < limit, "nobody is served any more");
        now += TICK;
        let step = program.step(now, &out.arrived(now));
        step.frames.iter().for_each(|frame| back.send(now, frame));
        client.turn(now, back.arrived(now)).iter().for_each(|frame| out.send(now, frame));
    }
}

/// What a simulator uses: no client at all, pages that get dirty at a rate, and output at a rate.
#[test]
fn load_and_beacon_keep_their_rates() {
    let mut program = program("dirty=1000,100 beacon=50");
    let ledger = DirtyLedger::new();
    let (mut now, mut frames, mut touched) = (0, 0, 0);
    while now < 10 * SECOND {
        let step = program.step(now, &[]);
        frames += step.frames.len();
        let dirty = program.take_dirty(&ledger);
        touched += dirty.len();
        dirty.retire();
        now = step.wake_at.expect("there is always something to do");
    }
    assert!((195..=202).contains(&frames), "{frames} beacons in 10 s");
    assert!((9_900..=10_100).contains(&touched), "{touched} pages in 10 s");
}
