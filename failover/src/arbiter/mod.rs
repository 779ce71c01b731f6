//! The one record that says who may run, and the compare-and-swap on it.
//!
//! Safety rests on this alone: the act of going on without the peer is one compare-and-swap, which at most one side wins. No clock, lease or
//! time to live takes part.

use std::fmt;

use replication_proto::{Generation, Incarnation, NodeName, VmId};
use serde::{Deserialize, Serialize};

use crate::config::ArbiterSection;
use crate::text::harmless;

pub mod contract;
pub mod etcd;
pub mod file;
pub mod thread;

pub use etcd::EtcdArbiter;
pub use file::FileArbiter;
pub use thread::{ArbiterThread, Completed};

/// Version of the record's schema that this program writes and reads.
pub const RECORD_VERSION: u32 = 1;
/// Longest stored record, in bytes of JSON. A longer one is refused before it is parsed.
pub const MAX_RECORD_BYTES: usize = 64 * 1024;
/// Longest note in a record, in bytes.
pub const MAX_NOTE_BYTES: usize = 1024;

/// What the arbiter compares: it grows with every write of the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One life of a process on one node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRef {
    /// The host.
    pub node: NodeName,
    /// The process on it.
    pub incarnation: Incarnation,
}

impl fmt::Display for NodeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.node, self.incarnation)
    }
}

/// Why the record was last written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The first record of this VM.
    Created,
    /// The owner booted the guest anew.
    ColdStart,
    /// A backup came in sync.
    Protected,
    /// The owner goes on alone because it lost its backup.
    BackupLost,
    /// The owner goes on alone because an operator said so.
    Unprotected,
    /// The backup took over from a silent owner.
    Takeover,
    /// The backup took over because the owner asked it to.
    Switchover,
    /// An operator forced it.
    Forced,
    /// The guest is off: an ordered stop, a power-off or a crash of the guest. Nobody resurrects it.
    Stopped,
}

impl Reason {
    /// The word as stored.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::ColdStart => "cold_start",
            Self::Protected => "protected",
            Self::BackupLost => "backup_lost",
            Self::Unprotected => "unprotected",
            Self::Takeover => "takeover",
            Self::Switchover => "switchover",
            Self::Forced => "forced",
            Self::Stopped => "stopped",
        }
    }
}

/// Who may run the guest, and who could take over.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Schema version, [`RECORD_VERSION`].
    pub v: u32,
    /// The VM that this record is about.
    pub cluster_id: VmId,
    /// Number of the right to run.
    pub generation: Generation,
    /// Who holds it.
    pub owner: NodeRef,
    /// The only process that may take over, if any: it has everything that was ever let out.
    pub in_sync: Option<NodeRef>,
    /// Why this was written.
    pub reason: Reason,
    /// Who wrote it.
    pub written_by: NodeRef,
    /// A sentence for people; at most [`MAX_NOTE_BYTES`].
    pub note: String,
}

/// Why bytes are not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Longer than [`MAX_RECORD_BYTES`].
    #[error("record of {0} bytes is longer than the limit of {MAX_RECORD_BYTES}")]
    TooLong(usize),
    /// Not JSON, or a field is missing, unknown or of the wrong type.
    #[error("not a record: {0}")]
    Malformed(String),
    /// Written by a newer program.
    #[error("record of schema version {0}, this program knows {RECORD_VERSION}: upgrade this node")]
    Newer(u32),
    /// Fields contradict each other.
    #[error("contradictory record: {0}")]
    Contradictory(&'static str),
}

