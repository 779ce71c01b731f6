//! The standby: a machine that was built like the primary's and never ran, and the thread that applies committed checkpoints to its
//! memory, in order. It cannot run; only [`crate::activate`] turns it into something that can.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded};
use failover::failpoint;
use primary::verify::{Part, VERIFY_SECTION, hash_memory, read_hashes};
use replication_proto::{Comparable, Epoch, PieceHashes, PiecesWanted, Verified, piece_hash};
use vmm::{GuestRam, Machine, PAGE_SIZE, PageNo, Section};

use crate::commit::Committed;
use crate::inbox::PageBatch;
use crate::intake::Question;

/// Pieces that wait for the applier before whoever sends them waits too.
const PIECES_WAITING_MAX: usize = 64;

/// A machine that never ran.
pub struct Standby {
    machine: Box<dyn Machine>,
}

/// Hands pages to the standby's memory.
#[derive(Clone)]
pub struct Applier {
    jobs: Sender<Job>,
}

/// The applier's thread; it ends when every [`Applier`] is dropped and all is applied.
pub struct ApplierThread {
    handle: JoinHandle<Option<Applied>>,
}

/// The machine state that the standby's memory goes with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// End of this epoch.
    pub epoch: Epoch,
    /// Everything but memory.
    pub sections: Vec<Section>,
}

enum Job {
    Hollow(PageBatch),
    Compare(Question, PieceHashes),
    Checkpoint(Committed),
}

/// What the applier did.
#[derive(Debug)]
pub enum AppliedNews {
    /// So many bytes of committed pages are in.
    Bytes(usize),
    /// Which pages differ from what the primary has.
    Compared(Question, PiecesWanted),
    /// What a comparison of both sides as of the end of this epoch found.
    Verified(Epoch, Verified),
}

impl Standby {
    /// Takes a machine that was just built.
    pub fn new(machine: Box<dyn Machine>) -> Self {
        Self { machine }
    }

    /// The machine, for its facts and its RAM's layout.
    pub fn machine(&self) -> &dyn Machine {
        &*self.machine
    }

    /// Starts applying. `tell` is called on the applier's thread.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start_applier(&self, tell: impl Fn(AppliedNews) + Send + 'static) -> io::Result<(Applier, ApplierThread)> {
        let (jobs, inbox) = bounded(PIECES_WAITING_MAX);
        let ram = Arc::clone(self.machine.ram());
        let handle =
            std::thread::Builder::new().name("ft-apply".into()).spawn(move || apply_all(&ram, &inbox, &tell))?;
        Ok((Applier { jobs }, ApplierThread { handle }))
    }

    /// The machine, to be activated.
    pub fn into_machine(self) -> Box<dyn Machine> {
        self.machine
    }
}

impl Applier {
    /// Pages of a base that is not committed: the standby is hollow.
    pub fn apply_hollow(&self, pages: PageBatch) {
        self.send(Job::Hollow(pages));
    }

    /// A committed checkpoint.
    pub fn apply(&self, committed: Committed) {
        self.send(Job::Checkpoint(committed));
    }

    /// Which of these pages differ, after all that was handed over before.
    pub fn compare(&self, question: Question, ask: PieceHashes) {
        self.send(Job::Compare(question, ask));
    }

    fn send(&self, job: Job) {
        assert!(self.jobs.send(job).is_ok(), "the applier ends only after its last sender");
    }
}

impl ApplierThread {
    /// Waits until everything handed over is applied. All [`Applier`]s must have been dropped. `None`: no checkpoint was ever committed.
    pub fn finish(self) -> Option<Applied> {
        self.handle.join().expect("the applier does not panic")
    }
}

