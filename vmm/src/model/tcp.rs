//! A minimal and correct TCP server: in-order data, cumulative acknowledgement, go-back-N after a timeout.
//!
//! Left out because a peer does well without them: window scaling, timestamps, selective acknowledgement, delayed
//! acknowledgement, congestion control (the window is at most 64 KiB, and the LAN is the host's own memory). Segments that
//! come out of order are dropped and acknowledged at once, which makes the peer send again what is missing.

use super::bus::{Bus, Fault};
use super::layout::{Layout, RING};
use super::registers::{MILLISECOND, Registers};
use super::tcb::{LEAST_MSS, MSS, State, Table, Tcb, after, distance, ring_read, ring_write};
use super::wire::{self, Segment, Station, flag};

/// First retransmission timeout in nanoseconds; doubles with each retry.
const RTO: u64 = 200 * MILLISECOND;
/// Longest retransmission timeout in nanoseconds.
const MAX_RTO: u64 = 5000 * MILLISECOND;
/// Retries after which the peer counts as gone: about 40 seconds.
const MAX_RETRIES: u8 = 12;
/// Retries of a SYN.
const MAX_SYN_RETRIES: u8 = 5;
/// How long an old connection's number is kept out of use, in nanoseconds. Short: the LAN has no long way round.
const TIME_WAIT: u64 = 1000 * MILLISECOND;
/// How long the peer may leave its half open after we have closed ours, in nanoseconds.
const FIN_WAIT: u64 = 10_000 * MILLISECOND;
/// A connection that was silent for this long makes room for a new one when there is no other room.
const IDLE: u64 = 60_000 * MILLISECOND;
/// Segment size of a peer that does not name one (RFC 9293, 3.7.1).
const DEFAULT_MSS: u16 = 536;

/// The TCP of one step.
pub(super) struct Tcp<'a> {
    pub(super) bus: Bus<'a>,
    pub(super) layout: &'a Layout,
    pub(super) us: Station,
    pub(super) port: u16,
    pub(super) table: &'a mut Table,
    pub(super) frames: &'a mut Vec<Vec<u8>>,
}

