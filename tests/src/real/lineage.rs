//! A witness on the guest LAN that follows what is said in the guest's name: from which host each frame came, and whether all that was
//! ever said belongs to one history. Two guests that run apart say different bytes at the same place of a TCP stream.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::network::{GUEST_MAC, GUEST_PORT, Network};
use super::watch::lan_ports;
use super::{Error, Node, Result, clock, sys};

/// Bytes of each stream that are remembered for comparison: more than a window.
const REMEMBERED: usize = 256 << 10;
/// Most complaints that are kept.
const COMPLAINTS_MAX: usize = 20;

/// A silence of so many microseconds ends a turn.
const PAUSE_US: u64 = 100_000;

/// Frames in a row from one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The host.
    pub from: Node,
    /// When its first frame came, microseconds of [`clock::mono_us`].
    pub first_us: u64,
    /// When its last frame came.
    pub last_us: u64,
    /// How many there were.
    pub frames: u64,
}

/// What the witness saw since it was asked last.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Who spoke, in order.
    pub turns: Vec<Turn>,
    /// Bytes that contradict what was said before.
    pub contradictions: Vec<String>,
    /// Bytes of TCP streams that were said at least twice, and the same each time.
    pub repeated_bytes: u64,
}

/// A witness at work.
pub struct Witness {
    stop: Arc<AtomicBool>,
    notes: Arc<Mutex<Notes>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Witness {
    /// Begins to watch both hosts' ports of the guest LAN.
    pub fn start(network: &Network) -> Result<Self> {
        let (socket, node_of) = lan_ports(network)?;
        let stop = Arc::new(AtomicBool::new(false));
        let notes = Arc::new(Mutex::new(Notes::default()));
        let watch = {
            let (stop, notes) = (Arc::clone(&stop), Arc::clone(&notes));
            move || watch(&socket, &node_of, &stop, &notes)
        };
        let thread =
            thread::Builder::new().name("witness".into()).spawn(watch).map_err(Error::io("cannot start a thread"))?;
        Ok(Self { stop, notes, thread: Some(thread) })
    }

    /// What was seen since the last call.
    #[must_use]
    pub fn take(&self) -> Seen {
        std::mem::take(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner).seen)
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // What it could not see any more is not missed: the wires are being taken down.
            let _ended = thread.join();
        }
    }
}

fn watch(
    socket: &sys::PacketSocket,
    node_of: &impl Fn(u32) -> Option<Node>,
    stop: &AtomicBool,
    notes: &Mutex<Notes>,
) -> Result<()> {
    let mut buffer = vec![0; 2048];
    while !stop.load(Ordering::Acquire) {
        let packet = socket.receive(&mut buffer).map_err(Error::io("watching the guest LAN"))?;
        let Some(packet) = packet else { continue };
        if let Some(from) = node_of(packet.interface)
            && let Some(frame) = buffer.get(..packet.len)
            && frame.get(6..12) == Some(&GUEST_MAC)
        {
            let age_us = u64::try_from(socket.age().as_micros()).unwrap_or(0);
            let at_us = clock::mono_us().saturating_sub(age_us);
            notes.lock().unwrap_or_else(PoisonError::into_inner).frame(from, at_us, frame);
        }
    }
    Ok(())
}

#[derive(Default)]
struct Notes {
    seen: Seen,
    streams: HashMap<(Ipv4Addr, u16), Stream>,
}

impl Notes {
    fn frame(&mut self, from: Node, at_us: u64, frame: &[u8]) {
        match self.seen.turns.last_mut() {
            Some(turn) if turn.from == from && at_us.saturating_sub(turn.last_us) < PAUSE_US => {
                turn.last_us = at_us;
                turn.frames += 1;
            }
            _ => self.seen.turns.push(Turn { from, first_us: at_us, last_us: at_us, frames: 1 }),
        }
        let Some(segment) = Segment::parse(frame) else { return };
        let stream = self.streams.entry(segment.to).or_default();
        match stream.say(from, &segment) {
            Ok(repeated) => self.seen.repeated_bytes += repeated,
            Err(what) if self.seen.contradictions.len() < COMPLAINTS_MAX => {
                self.seen.contradictions.push(format!("at {at_us} us, to {:?}: {what}", segment.to));
            }
            Err(_) => {}
        }
    }
}

/// A segment that the guest's server sent.
struct Segment<'a> {
    to: (Ipv4Addr, u16),
    sequence: u32,
    opens: bool,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// `None` for everything but TCP from the guest's server.
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let ip = frame.get(14..)?;
        if frame.get(12..14)? != [8, 0] || ip.first()? >> 4 != 4 || *ip.get(9)? != 6 {
            return None;
        }
        let head = usize::from(ip.first()? & 15) * 4;
        let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
        let to: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
        let tcp = ip.get(head..total)?;
        let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        if port(0)? != GUEST_PORT {
            return None;
        }
        let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
        let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
        let opens = tcp.get(13)? & 2 != 0;
        Some(Self { to: (to.into(), port(2)?), sequence, opens, payload })
    }
}

/// What the guest said in one TCP connection.
#[derive(Default)]
struct Stream {
    /// Sequence number of the SYN.
    opened: Option<u32>,
    /// Sequence number of the first remembered byte.
    base: u32,
    bytes: VecDeque<u8>,
    /// Who said the last new byte.
    from: Option<Node>,
}

