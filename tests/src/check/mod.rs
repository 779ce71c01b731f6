//! The checkers: they watch everything that happens in a simulated world and know what is true, and they share nothing with the code that they
//! check. A [`Violation`] names the guarantee of ARCHITECTURE.md that was broken.

use std::collections::{BTreeMap, HashMap, VecDeque};

pub mod disk;

use failover::arbiter::{NodeRef, Reason, Record};
use failover::decide::{Gate, View};

use crate::world::guest::{CLIENTS, PAGES, SimMachine, Utterance};
use crate::world::{Nanos, Who};

/// Checkpoints whose content is remembered for each life.
const REMEMBERED: usize = 64;
/// A status may be this old before it counts as false: three arbiter probes, the longest silence, and a heartbeat.
const STALE_AFTER: Nanos = 5_000_000_000;

/// A guarantee that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which, as in ARCHITECTURE.md.
    pub guarantee: &'static str,
    /// What happened.
    pub what: String,
}

/// Number of a process's life in a world.
pub type LifeId = u32;

/// The state of the guest at the end of an epoch.
#[derive(Clone, Debug)]
struct Content {
    epoch: u64,
    /// Pages written in this epoch, one bit each.
    touched: u64,
    pages: [u64; PAGES],
    /// The disk, if there is one, and how many changes of disks there had been.
    disk: Option<(disk::Shadow, u64)>,
}

/// What is true of one process's life.
#[derive(Debug, Default)]
struct Life {
    me: Option<NodeRef>,
    ended: Option<Nanos>,
    generation: Option<u64>,
    /// The page hashes of the running guest, as of the last checkpoint.
    pages: Option<[u64; PAGES]>,
    sealed: u64,
    /// Last epoch of which something was let out.
    released: u64,
    contents: VecDeque<Content>,
    /// As a standby: whose epochs it holds, and up to which.
    committed: Option<(LifeId, u64)>,
    arbiter_ok: Option<Nanos>,
    /// Somebody else goes on from this epoch of this life's; 0: from none.
    superseded: Option<(LifeId, u64)>,
}

/// What a client was told.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    boot: u64,
    done: u64,
}

/// Everything that is known to be true in a world.
#[derive(Debug, Default)]
pub struct Ghost {
    lives: BTreeMap<LifeId, Life>,
    /// Who said what in which epoch, by the guest's history.
    said: HashMap<u64, (LifeId, u64)>,
    /// The same, by speaker: a superseded guest and its successor may say the same, each for itself.
    said_by: HashMap<(LifeId, u64), u64>,
    permits: BTreeMap<u64, LifeId>,
    told: [Told; CLIENTS],
    /// Boots that were rightful.
    boots: u64,
    /// An operator forced something, or restored an old content of the arbiter: what was promised before is void.
    forced: bool,
    violation: Option<Violation>,
    disks: disk::Disks,
    /// What happened, for those who must know that a run was not vacuous.
    pub seen: Seen,
}

/// How often what happened in a world.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Checkpoints taken.
    pub epochs: u64,
    /// Checkpoints committed.
    pub commits: u64,
    /// Bases committed.
    pub bases: u64,
    /// Frames let out.
    pub released: u64,
    /// Answers that clients got.
    pub answers: u64,
    /// Takeovers.
    pub takeovers: u64,
    /// Boots.
    pub boots: u64,
    /// Times that a side was fenced.
    pub fenced: u64,
    /// Times that a side went solo because it lost its backup.
    pub solos: u64,
    /// Times that protection came about.
    pub protections: u64,
    /// Connections that ended because their bytes were wrong.
    pub refusals: u64,
    /// Times that a fenced side began anew as the backup.
    pub rejoins: u64,
    /// Flushes of the guest's disk.
    pub flushes: u64,
    /// Times that a backup's disk was brought in line with its owner's.
    pub disk_bases: u64,
    /// Times that files were looked at as a power cut would have left them.
    pub exams: u64,
    /// Times that link or backup could not keep up with the guest.
    pub overloads: u64,
    /// Times that the guest was slowed, or slowed by another amount.
    pub throttles: u64,
    /// Times that protection ended because of an overload.
    pub dropped: u64,
}

impl Seen {
    /// Adds another world's.
    pub fn add(&mut self, other: &Self) {
        let Self {
            epochs,
            commits,
            bases,
            released,
            answers,
            takeovers,
            boots,
            fenced,
            solos,
            protections,
            refusals,
            rejoins,
            flushes,
            disk_bases,
            exams,
            overloads,
            throttles,
            dropped,
        } = other;
        self.epochs += epochs;
        self.commits += commits;
        self.bases += bases;
        self.released += released;
        self.answers += answers;
        self.takeovers += takeovers;
        self.boots += boots;
        self.fenced += fenced;
        self.solos += solos;
        self.protections += protections;
        self.refusals += refusals;
        self.rejoins += rejoins;
        self.flushes += flushes;
        self.disk_bases += disk_bases;
        self.exams += exams;
        self.overloads += overloads;
        self.throttles += throttles;
        self.dropped += dropped;
    }
}

