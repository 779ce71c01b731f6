//! Work that stopped vCPUs' threads share with whoever stopped them: in a pause they have nothing to do, and their processors are awake.
#![expect(unsafe_code, reason = "a borrowed piece of work is lent to threads that outlive it")]

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::wait::wait_a_moment;

/// What is shared: pieces, numbered from 0, each done once and by one thread.
struct Job<'a> {
    next: AtomicUsize,
    pieces: usize,
    work: &'a (dyn Fn(usize) + Sync),
}

impl Job<'_> {
    /// Does pieces until none is left.
    fn work_off(&self) {
        loop {
            let piece = self.next.fetch_add(1, Ordering::Relaxed);
            if piece >= self.pieces {
                return;
            }
            (self.work)(piece);
        }
    }
}

/// Where work is offered and found.
#[derive(Default)]
pub(super) struct Crew {
    /// The job on offer, or null.
    job: AtomicPtr<Job<'static>>,
    /// Helpers that may have a reference to it.
    inside: AtomicUsize,
}

impl Crew {
    /// Does all pieces, with the help of whoever comes by meanwhile. All of them are done, by everybody, when this returns.
    ///
    /// # Panics
    /// Two jobs at one time: only who stopped the vCPUs offers work. And if `work` panics.
    pub(super) fn share(&self, pieces: usize, work: &(dyn Fn(usize) + Sync)) {
        let job = Job { next: AtomicUsize::new(0), pieces, work };
        let offered = ptr::from_ref(&job).cast_mut().cast::<Job<'static>>();
        let before = self.job.swap(offered, Ordering::SeqCst);
        assert!(before.is_null(), "one job at a time");
        // Also when a piece panics: nobody may look at `job` once it is gone.
        let _withdrawn = Withdrawn(self);
        job.work_off();
    }

    /// Helps with the job on offer, if there is one.
    pub(super) fn help(&self) {
        if self.job.load(Ordering::Relaxed).is_null() {
            return;
        }
        let _inside = Inside::enter(&self.inside);
        let job = self.job.load(Ordering::SeqCst);
        if job.is_null() {
            return;
        }
        // SAFETY: it was offered by `share`, whose frame holds it, and which takes it back (SeqCst) before it waits until `inside` is 0. This thread raised
        // `inside` (SeqCst) before it found the job still on offer, so `share` waits for this thread. `work` is Sync.
        unsafe { &*job }.work_off();
    }
}

/// Takes the offer back and waits for helpers that took it.
struct Withdrawn<'a>(&'a Crew);

impl Drop for Withdrawn<'_> {
    fn drop(&mut self) {
        self.0.job.store(ptr::null_mut(), Ordering::SeqCst);
        // The helper's last piece; on a busy host it may have to be scheduled first.
        wait_a_moment(|| self.0.inside.load(Ordering::SeqCst) == 0);
    }
}

/// Counted as a helper until dropped, also when a piece panics.
struct Inside<'a>(&'a AtomicUsize);

impl<'a> Inside<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn every_piece_is_done_once_before_share_returns() {
        let (crew, end) = (Crew::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !end.load(Ordering::Relaxed) {
                        crew.help();
                    }
                });
            }
            for round in 0..2_000 {
                let mut done = vec![0u32; 1 + round % 70];
                let slots: Vec<_> = done.iter_mut().map(Mutex::new).collect();
                crew.share(slots.len(), &|piece| **slots[piece].lock().unwrap() += 1);
                drop(slots);
                assert!(done.iter().all(|times| *times == 1), "round {round}: {done:?}");
            }
            end.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_piece_that_panics_leaves_no_job_behind() {
        let crew = Crew::default();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| crew.share(3, &|_| panic!("a piece"))));
        assert!(panicked.is_err());
        crew.help();
        let done = AtomicUsize::new(0);
        crew.share(5, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 5);
    }
}
