//! What may happen to a pair with a disk.

use std::fmt;

/// Something that may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A host starts its process.
    Start(usize),
    /// The guest on this node fills one of its pieces.
    Write(usize, usize),
    /// It flushes.
    Flush(usize),
    /// The owner begins a base, and copies until little is left.
    BeginBase(usize),
    /// It ends the base.
    EndBase(usize),
    /// An epoch ends.
    EndEpoch(usize),
    /// The backup on this node takes a checkpoint.
    Deliver(usize),
    /// Its disks' thread does the next thing.
    Disk(usize),
    /// The same after a second.
    DiskLate(usize),
    /// The owner on this node hears what the backup said.
    Hear(usize),
    /// Its thread clears bits.
    Tidy(usize),
    /// What is due before the first change is done early.
    Prepare(usize),
    /// The owner goes on without its backup.
    Solo(usize),
    /// The backup takes over.
    TakeOver(usize),
    /// A side whose right is over begins anew.
    Rejoin(usize),
    /// The process dies.
    Kill(usize),
    /// The power of the host fails.
    Cut(usize),
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |node: &usize| ["A", "B"][*node];
        match self {
            Self::Start(n) => write!(f, "{} starts", name(n)),
            Self::Write(n, place) => write!(f, "the guest on {} changes piece {place}", name(n)),
            Self::Flush(n) => write!(f, "the guest on {} flushes", name(n)),
            Self::BeginBase(n) => write!(f, "{} begins a base", name(n)),
            Self::EndBase(n) => write!(f, "{} ends the base", name(n)),
            Self::EndEpoch(n) => write!(f, "an epoch ends on {}", name(n)),
            Self::Deliver(n) => write!(f, "{} commits a checkpoint", name(n)),
            Self::Disk(n) => write!(f, "the disks' thread of {} works", name(n)),
            Self::DiskLate(n) => write!(f, "the disks' thread of {} works, a second later", name(n)),
            Self::Hear(n) => write!(f, "{} hears its backup", name(n)),
            Self::Tidy(n) => write!(f, "{} clears bits", name(n)),
            Self::Prepare(n) => write!(f, "{} retires the journal before the first change", name(n)),
            Self::Solo(n) => write!(f, "{} goes on alone", name(n)),
            Self::TakeOver(n) => write!(f, "{} takes over", name(n)),
            Self::Rejoin(n) => write!(f, "{} gives its guest up", name(n)),
            Self::Kill(n) => write!(f, "{} is killed", name(n)),
            Self::Cut(n) => write!(f, "the power of {} fails", name(n)),
        }
    }
}

/// Something that happens: an operation, perhaps with a power cut within it, and what the cut leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What.
    pub op: Op,
    /// The power of this host fails within the so-manieth change of its files.
    pub cut: Option<(usize, u64)>,
    /// Which of its contents each unsynced place keeps, in the order in which they are asked for.
    pub kept: Vec<u8>,
}