impl Ghost {
    /// The first guarantee that was broken.
    pub fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }

    /// Something else that must never happen did.
    pub fn broken(&mut self, guarantee: &'static str, what: String) {
        self.violation.get_or_insert(Violation { guarantee, what });
    }

    /// A fenced side drops the guest that it kept and begins anew. `elsewhere`: the record says that the other node owns the guest.
    pub fn drops_guest(&mut self, me: &NodeRef, elsewhere: bool) {
        self.seen.rejoins += 1;
        if !elsewhere && !self.forced {
            self.broken("G12", format!("{me} drops a guest that nobody else owns"));
        }
    }

    fn life(&mut self, id: LifeId) -> &mut Life {
        self.lives.entry(id).or_default()
    }

    fn by_node(&self, node: &NodeRef) -> Option<LifeId> {
        self.lives.iter().find(|(_, life)| life.me.as_ref() == Some(node)).map(|(id, _)| *id)
    }

    /// A process began.
    pub fn born(&mut self, who: Who, me: &NodeRef) {
        self.life(who.life).me = Some(me.clone());
    }

    /// A process ended.
    pub fn died(&mut self, who: Who, now: Nanos) {
        self.life(who.life).ended.get_or_insert(now);
    }

    /// An operator said that what was promised does not matter.
    pub fn operator_forced(&mut self) {
        self.forced = true;
    }

    // ---- who may run -------------------------------------------------------------------------------------------------------------

    fn permit(&mut self, who: Who, generation: u64) {
        if let Some(other) = self.permits.insert(generation, who.life)
            && !self.forced
        {
            self.broken("G2", format!("generation {generation} was granted to life {other} and to life {}", who.life));
        }
        let life = self.life(who.life);
        if life.generation.is_some_and(|before| before >= generation) {
            self.broken("G2", format!("life {} was granted generation {generation} after a higher one", who.life));
        } else {
            life.generation = Some(generation);
        }
    }

    /// A process of a node that has seen generation `seen` asks for the right to run in generation `asked`.
    pub fn asks_for(&mut self, who: Who, asked: u64, seen: u64) {
        if asked <= seen {
            let life = who.life;
            self.broken("G10", format!("life {life} asks for generation {asked}, its node has seen {seen}"));
        }
    }

    /// A process was given the right to boot the guest. `before`: the record that this replaced.
    pub fn boots(&mut self, who: Who, generation: u64, machine: &SimMachine, before: Option<&Record>) {
        self.permit(who, generation);
        self.seen.boots += 1;
        self.boots += 1;
        let standby = before.and_then(|r| r.in_sync.as_ref()).and_then(|b| self.by_node(b));
        if let Some(standby) = standby
            && self.lives[&standby].ended.is_none()
            && !self.forced
        {
            self.broken("G2", format!("life {} boots the guest while life {standby} is in sync and lives", who.life));
        }
        self.supersede_all(who, None);
        let pages = hashes(machine);
        self.life(who.life).pages = Some(pages);
    }

    /// A standby was given the right to run from `epoch`, and holds what `machine` holds. `before`: the record that this replaced.
    pub fn takes_over(&mut self, who: Who, generation: u64, epoch: u64, machine: &SimMachine, before: Option<&Record>) {
        self.permit(who, generation);
        self.seen.takeovers += 1;
        let pages = hashes(machine);
        let Some((from, committed)) = self.life(who.life).committed else {
            return self.broken("G3", format!("life {} took over and holds nothing", who.life));
        };
        if committed != epoch {
            self.broken("G4", format!("life {} runs from epoch {epoch}, committed is {committed}", who.life));
        }
        if before.is_some_and(|r| r.reason == Reason::Stopped) && !self.forced {
            self.broken("stop", format!("life {} resurrects a guest that was switched off", who.life));
        }
        let owner = &self.lives[&from];
        match owner.contents.iter().find(|c| c.epoch == epoch) {
            Some(content) if content.pages == pages => {}
            Some(content) => {
                let wrong: Vec<usize> = (0..pages.len()).filter(|p| content.pages[*p] != pages[*p]).collect();
                self.broken("G4", format!("epoch {epoch} of life {from}: pages {wrong:?} differ after the takeover"));
            }
            None => self.broken("G5", format!("epoch {epoch} of life {from} was never sealed, or too long ago")),
        }
        let released = self.lives[&from].released;
        if released > epoch && !self.forced {
            self.broken("G1", format!("life {from} let out epoch {released}, life {} runs from {epoch}", who.life));
        }
        self.supersede_all(who, Some((from, epoch)));
        let life = self.life(who.life);
        life.pages = Some(pages);
        life.sealed = epoch;
        life.released = epoch;
    }

    fn supersede_all(&mut self, who: Who, from: Option<(LifeId, u64)>) {
        for (id, life) in &mut self.lives {
            if *id != who.life && life.generation.is_some() && life.superseded.is_none() {
                let until = from.filter(|(owner, _)| owner == id).map_or(0, |(_, epoch)| epoch);
                life.superseded = Some((who.life, until));
            }
        }
    }

    /// A fenced guest was resumed by force.
    pub fn resumes(&mut self, who: Who, generation: u64) {
        self.permit(who, generation);
        self.life(who.life).superseded = None;
    }

    // ---- what is said ------------------------------------------------------------------------------------------------------------

    /// The guest said something in the epoch that follows the last sealed one.
    pub fn said(&mut self, who: Who, history: u64) {
        let epoch = self.life(who.life).sealed + 1;
        self.said.insert(history, (who.life, epoch));
        self.said_by.insert((who.life, history), epoch);
    }

    /// A checkpoint was taken: the epoch ends with what `machine` holds.
    pub fn sealed(&mut self, who: Who, epoch: u64, machine: &mut SimMachine) {
        self.seen.epochs += 1;
        let touched = machine.take_touched();
        let disk = self.disks.shadow(who.life);
        let life = self.life(who.life);
        if epoch <= life.sealed {
            let last = life.sealed;
            return self.broken("G5", format!("life {}: epoch {epoch} was sealed after {last}", who.life));
        }
        life.sealed = epoch;
        let Some(pages) = &mut life.pages else {
            return self.broken("G2", format!("life {} ends an epoch and never had the right to run", who.life));
        };
        for page in (0..PAGES).filter(|p| touched >> p & 1 == 1) {
            pages[page] = machine.page_hash(page);
        }
        let content = Content { epoch, touched, pages: *pages, disk };
        life.contents.push_back(content);
        if life.contents.len() > REMEMBERED {
            life.contents.pop_front();
        }
    }

    /// A connection ended whose base was `first` and on which the backup acknowledged up to `acked`: what was written in later epochs must be `owed`, one
    /// bit for each page (G6).
    pub fn disconnected(&mut self, who: Who, first: u64, acked: u64, owed: u64) {
        let life = self.life(who.life);
        let since = life.contents.iter().filter(|c| c.epoch > acked.max(first));
        let forgotten = since.fold(0, |pages, content| pages | content.touched) & !owed;
        if forgotten != 0 {
            self.broken(
                "G6",
                format!("life {}: pages {forgotten:#x} written after epoch {acked} are forgotten", who.life),
            );
        }
    }

    /// A standby committed an epoch.
    pub fn committed(&mut self, who: Who, owner: LifeId, epoch: u64, base: bool) {
        self.seen.commits += 1;
        self.seen.bases += u64::from(base);
        let before = self.life(who.life).committed;
        if !base && before != Some((owner, epoch - 1)) {
            self.broken("G5", format!("life {} committed epoch {epoch} of life {owner} after {before:?}", who.life));
        }
        if epoch > self.life(owner).sealed {
            self.broken("G3", format!("life {} committed epoch {epoch}, which life {owner} never sealed", who.life));
        }
        self.life(who.life).committed = Some((owner, epoch));
    }

    /// A standby begins to receive a base: it holds nothing any more.
    pub fn hollow(&mut self, who: Who) {
        self.life(who.life).committed = None;
    }

    /// A frame left the host of `who`, while the arbiter holds `record`.
    pub fn released(&mut self, who: Who, frame: &Utterance, record: Option<&Record>) {
        self.seen.released += 1;
        let history = frame.registers.history;
        let own = self.said_by.get(&(who.life, history)).map(|epoch| (who.life, *epoch));
        let Some((speaker, epoch)) = own.or_else(|| self.said.get(&history).copied()) else {
            return self.broken("G1", format!("life {} let out something that no guest said", who.life));
        };
        if let Some((by, until)) = self.life(speaker).superseded
            && epoch > until
            && !self.forced
        {
            let what =
                format!("life {} let out epoch {epoch} of life {speaker}; life {by} goes on from {until}", who.life);
            return self.broken("G1", what);
        }
        let life = self.life(speaker);
        life.released = life.released.max(epoch);
        if let Some(record) = record {
            self.check_covered(speaker, record, "an output left");
        }
    }

    /// While the record names a process in sync, it must hold everything that the owner let out: it may take over at any moment.
    fn check_covered(&mut self, owner: LifeId, record: &Record, when: &str) {
        if self.forced || self.by_node(&record.owner) != Some(owner) {
            return;
        }
        let Some(backup) = record.in_sync.as_ref().and_then(|b| self.by_node(b)) else { return };
        let released = self.lives[&owner].released;
        let covered = match self.lives[&backup].committed {
            Some((of, epoch)) if of == owner => epoch,
            _ => 0,
        };
        if released > covered {
            self.broken(
                "G1",
                format!("{when}: life {owner} let out epoch {released}, life {backup}, in sync, holds {covered}"),
            );
        }
    }

    /// Whether somebody could take over now: the record names a backup that lives and holds something.
    pub fn could_take_over(&self, record: &Record) -> bool {
        let backup = record.in_sync.as_ref().and_then(|b| self.by_node(b)).map(|id| &self.lives[&id]);
        !self.forced && backup.is_some_and(|life| life.ended.is_none() && life.committed.is_some())
    }

    /// The record was written.
    pub fn recorded(&mut self, record: &Record) {
        if let Some(owner) = self.by_node(&record.owner) {
            self.check_covered(owner, record, "the record was written");
        }
        match record.reason {
            Reason::BackupLost => self.seen.solos += 1,
            Reason::Protected => self.seen.protections += 1,
            _ => {}
        }
    }

    // ---- clients -----------------------------------------------------------------------------------------------------------------

    /// A client got an answer. True when it was the one to this request.
    pub fn answered(&mut self, client: usize, asked: u64, answer: &Utterance) -> bool {
        self.seen.answers += 1;
        let done = answer.registers.done[client];
        let told = &mut self.told[client];
        if answer.registers.boot > told.boot {
            // The guest was booted anew, which only happens when its memory is lost on both hosts; that was checked there.
            *told = Told { boot: answer.registers.boot, done: 0 };
        }
        if answer.registers.boot < told.boot {
            // A late frame of an earlier guest.
            return false;
        }
        told.done = told.done.max(done);
        if done > asked && !self.forced {
            let what = format!("client {client}: request {done} was carried out, {asked} is the last that was made");
            self.broken("clients", what);
        }
        done == asked
    }

    /// A client asks the guest that runs now for its state: nothing that it was ever told may be missing.
    pub fn inspected(&mut self, machine: &SimMachine) {
        let registers = machine.registers();
        for client in 0..CLIENTS {
            let Told { boot, done } = self.told[client];
            if registers.boot == boot && registers.done[client] < done && !self.forced {
                let has = registers.done[client];
                self.broken("clients", format!("client {client} was told of request {done}, the guest knows {has}"));
            }
        }
    }

    // ---- status ------------------------------------------------------------------------------------------------------------------

    /// The arbiter gave `who` an answer that it can use.
    pub fn arbiter_answered(&mut self, who: Who, now: Nanos) {
        self.life(who.life).arbiter_ok = Some(now);
    }

    /// What the owner `who` shows of itself, while the arbiter holds `record`.
    pub fn shows(&mut self, who: Who, view: &View, gate_on_commit: bool, record: Option<&Record>, now: Nanos) {
        if !view.owner || !view.protected {
            if view.armed && view.owner {
                self.broken("G11", format!("life {} is armed and not protected", who.life));
            }
            return;
        }
        let Some(record) = record else {
            return self.broken("G11", format!("life {} says PROTECTED, and there is no record", who.life));
        };
        let Some(me) = self.life(who.life).me.clone() else { return };
        let named = record.owner == me && record.in_sync.is_some();
        // The backup may have taken over a moment ago: then a takeover was granted indeed.
        let taken = record.owner.node != me.node && record.generation > view.generation;
        if !gate_on_commit || !matches!(view.gate, Gate::OnAck(_)) {
            self.broken("G11", format!("life {} says PROTECTED and its output is not gated on a commit", who.life));
        }
        if !named && !taken && !self.forced {
            self.broken("G11", format!("life {} says PROTECTED, the record is {record:?}", who.life));
        }
        if let Some(backup) = record.in_sync.as_ref().filter(|_| named).and_then(|b| self.by_node(b)) {
            let backup = &self.lives[&backup];
            let long_dead = backup.ended.is_some_and(|at| now > at + STALE_AFTER);
            let cut_off = backup.arbiter_ok.is_none_or(|at| now > at + STALE_AFTER);
            if view.armed && !self.forced && (long_dead || cut_off || backup.committed.is_none()) {
                self.broken("G11", format!("life {} says ARMED: {backup:?}", who.life));
            }
        }
    }
}

fn hashes(machine: &SimMachine) -> [u64; PAGES] {
    std::array::from_fn(|page| machine.page_hash(page))
}
