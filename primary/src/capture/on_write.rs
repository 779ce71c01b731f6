//! Copied while the guest runs, before it writes (the idea of HotSnap's full snapshot): the pause write-protects the pages and ends; then a copier, which is
//! whoever took the checkpoint, copies one run after another, and a thread of its own serves whoever wants to write a page first.
//!
//! That thread must never wait for somebody who may wait for it: it takes no lock but the round's, which nobody holds who writes guest memory; it
//! writes none itself; it does not log. A page is let go only after its copy is complete. When a call fails, everything is let go at once, so that
//! no vCPU hangs, and the checkpoint is given up: its pages are dirty again.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vmm::write_protect::{PageRun, WriteProtect, WriteProtectError};
use vmm::{GuestRam, PageNo};

use super::round::{Placed, Round, run_of, runs};
use super::{Beside, CopyError, Job, Outcome, Pending, RunsOn, Strategy, in_pause};
use crate::staging::StagedPages;

/// Most pages that the copier takes at once: a writer of one of them waits for all, about as long as its own fault takes.
const RUN_PAGES: usize = 64;

/// The strategy.
#[derive(Debug, Default)]
pub struct CopyOnWrite {
    guard: Option<Guard>,
}

impl Strategy for CopyOnWrite {
    fn name(&self) -> &'static str {
        "copy-on-write"
    }

    fn prepare(&mut self, ram: &Arc<GuestRam>) -> Result<(), CopyError> {
        if !self.is_ready() {
            // The old one first: memory is registered once.
            self.guard = None;
            self.guard = Some(Guard::start(ram)?);
        }
        Ok(())
    }

    fn capture(&mut self, job: Job<'_>) -> Result<Pending, CopyError> {
        let ready = self.guard.as_ref().filter(|_| job.runs_on && !job.dirty.is_empty());
        let Some(Guard { shared, .. }) = ready else { return in_pause::copy(job) };
        let mut pages = job.early.unwrap_or_else(|| job.arena.empty());
        let slots = pages.place(job.dirty);
        let slots = shared.begin(slots)?;
        Ok(Pending::Beside(Box::new(Protected { shared: Arc::clone(shared), slots, pages: Some(pages) })))
    }

    fn runs_on(&self) -> RunsOn {
        RunsOn::AtOnce
    }

    fn learn(&mut self, _outcome: &Outcome) {}
}

impl CopyOnWrite {
    /// Whether pages can be protected now.
    pub(super) fn is_ready(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| guard.shared.lock().failure.is_none())
    }
}

/// The protection of a machine's memory, and the thread that serves writers.
#[derive(Debug)]
struct Guard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    fn start(ram: &Arc<GuestRam>) -> Result<Self, CopyError> {
        let host = |call| move |source: io::Error| WriteProtectError::Host { call, source };
        let protect = WriteProtect::over(ram)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| host("eventfd")(errno.into()))?;
        let shared = Arc::new(Shared {
            protect,
            ram: Arc::clone(ram),
            stop,
            state: Mutex::default(),
            #[cfg(test)]
            told: std::sync::atomic::AtomicU64::default(),
        });
        let theirs = Arc::clone(&shared);
        let serve = move || theirs.serve();
        let thread = std::thread::Builder::new().name("ft-on-write".into()).spawn(serve).map_err(host("clone"))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let told = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        if let (Ok(_), Some(thread)) = (told, self.thread.take()) {
            thread.join().ok();
        }
    }
}

/// What copier and thread share.
#[derive(Debug)]
struct Shared {
    protect: WriteProtect,
    ram: Arc<GuestRam>,
    /// Readable when the thread shall end.
    stop: OwnedFd,
    state: Mutex<State>,
    /// How often somebody wanted to write a page.
    #[cfg(test)]
    told: std::sync::atomic::AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    round: Option<Round>,
    /// Nothing is protected any more, and nothing can be.
    failure: Option<CopyError>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Protects the pages, and makes them the round. The guest is paused: nobody writes, and no writer is told of before the round is there.
    fn begin(&self, slots: Vec<Placed>) -> Result<Arc<[Placed]>, CopyError> {
        let round = Round::new(slots);
        let pages = Arc::clone(round.pages());
        if let Err(error) = runs(&pages).try_for_each(|run| self.protect.protect(run)) {
            self.give_up(WriteProtectError::GivenUp.into());
            return Err(error.into());
        }
        self.lock().round = Some(round);
        Ok(pages)
    }

    /// Lets everything be written, for good. The first failure is kept.
    fn give_up(&self, why: CopyError) {
        self.protect.give_up();
        let mut state = self.lock();
        state.round = None;
        state.failure.get_or_insert(why);
    }

    /// The thread: whoever wants to write a page that is not copied has it copied now.
    fn serve(&self) {
        loop {
            let mut ready = [
                PollFd::from_borrowed_fd(self.protect.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
            ];
            let polled = match poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
                Err(errno) => Err(WriteProtectError::Host { call: "poll", source: errno.into() }.into()),
            };
            if !ready[1].revents().is_empty() {
                return;
            }
            let served = polled.and_then(|()| {
                let wanted = self.protect.wanted()?;
                wanted.into_iter().try_for_each(|page| self.let_write(page))
            });
            if let Err(error) = served {
                return self.give_up(error);
            }
        }
    }

