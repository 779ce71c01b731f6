//! One record of the connection table: what the program knows of a TCP connection.

use super::bus::{Bus, Fault};
use super::layout::{Layout, RECORD, RING, TABLE};
use super::wire::Station;
use crate::state::codec::{Decoder, Encoder, Malformed};

/// Largest segment that is sent or asked for: an Ethernet frame's worth.
pub(super) const MSS: u16 = 1460;
/// A peer that asks for less is answered in segments of this size all the same.
pub(super) const LEAST_MSS: u16 = 64;

const BAD_RECORD: Fault = Fault("a connection record that no program wrote");

/// Where a connection is. The states of RFC 9293 between ESTABLISHED and TIME-WAIT are [`State::Open`] with
/// [`Tcb::closing`] and [`Tcb::peer_closed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Free,
    /// SYN and ACK are sent.
    SynReceived,
    Open,
    /// Our FIN is acknowledged, the peer's has not come.
    FinWait,
    TimeWait,
}

/// A connection. Sequence numbers are named as in RFC 9293.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tcb {
    pub(super) state: State,
    /// The program wants to close: after what it has queued comes a FIN.
    pub(super) closing: bool,
    /// The peer's FIN has come.
    pub(super) peer_closed: bool,
    /// The peer closed first, so that it and not we wait in TIME-WAIT.
    pub(super) passive: bool,
    /// A segment must go out even if it carries nothing.
    pub(super) must_ack: bool,
    /// Times the timer has run out since the peer last acknowledged anything.
    pub(super) retries: u8,
    pub(super) duplicate_acks: u8,
    pub(super) peer: Station,
    pub(super) port: u16,
    pub(super) mss: u16,
    pub(super) snd_una: u32,
    pub(super) snd_nxt: u32,
    /// The highest `snd_nxt` so far: after a timeout `snd_nxt` goes back, but acknowledgements up to here are still right.
    pub(super) snd_max: u32,
    pub(super) snd_wnd: u32,
    pub(super) snd_wl1: u32,
    pub(super) snd_wl2: u32,
    pub(super) rcv_nxt: u32,
    /// The end of the window that was last advertised.
    pub(super) rcv_edge: u32,
    /// Bytes to send, from `snd_una` on: where in the ring, and how many.
    pub(super) tx_head: u32,
    pub(super) tx_len: u32,
    /// Bytes received and not yet understood.
    pub(super) rx_head: u32,
    pub(super) rx_len: u32,
    /// Guest time at which the timer runs out; 0 when it is not set.
    pub(super) timer: u64,
    /// Guest time of the last segment from the peer.
    pub(super) heard: u64,
}

/// `a - b` on the circle of sequence numbers.
pub(super) fn distance(a: u32, b: u32) -> u32 {
    a.wrapping_sub(b)
}

/// True when `a` is later than `b` on the circle.
pub(super) fn after(a: u32, b: u32) -> bool {
    a != b && distance(a, b) < 1 << 31
}

impl Tcb {
    /// The window that the room in the ring allows.
    pub(super) fn window(&self) -> u16 {
        u16::try_from(RING - self.rx_len).unwrap_or(u16::MAX)
    }

    /// Everything is sent and acknowledged, a FIN included.
    pub(super) fn is_quiet(&self) -> bool {
        self.snd_una == self.snd_nxt && self.tx_len == 0 && !self.closing
    }

    fn encode(&self, out: &mut Encoder) {
        let Self {
            state,
            closing,
            peer_closed,
            passive,
            must_ack,
            retries,
            duplicate_acks,
            peer: Station { mac, ip },
            port,
            mss,
            snd_una,
            snd_nxt,
            snd_max,
            snd_wnd,
            snd_wl1,
            snd_wl2,
            rcv_nxt,
            rcv_edge,
            tx_head,
            tx_len,
            rx_head,
            rx_len,
            timer,
            heard,
        } = self;
        out.u8(match state {
            State::Free => 0,
            State::SynReceived => 1,
            State::Open => 2,
            State::FinWait => 3,
            State::TimeWait => 4,
        });
        for flag in [closing, peer_closed, passive, must_ack] {
            out.u8(u8::from(*flag));
        }
        out.u8(*retries);
        out.u8(*duplicate_acks);
        out.bytes(mac);
        out.bytes(ip);
        out.u16(*port);
        out.u16(*mss);
        for value in [snd_una, snd_nxt, snd_max, snd_wnd, snd_wl1, snd_wl2, rcv_nxt, rcv_edge] {
            out.u32(*value);
        }
        for value in [tx_head, tx_len, rx_head, rx_len] {
            out.u32(*value);
        }
        out.u64(*timer);
        out.u64(*heard);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let state = match input.u8()? {
            0 => State::Free,
            1 => State::SynReceived,
            2 => State::Open,
            3 => State::FinWait,
            4 => State::TimeWait,
            other => return Err(Malformed::new(format!("{other} is no state of a connection"))),
        };
        Ok(Self {
            state,
            closing: input.flag()?,
            peer_closed: input.flag()?,
            passive: input.flag()?,
            must_ack: input.flag()?,
            retries: input.u8()?,
            duplicate_acks: input.u8()?,
            peer: Station { mac: fixed(input.bytes(6)?)?, ip: fixed(input.bytes(4)?)? },
            port: input.u16()?,
            mss: input.u16()?,
            snd_una: input.u32()?,
            snd_nxt: input.u32()?,
            snd_max: input.u32()?,
            snd_wnd: input.u32()?,
            snd_wl1: input.u32()?,
            snd_wl2: input.u32()?,
            rcv_nxt: input.u32()?,
            rcv_edge: input.u32()?,
            tx_head: input.u32()?,
            tx_len: input.u32()?,
            rx_head: input.u32()?,
            rx_len: input.u32()?,
            timer: input.u64()?,
            heard: input.u64()?,
        })
    }

