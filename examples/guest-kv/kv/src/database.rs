//! The data set and its log: every change is logged before anybody hears of it.

use alloc::vec::Vec;

use crate::command::{self, Machine, Ran, Session};
use crate::log::{self, Blocks, IoFailed, Job, Kind, Log, OpenError, Record, ReplayError, Room};
use crate::resp::{Args, Out, OutOfMemory, Parsed, parse};
use crate::state::{self, Names};
use crate::store::Store;

/// States that a compaction appends in one round.
const STATES: usize = 256;
/// Time between two flushes with [`AppendFsync::EverySecond`], in milliseconds.
const SYNC_MS: u64 = 1000;
/// Bytes that each state takes besides itself, padding included.
const STATE_OVERHEAD: usize = 56;

/// When changes are flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppendFsync {
    /// Before the client is told.
    Always,
    /// Once a second.
    EverySecond,
    /// When the client asks for it, or the machine is switched off.
    Never,
}

impl AppendFsync {
    /// The name of the setting's value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::EverySecond => "everysec",
            Self::Never => "no",
        }
    }
}

/// The log, and what keeps it in step with the data set.
#[derive(Debug)]
pub(crate) struct Keeper {
    pub(crate) log: Log,
    pub(crate) policy: AppendFsync,
    replayed: u64,
    /// The keys whose states a compaction has still to append.
    names: Option<Names>,
    synced_at: u64,
}

impl Keeper {
    /// Records that were replayed at the start.
    pub(crate) fn replayed(&self) -> u64 {
        self.replayed
    }

    /// Appends the first `count` arguments of a command as a change. The ticket to wait for is returned, 0 if there is none.
    pub(crate) fn append(&mut self, now: u64, buffer: &[u8], args: &Args, count: usize) -> u64 {
        let ticket = self.log.append(Kind::Command, now, now, |body| args.write(buffer, count, body));
        if self.policy != AppendFsync::Always {
            return 0;
        }
        self.log.want(ticket);
        ticket
    }

    fn work(&mut self, store: &mut Store) -> bool {
        let now = store.now();
        if self.policy == AppendFsync::EverySecond
            && !self.log.is_clean()
            && now >= self.synced_at.saturating_add(SYNC_MS)
        {
            self.synced_at = now;
            self.log.want(self.log.ticket());
        }
        if self.log.wants_compaction(now) {
            if state::length_of_all(store, STATE_OVERHEAD) > self.log.compact_capacity() {
                self.log.set_full(now);
            } else {
                self.log.compact();
            }
        }
        let copying = self.log.is_copying() && self.names.is_some();
        for _ in 0..STATES {
            match self.copy_state(store, now) {
                Some(true) => {}
                Some(false) => return false,
                None => break,
            }
        }
        copying && self.names.is_some()
    }

    /// Appends one state. `None` if there is no compaction, false if it has to wait.
    fn copy_state(&mut self, store: &mut Store, now: u64) -> Option<bool> {
        let names = self.names.as_mut().filter(|_| self.log.is_copying())?;
        let Some(name) = names.peek() else {
            self.names = None;
            self.log.states_done();
            return None;
        };
        match self.log.state_room(state::length(store, name), now) {
            Room::Ready => {}
            Room::Wait => return Some(false),
            _ => {
                self.names = None;
                return None;
            }
        }
        self.log.append_state(now, now, |body| state::write(store, name, body));
        names.skip();
        Some(true)
    }

    fn completed(&mut self, store: &Store, id: u64, result: Result<(), IoFailed>, bytes: Option<Vec<u8>>) {
        let copying = self.log.is_copying();
        self.log.completed(id, result, bytes, store.now());
        // At once: what changes after this is in both halves, what there is now is in the states.
        if !copying && self.log.is_copying() {
            match Names::of(store) {
                Ok(names) => self.names = Some(names),
                Err(OutOfMemory) => self.log.give_up(store.now()),
            }
        }
        if !self.log.is_copying() {
            self.names = None;
        }
    }

