//! Which request may start now. No I/O, no thread, no clock.
//!
//! Requests are pushed in the order in which the guest queued them. Of two that overlap, one of them a change, the later waits until the
//! earlier has finished; a flush waits until every change before it has finished, and nobody waits for a flush. A request so waits for
//! earlier ones only, and the earliest that may start always starts first: nothing starves.

use std::collections::VecDeque;

use crate::disk::ByteRange;

/// What a request does to its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read(ByteRange),
    Change(ByteRange),
    Flush,
}

impl Access {
    /// Whether a request that does this waits for an earlier one that does `earlier`.
    fn waits_for(self, earlier: Self) -> bool {
        match (earlier, self) {
            (Self::Change(a), Self::Read(b)) | (Self::Read(a) | Self::Change(a), Self::Change(b)) => a.overlaps(b),
            (Self::Change(_), Self::Flush) => true,
            (Self::Read(_), Self::Read(_) | Self::Flush) | (Self::Flush, _) => false,
        }
    }

    /// Whether it may have to wait for stable storage, when it is announced or at its end.
    fn is_slow(self) -> bool {
        !matches!(self, Self::Read(_))
    }
}

/// Names a request. Never used again, not even after [`Schedule::clear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

struct Entry<T> {
    ticket: Ticket,
    access: Access,
    running: bool,
    what: T,
}

/// The requests that have not finished, in the guest's order.
pub(super) struct Schedule<T> {
    entries: VecDeque<Entry<T>>,
    next: u64,
    /// Most requests that run at a time.
    workers: usize,
}

impl<T> Schedule<T> {
    /// An empty schedule for so many workers.
    pub(super) fn new(workers: usize) -> Self {
        Self { entries: VecDeque::new(), next: 0, workers }
    }