impl Record {
    /// Reads a record from JSON.
    ///
    /// # Errors
    /// [`RecordError`] says in what way the bytes are not a record that this program may act on.
    pub fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct OnlyVersion {
            v: u32,
        }
        if bytes.len() > MAX_RECORD_BYTES {
            return Err(RecordError::TooLong(bytes.len()));
        }
        let malformed = |error: serde_json::Error| RecordError::Malformed(harmless(&error.to_string()));
        // The version first: a newer record may have fields that we do not know.
        let OnlyVersion { v } = serde_json::from_slice(bytes).map_err(malformed)?;
        if v > RECORD_VERSION {
            return Err(RecordError::Newer(v));
        }
        let record: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        record.validate()?;
        Ok(record)
    }

    /// Checks what the types alone do not.
    ///
    /// # Errors
    /// [`RecordError::Contradictory`] or [`RecordError::Newer`].
    pub fn validate(&self) -> Result<(), RecordError> {
        if self.v > RECORD_VERSION {
            return Err(RecordError::Newer(self.v));
        }
        if self.v == 0 {
            return Err(RecordError::Contradictory("schema version 0"));
        }
        if self.generation == Generation(0) {
            return Err(RecordError::Contradictory("generation 0"));
        }
        if self.in_sync.as_ref().is_some_and(|backup| backup.node == self.owner.node) {
            return Err(RecordError::Contradictory("the owner is its own backup"));
        }
        if self.note.len() > MAX_NOTE_BYTES {
            return Err(RecordError::Contradictory("note too long"));
        }
        Ok(())
    }

    /// The record as JSON on one line.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a record has only string keys and plain values")
    }
}

/// A record and the revision at which it was read.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Versioned {
    /// What a compare-and-swap must name.
    pub revision: Revision,
    /// What was stored.
    pub record: Record,
}

/// A read did not give an answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ArbiterError {
    /// It may work later: no answer, busy, an I/O error.
    #[error("arbiter not reachable: {0}")]
    Unreachable(String),
    /// It answered, and what it holds cannot be used: corrupt, foreign, unsafe storage. A person must look; nothing is overwritten.
    #[error("arbiter not usable: {0}")]
    Unusable(String),
}

/// What became of a compare-and-swap.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CasOutcome {
    /// Done; the record now has this revision.
    Applied(Revision),
    /// Not done: the stored revision is another one.
    Conflict,
    /// The answer is lost. It may have been done, or may be done at any later time as long as the revision stays what was expected.
    Unknown(String),
    /// Certainly not done, now or later.
    Failed(String),
}

/// A register with compare-and-swap, somewhere outside of both processes.
///
/// Implementations must be linearizable: a read gives the latest applied record, never an older one. They may block for as long as their own
/// time limit; [`ArbiterThread`] keeps that away from the decision core.
pub trait Arbiter: Send {
    /// The latest record, or `None` when there has never been one.
    ///
    /// # Errors
    /// [`ArbiterError`] when there is no answer, or none that may be acted on.
    fn read(&mut self) -> Result<Option<Versioned>, ArbiterError>;

    /// Stores `record` if the stored revision is `expected` (`None`: if nothing is stored).
    fn compare_and_swap(&mut self, expected: Option<Revision>, record: &Record) -> CasOutcome;

    /// What and where it is, for people: `file /var/lib/ft/record.json`.
    fn describe(&self) -> String;
}

/// The arbiter that a configuration names.
#[derive(Debug)]
pub enum ConfiguredArbiter {
    /// In a file.
    File(FileArbiter),
    /// In etcd.
    Etcd(EtcdArbiter),
}

impl ConfiguredArbiter {
    /// Opens the record of `vm`.
    ///
    /// # Errors
    /// [`ArbiterError::Unusable`] when the place, a certificate or a key cannot be used. That nobody answers is no error yet.
    pub fn open(section: &ArbiterSection, vm: VmId) -> Result<Self, ArbiterError> {
        match section {
            ArbiterSection::File { path } => FileArbiter::open(path).map(Self::File),
            ArbiterSection::Etcd(section) => EtcdArbiter::open(section, vm).map(Self::Etcd),
        }
    }
}

impl Arbiter for ConfiguredArbiter {
    fn read(&mut self) -> Result<Option<Versioned>, ArbiterError> {
        match self {
            Self::File(arbiter) => arbiter.read(),
            Self::Etcd(arbiter) => arbiter.read(),
        }
    }

    fn compare_and_swap(&mut self, expected: Option<Revision>, record: &Record) -> CasOutcome {
        match self {
            Self::File(arbiter) => arbiter.compare_and_swap(expected, record),
            Self::Etcd(arbiter) => arbiter.compare_and_swap(expected, record),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::File(arbiter) => arbiter.describe(),
            Self::Etcd(arbiter) => arbiter.describe(),
        }
    }
}
