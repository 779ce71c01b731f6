//! What goes wrong in a simulated world, drawn from its seed: which kinds at all, how often, and when.

use std::time::Duration;

use bytes::Bytes;
use failover::decide::{Command, GuestEnd};

use super::Nanos;
use super::register::Fate;
use super::storage::Trouble;
use crate::real::rng::Rng;

const MS: Nanos = 1_000_000;

/// How a node reaches the arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Way {
    /// It does.
    #[default]
    Open,
    /// It is told that nobody is there.
    Refused,
    /// It is told nothing, and nothing is done.
    Lost,
    /// Some answers are lost, some requests done much later.
    Lossy,
    /// What is asked is done, and every answer is lost.
    Deaf,
}

/// How bad things are now.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// One packet in so many takes much longer; 0: none.
    pub slow_packet: u64,
    /// One stretch of the stream in so many is cut in two; 0: none.
    pub split_packet: u64,
    /// Packets of the backup are kept for a replay.
    pub keep_old_packets: bool,
    /// The last one kept.
    pub old_packet: Option<Bytes>,
    /// What every request to the arbiter takes longer.
    pub arbiter_slow: Nanos,
    /// How each node reaches the arbiter.
    pub way: [Way; 2],
    /// Hosts whose guest LAN is unplugged.
    pub lan_cut: [bool; 2],
    /// Hosts that have power.
    pub host_up: [bool; 2],
    /// Hosts whose disk takes nothing.
    pub disk_full: [bool; 2],
    /// The guest writes as much as it can.
    pub storm: bool,
    /// The applier is slow.
    pub slow_applier: bool,
    /// About how often the guest does something by itself.
    pub guest_interval: Nanos,
    /// The backup's disk is slow.
    pub slow_disk: bool,
    /// Bytes that the data connection takes in a second; 0: as many as there are.
    pub link_rate: u64,
}

impl Default for Conditions {
    fn default() -> Self {
        Self {
            slow_packet: 0,
            split_packet: 0,
            keep_old_packets: false,
            old_packet: None,
            arbiter_slow: 0,
            way: [Way::Open; 2],
            lan_cut: [false; 2],
            host_up: [true; 2],
            disk_full: [false; 2],
            storm: false,
            slow_applier: false,
            guest_interval: 10 * MS,
            slow_disk: false,
            link_rate: 0,
        }
    }
}

impl Conditions {
    /// What becomes of a request of this node's to the arbiter.
    pub fn fate(&self, node: usize, rng: &mut Rng) -> Fate {
        match self.way[node] {
            Way::Open => Fate::Served,
            Way::Refused => Fate::Refused,
            Way::Lost => Fate::Lost,
            Way::Deaf => Fate::AnswerLost,
            Way::Lossy => match rng.range(0, 10) {
                0..4 => Fate::Served,
                4..7 => Fate::AnswerLost,
                7..9 => Fate::Late,
                _ => Fate::Lost,
            },
        }
    }

    /// Everything is well again; what differs between worlds stays.
    pub fn heal(&mut self) {
        *self = Self {
            split_packet: self.split_packet,
            guest_interval: self.guest_interval,
            keep_old_packets: false,
            ..Self::default()
        };
    }
}

/// Something that goes wrong, or is put right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Packets from this node are lost.
    Cut(usize),
    /// They arrive again.
    Mend(usize),
    /// Packets from this node take so much longer.
    Slow(usize, Nanos),
    /// The process is killed.
    Kill(usize),
    /// The host loses its power.
    PowerOff(usize),
    /// It has power again, and starts its process.
    PowerOn(usize),
    /// The process does not run for so long.
    Pause(usize, Nanos),
    /// A connection is reset.
    Reset,
    /// A piece of the stream is cut short, and its connection ends.
    Truncate,
    /// A bit flips on the way.
    FlipBit,
    /// Bytes that the backup said earlier arrive again.
    Replay,
    /// An acknowledgement is forged: by another process, or in a generation that has passed.
    Forge(bool),
    /// A node reaches the arbiter like this from now on.
    Arbiter(usize, Way),
    /// The arbiter takes so much longer for everybody.
    ArbiterSlow(Nanos),
    /// Somebody restores an earlier content of the arbiter.
    RollBack(usize),
    /// An operator's command.
    Command(usize, Command),
    /// The guest ends by itself.
    GuestEnds(GuestEnd),
    /// The guest LAN of a host is unplugged, or plugged in.
    Lan(usize, bool),
    /// The disk of a host takes nothing, or everything again.
    DiskFull(usize, bool),
    /// The guest writes as much as it can, or does not.
    Storm(bool),
    /// The applier is slow, or is not.
    SlowApplier(bool),
    /// The process is replaced by one with another machine, or with the right one.
    Skew(usize, u64),
    /// The host loses its power within so many changes of its files.
    CutWithin(usize, u64),
    /// The files of a host have this trouble, or none.
    Storage(usize, Option<Trouble>),
    /// The backup's disk is slow, or is not.
    SlowDisk(bool),
}

