//! What goes into the decision core and what comes out of it.

use std::time::Duration;

use replication_proto::{Epoch, Generation, NodeName, VmId};

use crate::arbiter::{ArbiterError, CasOutcome, NodeRef, Record, Revision, Versioned};
use crate::exit::ExitCode;
use crate::permit::RunPermit;
use crate::reason::ReasonCode;

/// Number of a request to the arbiter; never used twice in one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// Number that the shell gives to an operator's command, to find the reply's way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What to ask the arbiter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[expect(clippy::large_enum_variant, reason = "there is at most one at a time")]
pub enum ArbiterRequest {
    /// Read the record.
    Read,
    /// Compare and swap.
    Cas {
        /// The revision that must still be stored; `None`: nothing may be stored.
        expected: Option<Revision>,
        /// What to store.
        record: Record,
    },
}

/// What the arbiter said.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Answer {
    /// To a read.
    Read(Result<Option<Versioned>, ArbiterError>),
    /// To a compare-and-swap.
    Cas(CasOutcome),
}

/// What to do when the backup is lost (R10).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBackupLoss {
    /// Go on alone, output open, as soon as the arbiter agrees.
    #[default]
    Solo,
    /// Hold all output until a backup is in sync: every output is on two hosts. Holds after a boot and after a takeover, too.
    Hold,
}

/// Whether the recorded owner boots the guest anew when nothing of its memory is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColdStart {
    /// The node that the record names as the owner boots, in a new generation.
    #[default]
    Owner,
    /// Nobody boots by itself after a crash; an ordered stop is followed by an ordinary start.
    Never,
}

/// When a fenced side drops the guest that it keeps, and becomes the backup of the side that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rejoin {
    /// Only when an operator says so. Otherwise the process ends when the guest was kept for long enough.
    Never,
    /// At once after a planned switchover; after a takeover when the guest was kept for `fenced_keep`.
    #[default]
    AfterKeep,
    /// As soon as the record shows that the other side owns the guest.
    AtOnce,
}

/// What this process may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// May create the record and boot the guest.
    Primary,
    /// Never boots; waits to be taken on as the backup.
    Backup,
}

/// All intervals of the core. They change availability only, never safety.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CoreTimers {
    /// The owner goes on alone after this much silence of its backup.
    pub solo: Duration,
    /// The backup takes over after this much silence of the owner; longer than `solo` (R9).
    pub takeover: Duration,
    /// A closed connection counts as silence after this.
    pub eof_grace: Duration,
    /// How long a fenced guest is kept.
    pub fenced_keep: Duration,
    /// An owner that reaches neither peer nor arbiter halts after this.
    pub isolation_halt: Duration,
    /// Least time from a loss of protection to the next base copy; doubles with every loss in short order.
    pub protect_retry: Duration,
    /// The record is read this often while nothing else happens.
    pub arbiter_probe: Duration,
    /// Pause before a failed request to the arbiter is repeated.
    pub arbiter_retry: Duration,
    /// How long a switchover or a forced takeover may take before the core gives up.
    pub command_patience: Duration,
    /// How long an ordered stop waits for the arbiter.
    pub stop_patience: Duration,
    /// How long the paused guest is kept after a planned switchover, if this side cannot or must not rejoin.
    pub handed_over_keep: Duration,
    /// A side that is to rejoin stays as it is for this long: what still reaches it is passed on, and answers leave.
    pub rejoin_linger: Duration,
}

impl Default for CoreTimers {
    fn default() -> Self {
        Self {
            solo: Duration::from_millis(150),
            takeover: Duration::from_millis(300),
            eof_grace: Duration::from_millis(20),
            fenced_keep: Duration::from_secs(600),
            isolation_halt: Duration::from_secs(10),
            protect_retry: Duration::from_secs(1),
            arbiter_probe: Duration::from_secs(1),
            arbiter_retry: Duration::from_millis(50),
            command_patience: Duration::from_secs(5),
            stop_patience: Duration::from_secs(10),
            handed_over_keep: Duration::from_secs(10),
            rejoin_linger: Duration::from_millis(250),
        }
    }
}

/// Everything that the core knows about itself from the start.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CoreConfig {
    /// The VM.
    pub vm: VmId,
    /// This process.
    pub me: NodeRef,
    /// The other host.
    pub peer: NodeName,
    /// What this process may become.
    pub role: Role,
    /// Highest generation that this node has ever seen (from [`crate::generation`]).
    pub highest_generation: Generation,
    /// R10.
    pub on_backup_loss: OnBackupLoss,
    /// Who boots after everything was lost.
    pub cold_start: ColdStart,
    /// Whether a fenced side becomes the backup by itself.
    pub rejoin: Rejoin,
    /// An operator confirmed that the guest is to be booted anew although the record names a backup in sync.
    pub force_cold_boot: bool,
    /// Intervals.
    pub timers: CoreTimers,
}

