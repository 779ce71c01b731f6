//! One host of the explored disks: its files, and the process that has them open.

use std::hash::Hash;
use std::time::Duration;

use backup::commit::Commits;
use backup::inbox::Inbox;
use backup::intake::Stable;
use primary::disk::copy::DiskCopy;
use primary::disk::{DiskChanges, Epoch, Generation, Point};
use replication_proto::{CheckpointKind, EndOfCheckpoint, EpochDigest, Incarnation};
use vmm::disk::Disk;

use super::ghost::Snapshot;
use crate::explore::world::print_of;
use crate::world::keeper::{Keeper, Told};
use crate::world::storage::{HostFiles, OpenDisks};

/// Sectors of a piece.
pub const SECTORS: usize = 8;
/// The pieces that the guest changes, both in one block of the maps.
pub const PIECES: [usize; 2] = [0, 1];
/// Bytes of the image: small, for each state is lived through from the beginning.
pub const IMAGE_BYTES: u64 = 8 << 10;

/// What the owner does for its backup.
pub enum Session {
    /// The base is under way, which this epoch will end.
    Copying(Epoch, DiskCopy),
    /// One epoch after another.
    Epochs,
}

/// The side that runs the guest.
pub struct Owner {
    /// The files.
    pub disks: OpenDisks,
    /// Of its right to run.
    pub generation: u64,
    /// The last epoch that ended.
    pub last: u64,
    /// Protection.
    pub session: Option<Session>,
    /// First epoch since outputs are held; none: they leave at once.
    pub held_since: Option<u64>,
    /// Acknowledgements release.
    pub trusted: bool,
    /// What the guest knew at the end of each epoch whose outputs are held.
    pub held: Vec<(u64, Snapshot)>,
    /// The other side holds this on stable storage, and bits may go.
    pub durable: Option<Point>,
    /// When that was looked at last.
    pub looked: Duration,
    /// What is due before the first change is not done.
    pub unprepared: bool,
}

/// The side that waits.
pub struct Waiter {
    /// The files.
    pub disks: OpenDisks,
    /// The real turn of the disks' thread.
    pub keeper: Keeper,
    /// The real rule which acknowledgements are due.
    pub commits: Commits,
    /// What it could run from.
    pub holding: Option<Point>,
    /// The real rule what of this connection is on stable storage, and what the owner was told of it.
    pub stable: Stable,
}

/// What runs on a host.
pub enum Process {
    /// Nothing.
    Off,
    /// The guest.
    Owner(Box<Owner>),
    /// A standby.
    Waiting(Box<Waiter>),
}

/// A host.
pub struct Node {
    /// What survives.
    pub files: HostFiles,
    /// What does not.
    pub process: Process,
    /// Lives so far.
    pub life: u8,
    /// All that the process's state follows from: its files when it began, and what it did and heard since.
    pub print: u128,
}

impl Node {
    /// A host that was never used.
    pub fn new(journal_bytes: u64) -> Self {
        let files = HostFiles::of_size(IMAGE_BYTES, journal_bytes, false);
        let print = files.print();
        Self { files, process: Process::Off, life: 0, print }
    }

    /// The process does something.
    pub fn note(&mut self, what: impl Hash) {
        self.print = print_of(&(self.print, what));
    }

    /// The process is gone.
    pub fn off(&mut self) {
        self.process = Process::Off;
        self.print = self.files.print();
    }

    /// The owner.
    pub fn owner(&self) -> Option<&Owner> {
        if let Process::Owner(owner) = &self.process { Some(owner) } else { None }
    }

    /// The owner.
    pub fn owner_mut(&mut self) -> Option<&mut Owner> {
        if let Process::Owner(owner) = &mut self.process { Some(owner) } else { None }
    }

    /// The side that waits.
    pub fn waiter(&self) -> Option<&Waiter> {
        if let Process::Waiting(waiter) = &self.process { Some(waiter) } else { None }
    }

    /// The side that waits.
    pub fn waiter_mut(&mut self) -> Option<&mut Waiter> {
        if let Process::Waiting(waiter) = &mut self.process { Some(waiter) } else { None }
    }

    /// A new process opens the files.
    ///
    /// # Errors
    /// They are refused.
    pub fn open(&mut self) -> Result<OpenDisks, String> {
        self.life += 1;
        self.files.open(Incarnation(u128::from(self.life)))
    }
}

impl Owner {
    /// The guest is about to run on these files.
    pub fn new(disks: OpenDisks, generation: u64, last: u64, unprepared: bool) -> Self {
        Self {
            disks,
            generation,
            last,
            session: None,
            held_since: None,
            trusted: false,
            held: Vec::new(),
            durable: None,
            looked: Duration::ZERO,
            unprepared,
        }
    }

    /// What the guest's device works on.
    pub fn disk(&self) -> std::sync::Arc<dyn Disk> {
        self.disks.for_machine()
    }

    /// A point of this right to run.
    pub fn point(&self, epoch: u64) -> Point {
        Point { generation: Generation(self.generation), epoch: Epoch(epoch) }
    }
}

impl Waiter {
    /// A standby that holds nothing.
    pub fn new(mut disks: OpenDisks) -> Self {
        let (waiting, journal) = disks.waiting.take().expect("just opened");
        let keeper = Keeper::new(waiting, journal, disks.journal_bytes);
        Self { disks, keeper, commits: Commits::new(usize::MAX), holding: None, stable: Stable::default() }
    }

    /// A checkpoint arrived whole.
    ///
    /// # Errors
    /// It is refused.
    pub fn commit(&mut self, point: Point, kind: CheckpointKind, changes: &DiskChanges) -> Result<(), String> {
        let mut inbox = Inbox::new(1 << 20);
        let mut digest = EpochDigest::new(point.epoch, kind);
        inbox.begin(point.epoch, kind).map_err(|e| e.to_string())?;
        for change in &changes.changes {
            digest.disk(change);
            if let backup::inbox::Destination::Hollow(change) = inbox.disk(change.clone()).map_err(|e| e.to_string())? {
                self.keeper.apply_hollow(change);
            }
        }
        let end = EndOfCheckpoint {
            epoch: point.epoch,
            kind,
            pages: 0,
            sections: 0,
            disk_changes: u64::try_from(changes.changes.len()).expect("few"),
            flushed: changes.flushed,
            digest: digest.finish(),
        };
        let arrived = inbox.take().map_err(|e| e.to_string())?;
        let committed = self.commits.commit(arrived, &end).map_err(|e| e.to_string())?;
        self.keeper.apply(point, kind, committed.disk);
        self.holding = Some(point);
        Ok(())
    }

    /// The disks' thread does the next thing.
    pub fn turn(&mut self, now: Duration) -> Vec<Told> {
        let mut told = Vec::new();
        self.keeper.turn(now, &mut told);
        told
    }
}
