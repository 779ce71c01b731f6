//! Who may run: the one decision core of both sides. No I/O, no clock, no randomness; `now` is the time since the process started.
//!
//! A shell hands over [`Input`]s one at a time and carries out the returned [`Action`]s in their order before the next one; between inputs it waits
//! until [`Core::next_deadline`] at most and then hands over [`Input::Tick`]. All states are plain values (`Clone`, `Eq`, `Hash`), so that
//! an explorer can enumerate them.
//!
//! Inputs are *folded* into the state first; then [`Core::advance`] pursues the goal of the state that results (go solo, take over, …) by the
//! next request to the arbiter. At most one request is outstanding. A request whose answer is lost leaves its mark in `uncertain_at`: nothing is
//! concluded from a read at that revision (R3), another compare-and-swap is made instead.

use std::time::Duration;

use replication_proto::mutant::{Mutant, is};
use replication_proto::{Epoch, Generation, Incarnation};

use crate::arbiter::{ArbiterError, CasOutcome, NodeRef, RECORD_VERSION, Reason, Record, Revision, Versioned};
use crate::detector::{Detector, Evidence};
use crate::exit::ExitCode;
use crate::permit::RunPermit;
use crate::reason::ReasonCode;

pub(crate) mod explore;
mod fenced;
mod moves;
mod owner;
mod standby;
mod start;
mod stop;
mod types;
mod view;

pub use types::{
    Action, Answer, ArbiterRequest, ColdStart, Command, CommandOutcome, CoreConfig, CoreTimers, FenceReason, Gate,
    GoodbyeReason, GuestEnd, Input, LinkLoss, OnBackupLoss, OpId, PeerReport, Rejoin, Role, StateName, Ticket,
};
pub use view::{Slept, View};

/// A protection that held for this long forgets earlier losses.
const STABLE: Duration = Duration::from_secs(60);
/// After more than one loss in short order a backup counts only when its connection has stood for this long.
const STEADY: Duration = Duration::from_secs(5);
/// Repeated losses double the pause before the next base copy up to `2^MAX_STRIKES` times.
const MAX_STRIKES: u32 = 6;

/// Where a side is, with what belongs to that place only.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum State {
    Starting,
    Claiming { reason: Reason },
    Solo,
    Resync { backup: NodeRef },
    Covering { backup: NodeRef },
    Pairing { backup: NodeRef },
    Protected { backup: NodeRef },
    Contending { backup: Option<NodeRef> },
    Draining { backup: NodeRef, ticket: Ticket, until: Duration },
    HandingOver { backup: NodeRef, ticket: Ticket, until: Duration },
    Stopping { exit: ExitCode, note: &'static str, until: Duration },
    Standby,
    TakingOver,
    Forcing { ticket: Ticket, without_arbiter: bool, fenced: Option<FenceReason>, until: Duration },
    Fenced { reason: FenceReason, until: Duration, rejoin_at: Option<Duration> },
    Ended,
}

/// What was asked of the arbiter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[expect(clippy::large_enum_variant, reason = "there is at most one at a time")]
enum Request {
    Read,
    Cas { expected: Option<Revision>, record: Record },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Outstanding {
    id: OpId,
    request: Request,
    issued: Duration,
}

/// Whether backups are taken on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Protection {
    On,
    Off,
    /// Not before.
    PausedUntil(Duration),
}

/// A backup asks its owner for the guest, because an operator wants it here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Asks {
    ticket: Ticket,
    until: Duration,
}

/// What a standby knows of its own worth.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct StandbyFacts {
    /// The last committed epoch; `None`: hollow.
    committed: Option<Epoch>,
    /// Whose base it is.
    owner: Option<NodeRef>,
    /// The owner said that the guest is off.
    stopped: bool,
    /// The owner asked for the switchover.
    handed_over: bool,
    /// A contest was given up at this revision; a new one needs a new record or a new sign of life.
    declined: Option<Revision>,
}