/// The kinds of faults that a world may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The link is cut both ways.
    CutBoth,
    /// The link is cut one way.
    CutOneWay,
    /// The link comes and goes five times a second.
    Flap,
    /// The link is slow in one direction.
    Slow,
    /// A process is killed and restarted.
    Kill,
    /// A host loses its power and gets it back.
    Power,
    /// A process is paused.
    Pause,
    /// A connection is reset.
    Reset,
    /// A connection ends inside a frame.
    Truncate,
    /// A bit flips.
    FlipBit,
    /// Old bytes come again.
    Replay,
    /// Acknowledgements are forged.
    Forge,
    /// One side, or both, cannot reach the arbiter.
    Arbiter,
    /// Answers of the arbiter are lost, or late.
    ArbiterLossy,
    /// The arbiter is slow.
    ArbiterSlow,
    /// The arbiter is restored from a backup.
    RollBack,
    /// A planned switchover.
    Switchover,
    /// An ordered stop.
    Stop,
    /// Protection is switched off and on.
    Unprotect,
    /// The guest switches itself off, resets, or crashes.
    GuestEnds,
    /// The guest LAN is unplugged.
    Lan,
    /// A disk is full.
    DiskFull,
    /// The guest writes as much as it can.
    Storm,
    /// The applier is slow.
    SlowApplier,
    /// A process comes back with another machine.
    Skew,
    /// A node reaches neither its peer nor the arbiter, for longer than it waits for either.
    Isolate,
    /// An operator wants a fenced side as the backup.
    Rejoin,
    /// An operator pauses protection.
    PauseProtection,
    /// The guest goes to the other side and comes back.
    Drill,
    /// A host loses its power in the midst of changing its files.
    PowerCut,
    /// Both hosts do.
    Blackout,
    /// The files of a host cannot be changed or synced for a while.
    DiskTrouble,
    /// The backup's disk is slow.
    SlowDisk,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 25] = [
        Self::CutBoth,
        Self::CutOneWay,
        Self::Flap,
        Self::Slow,
        Self::Kill,
        Self::Power,
        Self::Pause,
        Self::Reset,
        Self::Truncate,
        Self::FlipBit,
        Self::Replay,
        Self::Forge,
        Self::Arbiter,
        Self::ArbiterLossy,
        Self::ArbiterSlow,
        Self::RollBack,
        Self::Switchover,
        Self::Stop,
        Self::Unprotect,
        Self::GuestEnds,
        Self::Lan,
        Self::DiskFull,
        Self::Storm,
        Self::SlowApplier,
        Self::Skew,
    ];

    /// Those that were thought of later. They are drawn apart, so that the worlds of the seeds that are known stay what they are.
    pub const LATER: [Self; 4] = [Self::Isolate, Self::Rejoin, Self::PauseProtection, Self::Drill];
    /// Those of worlds whose guest has a disk, drawn apart.
    pub const DISKS: [Self; 4] = [Self::PowerCut, Self::Blackout, Self::DiskTrouble, Self::SlowDisk];

    /// The faults of one occurrence, with the time of each after its beginning.
    pub fn draw(self, rng: &mut Rng) -> Vec<(Nanos, Fault)> {
        let node = usize::from(rng.range(0, 2) == 1);
        let long = span(rng, 5 * MS, 8_000 * MS);
        match self {
            Self::CutBoth => vec![
                (0, Fault::Cut(0)),
                (rng.range(0, 3) * MS, Fault::Cut(1)),
                (long, Fault::Mend(0)),
                (long + rng.range(0, 3) * MS, Fault::Mend(1)),
            ],
            Self::CutOneWay => vec![(0, Fault::Cut(node)), (long, Fault::Mend(node))],
            Self::Flap => (0..10u64)
                .flat_map(|n| [(n * 200 * MS, Fault::Cut(node)), ((n * 200 + 100) * MS, Fault::Mend(node))])
                .collect(),
            Self::Slow => vec![(0, Fault::Slow(node, span(rng, MS, 1_000 * MS))), (long, Fault::Slow(node, 0))],
            Self::Kill => vec![(0, Fault::Kill(node))],
            Self::Power => vec![(0, Fault::PowerOff(node)), (long + 500 * MS, Fault::PowerOn(node))],
            Self::Pause => vec![(0, Fault::Pause(node, span(rng, MS, 60_000 * MS)))],
            Self::Reset => vec![(0, Fault::Reset)],
            Self::Truncate => vec![(0, Fault::Truncate)],
            Self::FlipBit => vec![(0, Fault::FlipBit)],
            Self::Replay => vec![(0, Fault::Replay)],
            // On a slow link, so that there is one on its way, and a later epoch that it can be of.
            Self::Forge => {
                let (another, slow) = (rng.range(0, 2) == 0, span(rng, 2 * MS, 40 * MS));
                let mut faults = vec![(0, Fault::Slow(0, slow)), (0, Fault::Slow(1, slow))];
                faults.extend((0..8u64).map(|n| (slow * 3 + n * 5 * MS, Fault::Forge(another))));
                faults.extend([(slow * 5, Fault::Slow(0, 0)), (slow * 5, Fault::Slow(1, 0))]);
                faults
            }
            Self::Arbiter => {
                let way = if rng.range(0, 2) == 0 { Way::Refused } else { Way::Lost };
                let both = rng.range(0, 3) == 0;
                let nodes: &[usize] = if both { &[0, 1] } else { &[node] };
                nodes
                    .iter()
                    .flat_map(|n| [(0, Fault::Arbiter(*n, way)), (long, Fault::Arbiter(*n, Way::Open))])
                    .collect()
            }
            Self::ArbiterLossy => {
                vec![(0, Fault::Arbiter(node, Way::Lossy)), (long, Fault::Arbiter(node, Way::Open))]
            }
            Self::ArbiterSlow => {
                vec![(0, Fault::ArbiterSlow(span(rng, MS, 900 * MS))), (long, Fault::ArbiterSlow(0))]
            }
            Self::RollBack => {
                vec![(0, Fault::RollBack(usize::try_from(rng.range(1, 4)).expect("small")))]
            }
            Self::Switchover => vec![(0, Fault::Command(node, Command::Switchover))],
            Self::Stop => vec![(0, Fault::Command(node, Command::Stop))],
            Self::Unprotect => {
                vec![(0, Fault::Command(node, Command::Unprotect)), (long, Fault::Command(node, Command::Protect))]
            }
            Self::GuestEnds => {
                let end = [GuestEnd::PoweredOff, GuestEnd::Reset, GuestEnd::Crashed];
                vec![(0, Fault::GuestEnds(end[usize::try_from(rng.range(0, 3)).expect("small")]))]
            }
            Self::Lan => vec![(0, Fault::Lan(node, true)), (long, Fault::Lan(node, false))],
            Self::DiskFull => vec![(0, Fault::DiskFull(node, true)), (long, Fault::DiskFull(node, false))],
            Self::Storm => vec![(0, Fault::Storm(true)), (long / 8, Fault::Storm(false))],
            Self::SlowApplier => vec![(0, Fault::SlowApplier(true)), (long, Fault::SlowApplier(false))],
            Self::Skew => vec![(0, Fault::Skew(node, 1)), (long, Fault::Skew(node, 0))],
            Self::Isolate | Self::Rejoin | Self::PauseProtection | Self::Drill => self.draw_later(node, long, rng),
            Self::PowerCut | Self::Blackout | Self::DiskTrouble | Self::SlowDisk => self.draw_disk(node, long, rng),
        }
    }

    fn draw_later(self, node: usize, long: Nanos, rng: &mut Rng) -> Vec<(Nanos, Fault)> {
        match self {
            Self::Isolate => {
                let long = 11_000 * MS + span(rng, MS, 4_000 * MS);
                let way = if rng.range(0, 2) == 0 { Way::Refused } else { Way::Lost };
                let begin = [Fault::Cut(0), Fault::Cut(1), Fault::Arbiter(node, way)];
                let end = [Fault::Arbiter(node, Way::Open), Fault::Mend(0), Fault::Mend(1)];
                let late = rng.range(0, 2) * 1_500 * MS;
                let begin = begin.into_iter().map(|fault| (0, fault));
                begin.chain(end.into_iter().zip([0, late, late]).map(|(fault, late)| (long + late, fault))).collect()
            }
            Self::Rejoin => vec![(0, Fault::Command(node, Command::Rejoin))],
            Self::PauseProtection => {
                let length = Duration::from_millis(rng.range(500, 20_000));
                vec![(0, Fault::Command(node, Command::PauseProtection { length }))]
            }
            // Whoever has the guest hands it over; whoever is its backup then calls it back.
            _ => vec![
                (0, Fault::Command(0, Command::Switchover)),
                (long + 1_000 * MS, Fault::Command(node, Command::Switchover)),
            ],
        }
    }

    fn draw_disk(self, node: usize, long: Nanos, rng: &mut Rng) -> Vec<(Nanos, Fault)> {
        let cut = |node, rng: &mut Rng| {
            let (within, latest) = (rng.range(0, 24), rng.range(0, 400) * MS);
            let up = latest + 500 * MS + rng.range(0, 3_000) * MS;
            [(0, Fault::CutWithin(node, within)), (latest, Fault::PowerOff(node)), (up, Fault::PowerOn(node))]
        };
        match self {
            Self::PowerCut => cut(node, rng).to_vec(),
            Self::Blackout => [cut(0, rng), cut(1, rng)].concat(),
            Self::DiskTrouble => {
                let troubles = [Trouble::Full, Trouble::Writes, Trouble::Syncs];
                let trouble = troubles[usize::try_from(rng.range(0, 3)).expect("small")];
                vec![(0, Fault::Storage(node, Some(trouble))), (long / 2, Fault::Storage(node, None))]
            }
            _ => vec![(0, Fault::SlowDisk(true)), (long, Fault::SlowDisk(false))],
        }
    }
}

/// A time between the two, short ones as likely as long ones.
fn span(rng: &mut Rng, low: Nanos, high: Nanos) -> Nanos {
    let octaves = u64::from((high / low).max(2).ilog2());
    let base = low << rng.range(0, octaves);
    (base + rng.range(0, base)).min(high)
}