/// What a peer says of itself in a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PeerReport {
    /// How long ago it last had a usable answer of the arbiter; `None`: never, or not said.
    pub arbiter_age: Option<Duration>,
    /// The owner says that it is PROTECTED.
    pub protected: bool,
    /// The backup asks for the guest: an operator wants it there.
    pub asks: bool,
}

/// Why a side takes its leave on the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GoodbyeReason {
    /// The guest is off, nobody shall resurrect it.
    Stopped,
    /// The guest is paused, everything is committed: take over at once.
    Switchover,
    /// This process ends; the guest is none of its business.
    Leaving,
}

/// Why a data connection is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LinkLoss {
    /// The peer's kernel closed it (end of file, reset).
    PeerClosed,
    /// We closed it: the peer sent nonsense, or was too slow.
    Local,
    /// We closed it because link or backup could not keep up with the guest, and the operator wants it so.
    Overloaded,
}

/// How a guest ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GuestEnd {
    /// It switched the machine off.
    PoweredOff,
    /// It asked for a reset.
    Reset,
    /// It crashed in a way that a restored copy would repeat.
    Crashed,
}

/// What an operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// Planned: the owner hands the guest to its backup; nothing is lost. A backup in sync asks its owner for that.
    Switchover,
    /// R11: take over although the record does not allow it by itself. The shell has checked the confirmation.
    ForceTakeover {
        /// Also when the arbiter does not answer: the operator knows that the other side is off.
        without_arbiter: bool,
    },
    /// End the guest (owner) or this process (backup), in order.
    Stop,
    /// Take backups on (the default).
    Protect,
    /// Go on without a backup, and take none on.
    Unprotect,
    /// The same for so long; then backups are taken on again, whether somebody still remembers it or not.
    PauseProtection {
        /// How long.
        length: Duration,
    },
    /// A fenced side drops the guest that it keeps, and becomes the backup.
    Rejoin,
    /// Compare both sides, page by page and block by block, while the pair is protected.
    Verify,
}

/// What became of a command.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CommandOutcome {
    /// Done.
    Done(String),
    /// Not done, nothing changed.
    Refused(String),
    /// Nobody can say yet whether it was done.
    Unknown(String),
}

/// Events. Those marked *owner* or *standby* come from the respective half of a shell; the other half ignores them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Input {
    /// The process is ready. Exactly once, first.
    Started,
    /// The arbiter answered.
    Arbiter {
        /// The request.
        op: OpId,
        /// The answer.
        answer: Answer,
    },
    /// A verified frame of the peer arrived, on whichever connection.
    PeerHeard {
        /// Who sent it.
        peer: NodeRef,
        /// What it said of itself, if the frame was a heartbeat.
        report: Option<PeerReport>,
    },
    /// The peer took its leave.
    PeerGoodbye {
        /// Who.
        peer: NodeRef,
        /// Why.
        reason: GoodbyeReason,
    },
    /// The data connection is gone. A stream that makes no progress while heartbeats go on is the shell's to notice and to close: the core sees
    /// neither bytes nor acks.
    LinkLost(LinkLoss),
    /// Any verified frame, or a refusal, named a higher generation than ours.
    HigherGenerationSeen(Generation),
    /// Owner: a backup is connected and accepted; it waits for its base. The core answers with [`Action::StartBase`] when it is time.
    BackupJoined {
        /// Who.
        backup: NodeRef,
    },
    /// Both: the base is committed at the backup. Owner: it answers with [`Action::HoldOutput`]. Standby: it could run from now on.
    BaseCommitted {
        /// The other side of the connection.
        peer: NodeRef,
        /// The epoch that the base ended.
        epoch: Epoch,
    },
    /// Owner: an epoch is committed that ended *after* [`Action::HoldOutput`] was carried out, so all that was ever let out is covered.
    ReleasedCovered {
        /// Who committed it.
        backup: NodeRef,
        /// Which epoch.
        epoch: Epoch,
    },
    /// Standby: the owner begins a base. The standby is hollow until it is committed.
    BaseBegun {
        /// Who sends it.
        owner: NodeRef,
    },
    /// Standby: what was committed is lost (a disk failed): it is hollow until another base is committed.
    CopyLost,
    /// Standby: a further epoch is committed.
    Committed {
        /// Which.
        epoch: Epoch,
    },
    /// An operator's command.
    Command {
        /// Where the reply belongs.
        ticket: Ticket,
        /// What is asked.
        command: Command,
    },
    /// Owner: the guest ended by itself.
    GuestEnded(GuestEnd),
    /// Owner: after [`Action::BeginSwitchover`] the guest is paused, the last epoch committed, and every output of it released.
    SwitchoverReady {
        /// The last epoch.
        epoch: Epoch,
    },
    /// Time passed.
    Tick,
}

/// Why a guest was fenced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FenceReason {
    /// Another generation runs, or may run.
    Superseded,
    /// Neither peer nor arbiter could be reached.
    Isolated,
    /// A planned switchover moved the guest to the peer.
    HandedOver,
}