/// The decision core of one process. See the module's documentation for the contract.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Core {
    config: CoreConfig,
    state: State,
    since: Duration,
    reason: ReasonCode,
    announced: StateName,
    gate: Gate,
    paused: bool,
    /// Highest generation ever seen by this node.
    highest: Generation,
    /// The generation that this process holds the right for.
    mine: Option<Generation>,
    /// The last generation that a permit was made for; 0: none.
    permitted: Generation,
    /// A takeover by force that the arbiter does not know of.
    blind: bool,

    known: Option<Versioned>,
    /// The last record that was refused (rolled back), which only a forced takeover may overwrite.
    refused: Option<Versioned>,
    /// `known` must be read again before anything is built on it.
    stale: bool,
    /// An own compare-and-swap that expects this revision may still be applied (`Some(None)`: that expects no record).
    uncertain_at: Option<Option<Revision>>,
    op: Option<Outstanding>,
    next_op: u64,
    retry_at: Option<Duration>,
    probe_at: Duration,
    /// When the latest request was made that had a usable answer.
    last_usable: Option<Duration>,
    alarm: Option<ReasonCode>,

    detector: Detector,
    report: Option<(Duration, PeerReport)>,
    standby: StandbyFacts,
    /// A backup that is connected and waits for its base.
    waiting: Option<NodeRef>,
    protection: Protection,
    /// The owner's backup asks for the guest, as far as it said last.
    asked_for: bool,
    asks: Option<Asks>,
    protect_after: Duration,
    protected_since: Option<Duration>,
    strikes: u32,
    asked: Option<Ticket>,
}

impl Core {
    /// A core that has not started yet; the first input is [`Input::Started`].
    ///
    /// # Panics
    /// When the configuration contradicts itself: peer and own node are the same, or the takeover timer is not longer than the solo timer (R9).
    pub fn new(config: CoreConfig) -> Self {
        assert!(config.peer != config.me.node, "a pair has two nodes");
        assert!(config.timers.takeover > config.timers.solo, "R9: the takeover timer is longer than the solo timer");
        let highest = config.highest_generation;
        Self {
            config,
            state: State::Starting,
            since: Duration::ZERO,
            reason: ReasonCode::Starting,
            announced: StateName::Starting,
            gate: Gate::Held,
            paused: false,
            highest,
            mine: None,
            permitted: Generation(0),
            blind: false,
            known: None,
            refused: None,
            stale: true,
            uncertain_at: None,
            op: None,
            next_op: 1,
            retry_at: None,
            probe_at: Duration::ZERO,
            last_usable: None,
            alarm: None,
            detector: Detector::default(),
            report: None,
            standby: StandbyFacts::default(),
            waiting: None,
            protection: Protection::On,
            asked_for: false,
            asks: None,
            protect_after: Duration::ZERO,
            protected_since: None,
            strikes: 0,
            asked: None,
        }
    }

