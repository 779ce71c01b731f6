//! The server: requests out of the receive rings, replies into the send rings.

use super::bus::{Bus, Fault};
use super::commands::{self, Call, Outcome};
use super::disks::Disks;
use super::layout::{Layout, RING};
use super::program::End;
use super::registers::{Registers, count};
use super::resp::{self, Parsed, Reply};
use super::store::{MAX_VALUE, Store};
use super::tcb::{State, Table, Tcb, ring_read, ring_write};

/// A request that changes something has a reply of at most one value: it is only carried out when that fits. A longer reply
/// (of a request that only reads) waits for room and is then made anew.
const ROOM: u32 = RING / 2 + 512;
const _: () = assert!(MAX_VALUE + 512 <= ROOM as usize);

/// Answers all requests that are there. Some when the program ended.
pub(super) fn serve(
    bus: Bus<'_>,
    layout: &Layout,
    registers: &mut Registers,
    disks: &mut Disks,
    table: &mut Table,
) -> Result<Option<End>, Fault> {
    let mut end = None;
    let waits = |t: &Tcb| t.state == State::Open && !t.closing && (t.rx_len > 0 || t.peer_closed);
    if !table.tcbs.iter().any(waits) {
        return Ok(None);
    }
    let store = Store::open(bus, layout)?;
    let connected = table.tcbs.iter().filter(|t| t.state == State::Open).count();
    for (slot, tcb) in table.tcbs.iter_mut().enumerate().filter(|(_, t)| waits(t)) {
        let connection = Connection { bus, layout, slot, tcb, connected };
        connection.serve(&store, registers, disks, &mut end)?;
    }
    Ok(end)
}

struct Connection<'a> {
    bus: Bus<'a>,
    layout: &'a Layout,
    slot: usize,
    tcb: &'a mut Tcb,
    connected: usize,
}

impl Connection<'_> {
    fn serve(
        mut self,
        store: &Store<'_>,
        registers: &mut Registers,
        disks: &mut Disks,
        end: &mut Option<End>,
    ) -> Result<(), Fault> {
        let mut buffer = vec![0; self.tcb.rx_len as usize];
        ring_read(self.bus, self.layout.received(self.slot), self.tcb.rx_head, &mut buffer)?;
        let mut used = 0;
        while RING - self.tcb.tx_len >= ROOM && !self.tcb.closing {
            let rest = buffer.get(used..).unwrap_or_default();
            let mut reply = Reply::default();
            let (took, outcome) = match resp::parse(rest) {
                Parsed::Incomplete if rest.len() == RING as usize => {
                    reply.error("ERR Protocol error: too big request");
                    (rest.len(), Outcome::Close)
                }
                Parsed::Incomplete => {
                    // Half a request of a peer that sends no more is none.
                    self.tcb.closing = self.tcb.peer_closed;
                    self.tcb.passive = self.tcb.peer_closed;
                    break;
                }
                Parsed::Malformed(text) => {
                    reply.error(text);
                    (rest.len(), Outcome::Close)
                }
                Parsed::Request(arguments, took) => {
                    let call = Call {
                        store,
                        registers,
                        disks,
                        layout: self.layout,
                        slot: self.slot,
                        connected: self.connected,
                        arguments: &arguments,
                        reply: &mut reply,
                        end,
                    };
                    (took, commands::run(call)?)
                }
            };
            if outcome == Outcome::Wait {
                break;
            }
            if reply.overflowed {
                reply = Reply::default();
                reply.error("ERR the reply is too long for this machine");
            }
            if !self.queue(&reply.bytes)? {
                break;
            }
            count(&mut registers.requests, 1);
            used += took;
            self.tcb.closing = outcome == Outcome::Close;
            self.tcb.passive = self.tcb.closing && self.tcb.peer_closed;
        }
        self.consume(used);
        Ok(())
    }

    /// Puts a reply into the send ring, or says that it does not fit yet.
    fn queue(&mut self, reply: &[u8]) -> Result<bool, Fault> {
        let Some(length) = u32::try_from(reply.len()).ok().filter(|l| *l <= RING - self.tcb.tx_len) else {
            return Ok(false);
        };
        let base = self.layout.outgoing(self.slot);
        ring_write(self.bus, base, self.tcb.tx_head + self.tcb.tx_len, reply)?;
        self.tcb.tx_len += length;
        Ok(true)
    }

    fn consume(&mut self, used: usize) {
        // Nothing after a last request is read any more.
        let used = if self.tcb.closing { self.tcb.rx_len } else { u32::try_from(used).unwrap_or(self.tcb.rx_len) };
        self.tcb.rx_len -= used;
        // As with the send ring: an empty one begins at its start again.
        self.tcb.rx_head = if self.tcb.rx_len == 0 { 0 } else { (self.tcb.rx_head + used) % RING };
    }
}