    /// The lock is held until the page is let go: else the copier could end this round, and the next one protect the page again, before that.
    ///
    /// A writer of any other page was told of late: its page is being copied, or was let go already. It is woken all the same, and looks again.
    fn let_write(&self, page: PageNo) -> Result<(), CopyError> {
        #[cfg(test)]
        self.told.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        let mut state = self.lock();
        let copied = match &mut state.round {
            Some(round) => round.wanted(page, |into| self.ram.copy_out(page, into))?,
            None => false,
        };
        let page = PageRun::one(page);
        Ok(if copied { self.protect.unprotect(page) } else { self.protect.wake(page) }?)
    }
}

/// Pages that are protected, and copied one run after another.
struct Protected {
    shared: Arc<Shared>,
    slots: Arc<[Placed]>,
    pages: Option<StagedPages>,
}

impl Protected {
    fn copy_all(&self, pages: &mut StagedPages) -> Result<usize, CopyError> {
        while let Some(run) = self.next_run()? {
            let run = &self.slots[run];
            for (page, slot) in run {
                self.shared.ram.copy_out(*page, pages.slot(*slot))?;
            }
            self.shared.protect.unprotect(run_of(run))?;
        }
        let rescued = self.shared.lock().round.take().map_or_else(Vec::new, Round::rescued);
        for (slot, copy) in &rescued {
            pages.slot(*slot).copy_from_slice(&**copy);
        }
        Ok(rescued.len())
    }

    fn next_run(&self) -> Result<Option<Range<usize>>, CopyError> {
        let mut state = self.shared.lock();
        if let Some(failure) = state.failure.take() {
            // The first failure is told; that there was one stays.
            state.failure = Some(WriteProtectError::GivenUp.into());
            return Err(failure);
        }
        Ok(state.round.as_mut().and_then(|round| round.next_run(RUN_PAGES)))
    }
}

impl Beside for Protected {
    fn finish(mut self: Box<Self>) -> Result<(StagedPages, usize), CopyError> {
        let mut pages = self.pages.take().expect("finished once");
        match self.copy_all(&mut pages) {
            Ok(written) => Ok((pages, written)),
            Err(error) => {
                self.shared.give_up(WriteProtectError::GivenUp.into());
                Err(error)
            }
        }
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        if self.pages.is_some() {
            self.shared.give_up(WriteProtectError::GivenUp.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Duration;

    use replication_proto::PageIndex;
    use vmm::{DirtyLedger, DirtySet, PAGE_SIZE};

    use super::*;
    use crate::staging::{Arena, alone};

    const PAGES: u64 = 1024;

    fn ram() -> Arc<GuestRam> {
        Arc::new(GuestRam::new(PAGES * 4096).unwrap())
    }

    /// All pages but every seventh, so that there are runs; those beyond the first half were never touched at first.
    fn set() -> DirtySet {
        DirtyLedger::new().take((0..PAGES).filter(|page| !page.is_multiple_of(7)).map(PageNo).collect())
    }

    fn all_of(ram: &GuestRam) -> Vec<[u8; PAGE_SIZE]> {
        let page = |page| {
            let mut bytes = [0; PAGE_SIZE];
            ram.copy_out(page, &mut bytes).unwrap();
            bytes
        };
        ram.pages().map(page).collect()
    }

    /// A guest that writes whole pages here and there, and stands still while somebody holds the lock.
    struct Writer {
        running: Arc<Mutex<()>>,
        end: Arc<AtomicBool>,
        writes: Arc<AtomicU64>,
        thread: Option<JoinHandle<()>>,
    }

    impl Writer {
        fn start(ram: &Arc<GuestRam>, seed: u64) -> Self {
            let (running, end) = (Arc::<Mutex<()>>::default(), Arc::<AtomicBool>::default());
            let writes = Arc::<AtomicU64>::default();
            let (ram, lock, over, counted) = (Arc::clone(ram), running.clone(), end.clone(), writes.clone());
            let thread = std::thread::spawn(move || {
                let mut state = seed;
                while !over.load(Ordering::Acquire) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let stopped = lock.lock().unwrap();
                    // A write that has begun ends before the guest stops: its fault does, too.
                    let byte = state.to_ne_bytes()[7] | 1;
                    ram.copy_in(PageNo((state >> 33) % PAGES), &[byte; PAGE_SIZE]).unwrap();
                    drop(stopped);
                    if counted.fetch_add(1, Ordering::AcqRel).is_multiple_of(64) {
                        std::thread::sleep(Duration::from_micros(20));
                    }
                }
            });
            Self { running, end, writes, thread: Some(thread) }
        }

        /// It goes on writing. Returns how often it has written.
        fn goes_on(&self) -> u64 {
            let writes = || self.writes.load(Ordering::Acquire);
            let enough = writes() + 100;
            while writes() < enough {
                std::thread::yield_now();
            }
            writes()
        }
    }

    impl Drop for Writer {
        fn drop(&mut self) {
            self.end.store(true, Ordering::Release);
            self.thread.take().unwrap().join().unwrap();
        }
    }

    fn job<'a>(ram: &'a GuestRam, arena: &'a Arc<Arena>, dirty: &'a DirtySet) -> Job<'a> {
        Job { ram, share: &alone, arena, dirty, early: None, runs_on: true }
    }