fn apply_all(ram: &GuestRam, jobs: &Receiver<Job>, tell: &impl Fn(AppliedNews)) -> Option<Applied> {
    let mut memory = StandbyMemory::default();
    for job in jobs {
        match job {
            Job::Hollow(batch) => memory.apply_hollow(ram, &batch),
            Job::Compare(question, ask) => tell(AppliedNews::Compared(question, compare(ram, &ask))),
            Job::Checkpoint(mut committed) => {
                failpoint!(ApplyBefore);
                let (epoch, hashes) = (committed.epoch, take_hashes(&mut committed));
                let bytes = memory.apply(ram, committed);
                failpoint!(ApplyAfter);
                tell(AppliedNews::Bytes(bytes));
                if let Some(found) = hashes.and_then(|hashes| verify(ram, &hashes)) {
                    tell(AppliedNews::Verified(epoch, found));
                }
            }
        }
    }
    memory.into_applied()
}

/// Takes out of a checkpoint what is to be compared once it is applied. It is no part of the machine's state.
pub fn take_hashes(committed: &mut Committed) -> Option<PieceHashes> {
    let at = committed.sections.iter().position(|section| section.kind == VERIFY_SECTION)?;
    let section = committed.sections.remove(at);
    // Who sends it unreadable waits in vain for the findings.
    read_hashes(&section).inspect_err(|error| log::warn!("{error}")).ok()
}

/// The same, if it is about a disk.
pub fn take_disk_hashes(committed: &mut Committed) -> Option<PieceHashes> {
    let section = committed.sections.iter().find(|section| section.kind == VERIFY_SECTION)?;
    read_hashes(section).ok().filter(|hashes| hashes.of != Comparable::Memory)?;
    take_hashes(committed)
}

/// Compares memory with the primary's hashes of it, both as of the same epoch. `None` for what is not memory.
pub fn verify(ram: &GuestRam, hashes: &PieceHashes) -> Option<Verified> {
    let count = u64::try_from(hashes.hashes.len()).ok()?;
    let part = Part { of: hashes.of, first: hashes.first, count };
    hashes.first.checked_add(count)?;
    let ours = (hashes.of == Comparable::Memory).then(|| hash_memory(ram, part).ok()).flatten()?;
    Some(primary::verify::compare(hashes, &ours))
}

/// What the standby's memory holds. Pure but for the memory itself.
#[derive(Debug, Default)]
pub struct StandbyMemory {
    last: Option<Applied>,
}

impl StandbyMemory {
    /// Writes pages of a base that is not committed.
    pub fn apply_hollow(&mut self, ram: &GuestRam, batch: &PageBatch) {
        self.last = None;
        apply_batch(ram, batch);
    }

    /// Writes a committed checkpoint. Returns the bytes of its pages.
    pub fn apply(&mut self, ram: &GuestRam, committed: Committed) -> usize {
        let bytes = committed.page_bytes();
        committed.pages.iter().for_each(|batch| apply_batch(ram, batch));
        self.last = Some(Applied { epoch: committed.epoch, sections: committed.sections });
        bytes
    }

    /// The machine state that the memory goes with. `None`: no checkpoint was ever committed.
    pub fn into_applied(self) -> Option<Applied> {
        self.last
    }
}

/// Which of these pages differ from what memory holds now, whatever that is: equal content is equal, wherever it came from.
pub fn compare(ram: &GuestRam, ask: &PieceHashes) -> PiecesWanted {
    let mut page = [0; PAGE_SIZE];
    let differs = |(index, hash): (u64, &u128)| {
        // The receiver refused every index outside the RAM that both sides agreed on.
        ram.copy_out(PageNo(index), &mut page).expect("page indexes are checked when they arrive");
        piece_hash(&page) != *hash
    };
    PiecesWanted { of: ask.of, first: ask.first, wanted: (ask.first..).zip(&ask.hashes).map(differs).collect() }
}

fn apply_batch(ram: &GuestRam, batch: &PageBatch) {
    let (pages, rest) = batch.bytes.as_chunks::<PAGE_SIZE>();
    assert!(rest.is_empty() && pages.len() == batch.indexes.len(), "a batch of whole pages");
    for (index, page) in batch.indexes.iter().zip(pages) {
        // The receiver refused every index outside the RAM that both sides agreed on.
        ram.copy_in(PageNo(index.0), page).expect("page indexes are checked when they arrive");
    }
}
