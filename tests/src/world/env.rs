//! What simulated processes share: time, chance, the network, the arbiter, the LAN with its clients, and the checkers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use bytes::Bytes;
use failover::arbiter::{Reason, Record};
use failover::decide::{Answer, ArbiterRequest, OpId};
use primary::protect::Session;
use replication_proto::{Epoch, Generation, Incarnation};

use super::faults::{Conditions, Fault};
use super::guest::Utterance;
use super::net::{ConnId, End, Net, Packet};
use super::process::Base;
use super::register::{Fate, Register};
use super::storage::HostFiles;
use super::waiter::WaiterPart;
use super::{Nanos, Who};
use crate::check::Ghost;
use crate::real::rng::{Rng, mix};

/// How long a request to the arbiter is waited for.
const ARBITER_PATIENCE: Nanos = 1_000_000_000;

/// Packets up to this size do not queue for a narrow link.
const SMALL_PACKET: usize = 128;

/// What happens next.
#[derive(Clone, Debug)]
pub enum Event {
    /// A process's event loop wakes.
    Loop(Who),
    /// A packet arrives.
    Deliver(ConnId, End),
    /// A heartbeat is due.
    Beat(Who, ConnId),
    /// The runner's thread wakes.
    Runner(Who, Session),
    /// The applier's thread wakes.
    Applier(Who),
    /// The guest does its own work.
    Guest(Who),
    /// The guest's disk goes on with a request.
    GuestDisk(Who),
    /// The disks' thread of the side that waits wakes.
    Disk(Who),
    /// The thread that clears bits does so: the other side holds this epoch of this generation on stable storage.
    Tidy(Who, Generation, Epoch),
    /// What is due before the first change after a takeover is done beside.
    Prepare(Who),
    /// An attempt to connect has come to an end.
    Dialled(Who, Session),
    /// The same, for a heartbeat connection alone.
    Asked(Who),
    /// A request reaches the arbiter.
    Serve(Who, OpId, Box<ArbiterRequest>, Fate),
    /// The arbiter's answer, or the end of the patience for it.
    Answered(Who, OpId, Box<Answer>),
    /// A frame for the guest reaches a host.
    Frame(usize, Vec<u8>),
    /// A frame of the guest reaches the clients.
    Heard(Bytes),
    /// A client asks, or asks again.
    Client(usize),
    /// Something goes wrong.
    Fault(Fault),
    /// A host starts its process.
    Start(usize),
    /// A paused process goes on.
    Resume(usize),
    /// Unacknowledged connections are given up.
    GiveUp,
}

impl Event {
    /// The node whose process handles it, if a process does.
    pub fn node(&self, net: &Net) -> Option<usize> {
        match self {
            Self::Loop(who)
            | Self::Beat(who, _)
            | Self::Runner(who, _)
            | Self::Applier(who)
            | Self::Guest(who)
            | Self::GuestDisk(who)
            | Self::Disk(who)
            | Self::Tidy(who, ..)
            | Self::Prepare(who)
            | Self::Dialled(who, _)
            | Self::Asked(who)
            | Self::Answered(who, ..) => Some(who.node),
            Self::Deliver(conn, end) => net.who(*conn, *end).map(|who| who.node),
            Self::Frame(node, _) => Some(*node),
            Self::Serve(..)
            | Self::Heard(_)
            | Self::Client(_)
            | Self::Fault(_)
            | Self::Start(_)
            | Self::Resume(_)
            | Self::GiveUp => None,
        }
    }

