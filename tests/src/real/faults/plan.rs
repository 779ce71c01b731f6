//! Which faults happen, and when: drawn from a seed, written down as a timeline of acts.

use std::time::Duration;

use serde::Serialize;

use crate::real::Node;
use crate::real::network::Wire;
use crate::real::rng::Rng;
use crate::real::shaper::{Shape, Shapes};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What can be done to a pair. *Owner* is the side that ran the guest when the fault began, *backup* the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The owner's process is killed.
    KillOwner,
    /// The backup's process is killed.
    KillBackup,
    /// The owner's host loses its cables, then its process.
    PowerOwner,
    /// The backup's host loses its cables, then its process.
    PowerBackup,
    /// The owner's process is stopped for a while.
    StopOwner,
    /// The backup's process is stopped for a while.
    StopBackup,
    /// The replication link is cut for a while.
    CutLink,
    /// For a while the owner hears nothing on the replication link, and is heard.
    DeafOwner,
    /// For a while the backup hears nothing on the replication link, and is heard.
    DeafBackup,
    /// The owner's cable to the guest LAN is cut for a while.
    CutLan,
    /// The replication link flaps at 5 Hz for two seconds.
    Flap,
    /// The replication link is late: 5 to 40 ms each way.
    Late,
    /// The replication link loses 1 to 10 % of its frames.
    Lossy,
    /// Frames overtake each other on the replication link.
    Reordering,
    /// The replication link carries 1 to 8 MB/s.
    Slow,
    /// Neither side reaches the arbiter for a while.
    ArbiterDown,
    /// The arbiter answers reads, and writes hang for a while.
    ArbiterLocked,
    /// The owner does not reach the arbiter for a while.
    ArbiterLostByOwner,
    /// The backup does not reach the arbiter for a while.
    ArbiterLostByBackup,
    /// The backup is ended in order.
    EndBackup,
    /// An operator moves the guest: `ftctl failover`.
    Switchover,
    /// The owner's process is killed and started again at once, as a service manager would.
    RestartOwner,
    /// The backup's process is killed and started again at once.
    RestartBackup,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::KillOwner,
        Self::KillBackup,
        Self::PowerOwner,
        Self::PowerBackup,
        Self::StopOwner,
        Self::StopBackup,
        Self::CutLink,
        Self::DeafOwner,
        Self::DeafBackup,
        Self::CutLan,
        Self::Flap,
        Self::Late,
        Self::Lossy,
        Self::Reordering,
        Self::Slow,
        Self::ArbiterDown,
        Self::ArbiterLocked,
        Self::ArbiterLostByOwner,
        Self::ArbiterLostByBackup,
        Self::EndBackup,
        Self::Switchover,
        Self::RestartOwner,
        Self::RestartBackup,
    ];

    /// The word of reports.
    #[must_use]
    pub fn word(self) -> String {
        serde_json::to_value(self).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
    }

    /// Whether the owner's process dies of it.
    #[must_use]
    pub fn ends_owner(self) -> bool {
        matches!(self, Self::KillOwner | Self::PowerOwner | Self::RestartOwner)
    }

    /// Whether the backup's process dies of it.
    #[must_use]
    pub fn ends_backup(self) -> bool {
        matches!(self, Self::KillBackup | Self::PowerBackup | Self::EndBackup | Self::RestartBackup)
    }
}

/// One deed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// SIGKILL to the process of a host.
    Kill(Node),
    /// A host's cables go dead.
    Unplug(Node),
    /// SIGSTOP.
    Stop(Node),
    /// SIGCONT.
    Continue(Node),
    /// SIGTERM.
    End(Node),
    /// Starts `ft-backup` on a host if nothing runs there, or `ft-primary` if so told.
    Start(Node, &'static str),
    /// A cable goes dead.
    Cut(Wire),
    /// A cable works again.
    Mend(Wire),
    /// The replication wire begins to behave badly.
    Shape(Shapes),
    /// The replication wire is good again.
    Unshape,
    /// A host cannot reach the arbiter.
    Hide(Node),
    /// A host reaches the arbiter again.
    Show(Node),
    /// Writers of the record wait.
    Lock,
    /// Writers of the record go on.
    Unlock,
    /// `ftctl failover` against a host.
    Switchover(Node),
}