    #[test]
    fn what_is_copied_beside_a_guest_that_writes_is_what_it_was_in_the_pause() {
        let (ram, arena) = (ram(), Arena::new(1 << 30));
        (0..PAGES / 2).for_each(|page| ram.copy_in(PageNo(page), &[2; PAGE_SIZE]).unwrap());
        let writers: Vec<_> = (1..4).map(|seed| Writer::start(&ram, seed)).collect();
        let mut strategy = CopyOnWrite::default();
        let (mut rescued, mut copied) = (0, 0);
        for round in 0..100 {
            strategy.prepare(&ram).unwrap();
            let dirty = set();
            let stopped: Vec<_> = writers.iter().map(|writer| writer.running.lock().unwrap()).collect();
            let expected = all_of(&ram);
            // Every other time, half of the pages were copied before, as they were then.
            let early = (round % 2 == 1).then(|| arena.stage(&ram, &dirty, &alone).unwrap());
            let pending = strategy.capture(Job { early, ..job(&ram, &arena, &dirty) }).unwrap();
            drop(stopped);
            let Pending::Beside(beside) = pending else { panic!("it was copied in the pause") };
            let (pages, written) = beside.finish().unwrap();
            assert_eq!(pages.len(), dirty.len());
            for (PageIndex(index), page) in pages.indexes.iter().zip(pages.bytes().as_chunks::<PAGE_SIZE>().0) {
                assert!(*page == expected[usize::try_from(*index).unwrap()], "round {round}, page {index}");
            }
            rescued += written;
            copied += pages.len();
            dirty.retire();
        }
        let writes: u64 = writers.iter().map(Writer::goes_on).sum();
        println!("{writes} writes, {copied} pages copied, {rescued} of them on write");
        assert!(rescued > 0 && rescued < copied, "both threads copy: {rescued} of {copied}");
    }

    /// Whatever fails after the pause: the error is told, nobody hangs, and the next checkpoint begins anew.
    #[test]
    fn a_failure_lets_everything_go_and_gives_the_error() {
        let (ram, arena) = (ram(), Arena::new(1 << 30));
        let mut strategy = CopyOnWrite::default();
        for dropped in [false, true] {
            strategy.prepare(&ram).unwrap();
            let writer = Writer::start(&ram, 5);
            let dirty = set();
            let stopped = writer.running.lock().unwrap();
            let Ok(Pending::Beside(beside)) = strategy.capture(job(&ram, &arena, &dirty)) else { panic!("protected") };
            drop(stopped);
            if dropped {
                drop(beside);
            } else {
                strategy.guard.as_ref().unwrap().shared.protect.give_up();
                let error = beside.finish().map(|_| ()).unwrap_err();
                assert!(matches!(error, CopyError::Protect(_)), "{error}");
            }
            assert!(!strategy.is_ready());
            writer.goes_on();
            assert_eq!(arena.in_flight(), 0);
        }
        strategy.prepare(&ram).unwrap();
        assert!(strategy.is_ready());
    }

    /// A writer whose page was let go just before it was told of: the kernel may have put it to sleep after that, so it has to be woken once more.
    #[test]
    fn a_writer_that_is_told_of_late_is_woken() {
        let ram = ram();
        let guard = Guard::start(&ram).unwrap();
        let page = PageNo(3);
        // There is no round that has this page: as far as the guard knows, it was let go. It stays protected here, so that the writer, once woken, asks again.
        guard.shared.protect.protect(PageRun::one(page)).unwrap();
        let theirs = Arc::clone(&ram);
        let writer = std::thread::spawn(move || theirs.copy_in(page, &[9; PAGE_SIZE]).unwrap());
        let asked = || guard.shared.told.load(Ordering::Acquire);
        while asked() < 3 {
            std::thread::yield_now();
        }
        assert!(!writer.is_finished());
        guard.shared.protect.unprotect(PageRun::one(page)).unwrap();
        writer.join().unwrap();
    }

    #[test]
    fn a_guest_that_stays_stopped_is_copied_in_the_pause() {
        let (ram, arena) = (ram(), Arena::new(1 << 30));
        let mut strategy = CopyOnWrite::default();
        strategy.prepare(&ram).unwrap();
        let dirty = set();
        let pending = strategy.capture(Job { runs_on: false, ..job(&ram, &arena, &dirty) }).unwrap();
        assert!(matches!(pending, Pending::Copied(pages) if pages.len() == dirty.len()));
    }
}
