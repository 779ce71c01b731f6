//! Carries out the flow's orders on journal, images and maps. No thread of its own, no clock.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use primary::disk::blocks::{blocks_of, touched_by};
use primary::disk::recover::{Recoverable, apply};
use primary::disk::{DiskChange, DiskChanges, DiskContent, Epoch, Generation, Journal, JournalError, Point, Record};
use vmm::disk::{ByteRange, Disk};

use super::flow::{Flow, Order};

/// While hollow, bits are set for so many blocks at once (16 MiB; in tests few, so that their small disks have blocks without bits).
const RAISED_AT_ONCE: u64 = if cfg!(test) { 2 } else { 256 };

/// Why nothing more is acknowledged.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// An image or its map. The standby is hollow if a committed change is not in the image.
    #[error("disk {disk}: {what}: {source}")]
    Disk {
        /// Its number.
        disk: u8,
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// It failed before, or there is nothing whole to run from.
    #[error("the disks failed before or are being synchronised")]
    Unusable,
}

/// What the images hold while they are this worker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// With the journal, exactly a point.
    Exact,
    /// Being synchronised: what the maps say.
    Hollow,
}

/// See the module.
pub struct Worker {
    disks: Vec<Recoverable>,
    images: Vec<Arc<dyn Disk>>,
    journal: Journal,
    limit: u64,
    flow: Flow,
    standing: Standing,
    /// Committed and not applied, in the flow's order.
    records: VecDeque<Record>,
    /// The journal can take no more; what is committed is still here.
    journal_failed: bool,
    /// A committed change is in no image, or may not be: the standby is hollow.
    lost: bool,
}

/// What is due before the first change of a guest that was activated here.
pub struct Retire {
    disks: Vec<Recoverable>,
    journal: Journal,
    limit: u64,
    point: Point,
}

impl Retire {
    /// The images are synced, then the maps say what they hold, then the journal is empty.
    ///
    /// # Errors
    /// The host's.
    pub fn run(mut self) -> io::Result<()> {
        retire(&self.disks, &mut self.journal, self.limit, self.point).map_err(io::Error::other)
    }

    /// What the images hold.
    pub fn point(&self) -> Point {
        self.point
    }
}

/// In this order: after a power cut in the middle, the journal is applied again to images that hold its effects already.
fn retire(disks: &[Recoverable], journal: &mut Journal, limit: u64, point: Point) -> Result<(), SinkError> {
    for (number, disk) in disks.iter().enumerate() {
        disk.map.reset(point).map_err(|source| failed(number, "its image cannot be synced, or its map", source))?;
    }
    journal.restart(limit)?;
    Ok(())
}

/// After some records went into the images beside the journal, behind bits; `journaled` is what the journal leads to. The journal is emptied
/// while the bits still stand: applied once more, it would undo what has none. And before that, the maps must not rely on it any more.
fn retire_beside(
    disks: &[Recoverable],
    journal: &mut Journal,
    limit: u64,
    (journaled, point): (Point, Point),
) -> Result<(), SinkError> {
    for (number, disk) in disks.iter().enumerate() {
        let based = disk.image.flush().and_then(|()| disk.map.set_base(Some(journaled)));
        based.map_err(|source| failed(number, "its image cannot be synced, or its map", source))?;
    }
    journal.restart(limit)?;
    retire(disks, journal, limit, point)
}

fn failed(number: usize, what: &'static str, source: io::Error) -> SinkError {
    SinkError::Disk { disk: u8::try_from(number).unwrap_or(u8::MAX), what, source }
}

impl Worker {
    /// Images, maps and journal as [`primary::disk::recover`] left them. Hollow until [`Self::based`].
    /// Over `limit` bytes the journal starts anew.
    pub fn new(disks: Vec<Recoverable>, journal: Journal, limit: u64) -> Self {
        let images = disks.iter().map(|disk| Arc::clone(&disk.image)).collect();
        let flow = Flow::new(Point { generation: Generation(0), epoch: Epoch(0) }, limit);
        Self {
            disks,
            images,
            journal,
            limit,
            flow,
            standing: Standing::Hollow,
            records: VecDeque::new(),
            journal_failed: false,
            lost: false,
        }
    }

    /// The images.
    pub fn images(&self) -> &[Arc<dyn Disk>] {
        &self.images
    }

    /// What may be acknowledged, and what is on stable storage.
    pub fn flow(&self) -> &Flow {
        &self.flow
    }

