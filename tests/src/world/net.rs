//! The network between the two hosts: connections that deliver in order, late, cut short, damaged, or not at all.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::{Nanos, Who};

/// The frame of an acknowledgement, as docs/protocol.md has it: a header and nothing else.
const ACK_BYTES: usize = 80;
const ACK_TYPE: u8 = 8;
const CHECKSUM_AT: usize = 4;
const CHECKED_FROM: usize = 8;
const ACK_TYPE_AT: usize = 10;
const ACK_EPOCH_AT: usize = 32;
const ACK_GENERATION_AT: usize = 40;
/// The highest byte of it, which is zero in every incarnation of a world.
const ACK_INCARNATION_AT: usize = 79;

/// Number of a connection; never used twice in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u32);

/// One of the two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Who connected.
    Caller,
    /// Who was connected to.
    Callee,
}

impl End {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Caller => Self::Callee,
            Self::Callee => Self::Caller,
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Caller => 0,
            Self::Callee => 1,
        }
    }
}

/// What travels.
#[derive(Clone, Debug)]
pub enum Packet {
    /// A piece of the stream.
    Bytes(Bytes),
    /// The sender's kernel closed the connection.
    Fin,
}

/// One direction of a connection, named by the end that receives.
#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Packet>,
    /// Nothing of this lane arrives before.
    not_before: Nanos,
    /// Deliveries that found the cable cut.
    stalled: usize,
    /// Since when something waits behind a cut cable.
    stalled_since: Option<Nanos>,
}

#[derive(Debug)]
struct Conn {
    ends: [Who; 2],
    open: [bool; 2],
    lanes: [Lane; 2],
}

/// All connections, and the state of the cables.
#[derive(Debug, Default)]
pub struct Net {
    conns: BTreeMap<ConnId, Conn>,
    next: u32,
    /// Whether packets *from* this node are lost on the way.
    pub cut: [bool; 2],
    /// What packets from this node take longer.
    pub slow: [Nanos; 2],
}

/// What came of a delivery.
#[derive(Debug)]
pub enum Delivery {
    /// Nothing: gone, or behind a cut cable.
    Nothing,
    /// This arrived.
    Arrived(Packet),
}

impl Net {
    /// A new connection between two processes; packets may be sent at once.
    pub fn connect(&mut self, caller: Who, callee: Who) -> ConnId {
        let id = ConnId(self.next);
        self.next += 1;
        self.conns.insert(id, Conn { ends: [caller, callee], open: [true; 2], lanes: Default::default() });
        id
    }

    /// The process at an end.
    pub fn who(&self, id: ConnId, end: End) -> Option<Who> {
        self.conns.get(&id).map(|c| c.ends[end.index()])
    }

    /// Whether this end still listens.
    pub fn is_open(&self, id: ConnId, end: End) -> bool {
        self.conns.get(&id).is_some_and(|c| c.open[end.index()])
    }

    /// Connections with an open end at `who`.
    pub fn of(&self, who: Who) -> Vec<(ConnId, End)> {
        let mut found = Vec::new();
        for (id, conn) in &self.conns {
            for end in [End::Caller, End::Callee] {
                if conn.ends[end.index()] == who && conn.open[end.index()] {
                    found.push((*id, end));
                }
            }
        }
        found
    }

    /// Connections on which something may still happen.
    pub fn living(&self) -> Vec<ConnId> {
        self.conns.iter().filter(|(_, c)| c.open[0] && c.open[1]).map(|(id, _)| *id).collect()
    }

    /// Puts a packet on the way from `from`; when it arrives, if the cable holds.
    pub fn send(&mut self, id: ConnId, from: End, packet: Packet, now: Nanos, delay: Nanos) -> Option<Nanos> {
        let conn = self.conns.get_mut(&id)?;
        if !conn.open[from.index()] {
            return None;
        }
        let lane = &mut conn.lanes[from.other().index()];
        lane.waiting.push_back(packet);
        let at = lane.not_before.max(now + delay + self.slow[conn.ends[from.index()].node]);
        lane.not_before = at;
        Some(at)
    }

    /// A packet for `to` is due.
    pub fn deliver(&mut self, id: ConnId, to: End, now: Nanos) -> Delivery {
        let Some(conn) = self.conns.get_mut(&id) else { return Delivery::Nothing };
        let from = conn.ends[to.other().index()];
        let lane = &mut conn.lanes[to.index()];
        if self.cut[from.node] {
            lane.stalled += 1;
            lane.stalled_since.get_or_insert(now);
            return Delivery::Nothing;
        }
        let packet = lane.waiting.pop_front();
        if !conn.open[to.index()] {
            return Delivery::Nothing;
        }
        match packet {
            Some(Packet::Fin) => Delivery::Arrived(Packet::Fin),
            Some(packet) => Delivery::Arrived(packet),
            None => Delivery::Nothing,
        }
    }

    /// The cable from `node` holds again: what was sent meanwhile arrives now, as often as this returns its lane.
    pub fn mend(&mut self, node: usize) -> Vec<(ConnId, End, usize)> {
        self.cut[node] = false;
        let mut due = Vec::new();
        for (id, conn) in &mut self.conns {
            for end in [End::Caller, End::Callee] {
                let from = conn.ends[end.other().index()].node;
                let lane = &mut conn.lanes[end.index()];
                if from == node && lane.stalled > 0 {
                    due.push((*id, end, std::mem::take(&mut lane.stalled)));
                    lane.stalled_since = None;
                }
            }
        }
        due
    }