    /// RAM comes from a peer: nothing that indexes or counts is believed.
    fn is_sound(&self) -> bool {
        let rings = self.tx_head < RING && self.tx_len <= RING && self.rx_head < RING && self.rx_len <= RING;
        // What is in flight is in the ring, but for a SYN and a FIN.
        let (next, most) = (distance(self.snd_nxt, self.snd_una), distance(self.snd_max, self.snd_una));
        let times = self.timer < 1 << 62 && self.heard < 1 << 62;
        rings && times && next <= most && most <= self.tx_len + 2 && (LEAST_MSS..=MSS).contains(&self.mss)
    }
}

fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Malformed> {
    bytes.try_into().map_err(|_| Malformed::new("wrong length of an address"))
}

/// The connection table during one step: read at its beginning, and at its end written where it changed.
pub(super) struct Table {
    pub(super) tcbs: Vec<Tcb>,
    before: Vec<Tcb>,
}

impl Table {
    pub(super) fn load(bus: Bus<'_>, layout: &Layout) -> Result<Self, Fault> {
        let bytes = bus.vec(TABLE, layout.connections * RECORD)?;
        let tcbs = bytes.chunks_exact(RECORD).map(open).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { before: tcbs.clone(), tcbs })
    }

    pub(super) fn store(&self, bus: Bus<'_>) -> Result<(), Fault> {
        for ((now, before), address) in self.tcbs.iter().zip(&self.before).zip((TABLE..).step_by(RECORD)) {
            if now != before {
                let mut out = Encoder::default();
                now.encode(&mut out);
                let bytes = out.into_bytes();
                assert!(bytes.len() <= RECORD, "a record fits its place");
                bus.write(address, &bytes)?;
            }
        }
        Ok(())
    }
}

/// A record that was never used is all zeroes.
fn open(record: &[u8]) -> Result<Tcb, Fault> {
    if record.first() == Some(&0) {
        return Ok(Tcb::default());
    }
    let tcb = Tcb::decode(&mut Decoder::new(record)).map_err(|_| BAD_RECORD)?;
    if tcb.is_sound() { Ok(tcb) } else { Err(BAD_RECORD) }
}

/// Copies out of a ring at `base`: `into.len()` bytes from `at` on.
pub(super) fn ring_read(bus: Bus<'_>, base: u64, at: u32, into: &mut [u8]) -> Result<(), Fault> {
    let at = at % RING;
    let first = into.len().min((RING - at) as usize);
    let (head, tail) = into.split_at_mut(first);
    bus.read(base + u64::from(at), head)?;
    bus.read(base, tail)
}

/// Copies into a ring at `base` from `at` on.
pub(super) fn ring_write(bus: Bus<'_>, base: u64, at: u32, from: &[u8]) -> Result<(), Fault> {
    let at = at % RING;
    let (head, tail) = from.split_at(from.len().min((RING - at) as usize));
    bus.write(base + u64::from(at), head)?;
    if tail.is_empty() { Ok(()) } else { bus.write(base, tail) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    fn full() -> Tcb {
        Tcb {
            state: State::Open,
            closing: true,
            passive: true,
            retries: 3,
            peer: Station { mac: [1, 2, 3, 4, 5, 6], ip: [7, 8, 9, 10] },
            port: 11,
            mss: 1000,
            snd_una: u32::MAX - 1,
            snd_nxt: 1,
            snd_max: 3,
            tx_head: 4,
            tx_len: 100,
            rx_head: 5,
            rx_len: RING,
            timer: 6,
            heard: 7,
            ..Tcb::default()
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let (bus, layout) = (Bus(ram.tracked()), Layout::of(&ram));
        let mut table = Table::load(bus, &layout).unwrap();
        table.tcbs[1] = full();
        table.store(bus).unwrap();
        let table = Table::load(bus, &layout).unwrap();
        assert_eq!((&table.tcbs[0], &table.tcbs[1]), (&Tcb::default(), &full()));
        assert_eq!(table.tcbs[1].window(), 0);
    }

    #[test]
    fn records_that_would_index_outside_of_a_ring_fault() {
        for spoil in [
            |t: &mut Tcb| t.tx_head = RING,
            |t: &mut Tcb| t.tx_len = RING + 1,
            |t: &mut Tcb| t.rx_head = u32::MAX,
            |t: &mut Tcb| t.rx_len = RING + 1,
            |t: &mut Tcb| t.snd_max = t.snd_nxt.wrapping_add(5000),
            |t: &mut Tcb| t.snd_nxt = t.snd_una.wrapping_sub(1),
            |t: &mut Tcb| t.mss = 0,
            |t: &mut Tcb| t.timer = u64::MAX,
        ] {
            let mut tcb = full();
            spoil(&mut tcb);
            let mut out = Encoder::default();
            tcb.encode(&mut out);
            let mut record = out.into_bytes();
            record.resize(RECORD, 0);
            assert_eq!(open(&record), Err(BAD_RECORD), "{tcb:?}");
        }
    }

    #[test]
    fn sequence_numbers_are_on_a_circle() {
        assert!(after(1, u32::MAX) && !after(u32::MAX, 1) && !after(5, 5));
    }

    #[test]
    fn rings_wrap() {
        let ram = GuestRam::new(2 << 20).unwrap();
        let bus = Bus(ram.tracked());
        ring_write(bus, 0x1_0000, RING - 2, b"abcd").unwrap();
        let mut back = [0; 4];
        ring_read(bus, 0x1_0000, RING - 2, &mut back).unwrap();
        assert_eq!(&back, b"abcd");
        assert_eq!(bus.array::<2>(0x1_0000).unwrap(), *b"cd");
    }
}