/// One fault, or two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The first.
    pub first: Kind,
    /// The second, and how long after the first.
    pub second: Option<(Kind, Duration)>,
    /// What is done, and when after the beginning; ascending.
    pub timeline: Vec<(Duration, Act)>,
}

impl Fault {
    /// The word of reports: the first kind, or both.
    #[must_use]
    pub fn word(&self) -> String {
        match self.second {
            None => self.first.word(),
            Some((second, _)) => format!("{}+{}", self.first.word(), second.word()),
        }
    }

    /// The kinds that take part.
    pub fn kinds(&self) -> impl Iterator<Item = Kind> {
        [Some(self.first), self.second.map(|(kind, _)| kind)].into_iter().flatten()
    }

    /// Draws a fault for a pair whose guest runs on `owner`. Nothing lasts longer than `longest`. `first` and `double` may be chosen instead of drawn.
    pub fn draw(rng: &mut Rng, owner: Node, longest: Duration, first: Option<Kind>, double: Option<bool>) -> Self {
        let any = |rng: &mut Rng| {
            let at = usize::try_from(rng.range(0, Kind::ALL.len() as u64)).unwrap_or(0);
            Kind::ALL[at]
        };
        let first = first.unwrap_or_else(|| any(rng));
        let mut timeline = acts(rng, first, owner, longest);
        let double = double.unwrap_or_else(|| rng.range(0, 4) == 0);
        let second = double.then(|| {
            let after = rng.duration(ms(0), ms(500));
            loop {
                let kind = any(rng);
                // One process dies once, and one wire is bad in one way at a time.
                let twice = (kind.ends_owner() && first.ends_owner()) || (kind.ends_backup() && first.ends_backup());
                if kind != first && !twice && !(shapes_link(kind) && shapes_link(first)) {
                    break (kind, after);
                }
            }
        });
        if let Some((kind, after)) = second {
            timeline.extend(acts(rng, kind, owner, longest).into_iter().map(|(at, act)| (at + after, act)));
        }
        timeline.sort_by_key(|(at, _)| *at);
        Self { first, second, timeline }
    }
}

fn shapes_link(kind: Kind) -> bool {
    matches!(kind, Kind::DeafOwner | Kind::DeafBackup | Kind::Late | Kind::Lossy | Kind::Reordering | Kind::Slow)
}

