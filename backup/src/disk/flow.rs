//! The order of a committed record's life. Pure: what happened and `now` in, the next order out, one at a time.
//!
//! committed → added to the journal → on stable storage → applied to the images → forgotten when the journal starts anew.
//!
//! * Applied is only what is on stable storage (write-ahead), in order.
//! * An epoch in which the guest was told that its changes are on stable storage is acknowledged only when its record is, and no later epoch
//!   is before it. Others may be acknowledged as soon as they are committed.
//! * A journal over its limit takes nothing until all of it is applied, the images are synced, and it has started anew.

use std::collections::VecDeque;
use std::time::Duration;

use primary::disk::{Epoch, Point};

/// Without a flush, a record is synced after this time at the latest,
pub const SYNC_AFTER: Duration = Duration::from_secs(1);
/// or when so many bytes wait for it.
pub const SYNC_BYTES: u64 = 8 << 20;

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Add the oldest record that is not in the journal.
    Append,
    /// Sync the journal.
    Sync,
    /// Apply the oldest record that is not applied.
    Apply,
    /// Everything in the journal is applied: sync the images, move the maps' bases to this point, start the journal anew.
    Retire(Point),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    point: Point,
    bytes: u64,
    flushed: bool,
    since: Duration,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Flow {
    limit: u64,
    /// Records that are not applied: first those on stable storage, then those in the journal, then the others.
    entries: VecDeque<Entry>,
    synced: usize,
    appended: usize,
    journal_bytes: u64,
    /// The last committed epoch, with or without a record.
    committed: Point,
    durable: Point,
    applied: Point,
    hurry: bool,
    finishing: bool,
}

impl Flow {
    /// Journal empty, images exactly at `point`. Over `limit` bytes the journal starts anew.
    pub fn new(point: Point, limit: u64) -> Self {
        Self {
            limit,
            entries: VecDeque::new(),
            synced: 0,
            appended: 0,
            journal_bytes: 0,
            committed: point,
            durable: point,
            applied: point,
            hurry: false,
            finishing: false,
        }
    }

    /// An epoch is committed. `record` is the size of its record in bytes and whether it holds a flush; `None` when nothing happened to disks.
    ///
    /// # Panics
    /// When it does not follow the last.
    pub fn commit(&mut self, point: Point, record: Option<(u64, bool)>, now: Duration) {
        assert!(point > self.committed, "{point:?} after {:?}", self.committed);
        self.committed = point;
        if let Some((bytes, flushed)) = record {
            self.entries.push_back(Entry { point, bytes, flushed, since: now });
        }
    }

    /// Sync what is there now, without waiting for more: the peer has fallen silent.
    pub fn hurry(&mut self) {
        self.hurry = true;
    }

    /// No more will come: everything goes through.
    pub fn finish(&mut self) {
        self.finishing = true;
    }

    /// The order that is due now.
    pub fn next(&self, now: Duration) -> Option<Order> {
        let unsynced = self.appended > self.synced;
        if self.journal_bytes > self.limit {
            // The rest waits in RAM, where it counts in the backlog.
            return Some(match (unsynced, self.synced) {
                (true, _) => Order::Sync,
                (false, 0) => Order::Retire(self.applied),
                (false, _) => Order::Apply,
            });
        }
        if self.entries.len() > self.appended {
            return Some(Order::Append);
        }
        if unsynced && (self.finishing || self.hurry || self.sync_is_due(now)) {
            return Some(Order::Sync);
        }
        (self.synced > 0).then_some(Order::Apply)
    }

    fn unsynced(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().take(self.appended).skip(self.synced)
    }

    fn sync_is_due(&self, now: Duration) -> bool {
        let mut bytes = 0_u64;
        self.unsynced().any(|entry| {
            bytes = bytes.saturating_add(entry.bytes);
            entry.flushed || bytes >= SYNC_BYTES || now >= entry.since + SYNC_AFTER
        })
    }

    /// When [`Self::next`] will have an order that it does not have now, if nothing else happens.
    pub fn deadline(&self) -> Option<Duration> {
        self.unsynced().next().map(|entry| entry.since + SYNC_AFTER)
    }

    /// A record was added; the journal has so many bytes.
    ///
    /// # Panics
    /// When none was due.
    pub fn appended(&mut self, journal_bytes: u64) {
        assert!(self.appended < self.entries.len(), "what was added was committed");
        self.appended += 1;
        self.journal_bytes = journal_bytes;
    }

    /// The journal was synced after the last record was added.
    pub fn synced(&mut self) {
        self.synced = self.appended;
        self.hurry = false;
        if let Some(last) = self.synced.checked_sub(1).and_then(|at| self.entries.get(at)) {
            self.durable = last.point;
        }
    }

    /// A record was applied.
    ///
    /// # Panics
    /// When none was due.
    pub fn applied(&mut self) {
        assert!(self.synced > 0, "only what is on stable storage is applied");
        let entry = self.entries.pop_front().expect("as many as are synced");
        self.applied = entry.point;
        (self.synced, self.appended) = (self.synced - 1, self.appended - 1);
    }

    /// The journal has started anew.
    ///
    /// # Panics
    /// When something in it was not applied.
    pub fn retired(&mut self) {
        assert!(self.appended == 0, "what was in the journal is applied");
        self.journal_bytes = 0;
    }

    /// Through this epoch everything may be acknowledged, as far as disks are concerned.
    pub fn ackable(&self) -> Epoch {
        let waiting = self.entries.iter().skip(self.synced).find(|entry| entry.flushed);
        waiting.map_or(self.committed.epoch, |entry| Epoch(entry.point.epoch.0 - 1))
    }