impl Tcp<'_> {
    /// Takes in one segment.
    pub(super) fn segment(
        &mut self,
        registers: &mut Registers,
        from: Station,
        segment: &Segment<'_>,
    ) -> Result<(), Fault> {
        let same = |t: &Tcb| t.state != State::Free && t.peer.ip == from.ip && t.port == segment.source;
        let slot = if segment.target == self.port { self.table.tcbs.iter().position(same) } else { None };
        let Some(slot) = slot else {
            self.stray(registers, from, segment);
            return Ok(());
        };
        let now = registers.now;
        let Some(tcb) = self.table.tcbs.get_mut(slot) else { return Ok(()) };
        tcb.heard = now;
        tcb.peer.mac = from.mac;
        match tcb.state {
            State::Free => Ok(()),
            State::SynReceived => self.in_syn_received(slot, segment, now),
            State::Open | State::FinWait => self.in_open(slot, segment, now),
            State::TimeWait => {
                if segment.has(flag::RST) {
                    *tcb = Tcb::default();
                } else if segment.has(flag::SYN) && after(segment.sequence, tcb.rcv_nxt) {
                    *tcb = Tcb::default();
                    self.stray(registers, from, segment);
                } else {
                    tcb.must_ack = true;
                }
                Ok(())
            }
        }
    }

    /// A segment of no connection: a new one begins, or the peer is told that there is none.
    fn stray(&mut self, registers: &mut Registers, from: Station, segment: &Segment<'_>) {
        let opens = segment.target == self.port && segment.flags & (flag::SYN | flag::ACK | flag::FIN) == flag::SYN;
        if opens && !segment.has(flag::RST) {
            self.open(registers, from, segment);
        } else if !segment.has(flag::RST) {
            self.reset(from, segment);
        }
    }

    fn open(&mut self, registers: &mut Registers, from: Station, segment: &Segment<'_>) {
        let now = registers.now;
        // Without room the peer's SYN is dropped: it asks again.
        let Some(slot) = self.room(now) else { return };
        let initial = u32::try_from(registers.random() >> 32).unwrap_or(0);
        let rcv_nxt = segment.sequence.wrapping_add(1);
        let tcb = Tcb {
            state: State::SynReceived,
            peer: from,
            port: segment.source,
            mss: segment.mss.unwrap_or(DEFAULT_MSS).clamp(LEAST_MSS, MSS),
            snd_una: initial,
            snd_nxt: initial.wrapping_add(1),
            snd_max: initial.wrapping_add(1),
            snd_wnd: u32::from(segment.window),
            snd_wl1: segment.sequence,
            rcv_nxt,
            rcv_edge: rcv_nxt.wrapping_add(u32::from(u16::MAX)),
            timer: now + RTO,
            heard: now,
            ..Tcb::default()
        };
        self.send_syn_ack(&tcb);
        if let Some(place) = self.table.tcbs.get_mut(slot) {
            *place = tcb;
        }
    }

    /// A free record; else the one that has waited longest of those that nobody misses.
    fn room(&self, now: u64) -> Option<usize> {
        let rank = |t: &Tcb| match t.state {
            State::Free => Some((0, 0)),
            State::TimeWait => Some((1, t.timer)),
            _ if now.saturating_sub(t.heard) > IDLE => Some((2, t.heard)),
            _ => None,
        };
        let ranked = self.table.tcbs.iter().enumerate().filter_map(|(slot, t)| Some((rank(t)?, slot)));
        ranked.min().map(|(_, slot)| slot)
    }

    fn in_syn_received(&mut self, slot: usize, segment: &Segment<'_>, now: u64) -> Result<(), Fault> {
        let Some(tcb) = self.table.tcbs.get_mut(slot) else { return Ok(()) };
        if segment.has(flag::RST) {
            if segment.sequence == tcb.rcv_nxt {
                *tcb = Tcb::default();
            }
            return Ok(());
        }
        if segment.has(flag::SYN) {
            // Ours was lost: once more.
            let tcb = tcb.clone();
            self.send_syn_ack(&tcb);
            return Ok(());
        }
        if !segment.has(flag::ACK) {
            return Ok(());
        }
        if segment.acknowledged != tcb.snd_nxt {
            let peer = tcb.peer;
            self.reset(peer, segment);
            return Ok(());
        }
        tcb.state = State::Open;
        tcb.snd_una = segment.acknowledged;
        tcb.snd_wnd = u32::from(segment.window);
        tcb.snd_wl1 = segment.sequence;
        tcb.snd_wl2 = segment.acknowledged;
        tcb.timer = 0;
        tcb.retries = 0;
        self.in_open(slot, segment, now)
    }

    fn in_open(&mut self, slot: usize, segment: &Segment<'_>, now: u64) -> Result<(), Fault> {
        let Some(tcb) = self.table.tcbs.get_mut(slot) else { return Ok(()) };
        let in_window = distance(segment.sequence, tcb.rcv_nxt) < u32::from(tcb.window()).max(1);
        if segment.has(flag::RST) {
            if segment.sequence == tcb.rcv_nxt {
                *tcb = Tcb::default();
            } else if in_window {
                tcb.must_ack = true;
            }
            return Ok(());
        }
        if segment.has(flag::SYN) {
            // A peer that forgot the connection resets it when it gets this acknowledgement (RFC 5961).
            tcb.must_ack = true;
            return Ok(());
        }
        if !segment.has(flag::ACK) {
            return Ok(());
        }
        if after(segment.acknowledged, tcb.snd_max) {
            tcb.must_ack = true;
            return Ok(());
        }
        acknowledge(tcb, segment, now);
        if matches!(tcb.state, State::Open | State::FinWait) {
            self.receive(slot, segment, now)?;
        }
        Ok(())
    }

    /// Takes in the payload and the FIN, as far as they are next.
    fn receive(&mut self, slot: usize, segment: &Segment<'_>, now: u64) -> Result<(), Fault> {
        let base = self.layout.received(slot);
        let Some(tcb) = self.table.tcbs.get_mut(slot) else { return Ok(()) };
        let fin = segment.has(flag::FIN);
        if segment.payload.is_empty() && !fin {
            // A probe of a silent peer asks for an answer: it is one below what we expect.
            tcb.must_ack |= segment.sequence != tcb.rcv_nxt;
            return Ok(());
        }
        tcb.must_ack = true;
        let known = distance(tcb.rcv_nxt, segment.sequence);
        if after(segment.sequence, tcb.rcv_nxt) {
            // Something is missing: each such segment is answered, so that the peer counts them.
            self.send(slot, 0, flag::ACK)?;
            return Ok(());
        }
        let Some(new) = segment.payload.get(known as usize..) else { return Ok(()) };
        if tcb.peer_closed {
            return Ok(());
        }
        let room = (RING - tcb.rx_len) as usize;
        let taken = new.get(..room).unwrap_or(new);
        let length = u32::try_from(taken.len()).unwrap_or(0);
        if !tcb.closing {
            // After we have closed nobody reads: the bytes are acknowledged and forgotten.
            ring_write(self.bus, base, tcb.rx_head + tcb.rx_len, taken)?;
            tcb.rx_len += length;
        }
        tcb.rcv_nxt = tcb.rcv_nxt.wrapping_add(length);
        if fin && taken.len() == new.len() {
            tcb.rcv_nxt = tcb.rcv_nxt.wrapping_add(1);
            tcb.peer_closed = true;
            if tcb.state == State::FinWait {
                tcb.state = State::TimeWait;
                tcb.timer = now + TIME_WAIT;
            }
        }
        Ok(())
    }

    /// What is due by time alone.
    pub(super) fn timers(&mut self, now: u64) -> Result<(), Fault> {
        for slot in 0..self.table.tcbs.len() {
            let Some(tcb) = self.table.tcbs.get_mut(slot) else { continue };
            if tcb.timer == 0 || now < tcb.timer {
                continue;
            }
            tcb.retries = tcb.retries.saturating_add(1);
            tcb.timer = now + (RTO << tcb.retries.min(8)).min(MAX_RTO);
            match tcb.state {
                State::Free | State::FinWait | State::TimeWait => *tcb = Tcb::default(),
                State::SynReceived if tcb.retries > MAX_SYN_RETRIES => *tcb = Tcb::default(),
                State::SynReceived => {
                    let tcb = tcb.clone();
                    self.send_syn_ack(&tcb);
                }
                State::Open if tcb.retries > MAX_RETRIES => {
                    self.send(slot, 0, flag::RST | flag::ACK)?;
                    if let Some(tcb) = self.table.tcbs.get_mut(slot) {
                        *tcb = Tcb::default();
                    }
                }
                State::Open => {
                    tcb.snd_nxt = tcb.snd_una;
                    tcb.duplicate_acks = 0;
                    if tcb.snd_wnd == 0 && tcb.tx_len > 0 {
                        // The window is shut: one byte finds out whether it still is.
                        self.send(slot, 1, flag::ACK)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Sends whatever may be sent on a connection.
    pub(super) fn output(&mut self, slot: usize, now: u64) -> Result<(), Fault> {
        loop {
            let Some(tcb) = self.table.tcbs.get_mut(slot) else { return Ok(()) };
            if tcb.state != State::Open {
                break;
            }
            let sent = distance(tcb.snd_nxt, tcb.snd_una);
            let unsent = tcb.tx_len.saturating_sub(sent);
            let length = unsent.min(tcb.snd_wnd.saturating_sub(sent)).min(u32::from(tcb.mss));
            let fin = tcb.closing && sent + length == tcb.tx_len;
            // A window of crumbs waits for more while something is on its way.
            let crumb = length < unsent && length < u32::from(tcb.mss) && sent > 0;
            if (length == 0 || crumb) && !fin {
                break;
            }
            let push = if length == unsent { flag::PSH } else { 0 };
            self.send(slot, length, flag::ACK | if fin { flag::FIN } else { 0 } | if length > 0 { push } else { 0 })?;
        }
        let Some(tcb) = self.table.tcbs.get_mut(slot) else { return Ok(()) };
        if tcb.state == State::Open {
            match (tcb.is_quiet(), tcb.timer) {
                (true, _) => tcb.timer = 0,
                (false, 0) => tcb.timer = now + RTO,
                (false, _) => {}
            }
        }
        if tcb.must_ack || window_opened(tcb) {
            self.send(slot, 0, flag::ACK)?;
        }
        Ok(())
    }

    /// Sends one segment with `length` bytes from `snd_nxt` on and moves `snd_nxt`.
    fn send(&mut self, slot: usize, length: u32, flags: u8) -> Result<(), Fault> {
        let base = self.layout.outgoing(slot);
        let Some(tcb) = self.table.tcbs.get_mut(slot) else { return Ok(()) };
        let mut payload = vec![0; length as usize];
        ring_read(self.bus, base, tcb.tx_head + distance(tcb.snd_nxt, tcb.snd_una), &mut payload)?;
        let window = tcb.window();
        let segment = Segment {
            source: self.port,
            target: tcb.port,
            sequence: tcb.snd_nxt,
            acknowledged: tcb.rcv_nxt,
            flags,
            window,
            mss: None,
            payload: &payload,
        };
        self.frames.push(wire::tcp(self.us, tcb.peer, &segment));
        tcb.snd_nxt = tcb.snd_nxt.wrapping_add(length + u32::from(flags & flag::FIN != 0));
        if after(tcb.snd_nxt, tcb.snd_max) {
            tcb.snd_max = tcb.snd_nxt;
        }
        tcb.rcv_edge = tcb.rcv_nxt.wrapping_add(u32::from(window));
        tcb.must_ack = false;
        Ok(())
    }

    fn send_syn_ack(&mut self, tcb: &Tcb) {
        let segment = Segment {
            source: self.port,
            target: tcb.port,
            sequence: tcb.snd_una,
            acknowledged: tcb.rcv_nxt,
            flags: flag::SYN | flag::ACK,
            window: tcb.window(),
            mss: Some(MSS),
            payload: &[],
        };
        self.frames.push(wire::tcp(self.us, tcb.peer, &segment));
    }

    /// Tells a peer that there is no such connection (RFC 9293, 3.5.2).
    fn reset(&mut self, to: Station, segment: &Segment<'_>) {
        let length = u32::try_from(segment.payload.len()).unwrap_or(0)
            + u32::from(segment.has(flag::SYN))
            + u32::from(segment.has(flag::FIN));
        let (sequence, acknowledged, flags) = if segment.has(flag::ACK) {
            (segment.acknowledged, 0, flag::RST)
        } else {
            (0, segment.sequence.wrapping_add(length), flag::RST | flag::ACK)
        };
        let (source, target) = (segment.target, segment.source);
        let reset = Segment { source, target, sequence, acknowledged, flags, window: 0, mss: None, payload: &[] };
        self.frames.push(wire::tcp(self.us, to, &reset));
    }
}

/// Takes in the acknowledgement and the window of a segment.
fn acknowledge(tcb: &mut Tcb, segment: &Segment<'_>, now: u64) {
    let ack = segment.acknowledged;
    let window = u32::from(segment.window);
    if after(ack, tcb.snd_una) {
        let mut newly = distance(ack, tcb.snd_una);
        let bytes = newly.min(tcb.tx_len);
        newly -= bytes;
        tcb.tx_len -= bytes;
        // An empty ring begins at its start again, so that a quiet connection dirties one page and not all in turn.
        tcb.tx_head = if tcb.tx_len == 0 { 0 } else { (tcb.tx_head + bytes) % RING };
        tcb.snd_una = ack;
        if after(ack, tcb.snd_nxt) {
            tcb.snd_nxt = ack;
        }
        tcb.retries = 0;
        tcb.duplicate_acks = 0;
        tcb.timer = 0;
        if newly > 0 && tcb.closing && tcb.state == State::Open {
            fin_acknowledged(tcb, now);
            return;
        }
    } else if ack == tcb.snd_una {
        let repeats = segment.payload.is_empty() && !segment.has(flag::FIN) && window == tcb.snd_wnd;
        if repeats && tcb.snd_max != tcb.snd_una && tcb.state == State::Open {
            tcb.duplicate_acks = tcb.duplicate_acks.saturating_add(1);
            if tcb.duplicate_acks == 3 {
                // The peer misses a segment and gets the following ones: those need not wait for the timer.
                tcb.snd_nxt = tcb.snd_una;
            }
        }
        if window == 0 {
            // A peer that answers probes is alive, however long its window stays shut.
            tcb.retries = tcb.retries.min(MAX_RETRIES / 2);
        }
    }
    let newer = after(segment.sequence, tcb.snd_wl1)
        || (segment.sequence == tcb.snd_wl1 && (ack == tcb.snd_wl2 || after(ack, tcb.snd_wl2)));
    if newer {
        if tcb.snd_wnd == 0 && window > 0 {
            // What the probe sent did not fit then and goes out again now.
            tcb.snd_nxt = tcb.snd_una;
            tcb.timer = 0;
        }
        tcb.snd_wnd = window;
        tcb.snd_wl1 = segment.sequence;
        tcb.snd_wl2 = ack;
    }
}

/// Our FIN is acknowledged.
fn fin_acknowledged(tcb: &mut Tcb, now: u64) {
    if tcb.passive {
        *tcb = Tcb::default();
    } else if tcb.peer_closed {
        tcb.state = State::TimeWait;
        tcb.timer = now + TIME_WAIT;
    } else {
        tcb.state = State::FinWait;
        tcb.timer = now + FIN_WAIT;
    }
}

/// The window was small when the peer last heard of it, and no longer is.
fn window_opened(tcb: &Tcb) -> bool {
    let known = distance(tcb.rcv_edge, tcb.rcv_nxt);
    let small = 2 * u32::from(MSS);
    tcb.state == State::Open && known < 16 << 10 && u32::from(tcb.window()) >= known + small
}