/// What the shell must do, in this order, before it hands over the next input.
#[derive(Debug)]
pub enum Action {
    /// Hand this to the arbiter.
    Arbiter {
        /// Comes back with the answer.
        op: OpId,
        /// What to ask.
        request: ArbiterRequest,
    },
    /// Write this generation to the state directory, durably, before any later action. When that fails: end the process.
    PersistGeneration(Generation),
    /// Boot the guest.
    BootGuest(RunPermit),
    /// Drop the incomplete epoch and the link, never ack again, restore, announce, run.
    Activate(RunPermit),
    /// Resume the fenced guest that this process still keeps (an operator forced it).
    ResumeFenced(RunPermit),
    /// Do not boot: listen, and accept the owner's base.
    OfferAsBackup,
    /// The record names this node as the owner and its peer as in sync: dial the peer, so that [`Input::PeerHeard`] tells which process runs there.
    AskPeer,
    /// Send this backup the base, then epochs.
    StartBase {
        /// To whom.
        backup: NodeRef,
    },
    /// Close the connection to the backup; un-acked dirty sets are united again. Output stays as it is.
    DropBackup,
    /// From now on let nothing out, acked or not, and keep what is held.
    HoldOutput,
    /// Let everything out, also what is held. Only after the arbiter agreed that there is no backup.
    OpenOutput,
    /// PROTECTED: let out what this backup has acked, and nothing else.
    TrustAcks {
        /// Acks of others mean nothing.
        backup: NodeRef,
    },
    /// Pause the guest and keep it so: an ordered stop. What it said up to here may still be let out later.
    PauseGuest,
    /// A switchover was given up: resume the guest. The right to run was not lost.
    ResumeGuest,
    /// Pause the guest, keep its memory, drop the backup, let nothing out any more.
    Fence {
        /// Why.
        reason: FenceReason,
    },
    /// Pause the guest at the end of an epoch, wait for its commit, release its outputs, then say [`Input::SwitchoverReady`].
    BeginSwitchover,
    /// Say goodbye on the link, if there is one.
    SayGoodbye(GoodbyeReason),
    /// Answer an operator.
    Reply {
        /// Whom.
        ticket: Ticket,
        /// What.
        outcome: CommandOutcome,
    },
    /// One line for the log: the state changed.
    Announce {
        /// From.
        from: StateName,
        /// To.
        to: StateName,
        /// Why.
        reason: ReasonCode,
        /// Generation that this side runs under, or the highest seen.
        generation: Generation,
    },
    /// Something that a person must look at; once per occurrence.
    Alarm {
        /// What.
        reason: ReasonCode,
        /// Details.
        text: String,
    },
    /// Compare both sides; the shell replies when it is done, or when protection ends.
    Verify(Ticket),
    /// Drop the guest and begin anew as a backup, in the same place of the service manager's tree, with a new incarnation.
    Rejoin,
    /// End the process with this code, after all that was asked before.
    Exit(ExitCode),
}

/// The states as people read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateName {
    /// The record has not been read yet.
    Starting,
    /// About to boot: the record is being written.
    Claiming,
    /// Runs alone.
    Solo,
    /// Runs; a backup is being brought in sync.
    Resync,
    /// Runs; every output is covered by the backup.
    Protected,
    /// Runs; output is held; the backup is silent and the arbiter is being asked.
    Contending,
    /// The guest is being handed to the backup.
    SwitchingOver,
    /// An ordered stop is under way.
    Stopping,
    /// Waits as a backup that could not take over by itself.
    Standby,
    /// Waits as a backup that is in sync.
    InSync,
    /// The owner is silent; the arbiter is being asked.
    TakingOver,
    /// Lost the right to run; the guest is paused and kept.
    Fenced,
    /// About to exit.
    Ended,
}

impl StateName {
    /// Every state, for metrics.
    pub const ALL: [Self; 13] = [
        Self::Starting,
        Self::Claiming,
        Self::Solo,
        Self::Resync,
        Self::Protected,
        Self::Contending,
        Self::SwitchingOver,
        Self::Stopping,
        Self::Standby,
        Self::InSync,
        Self::TakingOver,
        Self::Fenced,
        Self::Ended,
    ];

    /// The word as in JSON, metrics and `ftctl --wait`.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Claiming => "claiming",
            Self::Solo => "solo",
            Self::Resync => "resync",
            Self::Protected => "protected",
            Self::Contending => "contending",
            Self::SwitchingOver => "switching_over",
            Self::Stopping => "stopping",
            Self::Standby => "standby",
            Self::InSync => "in_sync",
            Self::TakingOver => "taking_over",
            Self::Fenced => "fenced",
            Self::Ended => "ended",
        }
    }

    /// Whether this side's guest runs (or is about to run again without a new permit).
    pub const fn runs(self) -> bool {
        matches!(self, Self::Solo | Self::Resync | Self::Protected | Self::Contending | Self::SwitchingOver)
    }
}

/// What the output gate is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Gate {
    /// Nothing leaves.
    Held,
    /// Everything leaves.
    Open,
    /// What this backup acks leaves.
    OnAck(NodeRef),
}