    /// Bytes of changes that are committed and not applied, as [`Self::step`] counts them.
    pub fn waiting_bytes(&self) -> usize {
        self.records.iter().map(Record::weight).sum()
    }

    /// Whether a committed change is lost: such a standby must not be activated.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Whether a further epoch can follow what is committed: nothing of that is lost.
    pub fn takes_commits(&self) -> bool {
        self.standing == Standing::Exact && !self.lost
    }

    /// A synchronisation begins: what is committed goes into the images and the journal is retired, so that images may be changed beside it. A
    /// journal that failed is passed over; when a committed change is lost, the maps know nothing from here on.
    ///
    /// # Errors
    /// See [`SinkError`].
    pub fn hollow(&mut self) -> Result<(), SinkError> {
        if self.standing == Standing::Hollow {
            return Ok(());
        }
        if !self.lost {
            let point = self.drain()?;
            self.retire_at(point)?;
        } else {
            for (number, disk) in self.disks.iter().enumerate() {
                disk.map.set_base(None).map_err(|source| failed(number, "its map cannot be written", source))?;
            }
            self.records.clear();
            self.journal.restart(self.limit)?;
        }
        (self.standing, self.flow) = (Standing::Hollow, Flow::new(self.flow.committed(), self.limit));
        (self.journal_failed, self.lost) = (false, false);
        Ok(())
    }

    /// While hollow: a change goes straight into an image, behind the bits of its blocks.
    ///
    /// # Errors
    /// The host's, or the change is in no disk.
    ///
    /// # Panics
    /// When the images are exact.
    pub fn put(&mut self, change: &DiskChange) -> Result<(), SinkError> {
        assert!(self.standing == Standing::Hollow, "an exact image is changed through the journal only");
        self.put_marked(change)
    }

    fn put_marked(&self, change: &DiskChange) -> Result<(), SinkError> {
        let number = usize::from(change.disk);
        let len = match &change.content {
            DiskContent::Bytes(bytes) => u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            DiskContent::Zeros(len) => *len,
        };
        let range = ByteRange { offset: change.offset, len };
        let disk = self.disks.get(number).filter(|disk| range.end() <= disk.image.bytes());
        let disk = disk.ok_or_else(|| failed(number, "a change outside of it", io::ErrorKind::InvalidData.into()))?;
        // A map that knows nothing of its image needs no bits.
        if disk.map.base().is_some() {
            let mut blocks = touched_by(range);
            if self.standing == Standing::Hollow {
                // Neighbours follow as a rule: a sync for each block would take longer than the synchronisation.
                blocks.start -= blocks.start % RAISED_AT_ONCE;
                blocks.end = blocks.end.next_multiple_of(RAISED_AT_ONCE).min(blocks_of(disk.image.bytes()));
            }
            disk.map.raise(blocks).map_err(|source| failed(number, "its map cannot be written", source))?;
        }
        apply(&self.images, change).map_err(|source| failed(number, "its image cannot be written", source))
    }

    /// The synchronisation is committed: the images hold exactly `point`. On stable storage when it returns, before anything is acknowledged.
    ///
    /// # Errors
    /// See [`SinkError`]; still hollow then.
    ///
    /// # Panics
    /// When the images are exact.
    pub fn based(&mut self, point: Point) -> Result<(), SinkError> {
        assert!(self.standing == Standing::Hollow, "a base follows nothing");
        retire(&self.disks, &mut self.journal, self.limit, point)?;
        (self.standing, self.flow) = (Standing::Exact, Flow::new(point, self.limit));
        Ok(())
    }

    /// An epoch is committed. Its changes were checked against the sizes of the disks when they came.
    ///
    /// # Panics
    /// While hollow.
    pub fn commit(&mut self, point: Point, changes: DiskChanges, now: Duration) {
        assert!(self.standing == Standing::Exact, "deltas follow a base");
        let DiskChanges { changes, flushed } = changes;
        if changes.is_empty() && !flushed {
            return self.flow.commit(point, None, now);
        }
        let record = Record { point, flushed, changes };
        self.flow.commit(point, Some((u64::try_from(record.weight()).unwrap_or(u64::MAX), flushed)), now);
        self.records.push_back(record);
    }

    /// The peer is silent: what is in the journal is synced now, while somebody else decides what follows.
    pub fn hurry(&mut self) {
        self.flow.hurry();
    }