    /// What images and journal would be recovered to after a power cut now. Later epochs without changes of disks do not count.
    pub fn durable(&self) -> Point {
        self.durable
    }

    /// The last committed epoch.
    pub fn committed(&self) -> Point {
        self.committed
    }

    /// Whether everything that is committed is applied.
    pub fn is_drained(&self) -> bool {
        self.entries.is_empty()
    }

    /// Records in the journal and not applied.
    pub fn in_journal(&self) -> usize {
        self.appended
    }
}

#[cfg(test)]
mod tests {
    use primary::disk::Generation;
    use proptest::prelude::*;

    use super::*;

    fn point(epoch: u64) -> Point {
        Point { generation: Generation(1), epoch: Epoch(epoch) }
    }

    const LIMIT: u64 = 1000;

    #[test]
    fn a_flush_is_synced_at_once_and_acknowledged_then() {
        let mut flow = Flow::new(point(0), LIMIT);
        let now = Duration::from_secs(5);
        flow.commit(point(1), Some((10, false)), now);
        assert_eq!((flow.next(now), flow.ackable()), (Some(Order::Append), Epoch(1)));
        flow.appended(10);
        assert_eq!((flow.next(now), flow.deadline()), (None, Some(now + SYNC_AFTER)));
        flow.commit(point(2), None, now);
        flow.commit(point(3), Some((0, true)), now);
        flow.commit(point(4), Some((10, false)), now);
        assert_eq!(flow.ackable(), Epoch(2));
        for _ in 0..2 {
            assert_eq!(flow.next(now), Some(Order::Append));
            flow.appended(20);
        }
        assert_eq!((flow.next(now), flow.ackable(), flow.durable()), (Some(Order::Sync), Epoch(2), point(0)));
        flow.synced();
        assert_eq!((flow.next(now), flow.ackable(), flow.durable()), (Some(Order::Apply), Epoch(4), point(4)));
    }

    #[test]
    fn without_a_flush_time_bytes_or_hurry_bring_the_sync() {
        let begun = |bytes| {
            let mut flow = Flow::new(point(0), u64::MAX);
            flow.commit(point(1), Some((bytes, false)), Duration::ZERO);
            flow.appended(bytes);
            flow
        };
        let mut flow = begun(1);
        let just = SYNC_AFTER.saturating_sub(Duration::from_nanos(1));
        assert_eq!((flow.next(just), flow.next(SYNC_AFTER)), (None, Some(Order::Sync)));
        flow.hurry();
        assert_eq!(flow.next(just), Some(Order::Sync));
        assert_eq!(begun(SYNC_BYTES).next(just), Some(Order::Sync));
        let mut flow = begun(1);
        flow.finish();
        assert_eq!(flow.next(just), Some(Order::Sync));
    }

    /// What has become of records, kept apart from the flow.
    #[derive(Default)]
    struct Seen {
        records: Vec<(u64, u64)>,
        added: usize,
        synced: usize,
        applied: usize,
        journal: u64,
    }

    impl Seen {
        fn run(&mut self, flow: &mut Flow, now: Duration, most: usize) {
            for _ in 0..most {
                match flow.next(now) {
                    None => return,
                    Some(Order::Append) => {
                        assert!(self.journal <= LIMIT);
                        self.journal += self.records[self.added].1;
                        self.added += 1;
                        flow.appended(self.journal);
                    }
                    Some(Order::Sync) => {
                        self.synced = self.added;
                        flow.synced();
                    }
                    Some(Order::Apply) => {
                        assert!(self.applied < self.synced);
                        self.applied += 1;
                        flow.applied();
                    }
                    Some(Order::Retire(at)) => {
                        assert!(self.applied == self.added && self.journal > LIMIT);
                        assert_eq!(at, point(self.records[self.applied - 1].0));
                        self.journal = 0;
                        flow.retired();
                    }
                }
            }
        }
    }

    proptest! {
        /// Whatever comes when: order is kept, nothing is applied or retired too early, acknowledged flushes are durable, and it drains.
        #[test]
        fn records_go_their_way(steps in prop::collection::vec((0_u8..8, 0_u64..600), 1..200)) {
            let mut flow = Flow::new(point(0), LIMIT);
            let (mut now, mut epoch, mut flushes, mut seen) = (Duration::ZERO, 0, Vec::new(), Seen::default());
            for (what, number) in steps {
                match what {
                    0..=3 => {
                        epoch += 1;
                        if what != 0 {
                            seen.records.push((epoch, number));
                        }
                        if what == 1 {
                            flushes.push(epoch);
                        }
                        flow.commit(point(epoch), (what != 0).then_some((number, what == 1)), now);
                    }
                    4..=5 => seen.run(&mut flow, now, usize::try_from(number % 7).unwrap()),
                    6 => now += Duration::from_millis(number),
                    _ => flow.hurry(),
                }
                let ackable = flow.ackable();
                let on_disk = seen.synced.checked_sub(1).map_or(0, |at| seen.records[at].0);
                prop_assert!(ackable <= Epoch(epoch));
                prop_assert_eq!(flow.durable(), point(on_disk));
                for flush in &flushes {
                    prop_assert!(Epoch(*flush) > ackable || *flush <= on_disk, "flush {} acknowledged, {} durable", flush, on_disk);
                }
            }
            flow.finish();
            seen.run(&mut flow, now, usize::MAX);
            prop_assert!(flow.is_drained() && seen.applied == seen.records.len());
            prop_assert_eq!(flow.ackable(), Epoch(epoch));
        }
    }
}