    fn next_deadline(&self) -> Option<u64> {
        let due = self.policy == AppendFsync::EverySecond && !self.log.is_clean() && !self.log.is_broken();
        let sync = due.then(|| self.synced_at.saturating_add(SYNC_MS));
        [sync, self.log.next_deadline()].into_iter().flatten().min()
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Database {
    store: Store,
    keeper: Option<Keeper>,
    /// The store's clock when the machine started: time goes on where the log ends, so that deadlines keep their meaning.
    started: u64,
}

impl Database {
    /// A data set in memory only.
    #[must_use]
    pub fn in_memory(store: Store) -> Self {
        Self { store, keeper: None, started: 0 }
    }

    /// Reads the log on a disk into `store`, which is empty, or begins one. `salt` should be random; a read-only disk takes no changes.
    ///
    /// # Errors
    /// There is no log to go on with.
    pub fn open(
        mut store: Store,
        disk: &mut dyn Blocks,
        salt: u64,
        read_only: bool,
        policy: AppendFsync,
        machine: &mut dyn Machine,
    ) -> Result<Self, OpenError> {
        let (mut args, mut out) = (Args::new(), Out::new());
        let opened =
            log::open(disk, salt, read_only, |record| replay(&mut store, machine, record, &mut args, &mut out))?;
        store.set_now(opened.time);
        let keeper = Keeper { log: opened.log, policy, replayed: opened.records, names: None, synced_at: opened.time };
        Ok(Self { store, keeper: Some(keeper), started: opened.time })
    }

    /// The data.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Records that were replayed at the start; `None` if there is no log.
    #[must_use]
    pub fn replayed(&self) -> Option<u64> {
        self.keeper.as_ref().map(Keeper::replayed)
    }

    /// Sets the clock, in milliseconds since the machine started.
    pub fn set_uptime(&mut self, ms: u64) {
        self.store.set_now(self.started.saturating_add(ms));
    }

    /// Carries out one request, whose arguments lie in `buffer`, and appends the reply to `out`.
    pub fn run(
        &mut self,
        machine: &mut dyn Machine,
        session: &Session,
        buffer: &[u8],
        args: &Args,
        out: &mut Out,
    ) -> Ran {
        command::run(&mut self.store, self.keeper.as_mut(), machine, session, buffer, args, out)
    }

    /// Does what is due. True if there is more to do at once.
    pub fn work(&mut self) -> bool {
        self.keeper.as_mut().is_some_and(|keeper| keeper.work(&mut self.store))
    }

    /// The next thing to do on the disk.
    pub fn poll(&mut self) -> Option<Job> {
        let now = self.store.now();
        self.keeper.as_mut()?.log.poll(now)
    }

    /// A job of [`Self::poll`] has ended; `bytes` are those of a write.
    pub fn completed(&mut self, id: u64, result: Result<(), IoFailed>, bytes: Option<Vec<u8>>) {
        if let Some(keeper) = &mut self.keeper {
            keeper.completed(&self.store, id, result, bytes);
        }
    }

    /// When there is something to do although nothing completes, in milliseconds since the machine started.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        let at = self.keeper.as_ref()?.next_deadline()?;
        Some(at.saturating_sub(self.started))
    }

    /// What becomes of a reply that waits for a ticket.
    #[must_use]
    pub fn fate(&self, until: u64) -> Fate {
        match &self.keeper {
            Some(keeper) if until > keeper.log.durable() => {
                if keeper.log.is_broken() {
                    Fate::Failed
                } else {
                    Fate::Waits
                }
            }
            _ => Fate::Leaves,
        }
    }

    /// Makes everything durable, before the machine is switched off. True once that is so, or cannot be.
    pub fn settle(&mut self) -> bool {
        let Some(keeper) = &mut self.keeper else { return true };
        keeper.log.want(keeper.log.ticket());
        keeper.log.is_clean() || keeper.log.is_broken()
    }

    /// Changes since the start; 0 if there is no log.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.keeper.as_ref().map_or(0, |keeper| keeper.log.ticket())
    }

    /// Those of them that are on stable storage.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.keeper.as_ref().map_or(0, |keeper| keeper.log.durable())
    }

    /// The first sector behind the log; 0 if there is none.
    #[must_use]
    pub fn log_end(&self) -> u64 {
        self.keeper.as_ref().map_or(0, |keeper| keeper.log.end())
    }
}

/// What becomes of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It may leave.
    Leaves,
    /// What it is about is not durable yet.
    Waits,
    /// What it is about will not be durable: [`IO_ERROR`] takes its place.
    Failed,
}

/// The reply to a change that the disk did not take.
pub const IO_ERROR: &[u8] = b"-EIO the disk with the log failed: changes are refused\r\n";

/// Carries out a record.
fn replay(
    store: &mut Store,
    machine: &mut dyn Machine,
    record: Record<'_>,
    args: &mut Args,
    out: &mut Out,
) -> Result<(), ReplayError> {
    store.set_now(record.time);
    match record.kind {
        Kind::State => return state::read(store, record.body),
        Kind::Command => {}
    }
    if parse(record.body, args) != Ok(Parsed::Request(record.body.len())) {
        return Err(ReplayError::Refused);
    }
    out.clear(1 << 16);
    command::run(store, None, machine, &Session::default(), record.body, args, out);
    let reply = out.bytes();
    if out.failed() || reply.starts_with(b"-OOM") {
        return Err(ReplayError::OutOfMemory);
    }
    // While a compaction went on, the log may have changes of keys whose state it did not have yet: it follows.
    if reply.starts_with(b"-") && !record.vouched {
        return Err(ReplayError::Refused);
    }
    Ok(())
}
