//! Every state that the disks of a pair can reach within small bounds: two pieces, a few changes and flushes of the guest, a few epochs, and a power
//! cut at any change of any file, of which every unsynced sector keeps any content that it had.
//!
//! The disks' machinery is the real one on both sides, byte for byte, on files in memory: maps, journal, recovery, the owner's log, synchronisation,
//! the worker of the side that waits, and the rule which acknowledgements are due. Decisions, connections and the record are reduced to what matters to
//! disks: who may run, who is in sync, whether output is held.
//!
//! * [`world`]: one state, and what may happen in it
//! * [`node`]: one host with its process
//! * [`ghost`]: what is true of the guest's disk, and what must never happen
//! * [`search`]: all of it, breadth first, by living through each path anew: the machinery cannot be copied

pub mod ghost;
pub mod node;
pub mod op;
pub mod search;
pub mod world;

use replication_proto::mutant::Mutant;

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// Small enough for every day.
    pub daily: bool,
    /// Changes of the disk by the guest, wherever it runs.
    pub writes: u8,
    /// Flushes.
    pub flushes: u8,
    /// Epochs that end besides those that end a base.
    pub epochs: u8,
    /// Synchronisations.
    pub bases: u8,
    /// Takeovers.
    pub takeovers: u8,
    /// Processes that are killed.
    pub kills: u8,
    /// Power cuts.
    pub cuts: u8,
    /// Nothing happens after the last of them: what is on stable storage was looked at then.
    pub ends_with_cuts: bool,
    /// Over so many bytes a journal starts anew.
    pub journal_bytes: u64,
}

impl Bounds {
    /// The named ones.
    pub fn all() -> [Self; 5] {
        let flush = Self {
            name: "flush",
            about: "a change, a flush, an epoch, a takeover, until the power fails on either host",
            daily: false,
            writes: 1,
            flushes: 1,
            epochs: 1,
            bases: 1,
            takeovers: 1,
            kills: 0,
            cuts: 1,
            ends_with_cuts: true,
            journal_bytes: 3 << 10,
        };
        let back = Self {
            name: "return",
            about: "after a takeover the former owner comes back and gets what differs",
            flushes: 0,
            epochs: 0,
            bases: 2,
            cuts: 0,
            ends_with_cuts: false,
            daily: true,
            ..flush
        };
        let outage = Self {
            name: "outage",
            about: "as return, with a power cut of either host at any moment",
            daily: false,
            cuts: 1,
            ..back
        };
        let dark = Self {
            name: "dark",
            about: "a change, a flush, a base, a takeover, until the power fails for the second time",
            daily: true,
            epochs: 0,
            cuts: 2,
            ..flush
        };
        let two = Self {
            name: "two",
            about: "as flush, with two changes",
            daily: false,
            writes: 2,
            journal_bytes: 6 << 10,
            ..flush
        };
        [flush, back, dark, outage, two]
    }

    /// Those of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|bounds| bounds.name == name)
    }
}

/// The broken rules that this exploration must find, each with bounds in which it matters.
pub const HUNTED: [(Mutant, &str); 4] = [
    (Mutant::AckBeforeStable, "flush"),
    (Mutant::BitAfterWrite, "outage"),
    (Mutant::BaseBeforeImage, "flush"),
    (Mutant::ReturnersBitsIgnored, "return"),
];