/// The timeline of one kind of fault.
fn acts(rng: &mut Rng, kind: Kind, owner: Node, longest: Duration) -> Vec<(Duration, Act)> {
    let backup = owner.peer();
    let zero = Duration::ZERO;
    // Half of them are about as long as the timers that they race against.
    let lasts = if rng.range(0, 2) == 0 { rng.duration(ms(50), ms(600)) } else { rng.duration(ms(300), longest) };
    let lasts = lasts.min(longest);
    let both = |begin: Act, end: Act| vec![(zero, begin), (lasts, end)];
    let shaped = |shapes| vec![(zero, Act::Shape(shapes)), (lasts.max(ms(500)), Act::Unshape)];
    match kind {
        Kind::KillOwner => vec![(zero, Act::Kill(owner))],
        Kind::KillBackup => vec![(zero, Act::Kill(backup))],
        Kind::PowerOwner => vec![(zero, Act::Unplug(owner)), (zero, Act::Kill(owner))],
        Kind::PowerBackup => vec![(zero, Act::Unplug(backup)), (zero, Act::Kill(backup))],
        Kind::StopOwner => both(Act::Stop(owner), Act::Continue(owner)),
        Kind::StopBackup => both(Act::Stop(backup), Act::Continue(backup)),
        Kind::CutLink => both(Act::Cut(Wire::Replication), Act::Mend(Wire::Replication)),
        Kind::DeafOwner => both(Act::Shape(Shapes::deaf(owner)), Act::Unshape),
        Kind::DeafBackup => both(Act::Shape(Shapes::deaf(backup)), Act::Unshape),
        Kind::CutLan => both(Act::Cut(Wire::Lan(owner)), Act::Mend(Wire::Lan(owner))),
        Kind::Flap => (0..10)
            .flat_map(|n| {
                let at = ms(200) * n;
                [(at, Act::Cut(Wire::Replication)), (at + ms(100), Act::Mend(Wire::Replication))]
            })
            .collect(),
        Kind::Late => {
            let delay = rng.duration(ms(5), ms(40));
            shaped(Shapes::both(Shape { delay, jitter: delay / 4, ..Shape::GOOD }))
        }
        Kind::Lossy => shaped(Shapes::both(Shape { lost_permille: rng.range(10, 100), ..Shape::GOOD })),
        Kind::Reordering => {
            let overtaken_permille = rng.range(10, 300);
            shaped(Shapes::both(Shape { delay: ms(1), jitter: ms(1), overtaken_permille, ..Shape::GOOD }))
        }
        Kind::Slow => shaped(Shapes::both(Shape { rate: rng.range(1 << 20, 8 << 20), ..Shape::GOOD })),
        Kind::ArbiterDown => {
            let nodes = Node::BOTH.into_iter();
            nodes.flat_map(|node| [(zero, Act::Hide(node)), (lasts, Act::Show(node))]).collect()
        }
        Kind::ArbiterLocked => both(Act::Lock, Act::Unlock),
        Kind::ArbiterLostByOwner => both(Act::Hide(owner), Act::Show(owner)),
        Kind::ArbiterLostByBackup => both(Act::Hide(backup), Act::Show(backup)),
        Kind::EndBackup => vec![(zero, Act::End(backup))],
        Kind::Switchover => vec![(zero, Act::Switchover(owner))],
        Kind::RestartOwner => {
            let program = if rng.range(0, 2) == 0 { "ft-primary" } else { "ft-backup" };
            vec![(zero, Act::Kill(owner)), (zero, Act::Start(owner, program))]
        }
        Kind::RestartBackup => vec![(zero, Act::Kill(backup)), (zero, Act::Start(backup, "ft-backup"))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One seed gives one run; whatever begins ends, within the time allowed.
    #[test]
    fn what_is_drawn_repeats_and_ends() {
        let draw = |seed| {
            let mut rng = Rng::new(seed);
            (0..500).map(|_| Fault::draw(&mut rng, Node::A, ms(3_000), None, None)).collect::<Vec<_>>()
        };
        assert_eq!(draw(5), draw(5));
        let faults = draw(6);
        for kind in Kind::ALL {
            assert!(faults.iter().any(|fault| fault.first == kind), "{kind:?} is never drawn");
        }
        assert!(faults.iter().any(|fault| fault.second.is_some()));
        for Fault { timeline, .. } in &faults {
            let count = |wanted: fn(&Act) -> bool| timeline.iter().filter(|(_, act)| wanted(act)).count();
            assert_eq!(count(|a| matches!(a, Act::Stop(_))), count(|a| matches!(a, Act::Continue(_))));
            assert_eq!(count(|a| matches!(a, Act::Cut(_))), count(|a| matches!(a, Act::Mend(_))));
            assert_eq!(count(|a| matches!(a, Act::Shape(_))), count(|a| *a == Act::Unshape));
            assert_eq!(count(|a| matches!(a, Act::Hide(_))), count(|a| matches!(a, Act::Show(_))));
            assert!(timeline.iter().all(|(at, _)| *at <= ms(3_500)));
            assert!(timeline.is_sorted_by_key(|(at, _)| *at));
        }
    }

    #[test]
    fn words_are_those_of_reports() {
        assert_eq!(Kind::ArbiterLostByBackup.word(), "arbiter_lost_by_backup");
    }
}
