//! The vocabulary: what the two sides say to each other. `wire` turns it into bytes and back; docs/protocol.md draws the bytes.

use core::fmt;

use crate::facts::Facts;
use crate::ids::{Epoch, Generation, NodeName};
use crate::limits::{MAX_DIFFERENCE_VALUE_BYTES, MAX_TEXT_BYTES};
use crate::ram::RamLayout;

/// What a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Checkpoints and acks.
    Data,
    /// Heartbeats, which never wait behind data.
    Heartbeat,
}

/// What a checkpoint holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CheckpointKind {
    /// All of memory, each page at least once; of a page that comes several times the last one counts.
    Base,
    /// The pages that changed since the checkpoint before, each once.
    Delta,
}

impl CheckpointKind {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Base => 0,
            Self::Delta => 1,
        }
    }
}

/// Protocol versions that a side speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VersionRange {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl VersionRange {
    /// What this build speaks.
    pub const OURS: Self = Self { min: 1, max: 1 };
}

/// Optional abilities as bits: used if both sides offer them; a side may require some.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Features {
    /// What the side can do.
    pub offered: u64,
    /// What the side cannot do without; a part of what it offers.
    pub required: u64,
}

impl Features {
    /// Pages and sections may be compressed with zstd.
    pub const ZSTD: u64 = 1 << 0;
    /// Pages of a delta may come as patches of what went over the connection before.
    pub const PATCHES: u64 = 1 << 1;
    /// What this build offers and requires.
    pub const OURS: Self = Self { offered: Self::ZSTD | Self::PATCHES, required: 0 };
}

/// The first message on every connection, from each side that starts to speak. The speaker's VM, generation and incarnation are in the
/// frame's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// What the connection is for.
    pub channel: Channel,
    /// Versions that the speaker speaks.
    pub versions: VersionRange,
    /// Abilities of the speaker.
    pub features: Features,
    /// The speaker's host.
    pub node: NodeName,
    /// The guest's memory; only on [`Channel::Data`], where it is always there.
    pub ram: Option<RamLayout>,
    /// What must be equal on both hosts; empty on [`Channel::Heartbeat`].
    pub facts: Facts,
}

/// The backup's answer to a hello that it accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// Version spoken from now on.
    pub version: u16,
    /// Abilities in use.
    pub features: u64,
    /// The backup's host.
    pub node: NodeName,
    /// What it holds of an earlier life.
    pub standing: crate::disk::Standing,
}

/// Why a side refuses. Numbers on the wire never change their meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefuseCode {
    /// The two sides protect different VMs.
    OtherVm,
    /// A side talks to itself, or both sides claim the same host.
    SelfConnection,
    /// No common protocol version.
    Version,
    /// A required ability is missing.
    Features,
    /// Different memory layouts.
    Ram,
    /// Different facts.
    Facts,
    /// The other side's generation is over.
    StaleGeneration,
    /// Another connection holds the place.
    Busy,
    /// A checkpoint is larger than the backup's limit.
    Overload,
    /// The backup cannot take a guest on now.
    NotReady,
    /// Bytes that are no message.
    Malformed,
    /// Messages that break the protocol.
    Misbehaved,
    /// A fault of the refusing side.
    Internal,
    /// A disk of the backup failed or is not the one of this VM.
    Disk,
    /// A code that this build does not know.
    Unknown(u16),
}

impl RefuseCode {
    const KNOWN: [(u16, Self); 14] = [
        (1, Self::OtherVm),
        (2, Self::SelfConnection),
        (3, Self::Version),
        (4, Self::Features),
        (5, Self::Ram),
        (6, Self::Facts),
        (7, Self::StaleGeneration),
        (8, Self::Busy),
        (9, Self::Overload),
        (10, Self::NotReady),
        (11, Self::Malformed),
        (12, Self::Misbehaved),
        (13, Self::Internal),
        (14, Self::Disk),
    ];

    pub(crate) fn number(self) -> u16 {
        if let Self::Unknown(number) = self {
            return number;
        }
        Self::KNOWN
            .iter()
            .find(|(_, code)| *code == self)
            .map(|(number, _)| *number)
            .expect("each named code has a number")
    }

    pub(crate) fn from_number(number: u16) -> Self {
        Self::KNOWN.iter().find(|(known, _)| *known == number).map_or(Self::Unknown(number), |(_, code)| *code)
    }

    /// Stable word for metrics and logs.
    pub fn word(self) -> &'static str {
        match self {
            Self::OtherVm => "other_vm",
            Self::SelfConnection => "self_connection",
            Self::Version => "version",
            Self::Features => "features",
            Self::Ram => "ram",
            Self::Facts => "facts",
            Self::StaleGeneration => "stale_generation",
            Self::Busy => "busy",
            Self::Overload => "overload",
            Self::NotReady => "not_ready",
            Self::Malformed => "malformed",
            Self::Misbehaved => "misbehaved",
            Self::Internal => "internal",
            Self::Disk => "disk",
            Self::Unknown(_) => "unknown",
        }
    }
}

impl fmt::Display for RefuseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(number) => write!(f, "unknown ({number})"),
            known => f.write_str(known.word()),
        }
    }
}