    /// A request behind all others.
    pub(super) fn push(&mut self, access: Access, what: T) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.entries.push_back(Entry { ticket, access, running: false, what });
        ticket
    }

    /// The earliest request that may start, which from now on runs.
    pub(super) fn start(&mut self) -> Option<(Ticket, &T)> {
        let at = self.startable()?;
        let entry = self.entries.get_mut(at)?;
        entry.running = true;
        Some((entry.ticket, &entry.what))
    }

    /// Whether [`Schedule::start`] would give one.
    pub(super) fn may_start(&self) -> bool {
        self.startable().is_some()
    }

    /// Takes a request out; `None` when it was forgotten meanwhile.
    pub(super) fn finish(&mut self, ticket: Ticket) -> Option<T> {
        let at = self.entries.binary_search_by_key(&ticket, |e| e.ticket).ok()?;
        self.entries.remove(at).map(|entry| entry.what)
    }

    /// What has not finished, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().map(|entry| &entry.what)
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }

    /// One worker is kept for reads: none waits because others wait for stable storage. One flush at a time, for the same reason.
    fn startable(&self) -> Option<usize> {
        let running = || self.entries.iter().filter(|e| e.running);
        if running().count() >= self.workers {
            return None;
        }
        let slow_is_full = running().filter(|e| e.access.is_slow()).count() >= (self.workers - 1).max(1);
        let flushing = running().any(|e| e.access == Access::Flush);
        let may = |(at, entry): &(usize, &Entry<T>)| {
            let has_room = match entry.access {
                Access::Read(_) => true,
                Access::Change(_) => !slow_is_full,
                Access::Flush => !slow_is_full && !flushing,
            };
            has_room
                && !entry.running
                && !self.entries.iter().take(*at).any(|earlier| entry.access.waits_for(earlier.access))
        };
        self.entries.iter().enumerate().find(may).map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECTORS: usize = 12;
    const WORKERS: usize = 4;

    fn range(at: usize, sectors: usize) -> ByteRange {
        ByteRange { offset: 512 * u64::try_from(at).unwrap(), len: 512 * u64::try_from(sectors).unwrap() }
    }

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Read(usize, usize),
        Change(usize, usize),
        Flush,
    }

    impl Op {
        fn access(self) -> Access {
            match self {
                Self::Read(at, sectors) => Access::Read(range(at, sectors)),
                Self::Change(at, sectors) => Access::Change(range(at, sectors)),
                Self::Flush => Access::Flush,
            }
        }
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let place = || (0..SECTORS).prop_flat_map(|at| (Just(at), 0..=(SECTORS - at).min(4)));
        let op = prop_oneof![
            3 => place().prop_map(|(at, n)| Op::Read(at, n)),
            4 => place().prop_map(|(at, n)| Op::Change(at, n)),
            1 => Just(Op::Flush),
        ];
        prop::collection::vec(op, 1..40)
    }

    /// What a request saw of the disk, which holds in each sector the number of the request that changed it last.
    #[derive(Clone, Debug, Default, PartialEq)]
    struct Seen(Vec<usize>);

    /// One request after the other, as the guest queued them: what each read.
    fn naive(ops: &[Op]) -> (Vec<usize>, Vec<Seen>) {
        let mut disk = vec![usize::MAX; SECTORS];
        let mut seen = Vec::new();
        for (number, op) in ops.iter().enumerate() {
            seen.push(match *op {
                Op::Read(at, n) => Seen(disk[at..at + n].to_vec()),
                Op::Change(at, n) => {
                    disk[at..at + n].fill(number);
                    Seen::default()
                }
                Op::Flush => Seen::default(),
            });
        }
        (disk, seen)
    }

    proptest! {
        /// However requests are pushed, started and finished, and wherever within its run each takes effect: every read sees what it
        /// would have seen one after the other, the disk ends the same, and a flush begins after every earlier change has finished.
        #[test]
        fn any_interleaving_equals_one_after_the_other(
            ops in ops(),
            choices in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 400),
        ) {
            let (wanted_disk, wanted) = naive(&ops);
            let mut schedule = Schedule::new(WORKERS);
            let mut disk = vec![usize::MAX; SECTORS];
            let mut seen = vec![Seen::default(); ops.len()];
            let mut finished = vec![false; ops.len()];
            let mut running: Vec<(Ticket, usize, bool)> = Vec::new();
            let mut pushed = 0;
            let chosen = choices.into_iter().map(|(choice, index)| (choice, Some(index)));
            for (choice, index) in chosen.chain(std::iter::repeat((3, None))) {
                if finished.iter().all(|f| *f) {
                    break;
                }
                match choice {
                    0 if pushed < ops.len() => {
                        schedule.push(ops[pushed].access(), pushed);
                        pushed += 1;
                    }
                    1 => {
                        if let Some((ticket, number)) = schedule.start() {
                            let number = *number;
                            if matches!(ops[number], Op::Flush) {
                                let earlier = (0..number).filter(|n| matches!(ops[*n], Op::Change(..)));
                                prop_assert!(earlier.clone().all(|n| finished[n]), "flush {number} too early");
                            }
                            running.push((ticket, number, false));
                            prop_assert!(running.len() <= WORKERS);
                        }
                    }
                    // Takes effect, and finishes the next time.
                    _ if !running.is_empty() => {
                        let at = index.map_or(running.len() - 1, |index| index.index(running.len()));
                        let (ticket, number, done) = running[at];
                        if done {
                            prop_assert_eq!(schedule.finish(ticket), Some(number));
                            prop_assert_eq!(schedule.finish(ticket), None);
                            finished[number] = true;
                            running.swap_remove(at);
                        } else {
                            match ops[number] {
                                Op::Read(from, n) => seen[number] = Seen(disk[from..from + n].to_vec()),
                                Op::Change(from, n) => disk[from..from + n].fill(number),
                                Op::Flush => {}
                            }
                            running[at].2 = true;
                        }
                    }
                    _ => {
                        if pushed < ops.len() {
                            schedule.push(ops[pushed].access(), pushed);
                            pushed += 1;
                        }
                        let started = schedule.start().map(|(ticket, number)| (ticket, *number, false));
                        prop_assert!(started.is_some(), "nothing runs, nothing starts: it starves");
                        running.extend(started);
                    }
                }
                let unfinished: Vec<_> = schedule.iter().copied().collect();
                let wanted: Vec<_> = (0..pushed).filter(|n| !finished[*n]).collect();
                prop_assert_eq!(unfinished, wanted, "the guest's order");
            }
            prop_assert_eq!(disk, wanted_disk);
            prop_assert_eq!(seen, wanted);
        }
    }

    #[test]
    fn schedule_is_as_parallel_as_order_allows() {
        let mut schedule = Schedule::new(WORKERS);
        schedule.push(Access::Change(range(0, 4)), 'a');
        schedule.push(Access::Change(range(4, 4)), 'b');
        schedule.push(Access::Read(range(3, 1)), 'c');
        schedule.push(Access::Flush, 'f');
        schedule.push(Access::Read(range(9, 1)), 'd');
        schedule.push(Access::Change(range(10, 1)), 'e');
        let mut started = Vec::new();
        while let Some((ticket, what)) = schedule.start() {
            started.push((*what, ticket));
        }
        let names: String = started.iter().map(|(what, _)| *what).collect();
        assert_eq!(names, "abde", "c overlaps a, the flush waits for both, e does not wait for the flush");
        assert_eq!(schedule.finish(started[0].1), Some('a'));
        assert_eq!(schedule.start().map(|(_, what)| *what), Some('c'));
        assert!(!schedule.may_start());
    }

    #[test]
    fn a_read_waits_for_no_flush_and_no_announcement() {
        let mut schedule = Schedule::new(WORKERS);
        for at in 0..8 {
            schedule.push(Access::Change(range(at, 1)), "change");
        }
        schedule.push(Access::Read(range(9, 1)), "read");
        let started: Vec<_> = std::iter::from_fn(|| schedule.start().map(|(_, what)| *what)).collect();
        assert_eq!(started, ["change", "change", "change", "read"]);
    }

    #[test]
    fn what_was_forgotten_does_not_come_back() {
        let mut schedule = Schedule::new(WORKERS);
        let old = schedule.push(Access::Flush, 1);
        schedule.clear();
        let new = schedule.push(Access::Flush, 2);
        assert_eq!(schedule.finish(old), None);
        assert_eq!(schedule.finish(new), Some(2));
    }
}