    /// Carries out one order, if one is due. Hands back the bytes of a record that was applied, or 0; `None` when nothing is due.
    ///
    /// # Errors
    /// See [`SinkError`]. Nothing more may be acknowledged then; [`Self::is_lost`] says whether what was acknowledged is still held.
    pub fn step(&mut self, now: Duration) -> Result<Option<usize>, SinkError> {
        if self.journal_failed || self.lost {
            return Err(SinkError::Unusable);
        }
        if self.standing == Standing::Hollow {
            return Ok(None);
        }
        let Some(order) = self.flow.next(now) else { return Ok(None) };
        match order {
            Order::Append => {
                let record = self.records.get(self.flow.in_journal()).expect("as many records as the flow has");
                let added = self.journal.append(record);
                self.journaled(added)?;
                self.flow.appended(self.journal.bytes());
            }
            Order::Sync => {
                let synced = self.journal.sync();
                self.journaled(synced)?;
                self.flow.synced();
            }
            Order::Apply => return self.apply_one().map(Some),
            Order::Retire(point) => {
                let retired = retire(&self.disks, &mut self.journal, self.limit, point);
                self.journal_failed |= retired.is_err();
                retired?;
                self.flow.retired();
            }
        }
        Ok(Some(0))
    }

    fn journaled(&mut self, result: Result<(), JournalError>) -> Result<(), SinkError> {
        self.journal_failed |= result.is_err();
        Ok(result?)
    }

    fn apply_one(&mut self) -> Result<usize, SinkError> {
        let record = self.records.front().expect("as many records as the flow has");
        for change in &record.changes {
            if let Err(source) = apply(&self.images, change) {
                // Old, new or a mixture; the journal still has it, for the next life of this process.
                self.lost = true;
                return Err(failed(change.disk.into(), "a committed change cannot be applied", source));
            }
        }
        let bytes = record.weight();
        self.flow.applied();
        self.records.pop_front();
        Ok(bytes)
    }

    /// Everything that is committed goes into the images: through the journal, or, when that failed, behind bits.
    fn drain(&mut self) -> Result<Point, SinkError> {
        let point = self.flow.committed();
        self.flow.finish();
        while !self.flow.is_drained() && !self.journal_failed {
            match self.step(Duration::MAX) {
                Ok(_) => {}
                Err(error) if self.journal_failed && !self.lost => log::warn!("going on without a journal: {error}"),
                Err(error) => return Err(error),
            }
        }
        while let Some(record) = self.records.pop_front() {
            for change in &record.changes {
                if let Err(error) = self.put_marked(change) {
                    self.lost = true;
                    return Err(error);
                }
            }
        }
        Ok(point)
    }

    /// Everything is drained.
    fn retire_at(&mut self, point: Point) -> Result<(), SinkError> {
        let Self { disks, journal, limit, .. } = self;
        if self.journal_failed {
            retire_beside(disks, journal, *limit, (self.flow.durable(), point))
        } else {
            retire(disks, journal, *limit, point)
        }
    }

    /// The guest is going to be booted anew: as [`Self::finish`], but a hollow standby's images will do, for the maps say what they hold.
    ///
    /// # Errors
    /// See [`SinkError`].
    pub fn finish_for_boot(self) -> Result<Option<Retire>, SinkError> {
        if self.standing == Standing::Hollow && !self.lost { Ok(None) } else { self.finish().map(Some) }
    }

    /// The standby is going to run: nothing is committed any more. When this returns, everything that is committed is in the images *and* on
    /// stable storage in the journal: the guest, and whom it talked to, may have been told of a flush in an epoch that was not acknowledged yet;
    /// and no image may hold what neither the journal nor a bit speaks of. Call [`Self::hurry`] before: then little is left to sync.
    ///
    /// What is handed back is due before the guest's first change.
    ///
    /// # Errors
    /// See [`SinkError`]: a standby whose disks are not whole does not run.
    pub fn finish(mut self) -> Result<Retire, SinkError> {
        if self.lost || self.standing == Standing::Hollow {
            return Err(SinkError::Unusable);
        }
        let point = self.drain()?;
        if self.journal_failed {
            // What is in the images is in no journal: it must be on stable storage before anybody relies on it.
            self.retire_at(point)?;
        }
        let Self { disks, images: _, journal, limit, flow: _, standing: _, records: _, journal_failed: _, lost: _ } =
            self;
        Ok(Retire { disks, journal, limit, point })
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
