//! An append-only log on a disk: what it holds when the machine dies is read back at the next start.
//!
//! [`Log`] does no I/O itself: [`Log::poll`] says what to write and to flush, [`Log::completed`] takes what became of it, in any order.
//! Records are lost from the end only, and none that [`Log::durable`] covers.
//!
//! **Compaction.** When a half has grown, the other half gets the state of each key and, from then on, every record too; each
//! record tells the truth about the moment at which it was appended, so the last one about a key wins. When all of it is on stable
//! storage, the superblock is changed to the new half, by one write of one sector:
//!
//! 1. the superblock with the next generation, flush: what is left in the other half from earlier is no longer believed;
//! 2. states and records into the other half, flush;
//! 3. the superblock with the other half, flush. From 2 on a record counts as durable when it is so in *both* halves.
//!
//! An I/O error ends all that: nothing is durable any more until a compaction has written everything anew.

mod format;
mod replay;
mod stream;

use alloc::vec::Vec;

pub use format::{Geometry, Kind, MAX_BODY, MIN_DISK, SECTOR};
pub use replay::{Blocks, IoFailed, OpenError, Record, ReplayError};

use crate::resp::OutOfMemory;
use format::{HEADER, Superblock};
use stream::{Mark, Stream};

/// Bytes that may wait to be written before more records have to wait themselves.
const BACKLOG: usize = 4 << 20;
/// How long a record may wait for others to share a write with, in milliseconds, if nobody waits for it.
const GATHER_MS: u64 = 20;
/// Size in bytes from which on a log is compacted once it has doubled.
const COMPACT_FROM: u64 = 64 << 20;
/// Time between an I/O error, or a compaction that did not fit, and the next try, in milliseconds.
const RETRY_MS: u64 = 2000;
/// The part of a half that is kept for records that make the data smaller: one in so many.
const KEPT: u64 = 8;

/// Something to do on the disk. Its number comes back in [`Log::completed`].
#[derive(Debug, PartialEq, Eq)]
pub enum Job {
    /// Write these bytes, whole sectors, from this sector on.
    Write {
        /// The job's number.
        id: u64,
        /// The first sector.
        sector: u64,
        /// What to write.
        bytes: Vec<u8>,
    },
    /// Make sure that all writes that have completed are on stable storage.
    Flush {
        /// The job's number.
        id: u64,
    },
}

/// Whether a record can be appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// It can.
    Ready,
    /// Not now: ask again when jobs have completed.
    Wait,
    /// The log is full of live data.
    Full,
    /// It would never fit.
    TooLong,
    /// The disk failed.
    Failed,
    /// Memory ran out.
    OutOfMemory,
}

/// A superblock on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Publish {
    Due,
    Writing(u64),
    Written,
}

/// How far a compaction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Its generation is being published.
    Announcing,
    /// States are being appended.
    Copying,
    /// All states up to this sequence number are appended; they are not all on stable storage.
    Settling(u64),
    /// The superblock with the new half is being published.
    Switching,
}

#[derive(Debug)]
struct Copy {
    phase: Phase,
    target: Stream,
}

/// A flush, and what it covers.
#[derive(Debug)]
struct Flush {
    id: u64,
    active: Mark,
    /// With the generation of the half.
    target: Option<(u64, Mark)>,
    superblock: bool,
}

/// Why the log takes no records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// A compaction may mend it, from this time on.
    Since(u64),
    /// Which half counts is not known, or the disk is read-only.
    ForGood,
}

/// Figures about a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Bytes that a half has.
    pub capacity: u64,
    /// Bytes of the half that counts that are used.
    pub used: u64,
    /// The generation.
    pub generation: u64,
    /// Compactions completed since the start.
    pub compactions: u64,
    /// Flushes completed since the start.
    pub flushes: u64,
    /// Writes completed since the start.
    pub writes: u64,
}