impl Stream {
    /// Takes a segment in; how many bytes of it had been said before, or in what it contradicts them.
    fn say(&mut self, from: Node, segment: &Segment<'_>) -> Result<u64, String> {
        if segment.opens {
            if self.opened != Some(segment.sequence) {
                *self =
                    Self { opened: Some(segment.sequence), base: segment.sequence.wrapping_add(1), ..Self::default() };
            }
            return Ok(0);
        }
        if segment.payload.is_empty() {
            return Ok(0);
        }
        // Distances are taken modulo 2^32, halves of it being behind and ahead.
        let ahead = usize::try_from(segment.sequence.wrapping_sub(self.base)).unwrap_or(usize::MAX);
        let behind = usize::try_from(self.base.wrapping_sub(segment.sequence)).unwrap_or(usize::MAX);
        let (skip, at) = if ahead < 1 << 31 { (0, ahead) } else { (behind, 0) };
        if at > self.bytes.len() {
            // Something in between was never on this LAN: begin anew behind it.
            self.bytes.clear();
            self.base = segment.sequence;
            return self.say(from, segment);
        }
        let said = segment.payload.get(skip..).unwrap_or_default();
        let known = self.bytes.len().saturating_sub(at).min(said.len());
        let old: Vec<u8> = self.bytes.range(at..at + known).copied().collect();
        let (again, new) = said.split_at(known);
        if let Some(first) = old.iter().zip(again).position(|(old, again)| old != again) {
            let show = |bytes: &[u8]| String::from_utf8_lossy(&bytes[first..bytes.len().min(first + 80)]).into_owned();
            let place = segment.sequence.wrapping_sub(self.opened.unwrap_or(0));
            return Err(format!(
                "{from} says {:?} at byte {place} of the stream, where {} had said {:?}",
                show(again),
                self.from.map_or("nobody", Node::as_str),
                show(&old)
            ));
        }
        self.bytes.extend(new);
        if !new.is_empty() {
            self.from = Some(from);
        }
        let surplus = self.bytes.len().saturating_sub(REMEMBERED);
        self.bytes.drain(..surplus);
        self.base = self.base.wrapping_add(u32::try_from(surplus).unwrap_or(0));
        Ok(known as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 77, 0, 1), 999);

    fn segment(sequence: u32, payload: &[u8]) -> Segment<'_> {
        Segment { to: TO, sequence, opens: false, payload }
    }

    fn opened(sequence: u32) -> Stream {
        let mut stream = Stream::default();
        stream.say(Node::A, &Segment { opens: true, ..segment(sequence, b"") }).unwrap();
        stream
    }

    #[test]
    fn the_same_again_is_fine_and_another_is_not() {
        // The sequence numbers wrap in the middle of what is said.
        let mut stream = opened(u32::MAX - 3);
        let first = u32::MAX - 2;
        assert_eq!(stream.say(Node::A, &segment(first, b"hello ")), Ok(0));
        assert_eq!(stream.say(Node::A, &segment(first.wrapping_add(6), b"world")), Ok(0));
        assert_eq!(stream.say(Node::B, &segment(first.wrapping_add(3), b"lo world!")), Ok(8));
        assert_eq!(stream.say(Node::B, &Segment { opens: true, ..segment(u32::MAX - 3, b"") }), Ok(0));
        let wrong = stream.say(Node::A, &segment(first.wrapping_add(6), b"wOrld")).unwrap_err();
        assert!(wrong.contains("a says \"Orld\" at byte 7") && wrong.contains("b had said \"orld\""), "{wrong}");
        // A new connection on the same port is another stream.
        assert_eq!(stream.say(Node::B, &Segment { opens: true, ..segment(500, b"") }), Ok(0));
        assert_eq!(stream.say(Node::B, &segment(501, b"other")), Ok(0));
    }

    #[test]
    fn old_bytes_are_forgotten_and_gaps_begin_anew() {
        let mut stream = opened(0);
        let piece = vec![7; 1_000];
        for n in 0..400 {
            assert_eq!(stream.say(Node::A, &segment(1 + n * 1_000, &piece)), Ok(0));
        }
        assert_eq!(stream.bytes.len(), REMEMBERED);
        // Half of it is older than what is remembered.
        assert_eq!(stream.say(Node::B, &segment(stream.base.wrapping_sub(500), &piece)), Ok(500));
        assert_eq!(stream.say(Node::B, &segment(1, b"long gone")), Ok(0));
        assert_eq!(stream.say(Node::B, &segment(1_000_000, b"after a gap")), Ok(0));
        assert!(stream.say(Node::A, &segment(1_000_000, b"After a gap")).is_err());
    }

    #[test]
    fn frames_of_the_guests_server_are_understood_and_others_left_alone() {
        let mut frame = vec![0; 14 + 20 + 20];
        frame[6..12].copy_from_slice(&GUEST_MAC);
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[16..18].copy_from_slice(&42_u16.to_be_bytes());
        frame[14 + 9] = 6;
        frame[30..34].copy_from_slice(&[10, 77, 0, 1]);
        frame[34..36].copy_from_slice(&GUEST_PORT.to_be_bytes());
        frame[36..38].copy_from_slice(&999_u16.to_be_bytes());
        frame[38..42].copy_from_slice(&77_u32.to_be_bytes());
        frame[34 + 12] = 5 << 4;
        // Two bytes, then the padding of a short frame.
        frame.extend_from_slice(b"hi\0\0\0\0");
        let parsed = Segment::parse(&frame).unwrap();
        assert_eq!((parsed.to, parsed.sequence, parsed.opens, parsed.payload), (TO, 77, false, &b"hi"[..]));
        for end in 0..frame.len() - 6 {
            assert!(Segment::parse(&frame[..end]).is_none(), "{end}");
        }
        frame[13] = 6;
        assert!(Segment::parse(&frame).is_none());
    }
}