/// One thing that is not equal on the two sides, seen from the side that holds this value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What it is.
    pub name: String,
    /// Its value on this side.
    pub ours: String,
    /// Its value on the other side.
    pub theirs: String,
}

impl Difference {
    /// A difference with its texts made harmless and cut to their limits.
    pub fn new(name: &str, ours: &str, theirs: &str) -> Self {
        let value = |text| harmless(text, MAX_DIFFERENCE_VALUE_BYTES);
        Self { name: harmless(name, crate::limits::MAX_FACT_NAME_BYTES), ours: value(ours), theirs: value(theirs) }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: here {}, there {}", self.name, self.ours, self.theirs)
    }
}

/// A refusal: the speaker closes the connection after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refuse {
    /// Why, for programs.
    pub code: RefuseCode,
    /// Why, for people.
    pub text: String,
    /// What differs, if that is the reason.
    pub differences: Vec<Difference>,
}

impl Refuse {
    /// A refusal with its text made harmless and cut to its limit.
    pub fn new(code: RefuseCode, text: &str, mut differences: Vec<Difference>) -> Self {
        differences.truncate(crate::limits::MAX_DIFFERENCES);
        Self { code, text: harmless(text, MAX_TEXT_BYTES), differences }
    }
}

/// Why a side ends a connection in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GoodbyeReason {
    /// The guest was switched off or the service stopped: do not take over.
    Stopped,
    /// A planned change of sides.
    Switchover,
    /// This process starts anew.
    Restarting,
    /// Protection was switched off.
    Unprotected,
    /// This side lost the right to run.
    Fenced,
    /// A reason that this build does not know.
    Unknown(u8),
}

impl GoodbyeReason {
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Stopped => 1,
            Self::Switchover => 2,
            Self::Restarting => 3,
            Self::Unprotected => 4,
            Self::Fenced => 5,
            Self::Unknown(number) => number,
        }
    }

    pub(crate) fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Stopped,
            2 => Self::Switchover,
            3 => Self::Restarting,
            4 => Self::Unprotected,
            5 => Self::Fenced,
            other => Self::Unknown(other),
        }
    }
}

impl fmt::Display for GoodbyeReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("stopped"),
            Self::Switchover => f.write_str("switchover"),
            Self::Restarting => f.write_str("restarting"),
            Self::Unprotected => f.write_str("unprotected"),
            Self::Fenced => f.write_str("fenced"),
            Self::Unknown(number) => write!(f, "unknown ({number})"),
        }
    }
}

/// An ordered end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Goodbye {
    /// Why, for programs.
    pub reason: GoodbyeReason,
    /// Why, for people.
    pub text: String,
}

impl Goodbye {
    /// A goodbye with its text made harmless and cut to its limit.
    pub fn new(reason: GoodbyeReason, text: &str) -> Self {
        Self { reason, text: harmless(text, MAX_TEXT_BYTES) }
    }
}

/// What a side says of itself in each heartbeat. The generation and incarnation are in the frame's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct HeartbeatBody {
    /// The last epoch that the speaker knows to be committed.
    pub committed_epoch: Epoch,
    /// The speaker's state, as a number that `failover` gives a meaning.
    pub state: u8,
    /// Why a takeover would be granted now, as bits that `failover` gives a meaning.
    pub armed: u8,
    /// Age of the speaker's last success with the arbiter, in milliseconds; `None` if there was none.
    pub arbiter_ok_ms: Option<u32>,
}

/// What ends a checkpoint: what the backup must hold for the checkpoint to be whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndOfCheckpoint {
    /// Which checkpoint.
    pub epoch: Epoch,
    /// What it holds.
    pub kind: CheckpointKind,
    /// How many pages were sent, repeated ones of a base included.
    pub pages: u64,
    /// How many sections were sent.
    pub sections: u32,
    /// How many changes of disks were sent; in a base, pieces that differed among them.
    pub disk_changes: u64,
    /// The guest was told in this epoch, or may have been, that its changes are on stable storage: so they must be at the backup before the acknowledgement.
    pub flushed: bool,
    /// Digest of all of it, in the order sent.
    pub digest: crate::digest::CheckpointDigest,
}

/// Generation 0 means "none yet": it cannot be the right to send a guest's state.
pub(crate) const NO_GENERATION: Generation = Generation(0);

/// Replaces control characters, so that a peer's or a guest's text does nothing to a terminal or a log, and cuts at `max_bytes`.
pub(crate) fn harmless(text: &str, max_bytes: usize) -> String {
    let mut out = String::with_capacity(text.len().min(max_bytes));
    for c in text.chars().map(|c| if c.is_control() { '?' } else { c }) {
        if out.len() + c.len_utf8() > max_bytes {
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_codes_are_their_own_inverse() {
        for number in 0..=u16::MAX {
            assert_eq!(RefuseCode::from_number(number).number(), number);
        }
        for number in 0..=u8::MAX {
            assert_eq!(GoodbyeReason::from_number(number).number(), number);
        }
    }

    #[test]
    fn texts_are_harmless_and_short() {
        assert_eq!(harmless("a\x1b[2J\nb\u{85}", 99), "a?[2J?b?");
        assert_eq!(harmless("äää", 5), "ää");
    }
}