/// The log. See the module's text.
#[derive(Debug)]
pub struct Log {
    superblock: Superblock,
    active: Stream,
    copy: Option<Copy>,
    publish: Option<Publish>,
    flush: Option<Flush>,
    /// Changes of the store so far.
    ticket: u64,
    /// Somebody waits for the changes up to this one.
    wanted: u64,
    durable: u64,
    next_id: u64,
    /// Jobs that have not completed.
    outstanding: usize,
    broken: Option<Broken>,
    /// When a compaction did not fit.
    full_since: Option<u64>,
    /// Something did not fit.
    starved: bool,
    /// Bytes used after the last compaction.
    compacted: u64,
    body: Vec<u8>,
    compactions: u64,
    flushes: u64,
    writes: u64,
}

/// A log that has been read.
#[derive(Debug)]
pub struct Opened {
    /// Ready to be appended to, once its first jobs are done.
    pub log: Log,
    /// Records that were replayed.
    pub records: u64,
    /// The latest time in a record, in milliseconds of the store's clock.
    pub time: u64,
}

/// Reads the log of a disk, or begins one on a disk whose first sector is all zeros. `salt` should be random, `read_only` says that the
/// disk cannot be written to: then every record is refused.
///
/// # Errors
/// There is no log to go on with.
pub fn open(
    disk: &mut dyn Blocks,
    salt: u64,
    read_only: bool,
    replay: impl FnMut(Record<'_>) -> Result<(), ReplayError>,
) -> Result<Opened, OpenError> {
    let found = replay::read_superblock(disk)?;
    let geometry = Geometry::of_disk(disk.sectors()).ok_or(OpenError::TooSmall)?;
    let fresh = Superblock { geometry, half: 0, generation: 0, base_generation: 1, required: 0, salt };
    let mut superblock = found.unwrap_or(fresh);
    let tail = match found {
        Some(block) => replay::replay(disk, &block, replay)?,
        None => replay::Tail { records: 0, sectors: 0, time: 0 },
    };
    superblock.generation += 1;
    let Superblock { geometry, half, generation, salt, .. } = superblock;
    let mark = Mark { sequence: tail.records, ticket: 0 };
    let active = Stream::new(salt, generation, geometry, half, tail.sectors, mark);
    let log = Log {
        compacted: active.used(),
        superblock,
        active,
        copy: None,
        publish: (!read_only).then_some(Publish::Due),
        flush: None,
        ticket: 0,
        wanted: 0,
        durable: 0,
        next_id: 0,
        outstanding: 0,
        broken: read_only.then_some(Broken::ForGood),
        full_since: None,
        starved: false,
        body: Vec::new(),
        compactions: 0,
        flushes: 0,
        writes: 0,
    };
    Ok(Opened { log, records: tail.records, time: tail.time })
}

impl Log {
    /// Whether a record with a body of `length` bytes can be appended now; if so, memory for it is made sure of. `shrinks`: it makes the
    /// data smaller.
    pub fn room(&mut self, length: usize, shrinks: bool, now: u64) -> Room {
        let need = (HEADER + length) as u64;
        let kept = if shrinks { 0 } else { self.kept() };
        if self.broken.is_some() {
            return Room::Failed;
        }
        if length > MAX_BODY || need + self.kept() > self.superblock.geometry.capacity() / 2 {
            return Room::TooLong;
        }
        if self.active.waiting() >= BACKLOG {
            return Room::Wait;
        }
        if self.active.left() < need + kept {
            self.starved = true;
            let full = self.full_since.is_some() && self.copy.is_none();
            return if full { Room::Full } else { Room::Wait };
        }
        if let Some(copy) = &mut self.copy {
            if copy.target.waiting() >= BACKLOG {
                return Room::Wait;
            }
            if copy.target.left() < need {
                if copy.phase == Phase::Switching {
                    return Room::Wait;
                }
                self.give_up(now);
            }
        }
        match self.reserve(length) {
            Ok(()) => Room::Ready,
            Err(OutOfMemory) => Room::OutOfMemory,
        }
    }

    fn kept(&self) -> u64 {
        self.superblock.geometry.capacity() / KEPT
    }

    fn reserve(&mut self, length: usize) -> Result<(), OutOfMemory> {
        self.body.clear();
        self.body.try_reserve(length).map_err(|_| OutOfMemory)?;
        self.active.reserve(length)?;
        match &mut self.copy {
            Some(copy) => copy.target.reserve(length),
            None => Ok(()),
        }
    }

    /// Appends a change of the store, after [`Self::room`] said that it can be. `write` appends the body, which is no longer
    /// than was said, to what it gets. The change's ticket is returned: it is durable once [`Self::durable`] is as large.
    pub fn append(&mut self, kind: Kind, time: u64, now: u64, write: impl FnOnce(&mut Vec<u8>)) -> u64 {
        write(&mut self.body);
        self.ticket += 1;
        self.active.append(kind, time, &self.body, self.ticket, now);
        if let Some(Copy { phase: Phase::Copying | Phase::Settling(_) | Phase::Switching, target }) = &mut self.copy {
            target.append(kind, time, &self.body, self.ticket, now);
        }
        self.forget_body();
        self.ticket
    }

    fn forget_body(&mut self) {
        if self.body.capacity() > BACKLOG {
            self.body = Vec::new();
        }
        self.body.clear();
    }

    /// The last change that is on stable storage, with all before it.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.durable
    }

    /// The last change.
    #[must_use]
    pub fn ticket(&self) -> u64 {
        self.ticket
    }

    /// Asks for everything up to this change to be made durable.
    pub fn want(&mut self, ticket: u64) {
        self.wanted = self.wanted.max(ticket);
    }

    /// Whether the disk failed: what is not durable by now will not be, as far as those who wait are concerned.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Whether everything appended is durable.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.durable == self.ticket
    }

    /// The first sector behind the log.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.superblock.geometry.end()
    }

    /// Figures, for people.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            capacity: self.superblock.geometry.capacity(),
            used: self.active.used(),
            generation: self.superblock.generation,
            compactions: self.compactions,
            flushes: self.flushes,
            writes: self.writes,
        }
    }

    /// When [`Self::poll`] has something to do although no job completes, in milliseconds.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        let gather = |stream: &Stream| stream.waits_since().filter(|_| stream.flights() == 0).map(|at| at + GATHER_MS);
        if self.broken.is_some() && self.copy.is_none() {
            return match self.broken {
                Some(Broken::Since(at)) => Some(at + RETRY_MS),
                _ => None,
            };
        }
        if self.publish.is_some() && self.copy.is_none() {
            return None;
        }
        let active = gather(&self.active).filter(|_| self.broken.is_none());
        let target = self.copy.as_ref().and_then(|copy| gather(&copy.target));
        [active, target].into_iter().flatten().min()
    }

    /// The next thing to do on the disk, at `now` in milliseconds.
    pub fn poll(&mut self, now: u64) -> Option<Job> {
        if self.broken.is_some() && self.copy.is_none() {
            return None;
        }
        let id = self.next_id + 1;
        let job = self.publish_job(id).or_else(|| self.flush_job(id)).or_else(|| self.write_job(id, now))?;
        self.next_id = id;
        self.outstanding += 1;
        Some(job)
    }

    fn publish_job(&mut self, id: u64) -> Option<Job> {
        if self.publish != Some(Publish::Due) {
            return None;
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(SECTOR).ok()?;
        bytes.extend_from_slice(&self.next_superblock().encode());
        self.publish = Some(Publish::Writing(id));
        Some(Job::Write { id, sector: 0, bytes })
    }

    /// What the superblock is to be.
    fn next_superblock(&self) -> Superblock {
        match &self.copy {
            Some(Copy { phase: Phase::Switching, target }) => Superblock {
                half: 1 - self.superblock.half,
                base_generation: target.generation,
                required: target.flushed.sequence,
                ..self.superblock
            },
            _ => self.superblock,
        }
    }

    fn flush_job(&mut self, id: u64) -> Option<Job> {
        if self.flush.is_some() {
            return None;
        }
        let superblock = self.publish == Some(Publish::Written);
        let ahead = |stream: &Stream| stream.written != stream.flushed;
        let wanted = self.wanted > self.durable;
        let settling = |copy: &Copy| wanted || matches!(copy.phase, Phase::Settling(_));
        let active = self.broken.is_none() && wanted && ahead(&self.active);
        let target = self.copy.as_ref().is_some_and(|copy| ahead(&copy.target) && settling(copy));
        if !(superblock || active || target) {
            return None;
        }
        let target = self.copy.as_ref().map(|copy| (copy.target.generation, copy.target.written));
        self.flush = Some(Flush { id, active: self.active.written, target, superblock });
        Some(Job::Flush { id })
    }

    fn write_job(&mut self, id: u64, now: u64) -> Option<Job> {
        if self.copy.is_none() && self.publish.is_some() {
            // The generation of what waits is not durable yet.
            return None;
        }
        let wanted = self.wanted > self.durable;
        // Records that come while a write is under way share the next one.
        let due = |stream: &Stream, soon: bool| {
            let aged = stream.waits_since().is_some_and(|since| now >= since.saturating_add(GATHER_MS));
            stream.flights() == 0 && (soon || aged)
        };
        let active = &mut self.active;
        let all = due(active, wanted);
        let mut cut = if self.broken.is_none() { active.cut(all, id) } else { None };
        if let (None, Some(copy)) = (&cut, &mut self.copy) {
            let all = due(&copy.target, wanted || matches!(copy.phase, Phase::Settling(_)));
            cut = copy.target.cut(all, id);
        }
        cut.map(|(sector, bytes)| Job::Write { id, sector, bytes })
    }

    /// A job has ended. `bytes` are those of a write, to be used again; `now` is in milliseconds.
    pub fn completed(&mut self, id: u64, result: Result<(), IoFailed>, bytes: Option<Vec<u8>>, now: u64) {
        self.outstanding = self.outstanding.saturating_sub(1);
        if result == Err(IoFailed) {
            self.fail(now);
        }
        if let Some(flush) = self.flush.take_if(|flush| flush.id == id) {
            self.flushes += 1;
            if result.is_ok() {
                self.flushed(&flush);
            }
            return;
        }
        self.writes += 1;
        if self.publish == Some(Publish::Writing(id)) {
            self.publish = Some(Publish::Written);
        } else if !self.active.completed(id)
            && let Some(copy) = &mut self.copy
        {
            copy.target.completed(id);
        }
        if let Some(bytes) = bytes {
            self.active.recycle(bytes);
        }
    }

    fn flushed(&mut self, flush: &Flush) {
        self.active.flushed = flush.active;
        if let (Some(copy), Some((generation, mark))) = (&mut self.copy, flush.target)
            && copy.target.generation == generation
        {
            copy.target.flushed = mark;
        }
        if flush.superblock && self.publish == Some(Publish::Written) {
            self.publish = None;
            self.published();
        }
        let both = match &self.copy {
            Some(Copy { phase: Phase::Settling(_) | Phase::Switching, target }) => target.flushed.ticket,
            _ => u64::MAX,
        };
        if self.broken.is_none() {
            self.durable = self.durable.max(self.active.flushed.ticket.min(both));
        }
        self.settle();
    }

    /// Switches to the other half once it has everything.
    fn settle(&mut self) {
        if let Some(copy) = &mut self.copy
            && let Phase::Settling(last) = copy.phase
            && copy.target.flushed.sequence >= last
            && copy.target.flushed.ticket >= self.durable
        {
            copy.phase = Phase::Switching;
            self.publish = Some(Publish::Due);
        }
    }

    /// The superblock is on stable storage.
    fn published(&mut self) {
        match &mut self.copy {
            Some(copy) if copy.phase == Phase::Announcing => {
                let (generation, half) = (self.superblock.generation, 1 - self.superblock.half);
                let Superblock { geometry, salt, .. } = self.superblock;
                // All that was changed before is in the states that follow.
                let mark = Mark { sequence: 0, ticket: self.ticket };
                *copy = Copy { phase: Phase::Copying, target: Stream::new(salt, generation, geometry, half, 0, mark) };
            }
            Some(copy) if copy.phase == Phase::Switching => {
                self.superblock = self.next_superblock();
                let Some(Copy { target, .. }) = self.copy.take() else { return };
                self.active = target;
                self.compacted = self.active.used();
                self.compactions += 1;
                self.broken = None;
                (self.full_since, self.starved) = (None, false);
            }
            _ => {}
        }
    }

    fn fail(&mut self, now: u64) {
        let switching = self.copy.as_ref().is_some_and(|copy| copy.phase == Phase::Switching);
        let in_doubt = switching && self.publish != Some(Publish::Due);
        self.broken = match self.broken {
            Some(Broken::ForGood) => Some(Broken::ForGood),
            _ if in_doubt => Some(Broken::ForGood),
            _ => Some(Broken::Since(now)),
        };
        self.publish = None;
        self.flush = None;
        self.active.abandon();
        self.copy = None;
    }

    /// Whether the log should be compacted now. The caller then knows best whether that makes sense: it goes on with
    /// [`Self::compact`] or [`Self::set_full`].
    #[must_use]
    pub fn wants_compaction(&self, now: u64) -> bool {
        let flushes = usize::from(self.flush.is_some());
        // Writes that nobody knows any more might still go to the half that would be written to.
        if self.copy.is_some() || self.publish.is_some() || self.outstanding != self.active.flights() + flushes {
            return false;
        }
        match self.broken {
            Some(Broken::Since(at)) => return now >= at.saturating_add(RETRY_MS) && self.outstanding == 0,
            Some(Broken::ForGood) => return false,
            None => {}
        }
        let (used, capacity) = (self.active.used(), self.superblock.geometry.capacity());
        // Halfway between what the last compaction left and a full half, but not before most of it is used.
        let filled = used > capacity / 8 * 5 && used > self.compacted.midpoint(capacity - self.kept());
        let grown = used > COMPACT_FROM && used > 2 * self.compacted;
        let retry = self.full_since.is_none_or(|at| now >= at.saturating_add(RETRY_MS));
        (filled || grown || self.starved) && retry
    }

    /// Bytes of states that a compaction may have.
    #[must_use]
    pub fn compact_capacity(&self) -> u64 {
        self.superblock.geometry.capacity() - 2 * self.kept()
    }

    /// The live data does not fit: until it does, records that do not make it smaller are refused when there is no room.
    pub fn set_full(&mut self, now: u64) {
        self.full_since = Some(now);
        self.copy = None;
    }

    /// Begins a compaction, which [`Self::wants_compaction`].
    pub fn compact(&mut self) {
        assert!(self.copy.is_none() && self.publish.is_none(), "the log wants to be compacted");
        self.superblock.generation += 1;
        let (generation, half) = (self.superblock.generation, 1 - self.superblock.half);
        let Superblock { geometry, salt, .. } = self.superblock;
        let target = Stream::new(salt, generation, geometry, half, 0, Mark::default());
        self.copy = Some(Copy { phase: Phase::Announcing, target });
        self.publish = Some(Publish::Due);
    }

    /// Whether states are to be appended: of every key that there was when this became true.
    #[must_use]
    pub fn is_copying(&self) -> bool {
        self.copy.as_ref().is_some_and(|copy| copy.phase == Phase::Copying)
    }

    /// Whether a state of `length` bytes can be appended now. Not ready: [`Room::Wait`], or the compaction is given up.
    pub fn state_room(&mut self, length: usize, now: u64) -> Room {
        let kept = self.kept();
        let Some(copy) = &mut self.copy else { return Room::Failed };
        let room = if copy.target.waiting() >= BACKLOG {
            return Room::Wait;
        } else if length > MAX_BODY || copy.target.left() < (HEADER + length) as u64 + kept {
            Room::Full
        } else if self.body.try_reserve(length).is_err() || copy.target.reserve(length).is_err() {
            Room::OutOfMemory
        } else {
            return Room::Ready;
        };
        self.give_up(now);
        room
    }

    /// Ends a compaction for want of room, on the disk or in memory.
    pub fn give_up(&mut self, now: u64) {
        self.copy = None;
        match &mut self.broken {
            Some(Broken::Since(at)) => *at = now,
            _ => self.full_since = Some(now),
        }
    }

    /// Appends a state, after [`Self::state_room`] said that it can be.
    pub fn append_state(&mut self, time: u64, now: u64, write: impl FnOnce(&mut Vec<u8>)) {
        let Some(copy) = &mut self.copy else { return };
        write(&mut self.body);
        copy.target.append(Kind::State, time, &self.body, self.ticket, now);
        self.forget_body();
    }

    /// All states are appended.
    pub fn states_done(&mut self) {
        if let Some(copy) = &mut self.copy {
            copy.phase = Phase::Settling(copy.target.appended.sequence);
        }
        self.settle();
    }
}