    /// Takes one input and says what to do. `now` must not run backwards.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Action> {
        let mut out = Vec::new();
        if self.state == State::Ended {
            return out;
        }
        self.fold(input, now, &mut out);
        self.advance(now, &mut out);
        ask_first(&mut out);
        self.announce(&mut out);
        out
    }

    fn fold(&mut self, input: Input, now: Duration, out: &mut Vec<Action>) {
        match input {
            Input::Started => self.started(now, out),
            Input::Arbiter { op, answer } => self.answered(op, answer, now, out),
            Input::PeerHeard { peer, report } => self.peer_heard(&peer, report, now, out),
            Input::PeerGoodbye { peer, reason } => self.peer_goodbye(&peer, reason),
            Input::LinkLost(loss) => self.link_lost(loss, now, out),
            Input::HigherGenerationSeen(generation) => self.higher_generation(generation, now, out),
            Input::BackupJoined { backup } => self.backup_joined(backup, now, out),
            Input::BaseCommitted { peer, epoch } => self.base_committed(&peer, epoch, now, out),
            Input::ReleasedCovered { backup, epoch: _ } => self.released_covered(&backup, now),
            Input::BaseBegun { owner } => self.base_begun(owner, now),
            Input::CopyLost => self.copy_lost(),
            Input::Committed { epoch } => self.committed(epoch),
            Input::Command { ticket, command } => self.command(ticket, command, now, out),
            Input::GuestEnded(end) => self.guest_ended(end, now, out),
            Input::SwitchoverReady { epoch: _ } => self.switchover_ready(now, out),
            Input::Tick => {}
        }
    }

    /// Pursues the goal of the present state until there is nothing left to do at `now`.
    fn advance(&mut self, now: Duration, out: &mut Vec<Action>) {
        if matches!(self.protection, Protection::PausedUntil(until) if now >= until) && !is(Mutant::PauseForEver) {
            self.protection = Protection::On;
            self.reason = if self.state == State::Solo { ReasonCode::WaitingForBackup } else { self.reason };
        }
        self.stop_asking(now, out);
        // Each round changes the state, makes a request, or ends the loop; no chain of states is longer than this.
        for _ in 0..16 {
            let before = (self.state.clone(), self.op.is_some());
            match self.state.clone() {
                State::Starting => self.advance_starting(now, out),
                State::Claiming { reason } => self.advance_claiming(reason, now, out),
                State::Solo => self.advance_solo(now, out),
                State::Resync { backup } | State::Covering { backup } => self.advance_resync(&backup, now, out),
                State::Pairing { backup } => self.advance_pairing(&backup, now, out),
                State::Protected { backup } => self.advance_protected(&backup, now, out),
                State::Contending { backup } => self.advance_contending(backup.as_ref(), now, out),
                State::Draining { backup, ticket, until } => self.advance_draining(&backup, ticket, until, now, out),
                State::HandingOver { backup, ticket, until } => {
                    self.advance_handing_over(&backup, ticket, until, now, out);
                }
                State::Stopping { exit, note, until } => self.advance_stopping(exit, note, until, now, out),
                State::Standby => self.advance_standby(now),
                State::TakingOver => self.advance_taking_over(now, out),
                State::Forcing { ticket, without_arbiter, fenced, until } => {
                    self.advance_forcing(ticket, without_arbiter, fenced, until, now, out);
                }
                State::Fenced { reason, until, rejoin_at } => self.advance_fenced(reason, until, rejoin_at, now, out),
                State::Ended => {}
            }
            if before == (self.state.clone(), self.op.is_some()) {
                break;
            }
        }
        self.probe(now, out);
    }

    /// Reads the record now and then, to know in time that the arbiter is away or that somebody else runs.
    fn probe(&mut self, now: Duration, out: &mut Vec<Action>) {
        let steady = !matches!(self.state, State::Ended | State::Starting | State::Claiming { .. });
        if steady && self.op.is_none() && now >= self.probe_at {
            self.read(now, out);
        }
    }

    // ---- the arbiter -------------------------------------------------------------------------------------------------------------

    fn due(&self, now: Duration) -> bool {
        self.op.is_none() && self.retry_at.is_none_or(|at| now >= at)
    }

    fn issue(&mut self, request: Request, now: Duration, out: &mut Vec<Action>) {
        assert!(self.op.is_none(), "one request at a time");
        let id = OpId(self.next_op);
        self.next_op += 1;
        self.retry_at = None;
        self.probe_at = now.saturating_add(self.config.timers.arbiter_probe);
        let wire = match &request {
            Request::Read => ArbiterRequest::Read,
            Request::Cas { expected, record } => ArbiterRequest::Cas { expected: *expected, record: record.clone() },
        };
        self.op = Some(Outstanding { id, request, issued: now });
        out.push(Action::Arbiter { op: id, request: wire });
    }

    fn read(&mut self, now: Duration, out: &mut Vec<Action>) {
        self.issue(Request::Read, now, out);
    }

    /// A compare-and-swap on the record that we know.
    fn swap(&mut self, record: Record, now: Duration, out: &mut Vec<Action>) {
        let expected = self.known.as_ref().map(|known| known.revision);
        self.issue(Request::Cas { expected, record }, now, out);
    }

    /// A record written by us.
    fn record(
        &self,
        generation: Generation,
        owner: &NodeRef,
        in_sync: Option<&NodeRef>,
        reason: Reason,
        note: &str,
    ) -> Record {
        Record {
            v: RECORD_VERSION,
            cluster_id: self.config.vm,
            generation,
            owner: owner.clone(),
            in_sync: in_sync.cloned(),
            reason,
            written_by: self.config.me.clone(),
            note: note.to_owned(),
        }
    }

    /// Whether no own compare-and-swap can still change the record that we know.
    fn settled(&self) -> bool {
        self.uncertain_at != Some(self.known.as_ref().map(|known| known.revision))
    }

    fn answered(&mut self, op: OpId, answer: Answer, now: Duration, out: &mut Vec<Action>) {
        // An answer to anything but the outstanding request is a late duplicate and says nothing new.
        let Some(outstanding) = self.op.take_if(|outstanding| outstanding.id == op) else { return };
        let asked = outstanding.issued;
        match (outstanding.request, answer) {
            (Request::Read, Answer::Read(Ok(read))) => self.accept(read, asked, now, out),
            (Request::Read, Answer::Read(Err(error))) => self.read_failed(&error, now, out),
            (Request::Cas { record, .. }, Answer::Cas(CasOutcome::Applied(revision))) => {
                self.uncertain_at = None;
                self.accept(Some(Versioned { revision, record }), asked, now, out);
            }
            (Request::Cas { expected, record }, Answer::Cas(CasOutcome::Unknown(_)))
                if is(Mutant::UnknownIsApplied) =>
            {
                let revision = Revision(expected.map_or(1, |revision| revision.0 + 1));
                self.accept(Some(Versioned { revision, record }), asked, now, out);
            }
            (Request::Cas { .. }, Answer::Cas(CasOutcome::Conflict)) => self.stale = true,
            (Request::Cas { record, .. }, Answer::Cas(CasOutcome::Unknown(_)))
                if is(Mutant::UncertainSyncIsFailure) && record.in_sync.is_some() =>
            {
                self.gone_solo(true, now, out);
            }
            (Request::Cas { expected, .. }, Answer::Cas(CasOutcome::Unknown(_))) => {
                self.uncertain_at = Some(expected);
                self.stale = true;
                self.retry_at = Some(now.saturating_add(self.config.timers.arbiter_retry));
            }
            (Request::Cas { .. }, Answer::Cas(CasOutcome::Failed(_))) => {
                self.retry_at = Some(now.saturating_add(self.config.timers.arbiter_retry));
            }
            (Request::Read, Answer::Cas(_)) | (Request::Cas { .. }, Answer::Read(_)) => {
                panic!("the arbiter's adapter mixed up reads and writes")
            }
        }
    }

    fn read_failed(&mut self, error: &ArbiterError, now: Duration, out: &mut Vec<Action>) {
        self.retry_at = Some(now.saturating_add(self.config.timers.arbiter_retry));
        match error {
            ArbiterError::Unreachable(_) if self.state == State::Starting => {
                self.reason = ReasonCode::ArbiterUnreachable
            }
            ArbiterError::Unreachable(_) => {}
            ArbiterError::Unusable(text) => self.raise(ReasonCode::ArbiterUnusable, text.clone(), out),
        }
    }

    /// Takes a record as the truth, or refuses it (R7). An answer may have waited in this process's own queue while it was stopped, so all that it proves
    /// is that the arbiter could be reached after it was `asked`.
    fn accept(&mut self, read: Option<Versioned>, asked: Duration, now: Duration, out: &mut Vec<Action>) {
        let Some(read) = read else {
            if self.highest == Generation(0) {
                self.last_usable = Some(asked);
                self.stale = false;
                self.alarm = None;
            } else {
                self.refused = None;
                let text = format!("no record, but generation {} was seen", self.highest);
                self.refuse(ReasonCode::ArbiterRolledBack, text, now, out);
            }
            return;
        };
        if let Some(text) = self.foreign(&read.record) {
            return self.refuse(ReasonCode::ArbiterForeign, text, now, out);
        }
        if let Some(text) = self.rolled_back(&read) {
            self.refused = Some(read);
            return self.refuse(ReasonCode::ArbiterRolledBack, text, now, out);
        }
        if self.known.as_ref().is_some_and(|known| read.revision > known.revision) || self.known.is_none() {
            // What expected an older revision can never be applied any more.
            self.uncertain_at = None;
        }
        if read.record.generation > self.highest {
            self.highest = read.record.generation;
            out.push(Action::PersistGeneration(self.highest));
        }
        self.known = Some(read);
        self.refused = None;
        self.stale = false;
        // A grant without anything to run from stays true for as long as the record says so.
        self.alarm.take_if(|alarm| *alarm != ReasonCode::Hollow);
        self.blind = false;
        self.last_usable = Some(asked);
        self.learn(now, out);
    }

    fn foreign(&self, record: &Record) -> Option<String> {
        if record.cluster_id != self.config.vm {
            return Some(format!("the record is about VM {}, this is VM {}", record.cluster_id, self.config.vm));
        }
        let ours = |node: &NodeRef| node.node == self.config.me.node || node.node == self.config.peer;
        let stranger = [Some(&record.owner), record.in_sync.as_ref()].into_iter().flatten().find(|node| !ours(node))?;
        Some(format!(
            "the record names node {}, this pair is {} and {}",
            stranger.node, self.config.me.node, self.config.peer
        ))
    }

    fn rolled_back(&self, read: &Versioned) -> Option<String> {
        if is(Mutant::RollbackBelieved) {
            return None;
        }
        if read.record.generation < self.highest {
            return Some(format!("record of generation {}, but {} was seen", read.record.generation, self.highest));
        }
        let known = self.known.as_ref()?;
        if read.revision < known.revision {
            return Some(format!("revision {}, but {} was seen", read.revision, known.revision));
        }
        (read.revision == known.revision && read.record != known.record)
            .then(|| format!("revision {} has another content than before", read.revision))
    }

    fn refuse(&mut self, reason: ReasonCode, text: String, now: Duration, out: &mut Vec<Action>) {
        self.stale = true;
        self.retry_at = Some(now.saturating_add(self.config.timers.arbiter_retry));
        self.raise(reason, text, out);
    }

    /// Raises an alarm once; a process that has nothing to lose yet ends.
    fn raise(&mut self, reason: ReasonCode, text: String, out: &mut Vec<Action>) {
        if self.alarm != Some(reason) {
            self.alarm = Some(reason);
            out.push(Action::Alarm { reason, text });
        }
        let nothing_to_lose = match self.state {
            State::Starting | State::Claiming { .. } => true,
            State::Standby => self.standby.committed.is_none() && reason == ReasonCode::ArbiterForeign,
            _ => false,
        };
        if nothing_to_lose {
            self.reason = reason;
            let code = match reason {
                ReasonCode::ArbiterForeign => ExitCode::ArbiterForeign,
                ReasonCode::ArbiterRolledBack => ExitCode::ArbiterRolledBack,
                _ => ExitCode::ArbiterUnusable,
            };
            self.exit(code, out);
        }
    }

    /// What every accepted record means, whatever the state.
    fn learn(&mut self, now: Duration, out: &mut Vec<Action>) {
        let Some(known) = &self.known else { return };
        let (generation, owned) = (known.record.generation, known.record.owner == self.config.me);
        match self.mine {
            // Granted, by whichever of our requests: the record names this very process.
            _ if owned && generation > self.permitted => self.granted(generation, now, out),
            Some(mine) if !owned || generation > mine => self.superseded(now, out),
            _ => self.isolation_ends(now),
        }
    }

    // ---- the right to run --------------------------------------------------------------------------------------------------------

    /// The only place where a permit is made.
    fn granted(&mut self, generation: Generation, now: Duration, out: &mut Vec<Action>) {
        assert!(generation > self.permitted, "one permit per generation");
        let (reason, fenced, ticket) = match self.state {
            State::Claiming { reason: Reason::Created } => (ReasonCode::FirstBoot, false, None),
            State::Claiming { .. } => (ReasonCode::ColdBoot, false, None),
            State::Forcing { ticket, fenced, .. } => (ReasonCode::Forced, fenced.is_some(), Some(ticket)),
            State::Fenced { .. } => (ReasonCode::Forced, true, None),
            _ if self.standby.handed_over => (ReasonCode::SwitchedOver, false, None),
            _ => (ReasonCode::TookOver, false, None),
        };
        let booting = matches!(self.state, State::Claiming { .. });
        if !booting && !fenced && self.standby.committed.is_none() {
            // A request that was given up as lost was applied after a new base had begun: there is nothing to run from.
            self.raise(ReasonCode::Hollow, format!("generation {generation} was granted to a hollow standby"), out);
            return;
        }
        self.highest = self.highest.max(generation);
        self.mine = Some(generation);
        self.permitted = generation;
        out.push(Action::PersistGeneration(generation));
        let permit = RunPermit::new(generation);
        out.push(match (booting, fenced) {
            (true, _) => Action::BootGuest(permit),
            (false, false) => Action::Activate(permit),
            (false, true) => Action::ResumeFenced(permit),
        });
        self.paused = false;
        self.standby = StandbyFacts::default();
        self.detector.forget();
        self.report = None;
        self.protect_after = now;
        self.strikes = 0;
        self.protected_since = None;
        self.asked_for = false;
        self.go(State::Solo, reason, now);
        self.open(out);
        let ticket = ticket.or(self.asks.take().map(|asks| asks.ticket));
        if let Some(ticket) = ticket {
            let text = format!("this side runs in generation {generation}");
            out.push(Action::Reply { ticket, outcome: CommandOutcome::Done(text) });
        }
    }

    fn higher_generation(&mut self, generation: Generation, now: Duration, out: &mut Vec<Action>) {
        if generation <= self.highest || (is(Mutant::HigherGenerationIgnored) && self.mine.is_some()) {
            return;
        }
        self.highest = generation;
        out.push(Action::PersistGeneration(generation));
        // What we know of the record is older than this generation.
        self.stale = true;
        if self.mine.is_some() {
            self.superseded(now, out);
        }
    }

    // ---- small things ------------------------------------------------------------------------------------------------------------

    fn go(&mut self, state: State, reason: ReasonCode, now: Duration) {
        self.state = state;
        self.reason = reason;
        self.since = now;
    }

    /// Opens the gate as far as the policy lets it (R10).
    fn open(&mut self, out: &mut Vec<Action>) {
        match self.config.on_backup_loss {
            OnBackupLoss::Solo => {
                self.gate = Gate::Open;
                out.push(Action::OpenOutput);
            }
            OnBackupLoss::Hold => self.hold(out),
        }
    }

    fn hold(&mut self, out: &mut Vec<Action>) {
        self.gate = Gate::Held;
        out.push(Action::HoldOutput);
    }

    fn exit(&mut self, code: ExitCode, out: &mut Vec<Action>) {
        self.state = State::Ended;
        self.gate = Gate::Held;
        out.push(Action::Exit(code));
    }

    fn announce(&mut self, out: &mut Vec<Action>) {
        let to = self.state_name();
        if to != self.announced {
            // Before an exit, so that the line is written.
            let ends = |action: &Action| matches!(action, Action::Exit(_) | Action::Rejoin);
            let at = out.iter().position(ends).unwrap_or(out.len());
            let generation = self.mine.unwrap_or(self.highest);
            let line = Action::Announce { from: self.announced, to, reason: self.reason, generation };
            out.insert(at, line);
            self.announced = to;
        }
    }

    fn peer_heard(&mut self, peer: &NodeRef, report: Option<PeerReport>, now: Duration, out: &mut Vec<Action>) {
        if peer.node != self.config.peer {
            return;
        }
        if self.detector.heard(peer.incarnation, now) {
            // A heartbeat beside a stream that stays lost is no reason to ask the arbiter again at each of them.
            if self.evidence(now).is_none() {
                self.standby.declined = None;
            }
            if let Some(report) = report {
                self.report = Some((now, report));
                self.peer_asks(report.asks, now, out);
                let in_sync =
                    self.known.as_ref().is_some_and(|known| known.record.in_sync.as_ref() == Some(&self.config.me));
                if self.mine.is_none() && report.protected && !in_sync {
                    // The record names us by now; to know its revision saves a read when it matters.
                    self.probe_at = self.probe_at.min(self.retry_at.unwrap_or(now));
                }
            }
        }
        if self.state == State::Standby && self.detector.watched().is_none() {
            self.standby.owner = Some(peer.clone());
        }
    }

    /// Watches this process of the peer from now on. What another one said of itself is not its word.
    fn watch(&mut self, incarnation: Incarnation, now: Duration) {
        if self.detector.watched() != Some(incarnation) {
            self.report = None;
        }
        self.detector.watch(incarnation, now);
    }

    fn evidence(&self, now: Duration) -> Option<Evidence> {
        self.detector.evidence(now, self.silence(), self.config.timers.eof_grace)
    }

    /// How long the peer may be silent.
    fn silence(&self) -> Duration {
        let timers = &self.config.timers;
        if self.mine.is_some() { timers.solo } else { timers.takeover }
    }
}

/// Output is held by then; the backup sees its connection close and contends, so the arbiter is asked before that.
fn ask_first(out: &mut Vec<Action>) {
    let drop = out.iter().position(|action| matches!(action, Action::DropBackup));
    let ask = out.iter().position(|action| matches!(action, Action::Arbiter { .. }));
    if let (Some(drop), Some(ask)) = (drop, ask)
        && drop < ask
    {
        let request = out.remove(ask);
        out.insert(drop, request);
    }
}

#[cfg(test)]
mod tests;
