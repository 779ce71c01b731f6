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

/// Bytes of pages that one thread copies about as fast as several, which must be started first.
const ALONE_BYTES: usize = 8 << 20;
/// More threads than this copy no faster: memory is the limit.
const COPIERS_MOST: usize = 4;
/// Neighbouring pages that the same thread copies.
const STRETCH_PAGES: u64 = 64;

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
    let mut memory = StandbyMemory::with_copiers(copiers());
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

/// How many threads copy a large checkpoint. One processor is left to the link, whose acknowledgements outputs wait for: with two processors, one thread copies.
fn copiers() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.saturating_sub(1).clamp(1, COPIERS_MOST)
}

/// What the standby's memory holds. Pure but for the memory itself, and for the threads that help to copy.
#[derive(Debug)]
pub struct StandbyMemory {
    last: Option<Applied>,
    copiers: usize,
}

impl Default for StandbyMemory {
    fn default() -> Self {
        Self::with_copiers(1)
    }
}

impl StandbyMemory {
    /// Large checkpoints are copied by so many threads.
    ///
    /// # Panics
    /// Without any.
    pub fn with_copiers(copiers: usize) -> Self {
        assert!(copiers > 0, "somebody copies");
        Self { last: None, copiers }
    }

    /// Writes pages of a base that is not committed.
    pub fn apply_hollow(&mut self, ram: &GuestRam, batch: &PageBatch) {
        self.last = None;
        apply_batches(ram, std::slice::from_ref(batch), 1);
    }

    /// Writes a committed checkpoint. Returns the bytes of its pages.
    pub fn apply(&mut self, ram: &GuestRam, committed: Committed) -> usize {
        let bytes = committed.page_bytes();
        apply_batches(ram, &committed.pages, if bytes > ALONE_BYTES { self.copiers } else { 1 });
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

/// Copies pages in, by `copiers` threads of which this is one. When it returns, all is in memory: what comes later is copied later.
fn apply_batches(ram: &GuestRam, batches: &[PageBatch], copiers: usize) {
    let all = 1.max(u64::try_from(copiers).unwrap_or(1));
    std::thread::scope(|scope| {
        let helpers = (1..all).map(|number| {
            let helper = std::thread::Builder::new().name(format!("ft-apply-{number}"));
            helper.spawn_scoped(scope, move || apply_share(ram, batches, number, all)).map_err(|error| (number, error))
        });
        // Collected, so that all of them are at work before this thread is.
        let helpers: Vec<_> = helpers.collect();
        apply_share(ram, batches, 0, all);
        for (number, error) in helpers.into_iter().filter_map(Result::err) {
            log::warn!("no thread to copy pages with: {error}");
            apply_share(ram, batches, number, all);
        }
    });
}

/// The share of one thread of `all`: stretches of memory, so that a page that comes twice is copied by the same thread, in order.
fn apply_share(ram: &GuestRam, batches: &[PageBatch], number: u64, all: u64) {
    for batch in batches {
        let (pages, rest) = batch.bytes.as_chunks::<PAGE_SIZE>();
        assert!(rest.is_empty() && pages.len() == batch.indexes.len(), "a batch of whole pages");
        for (index, page) in batch.indexes.iter().zip(pages) {
            if all == 1 || index.0 / STRETCH_PAGES % all == number {
                // The receiver refused every index outside the RAM that both sides agreed on.
                ram.copy_in(PageNo(index.0), page).expect("page indexes are checked when they arrive");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replication_proto::{CheckpointKind, DiskChanges, PageIndex};
    use std::time::{Duration, Instant};

    fn batch(indexes: &[u64], fill: impl Fn(u64) -> u8) -> PageBatch {
        let bytes: Vec<u8> = indexes.iter().flat_map(|page| vec![fill(*page); PAGE_SIZE]).collect();
        PageBatch { indexes: indexes.iter().map(|page| PageIndex(*page)).collect(), bytes: bytes.into() }
    }

    fn checkpoint(epoch: u64, pages: Vec<PageBatch>) -> Committed {
        let (disk, kind) = (DiskChanges::default(), CheckpointKind::Delta);
        Committed { epoch: Epoch(epoch), pages, sections: Vec::new(), disk, kind }
    }

    fn first_byte(ram: &GuestRam, page: u64) -> u8 {
        let mut bytes = [0; PAGE_SIZE];
        ram.copy_out(PageNo(page), &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is torn");
        bytes[0]
    }

    #[test]
    fn a_later_copy_of_a_page_wins_however_many_copy() {
        const PAGES: u64 = 4096;
        let all: Vec<u64> = (0..PAGES).collect();
        let backwards: Vec<u64> = (0..PAGES).rev().filter(|page| page % 3 == 0).collect();
        let low = |page: u64| u8::try_from(page % 251).unwrap();
        for copiers in [1, 2, 3, 4] {
            let ram = GuestRam::new(PAGES << 12).unwrap();
            let mut memory = StandbyMemory::with_copiers(copiers);
            for round in 0..5 {
                // Twice within a checkpoint, and again in the next.
                let first = batch(&all, |_| 255);
                let second = batch(&backwards, |page| low(page) ^ round);
                let bytes = memory.apply(&ram, checkpoint(u64::from(round) + 1, vec![first, second]));
                assert!(bytes > ALONE_BYTES);
            }
            for page in 0..PAGES {
                let expected = if page % 3 == 0 { low(page) ^ 4 } else { 255 };
                assert_eq!(first_byte(&ram, page), expected, "{copiers} copiers, page {page}");
            }
            assert_eq!(memory.into_applied().map(|applied| applied.epoch), Some(Epoch(5)));
        }
    }

    /// The way into memory costs little beside the copy itself. With `--nocapture` it says what a page takes, by each number of threads.
    #[test]
    fn pages_are_applied_at_about_the_speed_of_a_bare_copy() {
        const PAGES: u64 = 16_384;
        let ram = GuestRam::new(PAGES << 12).unwrap();
        let indexes: Vec<u64> = (0..PAGES).collect();
        let source = batch(&indexes, |page| u8::try_from(page % 256).unwrap());
        let mut bare = vec![0_u8; source.bytes.len()];
        let best = |work: &mut dyn FnMut()| {
            let times = (0..7).map(|_| {
                let began = Instant::now();
                work();
                began.elapsed()
            });
            times.min().unwrap_or(Duration::MAX) / u32::try_from(PAGES).unwrap()
        };
        let copied = best(&mut || {
            for (into, from) in bare.chunks_exact_mut(PAGE_SIZE).zip(source.bytes.chunks_exact(PAGE_SIZE)) {
                into.copy_from_slice(from);
            }
            std::hint::black_box(&mut bare);
        });
        let applied = [1, 2, 4].map(|copiers| {
            let work = &mut || apply_batches(&ram, std::slice::from_ref(&source), copiers);
            best(work)
        });
        println!("a page: {copied:?} bare, {applied:?} applied by 1, 2 and 4 threads");
        assert!(applied[0] < 3 * copied + Duration::from_micros(1), "{copied:?} bare, {applied:?} applied");
    }
}