    fn tag(&self) -> u64 {
        match self {
            Self::Loop(who) => 1 ^ u64::from(who.life) << 8,
            Self::Deliver(conn, end) => 2 ^ u64::from(conn.0) << 8 ^ (*end as u64) << 40,
            Self::Beat(who, _) => 3 ^ u64::from(who.life) << 8,
            Self::Runner(who, session) => 4 ^ u64::from(who.life) << 8 ^ session.0 << 32,
            Self::Applier(who) => 5 ^ u64::from(who.life) << 8,
            Self::Guest(who) => 6 ^ u64::from(who.life) << 8,
            Self::Dialled(who, _) => 7 ^ u64::from(who.life) << 8,
            Self::Asked(who) => 8 ^ u64::from(who.life) << 8,
            Self::Serve(who, op, ..) => 9 ^ u64::from(who.life) << 8 ^ op.0 << 32,
            Self::Answered(who, op, _) => 10 ^ u64::from(who.life) << 8 ^ op.0 << 32,
            Self::Frame(node, _) => 11 ^ (*node as u64) << 8,
            Self::Heard(_) => 12,
            Self::Client(client) => 13 ^ (*client as u64) << 8,
            Self::Fault(_) => 14,
            Self::Start(node) => 15 ^ (*node as u64) << 8,
            Self::Resume(node) => 16 ^ (*node as u64) << 8,
            Self::GiveUp => 17,
            Self::GuestDisk(who) => 18 ^ u64::from(who.life) << 8,
            Self::Disk(who) => 19 ^ u64::from(who.life) << 8,
            Self::Tidy(who, ..) => 20 ^ u64::from(who.life) << 8,
            Self::Prepare(who) => 21 ^ u64::from(who.life) << 8,
        }
    }
}

struct Planned {
    at: Nanos,
    number: u64,
    event: Event,
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Planned {}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// What processes share.
pub struct Env {
    /// World time.
    pub now: Nanos,
    /// The only source of chance.
    pub rng: Rng,
    /// The network between the hosts.
    pub net: Net,
    /// The arbiter.
    pub register: Register,
    /// For each generation, the record that the first swap of it replaced.
    replaced: BTreeMap<u64, Record>,
    /// The checkers.
    pub ghost: Ghost,
    /// How bad things are.
    pub conditions: Conditions,
    /// Whether frames for the guest go to this node: it spoke last for it.
    pub lan_port: Option<usize>,
    /// Highest generation that each node has written down.
    pub persisted: [Generation; 2],
    /// Nodes whose process wants to go on as the other program.
    pub wants_backup: [bool; 2],
    /// The files of both hosts, if the guest has a disk.
    pub hosts: Option<[HostFiles; 2]>,
    /// Chance in what concerns disks: apart, so that a world without one stays what it is.
    pub disk_rng: Rng,
    queue: BinaryHeap<Reverse<Planned>>,
    /// Until when a narrow link is busy.
    link_busy: Nanos,
    planned: u64,
    boots: u64,
    births: BTreeMap<u128, Who>,
    trace: u64,
    happened: u64,
    notes: Option<Vec<String>>,
}

impl Env {
    /// An empty world at time zero. `noted`: what happens is kept in words.
    pub fn new(rng: Rng, noted: bool) -> Self {
        Self {
            now: 0,
            rng,
            net: Net::default(),
            register: Register::default(),
            replaced: BTreeMap::new(),
            ghost: Ghost::default(),
            conditions: Conditions::default(),
            lan_port: None,
            persisted: [Generation(0); 2],
            wants_backup: [false; 2],
            hosts: None,
            disk_rng: Rng::new(0),
            queue: BinaryHeap::new(),
            link_busy: 0,
            planned: 0,
            boots: 0,
            births: BTreeMap::new(),
            trace: 0,
            happened: 0,
            notes: noted.then(Vec::new),
        }
    }

    /// Something happens at `at`.
    pub fn at(&mut self, at: Nanos, event: Event) {
        let number = self.planned;
        self.planned += 1;
        self.queue.push(Reverse(Planned { at: at.max(self.now), number, event }));
    }

    /// The next thing that happens, if it does before `until`; time is then that of the event.
    pub fn next(&mut self, until: Nanos) -> Option<Event> {
        if self.queue.peek().is_none_or(|Reverse(next)| next.at > until) {
            self.now = until;
            return None;
        }
        let Reverse(Planned { at, event, .. }) = self.queue.pop()?;
        self.now = at;
        self.happened += 1;
        self.trace = mix(self.trace ^ at.rotate_left(20) ^ event.tag());
        Some(event)
    }

    /// Everything that happened so far, folded into one number.
    pub fn trace(&self) -> u64 {
        self.trace
    }

    /// How many things happened so far.
    pub fn happened(&self) -> u64 {
        self.happened
    }

    /// What happened, in words.
    pub fn notes(&mut self) -> Vec<String> {
        self.notes.take().unwrap_or_default()
    }

    /// Keeps a line, if lines are kept.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let now = Duration::from_nanos(self.now);
        if let Some(notes) = &mut self.notes {
            notes.push(format!("{:10.4} {}", now.as_secs_f64(), line()));
        }
    }