    /// The connections on which an end has sent something that nobody acknowledged for `limit`; the end that sent it.
    pub fn unacknowledged(&self, now: Nanos, limit: Nanos) -> Vec<(ConnId, End)> {
        let mut found = Vec::new();
        for (id, conn) in &self.conns {
            for to in [End::Caller, End::Callee] {
                let since = conn.lanes[to.index()].stalled_since;
                if conn.open[to.other().index()] && since.is_some_and(|since| now >= since + limit) {
                    found.push((*id, to.other()));
                }
            }
        }
        found
    }

    /// This end is gone: nothing more arrives there.
    pub fn close(&mut self, id: ConnId, end: End) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.open[end.index()] = false;
            if !conn.open[end.other().index()] {
                self.conns.remove(&id);
            }
        }
    }

    /// The host of `who` lost its power: what it had sent and nobody has received is lost from somewhere on.
    pub fn lose_unsent(&mut self, who: Who, mut kept: impl FnMut(usize) -> usize) {
        for conn in self.conns.values_mut() {
            for end in [End::Caller, End::Callee] {
                if conn.ends[end.index()] == who {
                    let lane = &mut conn.lanes[end.other().index()];
                    let keep = kept(lane.waiting.len());
                    lane.waiting.truncate(keep);
                    // The last piece may have been on its way only in part.
                    if let Some(Packet::Bytes(last)) = lane.waiting.back_mut() {
                        let part = kept(last.len());
                        last.truncate(part);
                    }
                }
            }
        }
    }

    /// Damages what is on the way to `to`: flips a bit of the first piece that waits.
    pub fn flip_bit(&mut self, id: ConnId, to: End, at: u64) -> bool {
        let Some(conn) = self.conns.get_mut(&id) else { return false };
        for packet in &mut conn.lanes[to.index()].waiting {
            if let Packet::Bytes(bytes) = packet
                && !bytes.is_empty()
            {
                let mut damaged = bytes.to_vec();
                let bit = usize::try_from(at % (damaged.len() as u64 * 8)).expect("a bit of this piece");
                damaged[bit / 8] ^= 1 << (bit % 8);
                *packet = Packet::Bytes(damaged.into());
                return true;
            }
        }
        false
    }

    /// Cuts a piece short, and the connection with it: its end arrives instead of the rest.
    pub fn truncate(&mut self, id: ConnId, to: End, at: u64) -> bool {
        let Some(conn) = self.conns.get_mut(&id) else { return false };
        let lane = &mut conn.lanes[to.index()];
        let front = match lane.waiting.front() {
            Some(Packet::Bytes(bytes)) if bytes.len() >= 2 && lane.waiting.len() >= 2 => {
                let keep = 1 + usize::try_from(at % (bytes.len() as u64 - 1)).expect("a place in this piece");
                bytes.slice(..keep)
            }
            _ => return false,
        };
        lane.waiting.clear();
        lane.waiting.push_back(Packet::Bytes(front));
        lane.waiting.push_back(Packet::Fin);
        true
    }

    /// Puts bytes of another time in front of what is on the way to `to`.
    pub fn inject(&mut self, id: ConnId, to: End, bytes: Bytes) -> bool {
        let Some(conn) = self.conns.get_mut(&id) else { return false };
        let lane = &mut conn.lanes[to.index()];
        if lane.waiting.is_empty() {
            return false;
        }
        // In place of nothing: one more delivery is owed, so it rides with the first piece.
        if let Some(Packet::Bytes(first)) = lane.waiting.front_mut() {
            *first = [&bytes[..], &first[..]].concat().into();
            return true;
        }
        false
    }

    /// The connection is reset: its end arrives in front of everything that is on the way.
    pub fn inject_end(&mut self, id: ConnId, to: End) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.lanes[to.index()].waiting.push_front(Packet::Fin);
        }
    }

    /// The host of `who` is gone: what is sent there stays unacknowledged.
    pub fn forget(&mut self, who: Who, now: Nanos) {
        for conn in self.conns.values_mut() {
            for end in [End::Caller, End::Callee] {
                if conn.ends[end.index()] == who && conn.open[end.other().index()] {
                    conn.lanes[end.index()].stalled_since.get_or_insert(now);
                }
            }
        }
    }

    /// Somebody answers for the backup: an acknowledgement on its way to the primary becomes one of a later epoch, under a generation that has passed
    /// or by another process, with right checksums.
    pub fn forge(&mut self, id: ConnId, as_another_process: bool) -> bool {
        let Some(conn) = self.conns.get_mut(&id) else { return false };
        for packet in &mut conn.lanes[End::Caller.index()].waiting {
            let Packet::Bytes(bytes) = packet else { continue };
            if bytes.len() != ACK_BYTES || bytes[ACK_TYPE_AT] != ACK_TYPE {
                continue;
            }
            let mut forged = bytes.to_vec();
            forged[ACK_EPOCH_AT] = forged[ACK_EPOCH_AT].wrapping_add(1);
            if as_another_process {
                forged[ACK_INCARNATION_AT] = 0xff;
            } else {
                forged[ACK_GENERATION_AT] = forged[ACK_GENERATION_AT].wrapping_sub(1);
            }
            let checksum = crc32fast::hash(&forged[CHECKED_FROM..]).to_le_bytes();
            forged[CHECKSUM_AT..CHECKED_FROM].copy_from_slice(&checksum);
            *packet = Packet::Bytes(forged.into());
            return true;
        }
        false
    }
}