    /// True once in so many times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.rng.range(0, n) == 0
    }

    // ---- processes ---------------------------------------------------------------------------------------------------------------

    /// A process begins its life.
    pub fn born(&mut self, who: Who, incarnation: Incarnation) {
        self.births.insert(incarnation.0, who);
    }

    /// Whose incarnation this is.
    pub fn life_of(&self, incarnation: Incarnation) -> Option<u32> {
        self.births.get(&incarnation.0).map(|who| who.life)
    }

    /// The record that a grant of `generation` replaced.
    pub fn replaced(&self, generation: Generation) -> Option<Record> {
        self.replaced.get(&generation.0).cloned()
    }

    /// Number of the next boot of the guest.
    pub fn next_boot(&mut self) -> u64 {
        self.boots += 1;
        self.boots
    }

    /// A node writes a generation down. False: its disk refuses.
    pub fn persist(&mut self, who: Who, generation: Generation) -> bool {
        if self.conditions.disk_full[who.node] || self.is_dark(who.node) {
            return false;
        }
        let known = &mut self.persisted[who.node];
        *known = generation.max(*known);
        true
    }

    /// The process becomes the program that waits.
    pub fn become_backup(&mut self, who: Who) {
        self.wants_backup[who.node] = true;
    }

    /// A side drops the guest that it kept.
    pub fn drops_guest(&mut self, me: &failover::arbiter::NodeRef) {
        let elsewhere = self.register.record().is_some_and(|record| record.owner.node != me.node);
        self.ghost.drops_guest(me, elsewhere);
    }

    /// For the broken rule that a promoted backup goes on acknowledging: what is under way still arrives and is acknowledged.
    pub fn linger(&mut self, waiter: &mut WaiterPart, base: &mut Base) {
        let due: Vec<(ConnId, End)> = self.net.of(base.who);
        for (conn, end) in due {
            while let super::net::Delivery::Arrived(packet) = self.net.deliver(conn, end, self.now) {
                waiter.arrived(conn, &packet, base, self);
            }
        }
    }

    // ---- the network ---------------------------------------------------------------------------------------------------------------

    fn transit(&mut self) -> Nanos {
        let base = self.rng.range(50_000, 300_000);
        if self.conditions.slow_packet > 0 && self.one_in(self.conditions.slow_packet) {
            base + self.rng.range(0, 200_000_000)
        } else {
            base
        }
    }

    /// How long a packet waits for a narrow link. Heartbeats and acknowledgements have their share of it.
    fn queues_for(&mut self, packet: &Packet) -> Nanos {
        let bytes = match packet {
            Packet::Bytes(bytes) if bytes.len() > SMALL_PACKET => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            _ => return 0,
        };
        let Some(takes) = bytes.saturating_mul(1_000_000_000).checked_div(self.conditions.link_rate) else { return 0 };
        self.link_busy = self.link_busy.max(self.now) + takes;
        self.link_busy - self.now
    }

    /// Puts a packet on the way.
    pub fn send(&mut self, conn: ConnId, from: End, packet: Packet) {
        if self.hosts.is_some() && self.net.who(conn, from).is_some_and(|who| self.is_dark(who.node)) {
            return;
        }
        let delay = self.transit() + self.queues_for(&packet);
        let now = self.now;
        if let Some(at) = self.net.send(conn, from, packet, now, delay) {
            self.at(at, Event::Deliver(conn, from.other()));
        }
    }

    /// Puts frames on the way, cut into pieces as a network does.
    pub fn send_stream(&mut self, conn: ConnId, from: End, frames: Vec<Bytes>) {
        if frames.is_empty() {
            return;
        }
        let mut rest: Bytes = match <[Bytes; 1]>::try_from(frames) {
            Ok([one]) => one,
            Err(frames) => frames.concat().into(),
        };
        if self.conditions.split_packet > 0 && self.one_in(self.conditions.split_packet) && rest.len() > 1 {
            let at = self.rng.range(1, rest.len() as u64);
            let first = rest.split_to(usize::try_from(at).expect("within a piece"));
            self.send(conn, from, Packet::Bytes(first));
        }
        // What a receiver takes at once is bounded.
        while rest.len() > 128 << 10 {
            let first = rest.split_to(128 << 10);
            self.send(conn, from, Packet::Bytes(first));
        }
        if self.conditions.keep_old_packets && from == End::Callee && self.one_in(8) {
            self.conditions.old_packet = Some(rest.clone());
        }
        self.send(conn, from, Packet::Bytes(rest));
    }

    /// A process closes its end.
    pub fn hang_up(&mut self, conn: ConnId, end: End) {
        if self.net.is_open(conn, end) {
            self.send(conn, end, Packet::Fin);
            self.net.close(conn, end);
        }
    }

    /// A process wants both connections of a session.
    pub fn dial(&mut self, who: Who, session: Session) {
        let at = self.now + self.dial_time(who);
        self.at(at, Event::Dialled(who, session));
    }

    /// A process wants a heartbeat connection.
    pub fn ask_peer(&mut self, who: Who) {
        let at = self.now + self.dial_time(who);
        self.at(at, Event::Asked(who));
    }

    fn dial_time(&mut self, who: Who) -> Nanos {
        let cut = self.net.cut[who.node] || self.net.cut[1 - who.node] || !self.conditions.host_up[1 - who.node];
        if cut { 1_000_000_000 } else { 2 * self.transit() }
    }

    // ---- the arbiter ---------------------------------------------------------------------------------------------------------------

    /// A process asks the arbiter.
    pub fn ask_arbiter(&mut self, who: Who, op: OpId, request: ArbiterRequest) {
        if self.is_dark(who.node) {
            return;
        }
        if let ArbiterRequest::Cas { record, .. } = &request
            && matches!(
                record.reason,
                Reason::Created | Reason::ColdStart | Reason::Takeover | Reason::Switchover | Reason::Forced
            )
        {
            self.ghost.asks_for(who, record.generation.0, self.persisted[who.node].0);
        }
        let fate = self.conditions.fate(who.node, &mut self.rng);
        let travel = self.rng.range(100_000, 3_000_000) + self.conditions.arbiter_slow;
        let now = self.now;
        match fate {
            Fate::Refused => {
                let answer = Register::silence(&request, true);
                self.at(now + travel, Event::Answered(who, op, Box::new(answer)));
            }
            Fate::Lost => {
                let answer = Register::silence(&request, false);
                self.at(now + ARBITER_PATIENCE, Event::Answered(who, op, Box::new(answer)));
            }
            Fate::Served => self.at(now + travel, Event::Serve(who, op, Box::new(request), fate)),
            Fate::AnswerLost | Fate::Late => {
                let answer = Register::silence(&request, false);
                self.at(now + ARBITER_PATIENCE, Event::Answered(who, op, Box::new(answer)));
                let late = if fate == Fate::Late { ARBITER_PATIENCE + self.rng.range(0, 3_000_000_000) } else { 0 };
                self.at(now + travel + late, Event::Serve(who, op, Box::new(request), fate));
            }
        }
    }

    /// A request reached the arbiter.
    pub fn serve(&mut self, who: Who, op: OpId, request: &ArbiterRequest, fate: Fate) {
        let before = self.register.record().cloned();
        let (answer, swapped) = self.register.serve(request);
        if let Some(record) = swapped {
            self.note(|| {
                let in_sync = record.in_sync.as_ref().map_or("nobody".into(), ToString::to_string);
                let (generation, reason) = (record.generation, record.reason.word());
                format!("RECORD generation {generation} owner {} in sync {in_sync}: {reason}", record.owner)
            });
            if let Some(before) = before.filter(|before| before.generation < record.generation) {
                self.replaced.insert(record.generation.0, before);
            }
            self.ghost.recorded(&record);
            if record.reason == Reason::Protected
                && let Some(owner) = self.births.get(&record.owner.incarnation.0).copied()
            {
                // From now on somebody else may run it.
                self.examine(owner);
            }
        }
        if fate == Fate::Served {
            let travel = self.rng.range(100_000, 3_000_000);
            let now = self.now;
            self.at(now + travel, Event::Answered(who, op, Box::new(answer)));
        }
    }

    // ---- the LAN -------------------------------------------------------------------------------------------------------------------

    /// The switch saw a frame of the guest's on this node's port.
    pub fn lan_learns(&mut self, who: Who) {
        self.lan_port = Some(who.node);
    }

    /// A frame left a host.
    pub fn frame_left(&mut self, who: Who, frame: Bytes) {
        if self.is_dark(who.node) {
            return;
        }
        let said = Utterance::decode(&frame);
        self.ghost.released(who, &said, self.register.record());
        if let Some(disk) = said.registers.disk
            && self.ghost.promise_heard(disk.promise)
            && self.disk_rng.range(0, 3) == 0
        {
            self.examine(who);
        }
        self.lan_learns(who);
        if !self.conditions.lan_cut[who.node] {
            let at = self.now + self.rng.range(20_000, 200_000);
            self.at(at, Event::Heard(frame));
        }
    }

    /// A client's frame for the guest.
    pub fn frame_for_guest(&mut self, frame: &[u8]) {
        for node in 0..2 {
            if self.lan_port.is_none_or(|port| port == node) && !self.conditions.lan_cut[node] {
                let at = self.now + self.rng.range(20_000, 200_000);
                self.at(at, Event::Frame(node, frame.to_vec()));
            }
        }
    }

    // ---- disks -----------------------------------------------------------------------------------------------------------------------

    /// Whether the power of a host has failed in this very moment: what its process still does has no effect.
    pub fn is_dark(&self, node: usize) -> bool {
        self.hosts.as_ref().is_some_and(|hosts| hosts[node].supply.is_off())
    }

    /// The power of a host fails: its files lose what they lose.
    pub fn files_lose(&mut self, node: usize) {
        if let Some(hosts) = &self.hosts {
            hosts[node].lose(&mut self.disk_rng);
        }
    }

    /// The image of a host, if the guest has a disk.
    pub fn image(&self, node: usize) -> Option<Vec<u8>> {
        self.hosts.as_ref().map(|hosts| hosts[node].image())
    }

    /// A guest is booted: what is on its disk decides what it knows.
    pub fn boots_from_disk(&mut self, who: Who) {
        if let Some(image) = self.image(who.node) {
            self.ghost.disk_begins(who, &image);
        }
    }

    /// Somebody was just told of a flush: it must be found in the files of everybody who could run the guest, even if their power failed now. What a
    /// superseded side let out was covered by the other one, and its own image is undone when it returns.
    fn examine(&mut self, speaker: Who) {
        let Some(hosts) = &self.hosts else { return };
        let recorded = self.register.record().and_then(|record| self.births.get(&record.owner.incarnation.0));
        let owner = recorded.copied().unwrap_or(speaker);
        let mut nodes = vec![owner.node];
        if let Some(record) = self.register.record()
            && self.ghost.could_take_over(record)
        {
            nodes.extend((0..2).filter(|node| *node != owner.node));
        }
        self.ghost.seen.exams += 1;
        for node in nodes {
            let survivors = hosts[node].survivors(&mut self.disk_rng);
            match survivors.open(Incarnation(1)) {
                Ok(_) => self.ghost.check_promise(&format!("host {node}, had its power failed"), &survivors.image()),
                Err(why) => self.ghost.broken("flush", format!("host {node}, had its power failed: {why}")),
            }
        }
    }

    /// How long the guest's disk takes for the next thing.
    pub fn guest_disk_interval(&mut self) -> Nanos {
        let most = if self.conditions.storm { 1_000_000 } else { 12_000_000 };
        self.disk_rng.range(50_000, most)
    }

    /// How long the disks' thread of the side that waits takes for the next thing.
    pub fn disk_delay(&mut self) -> Nanos {
        let most = if self.conditions.slow_disk { 120_000_000 } else { 1_500_000 };
        self.disk_rng.range(10_000, most)
    }

    // ---- the guest and the applier -------------------------------------------------------------------------------------------------

    /// How many pages the guest writes at a time.
    pub fn dirty_pages(&mut self) -> u64 {
        if self.conditions.storm { self.rng.range(20, 200) } else { self.rng.range(0, 3) }
    }

    /// How long until the guest does something again by itself.
    pub fn guest_interval(&mut self) -> Nanos {
        self.rng.range(self.conditions.guest_interval / 2, self.conditions.guest_interval * 2)
    }

    /// How long the applier takes; 0: at once.
    pub fn applier_delay(&mut self) -> Nanos {
        if self.conditions.slow_applier { self.rng.range(0, 50_000_000) } else { 0 }
    }
}
